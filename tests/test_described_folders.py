"""Folders that say themselves which of their files are read: cards, saved sets, the hub."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from located import found, make, names, why
from prepared import row

from cwpo_dist.config import ConfigError
from cwpo_dist.pairs.data_sets import hub_splits
from cwpo_dist.pairs.readers import Part, read

CARD = """---
license: mit
configs:
- config_name: helpful
  default: true
  data_files:
  - split: train
    path: one/*.jsonl
  - split: test
    path: [two/held.jsonl]
- config_name: harmless
  data_dir: three
---
# A set

configs: not these
"""


def carded(folder: Path) -> Path:
    make(folder, "one/a.jsonl", "one/test.jsonl", "two/held.jsonl", "two/more.jsonl")
    make(folder, "three/train.jsonl", "three/test.jsonl")
    (folder / "README.md").write_text(CARD)
    return folder


def test_a_data_set_card_says_which_files_are_read(tmp_path: Path) -> None:
    folder = carded(tmp_path / "a set [v2]")
    of = found(folder)
    assert names(of, folder) == ["one/a.jsonl", "one/test.jsonl"]
    reasons = why(of)
    assert reasons["two/held.jsonl"] == "of split 'test' by README.md; `split: test` reads it"
    assert "no split of subset 'helpful'" in reasons["two/more.jsonl"]
    assert "three/train.jsonl" in reasons
    assert names(found(folder, split="test"), folder) == ["two/held.jsonl"]
    roundabout = found(folder / "one" / "..", split="test")
    assert [Path(part.uri).resolve() for part in roundabout.parts] == [folder / "two/held.jsonl"]
    assert names(found(folder, name="harmless"), folder) == ["three/train.jsonl"]
    with pytest.raises(ConfigError, match=r"no subset 'x'; name one under `name`: helpful, harml"):
        found(folder, name="x")
    with pytest.raises(ConfigError, match=r"no split 'dev'; it has train, test"):
        found(folder, split="dev")


def test_a_card_without_a_default_subset_or_sense_is_refused(tmp_path: Path) -> None:
    folder = carded(tmp_path)
    (folder / "README.md").write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(ConfigError, match=r"no default subset; name one under `name`: helpful"):
        found(folder)
    (folder / "README.md").write_text("---\nconfigs:\n- : [\n---\n")
    with pytest.raises(ConfigError, match=r"README\.md: its metadata are not valid YAML"):
        found(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nconfigs: in the text\n")
    assert names(found(folder), folder)[0] == "one/a.jsonl", "its names decide"


def test_a_saved_data_set_is_of_the_split_that_it_was_saved_from(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([row(0)], split="test")
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    assert found(tmp_path / "one").parts[0].reader == "saved"
    with pytest.raises(ConfigError, match=r"no split 'train'; it has test"):
        found(tmp_path / "one", split="train")
    of = found(tmp_path / "both")
    assert of.parts[0].split == "train"
    assert why(of) == {"split 'test'": "split 'train' is read; `split` names another"}
    assert found(tmp_path / "both", into="test").parts[0].split == "test"
    assert len(of.marks) > 3


def test_the_hub_names_its_splits(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "test.jsonl")  # a folder is opened as a hub data set is
    splits = hub_splits(Part(str(tmp_path), "hub"))
    assert {name: count for name, (count, _) in splits.items()} == {"train": 1, "test": 1}
    (raw,) = read(Part(str(tmp_path), "hub", split="test"))
    assert raw.value == row("test.jsonl")
