"""Sampled answers that a model could not read, as they are too long: counted wherever figures are.

The policy answers prompts 0 and 2 shortly and prompt 1 at length, which no model here can read.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_comparison_page import sample_comparison
from test_measured import lay_answers, logp
from test_report import _terminal, sample_metrics
from world import World

from cwpo_dist.evaluation.left_out import LeftOut
from cwpo_dist.lm.templates import Fault
from cwpo_dist.pairs.answers import read_answers
from cwpo_dist.pairs.records import (
    LOG_PROB_SCHEMA,
    SCORE_SCHEMA,
    LogProb,
    Score,
    table_of,
)
from cwpo_dist.report import summary, trial_tables
from cwpo_dist.report.left_out_table import TITLE, added
from cwpo_dist.report.page import render
from cwpo_dist.report.table import print_short
from cwpo_dist.results.items import by_item
from cwpo_dist.runs import scored_by
from cwpo_dist.scoring.answers_in import read_tokens
from cwpo_dist.scoring.pipeline import ShardJob, commit
from cwpo_dist.scoring.retries import Input, ShardOutput
from cwpo_dist.scoring.set_aside import SetAside
from cwpo_dist.stages import evaluate

LONG = "z" * 90
ANSWERS = {
    "answers_base": ["aaaa", "aa", LONG],
    "answers_sft": ["zaaaaaaaa", "z", "aa"],
    "answers_aligned": ["zz", LONG, "zzzzz"],
}


def _reads_short_ones(job: ShardJob, *_: Any) -> dict[str, Any]:
    """A gold model that likes z, with no room for a long answer."""
    for index in range(job.shards):
        aside, scores = SetAside(index), []
        for place, answer in enumerate(read_answers(job.output, index)):
            text = str(answer.answer)
            if text == LONG:
                aside.add(Fault.OVER_LENGTH, Input(answer.answer_id, place, text))
            else:
                scores.append(Score(answer.answer_id, "gold", float(text.count("z")), None))
        rows = table_of(scores, SCORE_SCHEMA)
        counts = {"rows_in": len(scores) + len(aside.answers), "rows": len(scores)}
        commit(job, index, ShardOutput(rows, aside.table(), counts | aside.counts()))
    return {}


@pytest.fixture
def judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> World:
    """Evaluated by such a gold model."""
    monkeypatch.setattr(scored_by, "run_shards", _reads_short_ones)
    model = {"model_name_or_path": str(tmp_path / "model"), "chat_template": "plain"}
    world = World(tmp_path, ["human"], evaluate={"num_prompts": 3, "gold_model": model})
    lay_answers(world, ANSWERS)
    world.log_probs("reference", None, logp)
    world.log_probs("aligned", None, logp)
    with caplog.at_level(logging.WARNING, "cwpo_dist.stages.evaluate"):
        evaluate.make(world.context, world.node("evaluate"))
    return world


def test_gra_counts_the_prompts_that_it_is_not_of(
    judged: World, caplog: pytest.LogCaptureFixture
) -> None:
    """By side: of `own_sft` an answer of the policy is too long, of `common` one of each."""
    found = judged.place("evaluate").read_json("metrics.json")["gra"]
    told = {name: (of["n"], of["wins"], of["left_out"]) for name, of in found.items()}
    ours = {"over_length": 1}
    assert told == {
        "own_sft": (2, 2, {"prompts": 1, "aligned": ours, "baseline": {}}),
        "common": (1, 1, {"prompts": 2, "aligned": ours, "baseline": {"over_length": 1}}),
    }
    own, common = [record.getMessage() for record in caplog.get_records("setup")]
    assert "GRA against own_sft leaves out 1 of 3 prompts (aligned: 1 × over_length)" in own
    assert "GRA against common leaves out 2 of 3 prompts" in common
    assert "(aligned: 1 × over_length; baseline: 1 × over_length)" in common
    assert "evaluate.gold_model.max_length" in common


def test_lengths_are_of_all_answers_and_scores_of_those_that_have_some(judged: World) -> None:
    store = judged.place("evaluate")
    for told in store.read_json("metrics.json")["answers"].values():
        assert (told["n"], told["length"]) == (3, pytest.approx((2 + 90 + 5) / 3))
    rows = store.read_table(evaluate.ANSWERS).to_pylist()
    scored = [(row["against"], row["pair_id"]) for row in rows if row["gold"] is not None]
    assert scored == [("own_sft", "test-0"), ("own_sft", "test-2"), ("common", "test-0")]
    assert [row["length"] for row in rows] == [2, 90, 5] * 2
    items = dict(by_item(store))
    assert items["length"].values.tolist() == [2, 90, 5]
    assert items["gra_own_sft"].names == items["ties_own_sft"].names == ["test-0", "test-2"]
    assert items["gra_common"].names == ["test-0"]


def test_without_sft_both_baselines_are_one_model_whose_answers_gold_reads_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def run_shards(job: ShardJob, *more: Any) -> dict[str, Any]:
        read.append(job.output.uri.rsplit("/", 1)[-1])
        return _reads_short_ones(job, *more)

    monkeypatch.setattr(scored_by, "run_shards", run_shards)
    model = {"model_name_or_path": str(tmp_path / "model"), "chat_template": "plain"}
    gold = {"num_prompts": 3, "gold_model": model}
    world = World(tmp_path, ["human"], sft=None, evaluate=gold)
    lay_answers(world, {role: told for role, told in ANSWERS.items() if role != "answers_sft"})
    world.log_probs("reference", None, logp)
    world.log_probs("aligned", None, logp)
    evaluate.make(world.context, world.node("evaluate"))
    assert read == ["own_sft"]
    found = world.place("evaluate").read_json("metrics.json")
    assert found["gra"]["own_sft"] == found["gra"]["common"]
    assert (found["gra"]["common"]["n"], found["gra"]["common"]["wins"]) == (1, 1)
    assert found["answers"]["own_sft"] == found["answers"]["common"]


def _log_probs(job: ShardJob, *_: Any) -> dict[str, Any]:
    """Of all answers that have tokens; but the SFT model's of `nan` is none."""
    answers, tokens, _, _ = job.make_worker.args  # type: ignore[attr-defined]  # a partial
    for index in range(job.shards):
        aside, found, there = SetAside(index), [], read_tokens(tokens, index)
        for place, each in enumerate(read_answers(answers.store, index)):
            if each.answer_id not in there:
                continue
            if each.answer == "nan" and job.output.uri.endswith("sft"):
                aside.add("non-finite log-probability", Input(each.answer_id, place, None))
            else:
                found.append(LogProb(each.answer_id, -1.0, 3))
        counts = {"rows_in": len(there), "rows": len(found)} | aside.counts()
        rows = table_of(found, LOG_PROB_SCHEMA)
        commit(job, index, ShardOutput(rows, aside.table(), counts))
    return {}


