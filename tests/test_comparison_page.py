"""The page of a comparison: what came out in words, each seed, and what was not run."""

from __future__ import annotations

import io
from typing import Any

import pytest
from markupsafe import escape
from rich.console import Console

from cwpo_dist.config import ARMS
from cwpo_dist.report.arms_in_words import in_words, is_weighted
from cwpo_dist.report.cells import written
from cwpo_dist.report.comparison_page import print_comparison, render_comparison
from cwpo_dist.report.outcomes import rivals_of, verdicts
from cwpo_dist.report.trial_tables import tables


def difference(mean: float, half: float) -> dict[str, Any]:
    bounds = {"mean": mean, "low": mean - half, "high": mean + half, "smallest": 1.4 * half}
    return {"seeds": 2, "items": 9, "values": [mean - 0.1, mean + 0.1], **bounds}


def sample_comparison(baseline: str = "human") -> dict[str, Any]:
    """Four trials with made-up numbers, of which accuracy alone was had."""
    trial = {"learning_rate": 1e-4, "figures": {"accuracy": difference(0.5, 0.1)}, "by_seed": {}}
    against = {"cw": difference(0.04, 0.03), "weak": difference(0.01, 0.03)}
    against["soft"] = difference(-0.05, 0.03)
    run = {"output_dir": baseline, "simulated_labels": False, "versions": {}, "device": "cpu"}
    return {
        "run": run,
        "seeds": [0, 1],
        "baseline": baseline,
        "tried": {},
        "trials": {
            baseline: trial,
            **{k: trial | {"against": {baseline: {"accuracy": d}}} for k, d in against.items()},
        },
        "config": {"output_dir": baseline},
        "single_runs": {"single-runs-1.html": [baseline, *against]},
    }


def test_trials_of_one_annotator_share_its_line() -> None:
    found = sample_comparison("human")
    good, bad = ({"labels_right": difference(mean, 0.02)} for mean in (0.65, 0.55))
    for name, known in {"cw": good, "weak": good, "soft": bad}.items():
        found["trials"][name] = found["trials"][name] | {"by_seed": known}
    (table,) = [table for table in tables(found) if table.title == "Annotators"]
    told = [[cell.text for cell in row] for row in table.rows]
    assert [row[:2] for row in told] == [["cw, weak", "65.0 %"], ["soft", "55.0 %"]]
    assert all(len(row) == 2 for row in told), "figures that nobody had have no column,"
    assert "Not run: least confident; most confident; ECE" in table.note, "but are named"
    assert "cw, weak" in render_comparison(found)
    assert not [t for t in tables(sample_comparison("human")) if t.title == "Annotators"]


def with_facts(found: dict[str, Any], **arms: tuple[str, float]) -> dict[str, Any]:
    """Every trial with its arm and labelled share, held against every other."""
    told = difference(0.02, 0.05)
    found["trials"] = {
        name: {
            "learning_rate": 4e-4,
            "arm": arm,
            "loss": "sigmoid",
            "labelled_fraction": share,
            "flipped_labels": 0.0,
            "figures": {"accuracy": difference(0.5, 0.1)},
            "by_seed": {},
            "against": {other: {"accuracy": told} for other in arms if other != name},
        }
        for name, (arm, share) in arms.items()
    }
    return found


def test_weighting_is_held_against_the_same_labels_unweighted() -> None:
    """Of two `weak` each takes the one with its share of labels; human100 knows all labels."""
    arms = {"human": 0.3, "human100": 0.3, "weak": 0.3, "ws_dpo": 0.3, "cw": 0.3, "top30": 0.3}
    trials = {name: (name, share) for name, share in arms.items()}
    found = with_facts(sample_comparison(), **trials, cw20=("cw", 0.2), weak20=("weak", 0.2))
    baseline, weighted, human100 = (
        (verdict.title, [line.split(":")[0] for line in verdict.lines])
        for verdict in verdicts(found)
    )
    assert baseline == ("Against human, on held-out labels", list(found["trials"])[1:])
    assert weighted == (
        "Weighted, against the same labels unweighted, on held-out labels",
        ["cw, against weak", "top30, against weak", "cw20, against weak20"],
    )
    assert human100 == (
        "Against human100 (all of the data's own labels), on held-out labels",
        ["weak", "ws_dpo", "cw", "top30", "cw20", "weak20"],
    ), "human against human100 was said above"
    page = render_comparison(found)
    assert page.count("<figcaption>Means over seeds") == 4, "differences are drawn, group by group"
    again = verdicts(with_facts(found | {"baseline": "weak"}, **trials))
    assert [v.title.split(" (")[0] for v in again] == [
        "Against weak, on held-out labels",
        "Against human100",
    ], "no weighted trial is held against weak twice"


def test_trials_are_held_against_those_whose_labels_were_flipped_alike() -> None:
    arms = {"human100": ("human100", 0.3), "weak": ("weak", 0.3), "cw": ("cw", 0.3)}
    noisy = {f"{name}-noisy": fact for name, fact in arms.items()}
    found = with_facts(sample_comparison(), **arms, **noisy)
    for name in noisy:
        found["trials"][name]["flipped_labels"] = 0.3
    _, unweighted, all_human = (rivals for _, _, rivals in rivals_of(found))
    assert unweighted == {"cw": "weak", "cw-noisy": "weak-noisy"}
    assert {name: rival for name, rival in all_human.items() if name.startswith("cw")} == {
        "cw": "human100",
        "cw-noisy": "human100-noisy",
    }


