"""Which answer is the chosen one: a flip anywhere between a label and a gradient fails here.

The answers of `world` say themselves whether people and the annotator prefer them; what each stage
hands on is decoded back to text.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from prepared import pairs as prepared_pairs
from prepared import write
from world import HIGHER, LABELS, OTHER, SHARDS, World, answer, margin, named, reference

from cwpo_dist.config import PrepareConfig
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import align, fit, implicit, prepare, sft, weigh
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import BradleyTerry, Preference, Task
from cwpo_dist.training.train_rank import TrainSpec


def people(split: str) -> dict[str, tuple[str, str]]:
    """What a stage should hand on of a split where people decide: the winner's text first."""
    return {
        f"{split}-{k}": (answer(split, k, LABELS[k]), answer(split, k, OTHER[LABELS[k]]))
        for k in range(3)
    }


def annotators(split: str) -> dict[str, tuple[str, str]]:
    """The same where the higher score decides."""
    return {
        f"{split}-{k}": (answer(split, k, HIGHER[k]), answer(split, k, OTHER[HIGHER[k]]))
        for k in range(3)
    }


def winners(of: dict[str, tuple[str, str]]) -> dict[str, tuple[str]]:
    return {pair_id: texts[:1] for pair_id, texts in of.items()}


def trained(world: World, stage: Any, role: str, patch: pytest.MonkeyPatch) -> tuple[Task, Task]:
    """What a stage would train on, and what it would be followed by."""
    specs: list[TrainSpec] = []
    patch.setattr(stage, "train", lambda spec: specs.append(spec) or {})
    node = world.node(role)
    stage.make(world.context, node)
    (spec,) = specs
    assert spec.make_held_out is not None
    return spec.make_task(world.encoder), spec.make_held_out(world.encoder)


@pytest.mark.parametrize("spelled", ["chosen", "labels", "named", "votes"])
@pytest.mark.usefixtures("in_process")
def test_prepare_keeps_the_label_and_the_votes_with_the_answer(
    spelled: str, tmp_path: Path
) -> None:
    """Places are drawn, so forty pairs have winners in both."""
    rows: list[dict[str, Any]] = []
    for i in range(40):
        won, lost, prompt = f"won {i}", f"lost {i}", f"prompt {i}"
        if spelled != "labels":
            better, worse = ("good", "bad") if spelled == "named" else ("chosen", "rejected")
            rows.append({"prompt": prompt, better: won, worse: lost})
            if spelled == "votes":
                rows[-1] |= {"chosen_votes": 5, "rejected_votes": 1}
            else:
                rows[-1] |= {"votes_a": 5, "votes_b": 1}
        else:
            a, b = (won, lost) if i % 3 else (lost, won)
            rows.append({"prompt": prompt, "response_a": a, "response_b": b})
            rows[-1] |= {"label": "a" if i % 3 else "b"}
            rows[-1] |= {"votes_a": 5 if i % 3 else 1, "votes_b": 1 if i % 3 else 5}
    source: dict[str, Any] = {"path": write(tmp_path / "rows.jsonl", rows)}
    if spelled == "named":
        source["columns"] = {"chosen": "good", "rejected": "bad"}
    store = Store(tmp_path / "out")
    prepare.prepare(store, PrepareConfig(sources=[source]), seed=0)
    found = prepared_pairs(store)
    assert len(found) == 40
    assert {pair["label"] for pair in found} == {"a", "b"}
    for pair in found:
        assert pair[f"response_{pair['label']}"].startswith("won")
        assert pair[f"votes_{pair['label']}"] == 5
        assert pair[f"votes_{OTHER[pair['label']]}"] == 1


def test_fit_learns_from_the_labelled_winners(tmp_path, monkeypatch) -> None:
    world = World(tmp_path, ["cw"])
    task, held_out = trained(world, fit, "fit", monkeypatch)
    assert world.handed_on(task) == people("labelled")
    assert world.handed_on(held_out) == people("validation")


@pytest.mark.parametrize("arm", ["human", "cw", "ensemble"])
def test_sft_sees_the_winner_of_whoever_decides(arm, tmp_path, monkeypatch) -> None:
    world = World(tmp_path, [arm, "weak"])  # `human`, too, keeps to what can be scored
    world.score()
    world.tokenise()
    task, held_out = trained(world, sft, "sft", monkeypatch)
    decided = people if arm == "human" else annotators
    assert world.handed_on(task) == winners(decided("unlabelled"))
    assert world.handed_on(held_out) == winners(people("validation"))


