"""What one rank of a training does: loads its part, resumes, trains, and helps to export.

`TrainSpec` is what the driver hands over; the loop between resuming and the export is loop.py's.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cwpo_dist.config import ModelConfig, TrainingConfig
from cwpo_dist.lm.batches import total_steps
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.lm.flops import useful_flops
from cwpo_dist.lm.identity import Identity
from cwpo_dist.lm.load_settings import dtype_of
from cwpo_dist.lm.loading import load_annotator_base, load_policy
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores, refuse_one_by_one
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.recompute import let_recompute, start_training
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.storage import Store
from cwpo_dist.training import checkpoint, loop, metrics_log
from cwpo_dist.training.lease import LeaseToken
from cwpo_dist.training.lora import Head, add_lora
from cwpo_dist.training.rank import Watchdog
from cwpo_dist.training.rank_hooks import RankHooks
from cwpo_dist.training.tasks import Task


@dataclass(frozen=True)
class TrainSpec:
    """One training stage; picklable, as ranks on other nodes are given it.

    Attributes:
        name: of the stage, for progress lines.
        store: the stage's folder, where all nodes can reach it.
        key: of the stage: what decides its outcome; a checkpoint of another key is refused.
        seed: of order, adapters, an annotator's new head, and dropout.
        config: schedule, batch, ranks.
        model: what training starts from.
        head: 'logps' for a causal LM, 'scores' for an annotator.
        make_task: called on each rank with the model's encoder; gives the data set.
        base: what identifies the model's files, where the driver sees them; `train` fills it in.
        make_held_out: the like of `make_task`, of pairs that no training reads; called where
            `eval_steps` asks for it.
        heads: of an annotator, how many.
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
    heads: int = 1
    known: Identity | None = None

    def run(self, token: LeaseToken, device: torch.device, watchdog: Watchdog) -> dict[str, object]:
        """Trains from the newest checkpoint to the end; rank 0 exports.

        Args:
            token: of this group.
            device: this rank's; the process group is there already.
            watchdog: to be told of every step.

        Returns:
            On rank 0 numbers of the run, elsewhere nothing.

        Raises:
            NonFiniteLoss, Preempted: on all ranks alike, after a last commit.
            ModelError: for a model that can score, but not be trained.
        """
        rank = TrainRank(self, token, device, watchdog)
        run = rank.prepared()
        total = total_steps(self.config, rank.task.order.drawn)
        start, attempt = rank.resume()
        if rank.number == 0:
            rows = f"{len(rank.task.rows)} rows, step {start} of {total}, {run.layout} rows"
            metrics_log.say(f"{self.name}: {rows}")
        start_training(rank.module)
        hooks = RankHooks(rank, run, start, attempt)
        try:
            loop.train(rank.task, rank.engine, run, hooks, start)
            hooks.end_trackers()  # which finish while the model is exported
            hooks.settle()
            rank.export()
        except (loop.NonFiniteLoss, Preempted):  # of all ranks alike
            hooks.settle()
            raise
        finally:
            hooks.close()
        return rank.counts(total, run) if rank.number == 0 else {}


