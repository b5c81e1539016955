"""What is said of models has its direction, too: evaluation, gold judges, the explorer."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from world import HIGHER, LABELS, OTHER, World, answer, margin, reference

from cwpo_dist.evaluation.accuracy import gra
from cwpo_dist.pairs.records import ANSWER_SCHEMA
from cwpo_dist.results import sample as explorer
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import evaluate


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
    evaluate.make(world.context, node)
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
    gold = {"num_prompts": 3, "gold_function": "test_direction_judged:counted_zs"}
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
    evaluate.make(world.context, world.node("evaluate"))
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
