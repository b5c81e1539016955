"""Shares of votes teach an annotator: the loss against torch's, which pairs, which direction."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import IDS, ROWS, Record, make_config
from prepared import config, pairs, write
from tiny import save_tiny, tiny_classifier, tiny_tokenizer
from torch.nn.functional import binary_cross_entropy_with_logits

from cwpo_dist.config import ConfigError, ModelConfig, PrepareConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.lm.modules import AnswerScores
from cwpo_dist.lm.rows import collate
from cwpo_dist.objectives import bradley_terry
from cwpo_dist.pairs.estimate import census
from cwpo_dist.runs.checks import check
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.stages import fit
from cwpo_dist.stages.fit import LabelledPairs
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store
from cwpo_dist.training.loop import Run, train
from cwpo_dist.training.tasks import BradleyTerry, TaskError
from cwpo_dist.training.torch_engine import TorchEngine


def test_the_loss_of_shares_is_the_cross_entropy_gradient_included() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 2, generator=draw, dtype=torch.float64) * 5
    shares = torch.rand(50, generator=draw, dtype=torch.float64)
    shares[:3] = torch.tensor([0.0, 0.5, 1.0])
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss_P = bradley_terry(ours[:, 0], ours[:, 1], shares)
    oracle_P = binary_cross_entropy_with_logits(
        theirs[:, 0] - theirs[:, 1], shares, reduction="none"
    )
    torch.testing.assert_close(loss_P, oracle_P, rtol=1e-12, atol=1e-12)
    loss_P.sum().backward()
    oracle_P.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    margin = scores[:, 0] - scores[:, 1]
    by_hand = torch.sigmoid(margin) - shares  # d/dm of −p·log σ(m) − (1−p)·log σ(−m)
    torch.testing.assert_close(ours.grad[:, 0], by_hand, rtol=1e-9, atol=1e-12)


def test_loss_by_hand_and_hard_labels_as_before() -> None:
    task = BradleyTerry(ROWS[:3], IDS[:3], [0.75, 1.0, 0.5])
    scores = torch.tensor([[2.0, 1.0], [0.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    up, down = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    expected = [
        0.75 * up + 0.25 * down,
        math.log1p(math.exp(2)),
        (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2,
    ]
    assert task.losses(scores, [0, 1, 2]).tolist() == pytest.approx(expected)
    hard, ones = BradleyTerry(ROWS[:3], IDS[:3]), BradleyTerry(ROWS[:3], IDS[:3], [1.0] * 3)
    assert torch.equal(hard.losses(scores, [0, 1, 2]), ones.losses(scores, [0, 1, 2]))


def test_accuracy_is_the_majoritys_and_half_of_a_tie() -> None:
    task = BradleyTerry(ROWS[:4], IDS[:4], [0.9, 0.2, 0.5, 0.6])
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [0.0, 1.0]])
    assert task.metrics(scores, [0, 1, 2, 3])["accuracy"] == pytest.approx(2.5 / 4)
    assert task.metrics(scores, [2])["accuracy"] == 0.5


def test_shares_that_are_none_are_refused() -> None:
    with pytest.raises(TaskError, match="3 pairs have 2 shares"):
        BradleyTerry(ROWS[:3], IDS[:3], [0.5, 0.5])
    with pytest.raises(TaskError, match=r"from 0\.5 to 1\.5"):
        BradleyTerry(ROWS[:2], IDS[:2], [0.5, 1.5])


def test_a_trained_annotator_gives_the_share_of_votes_as_its_probability() -> None:
    """More votes, higher score; as many votes, equal scores: at the optimum σ(margin) = p."""
    shares = [0.9, 0.2, 0.5, 0.7]
    task = BradleyTerry(ROWS[:4], IDS[:4], shares)
    config = make_config(
        max_steps=150, global_batch_size=4, optim="adamw", learning_rate=3e-3, logging_steps=150
    )
    engine, hooks = TorchEngine(AnswerScores(tiny_classifier("llama")), config), Record()
    train(task, engine, Run(config, 0, "shared", 2), hooks)
    entropy = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in shares) / 4
    assert hooks.records[-1]["loss"] == pytest.approx(entropy, abs=5e-3)
    with torch.no_grad():
        scores = engine.module(collate(ROWS[:4], "shared", 2)).view(-1, 2)
    probability = torch.sigmoid(scores[:, 0] - scores[:, 1]).tolist()
    assert probability == pytest.approx(shares, abs=0.05)


def voted(i: int, a: int | None, b: int | None, label: str | None) -> dict[str, Any]:
    answers = {"response_a": f"first {i}", "response_b": f"second {i}"}
    return {"prompt": f"Question {i}?", **answers, "label": label, "votes_a": a, "votes_b": b}


ROWS_OF_VOTES = [
    *(voted(i, 3, 1, "a") for i in range(20)),
    *(voted(i, 1, 4, "b") for i in range(20, 40)),
    *(voted(i, 2, 2, None) for i in range(40, 60)),
    *(voted(i, None, None, "a") for i in range(60, 80)),
    *(voted(i, 0, 0, "b") for i in range(80, 100)),
    *(voted(i, 2, 2, "a") for i in range(100, 120)),
    *(voted(i, 0, 0, None) for i in range(120, 140)),
    *(voted(i, 1, 3, "a") for i in range(140, 160)),  # the votes are against the label
]
FIRSTS = {range(20): 0.75, range(20, 40): 0.2, range(40, 60): 0.5}
FIRSTS |= {
    range(60, 80): 1.0,
    range(80, 100): 0.0,
    range(100, 120): 0.5,
    range(140, 160): 0.25,
}  # of "first i"


def made(tmp_path: Path, name: str, **changes: Any) -> tuple[Store, dict[str, Any], PrepareConfig]:
    given = config(
        write(tmp_path / "x.jsonl", ROWS_OF_VOTES), labelled_fraction=0.7, test_fraction=0.2
    ).model_copy(update=changes)
    store = Store(str(tmp_path / name))
    return store, prepare(store, given, seed=0), given


@pytest.mark.usefixtures("in_process")
def test_ties_are_labelled_where_asked_alone(tmp_path: Path) -> None:
    plain, counts, given = made(tmp_path, "plain")
    asked, with_ties, given_ties = made(tmp_path, "asked", ties="labelled")
    before = {pair["pair_id"]: pair for pair in pairs(plain)}
    moved = {i["pair_id"] for i in pairs(asked) if before[i["pair_id"]]["split"] != i["split"]}
    ties = {i for i, pair in before.items() if pair["label"] is None and pair["votes_a"]}
    assert len(ties) == 20
    assert moved < ties, "only ties, and of these only those of labelled prompts"
    assert len(moved) > 5
    for pair in pairs(asked):
        if pair["pair_id"] in moved:
            assert before[pair["pair_id"]]["split"] == "unlabelled"
            assert pair["split"] == "labelled"
            assert pair["label"] is None
    assert counts["labelled"] == with_ties["labelled"], "a tie is no label"
    for known, of in ((counts, given), (with_ties, given_ties)):
        assert {k: n for k, n in known["splits"].items() if n} == census(of, seed=0).splits


@pytest.mark.usefixtures("in_process")
def test_fit_learns_the_share_of_each_pairs_votes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label without votes is a hard one; the order of a row's answers is told by its share."""
    store, counts, _ = made(tmp_path, "asked", ties="labelled")
    weak, encoder = (
        ModelConfig(model_name_or_path="m", max_length=400),
        Encoder(tiny_tokenizer(), "plain"),
    )
    by_id = {pair["pair_id"]: pair for pair in pairs(store)}
    given = GivenModel("weak", weak, "plain", [])
    soft = LabelledPairs(store, counts["shards"], given, by_votes=True)(encoder)
    hard = LabelledPairs(store, counts["shards"], given)(encoder)
    monkeypatch.delattr(fit, "encode_pairs")  # the next rank of this node tokenises nothing
    assert LabelledPairs(store, counts["shards"], given)(encoder).rows[:] == hard.rows[:]
    labelled = {i for i, p in by_id.items() if p["split"] == "labelled"}
    assert set(soft.pair_ids) == labelled
    assert set(hard.pair_ids) == {i for i in labelled if by_id[i]["label"] is not None}
    assert hard.shares is None
    assert soft.shares is not None
    seen: set[tuple[bool, float]] = set()
    for row, name, share in zip(soft.rows, soft.pair_ids, soft.shares, strict=True):
        pair = by_id[name]
        i = int(pair["prompt"].split()[1].rstrip("?"))
        (first_share,) = (p for which, p in FIRSTS.items() if i in which)
        first = "first" in encoder.tokenizer.decode(row.answers[0])
        assert share == pytest.approx(first_share if first else 1 - first_share)
        seen.add((first, first_share))
    by_label_a = {(True, 0.75), (True, 1.0), (True, 0.25), (True, 0.5)}
    assert seen == by_label_a | {(False, 0.2), (False, 0.0), (False, 0.5)}
    trained_on_hard = dict(zip(hard.pair_ids, hard.rows, strict=True))
    for row, name in zip(soft.rows, soft.pair_ids, strict=True):
        assert name not in trained_on_hard or trained_on_hard[name] == row


