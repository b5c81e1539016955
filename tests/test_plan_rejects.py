"""Rows that are set aside: `plan` refuses as many of them as `prepare` does, of the same rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.graph import prepare_node
from cwpo_dist.pairs.estimate import census
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs.own_checks import own_counts_faults
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import MANIFEST, Store

Rows = list[dict[str, Any]]
FOUR = ["yes", "no", "maybe", "well"]


def given(folder: Path, *sources: tuple[str | None, Rows], **prepare: Any) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    named = []
    for k, (into, rows) in enumerate(sources):
        path = folder / f"{k}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        named.append({"path": str(path), "into": into})
    told = {"sources": named, "num_cpus": 0.5, "test_fraction": 0.1} | prepare
    return parse_config({"output_dir": str(folder / "run"), "prepare": told})


def lists(count: int, responses: list[str], name: str = "p", **more: Any) -> Rows:
    return [{"prompt": f"{name}{k}", "responses": responses} | more for k in range(count)]


def singles(count: int, name: str = "p", chosen: str = "yes") -> Rows:
    return [{"prompt": f"{name}{k}", "chosen": chosen, "rejected": "no"} for k in range(count)]


def plan_refuses(config: Config) -> str | None:
    try:
        plan(config)
    except ConfigError as error:
        return str(error)
    return None


def prepare_refuses(config: Config) -> str | None:
    place = Store(config.output_dir).child(*prepare_node(config).path.split("/"))
    try:
        counts = prepare(place, config.prepare, config.seed)
    except (ConfigError, RejectsError) as error:
        return str(error)
    place.create_json(MANIFEST, {"counts": counts})
    return None


@pytest.mark.usefixtures("in_process")
def test_a_list_that_makes_many_pairs_is_one_of_the_rows(tmp_path: Path) -> None:
    """Ten of a hundred rows, though their pairs would be 550."""
    config = given(tmp_path, (None, lists(90, FOUR) + lists(10, ["yes"], "q")), pairing="all")
    planned, prepared = plan_refuses(config), prepare_refuses(config)
    assert planned is not None
    assert prepared is not None
    why = "prepare: 10 of 100 rows (10.0%) were set aside, more than prepare.max_reject_fraction=0"
    assert planned.startswith(why)
    assert planned.splitlines()[:-1] == prepared.splitlines()[:-1], "one rule, and one sentence"


@pytest.mark.usefixtures("in_process")
def test_lists_without_pairs_are_no_run(tmp_path: Path) -> None:
    tied = lists(9, ["yes", "no"], scores=[1, 1])
    config = given(tmp_path, (None, tied), pairing="all")
    told = [plan_refuses(config), prepare_refuses(config)]
    assert all(each is not None and "no pair is left" in each for each in told), told


@pytest.mark.usefixtures("in_process")
def test_what_prepare_let_pass_is_not_asked_again(tmp_path: Path) -> None:
    """The share is in no key: where `prepare` is done nothing holds the rows against it."""
    wide = given(tmp_path, (None, [*singles(18), *singles(2, "q", "")]), max_reject_fraction=0.2)

    def told(**changes: Any) -> Config:
        return wide.model_copy(update={"prepare": wide.prepare.model_copy(update=changes)})

    assert plan_refuses(told(max_reject_fraction=0.05)) is not None
    assert prepare_refuses(wide) is None
    assert plan_refuses(told(max_reject_fraction=0.05)) is None
    assert plan_refuses(told(max_reject_fraction=0.05, labelled_fraction=0.5)) is not None


def test_own_numbers_are_a_share_of_the_rows_that_weigh_counts(tmp_path: Path) -> None:
    """Five bad weights in twenty rows, of which ten are lists of six pairs each."""
    weighed = [row | {"weight": -1.0 if k < 5 else 1.0} for k, row in enumerate(singles(10, "s"))]
    config = given(tmp_path, (None, weighed), (None, lists(10, FOUR)), pairing="all")
    own = config.model_copy(update={"arms": ["own"]})
    counted = census(own.prepare, own.seed)
    assert counted.rows_in == 20
    for most, refused in ((0.2, True), (0.25, False)):
        prepare = own.prepare.model_copy(update={"max_reject_fraction": most})
        faults = own_counts_faults(own.model_copy(update={"prepare": prepare}), counted)
        assert any(each.startswith("weigh: of 20 rows") for each in faults) == refused


@pytest.mark.usefixtures("in_process")
def test_plan_and_prepare_agree(tmp_path: Path) -> None:
    seen: Counter[bool] = Counter()
    for seed in range(24):
        draw = random.Random(seed)
        bad, twice = draw.choice([0, 1, 4]), draw.choice([0, 0, 3, 12])
        sources: list[tuple[str | None, Rows]] = [
            (None, [*lists(draw.choice([8, 30]), FOUR), *lists(bad, ["yes"], "q")]),
            (None, [*singles(20, "s"), *singles(draw.choice([0, 1, 5]), "t", "")]),
            ("test", singles(20 + twice, draw.choice(["s", "u"]))),
        ]
        kept = [each for each in sources if each[1] and ("responses" in each[1][0]) == (seed % 2)]
        config = given(
            tmp_path / str(seed), *(kept or sources[1:]), pairing="all" if seed % 2 else "given",
            max_reject_fraction=draw.choice([0.02, 0.1, 0.3]),
        )  # fmt: skip
        planned, prepared = plan_refuses(config), prepare_refuses(config)
        assert (planned is None) == (prepared is None), (seed, planned, prepared)
        seen[planned is None] += 1
    assert min(seen[True], seen[False]) >= 5, seen
