"""Tables in pages come from committed figures: written anew, found where they differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_comparison_page import difference, sample_comparison, with_facts
from typer.testing import CliRunner

PAGE = """before
<!-- figures: comparison kept.json accuracy -->
old
<!-- end of figures -->
after
"""


@pytest.fixture(scope="module")
def pages() -> Any:
    """The command as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import pages
    finally:
        sys.path.pop(0)
    return pages


def ended(pages: Any, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(pages.app, arguments)
    return result.exit_code, result.stderr


@pytest.fixture
def folder(pages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One page with one table, of a comparison that is kept."""
    arms = {"human": ("human", 0.3), "weak": ("weak", 0.3), "cw": ("cw", 0.3)}
    found = with_facts(sample_comparison(), **arms)
    found["run"] |= {"output_dir": "/home/someone/runs", "versions": {"torch": "2.13.0"}}
    weak, cw = found["trials"]["weak"], found["trials"]["cw"]
    weak["against"] = {"human": {"accuracy": difference(0.02, 0.012345678)}}
    cw |= {"stopped_after": 2, "by_seed": {"labels_right": difference(0.97, 0.1)}}
    cw["against"]["weak"] = {"accuracy": difference(-0.012, 0.03)}
    (tmp_path / "comparison.json").write_text(json.dumps(found))
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", ["page.md"])
    places = str(tmp_path / "comparison.json"), str(tmp_path / "kept.json")
    assert ended(pages, "keep", *places) == (0, "")
    return tmp_path


def test_figures_by_seed_stand_under_their_seed(folder: Path, pages: Any) -> None:
    found = json.loads((folder / "kept.json").read_text()) | {"seeds": [3, 5]}
    found["trials"] = {
        "human": {"figures": {"accuracy": {"values": [0.5, 0.625]}}, "by_seed": {}},
        "cw": {
            "figures": {"accuracy": {"values": [0.75]}},
            "by_seed": {"kl": {"values": [1.25, 2.0]}},
        },
    }
    (folder / "kept.json").write_text(json.dumps(found))
    (folder / "page.md").write_text(PAGE.replace("comparison kept", "by_seed kept"))
    assert ended(pages) == (0, "")
    heads, _, *rows = (folder / "page.md").read_text().splitlines()[3:7]
    assert heads == (
        "| trial | accuracy, seed 3 | accuracy, seed 5 | KL, nats an answer, seed 3 "
        "| KL, nats an answer, seed 5 |"
    )
    assert rows == ["| `human` | 50.0 % | 62.5 % |  |  |", "| `cw` | 75.0 % |  | 1.2 | 2.0 |"]


def test_the_pages_are_current(pages: Any) -> None:
    assert ended(pages, "--check") == (0, "")


def test_a_table_of_trials_by_hand(pages: Any, folder: Path) -> None:
    assert ended(pages) == (0, "")
    text = (folder / "page.md").read_text()
    assert text.startswith("before\n<!-- figures: comparison kept.json accuracy -->\n\n| trial | ")
    assert text.endswith("|\n\n<!-- end of figures -->\nafter\n")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == [
        *("trial", "labels right", "accuracy", "Δ accuracy, against `human`"),
        *("Δ accuracy, against `weak`", "smallest Δ, against `human`"),
    ], "nobody had a gold reward, all human labels, or weights"
    assert rows[2][3:] == ["**+2.0** [+0.8, +3.2]", "", "1.7"]
    assert rows[3][:2] == ["`cw`, 2 seeds", "97.0 % [87.0, 100.0]"]
    assert rows[3][4] == "−1.2 [−4.2, +1.8]"
    assert ended(pages) == (0, "")
    assert (folder / "page.md").read_text() == text


def test_what_is_kept_names_no_place(folder: Path) -> None:
    text = (folder / "kept.json").read_text()
    assert "someone" not in text
    kept = json.loads(text)
    assert kept["versions"] == {"torch": "2.13.0"}
    assert kept["trials"]["weak"]["against"]["human"]["accuracy"]["low"] == 0.007654
    assert [*kept["trials"]["cw"]["against"]] == ["human", "weak"]


def test_a_changed_digit_is_noticed(pages: Any, folder: Path) -> None:
    ended(pages)
    page = folder / "page.md"
    changed = page.read_text().replace("+0.8", "+0.9")
    page.write_text(changed)
    code, said = ended(pages, "--check")
    assert (code, said.split(":")[0]) == (1, "page.md")
    assert page.read_text() == changed, "checking changes nothing"


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        (
            "comparison kept",
            "opinion kept",
            "`opinion` makes no tables, but asking, comparison, by_seed",
        ),
        ("kept.json", "lost.json", "lost.json cannot be read"),
        ("kept.json accuracy", "kept.json", "must name a table, a file and a figure"),
        ("kept.json accuracy", "kept.json luck", "finds no 'luck'"),
        ("accuracy -->", "accuracy-->", "must name a table, a file and a figure"),
        ("<!-- end of figures -->", "", "has no `<!-- end of figures -->`"),
        ("<!-- figures: ", "<!-- figure: ", "has no `<!-- figures: … -->` before it"),
    ],
)
def test_faults_are_told_in_a_sentence(
    pages: Any, folder: Path, good: str, bad: str, said: str
) -> None:
    (folder / "page.md").write_text(PAGE.replace(good, bad))
    code, told = ended(pages)
    assert code == 2
    assert told.startswith("page.md: ")
    assert said in told
    assert told.count("\n") == 1


def test_only_a_comparison_is_kept(pages: Any, folder: Path) -> None:
    code, said = ended(pages, "keep", str(folder / "kept.json"), str(folder / "other.json"))
    assert (code, said.endswith("is no comparison: it has no 'run'\n")) == (2, True)