def whole(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    save_tiny(folder / "model", "llama", 0)
    source = {"path": write(folder / "x.jsonl", rows)}
    return parse_config(
        {
            "output_dir": str(folder / "run"),
            "prepare": {"sources": [source], **changes.pop("prepare", {})},
            "weak": {"model_name_or_path": str(folder / "model"), "max_length": 400},
            **changes,
        }
    )


def test_votes_that_there_are_not_and_ties_that_nobody_learns_are_refused(tmp_path: Path) -> None:
    bare = [{k: v for k, v in row.items() if "votes" not in k} for row in ROWS_OF_VOTES]
    with pytest.raises(ConfigError, match=r"fit\.labels: 'votes', but no source has votes_a"):
        check(whole(tmp_path, bare, fit={"labels": "votes"}), "fit")
    check(whole(tmp_path, ROWS_OF_VOTES, fit={"labels": "votes"}), "fit")
    with pytest.raises(ConfigError, match=r"prepare\.ties: 'labelled' .* fit\.labels: votes"):
        whole(tmp_path, ROWS_OF_VOTES, prepare={"ties": "labelled"})
    ready = {"prepare": {"ties": "labelled"}, "fit": {"labels": "votes"}}
    ready["annotate"] = {"model": {"model_name_or_path": "org/reward"}}
    with pytest.raises(ConfigError, match="where no annotator is given"):
        whole(tmp_path, ROWS_OF_VOTES, **ready)
    both = {"prepare": {"ties": "labelled"}, "fit": {"labels": "votes"}}
    check(whole(tmp_path, ROWS_OF_VOTES, **both), "fit")
