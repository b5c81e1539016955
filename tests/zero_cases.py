"""Set-ups of training and scoring: what the ranks of zero_ranks.py and their oracle share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cwpo_dist.config import LoraConfig, ModelConfig, TrainingConfig
from cwpo_dist.lm.batches import global_batch
from cwpo_dist.lm.encoder import Encoder, load_tokenizer
from cwpo_dist.lm.loading import load_annotator_base, load_policy
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.recompute import let_recompute, start_training
from cwpo_dist.lm.rows import Layout, Row
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.scorers import ReferenceWorker
from cwpo_dist.storage import Store
from cwpo_dist.training import held_out
from cwpo_dist.training.heads import ManyHeads
from cwpo_dist.training.loop import Engine, Hooks, Run, train
from cwpo_dist.training.lora import add_lora
from cwpo_dist.training.tasks import BradleyTerry, Preference, Sft, Task
from cwpo_dist.training.torch_engine import TorchEngine
from cwpo_dist.training.train_rank import TrainSpec

N_ROWS, BATCH = 22, 8
BUDGETS = (10_000, 130, 61)  # one micro-batch, some, many: up to one row each
# Of a batch of 16 rows in 1 to 7 micro-steps a rank; test_zero.py says so.
MATRIX_BATCH = 16
MATRIX_BUDGETS = {1: (10_000, 400, 200, 150, 115, 100, 85), 2: (10_000, 200, 110, 80, 65, 54, 45)}
SEED = 5
HEADS = 3


@dataclass(frozen=True)
class Case:
    """One training set-up; `name` is also its file's."""

    name: str
    stage: int
    lora: bool = False
    task: str = "none"  # a weight normalisation, or a name that `make_task` knows
    budget: int = 130
    optim: str = "sgd"
    steps: int = 20
    threshold: int = 0  # of ZeRO-3: larger parameters are sharded
    checkpointing: bool = False
    offload: bool = False
    dtype: str = "float32"
    batch: int = BATCH
    model: str = "model"  # its folder: a Llama, or `mixture`
    sequence: int = 1  # ranks that share each micro-batch

    def config(self) -> TrainingConfig:
        zero: dict[str, Any] = {}
        if self.stage == 3:
            zero |= {"stage3_param_persistence_threshold": self.threshold}
        if self.stage == 3 and self.threshold == 0:  # nothing stays whole once its module is done
            released = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
            zero |= {f"stage3_{name}": 0 for name in released}
        if self.offload:
            zero |= {"offload_optimizer": {"device": "cpu"}}
        if self.offload and self.stage == 3:
            zero |= {"offload_param": {"device": "cpu"}}
        return TrainingConfig(
            learning_rate=0.05 if self.optim == "sgd" else 0.01,
            lr_scheduler_type="linear",
            max_steps=self.steps,
            global_batch_size=self.batch,
            max_tokens_per_micro_batch=self.budget,
            max_grad_norm=0.5,
            optim=self.optim,
            weight_decay=0.1 if self.optim == "adamw" else 0.0,
            lora=LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0) if self.lora else None,
            zero_stage=self.stage,
            num_workers=self.sequence,
            sequence_parallel_size=self.sequence,
            gradient_checkpointing=self.checkpointing,
            save_steps=1000,
            deepspeed={"zero_optimization": zero} if zero else None,
        )