@pytest.mark.parametrize("arm", ["human", "weak", "cw", "cw_mean", "proportional", "soft"])
def test_align_puts_the_winner_first_with_its_reference_and_weight(
    arm, tmp_path, monkeypatch
) -> None:
    world = World(tmp_path, [arm, "weak"])
    world.score()
    world.tokenise()
    world.log_probs("reference", None, reference)
    weigh.make(world.context, world.node("weigh"))
    task, held_out = trained(world, align, "align", monkeypatch)
    assert isinstance(task, Preference)
    assert isinstance(held_out, Preference)
    handed = world.handed_on(task)
    assert handed == (people if arm == "human" else annotators)("unlabelled")
    assert task.references is not None
    for texts, given in zip(handed.values(), task.references, strict=True):
        assert tuple(given) == tuple(map(reference, texts))
    sure = [math.tanh(margin(k) / 2) for k in range(3)]
    weighs = arm in {"cw", "cw_mean", "proportional"}
    mean = sum(sure) / 3 if arm == "cw_mean" else 1.0
    expected = [weight / mean for weight in sure] if weighs else [1.0] * 3
    assert list(task.weights) == pytest.approx(expected, abs=1e-6)
    assert task.normalization == "none"
    assert task.sampling == ("proportional" if arm == "proportional" else None)
    soft = [1 / (1 + math.exp(-margin(k))) for k in range(3)]
    assert (task.probabilities is None) == (arm != "soft")
    if task.probabilities is not None:
        assert list(task.probabilities) == pytest.approx(soft, abs=1e-6)
    assert world.handed_on(held_out) == people("validation")
    assert set(held_out.weights) == {1.0}
    assert not set(task.pair_ids) & set(held_out.pair_ids)


@pytest.mark.parametrize(
    ("asked", "by_loss", "mean"),
    [
        ("none", "none", None),
        ("batch", "batch", None),
        ("dataset", "none", 1.0),
    ],
)
def test_align_divides_by_the_sum_of_weights_that_is_asked_for(
    asked, by_loss, mean, tmp_path, monkeypatch
) -> None:
    """By a batch's in the loss, by the data set's in the weights themselves, or not at all."""
    world = World(tmp_path, ["cw"], align={"weight_normalization": asked})
    world.score()
    world.tokenise()
    world.log_probs("reference", None, reference)
    weigh.make(world.context, world.node("weigh"))
    task, _ = trained(world, align, "align", monkeypatch)
    sure = [math.tanh(margin(k) / 2) for k in range(3)]
    scale = 1.0 if mean is None else sum(sure) / 3
    assert task.normalization == by_loss
    assert list(task.weights) == pytest.approx([weight / scale for weight in sure], abs=1e-6)


def test_weigh_writes_the_winner_as_chosen(tmp_path) -> None:
    world = World(tmp_path, ["cw", "human"])
    world.score()
    for arm, decided in [("cw", annotators), ("human", people)]:
        weigh.make(world.context, world.node("weigh", arm))
        store = world.place("weigh", arm)
        names = store.names("preferences")
        rows = pa.concat_tables([store.read_table(name) for name in names]).to_pylist()
        assert {r["pair_id"]: (r["chosen"], r["rejected"]) for r in rows} == decided("unlabelled")
        marks = HIGHER if arm == "cw" else LABELS
        assert [row["label"] for row in rows] == list(marks)
        if arm == "cw":
            assert [row["margin"] for row in rows] == [margin(k) for k in range(3)]


def test_a_selection_keeps_the_most_confident_pair(tmp_path) -> None:
    world = World(tmp_path, ["top30"])
    world.score()
    weigh.make(world.context, world.node("weigh"))
    store = world.place("weigh")
    tables = [store.read_table(name) for name in store.names("preferences")]
    assert pa.concat_tables(tables)["pair_id"].to_pylist() == ["unlabelled-2"]


def test_the_weak_teacher_learns_from_labelled_winners_alone(tmp_path, monkeypatch) -> None:
    """WS-DPO: SFT and DPO of the weak model on the labelled part."""
    world = World(tmp_path, ["ws_dpo"])
    world.tokenise(role="teacher_tokens")
    world.log_probs("teacher_reference", None, reference)
    node = world.node("teacher_weigh")
    weigh.make(world.context, node)
    task, _ = trained(world, sft, "teacher_sft", monkeypatch)
    assert world.handed_on(task) == winners(people("labelled"))
    task, _ = trained(world, align, "teacher_align", monkeypatch)
    assert world.handed_on(task) == people("labelled")


