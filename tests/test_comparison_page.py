"""The page of a comparison: what came out in words, each seed, and what was not run."""

from __future__ import annotations

import io
from typing import Any

from markupsafe import escape
from rich.console import Console

from cwpo_dist.report.comparison import print_comparison, render_comparison
from cwpo_dist.report.trial_tables import tables
from cwpo_dist.report.verdicts import verdicts


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


def test_the_page_says_what_came_out_and_what_was_not_run() -> None:
    found = sample_comparison("<b>")
    page = render_comparison(found)
    assert "<b>" not in page
    assert "Not run: Δ GRA, own SFT" in page
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
