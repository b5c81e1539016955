"""The report says what was measured, what was not, and never runs or fetches anything."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cwpo_dist.evaluation.accuracy import annotator_accuracy, gra, policy_accuracy
from cwpo_dist.evaluation.annotators import HeldOut, annotator_figures
from cwpo_dist.evaluation.paired import Items, over_seeds
from cwpo_dist.report.cells import Cell, duration
from cwpo_dist.report.outputs import cost_table, keys_table, prepare_table
from cwpo_dist.report.page import render
from cwpo_dist.report.summary import (
    SIMULATED,
    annotator_table,
    arms_table,
)
from cwpo_dist.report.table import print_short, print_summary

ATTACK = "<script>alert('$x^$ [bold]')</script>"
ARMS = ("human", "weak", "cw", "top30")
VOID = {"meta", "br", "link", "img", "hr", "input"}


def _annotator(seed: int = 0, n: int = 600, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    margins, lengths = rng.normal(0, 1.2, n), rng.integers(5, 200, (2, n))
    margins += (lengths[0] - lengths[1]) / 150
    labels = np.where(rng.random(n) < 1 / (1 + np.exp(-margins)), "a", "b").tolist()
    prompts = [str(k) for k in rng.integers(0, n // 2, n)]
    held = HeldOut(
        (margins * scale)[:, None],
        labels,
        np.array([float(label == "a") for label in labels]),
        lengths[0].astype(float),
        lengths[1].astype(float),
        prompts,
    )
    return annotator_figures(held, held, ["one"], by_member=False)


def _curve(seed: int, start: float, end: float, n: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    losses = end + (start - end) * np.exp(-np.arange(n) / n * 3) + rng.normal(0, 0.02, n)
    return [{"step": k + 1, "loss": float(loss), "lr": 1e-5} for k, loss in enumerate(losses)]


def _arm(name: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    baseline, other = rng.normal(0, 1, (2, 256)).round(1)
    aligned = (baseline + rng.normal(0.1 + 0.06 * seed, 1, 256)).round(1)
    logps = rng.normal(-60, 9, (2, 300))
    human = name == "human"
    return {
        "pairs": 1571 if name != "top30" else 472,
        "mean_weight": 0.412 if name == "cw" else 1.0,
        "keys": {
            "prepare": "0c1d2e3f4a5b6c7d",
            **({} if human else {"fit": "1a2b3c4d5e6f7a8b", "annotate": "2b3c4d5e6f7a8b9c"}),
            "weigh": f"{seed:016x}",
            "sft": "4d5e6f7a8b9cadbe" if not human else "5e6f7a8b9cadbecf",
            "align": f"{seed + 77:016x}",
        },
        "annotator": None if human else _annotator(),
        "policy": policy_accuracy(
            logps[0], logps[1] - 0.4 - 0.1 * seed, logps[0] + 1, logps[1] - rng.normal(0, 3, 300),
            rng.choice(["a", "b"], 300, p=[0.6, 0.4]).tolist(), 0.5,
        ).as_dict(),
        "gra": {
            "own_sft": gra(aligned, baseline).as_dict(),
            "common": gra(aligned, other).as_dict(),
        },
        "curves": {
            **({} if human else {"fit": _curve(1, 0.70, 0.42, 210)}),
            "sft": _curve(2 + human, 2.9, 2.2, 90),
            "align": _curve(3 + seed, 0.69 * (0.41 if name == "cw" else 1), 0.2, 480),
        },
        "seconds": {
            "prepare": 4.2,
            **({} if human else {"fit": 312.4, "annotate": 96.8}),
            "sft": 841.0,
            "align": 4021.7 + seed,
        },
        "device_hours": {"fit": 0.0 if human else 0.1, "sft": 0.3, "align": 1.2 + 0.1 * seed},
        "weigh": {"pairs": 1571, "selected": 1571, "ties": 0, "mean_weight": 0.412},
        "weights": {"effective": 0.62 if name == "cw" else 1.0},
        "tokens": {"fit": 1_204_331, "annotate": 804_332, "sft": 2_911_020, "align": 9_812_113},
    }  # fmt: skip


def _beside(name: str, seed: int) -> dict[str, Any]:
    """An arm beside the others, by two figures."""
    rng = np.random.default_rng(100 + seed)
    items = Items([str(k) for k in range(200)], list(range(200)), rng.normal(0.01, 1, 200))
    against = {
        "accuracy": over_seeds([items]).as_dict(),
        "gra_common": over_seeds([items]).as_dict(),
    }
    return {"arm": name, "against": {other: against for other in ARMS if other != name}}


def sample_metrics(simulated: bool = False) -> dict[str, Any]:
    """A whole run with made-up numbers, four arms."""
    confidences = np.tanh(np.abs(np.random.default_rng(5).normal(0, 1.2, 5000)) / 2)
    return {
        "run": {
            "output_dir": "runs/harmless",
            "seed": 7,
            "simulated_labels": simulated,
            "device": "cpu",
            "versions": {"cwpo_dist": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
        },
        "prepare": {
            "rows_in": 2312,
            "pairs": 2290,
            "merged_duplicates": 13,
            "conflicting_labels": 4,
            "rejects": {"identical answers": 7, "empty answer": 2},
            "splits": {"labelled": 630, "unlabelled": 1430, "test": 230},
        },
        "arms": {name: _arm(name, k) for k, name in enumerate(ARMS)},
        "differences": {
            "baseline": "human",
            "trials": {name: _beside(name, k) for k, name in enumerate(ARMS)},
        },
        "confidences": [{"arms": ["weak", "cw", "top30"], "values": confidences.tolist()}],
        "config": {"output_dir": "runs/harmless", "seed": 7, "align": {"beta": 0.5}},
    }


def sample_pairs(n: int = 60, text: str = "") -> dict[str, Any]:
    """An explorer's sample of made-up pairs; `text` stands in every field that others write."""
    rng = np.random.default_rng(3)
    pairs = []
    for k in range(n):
        margins = rng.normal(0, 1.5, 2).round(3).tolist()
        told = {"before": f"before {k} {text}", "after": f"after {k} {text}"}
        pairs.append(
            {
                "id": f"{k:032x}",
                "split": "test" if k % 3 else "unlabelled",
                "prompt": f"What is number {k}? {text}",
                "a": f"Answer a of {k}. " + "long " * int(rng.integers(0, 40)) + text,
                "b": f"Answer b of {k}. " + "long " * int(rng.integers(0, 40)) + text,
                "label": ["a", "b", None][k % 3],
                "margins": margins,
                "margin": sum(margins) / 2,
                "answers": {"cw": told} if k < 10 else {},
            }
        )
    names = [f"seed 0{text}", "seed 1"]
    return {"total": 1_000_000, "annotators": names, "arms": ["weak", "cw"], "pairs": pairs}


