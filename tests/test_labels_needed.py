"""Settings that read people's labels of a split: refused where it has none, with what helps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_run import small_config

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.pairs import estimate
from cwpo_dist.pairs.estimate import census
from cwpo_dist.planning.label_faults import ask_faults, label_faults
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs.held_out_pairs import HeldOutPairs
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import TaskError

NEEDS: dict[str, dict[str, Any]] = {
    "weigh.temperature: fitted (arm 'cw')": {"weigh": {"temperature": "fitted"}},
    "fit.eval_steps: 5": {"fit__eval_steps": 5},
    "sft.eval_steps: 5": {"sft__eval_steps": 5},
    "align.eval_steps: 5": {"align__eval_steps": 5},
    "fit.eval_steps: 5 (arm 'ws_dpo')": {"fit__eval_steps": 5, "arms": ["ws_dpo"]},
    "compare.learning_rates: [0.001, 0.002]": {"compare": {"learning_rates": [1e-3, 2e-3]}},
}


def rows(folder: Path, name: str, labelled: bool) -> str:
    path = folder / f"{name}.jsonl"
    made = [
        {"prompt": f"{name} {k}?", "response_a": "yes", "response_b": "no"}
        | ({"label": "ab"[k % 2]} if labelled else {})
        for k in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def given(folder: Path, sources: list[tuple[str, str | None, bool]], **changes: Any) -> Config:
    """A run over sources: the name, `into`, and whether it has labels."""
    config = small_config(folder, **changes)
    named = [
        {"path": rows(folder, name, labelled), "into": into} for name, into, labelled in sources
    ]
    prepare = {"sources": named, "validation_fraction": 0.3, "test_fraction": 0.3, "num_cpus": 0.5}
    return parse_config(config | {"prepare": prepare})


POOL: list[tuple[str, str | None, bool]] = [("people", "labelled", True), ("pool", None, False)]


def faults(config: Config) -> list[str]:
    return list(label_faults(config, census(config.prepare, config.seed), None))


@pytest.mark.parametrize("setting", NEEDS)
def test_what_needs_labels_is_refused_where_the_split_has_pairs_alone(
    tmp_path: Path, setting: str
) -> None:
    (fault,) = faults(given(tmp_path, POOL, **NEEDS[setting]))
    assert fault.startswith(f"{setting}: no pair of split 'validation' has a human label to ")
    assert "; give a source of labelled pairs with into: validation, or " in fault
    assert "raise" not in fault, "no larger share of the pool has a label"
    people = [*POOL, ("held", "validation", True)]
    assert faults(given(tmp_path, people, **NEEDS[setting])) == []


def test_a_share_is_raised_only_where_that_draws_labels(tmp_path: Path) -> None:
    told = {"align__eval_steps": 5}
    whole = given(tmp_path, [("all", None, True)], **told)
    assert faults(whole) == []
    few = whole.model_copy(
        update={"prepare": whole.prepare.model_copy(update={"validation_fraction": 1e-9})}
    )
    (fault,) = faults(few)
    assert "; raise prepare.validation_fraction, or give a source of labelled pairs" in fault
    (fault,) = faults(given(tmp_path, [("none", None, False)], **told))
    assert "no pair has a label: name their column" in fault
    assert faults(given(tmp_path, POOL)) == [], "nothing needs them"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("held", [None, "validation"])
def test_what_plan_says_is_what_a_training_finds(tmp_path: Path, held: str | None) -> None:
    sources = [*POOL, *([("held", held, True)] if held else [])]
    config = given(tmp_path, sources, align__eval_steps=5)
    store = Store(tmp_path / "out")
    shards = prepare(store, config.prepare, config.seed)["shards"]
    pairs = HeldOutPairs(store, shards, "validation", 8)
    if held:
        assert pairs.labels
        assert faults(config) == []
        return
    assert faults(config)
    with pytest.raises(TaskError, match="labelled pairs with into: validation"):
        _ = pairs.labels


def test_a_source_that_was_not_reached_is_not_held_against_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time ends in the first source; what the others hold is not known."""
    sources = [*POOL, ("held", "validation", True), ("tests", "test", True)]
    config = given(tmp_path, sources, align__eval_steps=5)
    clock = iter([0.0] * 20)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: next(clock, 99.0)))
    counted = census(config.prepare, config.seed)
    assert not counted.exact
    assert not counted.begun
    assert not counted.pairs("test")
    assert not counted.lacks("test")
    assert list(label_faults(config, counted, None)) == []


def test_plan_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(given(tmp_path, POOL, fit__eval_steps=5, weigh={"temperature": "fitted"}))
    told = str(refused.value).splitlines()
    assert [line.split(":")[0] for line in told] == ["fit.eval_steps", "weigh.temperature"]


def test_asking_needs_labels_that_are_hidden(tmp_path: Path) -> None:
    asks = {"ask": [{"strategy": "random", "budgets": [5]}]}
    config = given(tmp_path, POOL, compare=asks)
    (fault,) = ask_faults(config, census(config.prepare, config.seed))
    assert fault.startswith("compare.ask: the sources have no label beside those of the labelled")
    hidden = given(tmp_path, [("all", None, True)], compare=asks)
    assert list(ask_faults(hidden, census(hidden.prepare, hidden.seed))) == []
    with pytest.raises(ConfigError, match=r"^compare\.ask: the sources have no label"):
        plan(config)
