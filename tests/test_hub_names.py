"""One rule for what is a hub id, asked by all that load, plan, key and describe."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwpo_dist.config import ModelConfig
from cwpo_dist.hub_names import FILE_ENDINGS, is_hub_id
from cwpo_dist.lm.loading import ModelError, model_path
from cwpo_dist.pairs.readers import COMPRESSIONS, READERS
from cwpo_dist.runs import sizes


@pytest.mark.parametrize("name", ["gpt2", "org/name", "org/name-1.5_b", "HuggingFaceTB/SmolLM2"])
def test_ids(name: str) -> None:
    assert is_hub_id(name)
    assert model_path(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "./name",
        "../name",
        "~/name",
        "/a/b",
        "a/b/c",
        "s3://a/b",
        "a/*.jsonl",
        "org/b.tsv",
        "a b",
        "",
    ],
)
def test_places(name: str) -> None:
    assert not is_hub_id(name)


def test_what_is_on_disk_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    assert not is_hub_id("org/name")
    assert model_path("org/name") == "org/name"
    with pytest.raises(ModelError, match="no folder 'file'"):
        model_path("file")


def test_plans_and_loading_read_a_name_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with a space went to the hub from the plan, and was refused by the run."""
    monkeypatch.setattr(sizes, "file_exists", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match="no folder 'my model'"):
        sizes._skeleton(ModelConfig(model_name_or_path="my model"), sizes.policy)


def test_every_file_that_can_be_read_has_an_ending_that_no_id_has() -> None:
    assert {*READERS, *COMPRESSIONS} == set(FILE_ENDINGS)