class _Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _terminal(metrics: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_summary(metrics, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_ends_in_few_lines() -> None:
    """On a terminal of usual width, with three arms; each annotator beside chance and length."""
    metrics, console = sample_metrics(), Console(file=io.StringIO(), width=80)
    print_short(metrics, "runs/mine", console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(metrics["arms"]) > 1
    assert len(lines) <= 25
    assert all(any(arm in line for line in lines) for arm in metrics["arms"])
    assert any("better than chance; better than length alone, +" in line for line in lines)
    assert any("confidence tells where it is right, +" in line for line in lines)
    assert any(line.startswith("cw: not told apart, ") for line in lines)
    assert "cwpo report runs/mine" in lines[-1]


@pytest.fixture(scope="module")
def page() -> str:
    return render(sample_metrics())


def test_page_shows_the_figures(page: str) -> None:
    words = " ".join(_Page(page).text).replace("\u00a0", " ")
    agreement = sample_metrics()["arms"]["cw"]["annotator"]["agreement"]
    assert f"{100 * agreement['accuracy']:.1f} %" in words
    assert f"{100 * agreement['low']:.1f} – {100 * agreement['high']:.1f}" in words
    for text in ("2,290", "0.412", "identical answers", "1a2b3c4d5e6f7a8b", "beta: 0.5", "torch"):
        assert text in words
    # Cost, confidence, quarters, reliability, margin against length, three curves, GRA by arm; arms
    # against human labels and against the unweighted ones, by two figures
    assert _Page(page).tags.count("svg") == 13


def test_page_stands_alone(page: str) -> None:
    found = _Page(page)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "xlink:href"}:
            assert value.startswith("#"), "only references within the page"
    assert "url(http" not in page
    assert "@import" not in page


def test_svg_ids_are_unique_and_references_resolve(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", page)
    assert {a or b for a, b in references} <= set(ids)


def test_same_metrics_same_bytes(page: str) -> None:
    assert render(sample_metrics()) == page


def test_what_people_judged_stands_on_the_page_and_the_terminal() -> None:
    shares = {"people": (0.7, 0.5, 0.9), "model": (0.6, 0.55, 0.65), "both": (0.65, 0.5, 0.8)}
    judged = {k: dict(zip(("value", "low", "high"), v, strict=True)) for k, v in shares.items()}
    judged |= {"ours": ATTACK, "theirs": "human", "judged": 20, "items": 256, "weight": 0.5}
    metrics = sample_metrics() | {"judged": [judged | {"narrower": 0.25, "left_out": {ATTACK: 1}}]}
    page = render(metrics)
    assert "Judged by people" in _Page(page).text
    assert "<script" not in page
    assert "Judged by people" in _terminal(metrics)


def test_untrusted_text_is_escaped_everywhere() -> None:
    """Titles of rich tables, cells, legends and SVG all carry names that came from outside."""
    metrics = sample_metrics()
    metrics["arms"] = {f"{ATTACK}{k}": arm for k, arm in enumerate(metrics["arms"].values())}
    beside = {"arm": ATTACK, "against": {f"{ATTACK}0": _beside("cw", 1)["against"]["human"]}}
    trials = {f"{ATTACK}0": {"arm": ATTACK, "against": {}}, f"{ATTACK}1": beside}
    metrics["differences"] = {"baseline": f"{ATTACK}0", "trials": trials}
    metrics["run"].update(output_dir=ATTACK, seed=ATTACK, versions={ATTACK: ATTACK})
    metrics["prepare"]["rejects"] = {ATTACK: 3}
    metrics["prepare"]["splits"] = {ATTACK: 3}
    metrics["config"] = {"align": {ATTACK: f"</pre>{ATTACK}"}}
    for arm in metrics["arms"].values():
        arm["keys"]["sft"] = ATTACK
    page = render(metrics)
    assert "<script" not in page
    assert "script" not in _Page(page).tags
    # shown as it is, in the page and in the plots' legends
    assert page.count("&lt;script&gt;") > 10
    legends = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", page))
    assert "&lt;script&gt;" in legends
    assert ATTACK in _terminal(metrics).replace("\n", "")


def test_simulated_labels_are_named_at_every_figure() -> None:
    simulated = render(sample_metrics(simulated=True))
    found = _Page(simulated)
    assert SIMULATED in " ".join(found.text)
    figures = found.tags.count("figure") + found.tags.count("table")
    assert simulated.count('<span class="tag">simulated labels</span>') == figures
    terminal = _terminal(sample_metrics(simulated=True))
    assert "SIMULATED LABELS" in terminal
    assert terminal.count("(simulated labels)") == 8
    assert "human labels" not in simulated + terminal
    honest = render(sample_metrics())
    assert 'class="tag"' not in honest
    assert "SIMULATED" not in honest + _terminal(sample_metrics())


def test_what_was_not_run_is_never_a_zero() -> None:
    """Annotate alone: no arms' policies, no GRA, no curves of sft and align."""
    metrics = sample_metrics()
    metrics["arms"] = {"cw": metrics["arms"]["cw"]}
    arm = metrics["arms"]["cw"]
    arm.update(policy=None, gra=None, mean_weight=None, pairs=None)
    arm["curves"] = {"fit": arm["curves"]["fit"]}
    row = arms_table(metrics).rows[0]
    assert [cell.text for cell in row[1:3]] == ["not run", "not run"]
    assert [cell.text for cell in row[4:]] == ["not run"] * 3
    assert row[3].text.endswith(" %")
    assert render(metrics).count('<p class="absent">not run</p>') == 3
    assert "not run" in _terminal(metrics)


@pytest.mark.parametrize("metrics", [{}, {"arms": {}}, {"arms": {"cw": {}}}, {"run": {}}])
def test_empty_runs_render(metrics: dict[str, Any]) -> None:
    body = render(metrics).partition("<body>")[2]
    assert "not run" in body
    assert not re.search(r">[^<]*\b0\b[^<]*<", body), "no zero anywhere"
    assert "not run" in _terminal(metrics)


def test_nothing_decided_reads_no_pairs() -> None:
    arm = {
        "annotator": annotator_accuracy([0.0], ["a"], [1], [2]).as_dict(),
        "gra": {"own_sft": gra([], []).as_dict(), "common": None},
    }
    row = arms_table({"arms": {"cw": arm}}).rows[0]
    assert row[3] == Cell("no pairs", ("1 tie",), missing=True)
    assert row[5].text == "no pairs"
    assert row[6].text == "not run"
    render({"arms": {"cw": arm}})


def test_lost_rows_show() -> None:
    metrics = sample_metrics()
    values = {row[0].text: row[1].text for row in prepare_table(metrics).rows}
    assert values["rejected"] == "9"
    assert values["unaccounted for"] == "0"
    metrics["prepare"]["pairs"] -= 5
    values = {row[0].text: row[1].text for row in prepare_table(metrics).rows}
    assert values["unaccounted for"] == "5"


def test_shared_stages_stand_once() -> None:
    """Fit is one output of three arms, align one of each: one line and one row each."""
    page = render(sample_metrics())
    cost = page[page.index('<h2 id="cost"') : page.index('<h2 id="provenance"')]
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", cost)]
    stages = [row[0] for row in rows[1:]]
    assert stages.count("prepare") == 1
    assert stages.count("align") == 4
    assert stages.count("sft") == 2


def test_one_output_in_two_roles_costs_once_and_unknown_roles_show() -> None:
    """Without SFT, the base's answers are also the SFT model's."""
    arm = {
        "keys": {"answers_base": "k1", "answers_sft": "k1", "later": "k2"},
        "seconds": {"later": 2.0, "answers_base": 1.0, "answers_sft": 1.0},
    }
    metrics = {"arms": {"cw": arm}}
    assert [row[0].text for row in cost_table(metrics).rows] == ["answers_base", "later"]
    roles = [row[0].text for row in keys_table(metrics).rows]
    assert roles == ["answers_base", "answers_sft", "later"]


def test_human_arms_show_no_annotator() -> None:
    """All arms keep to the annotator's pairs, but its accuracy says nothing of human labels."""
    arms = {"human": {"annotator": _annotator()}, "weak": {"annotator": _annotator()}}
    human, weak = (row[3] for row in arms_table({"arms": arms}).rows)
    assert human.text == "as given"
    assert weak.text.endswith(" %")


def test_calibration_shows_before_and_after_and_why_not() -> None:
    metrics = sample_metrics()
    record = metrics["arms"]["cw"]["annotator"]
    rows = {row[0].text: row[1] for row in annotator_table(metrics).rows}
    found = record["temperature"]
    assert rows["temperature fitted to held-out labels"].text == f"{found['value']:.2f}"
    after = record["calibrated"]["expected_calibration_error"]
    assert rows["ECE with it"].text == f"{100 * after:.1f} %"
    assert f"{100 * after:.1f} % with margins divided by" in render(metrics)
    for arm in metrics["arms"].values():
        if arm["annotator"] is not None:
            arm["annotator"] |= {"temperature": None, "calibrated": None, "no_temperature": "why"}
    table = annotator_table(metrics)
    assert "Not fitted (annotator): why." in table.note
    assert "with margins divided by" not in render(metrics)


def test_pages_are_told_apart_and_lead_back() -> None:
    metrics = sample_metrics()
    alone = metrics | {"arms": {"cw": metrics["arms"]["cw"]}}
    assert "<title>cwpo_dist – human; weak; cw; top30 – seed 7 – runs" in render(metrics)
    assert "<title>cwpo_dist – cw – seed 7 – runs" in render(alone)
    assert "comparison.html" not in render(metrics)
    assert '<a href="comparison.html">' in render(metrics, comparison="comparison.html")


def test_without_answers_nothing_is_said_of_gold_rewards_but_that_it_was_not_run() -> None:
    metrics = sample_metrics()
    for arm in metrics["arms"].values():
        arm["gra"] = None
    page = render(metrics)
    evaluation = page[page.index('<h2 id="evaluation"') : page.index('<h2 id="cost"')]
    assert evaluation.count("not run") == 1
    assert "<table" not in evaluation
    assert "Not run: GRA, own SFT; GRA, common." in page
    assert _terminal(metrics).count("its own SFT model") == 0


def test_broken_curves_draw_what_is_finite() -> None:
    metrics = sample_metrics()
    for arm in metrics["arms"].values():
        arm["curves"] = {
            "fit": [{"step": 1, "loss": float("nan")}],
            "sft": [{"step": 1, "loss": 2.0}, {"step": 2}],
        }
    page = render(metrics)
    assert page.count('<p class="absent">not run</p>') == 2
    assert not re.search(r"\bnan\b", page)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (7325, "2 h 02 min"),
    ],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words
