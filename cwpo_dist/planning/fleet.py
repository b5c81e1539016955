"""A stage output's cost and what is known of the devices in; devices, seconds and bytes out.

Where `costs.py` asks this machine, this asks the cluster: how many devices work at a stage, how
long they take at a rate that was measured on one of them, and what the stage leaves in storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import pyarrow as pa

from cwpo_dist.canonical import parquet_bytes
from cwpo_dist.config import Config, ConfigError, PoolConfig, TrainingConfig
from cwpo_dist.manifest import Manifest
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.packing import packed
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.records import LOG_PROB_SCHEMA, SCORE_SCHEMA
from cwpo_dist.placement import gpus, uses_gpu
from cwpo_dist.planning.costs import START_S, AnswerLengths, Estimate, named
from cwpo_dist.runs.sizes import ModelSize
from cwpo_dist.runs.stage import Generating, Scoring, Training, Work
from cwpo_dist.storage import MANIFEST, Store

ANSWERS = 2  # of a pair
ROWS = 4096  # of the made-up tables whose size tells that of a row
TOKEN_BYTES = 4
HEAD_BYTES = 4  # of an answer's scores: what one of several heads gave it
CHECKPOINT_BYTES = 12  # a trained parameter: its fp32 value and AdamW's two moments
SHARD_S = (15.0, 600.0)  # shorter shards cost the driver, longer ones are lost with a device


@dataclass(frozen=True)
class Fleet:
    """What is known of the devices, by their kind as `devices` names it; "": of all others.

    Attributes:
        prices: of an hour of one, in any currency.
        rates: pairs a second that one annotates, of two answers each: as people measure it.
    """

    prices: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def known(
        cls, prices: Sequence[str] = (), rates: Sequence[str] = (), trial: str | None = None
    ) -> Fleet:
        """From what the user says; a rate counts more than a trial.

        Args:
            prices: each a number, or KIND=NUMBER.
            rates: likewise.
            trial: a run directory that tells the rate of all devices.

        Raises:
            ConfigError: for a price or rate that is none, or a trial that has none.
        """
        told = _by_kind(rates, "--pairs-per-second")
        if not all(told.values()):
            raise ConfigError("--pairs-per-second: 0; give a rate above 0")
        if not told and trial is not None:
            told = {"": trial_rate(trial)}
        return cls(_by_kind(prices, "--price"), told)


def _by_kind(texts: Sequence[str], option: str) -> dict[str, float]:
    found = {}
    for text in texts:
        kind, _, number = text.rpartition("=")
        try:
            found[kind] = float(number)
        except ValueError:
            found[kind] = math.nan
        if not 0 <= found[kind] < math.inf:
            raise ConfigError(
                f"{option}: {text!r}; give a number of 0 or more, or one for a kind of device, "
                "such as H100=4.50"
            )
    return found


def _of(kind: str, known: Mapping[str, float], option: str) -> float:
    """What is known of a kind of device.

    Raises:
        ConfigError: when other kinds are named, and this one is not.
    """
    if kind not in known and "" not in known:
        raise ConfigError(f"{option}: none for {kind}, which takes part; add {option} {kind}=…")
    return known.get(kind, known.get("", 0.0))


def trial_rate(run: str) -> float:
    """Pairs a second that one device annotated in an earlier run, its idle time counted.

    Args:
        run: a run directory in which `annotate` has ended, of a sample of the same pairs, say.

    Raises:
        ConfigError: where no manifest there holds a measured rate.
    """
    store = Store(run).child("annotate")
    names = [name for name in store.names() if name.endswith(f"/{MANIFEST}")]
    throughputs = [Manifest.read(store, name).counts.get("throughput", {}) for name in names]
    rates = [throughput.get("device_hours_per_million_answers") for throughput in throughputs]
    measured = [rate for rate in rates if rate]
    if not measured:
        raise ConfigError(
            f"--trial: {run!r} holds no finished `annotate` that scored an answer; run `cwpo "
            "annotate` on a sample there first (prepare.sources.0.limit), or give "
            "--pairs-per-second"
        )
    return 1e6 / (3600.0 * float(min(measured))) / ANSWERS


def devices(work: Work, estimate: Estimate) -> dict[str, float]:
    """How many devices of each kind work at a stage side by side; none: it asks for none.

    A kind is a pool's accelerator_type, else GPU, or CPU where it has no GPU.
    """
    match work:
        case Scoring() if work.by.workers is not None:
            return _training_devices(work.by.workers, estimate)
        case Scoring():
            return _pool_devices(work.by.section)
        case Generating():
            return _pool_devices(work.pool)
        case Training():
            return _training_devices(work.training, estimate)
        case _:
            return {}


def _pool_devices(config: PoolConfig) -> dict[str, float]:
    """As `annotate` counts device-hours when it runs."""
    found: dict[str, float] = {}
    for pool in config.actor_pools():
        kind = (pool.accelerator_type or "GPU") if pool.gpus_per_actor else "CPU"
        number = pool.max_actors * (pool.gpus_per_actor or pool.cpus_per_actor)
        found[kind] = found.get(kind, 0.0) + number
    return found


def _training_devices(training: TrainingConfig, estimate: Estimate) -> dict[str, float]:
    on_gpu = uses_gpu(training, gpus(estimate.checked.machines))
    each = 1.0 if on_gpu else training.cpus_per_worker
    return {"GPU" if on_gpu else "CPU": training.max_workers * each}


def seconds(work: Work, estimate: Estimate, fleet: Fleet) -> float | None:
    """About how long annotating takes at the measured rates; None where none was measured.

    Rates are of pairs and answers are what is scored: two of them are taken as a pair.
    """
    if not (isinstance(work, Scoring) and work.leaves == "scores" and fleet.rates):
        return None
    new = work.answers * _each(work, estimate).fits / ANSWERS
    numbers = devices(work, estimate)
    rate = sum(n * _of(kind, fleet.rates, "--pairs-per-second") for kind, n in numbers.items())
    return START_S["score"] + new / rate


def stored(work: Work, estimate: Estimate) -> int:
    """About how many bytes the stage leaves behind, rejects apart."""
    match work.leaves:
        case "pairs":
            return round(work.rows * _pair_bytes(estimate.counted.sample))
        case "scores":
            heads = work.heads if isinstance(work, Scoring) and work.heads > 1 else 0
            each = _row_bytes(SCORE_SCHEMA) + HEAD_BYTES * heads
            return round(work.rows * _each(work, estimate).fits * each)
        case "log_probs":
            return round(work.rows * _each(work, estimate).fits * _row_bytes(LOG_PROB_SCHEMA))
        case "tokens":
            # A prompt stands in the rows of all of its answers, and is compressed to one.
            return round(_each(work, estimate).tokens(work.prompts, work.rows) * TOKEN_BYTES)
    if isinstance(work, Training):
        return (2 if gpus(estimate.checked.machines) else 4) * _size(work, estimate).parameters
    return 0


def checkpoints(work: Work, estimate: Estimate) -> int:
    """About how many bytes of checkpoints lie beside a training until it is done."""
    if not isinstance(work, Training):
        return 0
    # One more than are kept: the next is whole before the oldest goes.
    number = work.training.save_total_limit + 1
    return number * CHECKPOINT_BYTES * _size(work, estimate).of(work.training).parameters


def _each(work: Work, estimate: Estimate) -> AnswerLengths:
    return estimate.lengths[named(work.model)].each


def _size(work: Work, estimate: Estimate) -> ModelSize:
    return estimate.checked.sizes[named(work.model)]


def _pair_bytes(sample: tuple[ParsedPair, ...]) -> float:
    """Of one pair in Parquet, by writing the sampled ones."""
    if not sample:
        return 0.0
    rows = [
        {
            "pair_id": identity,
            "prompt": packed(pair.prompt),
            "a": packed(pair.first),
            "b": packed(pair.second),
        }
        for identity, pair in zip(_ids(len(sample)), sample, strict=True)
    ]
    return _bytes(pa.Table.from_pylist(rows)) / len(rows)


def _row_bytes(schema: pa.Schema) -> float:
    """Of a row of ids and numbers in Parquet, by writing made-up ones."""
    draw = Random(0)
    columns = {field.name: _made_up(field, draw) for field in schema}
    return _bytes(pa.table(columns, schema=schema)) / ROWS


def _made_up(field: pa.Field, draw: Random) -> list[str] | list[int] | list[float]:
    """Numbers as they are drawn, ids, or one name in all rows."""
    if pa.types.is_integer(field.type):
        most = 2**63 if field.type == pa.int64() else 300  # a hash, or how many tokens
        return [draw.randrange(most) for _ in range(ROWS)]
    if pa.types.is_floating(field.type):
        return [draw.gauss(0, 3) for _ in range(ROWS)]
    return _ids(ROWS) if field.name.endswith("_id") else [field.name] * ROWS


def _bytes(table: pa.Table) -> int:
    return len(parquet_bytes(table))


def _ids(number: int) -> list[str]:
    draw = Random(1)
    return [f"{draw.getrandbits(128):032x}" for _ in range(number)]


def fleet_notes(config: Config, counted: Census, fleet: Fleet) -> Iterator[str]:
    """Where a shard is far from a minute's work of a device, or unlike devices are taken as one.

    A shard has so many pairs, and as much work as answers: less where one stands in several pairs.
    """
    if not fleet.rates:
        return
    kinds = list(_pool_devices(config.annotate))
    if len(kinds) > 1 and not fleet.rates.keys() & set(kinds):
        each = " ".join(f"--pairs-per-second {kind}=…" for kind in kinds)
        yield f"annotate.pools: {' and '.join(kinds)} are counted at one rate; better: {each}"
    rows = config.prepare.rows_per_shard
    pairs = sum(counted.splits.values())
    work = sum(counted.answers.values()) / (ANSWERS * pairs) if pairs else 1.0
    for rate in dict.fromkeys(_of(kind, fleet.rates, "--pairs-per-second") for kind in kinds):
        took = rows * work / rate
        if not SHARD_S[0] <= took <= SHARD_S[1]:
            why = "a load on a large fleet's driver" if took < SHARD_S[0] else "lost with a device"
            yield (
                f"prepare.rows_per_shard: {rows:,} pairs are {took:,.1f} s of a device, {why}; "
                f"{max(1, round(60 * rate / work)):,} would be a minute"
            )


def hours_lines(
    stages: Sequence[tuple[str, Mapping[str, float] | None]], fleet: Fleet
) -> Iterator[str]:
    """Device-hours by stage, by kind of device and in all, and their money where it is known.

    Args:
        stages: each output's stage and its hours by kind; None: not known.
        fleet: tells the prices.
    """
    by_stage: dict[str, list[float]] = {}
    by_kind: dict[str, float] = {}
    for name, hours in stages:
        if hours is not None:
            by_stage.setdefault(name, []).append(sum(hours.values()))
            by_kind |= {kind: by_kind.get(kind, 0.0) + number for kind, number in hours.items()}
    if by_stage:
        yield _hours_told(by_stage, by_kind) + _money(by_kind, fleet.prices)
    unknown = dict.fromkeys(name for name, hours in stages if hours is None)
    if unknown:
        names = ", ".join(unknown)
        yield f"device-hours of {names} are not known here: plan where their devices are"


def _hours_told(by_stage: Mapping[str, list[float]], by_kind: Mapping[str, float]) -> str:
    each = ", ".join(
        f"{name} {sum(found):,.3g}" + (f" ({len(found)} outputs)" if len(found) > 1 else "")
        for name, found in by_stage.items()
    )
    kinds = ", ".join(f"{kind} {hours:,.3g}" for kind, hours in by_kind.items())
    all_kinds = f" ({kinds})" if len(by_kind) > 1 else ""
    return f"device-hours: {each}; in all {sum(by_kind.values()):,.3g}{all_kinds}"


def _money(hours: Mapping[str, float], prices: Mapping[str, float]) -> str:
    if not prices:
        return ""
    total = sum(number * _of(kind, prices, "--price") for kind, number in hours.items())
    told = ", ".join(f"{kind} {price:g}".strip() for kind, price in prices.items())
    return f", {total:,.2f} at {told} an hour"


def storage_line(stored: Sequence[tuple[str, int]], checkpoints: int) -> str:
    """Bytes by stage and in all, and what a training needs besides until it is done."""
    each = ", ".join(f"{name} {_bytes_told(number)}" for name, number in stored if number)
    line = f"storage: about {_bytes_told(sum(number for _, number in stored))}: {each}"
    if checkpoints:
        line += f"; up to {_bytes_told(checkpoints)} of checkpoints beside each training"
    return line


def _bytes_told(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
