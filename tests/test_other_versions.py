"""Outputs that another version of cwpo_dist left in a run directory: told apart, never mixed in."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from exported_runs import finish, tiny_policy
from small_run import small_config
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.config import Config, ConfigError, ModelConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution.run import STARTED, run
from cwpo_dist.graph import graph, prepare_node
from cwpo_dist.manifest import Manifest, key_of
from cwpo_dist.planning.plan import plan
from cwpo_dist.results.export import ExportError, export
from cwpo_dist.runs.model_checks import check_model
from cwpo_dist.runs.sizes import reward_model
from cwpo_dist.storage import MANIFEST, StorageError, Store

EARLIER = 2  # a format that stages had


def left(config: Config, name: str, stage: str = "prepare", form: int = EARLIER) -> Store:
    """An output under the key that a format gives today's settings, with one file."""
    node = graph(config, "cw")[stage]
    settings = node.settings.identity()
    inputs = {role: given.content for role, given in node.inputs.items()}
    read = {role: f"{given.stage}/{given.content}" for role, given in node.inputs.items()}
    key = key_of(form, stage, settings, inputs)
    output = Store(config.output_dir).child(stage, key)
    said: Mapping[str, object] = {"settings": settings, "inputs": read}
    output.create_json(name, {"stage": stage, "key": key, **said})
    return output


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None) -> Config:
    monkeypatch.setattr("cwpo_dist.execution.run.connect", lambda: None)
    monkeypatch.setattr("cwpo_dist.execution.run.device", lambda: "cpu")
    return parse_config(small_config(tmp_path, arms=["cw"]))


def test_a_format_is_told_by_the_key(config: Config) -> None:
    for stage, node in graph(config, "cw").items():
        if node.stage != stage:  # of one stage in another role
            continue
        form = node.settings.format
        assert Manifest.read(left(config, MANIFEST, stage, form)).has_format(form), stage
        assert not Manifest.read(left(config, MANIFEST, stage)).has_format(form), stage


def test_what_another_version_began_is_not_gone_on_with(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    begun = left(config, STARTED)
    key = begun.uri.rpartition("/")[2]
    why = f"another version of cwpo_dist began the unfinished prepare/{key}"
    with pytest.raises(ConfigError, match=f"{why}.* finish it with that version, or run without"):
        run(config, until="prepare", resume=True)
    run(config, until="prepare")
    assert why in caplog.text
    assert begun.names() == [STARTED]
    assert prepare_node(config).key != key


def test_what_another_version_finished_stays_and_is_said(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    made = left(config, MANIFEST)
    path = made.uri.removeprefix(f"{config.output_dir}/")
    before = made.read(MANIFEST)
    (note,) = [note for note in plan(config).notes if "another version" in note]
    assert f"1 outputs of another version of cwpo_dist ({path} first)" in note
    caplog.set_level(logging.INFO, "cwpo_dist")
    run(config, until="prepare")
    assert f"{path} of another version of cwpo_dist: this one makes its own" in caplog.text
    assert made.read(MANIFEST) == before
    caplog.clear()
    run(config, until="prepare")
    assert "another version" not in caplog.text, "all is done: there is nothing to wonder at"


def test_what_began_an_output_may_be_a_file_of_something_else(config: Config) -> None:
    Store(config.output_dir).create_json(f"prepare/0123456789abcdef/{STARTED}", [])
    with pytest.raises(StorageError, match=r"started\.json' is not what cwpo_dist writes"):
        run(config, until="prepare")


def test_an_annotator_of_another_version_is_refused_as_a_reward_model(tmp_path: Path) -> None:
    """Its template ends elsewhere than where it was scored: scores would be others, silently."""
    config = parse_config(small_config(tmp_path, arms=["cw"]))
    now = graph(config, "cw")["fit"].settings.format
    assert _faults(config, now) == ()
    (fault,) = _faults(config, EARLIER)
    assert fault.startswith("annotate.model.model_name_or_path: ")
    assert "another version of cwpo_dist fitted this annotator" in fault
    assert "fit it again with this version" in fault


def _faults(config: Config, form: int) -> tuple[str, ...]:
    """Of a reward model that a `fit` of some format left."""
    model = Path(left(config, MANIFEST, "fit", form).root) / "model"
    tiny_classifier("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    given = ModelConfig(model_name_or_path=str(model), max_length=400)
    return check_model("annotate.model", given, reward_model, {}).faults


def _finished(tmp_path: Path) -> tuple[Store, dict[str, Any]]:
    policy = tiny_policy(tmp_path / "policy", tied=False)
    root = finish(Store(str(tmp_path / "run")), policy, None, "full").root
    return root, root.read_json("arms/human/config.json")


def test_a_configuration_of_another_version_is_refused_by_its_field(tmp_path: Path) -> None:
    root, config = _finished(tmp_path)
    config["align"]["forgotten"] = 1
    root.write("arms/human/config.json", json.dumps(config).encode())
    with pytest.raises(ExportError, match=r"(?s)arms/human/config\.json.*align\.forgotten.*run"):
        export(root.uri, None, str(tmp_path / "to"))


def test_an_annotator_of_another_version_is_not_exported(tmp_path: Path) -> None:
    root, _ = _finished(tmp_path)
    stages = root.read_json("arms/human/stages.json")
    key = key_of(EARLIER, "fit", {"seed": 0}, {"prepare": "89ab"})
    keys = {role: stage["key"] for role, stage in stages.items()} | {"prepare": "89ab", "fit": key}
    stages = {role: {"stage": role, "key": each} for role, each in keys.items()}
    root.write("arms/human/stages.json", json.dumps(stages).encode())
    made = {"stage": "fit", "key": key, "settings": {"seed": 0}}
    root.child("fit", key).create_json(MANIFEST, made | {"inputs": {"prepare": "prepare/89ab"}})
    with pytest.raises(ExportError, match="another version of cwpo_dist fitted this annotator"):
        export(root.uri, None, str(tmp_path / "to"), annotator="fit")
    assert Store(str(tmp_path / "to")).names() == []