@pytest.mark.parametrize("unsure", [0.6, None])
def test_what_is_told_apart_alone_is_held_against_all_lines(unsure: float | None) -> None:
    """Of p values 0.005, 0.03 and 0.6 Holm makes 0.015, 0.06 and 0.6; a line without p counts."""
    found = sample_comparison()
    for arm, mean, p in (("cw", 0.04, 0.005), ("weak", 0.01, unsure), ("soft", -0.05, 0.03)):
        found["trials"][arm]["against"]["human"]["accuracy"] = difference(mean, 0.03) | {"p": p}
    (verdict,) = verdicts(found)
    assert verdict.lines[0].endswith("; counting all 3 comparisons: decided, p = 0.015")
    assert "counting" not in verdict.lines[1], "not told apart even alone"
    assert verdict.lines[2].endswith("; counting all 3 comparisons: not decided, p = 0.060")


def test_every_arm_is_told_in_a_line_of_its_own() -> None:
    told = {arm: in_words(arm) for arm in ARMS}
    assert len(set(told.values())) == len(ARMS)
    assert told["human"] == "the data's own labels, uncovered, of the unlabelled part; weight 1"
    assert {arm for arm in ARMS if is_weighted(arm)} == set(
        ["cw", "cw_mean", "cw_calibrated", "ensemble", "proportional", "soft", "top30"]
    )
    found = with_facts(sample_comparison(), human=("human", 0.3), cw=("cw", 0.3))
    page = render_comparison(found)
    assert str(escape(told["cw"])) in page
    assert str(escape(told["soft"])) not in page
    assert "presets" not in page
    found["config"]["weigh"] = {"temperature": 2.0, "top_fraction": None}
    assert "over these presets: weigh.temperature." in render_comparison(found)


def test_no_interval_says_what_cannot_be() -> None:
    found = sample_comparison()
    low = {"calibration_error": 0.1, "nll": 0.9, "mean_confidence": 0.9, "margin_length": -0.6}
    known = {k: difference(mean, 0.7) for k, mean in low.items()}
    found["trials"]["cw"] |= {"by_seed": known | {"labels_right": difference(0.6, 0.7)}}
    (table,) = [table for table in tables(found) if table.title == "Annotators"]
    intervals = [cell.details[0] for cell in table.rows[0][1:]]
    assert intervals == [
        "0.0 – 100.0",
        "0.000 – 0.800",
        "0.200 – 1.600",
        "0.20 – 1.00",
        "−1.00 to +0.10",
    ]
    found["trials"]["cw"]["against"]["human"]["accuracy"] = difference(0.4, 1.7)
    assert "(−100.0 to +100.0)" in verdicts(found)[0].lines[0]


def test_a_rate_that_few_pairs_chose_is_no_finding() -> None:
    found = sample_comparison()
    found["tried"] = {"cw": {"0.0001": 0.6, "4e-05": 0.5}}
    table = tables(found)[-1]
    assert table.columns == ("trial", "4e-5", "1e-4", "taken")
    assert "standard error" not in table.note, "a comparison from before did not count them"
    found["validation_pairs"] = {"cw": 50}
    table = tables(found)[-1]
    assert [c.text for c in table.rows[0]] == ["cw", "50", "50.0 %", "60.0 %", "1e-4"]
    assert "On 50 pairs" in table.note
    assert "up to 10 points" in table.note, "√(0.5 / 50)"


def test_training_and_test_pairs_are_told() -> None:
    found = sample_comparison()
    for trial in found["trials"].values():
        steps = difference(1234.0, 1.0)
        trial |= {"test_pairs": 590, "by_seed": {"steps": steps, "sft_loss": difference(2.5, 1.0)}}
    trained = next(table for table in tables(found) if table.title == "How they were trained")
    assert trained.columns == ("trial", "rate", "steps", "SFT loss")
    assert [cell.text for cell in trained.rows[0]] == ["human", "1e-4", "1,234", "2.50"]
    assert "Test pairs, over all seeds: 590." in tables(found)[0].note
    found["trials"]["cw"] |= {"test_pairs": 12}
    assert tables(found)[0].columns[1] == "test pairs"
    found["run"]["made"] = "some day"
    assert "some day" in render_comparison(found)


@pytest.mark.parametrize(
    ("value", "form", "words"),
    [
        (-0.04, "+.1f", "0.0"),
        (0.0, "+.2f", "0.00"),
        (-15.21, "+.1f", "−15.2"),
        (0.1, "+.1f", "+0.1"),
    ],
)
def test_numbers_have_real_minus_signs_and_zeros_have_none(
    value: float, form: str, words: str
) -> None:
    assert written(value, form) == words


def test_the_page_says_what_came_out_and_what_was_not_run() -> None:
    found = sample_comparison("<b>")
    page = render_comparison(found)
    assert "<b>" not in page
    assert "Not run: Δ length-balanced; smallest Δ length-balanced; Δ GRA, own SFT" in page
    paired_table = tables(found)[1]
    assert [cell.text for cell in paired_table.rows[0][:3]] == ["cw", "* +4.0", "4.2"]
    (verdict,) = verdicts(found)
    assert verdict.title == "Against <b>, on held-out labels"
    assert verdict.lines == [
        "cw: 4.0 points above (+1.0 to +7.0)",
        "weak: not told apart, +1.0 points (−2.0 to +4.0); a true difference below 4.2 would often "
        "go unseen",
        "soft: 5.0 points below (−8.0 to −2.0)",
    ]
    console = Console(file=io.StringIO(), width=200)
    print_comparison(found, console)
    for line in verdict.lines:
        assert line in console.file.getvalue()
        assert str(escape(line)) in page
