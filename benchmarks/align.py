"""How fast and lean a policy is aligned: our loop against TRL's DPOTrainer on the same pairs.

Usage: python benchmarks/align.py [--models 4:96,30:24] [--answers 4] [--help]

One process, one thread, fp32, no gradient checkpointing, one epoch of DPO in global batches of 8
with the policy as its own reference, pairs drawn at random. With `--answers 4` the model samples so
many answers to each prompt, and all their pairs are trained on in batches of 24, prompt by prompt
(`batch_by: prompt`).

Everything after tokenising counts: the reference pass, every forward and backward pass, every
optimizer step. Both sides get the same token ids in the same order, and no pair is truncated. Each
run is a process of its own, so that its peak memory is its own; sides are interleaved. TRL tries
each micro-batch on some of the pairs; the fastest then runs on all of them, once computing its
reference beside the policy (its default) and once before it (`precompute_ref_log_probs`). Ratios
and memory are against that fastest one. Ours runs once more with activation checkpoints: slower,
and the least memory.

The last line is one JSON object with all figures.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch

import measure
import torch
import typer
from align_rows import MAX_LENGTH, SEED, drawn_rows, first_layers
from safetensors.torch import load_file, save_file

from cwpo_dist.config import LoraConfig, ModelConfig, TrainingConfig
from cwpo_dist.lm.batches import global_batch, steps_per_epoch
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.flops import useful_flops
from cwpo_dist.lm.loading import load_policy
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.recompute import let_recompute, start_training
from cwpo_dist.lm.rows import Row
from cwpo_dist.pairs.records import prompt_of

BETA, RATE = 0.1, 5e-6
LORA = LoraConfig(lora_dropout=0.0)

app = typer.Typer(add_completion=False)


def training_config(spec: dict[str, Any]) -> TrainingConfig:
    """Ours, with TRL's schedule."""
    return TrainingConfig(
        learning_rate=RATE,
        num_train_epochs=spec["epochs"],
        global_batch_size=spec["batch"],
        max_tokens_per_micro_batch=spec["max_tokens"],
        gradient_checkpointing=spec["checkpoints"],
        lr_scheduler_type="linear",
        zero_stage=0,
        lora=LORA if spec["lora"] else None,
    )


def policy(spec: dict[str, Any]) -> Any:
    """The model to align (fp32 on a CPU), trainable in full or through LoRA."""
    from cwpo_dist.scoring.devices import assigned_device
    from cwpo_dist.training.lora import add_lora

    model = load_policy(ModelConfig(model_name_or_path=spec["model"]), device=assigned_device())
    if spec["lora"]:
        return add_lora(model, LORA, "logps", SEED)
    model.requires_grad_(True)
    return model


def preferences(
    spec: dict[str, Any], rows: dict[str, Row], references: list[tuple[float, float]]
) -> Any:
    """Pairs of weight 1."""
    from cwpo_dist.training.tasks import Preference

    told: Any = {"loss_type": "sigmoid", "beta": BETA, "batch_by": spec["batch_by"]}
    return Preference(list(rows.values()), list(rows), [1.0] * len(rows), references, **told)


