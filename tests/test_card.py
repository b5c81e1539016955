"""The model card: hub ids in its front matter, paths nowhere, the recipe in words."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from cwpo_dist.config.load import parse_config
from cwpo_dist.lm.identity import Identity, hub_id, identify, public_name
from cwpo_dist.manifest import Manifest
from cwpo_dist.report.card import annotator_card, model_card

AGREEMENT = {"accuracy": 0.6, "low": 0.5, "high": 0.7, "n": 80}
LONGER = {"accuracy": 0.57, "low": 0.46, "high": 0.68, "n": 80}


def card(arm: str, below: Identity | None = None, **changes: Any) -> ModelCard:
    config: dict[str, Any] = {
        "output_dir": "s3://bucket/secret-place",
        "prepare": {"sources": [{"path": "Anthropic/hh-rlhf"}, {"path": "/home/me/own.jsonl.gz"}]},
        "weak": {"model_name_or_path": "facebook/opt-125m", "num_hidden_layers": 4},
        "policy": {"model_name_or_path": "Qwen/Qwen2.5-7B", "revision": "abc"},
    }
    figures = {
        "policy": {"agreement": AGREEMENT},
        "annotator": {"agreement": LONGER, "length_baseline": LONGER},
        "pairs": 12,
        "mean_weight": 0.2,
        "weigh": {"weights_divided_by": 0.2} if arm == "cw_mean" else {},
        **changes.pop("figures", {}),
    }
    keys = {"prepare": "0123", "align": "4567"}
    given = parse_config(config | changes)
    assert given.policy is not None
    text = model_card(given, arm, keys, figures, identify(given.policy), below)
    assert "secret-place" not in text
    assert "/home" not in text
    return ModelCard(text)


def test_front_matter_has_hub_ids_alone() -> None:
    data = card("cw").data
    assert (data.base_model, data.datasets) == ("Qwen/Qwen2.5-7B", ["Anthropic/hh-rlhf"])
    assert "sigmoid" in data.tags
    local = {"model_name_or_path": "/home/me/policy"}
    found = card("cw", Identity("policy", on_hub=False), policy=local)
    assert (found.data.base_model, found.data.library_name) == (None, "peft")
    assert "| base model | policy |" in found.text


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ("cw", "`confidence` of the margin, normalised by none"),
        ("cw_mean", "normalised by dataset"),
        ("proportional", "`confidence` of the margin, drawn in proportion to it"),
        ("soft", "the annotator's probability as a soft label"),
    ],
)
def test_it_says_how_pairs_were_weighed(arm: str, says: str) -> None:
    text = card(arm).text
    assert says in text
    assert "| annotator | facebook/opt-125m, first 4 layers |" in text
    assert "60.0% of 80 (95 % interval 50.0%–70.0%)" in text
    assert "| align | `4567` |" in text
    assert "Simulated" not in text


def test_what_length_alone_comes_to_stands_beside_what_was_measured() -> None:
    text = card("cw").text
    assert "| the longer answer, pairs right | 57.0% of 80" in text
    assert "| annotator, pairs right | 57.0% of 80" in text
    assert "| implicit reward, pairs right | 60.0% of 80" in text


def test_a_share_is_said_to_be_of_the_pairs_that_it_is_of() -> None:
    """One of ten decided, and rightly: that is no 100 % of ten."""
    few = {"accuracy": 1.0, "low": 0.2, "high": 1.0, "n": 10, "correct": 1, "wrong": 0, "ties": 9}
    text = card("cw", figures={"policy": {"agreement": few}}).text
    assert "implicit reward, pairs right | 100.0% of 1 (95 % interval 20.0%–100.0%); 9 ties" in text


def test_gold_reward_accuracies_say_what_they_are_not_of() -> None:
    """Of the baseline so many prompts; of the other all; of a third, by an older run, unknown."""
    nothing = {"n": 0, "accuracy": None, "low": None, "high": None}
    gra = {
        "own_sft": AGREEMENT | {"left_out": {"prompts": 20}},
        "common": nothing | {"left_out": {"prompts": 100}},
        "older": AGREEMENT,
    }
    lines = card("cw", figures={"gra": gra}).text.splitlines()
    told = [line.split(" | ")[1] for line in lines if line.startswith("| gold reward accuracy")]
    interval = "60.0% of 80 (95 % interval 50.0%–70.0%)"
    why = "prompts left out, as gold could not read their answers |"
    assert told == [f"{interval}; 20 {why}", f"of no prompt; 100 {why}", f"{interval} |"]


def test_of_normalised_weights_it_names_both() -> None:
    divided = "| mean weight | 0.200, by which the weights that acted are divided |"
    assert divided in card("cw_mean").text
    assert "| mean weight | 0.200 |" in card("cw").text


def test_an_arm_without_annotator_says_whose_numbers_weigh() -> None:
    for text in (card("own").text, card("cw", weigh={"from": "columns"}).text):
        assert "| labels of | the data: their labels, or their own scores |" in text
        assert "| weight of a pair | the data's own, or `confidence` of their own scores" in text
        assert "opt-125m" not in text
    both = card("ensemble", weigh={"from": "both"}).text
    assert "| annotator | facebook/opt-125m, first 4 layers, the data's own numbers |" in both


def test_an_annotators_card_gives_what_length_alone_would_have_said() -> None:
    config = parse_config(
        {
            "output_dir": "s3://bucket/secret-place",
            "prepare": {"sources": [{"path": "Anthropic/hh-rlhf"}, {"path": "/home/me/own.csv"}]},
            "weak": {"model_name_or_path": "facebook/opt-125m", "num_hidden_layers": 4},
            "fit": {"labels": "votes", "seeds": [3, 4]},
        }
    )
    figures = {
        "agreement": AGREEMENT,
        "length_baseline": LONGER,
        "margin_length": {"pearson": 0.31},
        "expected_calibration_error": 0.042,
        "brier": {"value": 0.2311},
        "nll": {"value": 0.6549},
    }
    training = Manifest(counts={"rows": 700}, settings={"seed": 4}, versions={"torch": "2"})
    text = annotator_card(config, {"fit_1": "89ab"}, figures, training)
    found = ModelCard(text)
    assert (found.data.base_model, found.data.pipeline_tag) == (
        "facebook/opt-125m",
        "text-classification",
    )
    for line in (
        "| pairs right | 60.0% of 80 (95 % interval 50.0%–70.0%) |",
        "| the longer answer, pairs right | 57.0% of 80 (95 % interval 46.0%–68.0%) |",
        "| correlation of margin and length difference | 0.31 |",
        "| calibration error | 4.2% |",
        "| Brier score | 0.231 |",
        "| negative log-likelihood | 0.655 |",
        "| learned from | shares of votes, where people voted, of 700 pairs |",
        "| seed | 4 |",
        "| fit_1 | `89ab` |",
    ):
        assert line in text
    assert "secret-place" not in text
    assert "/home" not in text
    assert "pairs right" not in annotator_card(config, {}, {}, training)


def test_it_says_how_long_training_was() -> None:
    text = card("cw", sft={"max_steps": 4}, align={"num_train_epochs": 1}).text
    assert "| SFT before | 4 steps |" in text
    assert "| length | 1 epoch |" in text
    assert "| SFT before | no |" in card("cw", sft=None).text


def test_human_labels_have_no_annotator() -> None:
    assert "| labels of | people |" in card("human").text
    assert "opt-125m" not in card("human").text


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/name", "org/name"),
        ("data/pairs.jsonl.gz", "pairs.jsonl.gz"),
        ("data/*.jsonl", "*.jsonl"),
        ("s3://key/bucket/model", "model"),
        ("/a/b/model/", "model"),
        ("plain", "plain"),
    ],
)
def test_only_hub_ids_are_shown_whole(name: str, public: str) -> None:
    assert public_name(name) == public
    assert hub_id(name) == (name if name == "org/name" else None)