class TrainRank:
    """What one rank holds while it trains.

    Attributes:
        spec: of the stage.
        token: of this group.
        watchdog: to be told of every step.
        number: of this rank, from 0; rank 0 decides, writes and speaks for all.
        encoder: the model's.
        task: the data set.
        held_out: pairs that no training reads; None where none are watched.
        model: with its adapters, if any.
        module: rows in, one number an answer out.
        engine: of all ranks.
        identity: what a checkpoint must have been written for.
    """

    def __init__(
        self, spec: TrainSpec, token: LeaseToken, device: torch.device, watchdog: Watchdog
    ) -> None:
        from cwpo_dist.training import deepspeed_engine as engine  # not above: it imports deepspeed

        self.spec, self.token, self.watchdog = spec, token, watchdog
        self.number = dist.get_rank()
        self.encoder = encoder_for(spec.model, "annotator" if spec.head == "scores" else "policy")
        self.task = spec.make_task(self.encoder)
        watch = spec.make_held_out if spec.config.eval_steps is not None else None
        self.held_out = watch(self.encoder) if watch is not None else None
        settings = engine.deepspeed_config(spec.config, dtype_of(spec.model, device))
        with engine.sharded_loading(settings):
            self.model = _load(spec, self.encoder.tokenizer, device)
        self.module: AnswerLogProbs | AnswerScores
        if spec.head == "logps":
            self.module = AnswerLogProbs(self.model, squares=self.task.outputs == (2, 2))
        else:
            self.module = AnswerScores(self.model, token_types=self.encoder.token_types)
        self.engine = engine.DeepSpeedEngine(self.module, spec.config, settings)
        self.identity = checkpoint.RunIdentity(spec.key, spec.seed, spec.base)

    def prepared(self) -> loop.Run:
        """What the loop is told: how rows are laid out for this model, and what they cost.

        Raises:
            ModelError: for a model whose scores depend on the pads of a batch, or whose rows ranks
                cannot share.
        """
        spec = self.spec
        longest, group = spec.model.max_length, self.engine.sequence
        layout = choose_layout(self.module, longest=longest, group=group).layout
        refuse_one_by_one(self.module)
        flops, as_a_pair = useful_flops(self.module), 2.0 * spec.model.max_length
        longest_shared = as_a_pair if layout == "shared" else math.inf
        return loop.Run(spec.config, spec.seed, layout, self.encoder.pad_id, flops, longest_shared)

    def resume(self) -> tuple[int, str]:
        """Restores the newest checkpoint; the steps done, and a name for this attempt.

        Rank 0 decides both for all.
        """
        decided: list[tuple[checkpoint.Checkpoint | None, str]] = [(None, "")]
        if self.number == 0:
            decided = [(checkpoint.newest(self.spec.store), uuid.uuid4().hex[:8])]
        dist.broadcast_object_list(decided, src=0)
        found, attempt = decided[0]
        if found is None:
            return 0, attempt
        checkpoint.load(found, self.engine, self.identity)
        self.task.learned[:] = found.learned
        return found.step, attempt

    def export(self) -> None:
        """`model/`, and `adapter/` of a LoRA run; the other ranks only help to gather."""
        from cwpo_dist.training import saving

        self.watchdog.end()  # merging a large base takes as long as it takes
        spec, tokenizer, fence = self.spec, self.encoder.tokenizer, self.token.check
        if self.number == 0:
            fence()
        if not isinstance(self.model, PeftModel):
            saving.export_full(self.engine, self.model, tokenizer, spec.store, fence)
            return
        adapter = saving.gather_weights(self.engine, self.model, saving.trainable_names(self.model))
        if self.number == 0:
            saving.export_lora(
                self.model,
                adapter,
                tokenizer,
                spec.store,
                spec.model,
                spec.head,
                spec.seed,
                fence,
                spec.known,
            )

    def counts(self, total: int, run: loop.Run) -> dict[str, object]:
        """Numbers of the whole run, once `metrics.jsonl` is written.

        Counts:
            steps: optimizer steps.
            rows: pairs (of `sft` answers) that were trained on.
            layout: how rows lie in memory: packed, shared or plain.
            last: the last record of `metrics.jsonl`.
            left_out: pairs that were not trained on, by reason.
            seconds: of training, from the first worker's start on.
        """
        last = metrics_log.join(self.spec.store)
        left_out = {"left_out": dict(self.task.left_out)} if self.task.left_out else {}
        rows = len(self.task.rows)
        return {"steps": total, "rows": rows, "layout": run.layout, "last": last, **left_out}


def _load(
    spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel | PeftModel:
    """The model as training sees it: adapted if asked for, and ready to recompute activations."""
    if spec.head == "logps":
        model = load_policy(spec.model, device=device)
    else:
        model = load_annotator_base(
            spec.model, tokenizer, spec.seed, heads=spec.heads, device=device
        )
    if spec.config.gradient_checkpointing or model.supports_gradient_checkpointing:
        let_recompute(model)
    model.config.use_cache = False
    if spec.config.lora is None:
        return model.requires_grad_(True)
    return add_lora(model, spec.config.lora, spec.head, spec.seed)
