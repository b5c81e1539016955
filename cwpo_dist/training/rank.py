"""One rank of a training stage: settings in; a trained, checkpointed, exported model out."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from cwpo_dist.config import ModelConfig, TrainingConfig
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.lm.flops import useful_flops
from cwpo_dist.lm.identity import Identity
from cwpo_dist.lm.loading import ModelError, dtype_of, load_annotator_base, load_policy
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.recompute import let_recompute, start_training
from cwpo_dist.storage import Store, digest
from cwpo_dist.training import checkpoint, held_out, tracking
from cwpo_dist.training.courier import Courier
from cwpo_dist.training.lease import LeaseToken
from cwpo_dist.training.loop import Hooks, NonFiniteLoss, Preempted, Run
from cwpo_dist.training.loop import train as run_loop
from cwpo_dist.training.lora import Head, add_lora
from cwpo_dist.training.process_group import told_to_stop
from cwpo_dist.training.tasks import Task

ASK_DRIVER_S = 3.0  # how often rank 0 asks whether the driver was told to stop
ASK_RAY_S = 10.0  # how often all ranks ask Ray for a notice of preemption
METRICS, METRICS_FILE = "metrics", "metrics.jsonl"
BAR = 20  # characters


@dataclass(frozen=True)
class TrainSpec:
    """One training stage; picklable, as workers on other nodes are given it.

    Attributes:
        name: of the stage, for progress lines.
        store: the stage's folder, where all nodes can reach it.
        key: of the stage: what decides its outcome; a checkpoint of another key is refused.
        seed: of order, adapters, an annotator's new head, and dropout.
        config: schedule, batch, workers.
        model: what training starts from.
        head: 'logps' for a causal LM, 'scores' for an annotator.
        make_task: called in each worker with the model's encoder; gives the data set.
        base: what identifies the model's files, where the driver sees them; `train` fills it in.
        make_held_out: the like of `make_task`, of pairs that no training reads; called where
            `eval_steps` asks for it.
        known: what an adapter calls the model below it; None: what `model` is known by on other
            machines, asked by `train` before anything starts.
    """

    name: str
    store: Store
    key: str
    seed: int
    config: TrainingConfig
    model: ModelConfig
    head: Head
    make_task: Callable[[Encoder], Task]
    base: str = ""
    make_held_out: Callable[[Encoder], Task] | None = None
    known: Identity | None = None

    def run(self, token: LeaseToken, device: torch.device) -> dict[str, Any]:
        """One rank's part; the process group is there already."""
        return run_rank(self, token, device)