# With LoRA, stages 1 and 2, and offload, are left to the long form.
ZERO_CASES = [
    *(Case(f"full-{stage}", stage) for stage in range(4)),
    *(Case(f"lora-{stage}", stage, lora=True, task="dataset") for stage in (0, 3)),
    Case("sft-3", 3, task="sft", threshold=100_000, checkpointing=True),
    Case("fit-3", 3, task="fit"),
    Case("heads-3", 3, task="heads"),
    Case("batch-2", 2, task="batch"),
    Case("ahead-3", 3, task="ahead"),
    Case("wpo-3", 3, task="wpo"),
    Case("offload-2", 2, offload=True),
    Case("mixture-2", 2, model="mixture"),
    Case("mixture-lora-3", 3, lora=True, task="dataset", model="mixture"),
    # Ranks that share sequences.
    Case("sequence-0", 0, sequence=2),
    Case("sequence-1", 1, task="ipo", sequence=2),
    Case("sequence-2", 2, task="length", checkpointing=True, sequence=2),
    Case("sequence-3", 3, task="ahead", checkpointing=True, sequence=2),
    Case("sequence-lora-3", 3, lora=True, task="dataset", sequence=2),
    Case("sequence-fit-2", 2, task="fit", sequence=2),
    Case("sequence-sft-2", 2, lora=True, task="sft", model="mixture", sequence=2),
]
# By four ranks: two groups of two, and one, for whom the two key heads of the model are repeated.
SEQUENCE_CASES = [
    Case("sequence-pairs-2", 2, sequence=2),
    Case("sequence-four-3", 3, task="batch", checkpointing=True, sequence=4),
    Case("sequence-lora-four-0", 0, lora=True, task="dataset", sequence=4),
]
# What a group of one does, too.
ALONE_CASES = [case for case in ZERO_CASES if case.name.startswith("full-")]
RESUME_CASES = [
    *(Case(f"adamw-{stage}", stage, task="prompt", optim="adamw", steps=6) for stage in range(4)),
    Case("adamw-lora-3", 3, lora=True, task="prompt", optim="adamw", steps=6),
    Case("learning-2", 2, task="learning", optim="adamw", steps=6),
    Case("adamw-sequence-3", 3, task="prompt", optim="adamw", steps=6, sequence=2),
    Case("heads-2", 2, task="heads", optim="adamw", steps=6),
]
# All that can be switched, each with all: the long form of ZERO_CASES.
MATRIX_CASES = [
    Case(
        f"matrix-{stage}{'-lora' * lora}{'-recompute' * checkpointing}{'-offload' * offload}",
        stage,
        lora=lora,
        task="dataset" if lora else "none",
        checkpointing=checkpointing,
        offload=offload,
        batch=MATRIX_BATCH,
    )
    for stage in range(4)
    for lora in (False, True)
    for checkpointing in (False, True)
    for offload in ((False, True) if stage else (False,))
]
# (resumed by, written by) of another ZeRO stage, at the same world size.
ACROSS_STAGES = [
    *(("adamw-0", "adamw-3"), ("adamw-3", "adamw-1"), ("adamw-2", "adamw-0")),
    *(("adamw-1", "adamw-sequence-3"), ("adamw-sequence-3", "adamw-2")),
]
# With masters and gradient sums in fp32, by yet another optimizer of DeepSpeed's; two ranks only.
BF16_CASE = Case("adamw-bf16-1", 1, task="prompt", optim="adamw", steps=6, dtype="bfloat16")


_LOSSES = {"ahead": "dr_dpo", "ipo": "ipo", "length": "sigmoid_norm", "wpo": "wpo"}


def make_rows(n_answers: int = 2) -> list[Row]:
    """Rows of random tokens, from a few to sixty of them."""
    draw = np.random.default_rng(SEED)

    def tokens(low: int, high: int) -> list[int]:
        return draw.integers(3, 250, draw.integers(low, high)).tolist()

    rows = [Row(tokens(3, 30), (tokens(1, 25), tokens(1, 15))) for _ in range(N_ROWS)]
    return [Row(row.prompt, row.answers[:n_answers]) for row in rows]


def couples(rows: list[Row]) -> list[Row]:
    """Two rows of each prompt, with an answer in common where each has two."""
    twice = [rows[i - i % 2] for i in range(len(rows))]
    both = zip(rows, twice, strict=True)
    return [Row(two.prompt, row.answers[:1] + two.answers[1:]) for row, two in both]


def make_task(name: str) -> Task:
    """Bradley-Terry, SFT, or preferences with unequal weights and references.

    `prompt`: preferences whose order keeps the pairs of a prompt together.
    `learning`: a loss that learns from its steps, far from what it begins with.
    `ahead`: a loss that depends on all outputs of a batch.
    `ipo`, `length`: a loss of its own, and one of log-ratios divided by tokens.
    `wpo`: a loss that reads a second number of each answer, whose own weights are small.
    """
    ids = [f"{i // 2:018x}{i:014x}" for i in range(N_ROWS)]
    if name == "sft":
        return Sft(couples(make_rows(1)), ids)
    if name == "fit":
        return BradleyTerry(couples(make_rows()), ids)
    if name == "heads":
        own = [f"{i:032x}" for i in range(N_ROWS)]  # a prompt each: the oracle has the same ids
        return ManyHeads(make_rows(), own, None, HEADS, SEED)
    draw = np.random.default_rng(SEED + 1)
    weights = (draw.random(N_ROWS) ** 2).tolist()
    rows = couples(make_rows())
    references = [
        (-5.0 * len(r.answers[0]) + draw.normal(), -5.0 * len(r.answers[1])) for r in rows
    ]
    if name in {"dataset", "wpo"}:  # as `weigh` leaves them
        weights = (np.array(weights) / np.mean(weights)).tolist()
    by = "batch" if name == "batch" else "none"
    order: Any = "prompt" if name == "prompt" else "pair"
    told = {"normalization": by, "batch_by": order}
    if name == "learning":
        return Preference(rows, ids, weights, references, "re_dpo", 0.3, 0.4, **told)
    loss_type = _LOSSES.get(name, "sigmoid")
    return Preference(rows, ids, weights, references, loss_type, 0.3, **told)


