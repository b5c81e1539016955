"""`cwpo plan` for a cluster: device-hours, money, time and storage, against numbers by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_run import small_config
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.canonical import parquet_bytes
from cwpo_dist.config import Config, ConfigError, Pool
from cwpo_dist.config.load import parse_config
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.records import SCORE_SCHEMA
from cwpo_dist.planning.costs import START_S, AnswerLengths, Estimate, Lengths
from cwpo_dist.planning.fleet import Fleet, fleet_notes, hours_lines, seconds, trial_rate
from cwpo_dist.planning.plan import Plan, StagePlan, plan
from cwpo_dist.planning.plan_table import print_plan
from cwpo_dist.runs.checks import Checked
from cwpo_dist.runs.scored_by import Scorers
from cwpo_dist.runs.stage import Scoring
from cwpo_dist.storage import Store

DEVICES = 2.0
EMPTY = Census({}, {}, 0, True, ())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Pairs that a ready reward model scores, on eight quarters of a CPU, and nothing else."""
    folder = tmp_path_factory.mktemp("fleet")
    given: dict[str, Any] = small_config(folder)
    given = {name: given[name] for name in ("output_dir", "simulated_labels", "prepare")}
    tiny_classifier("llama").save_pretrained(folder / "reward")
    tiny_tokenizer().save_pretrained(folder / "reward")
    pools = [{"num_actors": 4}, {"num_actors": [0, 4]}]
    given["annotate"] = {
        "model": {"model_name_or_path": str(folder / "reward"), "max_length": 400},
        "pools": [pool | {"cpus_per_actor": 0.25} for pool in pools],
    }
    return parse_config(given)


@pytest.fixture(scope="module")
def planned(config: Config) -> Plan:
    return plan(config, fleet=Fleet({"": 100.0}, {"": 0.5}))


def stage(planned: Plan, name: str) -> StagePlan:
    (found,) = [each for each in planned.stages if each.stage == name]
    return found


def test_a_measured_rate_gives_time_and_device_hours(planned: Plan) -> None:
    found = stage(planned, "annotate")
    answers = int(found.work.split()[0])
    assert 96 < answers <= 2 * 96
    seconds = START_S["score"] + answers / 2 / (0.5 * DEVICES)
    assert found.seconds == pytest.approx(seconds, rel=0.02)  # a few pairs may be too long
    assert found.device_hours == pytest.approx({"CPU": seconds * DEVICES / 3600}, rel=0.02)
    assert stage(planned, "prepare").device_hours == {}


def test_scores_take_as_much_as_was_said(planned: Plan) -> None:
    answers = int(stage(planned, "annotate").work.split()[0])
    ids = [
        f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}" for number in range(answers)
    ]
    scores = [number**0.5 for number in range(answers)]
    hashes = [int(name, 16) % 2**63 for name in ids]
    table = pa.table([ids, ["reward"] * answers, scores, hashes], schema=SCORE_SCHEMA)
    rows = len(parquet_bytes(table)) - len(parquet_bytes(table.slice(0, 0)))
    assert stage(planned, "annotate").stored == pytest.approx(rows, rel=0.4)