class Watchdog:
    """Ends the process, after dumping the stack of every thread, when no beat comes in time.

    It is a C thread of faulthandler's, so it works while a collective holds the GIL.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def beat(self) -> None:
        """Starts the time anew."""
        # Descriptor 2, as Ray puts another object in the place of sys.stderr.
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=2)

    def end(self) -> None:
        """No further beat is expected."""
        faulthandler.cancel_dump_traceback_later()


def run_rank(spec: TrainSpec, token: LeaseToken, device: torch.device) -> dict[str, Any]:
    """Trains from the newest checkpoint to the end; rank 0 exports.

    Args:
        spec: the stage.
        token: of this worker group.
        device: this rank's; the process group is there already.

    Returns:
        On rank 0 numbers of the run, elsewhere nothing.
    """
    watchdog = Watchdog(spec.config.step_timeout_s)
    watchdog.beat()
    torch.set_num_threads(max(1, int(spec.config.cpus_per_worker)))
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    if dist.get_rank() > 0:
        logging.getLogger("cwpo_dist").setLevel(logging.WARNING)  # rank 0 speaks for all
    try:
        return _Rank(spec, token, device, watchdog).run()
    finally:
        watchdog.end()


class _Rank:
    """What one rank holds while it trains."""

    def __init__(
        self, spec: TrainSpec, token: LeaseToken, device: torch.device, watchdog: Watchdog
    ) -> None:
        from cwpo_dist.training import engine  # not above: it imports deepspeed

        self.spec, self.token, self.watchdog = spec, token, watchdog
        self.rank = dist.get_rank()
        self.encoder = encoder_for(spec.model, "annotator" if spec.head == "scores" else "policy")
        self.task = spec.make_task(self.encoder)
        watch = spec.make_held_out if spec.config.eval_steps is not None else None
        self.held_out = watch(self.encoder) if watch is not None else None
        settings = engine.deepspeed_config(spec.config, dtype_of(spec.model, device))
        with engine.sharded_loading(settings):
            self.model = _load(spec, self.encoder.tokenizer, device)
        self.module: AnswerLogProbs | AnswerScores
        if spec.head == "logps":
            self.module = AnswerLogProbs(self.model)
        else:
            self.module = AnswerScores(self.model, token_types=self.encoder.token_types)
        self.engine = engine.DeepSpeedEngine(self.module, spec.config, settings)
        self.identity = checkpoint.RunIdentity(spec.key, spec.seed, spec.base)

    def run(self) -> dict[str, Any]:
        spec = self.spec
        layout = choose_layout(self.module, longest=spec.model.max_length).layout
        if isinstance(self.module, AnswerScores) and self.module.one_by_one:
            raise ModelError(  # ranks would call a sharded model unequally often
                f"model_name_or_path: {spec.model.model_name_or_path!r}: its scores depend on the "
                "pads of a batch, so it can score but not be trained here; give another weak model"
            )
        flops = useful_flops(self.module)
        run = Run(spec.config, spec.seed, layout, self.encoder.pad_id, flops)
        total = run.total_steps(self.task.order.drawn)
        start, attempt = self.resume()
        if self.rank == 0:
            _say(f"{spec.name}: {len(self.task.rows)} rows, step {start} of {total}, {layout} rows")
        start_training(self.module)
        hooks = _RankHooks(self, run, start, attempt)
        try:
            run_loop(self.task, self.engine, run, hooks, start)
            hooks.end_trackers()  # which finish while the model is exported
            hooks.settle()
            self.export()
        except (NonFiniteLoss, Preempted):  # of all ranks alike
            hooks.settle()
            raise
        finally:
            hooks.close()
        if self.rank > 0:
            return {}
        last = _join_metrics(spec.store)
        left_out = {"left_out": dict(self.task.left_out)} if self.task.left_out else {}
        counts = {"steps": total, "rows": len(self.task.rows), "layout": layout, "last": last}
        return counts | left_out

    def resume(self) -> tuple[int, str]:
        """Restores the newest checkpoint; the steps done, and a name for this attempt.

        Rank 0 decides both for all.
        """
        decided: list[Any] = [None, None]
        if self.rank == 0:
            decided = [checkpoint.newest(self.spec.store), uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(decided, src=0)
        found, attempt = decided
        if found is None:
            return 0, attempt
        checkpoint.load(found, self.engine, self.identity)
        return found.step, attempt

    def export(self) -> None:
        """`model/`, and `adapter/` of a LoRA run; the other ranks only help to gather."""
        from cwpo_dist.training import saving

        self.watchdog.end()  # merging a large base takes as long as it takes
        spec, tokenizer = self.spec, self.encoder.tokenizer
        if self.rank == 0:
            self.token.check()
        if spec.config.lora is None:
            saving.export_full(self.engine, self.model, tokenizer, spec.store)
            return
        adapter = saving.gather_weights(self.engine, self.model, saving.trainable_names(self.model))
        if self.rank == 0:
            saving.export_lora(
                self.model,
                adapter,
                tokenizer,
                spec.store,
                spec.model,
                spec.head,
                spec.seed,
                spec.known,
            )


class _RankHooks(Hooks):
    """Sign of life, log, checkpoints, and requests to stop."""

    def __init__(self, rank: _Rank, run: Run, start: int, attempt: str) -> None:
        self._rank, self._spec, self._last_save = rank, rank.spec, start
        self._run, self._trackers = run, _trackers(rank.spec, start) if rank.rank == 0 else []
        self._saver = checkpoint.Saver(
            rank.spec.store,
            rank.engine,
            rank.identity,
            attempt,
            keep=rank.spec.config.save_total_limit,
            fence=rank.token.check,
        )
        self._records: list[dict[str, Any]] = []
        self._asked_driver = self._asked_ray = self._saved = time.monotonic()
        self._asks_ray = self._heeded_notice = False

    def before_step(self, step: int) -> None:
        self._rank.watchdog.beat()

    def wants_stop(self) -> bool:
        now = time.monotonic()
        if self._rank.rank == 0 and now - self._asked_driver > ASK_DRIVER_S:
            self._asked_driver = now
            if self._rank.token.asked_to_stop():
                told_to_stop.set()
        return told_to_stop.is_set()

    def wants_poll(self) -> bool:
        now = time.monotonic()
        if self._rank.rank == 0 and now - self._asked_ray > ASK_RAY_S:
            self._asked_ray, self._asks_ray = now, True
        return self._asks_ray or self._saver.news or self._is_time()

    def poll(self) -> bool:
        """Commits what all ranks have written; True when it is time for the next checkpoint."""
        self._saver.settle()
        wishes = torch.tensor([self._asks_ray, self._is_time()], dtype=torch.float64)
        asks_ray, is_time = self._rank.engine.total(wishes).tolist()
        self._asks_ray = False
        return bool(asks_ray and self._new_notice()) or bool(is_time)

    def _new_notice(self) -> bool:
        """A node is to be drained: checkpoint once, train on until Ray moves the group."""
        ask = getattr(ray.train, "get_preemption_info", None)  # older Rays have no notices
        notice = ask is not None and ask() is not None
        first, self._heeded_notice = notice and not self._heeded_notice, notice
        return first

    def _is_time(self) -> bool:
        minutes = self._spec.config.save_minutes
        if self._rank.rank > 0 or minutes is None:
            return False
        return time.monotonic() - self._saved >= 60 * minutes

    def evaluate(self, step: int) -> dict[str, float]:
        if self._rank.held_out is None:
            return {}
        numbers = held_out.evaluate(self._rank.held_out, self._rank.engine, self._run, step)
        self._rank.watchdog.beat()
        return numbers

    def log(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        for tracker in self._trackers:
            tracker.log(record)
        _say(f"{self._spec.name}: {_progress(record)}")

    def save(self, step: int) -> None:
        if step == self._last_save:
            return
        spec = self._spec
        if self._rank.rank == 0 and self._records:  # before the commit: nothing is lost with it
            lines = "".join(json.dumps(record) + "\n" for record in self._records)
            spec.store.create(f"{METRICS}/{step:06d}.jsonl", lines.encode())
            self._records = []
            for tracker in self._trackers:
                tracker.flush()
        self._saver.begin(step)
        self._last_save, self._saved = step, time.monotonic()
        self._rank.watchdog.beat()

    def settle(self) -> None:
        """Commits the checkpoint under way, whatever ends the loop."""
        self._saver.settle(wait=True)

    def end_trackers(self) -> None:
        """Ends the runs in the trackers; a resumed attempt opens them again."""
        for tracker in self._trackers:
            tracker.end()

    def close(self) -> None:
        """Waits, but not long, for what trackers still have to take."""
        self.end_trackers()
        for tracker in self._trackers:
            tracker.close()


def _trackers(spec: TrainSpec, start: int) -> list[Courier]:
    """The runs of this stage output, the same ones for every attempt at it."""
    identity = digest([spec.store.uri, spec.key])
    settings = {"stage": spec.name, "key": spec.key, "seed": spec.seed}
    settings |= spec.model.model_dump(mode="json") | spec.config.model_dump(mode="json")
    to, name = spec.config.report_to, f"{spec.name}-{spec.key}"
    return tracking.open_runs(to, spec.store, name, identity, settings, start)


def _load(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Any:
    """The model as training sees it: adapted if asked for, and ready to recompute activations."""
    if spec.head == "logps":
        model = load_policy(spec.model, device=device)
    else:
        model = load_annotator_base(spec.model, tokenizer, spec.seed, device=device)
    if spec.config.gradient_checkpointing or model.supports_gradient_checkpointing:
        let_recompute(model)
    model.config.use_cache = False
    if spec.config.lora is None:
        return model.requires_grad_(True)
    return add_lora(model, spec.config.lora, spec.head, spec.seed)


def _progress(record: dict[str, Any]) -> str:
    """A bar and the numbers that one watches."""
    done, total = record["step"], record["total_steps"]
    seconds = int((total - done) * record["pairs_per_step"] / record["pairs_per_second"])
    left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    shown = {
        "loss": f"{record['loss']:.4f}",
        "accuracy": _percent(record, "rewards/accuracies", "accuracy"),
        "held out": _percent(record, "eval_rewards/accuracies", "eval_accuracy"),
        "grad": f"{record['grad_norm']:.3g}",
        "lr": f"{record['learning_rate']:.2e}",
    }
    numbers = "  ".join(f"{name} {value}" for name, value in shown.items() if value)
    full = BAR * done // total
    return (
        f"[{'=' * full}{' ' * (BAR - full)}] step {done}/{total}  {numbers}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {left} left"
    )


def _percent(record: dict[str, Any], *names: str) -> str:
    """The first of these that the record has, as a percentage."""
    return next((f"{record[name]:.0%}" for name in names if name in record), "")


def _join_metrics(store: Store) -> dict[str, Any]:
    """`metrics.jsonl` from the parts of all attempts, each step once; its last record."""
    records: dict[int, dict[str, Any]] = {}
    for name in store.names(METRICS):
        for line in store.read(name).decode().splitlines():
            record = json.loads(line)
            records.setdefault(record["step"], record)
    ordered = [records[step] for step in sorted(records)]
    lines = "".join(json.dumps(record) + "\n" for record in ordered)
    store.write(METRICS_FILE, lines.encode())
    return ordered[-1] if ordered else {}


def _say(line: str) -> None:
    """Ray brings a worker's standard output to the driver's."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