def test_implicit_rewards_belong_to_their_own_answers(tmp_path) -> None:
    """The weak policy has learnt to write what people chose: it scores that answer higher."""
    world = World(tmp_path, ["ws_dpo"])
    gain = {"won": 2.0, "lost": -1.0}
    world.log_probs("teacher_before", None, reference)
    world.log_probs(
        "teacher_after", None, lambda text: reference(text) + gain[text.partition(" ")[0]]
    )
    node = world.node("annotate")
    implicit.make(world.context, node)
    beta = world.config.align.beta
    for index, splits in enumerate(SHARDS):
        table = world.place("annotate").read_table(part("scores", index))
        found = dict(zip(table["answer_id"].to_pylist(), table["score"].to_pylist(), strict=True))
        assert len(found) == 3 * 2 * len(splits)
        for split, k, side in itertools.product(splits, range(3), "ab"):
            word = answer(split, k, side).partition(" ")[0]
            assert found[named(split, k, side)] == pytest.approx(beta * gain[word])


def test_soft_labels_pull_towards_the_likelier_answer(tmp_path) -> None:
    """−p·log σ(z) − (1−p)·log σ(−z), by hand: its slope in z is σ(z) − p."""
    world = World(tmp_path, ["human"])
    row = world.encoder.encode("prompt: ", ("yes", "no"))
    task = Preference(
        [row],
        ["p"],
        weights=[1.0],
        references=[(0.0, 0.0)],
        loss_type="sigmoid",
        beta=1.0,
        probabilities=[0.9],
    )
    logps = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    loss = task.losses(logps, [0]).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logps.grad is not None
    assert logps.grad[0].tolist() == pytest.approx([0.5 - 0.9, 0.9 - 0.5])


def test_an_annotators_loss_falls_where_the_winners_score_rises(tmp_path) -> None:
    world = World(tmp_path, ["human"])
    task = BradleyTerry([world.encoder.encode("prompt: ", ("yes", "no"))], ["p"])
    scores = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    task.losses(scores, [0]).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([-0.5, 0.5])
    metrics = task.metrics(torch.tensor([[2.0, 1.0]]), [0])
    assert metrics == {"accuracy": 1.0, "margin": 1.0}


def test_references_are_taken_off_their_own_answers(tmp_path) -> None:
    """By hand: β·((−5 + 9) − (−7 + 8)) = 0.3; a token's mean: −5/4 − (−7/2) = 2.25."""
    world = World(tmp_path, ["human"])
    (row,) = [world.encoder.encode("prompt: ", ("yes", "n"))]
    assert [len(ids) for ids in row.answers] == [4, 2]
    given: dict[str, Any] = {"weights": [1.0], "beta": 0.1}
    logps = torch.tensor([[-5.0, -7.0]]).double()
    dpo = Preference([row], ["p"], references=[(-9.0, -8.0)], loss_type="sigmoid", **given)
    assert dpo.losses(logps, [0]).item() == pytest.approx(math.log1p(math.exp(-0.3)))
    assert dpo.metrics(logps, [0])["rewards/accuracies"] == 1.0
    assert dpo.metrics(logps, [0])["rewards/margins"] == pytest.approx(0.3)
    simpo = Preference([row], ["p"], references=None, loss_type="simpo", simpo_gamma=0.0, **given)
    assert simpo.losses(logps, [0]).item() == pytest.approx(math.log1p(math.exp(-0.225)))


def test_metrics_of_a_preference_task_follow_the_chosen_answer(tmp_path) -> None:
    world = World(tmp_path, ["human"])
    row = world.encoder.encode("prompt: ", ("yes", "no"))
    task = Preference(
        [row, row], ["p", "q"], weights=[1.0, 0.5], references=[(-1.0, -1.0)] * 2,
        loss_type="sigmoid", beta=0.5,
    )  # fmt: skip
    metrics = task.metrics(torch.tensor([[0.0, -2.0], [-3.0, -1.5]]).double(), [0, 1])
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * (1.0 - 2.0) / 2)
    assert metrics["rewards/rejected"] == pytest.approx(0.5 * (-1.0 - 0.5) / 2)
    assert metrics["rewards/margins"] == pytest.approx(0.125)
    assert metrics["logps/chosen"] == -1.5
    assert json.dumps(metrics)
