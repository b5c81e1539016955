"""ZeRO-0 to -3 on several ranks against plain torch in one process: gradients, losses, weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_cases
import zero_ranks
from safetensors.torch import load_file
from torch import Tensor
from zero_cases import ALONE_CASES, MATRIX_CASES, SEQUENCE_CASES, ZERO_CASES, Case

from cwpo_dist.config import ConfigError, TrainingConfig
from cwpo_dist.training.checkpoint import trainable
from cwpo_dist.training.loop import gradients, train
from cwpo_dist.training.micro_batches import Limits, micro_batches, parts_of

ALL_AT_ONCE = 10**6


@dataclass(frozen=True)
class Group:
    """A case as a group of so many ranks did it, in the short or the long form."""

    case: Case
    world: int
    form: str = "short"

    @property
    def folder(self) -> Path:
        return zero_ranks.results(self.form)

    @property
    def budgets(self) -> tuple[int, ...]:
        return zero_cases.budgets(self.case, self.world)


GROUPS: list[Any] = [
    *(Group(case, 2) for case in ZERO_CASES),
    *(Group(case, 1) for case in ALONE_CASES),
    *(
        pytest.param(Group(case, world, "long"), marks=pytest.mark.long)
        for case in MATRIX_CASES
        for world in (1, 2)
    ),
    *(pytest.param(Group(case, 4, "shared"), marks=pytest.mark.long) for case in SEQUENCE_CASES),
]


@pytest.fixture(params=GROUPS, ids=lambda group: f"{group.case.name}x{group.world}", scope="module")
def group(request: pytest.FixtureRequest) -> Group:
    chosen: Group = request.param
    return chosen


@pytest.fixture(scope="module")
def got(group: Group) -> dict[str, Tensor]:
    return dict(load_file(group.folder / f"{group.case.name}.{group.world}.safetensors"))


@pytest.fixture(scope="module")
def wanted(group: Group) -> dict[str, Tensor]:
    """The oracle: one process, one micro-batch a step, and a row for each pair."""
    case = group.case
    engine = zero_cases.oracle(case, group.folder)
    task, run = zero_cases.make_task(case.task), zero_cases.make_run(case, ALL_AT_ONCE)
    if case.task != "heads":  # whose weights are drawn by these ids
        ids = [f"{i} is of no other's prompt" for i in range(len(task.rows))]
        task = replace(task, pair_ids=ids)
    result = gradients(task, engine, run, 0, zero_cases.first_batch(case))
    found = {f"gradient.{name}": p.grad.clone() for name, p in trainable(engine.module)}
    found["loss"] = torch.tensor([result.loss])
    found["norm"] = torch.tensor([engine.step(0.0)])
    found |= {f"start.{name}": value for name, value in zero_ranks.weights_of(engine).items()}
    hooks = zero_cases.Watches(task, engine, run)
    train(task, engine, hooks.run, hooks)
    found["held out"] = torch.tensor(hooks.losses, dtype=torch.float64)
    return found | {f"weight.{name}": v for name, v in zero_ranks.weights_of(engine).items()}


def flat(tensors: dict[str, Tensor], prefix: str) -> Tensor:
    names = sorted(name for name in tensors if name.startswith(prefix))
    return torch.cat([tensors[name].flatten().double() for name in names])


def test_gradient_before_clipping(
    group: Group, got: dict[str, Tensor], wanted: dict[str, Tensor]
) -> None:
    """However a batch of unequal weights is split over ranks and micro-steps."""
    expected = flat(wanted, "gradient.")
    for budget in group.budgets:
        error = flat(got, f"gradient.{budget}.") - expected
        assert float(error.norm() / expected.norm()) < 1e-5, budget
        assert float(got[f"norm.{budget}"]) == pytest.approx(float(wanted["norm"]), rel=1e-5)
        assert float(got[f"loss.{budget}"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)


def test_weights_after_20_sgd_steps(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    expected, start = flat(wanted, "weight."), flat(wanted, "start.")
    moved = float((expected - start).norm())
    assert moved > 1e-3 * float(start.norm())
    assert float((flat(got, "weight.") - expected).norm()) < 1e-4 * moved


def test_held_out_numbers(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """On the way and at the end, with weights that any stage shards."""
    assert got["held out"].tolist() == pytest.approx(wanted["held out"].tolist(), rel=1e-4)
    assert float(wanted["held out"][0]) != pytest.approx(float(wanted["held out"][1]), rel=1e-3)


def test_shards_and_layout(group: Group, got: dict[str, Tensor]) -> None:
    """ZeRO-3 holds shards alone, and its layout is proved on them as on a whole model."""
    assert (int(got["sharded"]) > 0) == (group.case.stage == 3)
    assert bool(got["packed"])


def micro_steps(case: Case, world: int) -> list[int]:
    task, found = zero_cases.make_task(case.task), []
    for budget in zero_cases.budgets(case, world):
        limits = Limits("packed", budget)
        parts = parts_of(task, zero_cases.first_batch(case), limits, world)
        found.append(sum(1 for _ in micro_batches(parts, limits, 0, world, 2)))
    return found


def test_budgets_split_as_meant() -> None:
    """From one micro-step a rank to several, with pads among them; the long form in 1 to 7."""
    few = micro_steps(ZERO_CASES[0], 2)
    assert few[0] == 1
    assert len(set(few)) == len(few)
    for world in (1, 2):
        assert micro_steps(MATRIX_CASES[0], world) == [1, 2, 3, 4, 5, 6, 7]


def make_config(section: dict | str | None, **changes: object) -> TrainingConfig:
    return TrainingConfig(learning_rate=1.0, deepspeed=section, **changes)


def test_deepspeed_section() -> None:
    from cwpo_dist.training.deepspeed_engine import deepspeed_config

    hf_json = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }
    merged = deepspeed_config(make_config(hf_json, max_grad_norm=0.3), torch.bfloat16)
    assert merged["zero_optimization"]["stage"] == 3
    assert merged["zero_optimization"]["overlap_comm"] is True
    assert merged["zero_optimization"]["reduce_bucket_size"] == 2**24
    assert merged["gradient_clipping"] == 0.3
    assert merged["bf16"] == {"enabled": True}
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not {"optimizer", "fp16", "train_batch_size"} & merged.keys()


def test_bfloat16_is_never_summed_in_bfloat16() -> None:
    from cwpo_dist.training.deepspeed_engine import deepspeed_config, zero_stage

    assert zero_stage(deepspeed_config(make_config(None, zero_stage=0), torch.bfloat16)) == 1
    assert zero_stage(deepspeed_config(make_config(None, zero_stage=0), torch.float32)) == 0


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"train_batch_size": 7}, "train_batch_size"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, "optimizer"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com: True"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpuu"}}},
            "zero_optimization.offload_optimizer.device: 'cpuu'",
        ),
        ({"zero_optimization": 3}, "zero_optimization: 3"),
        ("no/such/file.json", "no/such/file.json"),
    ],
)
def test_deepspeed_section_refused(section: dict | str, name: str) -> None:
    from cwpo_dist.training.deepspeed_engine import deepspeed_config

    with pytest.raises(ConfigError, match=name):
        deepspeed_config(make_config(section), torch.float32)
