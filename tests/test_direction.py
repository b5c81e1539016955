"""Which answer is the chosen one: a flip anywhere between a label and a gradient fails here.

The answers of `world` say themselves whether people and the annotator prefer them; what each stage
hands on is decoded back to text.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from prepared import pairs as prepared_pairs
from prepared import write
from world import HIGHER, LABELS, SHARDS, World, answer, margin

from cwpo_dist.config import PrepareConfig
from cwpo_dist.evaluation.accuracy import gra
from cwpo_dist.pairs.records import ANSWER_SCHEMA
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import align, evaluate, explorer, fit, implicit, prepare, sft, weigh
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import BradleyTerry, Preference, Task
from cwpo_dist.training.worker import TrainSpec

OTHER = {"a": "b", "b": "a"}


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
    stage.run(world.context.of(node), node)
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


def reference(text: str) -> float:
    """A log-prob by which each answer is known again."""
    return -3.0 - len(text) - 20.0 * ("won" in text) - 40.0 * ("high" in text)


@pytest.mark.parametrize("arm", ["human", "weak", "cw", "cw_mean", "proportional", "soft"])
def test_align_puts_the_winner_first_with_its_reference_and_weight(
    arm, tmp_path, monkeypatch
) -> None:
    world = World(tmp_path, [arm, "weak"])
    world.score()
    world.tokenise()
    world.log_probs("reference", None, reference)
    weigh.run(world.context, world.node("weigh"))
    task, held_out = trained(world, align, "align", monkeypatch)
    assert isinstance(task, Preference)
    assert isinstance(held_out, Preference)
    handed = world.handed_on(task)
    assert handed == (people if arm == "human" else annotators)("unlabelled")
    assert task.references is not None
    for texts, given in zip(handed.values(), task.references, strict=True):
        assert given == tuple(map(reference, texts))
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
    weigh.run(world.context, world.node("weigh"))
    task, _ = trained(world, align, "align", monkeypatch)
    sure = [math.tanh(margin(k) / 2) for k in range(3)]
    scale = 1.0 if mean is None else sum(sure) / 3
    assert task.normalization == by_loss
    assert list(task.weights) == pytest.approx([weight / scale for weight in sure], abs=1e-6)


def test_weigh_writes_the_winner_as_chosen(tmp_path) -> None:
    world = World(tmp_path, ["cw", "human"])
    world.score()
    for arm, decided in [("cw", annotators), ("human", people)]:
        weigh.run(world.context, world.node("weigh", arm))
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
    weigh.run(world.context, world.node("weigh"))
    store = world.place("weigh")
    tables = [store.read_table(name) for name in store.names("preferences")]
    assert pa.concat_tables(tables)["pair_id"].to_pylist() == ["unlabelled-2"]


def test_the_weak_teacher_learns_from_labelled_winners_alone(tmp_path, monkeypatch) -> None:
    """WS-DPO: SFT and DPO of the weak model on the labelled part."""
    world = World(tmp_path, ["ws_dpo"])
    world.tokenise(role="teacher_tokens")
    world.log_probs("teacher_reference", None, reference)
    node = world.node("teacher_weigh")
    weigh.run(world.context.of(node), node)
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
    implicit.run(world.context.of(node), node)
    beta = world.config.align.beta
    for index, splits in enumerate(SHARDS):
        rows = world.place("annotate").read_table(part("scores", index)).to_pylist()
        assert len(rows) == 3 * len(splits)
        for row in rows:
            split, k = row["pair_id"].split("-")
            for side in "ab":
                word = answer(split, int(k), side).partition(" ")[0]
                assert row[f"score_{side}"] == pytest.approx(beta * gain[word])


def test_evaluate_counts_a_rise_of_peoples_choice_as_right(tmp_path) -> None:
    """Two of three: the policy likes the first and third winner, and is wrong on the second."""
    world = World(tmp_path, ["cw"])
    world.score()
    world.log_probs("reference", None, reference)

    def aligned(text: str) -> float:
        rises = ("won" in text) != ("test 1" in text)
        return reference(text) + (1.5 if rises else -0.5)

    world.log_probs("aligned", None, aligned)
    node = world.node("evaluate")
    evaluate.run(world.context, node)
    metrics = world.place("evaluate").read_json("metrics.json")
    policy = metrics["policy"]["agreement"]
    assert (policy["correct"], policy["n"]) == (2, 3)
    beta = world.config.align.beta
    assert metrics["policy"]["mean_margin"] == pytest.approx(beta * 2.0 / 3)
    items = world.place("evaluate").read_table(evaluate.ITEMS).to_pylist()
    assert {row["pair_id"]: row["margin"] for row in items} == pytest.approx(
        {"test-0": 2 * beta, "test-1": -2 * beta, "test-2": 2 * beta}
    )
    for row in items:
        k = int(row["pair_id"][-1])
        won, lost = (answer("test", k, side) for side in (LABELS[k], OTHER[LABELS[k]]))
        assert row["longer_by"] == len(won) - len(lost)
    annotator = metrics["annotator"]["agreement"]  # it scores b, a, b; people chose a, b, b
    assert (annotator["correct"], annotator["n"]) == (1, 3)
    assert metrics["annotator"]["length_baseline"]["correct"] == 1


def _answers(world: World, texts: dict[str, list[str]]) -> None:
    """Sampled answers of the three models to the prompts of the test pairs."""
    for role, given in texts.items():
        ids = [f"test-{k}" for k in range(3)]
        table = pa.table({"pair_id": ids, "answer": given}, schema=ANSWER_SCHEMA)
        world.place(role).create_table(part("answers", 0), table)


ZS = {
    "answers_aligned": ["zzzzzzzz", "aazzzzzz", "aaaazzzz"],
    "answers_sft": ["azzzzzzz", "aaazzzzz", "aaaaaaaa"],  # the aligned model wins all three
    "answers_base": ["aaaaaaaa", "zzzzzzzz", "zzzzzzzz"],  # and one here
}


def counted_zs(prompt: str, answer: str) -> float:
    return float(answer.count("z"))


def test_a_gold_function_judges_the_aligned_answer_against_each_baseline(tmp_path) -> None:
    gold = {"num_prompts": 3, "gold_function": "test_direction:counted_zs"}
    world = World(tmp_path, ["human"], evaluate=gold)
    _judged(world)


def test_a_gold_model_on_ray_judges_as_its_construction_says(ray_local, tmp_path) -> None:
    """Its score rises with the share of z among the tokens that it reads, and with nothing else."""
    model = _counts_zs(tmp_path / "gold")
    gold = {"num_prompts": 3, "gold_model": {"model_name_or_path": str(model), "max_length": 400}}
    world = World(tmp_path, ["human"], evaluate=gold | {"cpus_per_actor": 0.5})
    _judged(world)
    answers = world.place("evaluate").read_table(evaluate.ANSWERS).to_pylist()
    shares = {text: text.count("z") for texts in ZS.values() for text in texts}
    scores = {
        text: row["gold"] for row, text in zip(answers, ZS["answers_aligned"] * 2, strict=True)
    }
    ordered = sorted(scores, key=shares.__getitem__)
    assert [scores[text] for text in ordered] == sorted(scores.values())
    assert len(set(scores.values())) == 3


def _judged(world: World) -> None:
    _answers(world, ZS)
    world.log_probs("reference", None, reference)
    world.log_probs("aligned", None, reference)
    evaluate.run(world.context, world.node("evaluate"))
    metrics = world.place("evaluate").read_json("metrics.json")
    found = {name: (of["wins"], of["losses"]) for name, of in metrics["gra"].items()}
    assert found == {"own_sft": (3, 0), "common": (1, 2)}
    for row in world.place("evaluate").read_table(evaluate.ANSWERS).to_pylist():
        k = int(row["pair_id"][-1])
        base = ZS["answers_sft" if row["against"] == "own_sft" else "answers_base"][k]
        ours = ZS["answers_aligned"][k]
        assert (row["gold"] > row["baseline_gold"]) == (ours.count("z") > base.count("z"))


def _counts_zs(folder: Path) -> Path:
    """A one-layer classifier whose attention averages, over all tokens, whether they are z.

    Queries and keys are zero, so attention is even; a token's embedding is (1, is z, 0, 0, …); the
    values bring its second number to the third, which the head reads.
    """
    from tiny import tiny_classifier, tiny_tokenizer

    model = tiny_classifier("llama", num_hidden_layers=1, num_key_value_heads=4)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        layer, core = model.model.layers[0], model.model
        core.embed_tokens.weight[:, 0] = 1.0
        core.embed_tokens.weight[tokenizer.convert_tokens_to_ids("z"), 1] = 1.0
        layer.self_attn.v_proj.weight[0, 1] = 1.0
        layer.self_attn.o_proj.weight[2, 0] = 1.0
        model.score.weight[0, 2] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_gra_counts_wins_of_the_first() -> None:
    found = gra([2.0, 1.0, 5.0, 0.0], [1.0, 2.0, 3.0, 0.0])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)


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


@pytest.mark.parametrize("arms", [["cw"], ["cw", "human"]])
def test_the_explorer_shows_labels_that_were_read_and_hides_the_others(arms, tmp_path) -> None:
    world = World(tmp_path, arms)
    world.score()
    sample = explorer.sample(world.context, world.graphs)
    found = {pair["id"]: pair for pair in sample["pairs"]}
    splits = {"labelled", "unlabelled", "validation", "test"}
    assert {pair["split"] for pair in found.values()} == splits
    for pair_id, pair in found.items():
        split, k = pair_id.split("-")
        assert pair["a"] == answer(split, int(k), "a")
        assert pair["b"] == answer(split, int(k), "b")
        hidden = split == "unlabelled" and "human" not in arms
        assert pair["label"] == (None if hidden else LABELS[int(k)])
        if split != "labelled":
            sign = 1 if HIGHER[int(k)] == "a" else -1
            assert pair["margin"] == sign * margin(int(k))
            assert pair["margins"] == [sign * margin(int(k))]


def test_the_explorers_margin_is_that_of_the_first_arms_annotators(tmp_path) -> None:
    """Beside those of another arm's, which disagree here."""
    world = World(tmp_path, ["cw", "ws_dpo"])
    world.score()
    world.score("annotate", "ws_dpo", factor=-3.0)
    sample = explorer.sample(world.context, world.graphs)
    shown = [pair for pair in sample["pairs"] if pair["split"] != "labelled"]
    assert shown
    for pair in shown:
        k = int(pair["id"].split("-")[1])
        own = (1 if HIGHER[k] == "a" else -1) * margin(k)
        assert pair["margins"] == pytest.approx([own, -3 * own])
        assert pair["margin"] == pytest.approx(own)


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
