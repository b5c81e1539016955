"""People's labels, judged by annotators that did not learn from them: folds, direction, keys."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import world as worlds
from prepared import said
from small_run import small_config
from world import HIGHER, OTHER, SHARDS, World, answer, margin, named

from cwpo_dist.config import ARMS, Config
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution.run import run
from cwpo_dist.graph import graph, nodes_until
from cwpo_dist.pairs.estimate import census
from cwpo_dist.pairs.records import SCORE_SCHEMA, answer_id, prompt_id
from cwpo_dist.pairs.splits import Fold
from cwpo_dist.pairs.stored import Pair, write_pairs
from cwpo_dist.planning.plan import plan
from cwpo_dist.planning.plan_notes import graphs
from cwpo_dist.report.summary import weights_table
from cwpo_dist.runs.output_key import Node, annotators
from cwpo_dist.runs.weighing_checks import weighing_faults
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import annotate, fit, sft, weigh
from cwpo_dist.storage import MANIFEST, Store
from cwpo_dist.training.train_rank import TrainSpec
from cwpo_dist.weighting import madpo

JUDGED = ["human_weighed", "human_cleaned"]
Scorer = Callable[[str], float]  # of an answer, by its text


def folds_of(world: World, stage: str, arm: str | None = None) -> list[Node]:
    """The nodes of a stage that belong to folds, those of a seed side by side."""
    nodes = world.graphs[arm or world.config.arms[0]].values()
    return [node for node in nodes if node.stage == stage and node.settings.fold is not None]


def lay(world: World, node: Node, score: Scorer, lost: Container[str] = ()) -> set[str]:
    """Writes what `annotate` would, of the answers that it reads but those that are lost; these."""
    read = set()
    for index in range(len(SHARDS)):
        given = annotate._answers(world.context, node).read(index)
        rows = [row for row in given if row.name not in lost]
        found = [(row.name, "world", score(said(row.given.answer)), None) for row in rows]
        found.sort(key=itemgetter(0))
        columns = dict(zip(SCORE_SCHEMA.names, zip(*found, strict=True), strict=False))
        table = pa.table(columns, schema=SCORE_SCHEMA) if found else SCORE_SCHEMA.empty_table()
        world.context.place(node).create_table(part("scores", index), table)
        read |= {row.name for row in rows}
    return read


def weighed(world: World, arm: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    counts = dict(weigh.make(world.context, world.node("weigh", arm)))
    store = world.place("weigh", arm)
    table = pa.concat_tables([store.read_table(name) for name in store.names("preferences")])
    return counts, {row["pair_id"]: row for row in table.to_pylist()}


def learned(world: World, node: Node, patch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    """What a `fit` trains on: by pair id the answers, people's choice first."""
    specs: list[TrainSpec] = []
    patch.setattr(fit, "train", lambda spec: specs.append(spec) or {})
    fit.make(world.context, node)
    return world.handed_on(specs[0].make_task(world.encoder))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


class Crowd(World):
    """Sixty labelled pairs of thirty prompts; of twelve the label is turned round."""

    def _prepared(self, node: Node) -> None:
        store = self.context.place(node)
        self.pairs = []
        for k in range(60):
            prompt = f"prompt {k // 2}: "
            good, bad = f"good {k}", f"bad {k}"
            a, b = (good, bad) if k % 3 else (bad, good)
            right = "a" if k % 3 else "b"
            label: Any = OTHER[right] if k % 5 == 0 else right
            self.pairs.append(
                Pair(f"{prompt_id(prompt)}-{k:02d}", prompt, a, b, label=label, split="labelled")
            )
        self.pairs.sort()
        write_pairs(store, 0, self.pairs[:30])
        write_pairs(store, 1, self.pairs[30:])
        counts: dict[str, Any] = {"shards": 2, "pairs": 60, "kind": "text", "message_keys": []}
        store.create_json(MANIFEST, {"counts": counts})

    @property
    def turned(self) -> set[str]:
        return {pair.pair_id for pair in self.pairs if said(pair.chosen).startswith("bad")}


def memory(trained_on: dict[str, tuple[str, ...]]) -> Scorer:
    """An annotator that knows its training pairs by heart, and of others which answer is good."""
    known = {pair[k]: sign for pair in trained_on.values() for k, sign in enumerate((3.0, -3.0))}
    return lambda text: known.get(text, 2.0 if text.startswith("good") else -2.0)


