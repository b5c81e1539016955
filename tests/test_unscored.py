"""Pairs that no annotator scores: which arms keep none of theirs, told before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_run import small_config
from test_judged import lay
from world import World

from cwpo_dist.config import ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs.trials import section
from cwpo_dist.runs.weighing_checks import weighing_faults, weighing_notes
from cwpo_dist.stages import weigh


def kept(world: World, arm: str) -> set[str]:
    """The pairs that `weigh` writes where `annotate` scored what it was told to."""
    for node in world.graphs[arm].values():
        if node.stage == "annotate" and not world.context.place(node).names("scores"):
            lay(world, node, lambda text: float("high" in text))
    weigh.make(world.context, world.node("weigh", arm))
    store = world.place("weigh", arm)
    table = pa.concat_tables([store.read_table(name) for name in store.names("preferences")])
    return set(table["pair_id"].to_pylist())


@pytest.mark.parametrize("splits", [["test"], ["unlabelled"], ["labelled", "test"], None])
def test_arms_that_keep_no_pair_are_refused_and_no_others(
    tmp_path: Path, splits: list[str] | None
) -> None:
    arms = ["weak", "cw", "semi", "human", "human100", "labelled_only", "soft"]
    world = World(tmp_path, arms, annotate={"splits": splits})
    for arm in arms:
        config = world.config.model_copy(update={"arms": list(dict.fromkeys([arm, "semi"]))})
        faults, left = list(weighing_faults(config)), kept(world, arm)
        assert bool(faults) == (not left), (arm, faults, left)
        for fault in faults:
            assert fault.startswith(
                f"annotate.splits: {splits} lacks 'unlabelled', where arm {arm}".replace(
                    arm, repr(arm)
                )
            )
            assert "add it" in fault
        told = [note for note in weighing_notes(config) if f"arm {arm!r}" in note]
        assert bool(told) == (
            splits is not None
            and left == {f"labelled-{k}" for k in range(3)}
            and arm != "labelled_only"
        )


def test_a_weak_policy_scores_what_it_is_told_to(tmp_path: Path) -> None:
    faults = weighing_faults(World(tmp_path, ["ws_dpo"], annotate={"splits": ["test"]}).config)
    assert [fault.partition(":")[0] for fault in faults] == ["annotate.splits"]


def test_who_reads_no_score_or_another_one_needs_none(tmp_path: Path) -> None:
    told: dict[str, Any] = {"annotate": {"splits": ["test"]}}
    assert not list(weighing_faults(World(tmp_path, ["human", "human100"], **told).config))
    assert not list(weighing_faults(World(tmp_path, ["human_cleaned"], **told).config))
    both = World(tmp_path, ["cw"], weigh={"from": "both"}, **told).config
    assert not list(weighing_faults(both)), "the data's own scores are enough"


def test_plan_refuses_it_and_asks_for_the_split(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"arms": ["weak", "cw"], "annotate__splits": ["test"]}
    with pytest.raises(ConfigError, match=r"^annotate\.splits: \['test'\] lacks 'unlabelled'"):
        plan(parse_config(small_config(tmp_path, **changes)))


def test_an_annotator_with_nothing_to_score_is_refused(tmp_path: Path) -> None:
    """All pairs are in the labelled part, of which one of ours leaves the answers out."""
    given = small_config(tmp_path, prepare__labelled_fraction=1.0, prepare__test_fraction=0.0)
    del given["policy"]
    with pytest.raises(ConfigError, match=r"^annotate\.splits: no answer is in unlabelled or val"):
        plan(parse_config(given))
    assert plan(parse_config(given | {"annotate": {"splits": ["labelled"]}})).stages


@pytest.mark.parametrize("strategy", ["uncertain", "random", "information"])
def test_what_is_asked_for_by_scores_needs_them(tmp_path: Path, strategy: str) -> None:
    """`random` reads none, and `information` makes its own."""
    asks = {"ask": [{"strategy": strategy, "budgets": [5]}]}
    given = small_config(tmp_path, compare=asks, annotate__splits=["test"])
    if strategy != "uncertain":
        section(parse_config(given))
        return
    with pytest.raises(ConfigError, match=r"annotate\.splits: .* lacks 'unlabelled'.*uncertain"):
        section(parse_config(given))