def ours(spec: dict[str, Any], rows: dict[str, Row]) -> dict[str, Any]:
    """The reference pass, then the loop in DeepSpeed's engine: what `align` does in one worker."""
    from cwpo_dist.scoring.forward import RowForward
    from cwpo_dist.training import deepspeed_engine
    from cwpo_dist.training.loop import Hooks, Run, gradients, train
    from cwpo_dist.training.micro_batches import Part
    from cwpo_dist.training.torch_engine import TorchEngine

    config, model = training_config(spec), policy(spec)
    let_recompute(model)
    module = AnswerLogProbs(model)
    by_prompt = groupby(enumerate(rows.items()), lambda pair: prompt_of(pair[1][0]))
    parts = [Part.of([(at, row) for at, (_, row) in pairs]) for _, pairs in by_prompt]
    answers = [row for part in parts for row in part.rows]  # each once, as they are stored
    flops = useful_flops(module).forward(answers)
    if spec["engine"] == "torch":
        engine: Any = TorchEngine(module, config)
    else:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # as of any launcher
        meet = f"file://{tempfile.mkdtemp()}/group"
        torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
        settings = deepspeed_engine.deepspeed_config(config, torch.float32)
        engine = deepspeed_engine.DeepSpeedEngine(module, config, settings)
    started = time.perf_counter()
    forward = RowForward(module, 0, MAX_LENGTH, spec["max_tokens"])
    references = of_pairs(forward(answers).values, parts)
    reference_s = time.perf_counter() - started
    run = Run(config, SEED, forward.layout, 0)
    task = preferences(spec, rows, references)
    start_training(module)
    if spec["gradient"]:
        _, first = global_batch(task.order, spec["batch"], SEED, 0)
        gradients(task, engine, run, 0, first.tolist())
        _keep_gradient(module.model, spec["gradient"])
        return {}
    train(task, engine, run, Hooks())
    return {
        "reference_s": reference_s,
        "train_s": time.perf_counter() - started - reference_s,
        # frozen weights have no gradient
        "flops": flops * (1 + (2 if spec["lora"] else 3) * spec["epochs"]),
        "layout": forward.layout,
    }


def of_pairs(values: list[list[float]], parts: list[Any]) -> list[tuple[float, float]]:
    """What each pair's answers were given, from that of the answers of all rows."""
    flat, found = iter(values), []
    for part in parts:
        own = [value for _ in part.rows for value in next(flat)]
        found += [(own[a], own[b]) for a, b in part.places]
    return found


