"""What the ranks of test_zero.py and test_checkpoint.py do, and the function that starts them.

A group of two ranks and a group of one work side by side through all cases, as starting a group
takes longer than any of them, and resume from each other's checkpoints. The folder holds `model/`;
rank 0 writes each case's results there as safetensors.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import save_tiny
from torch import Tensor, nn
from zero_cases import (
    ACROSS_STAGES,
    ALONE_CASES,
    ALREADY_DONE,
    BF16_CASE,
    MATRIX_CASES,
    REFERENCE_SHARDS,
    RESUME_CASES,
    SEED,
    SEQUENCE_CASES,
    STAGES,
    ZERO_CASES,
    Case,
    Watches,
    budgets,
    first_batch,
    make_module,
    make_rows,
    make_run,
    make_spec,
    make_task,
    reference_job,
)

from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.rows import Layout
from cwpo_dist.pairs.records import (
    LOG_PROB_SCHEMA,
    REJECT_SCHEMA,
    TOKEN_SCHEMA,
    AnswerTokens,
    answer_id,
    prompt_id,
    table_of,
)
from cwpo_dist.pairs.stored import pairs_of, whole_schema, write_pairs
from cwpo_dist.scoring.pipeline import commit, part
from cwpo_dist.scoring.retries import ShardOutput
from cwpo_dist.scoring.scorers import policy_module
from cwpo_dist.scoring.sharded import Together
from cwpo_dist.storage import Store
from cwpo_dist.training.lease import LeaseToken
from cwpo_dist.training.loop import Engine, Hooks, gradients, train
from cwpo_dist.training.rank import rank_process
from cwpo_dist.training.tasks import Task

CPU = torch.device("cpu")
TIME_LIMIT_S = {
    "short": 1800,
    "long": 3600,
    "shared": 1800,
}  # a tenth or less of it on an idle machine


def deepspeed_engine(case: Case, folder: Path) -> Any:
    from cwpo_dist.training import deepspeed_engine as engine

    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    settings = engine.deepspeed_config(case.config(), dtype)
    with engine.sharded_loading(settings):
        module = make_module(case, folder)
    return engine.DeepSpeedEngine(module, case.config(), settings)


def layout_of(engine: Engine) -> Layout:
    """As a rank asks for it, engine first; a collective."""
    return choose_layout(engine.module, longest=64, group=engine.sequence).layout


def weights_of(engine: Engine) -> dict[str, Tensor]:
    from cwpo_dist.training.checkpoint import trainable

    return {
        name: _whole(engine, parameter).detach().clone().contiguous()
        for name, parameter in trainable(engine.module)
    }


def _whole(engine: Engine, parameter: nn.Parameter) -> Tensor:
    """The fp32 parameter; a collective."""
    if engine.replicated:
        return parameter
    from deepspeed.utils import safe_get_full_fp32_param

    found: Tensor = safe_get_full_fp32_param(parameter)
    return found


def full_gradients(engine: Any) -> dict[str, Tensor]:
    """Whole gradients, averaged over ranks, before clipping."""
    from deepspeed.utils import safe_get_full_grad

    from cwpo_dist.training.checkpoint import trainable

    found = {}
    for name, parameter in trainable(engine.module):
        if engine.stage == 0:  # which exchanges gradients as part of its step
            gradient = parameter.grad / engine.world_size
            dist.all_reduce(gradient)
        else:
            gradient = safe_get_full_grad(parameter)
        found[name] = gradient.detach().clone().contiguous()
    return found


def exactness(case: Case, folder: Path) -> None:
    """Gradients at several budgets, the loss, and the weights after 20 steps."""
    engine, task = deepspeed_engine(case, folder), make_task(case.task)
    if case.task not in {"fit", "heads"}:
        engine.module.head.chunk_size = 7  # many chunks, one gather
    layout = layout_of(engine)
    empty = sum(p.numel() == 0 for p in engine.module.parameters())
    results = {"packed": torch.tensor([layout == "packed"]), "sharded": torch.tensor([empty])}
    for budget in budgets(case, engine.world_size):
        result = gradients(task, engine, make_run(case, budget, layout), 0, first_batch(case))
        for name, gradient in full_gradients(engine).items():
            results[f"gradient.{budget}.{name}"] = gradient
        results[f"loss.{budget}"] = torch.tensor([result.loss], dtype=torch.float64)
        norm = engine.step(0.0)
        results[f"norm.{budget}"] = torch.tensor([norm], dtype=torch.float64)
    hooks = Watches(task, engine, make_run(case, layout=layout))
    train(task, engine, hooks.run, hooks)
    results["held out"] = torch.tensor(hooks.losses, dtype=torch.float64)
    results |= {f"weight.{name}": value for name, value in weights_of(engine).items()}
    write(folder, f"{case.name}.{dist.get_world_size()}", results)
    engine.close()


class _SaveAt(Hooks):
    """Begins a checkpoint at the given step, and commits it when all ranks have it."""

    def __init__(self, task: Task, case: Case, engine: Any, folder: Path, step: int) -> None:
        from cwpo_dist.training import checkpoint

        self.task, self.step = task, step
        self.saver = checkpoint.Saver(
            Store(str(folder / f"{case.name}.{engine.world_size}")),
            engine,
            checkpoint.RunIdentity("key", SEED, "base"),
            f"attempt{engine.world_size}",
            save_total_limit=2,
            fence=lambda: None,
        )

    def wants_poll(self) -> bool:
        return self.saver.news

    def poll(self) -> bool:
        self.saver.settle()
        return False

    def save(self, step: int) -> None:
        if step == self.step:
            self.saver.begin(step, self.task.learned)


def trained(engine: Engine, task: Task) -> dict[str, Tensor]:
    """All that a training has changed."""
    learned = torch.tensor(task.learned, dtype=torch.float64)
    return weights_of(engine) | ({"learned": learned} if task.learned else {})


def uninterrupted(case: Case, folder: Path) -> None:
    """Six steps, with a checkpoint after the third."""
    engine = deepspeed_engine(case, folder)
    run = make_run(case, layout=layout_of(engine))
    run = replace(run, config=run.config.model_copy(update={"save_steps": 3}))
    task = make_task(case.task)
    hooks = _SaveAt(task, case, engine, folder, 3)
    train(task, engine, run, hooks)
    hooks.saver.settle(wait=True)
    write(folder, f"{case.name}.{engine.world_size}.whole", trained(engine, task))
    engine.close()


def resumed(case: Case, folder: Path, written_by: int, of: str = "") -> None:
    """The last three steps, from the checkpoint of a run with other ranks or of another stage."""
    from cwpo_dist.training import checkpoint

    store = Store(str(folder / f"{of or case.name}.{written_by}"))
    found = None
    while found is None:  # the other group may be behind; the test's time limit bounds this
        found = checkpoint.newest(store)
        time.sleep(0.1)
    assert found.step == 3
    engine = deepspeed_engine(case, folder)
    checkpoint.load(found, engine, checkpoint.RunIdentity("key", SEED, "base"))
    task = make_task(case.task)
    task.learned[:] = found.learned
    train(task, engine, make_run(case, layout=layout_of(engine)), Hooks(), start_step=3)
    write(folder, f"{case.name}.{engine.world_size}.from{written_by}{of}", trained(engine, task))
    engine.close()


def stage(name: str, folder: Path) -> None:
    """A whole stage, as a Ray worker does it, but for Ray; its model in several files."""
    from cwpo_dist.training import rank_hooks, saving

    saving.MAX_SHARD_SIZE = "20KB"
    rank_hooks.ASK_RAY_S = math.inf  # there is none to ask, however slow the machine is
    spec = make_spec(name, folder)
    with rank_process(spec.config, CPU) as watchdog:
        spec.run(LeaseToken(spec.store, 0), CPU, watchdog)


def write_reference_inputs(folder: Path) -> None:
    """Pairs, the tokens of their answers, and one shard of the output."""
    rows = iter(make_rows())
    for index, number in enumerate(REFERENCE_SHARDS):
        pairs, tokens = [], []
        for place, row in enumerate(itertools.islice(rows, number)):
            text = {"prompt": f"{place}?", "response_a": "a", "response_b": "b"}
            pairs.append({"pair_id": f"{index}-{place}", "split": "unlabelled", **text})
            for answer, ids in zip("ab", row.answers, strict=True):
                name = answer_id(prompt_id(text["prompt"]), answer)
                tokens.append(AnswerTokens(name, row.prompt, ids))
        store = Store(str(folder))
        write_pairs(store, index, pairs_of(pa.Table.from_pylist(pairs, whole_schema("text"))))
        store.create_table(part("tokens", index), table_of(tokens, TOKEN_SCHEMA))
    nothing = LOG_PROB_SCHEMA.empty_table(), REJECT_SCHEMA.empty_table()
    commit(reference_job(folder), ALREADY_DONE, ShardOutput(*nothing, {"rows_in": 0, "rows": 0}))


def reference(folder: Path) -> None:
    """The shards that are left, by all ranks under ZeRO-3, as Ray workers do it, but for Ray."""
    from cwpo_dist.training.frozen import FrozenSpec

    job = reference_job(folder)
    worker: Any = job.make_worker
    config = Case("reference", 3).config()
    model, work = worker.args[2], Together(job)
    spec = FrozenSpec("reference", job.output, config, model, policy_module, work)
    with rank_process(config, CPU) as watchdog:
        spec.run(LeaseToken(job.output, 0), CPU, watchdog)


def write(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    if dist.get_rank() == 0:
        save_file(tensors, folder / f"{name}.safetensors")


def main(folder: Path, rank: int, world: int, form: str) -> None:
    """Joins the group through a file, then does all cases of the short or the long form."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    cases = {("long", 1): long_form, ("long", 2): long_form, ("short", 1): alone}
    cases[("shared", 4)] = shared
    cases.get((form, world), together)(folder)


