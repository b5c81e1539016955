"""Tables and plots show each number in its own place: no two of a kind are alike here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cwpo_dist.report import annotator_plots, plots, summary, verdict
from cwpo_dist.report.cells import Table
from cwpo_dist.report.plots import Dot
from cwpo_dist.report.summary import tables


def accuracy(share: float, ties: int = 0) -> dict[str, Any]:
    return {
        "accuracy": share,
        "low": share - 0.1,
        "high": share + 0.05,
        "ties": ties,
        "n": 100,
    }


def gra(wins: int, ties: int) -> dict[str, Any]:
    counted = {"wins": wins, "ties": ties, "losses": 100 - wins - ties}
    halved = {"accuracy_ties_halved": (wins + ties / 2) / 100}
    return accuracy(wins / 100, ties) | counted | halved


def annotator(right: float) -> dict[str, Any]:
    """Made-up figures of an annotator; from `right` on, every one another number."""
    bins = [
        {"lower": 0.5, "upper": 0.75, "mean": 0.6, "n": 30} | accuracy(0.55),
        {"lower": 0.75, "upper": 1.0, "mean": 0.9, "n": 70} | accuracy(0.7),
    ]
    for each, n in zip(bins, (30, 70), strict=True):
        each["n"] = n
    after = [dict(each, accuracy=each["accuracy"] + 0.08) for each in bins]
    quarters = [
        {"lower": k / 4, "upper": (k + 1) / 4, "n": 25} | accuracy(0.5 + k / 10) for k in range(4)
    ]
    return {
        "agreement": accuracy(right, 3),
        "by_quarter": quarters,
        "reliability": bins,
        "expected_calibration_error": 0.21,
        "ece_interval": [0.19, 0.24],
        "mean_probability": 0.82,
        "brier": {"value": 0.233, "low": 0.2, "high": 0.266},
        "nll": {"value": 0.711, "low": 0.6, "high": 0.8},
        "calibrated": {
            "reliability": after,
            "expected_calibration_error": 0.04,
            "ece_interval": None,
            "brier": {"value": 0.222, "low": None, "high": None},
            "nll": {"value": 0.655, "low": None, "high": None},
        },
        "mean_confidence": 0.37,
        "length_baseline": accuracy(0.52, 5),
        "margin_length": {"pearson": -0.31, "spearman": -0.28},
        "margin_by_length": [
            {"length": -40.0, "median": -1.5, "low": -2.0, "high": 0.5, "n": 5},
            {"length": 60.0, "median": 0.7, "low": -0.2, "high": 1.1, "n": 5},
        ],
        "confidence_length": {"pearson": 0.17, "spearman": 0.13},
        "temperature": {"value": 2.5, "low": 2.0, "high": 3.0, "n": 44},
        "no_temperature": None,
    }


ENSEMBLE = {"annotators": 2, "partial": 4, "alone": 9, "contested": 31, "mean_disagreement": 0.52}


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    parts = {"unanimous": accuracy(0.77), "contested": accuracy(0.51)}
    weigh = {"pairs": 90, "selected": 80, "ties": 2, "mean_confidence": 0.36, "mean_weight": 0.24}
    cw = {
        "pairs": 70,
        "mean_weight": 0.24,
        "annotator": annotator(0.65) | {"ensemble": parts},
        "policy": {"agreement": accuracy(0.61, 1)},
        "gra": {"own_sft": gra(60, 8), "common": gra(45, 30)},
        "weigh": weigh | {"ensemble": ENSEMBLE},
        "weights": {"effective": 0.62},
        "device_hours": {"align": 1.5, "sft": 0.5},
    }
    human = {
        "pairs": 71,
        "mean_weight": 1.0,
        "annotator": None,
        "policy": {"agreement": accuracy(0.58, 2)},
        "gra": {"own_sft": gra(55, 5), "common": gra(40, 10)},
        "weigh": {"pairs": 91, "selected": 91, "ties": 0, "mean_weight": 1.0},
        "weights": {"effective": 1.0},
        "device_hours": {"align": 0.25},
    }
    return {
        "run": {"output_dir": "x"},
        "prepare": {"pairs": 200},
        "arms": {"human": human, "cw": cw},
    }


def shown(table: Table) -> dict[str, list[str]]:
    """First column → the other cells, with what stands small beside them."""
    return {row[0].text: [" | ".join([c.text, *c.details]) for c in row[1:]] for row in table.rows}


def test_tables_of_a_run_show_each_number_in_its_row_and_column(metrics: dict[str, Any]) -> None:
    told = {table.title: table for table in tables(metrics)}
    arms = told["Results by arm"]
    assert arms.columns == (
        *("arm", "pairs", "mean weight", "labels right", "policy right"),
        *("GRA, own SFT", "GRA, common"),
    )
    assert shown(arms) == {
        "human": [
            *("71", "1.000", "as given", "58.0 % | 48.0 – 63.0 | 2 ties"),
            *("55.0 % | 45.0 – 60.0 | 5 ties", "40.0 % | 30.0 – 45.0 | 10 ties"),
        ],
        "cw": [
            *("70", "0.240", "65.0 % | 55.0 – 70.0 | 3 ties", "61.0 % | 51.0 – 66.0 | 1 tie"),
            *("60.0 % | 50.0 – 65.0 | 8 ties", "45.0 % | 35.0 – 50.0 | 30 ties"),
        ],
    }
    rows = [[cell.text for cell in row] for row in told["Gold reward accuracy"].rows]
    assert rows == [
        ["human", "its own SFT model", "55", "5", "40", "55.0 %", "57.5 %"],
        ["", "the common reference", "40", "10", "50", "40.0 %", "45.0 %"],
        ["cw", "its own SFT model", "60", "8", "32", "60.0 %", "64.0 %"],
        ["", "the common reference", "45", "30", "25", "45.0 %", "60.0 %"],
    ]
    weights = told["Weights by arm"]
    assert weights.columns[1:] == (
        *("labelled by it", "selected", "ties", "mean confidence", "mean weight"),
        "effective share",
    )
    assert shown(weights)["cw"] == ["90", "80", "2", "0.360", "0.240", "62.0 %"]
    ensemble = told["Ensemble"]
    assert ensemble.columns[1:] == (
        *("annotators", "not by all", "left out", "contested", "disagreement"),
        *("right where unanimous", "right where contested"),
    )
    assert [cell.text for cell in ensemble.rows[0]] == [
        *("cw", "2", "4", "9", "31", "0.520", "77.0 %", "51.0 %"),
    ]
    assert shown(told["Annotator on held-out human labels"]) == {
        "accuracy": ["65.0 % | 55.0 – 70.0 | 3 ties"],
        "longer answer wins": ["52.0 % | 42.0 – 57.0 | 5 ties"],
        "calibration error (ECE)": ["21.0 % | 19.0 – 24.0"],
        "Brier score": ["0.233 | 0.200 – 0.266"],
        "negative log-likelihood": ["0.711 | 0.600 – 0.800"],
        "temperature fitted to held-out labels": ["2.50 | 2.00 – 3.00"],
        "ECE with it": ["4.0 %"],
        "Brier score with it": ["0.222"],
        "negative log-likelihood with it": ["0.655"],
        "mean probability": ["82.0 %"],
        "mean confidence": ["0.370"],
        "margin × length difference": ["−0.31 | −0.28"],
        "confidence × |length difference|": ["+0.17 | +0.13"],
    }


def test_a_verdict_says_which_way_each_difference_goes(metrics: dict[str, Any]) -> None:
    def mean(value: float, half: float) -> dict[str, Any]:
        ends = {"low": value - half, "high": value + half, "smallest": 2 * half}
        return {"seeds": 1, "items": 9, "mean": value, "values": [value], **ends}

    trials = {
        "cw": {
            "arm": "cw",
            "against": {"human": {"accuracy": mean(0.03, 0.04), "gra_common": mean(0.05, 0.02)}},
        },
        "human": {
            "arm": "human",
            "against": {"cw": {"accuracy": mean(-0.03, 0.04), "gra_common": mean(-0.05, 0.02)}},
        },
    }
    found = metrics | {"differences": {"baseline": "human", "trials": trials}}
    (first,), (other,) = verdict.of_arms(found)
    assert first.title == "Against human, by the gold reward (GRA, common)"
    assert first.lines == ["cw: 5.0 points above (+3.0 to +7.0)"]
    assert other.lines == [
        "cw: not told apart, +3.0 points (−1.0 to +7.0); "
        "a true difference below 8.0 would often go unseen"
    ]
    assert verdict.of_arms(metrics) == ([], [])


@pytest.mark.parametrize(
    ("right", "above", "sure", "told"),
    [
        (0.65, (0.13, 0.02, 0.24), (0.3, 0.1, 0.5),
         ["better than chance; better than length alone, +13.0 points (+2.0 to +24.0)",
          "tells where it is right, +30.0 points (+10.0 to +50.0)"]),
        (0.55, (0.03, -0.02, 0.08), (0.1, -0.1, 0.3),
         ["not told from chance; not told from length alone, +3.0 points (−2.0 to +8.0)",
          "not decided whether its confidence tells where it is right, +10.0"]),
        (0.30, (-0.2, -0.3, -0.1), (-0.3, -0.5, -0.1),
         ["worse than chance; worse than length alone, −20.0 points (−30.0 to −10.0)",
          "LESS often where it is confident, −30.0 points (−50.0 to −10.0)"]),
    ],
)  # fmt: skip
def test_a_verdict_says_what_an_annotator_is_worth(
    metrics: dict[str, Any],
    right: float,
    above: tuple[float, ...],
    sure: tuple[float, ...],
    told: list[str],
) -> None:
    names = ("value", "low", "high")
    record = annotator(right) | {
        "above_length": dict(zip(names, above, strict=True)),
        "sure_half": dict(zip(names, sure, strict=True)),
    }
    arms = {"cw": metrics["arms"]["cw"] | {"annotator": record}}
    lines = verdict.of_annotators(metrics | {"arms": arms})
    assert len(lines) == len(told)
    assert all(words in line for words, line in zip(told, lines, strict=True))
    assert lines[0].startswith(f"annotator: right in {100 * right:.1f} % of held-out human labels")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Axes]]:
    """The axes of the figure that was drawn last, as matplotlib has them."""
    figures: list[Figure] = []

    def keep(figure: Figure, salt: str) -> str:
        figures.append(figure)
        return ""

    for module in (plots, annotator_plots):
        monkeypatch.setattr(module, "svg_of", keep)
    return lambda: figures[-1].axes


def dots(ax: Axes) -> list[list[tuple[float, float]]]:
    """The places of each scatter, in the order in which they were drawn."""
    found = [c.get_offsets().tolist() for c in ax.collections if hasattr(c, "get_sizes")]
    return [[(round(x, 6), round(y, 6)) for x, y in each] for each in found if each]


def whiskers(ax: Axes) -> list[list[list[float]]]:
    """The ends of each line of an interval."""
    lines = [c for c in ax.collections if hasattr(c, "get_segments")]
    return [segment.round(6).tolist() for each in lines for segment in each.get_segments()]


def test_dots_stand_where_their_values_are(drawn: Callable[[], list[Axes]]) -> None:
    found = [Dot("up", 0.1, 0.05, 0.2, (0.08, 0.12)), Dot("down", -0.3, -0.4, -0.1)]
    plot = plots.dots_plot(found, None, "x")
    (ax,) = drawn()
    assert dots(ax) == [[(0.1, 0)], [(0.08, 0.22), (0.12, 0.22)], [(-0.3, 1)]]
    assert whiskers(ax) == [[[0.05, 0], [0.2, 0]], [[-0.4, 1], [-0.1, 1]]]
    low, high = ax.get_ylim()
    assert low > high, "the first row is the uppermost, as its name is"
    names = {text.get_text(): text.xy[1] for text in ax.texts}  # type: ignore[attr-defined]  # all are annotations
    assert names == {"up": 0, "down": 1}
    assert ax.xaxis.get_major_formatter()(-0.3, None) == "−30"
    assert "no difference" in plot.caption


def test_accuracies_stand_above_their_cost(
    metrics: dict[str, Any], drawn: Callable[[], list[Axes]]
) -> None:
    plots.arms_cost_plot(metrics)
    (ax,) = drawn()
    assert dots(ax) == [[(0.25, 0.58)], [(2.0, 0.61)]]
    assert whiskers(ax) == [[[0.25, 0.48], [0.25, 0.63]], [[2.0, 0.51], [2.0, 0.66]]]


def test_shares_of_prompts_won_stand_in_the_panel_of_their_baseline(
    metrics: dict[str, Any], drawn: Callable[[], list[Axes]]
) -> None:
    plots.gra_plot(metrics)
    panels = {ax.get_title(loc="left"): ax for ax in drawn()}
    own, common = (panels[f"against {words}"] for words in summary.COMPARISONS.values())
    assert dots(own) == [[(0.575, 0), (0.64, 1)], [(0.55, 0), (0.6, 1)]]
    assert dots(common) == [[(0.45, 0), (0.6, 1)], [(0.4, 0), (0.45, 1)]]
    assert own.get_title(loc="left") == "against its own SFT model"


def test_an_annotators_plots_show_its_own_numbers(drawn: Callable[[], list[Axes]]) -> None:
    record = annotator(0.65)
    annotator_plots.quarter_plot(record, "x")
    (ax,) = drawn()
    assert dots(ax) == [[(k, round(0.5 + k / 10, 6)) for k in range(4)]]
    levels = {line.get_label(): line.get_ydata()[0] for line in ax.lines}  # type: ignore[index]  # all are arrays
    assert levels == {"all pairs": 0.65, "longer answer wins": 0.52}
    plot = annotator_plots.reliability_plot(record, "x")
    (ax,) = drawn()
    scored, calibrated = ([(0.6, y), (0.9, z)] for y, z in ((0.55, 0.7), (0.63, 0.78)))
    assert dots(ax) == [scored, calibrated]
    labels = [c.get_label() for c in ax.collections if len(c.get_offsets()) == 0]
    assert [label for label in labels if not str(label).startswith("_")] == [
        *("as scored", "calibrated"),
    ]
    assert plot is not None
    assert "ECE 21.0 % as scored, 4.0 % with margins divided by 2.50" in plot.caption
    assert "fitted to 44 pairs" in plot.caption
    annotator_plots.length_plot(record, "x")
    (ax,) = drawn()
    assert dots(ax) == [[(-40.0, -1.5), (60.0, 0.7)]]
    assert whiskers(ax) == [[[-40.0, -2.0], [-40.0, 0.5]], [[60.0, -0.2], [60.0, 1.1]]]