def make_module(case: Case, folder: Path) -> nn.Module:
    """The module to train; LoRA's B is not zero, else half of the gradients would be."""
    given = ModelConfig(
        model_name_or_path=str(folder / case.model), torch_dtype=case.dtype, max_length=64
    )
    scores, heads = case.task in {"fit", "heads"}, HEADS if case.task == "heads" else 1
    if scores:
        tokenizer = load_tokenizer(given, distinct_pad=True)
        model: Any = load_annotator_base(given, tokenizer, SEED, heads=heads)
    else:
        model = load_policy(given)
    let_recompute(model)
    lora = case.config().lora
    if lora is None:
        model.requires_grad_(True)
    else:
        model = add_lora(model, lora, "scores" if scores else "logps", SEED)
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
    squares = case.task == "wpo"
    module = AnswerScores(model) if scores else AnswerLogProbs(model, squares=squares)
    start_training(module)
    return module


def make_run(case: Case, budget: int | None = None, layout: Layout = "shared") -> Run:
    config = case.config()
    if budget is not None:
        config = config.model_copy(update={"max_tokens_per_micro_batch": budget})
    return Run(config, SEED, layout, 2)


def oracle(case: Case, folder: Path) -> TorchEngine:
    """The same case in one plain process."""
    return TorchEngine(make_module(case, folder), case.config())


def oracle_weights(name: str, folder: Path) -> dict[str, Tensor]:
    """A stage of STAGES, trained in one plain process on the model of a folder."""
    case = STAGES[name]
    engine = oracle(case, folder)
    # Adapters of a stage start at B = 0; those of the other tests do not.
    for parameter_name, parameter in engine.module.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.zero_()
    train(make_task(case.task), engine, make_run(case), Hooks())
    return {n.removeprefix("model."): p.detach() for n, p in engine.module.named_parameters()}


def assert_close(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Of some of the weights."""
    assert ours
    for name, value in ours.items():
        torch.testing.assert_close(value.float(), wanted[name], atol=1e-5, rtol=0, msg=name)


def first_batch(case: Case) -> list[int]:
    indices: list[int] = global_batch(N_ROWS, case.batch, SEED, 0)[1].tolist()
    return indices


def budgets(case: Case, world: int) -> tuple[int, ...]:
    return MATRIX_BUDGETS[world] if case.batch == MATRIX_BATCH else BUDGETS


STAGES = {
    "fit": Case("fit", 3, task="fit", steps=6),
    "fit-lora": Case("fit-lora", 2, lora=True, task="fit", steps=6),
    "align": Case("align", 3, steps=6),
    "align-lora": Case("align-lora", 3, lora=True, steps=6),
    "align-bf16": Case("align-bf16", 3, steps=2, dtype="bfloat16"),
}
REFERENCE_SHARDS = (5, 0, 1, 7)  # rows of each
ALREADY_DONE = 2  # the shard that an earlier run committed


def make_spec(of: str | Case, folder: Path, **changes: Any) -> TrainSpec:
    """A whole training stage on the tiny model."""
    case = STAGES[of] if isinstance(of, str) else of
    return TrainSpec(
        name=case.name,
        store=Store(str(folder / "stages" / case.name)),
        key="key",
        seed=SEED,
        config=case.config().model_copy(update={"num_workers": 2, "save_steps": 2, **changes}),
        model=ModelConfig(
            model_name_or_path=str(folder / case.model),
            max_length=64,
            chat_template="plain",
            torch_dtype=case.dtype,
        ),
        head="scores" if case.task == "fit" else "logps",
        make_task=partial(load_task, case.task),
    )


def load_task(name: str, encoder: Encoder) -> Task:
    return make_task(name)


def reference_job(folder: Path) -> ShardJob:
    model = ModelConfig(model_name_or_path=str(folder / "model"), max_length=64)
    store = Store(str(folder))
    make_worker = partial(ReferenceWorker, AnswersIn(store), store, model, 100)
    return ShardJob("reference", store.child("scored"), len(REFERENCE_SHARDS), make_worker)


class Watches(Hooks):
    """Judges the rows themselves twice on the way, as if they were held out."""

    def __init__(self, task: Task, engine: Engine, run: Run) -> None:
        self.judge = partial(held_out.evaluate, task, engine, run)
        self.run = replace(run, config=run.config.model_copy(update={"eval_steps": 10}))
        self.losses: list[float] = []

    def evaluate(self, step: int) -> dict[str, float]:
        found = self.judge(step)
        self.losses.append(found["eval_loss"])
        return found
