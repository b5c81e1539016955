"""What plan asks of a column of βs: numbers above 0 in the pairs that `align` reads, no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import small_config

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.pairs.estimate import census
from cwpo_dist.planning import plan_faults
from cwpo_dist.planning.plan import plan

Row = dict[str, Any]
TRAINED: dict[str | None, dict[str, Any]] = {
    "train": {"phi": 1.5},
    "validation": {},
    "test": {"phi": None},
}


def pair(name: str, k: int, **more: Any) -> Row:
    row = {"prompt": f"{name} {k}?", "response_a": "yes", "response_b": "no", "label": "ab"[k % 2]}
    return row | more


def given(folder: Path, sources: dict[str | None, list[Row]], **changes: Any) -> Config:
    """A run with a column of βs over sources, by their `into`."""
    config = small_config(folder, **{"arms": ["human", "weak"], **changes})
    named = []
    for into, rows in sources.items():
        path = folder / f"{into}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        named.append({"path": str(path), "into": into})
    config["prepare"] = {
        "sources": named,
        "keep_columns": ["phi"],
        "pairing": config["prepare"].get("pairing", "given"),
        "num_cpus": 0.5,
    }
    config["align"]["beta_column"] = "phi"
    return parse_config(config)


def faults(config: Config) -> list[str]:
    return list(plan_faults._beta_faults(config, census(config.prepare, config.seed)))


def sources(**other: dict[str, Any]) -> dict[str | None, list[Row]]:
    told: dict[str | None, dict[str, Any]] = {**TRAINED, **other}
    return {into: [pair(str(into), k, **more) for k in range(30)] for into, more in told.items()}


def test_held_out_pairs_are_not_trained_on(tmp_path: Path) -> None:
    every: dict[str, Any] = {"arms": ["human100"]}
    assert faults(given(tmp_path, sources(), **every)) == []
    config = given(tmp_path, sources(), align__eval_steps=5, **every)
    (fault,) = faults(config)
    assert "'phi' is None in a pair, and no number above 0 in 30 of 60" in fault
    assert faults(given(tmp_path, sources(validation={"phi": 1.0}), align__eval_steps=5)) == []
    (fault,) = faults(given(tmp_path, sources(train={"phi": -1}), **every))
    assert "'phi' is -1 in a pair, and no number above 0 in 30 of 30" in fault


def test_an_arm_of_people_reads_no_pair_without_a_label(tmp_path: Path) -> None:
    pool = sources()
    pool["train"] += [pair("pool", k, label=None) for k in range(9)]
    assert faults(given(tmp_path, pool, arms=["human", "human100"])) == []
    assert faults(given(tmp_path, pool, arms=["human", "weak"])) != []
    labelled = {**pool, "labelled": [pair("people", k) for k in range(9)]}
    pool["train"] = pool["train"][:30]
    assert faults(given(tmp_path, labelled | pool, arms=["weak"])) == [], "it trains on the rest"
    assert faults(given(tmp_path, labelled | pool, arms=["labelled_only"])) != []


def test_copies_stand_where_all_of_them_do(tmp_path: Path) -> None:
    """Of a prompt in two splits the test part keeps all pairs."""
    both = sources()
    both["train"] += [row | {"phi": None} for row in both["test"]]
    config = given(tmp_path, both)
    counted = census(config.prepare, config.seed)
    assert counted.pairs("test") == 30
    assert faults(config) == []


def test_a_pair_of_two_rows_has_what_both_say(tmp_path: Path) -> None:
    """Of two responses in rows of their own a pair keeps what is the same in both."""
    rows = [
        {"prompt": f"{k}?", "response": text, "score": score, "phi": phi}
        for k in range(12)
        for text, score, phi in (("yes", 2, 1.0), ("no", 1, 1.0 if k else 2.0))
    ]
    config = given(tmp_path, {None: rows}, prepare={"pairing": "all"}, arms=["human100"])
    (fault,) = faults(config)
    assert "'phi' is None in a pair, and no number above 0 in 1 of" in fault


def test_plan_lets_held_out_rows_be(tmp_path: Path) -> None:
    assert plan(given(tmp_path, sources())).stages
    with pytest.raises(ConfigError, match=r"^align\.beta_column: 'phi' is None"):
        plan(given(tmp_path, sources(train={})))
