"""β of each pair by a column of the data: in every loss, in a step, and from rows to workers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from plain_loop import ROWS, make_engine, make_run, make_task
from small_run import small_config
from test_trained_as_told import preferences, spec_of
from torch.nn.functional import logsigmoid
from world import SHARDS, World, reference

from cwpo_dist.config import ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.lm.rows import collate
from cwpo_dist.objectives import OBJECTIVES, LossSettings, PairLogps, dpo
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs.checks import objective_faults
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import align, weigh
from cwpo_dist.training.loop import gradients
from cwpo_dist.training.tasks import TaskError

INDICES = [1, 4, 6, 9, 12, 17]
BETAS = np.linspace(0.1, 2.0, len(ROWS))


def test_by_hand() -> None:
    """H = 2 and β = ½, 1: −log σ(1) and −log σ(2); where h = 0 a pair pulls by β/2."""
    ones, nothing = torch.ones(2), torch.zeros(2, requires_grad=True)
    settings = LossSettings(torch.tensor([0.5, 1.0]))
    losses = dpo(PairLogps(2 * ones, 0 * ones, ones, ones, 0 * ones, 0 * ones), settings)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-x)) for x in (1, 2)])
    even = dpo(PairLogps(nothing, 0 * ones, ones, ones, 0 * ones, 0 * ones), settings)
    assert torch.autograd.grad(even.sum(), nothing)[0].tolist() == pytest.approx([-0.25, -0.5])


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_every_loss_takes_each_pairs_own(loss_type: str) -> None:
    drawn = -10 * torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    chosen, rejected, *references = drawn.requires_grad_()
    counts, found = torch.full((5,), 7.0), OBJECTIVES[loss_type]
    pairs = PairLogps(chosen, rejected, counts, counts, *references, (references[0],) * 2)
    betas = [0.1, 0.3, 0.5, 1.0, 2.0]
    together = found.losses(pairs, LossSettings(torch.tensor(betas), 0.1))
    alone = [found.losses(pairs, LossSettings(beta, 0.1))[k] for k, beta in enumerate(betas)]
    torch.testing.assert_close(together, torch.stack(alone))
    rewards = found.rewards(pairs, torch.tensor(betas))[0]
    assert rewards[3].item() == pytest.approx(found.rewards(pairs, 1.0)[0][3].item())


@pytest.mark.parametrize("budget", [10**6, 130, 61], ids=["one", "some", "many"])
def test_a_step_is_the_same_in_any_micro_batches(budget: int) -> None:
    task, engine, plain = make_task(beta=BETAS), make_engine(seed=1), make_engine(seed=1)
    result = gradients(task, engine, make_run(budget), 0, INDICES)
    logps = plain.module(collate([ROWS[i] for i in INDICES], "shared", 2)).view(-1, 2)
    assert task.references is not None
    ratios = logps - torch.tensor([task.references[i] for i in INDICES])
    scaled = torch.tensor(BETAS[INDICES]).float() * (ratios[:, 0] - ratios[:, 1])
    loss = -(torch.tensor([task.weights[i] for i in INDICES]) * logsigmoid(scaled)).mean()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert task.metrics(result.outputs_PK, INDICES)["rewards/margins"] == pytest.approx(
        scaled.mean().item(), rel=1e-4
    )
    for ours, wanted in zip(engine.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, atol=1e-5, rtol=1e-4)


def world_with(folder: Path, values: Any) -> World:
    """Pairs whose rows have such a column; the values are repeated."""
    told = {"prepare": {"keep_columns": ["phi"]}, "align": {"beta": 0.2, "beta_column": "phi"}}
    world = World(folder, ["cw"], **told)
    world.score()
    world.tokenise()
    world.log_probs("reference", None, reference)
    weigh.make(world.context, world.node("weigh"))
    store = world.place("prepare")
    for index in range(len(SHARDS)):
        place = store.path(part("pairs", index))
        table = pq.read_table(place)
        column = pa.array([values[n % len(values)] for n in range(len(table))])
        pq.write_table(table.append_column("phi", column), place)
    return world


def test_workers_are_told_beta_times_the_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_with(tmp_path, [0.5, 1, 4.0])
    store, expected = world.place("prepare"), {}
    for index in range(len(SHARDS)):
        columns = store.read_table(part("pairs", index), ["pair_id", "phi"]).columns
        expected |= dict(zip(*(each.to_pylist() for each in columns), strict=True))
    for task in preferences(world, spec_of(world, align, "align", monkeypatch)):
        assert len(task.pair_ids) == 3
        for pair_id, beta in zip(task.pair_ids, np.asarray(task.beta), strict=True):
            assert beta == pytest.approx(0.2 * expected[pair_id])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        *(([value], repr(value)) for value in (0.0, -1, math.inf, math.nan, True, "2")),
        ([1.0, None], "None"),
    ],
)
def test_a_row_without_a_number_above_zero_is_refused_by_name(
    values: list[Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_with(tmp_path, values)
    with pytest.raises(TaskError, match=rf"beta_column: pair unlabelled-\d has {said}, and β"):
        preferences(world, spec_of(world, align, "align", monkeypatch))


def test_a_plan_refuses_a_column_that_is_seen_to_lack_numbers(tmp_path: Path) -> None:
    given = small_config(tmp_path, prepare__keep_columns=["phi"], align__beta_column="phi")
    source = Path(given["prepare"]["sources"][0]["path"])
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for good in (False, True):
        told = [row | {"phi": 1.5 if good else -1} for row in rows]
        source.write_text("".join(json.dumps(row) + "\n" for row in told))
        if good:
            assert plan(parse_config(given)).stages
        else:
            with pytest.raises(ConfigError, match=r"beta_column: 'phi' is -1 in a pair"):
                plan(parse_config(given))


def test_a_column_that_is_not_kept_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (fault,) = objective_faults(World(tmp_path, ["cw"], align={"beta_column": "phi"}).config)
    assert fault == "align.beta_column: 'phi' is none of prepare.keep_columns; add it there"