@pytest.mark.parametrize("short", ["nan", ""])
def test_kl_counts_the_answers_that_it_is_not_of(
    short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One is longer than it was sampled; another has no log-prob by the SFT model, or is empty."""
    monkeypatch.setattr(scored_by, "run_shards", _log_probs)
    sampled = {"num_prompts": 3, "kl": True, "max_new_tokens": 60}
    sections: Any = {"policy": {"max_length": 40}, "evaluate": sampled}
    world = World(tmp_path, ["human"], **sections)
    texts = {"answers_aligned": ["zz", LONG, short], "answers_sft": ["a", "b", "c"]}
    lay_answers(world, ANSWERS | texts)
    for role in ("sft", "align"):
        shutil.copytree(tmp_path / "model", world.place(role).child("model").root)
    world.log_probs("reference", None, logp)
    world.log_probs("aligned", None, logp)
    with caplog.at_level(logging.WARNING, "cwpo_dist.stages.evaluate"):
        evaluate.make(world.context, world.node("evaluate"))
    kl = world.place("evaluate").read_json("metrics.json")["kl"]
    ours, theirs = {"over_length": 1}, {"non-finite log-probability": 1}
    if not short:
        ours, theirs = {"empty answer": 1, "over_length": 1}, {}
    left_out = {"prompts": 2, "aligned": ours, "baseline": theirs}
    assert kl == {"n": 1, "mean": 0.0, "error": None, "left_out": left_out}
    (line,) = caplog.messages
    assert "KL leaves out 2 of 3 prompts" in line
    assert "policy.max_length" in line


@pytest.mark.parametrize(
    ("over_length", "positions", "left_out"),
    [("drop", None, {}), ("truncate", None, {"over_length": 1}), ("drop", 64, {"over_length": 1})],
)
def test_kl_is_of_answers_as_long_as_they_were_sampled(
    over_length: str,
    positions: int | None,
    left_out: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind a prompt that may be `max_length` itself; what is cut may have been sampled cut."""
    monkeypatch.setattr(scored_by, "run_shards", _log_probs)
    sections: Any = {
        "policy": {"max_length": 40, "over_length": over_length},
        "evaluate": {"num_prompts": 3, "kl": True, "max_new_tokens": 90},
    }
    world = World(tmp_path, ["human"], **sections)
    lay_answers(world, ANSWERS)
    for role in ("sft", "align"):
        folder = Path(world.place(role).child("model").root)
        shutil.copytree(tmp_path / "model", folder)
        if positions is not None:
            told = json.loads((folder / "config.json").read_text())
            told |= {"max_position_embeddings": positions}
            (folder / "config.json").write_text(json.dumps(told))
    world.log_probs("reference", None, logp)
    world.log_probs("aligned", None, logp)
    evaluate.make(world.context, world.node("evaluate"))
    kl = world.place("evaluate").read_json("metrics.json")["kl"]
    assert kl["left_out"]["aligned"] == left_out
    assert kl["n"] == 3 - len(left_out)


def test_a_prompt_counts_once_and_each_of_its_answers_by_its_reason() -> None:
    found = LeftOut.of([("empty answer", None), ("over_length", None), ("empty answer", "x")])
    assert found == LeftOut(3, {"empty answer": 2, "over_length": 1}, {"x": 1})


def _lost(prompts: int, **aligned: int) -> dict[str, Any]:
    return LeftOut(prompts, aligned, {"over_length": 1} if prompts else {}).as_dict()


def _run(gra: dict[str, Any], kl: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"gra": {"own_sft": None, "common": gra}, "kl": kl}


def test_a_report_says_what_is_left_out_at_the_figure_and_below() -> None:
    metrics = sample_metrics()
    human, cw = metrics["arms"]["human"], metrics["arms"]["cw"]
    assert "left out" not in _terminal(metrics).replace("are left out", "")
    human["gra"]["common"]["left_out"] = _lost(7, over_length=6)
    cw["kl"] = {"n": 38, "mean": 1.0, "error": 0.1, "left_out": _lost(2, over_length=2)}
    arms, _, below, *_ = summary.tables(metrics)
    small = {row[0].text: row[-1].details for row in arms.rows}
    assert small.pop("human")[-1] == "7 left out"
    assert not any("left out" in detail for details in small.values() for detail in details)
    n = human["gra"]["common"]["n"]
    told = [[cell.text for cell in row] for row in below.rows]
    assert sorted(told) == [
        ["cw", "KL", "2 of 40", "2 × over_length", "1 × over_length"],
        ["human", "GRA, common", f"7 of {n + 7}", "6 × over_length", "1 × over_length"],
    ]
    for text in (_terminal(metrics), render(metrics)):
        assert TITLE in text
        assert "7 left out" in text
    console = Console(file=io.StringIO(), width=200, record=True)
    print_short(metrics, "runs/demo", console)
    ended = console.export_text()
    assert "7 left out" in ended
    assert "2 of 40" in ended


def test_a_report_of_a_run_that_did_not_count_them_is_as_it_was() -> None:
    metrics = sample_metrics()
    counted = render(metrics)
    for arm in metrics["arms"].values():
        for record in arm["gra"].values():
            assert record.pop("left_out")["prompts"] == 0
        arm["kl"] = {"n": 4, "mean": 1.0, "error": 0.1}
    assert render(metrics) == counted
    assert TITLE not in counted


def test_in_a_comparison_a_figure_of_no_prompt_is_not_one_that_was_not_run() -> None:
    found = sample_comparison("human")
    given = found["trials"]["cw"] | {"left_out": {"gra_common": _lost(4) | {"of": 4}}}
    found["trials"]["cw"] = given
    (table,) = [table for table in trial_tables.tables(found) if table.title == "Trials"]
    gra = table.columns.index("GRA, common")
    told = {row[0].text: (row[gra].text, row[gra].details) for row in table.rows}
    assert told["cw"] == ("of no prompt", ("4 left out",))
    assert told["human"] == ("not run", ())


def test_what_seeds_leave_out_is_added_up() -> None:
    one = _run({"n": 5, "left_out": _lost(3, over_length=2)}, {"n": 8, "left_out": _lost(0)})
    other = _run({"n": 7, "left_out": _lost(1, empty=1)}, {"n": 8})
    assert added([one, other]) == {
        "gra_common": {
            **{"prompts": 4, "of": 16, "aligned": {"over_length": 2, "empty": 1}},
            "baseline": {"over_length": 2},
        },
        "kl": {"prompts": 0, "of": 8, "aligned": {}, "baseline": {}},
    }