def test_a_label_that_was_learned_by_heart_is_judged_by_who_never_saw_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would call right whatever it was taught; together they find the labels turned round."""
    world = Crowd(tmp_path, JUDGED, fit={"folds": 4})
    every = {pair.pair_id for pair in world.pairs}
    judged: list[set[str]] = []
    for judge, taught in zip(folds_of(world, "annotate"), folds_of(world, "fit"), strict=True):
        assert judge.inputs["fit"] == taught
        fold = judge.settings.fold
        assert fold is not None
        trained_on = learned(world, taught, monkeypatch)
        seen = lay(world, judge, memory(trained_on))
        judged.append({pair_id for pair_id in every if pair_id in fold})
        assert trained_on.keys() == every - judged[-1]
        assert {name[:18] for name in seen} == {pair_id[:18] for pair_id in judged[-1]}
    assert sum(map(len, judged)) == len(set().union(*judged)) == 60
    assert all(judged), "so that each judges some"
    _, rows = weighed(world)
    assert rows.keys() == every
    for pair_id, row in rows.items():
        assert row["weight"] == pytest.approx(sigmoid(-4 if pair_id in world.turned else 4))
    counts, rows = weighed(world, "human_cleaned")
    assert rows.keys() == every - world.turned
    assert (counts["dropped"], counts["denied"], counts["unjudged"]) == (12, 12, 0)
    assert {row["weight"] for row in rows.values()} == {1.0}

    of_all = nodes_until(world.config, "cw", "fit")["fit"]
    score = memory(learned(world, of_all, monkeypatch))
    for pair in world.pairs:  # who learned from all agrees with all
        assert score(said(pair.chosen)) > score(said(pair.rejected))


def higher(text: str) -> float:
    """The score of an answer of the world, with margin(k) × 10 between two."""
    return 0.25 if "high" in text else 0.25 - 10 * margin(int(text.split()[3]))


@pytest.mark.parametrize("turned", [False, True])
def test_a_label_that_the_annotator_denies_loses_its_weight_or_its_pair(
    turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = "".join(OTHER[label] for label in worlds.LABELS) if turned else worlds.LABELS
    monkeypatch.setattr(worlds, "LABELS", labels)
    world = World(tmp_path, [*JUDGED, "human_madpo"], fit={"folds": 3})
    for node in folds_of(world, "annotate"):
        lay(world, node, higher)
    agrees = {f"labelled-{k}" for k in range(3) if labels[k] == HIGHER[k]}
    assert agrees == ({"labelled-0", "labelled-1"} if turned else {"labelled-2"})
    counts, rows = weighed(world)
    assert (counts["denied"], counts["dropped"]) == (3 - len(agrees), 0)
    for k in range(3):
        row, sign = rows[f"labelled-{k}"], 1 if f"labelled-{k}" in agrees else -1
        assert (row["chosen"], row["label"]) == (answer("labelled", k, labels[k]), labels[k])
        assert row["margin"] == pytest.approx(sign * 10 * margin(k))
        assert row["probability"] == pytest.approx(sigmoid(sign * 10 * margin(k)))
        assert row["weight"] == pytest.approx(row["probability"], abs=1e-6)
        assert row["confidence"] == pytest.approx(max(0.0, math.tanh(sign * 5 * margin(k))))
    _, by_madpo = weighed(world, "human_madpo")
    for name, row in by_madpo.items():
        beside = rows[name] | {"weight": pytest.approx(madpo(rows[name]["margin"]))}
        assert row == beside, "the same chosen answer and margin"
    counts, rows = weighed(world, "human_cleaned")
    assert rows.keys() == agrees
    assert counts["dropped"] == 3 - len(agrees)
    for k, row in ((int(name[-1]), row) for name, row in rows.items()):
        assert (row["chosen"], row["weight"]) == (answer("labelled", k, labels[k]), 1.0)


def test_most_of_several_annotators_deny(tmp_path: Path) -> None:
    """Two of three against one; one against two, however sure; a tie of votes; no score."""
    world = World(tmp_path, ["human_cleaned"], fit={"folds": 2, "seeds": [0, 1, 2]})
    margins = {0: (-1.0, -1.0, 9.0), 1: (1.0, 1.0, -9.0), 2: (0.0, -1.0, 1.0)}  # of the label
    told = folds_of(world, "annotate")
    together = annotators(world.node("weigh"))
    assert [len(of_seed) for of_seed in together] == [2, 2, 2]
    for of_seed in together:
        assert {node.settings.fold for node in of_seed} == {n.settings.fold for n in told}
    for node in told:
        seed = node.inputs["fit"].settings.identity()["seed"]
        assert isinstance(seed, int)

        def score(text: str, of: int = seed) -> float:
            return margins[int(text.split()[3])][of] if text.startswith("won") else 0.0

        lay(world, node, score)
    counts, rows = weighed(world)
    assert rows.keys() == {"labelled-1", "labelled-2"}
    assert (counts["dropped"], counts["pairs"]) == (1, 2)
    assert counts["ensemble"]["annotators"] == 3


def test_what_nobody_could_score_is_left_out_and_counted(tmp_path: Path) -> None:
    world = World(tmp_path, JUDGED, fit={"folds": 2})
    lost = {named("labelled", 0, "a"), named("labelled", 0, "b")}
    for node in folds_of(world, "annotate"):
        lay(world, node, higher, lost)
    for arm, left in (("human_weighed", {1, 2}), ("human_cleaned", {2})):
        counts, rows = weighed(world, arm)
        assert rows.keys() == {f"labelled-{k}" for k in left}
        assert (counts["unjudged"], counts["denied"]) == (1, 1)


@pytest.mark.parametrize("hidden", ["turned", "removed"])
def test_hidden_labels_are_read_by_neither(
    hidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = worlds.pairs

    def others(split: str) -> list[dict[str, Any]]:
        rows = given(split)
        for row in rows if split == "unlabelled" else []:
            row["label"] = OTHER[row["label"]] if hidden == "turned" else None
        return rows

    found = []
    for pairs in (given, others):
        monkeypatch.setattr(worlds, "pairs", pairs)
        world = World(tmp_path / pairs.__name__, JUDGED, fit={"folds": 2})
        for node in folds_of(world, "annotate"):
            lay(world, node, higher)
        found.append([weighed(world, arm) for arm in JUDGED])
    assert found[0] == found[1]


def test_sft_learns_from_what_weigh_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, JUDGED, fit={"folds": 2})
    world.tokenise()
    for node in folds_of(world, "annotate"):
        lay(world, node, higher)
    for arm, kept in (("human_weighed", {0, 1, 2}), ("human_cleaned", {2})):
        specs: list[TrainSpec] = []
        monkeypatch.setattr(sft, "train", lambda spec, to=specs: to.append(spec) or {})
        sft.make(world.context, world.node("sft", arm))
        assert world.handed_on(specs[0].make_task(world.encoder)) == {
            f"labelled-{k}": (answer("labelled", k, worlds.LABELS[k]),) for k in kept
        }


def test_a_ready_model_needs_no_folds(tmp_path: Path) -> None:
    ready = {"model_name_or_path": str(tmp_path / "model"), "chat_template": "plain"}
    world = World(tmp_path, [*JUDGED, "cw"], annotate={"model": ready})
    made = world.graphs["human_weighed"]
    assert "fit" not in {node.stage for node in made.values()}
    assert made["annotate"].key == world.node("annotate", "cw").key
    assert "labelled" in (annotate._answers(world.context, made["annotate"]).splits or ())
    splits = {"model": ready, "splits": ["unlabelled", "test"]}
    (fault,) = weighing_faults(World(tmp_path / "x", JUDGED, annotate=splits).config)
    assert fault.startswith("annotate.splits: lacks 'labelled', whose labels arm 'human_weighed'")


def test_folds_share_out_prompts_and_another_seed_does_it_anew() -> None:
    ids = [answer_id(prompt_id(f"prompt {k}"), "yes") for k in range(3000)]
    parts = [{i for i in ids if i in Fold(0, 5, k)} for k in range(5)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 3000
    assert all(abs(len(each) - 600) < 100 for each in parts)
    other = {i for i in ids if i in Fold(1, 5, 0)}
    assert abs(len(other & parts[0]) - 120) < 50


def test_folds_are_in_the_keys_of_those_that_they_judge_for_alone(tmp_path: Path) -> None:
    """Of every other arm all outputs keep their keys, whatever stands beside it."""
    config = World(tmp_path, ["cw"], fit={"seeds": [0, 1]}).config
    fit_7 = config.fit.model_copy(update={"folds": 7})
    beside = config.model_copy(update={"arms": ["cw", *JUDGED], "fit": fit_7})
    for arm, preset in ARMS.items():
        before = graph(config.model_copy(update={"arms": ["cw", arm]}), arm)
        after = graph(beside, arm)
        if preset.judged is None:
            assert {r: n.key for r, n in before.items()} == {r: n.key for r, n in after.items()}
            assert not any("fold" in node.settings.identity() for node in after.values())
            continue
        fits = [{n.key for n in made.values() if n.stage == "fit"} for made in (before, after)]
        assert [len(keys) for keys in fits] == [10, 14]
        assert not fits[0] & fits[1]
        assert before["prepare"].key == after["prepare"].key


@pytest.mark.parametrize("policy", [True, False])
def test_plan_lists_what_a_run_makes(policy: bool, tmp_path: Path) -> None:
    config: Config = World(tmp_path, ["human_weighed", "cw", "human_cleaned"]).config
    until = None
    if not policy:
        config, until = config.model_copy(update={"policy": None}), "annotate"
    planned = {node.path for nodes in graphs(config).values() for node in nodes.values()}
    made = {node.path for arm in config.arms for node in nodes_until(config, arm, until).values()}
    assert planned == made
    assert sum(path.startswith("fit/") for path in made) == 1 + config.fit.folds


def test_the_report_counts_what_was_denied_and_dropped() -> None:
    counts = {"pairs": 8, "selected": 8, "denied": 2, "dropped": 2, "unjudged": 1}
    arms = {"human_cleaned": {"weigh": counts}, "cw": {"weigh": {"pairs": 20, "selected": 20}}}
    table = weights_table({"arms": arms})
    told = {row[0].text: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    names = ("denied", "dropped", "unjudged")
    assert [told["human_cleaned"][name].text for name in names] == ["2", "2", "1"]
    assert all(told["cw"][name].missing for name in names)
    assert not set(names) & set(weights_table({"arms": {"cw": arms["cw"]}}).columns)


def small(folder: Path) -> Config:
    changes: dict[str, Any] = {"arms": JUDGED, "fit__folds": 2, "sft": None}
    return parse_config(small_config(folder, **changes))


def test_plan_counts_a_training_and_a_pass_for_each_fold(tmp_path: Path) -> None:
    config = small(tmp_path)
    pairs = census(config.prepare, config.seed).pairs("labelled")
    stages = {stage.stage: stage for stage in plan(config).stages}
    for k in range(2):
        assert stages[f"fit (fit_{k})"].arms == tuple(JUDGED)
        assert stages[f"fit (fit_{k})"].work.startswith(f"{round(pairs / 2)} pairs, ")
        assert stages[f"annotate (annotate_{k})"].work.startswith(f"{pairs} answers to ")


@pytest.mark.long
@pytest.mark.usefixtures("ray_local")
def test_a_run_to_its_end(tmp_path: Path) -> None:
    """Two folds on tiny models; nothing is made that `plan` did not list."""
    config = small(tmp_path)
    planned = Counter(stage.stage.split()[0] for stage in plan(config).stages)
    run(config)
    store = Store(config.output_dir)
    made = (name.split("/")[0] for name in store.names() if name.endswith(f"/{MANIFEST}"))
    assert Counter(made) == planned
    assert all(stage.done for stage in plan(config).stages)
    metrics = store.read_json("metrics.json")["arms"]
    weighed, cleaned = (metrics[arm]["weigh"] for arm in JUDGED)
    pairs = census(config.prepare, config.seed).pairs("labelled")
    assert weighed["pairs"] + weighed["unjudged"] == pairs
    assert cleaned["pairs"] + cleaned["dropped"] + cleaned["unjudged"] == pairs
    assert cleaned["dropped"] == cleaned["denied"] == weighed["denied"]
    assert 0 < weighed["mean_weight"] < 1 == cleaned["mean_weight"]
    assert "Unjudged: pairs" in store.read("report.html").decode()