def test_the_terminal_says_hours_money_and_storage(
    planned: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(planned)
    shown = capsys.readouterr().out
    (hours,) = (stage(planned, "annotate").device_hours or {}).values()
    assert f"device-hours: annotate {hours:.3g}; in all {hours:.3g}" in shown
    assert f"{100 * hours:.2f} at 100 an hour" in shown
    assert "storage: about" in shown


def test_hours_that_are_not_known_are_not_counted_as_none() -> None:
    hours = [("annotate", {"CPU": 2.0}), ("align", None), ("align", None)]
    known, unknown = hours_lines(hours, Fleet({"": 3.0}))
    assert known == "device-hours: annotate 2; in all 2, 6.00 at 3 an hour"
    assert unknown.startswith("device-hours of align are not known here")


def test_arms_are_added_up_and_each_kind_of_device_has_its_price() -> None:
    hours = [
        ("annotate", {"L4": 2.0, "CPU": 8.0}),
        ("align", {"GPU": 3.0}),
        ("align", {"GPU": 3.0}),
    ]
    (line,) = hours_lines(hours, Fleet({"L4": 0.5, "CPU": 0.25, "": 4.0}))
    assert line == (
        "device-hours: annotate 10, align 6 (2 outputs); in all 16 (L4 2, CPU 8, GPU 6), "
        "27.00 at L4 0.5, CPU 0.25, 4 an hour"
    )
    with pytest.raises(ConfigError, match=r"--price: none for CPU, .*add --price CPU="):
        list(hours_lines(hours, Fleet({"L4": 0.5})))


def test_unlike_pools_annotate_each_at_its_own_rate(config: Config) -> None:
    pools = [Pool(num_actors=2, gpus_per_actor=0.5, accelerator_type="L4"), Pool(num_actors=3)]
    annotate = config.annotate.model_copy(update={"pools": pools})
    mixed = config.model_copy(update={"annotate": annotate})
    rated = Fleet(rates={"L4": 4.0, "CPU": 1.0})
    by = Scorers(annotate, config.fit)
    work = Scoring("", 2000, "scores", "annotate.model", by=by, answers=1400)
    lengths = {"annotate.model": Lengths(0.5, 10.0, 6.0, 8.0, AnswerLengths(0.75, 2.0, 4.0))}
    estimate = Estimate(mixed, EMPTY, Checked({}, (), {}), lengths)
    took = seconds(work, estimate, rated)
    pairs = 0.75 * 1400 / 2
    assert took == pytest.approx(START_S["score"] + pairs / (1 * 4.0 + 3 * 1.0))
    (note,) = fleet_notes(mixed, EMPTY, Fleet(rates={"": 1.0 * mixed.prepare.rows_per_shard / 60}))
    assert note.startswith("annotate.pools: L4 and CPU are counted at one rate; better: --pairs-")


@pytest.mark.parametrize(("rate", "said"), [(1.0, 0), (1000.0, 1), (0.01, 1)])
def test_shards_should_be_about_a_minute(config: Config, rate: float, said: int) -> None:
    given = config.model_copy(
        update={"prepare": config.prepare.model_copy(update={"rows_per_shard": 60})}
    )
    notes = list(fleet_notes(given, EMPTY, Fleet(rates={"": rate})))
    assert len(notes) == said
    assert all(f"{max(1, round(60 * rate)):,} would be a minute" in note for note in notes)


def test_a_shard_of_few_answers_is_done_sooner(config: Config) -> None:
    """600 pairs of 200 answers are the work of 100 pairs that share none."""
    counted = replace(EMPTY, splits={"test": 600}, answers={"test": 200})
    given = config.model_copy(
        update={"prepare": config.prepare.model_copy(update={"rows_per_shard": 60})}
    )
    (note,) = fleet_notes(given, counted, Fleet(rates={"": 1.0}))
    assert "60 pairs are 10.0 s of a device" in note
    assert "; 360 would be a minute" in note
    assert not list(fleet_notes(given, counted, Fleet(rates={"": 1 / 6})))


def test_a_trial_gives_the_rate_of_one_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--trial: .* holds no finished `annotate`"):
        trial_rate(str(tmp_path))
    throughput = {"device_hours_per_million_answers": 1e6 / 3600 / 14.0}
    manifest = {"counts": {"rows": 10, "throughput": throughput}}
    Store(str(tmp_path)).create_json("annotate/key/manifest.json", manifest)
    assert trial_rate(str(tmp_path)) == pytest.approx(7.0)
    assert Fleet.known(trial=str(tmp_path)).rates == {"": pytest.approx(7.0)}
    assert Fleet.known(rates=["3", "L4=2"], trial=str(tmp_path)).rates == {"": 3.0, "L4": 2.0}
    assert Fleet.known(["CPU=0.05"]).prices == {"CPU": 0.05}


@pytest.mark.parametrize(
    ("prices", "rates", "said"),
    [
        (["-1"], [], "--price: '-1'; give a number of 0 or more"),
        (["H100="], [], "--price: 'H100='"),
        ([], ["0"], "--pairs-per-second: 0; give a rate above 0"),
        ([], ["nan"], "--pairs-per-second: 'nan'"),
    ],
)
def test_no_price_and_no_rate_is_refused(prices: list[str], rates: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Fleet.known(prices, rates)