def trl(spec: dict[str, Any], rows: dict[str, Row]) -> dict[str, Any]:
    """TRL's trainer on token ids; its tokenising is left out, as ours is."""
    import datasets
    import transformers
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()

    class Trainer(DPOTrainer):
        """Takes pairs that are tokenised already, in the order they stand in."""

        reference_s = 0.0

        def _prepare_dataset(self, dataset: Any, *_rest: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_rest: Any) -> Any:
            return torch.utils.data.SequentialSampler(pairs)

        def _precompute_ref_logps(self, *given: Any) -> Any:
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*given)
            self.reference_s = time.perf_counter() - started
            return dataset

    class KeepGradient(transformers.TrainerCallback):
        """Writes the gradient of the first step."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            _keep_gradient(kw["model"], spec["gradient"])

    batch, task = spec["batch"], preferences(spec, rows, [(0.0, 0.0)] * len(rows))
    steps = range(steps_per_epoch(len(rows), batch))
    order = [i for step in steps for i in global_batch(task.order, batch, SEED, step)[1].tolist()]
    pairs = [
        {"prompt_ids": r.prompt, "chosen_ids": r.answers[0], "rejected_ids": r.answers[1]}
        for r in (task.rows[i] for i in order)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=batch // spec["micro_batch"],
            num_train_epochs=spec["epochs"],
            max_steps=1 if spec["gradient"] else -1,
            max_grad_norm=1e9 if spec["gradient"] else 1.0,
            learning_rate=RATE,
            beta=BETA,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            precompute_ref_log_probs=spec["precompute"],
            disable_dropout=True,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=SEED,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        tokenizer = load_tokenizer(ModelConfig(model_name_or_path=spec["model"]))
        trainer = Trainer(
            model=policy(spec),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[KeepGradient()] if spec["gradient"] else [],
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {"reference_s": trainer.reference_s, "train_s": seconds}


def _keep_gradient(model: Any, path: str) -> None:
    """By parameter name; tied weights once."""
    found = {
        n: p.grad.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad
    }
    save_file(found, path)


@app.command(hidden=True)
def side(spec_json: str) -> None:
    """One side, one run: prints its figures as JSON."""
    torch.set_num_threads(1)
    Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go when memory is short
    spec = json.loads(spec_json)
    told = json.loads(Path(spec["rows"]).read_text())
    rows = {name: Row(each["prompt"], tuple(each["answers"])) for name, each in told.items()}
    figures = (ours if spec["side"] == "ours" else trl)(spec, rows)
    print(json.dumps(figures | {"peak_gib": measure.peak_resident() / 2**30}))


class OutOfMemory(Exception):
    """The system killed a side that asked for more memory than there is."""


def run_side(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs `side` in a process of its own.

    Raises:
        OutOfMemory: when it was killed.
        SystemExit: with its last lines, when it fails otherwise.
    """
    command = [sys.executable, __file__, "side", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        raise OutOfMemory
    if done.returncode:
        raise SystemExit(f"{spec} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def gradient_difference(spec: dict[str, Any], folder: Path) -> float:
    """‖ours − TRL's‖ / ‖TRL's‖ of the first step's flat gradient."""
    found = []
    for name in ("ours", "trl"):
        path = str(folder / f"{name}.safetensors")
        # plain torch: DeepSpeed keeps its gradients elsewhere; tests hold its engine to plain torch
        run_side(spec | {"side": name, "gradient": path, "engine": "torch", "micro_batch": 4})
        found.append(load_file(path))
    mine, theirs = found
    names = [name for name in theirs if name in mine]
    error = sum(float((mine[n].double() - theirs[n].double()).square().sum()) for n in names)
    size = sum(float(theirs[n].double().square().sum()) for n in names)
    return float((error / size) ** 0.5)


def summary(runs: dict[str, list[dict[str, Any]]], pairs: int) -> dict[str, Any]:
    """Medians of each side's runs; TRL's best micro-batch is the one with the most pairs/s."""
    figures: dict[str, Any] = {}
    for name, each in runs.items():
        seconds = statistics.median(run["reference_s"] + run["train_s"] for run in each)
        figures[name] = {
            "pairs_s": pairs / seconds,
            "reference_s": statistics.median(run["reference_s"] for run in each),
            "train_s": statistics.median(run["train_s"] for run in each),
            "peak_gib": max(run["peak_gib"] for run in each),
        }
    return figures


def fastest(trials: dict[int, dict[str, Any]]) -> int:
    """The micro-batch that took the least time."""
    return min(trials, key=lambda size: trials[size]["train_s"])


def measured(
    name: str, rows: Path, options: dict[str, Any], sizes: list[int], trial: int, repeats: int
) -> dict[str, Any]:
    """One model: TRL's micro-batches on a few pairs, then both sides on all of them."""
    folder = rows.parent
    common = options | {"model": name, "rows": str(rows), "gradient": ""}
    common |= {"precompute": False, "checkpoints": False}
    figures: dict[str, Any] = {"max_grad_diff": gradient_difference(common, folder)}
    print(f"gradients of the first step differ by {figures['max_grad_diff']:.1e}", flush=True)
    few = folder / "few.json"
    few.write_text(json.dumps(dict(list(json.loads(rows.read_text()).items())[:trial])))
    trials = {}
    for size in sizes:
        try:
            trials[size] = run_side(common | {"side": "trl", "rows": str(few), "micro_batch": size})
            print(f"  TRL, {trial} pairs, micro-batch {size}: {trials[size]}", flush=True)
        except OutOfMemory:
            print(
                f"  TRL, {trial} pairs, micro-batch {size}: more memory than there is", flush=True
            )
            break  # larger ones take more
    peer = common | {"side": "trl", "micro_batch": fastest(trials)}
    sides = {
        "ours": common | {"side": "ours"},
        "ours_checkpointed": common | {"side": "ours", "checkpoints": True},
        "trl": peer,
        "trl_precomputed": peer | {"precompute": True},
    }
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    rate = measure.matmul_rate()
    for _ in range(repeats):
        for side, spec in sides.items():
            runs[side].append(run_side(spec))
            print(f"  {side}: {runs[side][-1]}", flush=True)
            rate = max(rate, measure.matmul_rate(1.0))
    count = len(json.loads(rows.read_text())) * options["epochs"]
    figures |= {"trl_trials": trials, "trl_micro_batch": fastest(trials), "pairs": count}
    figures |= {"sides": summary(runs, count), "matmul_gflop_s": rate / 1e9}
    return figures | ratios(figures["sides"], runs["ours"][0]["flops"] / rate)


def ratios(sides: dict[str, dict[str, float]], ideal_s: float) -> dict[str, float]:
    """Ours against TRL's; `ideal_s` is what our useful work takes at the matrix-product rate."""
    mine, theirs, lean = sides["ours"], sides["trl"], sides["ours_checkpointed"]
    return {
        "ratio": mine["pairs_s"] / theirs["pairs_s"],
        "ratio_precomputed": mine["pairs_s"] / sides["trl_precomputed"]["pairs_s"],
        "memory_share": mine["peak_gib"] / theirs["peak_gib"],
        "ratio_checkpointed": lean["pairs_s"] / theirs["pairs_s"],
        "memory_share_checkpointed": lean["peak_gib"] / theirs["peak_gib"],
        "useful_flops_share": ideal_s / (mine["reference_s"] + mine["train_s"]),
    }


def headline(models: dict[int, dict[str, Any]]) -> dict[str, float]:
    """The figures by which this bench is known; those of a model that did not run are left out."""
    found = {"max_grad_diff": max(each["max_grad_diff"] for each in models.values())}
    for name in ("memory_share", "memory_share_checkpointed"):
        found[name] = max(each[name] for each in models.values())
    if 4 in models:
        found["ratio_4_layers"] = models[4]["ratio"]
        found["ratio_precomputed"] = models[4]["ratio_precomputed"]
    if 30 in models:
        found["ratio_135m"] = models[30]["ratio"]
        found["useful_flops_share"] = models[30]["useful_flops_share"]
    return found


@app.command()
def compare(
    model: Annotated[Path, typer.Option(help="a Hugging Face folder of a causal LM")] = Path(
        "runs/models/SmolLM2-135M-Instruct"
    ),
    models: Annotated[
        str, typer.Option(help="first layers of it, and how many pairs; 30: all of SmolLM2-135M")
    ] = "4:96,30:24",
    data: Annotated[Literal["hh", "ukp", "demo"], typer.Option(help="hh, ukp: CWPO_DATA")] = "hh",
    epochs: int = 1,
    max_tokens: Annotated[int, typer.Option(help="of one of our micro-batches")] = 512,
    lora: Annotated[bool, typer.Option(help="LoRA on both sides, in place of all weights")] = False,
    engine: Annotated[Literal["deepspeed", "torch"], typer.Option(help="ours")] = "deepspeed",
    repeats: Annotated[int, typer.Option(help="interleaved runs of each side")] = 1,
    answers: Annotated[int, typer.Option(help="sampled to a prompt; 2: the data's own")] = 2,
    micro_batches: Annotated[str, typer.Option(help="TRL's, to choose from")] = "1,2,4,8",
    trial: Annotated[int, typer.Option(help="pairs on which TRL's micro-batch is chosen")] = 16,
) -> None:
    """Measures and prints; see the head of this file for what is compared with what."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {
        "lora": lora,
        "epochs": epochs,
        "max_tokens": max_tokens,
        "engine": engine,
    }
    several = answers > 2
    options |= {"batch": 24 if several else 8, "batch_by": "prompt" if several else "pair"}
    figures: dict[str, Any] = {"benchmark": "align", "data": data, "answers": answers, **options}
    figures["environment"] = measure.environment()
    sizes = [int(size) for size in micro_batches.split(",")]
    found: dict[int, dict[str, Any]] = {}
    for layers, pairs in (map(int, each.split(":")) for each in models.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            name = first_layers(model, layers, Path(scratch) / "model")
            rows = drawn_rows(data, name, pairs, answers, model, Path(scratch))
            print(f"{layers} layers, {pairs} pairs", flush=True)
            found[layers] = measured(name, rows, options, sizes, trial, repeats)
    print(json.dumps(figures | {"models": found} | headline(found)))


if __name__ == "__main__":
    app(["compare", *sys.argv[1:]] if sys.argv[1:2] != ["side"] else sys.argv[1:])
