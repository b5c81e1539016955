"""The list of `make mutants` keeps up with the code: each edit's text and test are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import FAILED, PASSED, ROOT, Mutant, edited, listed, outcome, stray


def test_every_edit_of_the_list_can_be_made_and_names_its_test() -> None:
    mutants = listed()
    assert len(mutants) >= 60
    assert len({(m.file, m.find, m.replace) for m in mutants}) == len(mutants)
    assert list(stray(mutants)) == []
    assert {mutant.kind for mutant in mutants} >= {"direction", "split", "weight", "key", "seed"}


def test_an_edit_whose_text_is_gone_or_stands_twice_is_told() -> None:
    mutant = listed()[0]
    gone = mutant.model_copy(update={"find": "no such text anywhere"})
    twice = mutant.model_copy(update={"find": "import"})
    untested = mutant.model_copy(update={"test": "test_direction.py::test_that_nobody_wrote"})
    told = list(stray([gone, twice, untested]))
    assert "stands 0 times" in told[0]
    assert "times in the file" in told[1]
    assert "there is no test" in told[2]


def test_an_edit_is_made_judged_and_taken_back(tmp_path: Path) -> None:
    """In a tree of two files, with a test that notices one of two edits."""
    (tmp_path / "cwpo_dist").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "cwpo_dist" / "__init__.py").touch()
    file = tmp_path / "cwpo_dist" / "more.py"
    file.write_text("def more(a, b):\n    return a > b\n")
    test = "from cwpo_dist.more import more\n\n\ndef test_more():\n    assert more(2, 1)\n"
    (tmp_path / "tests" / "test_more.py").write_text(test)
    common = {"kind": "direction", "file": "more.py", "find": "a > b"}
    found = {}
    for replace in ("a < b", "a >= b"):
        mutant = Mutant(replace=replace, test="test_more.py::test_more", **common)
        with edited(file, mutant):
            found[replace] = outcome(mutant.test, tmp_path)
    assert found == {"a < b": FAILED, "a >= b": PASSED}
    assert "a > b" in file.read_text()
    with pytest.raises(ValueError, match="replaced by itself"):
        Mutant(replace="a > b", test="test_more.py::test_more", **common)
    assert (ROOT / "tests" / "mutants.py").is_file()
