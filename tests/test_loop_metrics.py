"""What the loop says of a run: metrics by hand, counts, times, held-out numbers."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import tiny
import torch
from plain_loop import IDS, ROWS, Record, make_config, make_engine, make_run, make_task

from cwpo_dist.config import LoraConfig
from cwpo_dist.lm.flops import useful_flops
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.rows import collate
from cwpo_dist.training import held_out
from cwpo_dist.training.loop import train
from cwpo_dist.training.lora import add_lora
from cwpo_dist.training.meter import PARTS
from cwpo_dist.training.rank_hooks import RankHooks
from cwpo_dist.training.tasks import BradleyTerry, Preference, TaskError
from cwpo_dist.training.torch_engine import TorchEngine


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_objectives_without_a_reference_read_token_counts(loss_type: str) -> None:
    """Training them raises the reward margin, β times the mean log-prob a token."""
    task = make_task(loss_type=loss_type, references=None)
    engine, hooks = make_engine(), Record()
    train(task, engine, make_run(max_steps=6, global_batch_size=len(ROWS)), hooks)
    first_record, last = hooks.records[0], hooks.records[-1]
    assert last["rewards/margins"] > first_record["rewards/margins"]
    with torch.no_grad():
        means = make_engine().module(collate(ROWS, "shared", 2)).view(-1, 2)
    means = means / torch.tensor([[len(answer) for answer in row.answers] for row in ROWS])
    expected = 0.5 * float((means[:, 0] - means[:, 1]).mean())
    assert first_record["rewards/margins"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(TaskError, match="needs references"):
        make_task(references=None)


def test_preference_metrics_by_hand() -> None:
    task = Preference(
        ROWS[:2], IDS[:2], [0.5, 1.0], [(-1.0, -1.0), (-2.0, -2.0)], "sigmoid", beta=0.5
    )
    outputs = torch.tensor([[0.0, -3.0], [-4.0, -2.0]], dtype=torch.float64)
    assert task.metrics(outputs, [0, 1]) == {
        "rewards/chosen": pytest.approx((0.5 - 1.0) / 2),
        "rewards/rejected": pytest.approx((-1.0 + 0.0) / 2),
        "rewards/accuracies": 0.5,
        "rewards/margins": pytest.approx((1.5 - 1.0) / 2),
        "logps/chosen": -2.0,
        "logps/rejected": -2.5,
        "kl": pytest.approx((-1.0 + 2.0 + 2.0 + 0.0) / 4),
        "weight": 0.75,
    }
    loss = task.losses(outputs, [0, 1])
    expected = [0.5 * math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.0))]
    assert loss.tolist() == pytest.approx(expected)


def test_annotator_metrics_by_hand() -> None:
    task = BradleyTerry(ROWS[:3], IDS[:3])
    scores = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    assert task.metrics(scores, [0, 1, 2]) == {
        "accuracy": pytest.approx(2 / 3),
        "margin": pytest.approx(1 / 3),
    }


def test_log_counts_tokens_and_padding() -> None:
    hooks = Record()
    train(make_task(), make_engine(), make_run(130, logging_steps=2), hooks)
    assert [record["step"] for record in hooks.records] == [2, 4]
    assert {record["total_steps"] for record in hooks.records} == {4}
    assert all(0 < record["padding"] < 1 for record in hooks.records)
    alone = Record()
    train(make_task(), make_engine(), make_run(1, max_steps=1), alone)  # a row a micro-batch
    assert alone.records[0]["padding"] == 0
    assert alone.records[0]["pairs_per_step"] == 8


def test_every_record_says_where_the_time_went_and_what_it_was_good_for() -> None:
    hooks, engine = Record(), make_engine()
    run = replace(make_run(130, logging_steps=2), flops=useful_flops(engine.module))
    started = time.perf_counter()
    train(make_task(), engine, run, hooks)
    for record in hooks.records:
        spent = [record[f"time/{part}"] for part in PARTS]
        step = record["pairs_per_step"] / record["pairs_per_second"]
        assert all(seconds >= 0 for seconds in spent)
        assert record["time/forward"] > 0
        assert record["time/backward"] > 0
        assert 0.8 * step < sum(spent) <= step
        pairs = run.flops.forward(ROWS) * 3 / len(ROWS)  # about: the rows differ
        rate = pairs * record["pairs_per_second"]
        assert record["useful_flops_per_second"] == pytest.approx(rate, rel=0.5)
        assert "mfu" not in record, "nobody states the peak of this CPU"
    measured = sum(2 * r["pairs_per_step"] / r["pairs_per_second"] for r in hooks.records)
    assert measured < time.perf_counter() - started, "no second is counted twice"
    assert [record["epoch"] for record in hooks.records] == [2 / 3, 4 / 3]


def test_held_out_numbers_are_those_of_the_whole_set_and_leave_training_alone() -> None:
    """Also under LoRA with dropout, whose random numbers must not be touched."""

    def engine() -> TorchEngine:
        model = tiny.tiny_causal_lm("llama", 0)
        adapted = add_lora(model, LoraConfig(r=2, lora_dropout=0.5), "logps", 0)
        return TorchEngine(AnswerLogProbs(adapted), make_config())

    class Watches(Record):
        def evaluate(self, step: int) -> dict[str, float]:
            return held_out.evaluate(watched, watching, run, step)

    watched = make_task(weights=[1.0] * len(ROWS))
    run, quiet, watching, hooks = make_run(130, eval_steps=2), engine(), engine(), Watches()
    train(make_task(), quiet, make_run(130), Record())
    train(make_task(), watching, run, hooks)
    for ours, theirs in zip(watching.module.parameters(), quiet.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert ["eval_loss" in record for record in hooks.records] == [False, True, False, True]
    watching.module.eval()
    with torch.no_grad():
        outputs = watching.module(collate(ROWS, "shared", 2)).view(-1, 2).double()
    expected = watched.metrics(outputs, range(len(ROWS)))
    for name in ("rewards/accuracies", "rewards/margins", "kl"):
        assert hooks.records[-1][f"eval_{name}"] == pytest.approx(expected[name], rel=1e-4), name
    mean = float(watched.losses(outputs, range(len(ROWS))).mean())
    assert hooks.records[-1]["eval_loss"] == pytest.approx(mean, rel=1e-4)


def test_held_out_pairs_that_take_longer_than_a_step_give_signs_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the watchdog ends the workers, who come to the same evaluation again."""
    monkeypatch.setattr(held_out, "BATCH", 3)
    rank, signs = Mock(), []
    rank.held_out, rank.engine = make_task(), make_engine()
    rank.watchdog.beat = lambda: signs.append(1)
    hooks = RankHooks.__new__(RankHooks)
    hooks._rank, hooks._run = rank, make_run()
    assert "eval_loss" in hooks.evaluate(1)
    assert len(signs) == math.ceil(len(ROWS) / 3) > 1