def long_form(folder: Path) -> None:
    for case in MATRIX_CASES:
        exactness(case, folder)


def shared(folder: Path) -> None:
    for case in SEQUENCE_CASES:
        exactness(case, folder)


def alone(folder: Path) -> None:
    cases = [replace(case, sequence=1) for case in RESUME_CASES]
    for case in cases:
        uninterrupted(case, folder)
    for case in cases:
        resumed(case, folder, written_by=2)
    for case in ALONE_CASES:
        exactness(case, folder)


def together(folder: Path) -> None:
    for case in [*RESUME_CASES, BF16_CASE]:
        uninterrupted(case, folder)
        resumed(case, folder, written_by=2)
    for case in ZERO_CASES:
        exactness(case, folder)
    for name in STAGES:
        stage(name, folder)
    reference(folder)
    named = {case.name: case for case in RESUME_CASES}
    for case in RESUME_CASES:
        resumed(case, folder, written_by=1)
    for name, of in ACROSS_STAGES:
        resumed(named[name], folder, written_by=2, of=of)


def results(form: str = "short") -> Path:
    """The folder with all results, made once for all processes of tests: the first one makes it."""
    folder = Path(os.environ["CWPO_TEST_SHARED"]) / f"zero-{form}"
    folder.mkdir(exist_ok=True)
    said = folder / "said"  # by ranks that failed; written last
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            said.write_text(_run_ranks(folder, form))
    failure = said.read_text()
    assert not failure, failure
    return folder


def _run_ranks(folder: Path, form: str) -> str:
    """Runs both groups; what the ranks said if one failed."""
    save_tiny(folder / "model", "llama", tie_word_embeddings=True)
    mixture = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    save_tiny(
        folder / "mixture", "mixtral", **mixture, hidden_size=32, intermediate_size=64, head_dim=8
    )
    write_reference_inputs(folder)
    worlds = (4,) if form == "shared" else (2, 1)
    ranks = [(rank, world) for world in worlds for rank in range(world)]
    processes = []
    for rank, world in ranks:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
        }
        log = (folder / f"log-{world}-{rank}").open("w")
        command = [sys.executable, __file__, str(folder), str(rank), str(world), form]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + TIME_LIMIT_S[form]
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):  # the others may wait for it
            break
        time.sleep(0.2)
    late = time.monotonic() >= deadline
    failed = [process.poll() != 0 for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    logs = [(folder / f"log-{world}-{rank}").read_text()[-3000:] for rank, world in ranks]
    why = f"not done after {TIME_LIMIT_S[form]} s" if late else "a rank failed"
    return "\n\n".join([why, *logs]) if any(failed) else ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    # Past the interpreter's end: torch's file store aborts there now and then, all work done.
    os._exit(0)
