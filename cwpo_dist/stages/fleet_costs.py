"""A stage output's cost and what is known of the devices in; devices, seconds and bytes out.

Where `costs.py` asks this machine, this asks the cluster: how many devices work at a stage, how
long they take at a rate that was measured on one of them, and what the stage leaves in storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import pyarrow as pa

from cwpo_dist.config import Config, ConfigError, PoolConfig, TrainingConfig
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.records import REFERENCE_SCHEMA, SCORE_SCHEMA
from cwpo_dist.stages.costs import START_S, Cost, Estimate, gpus
from cwpo_dist.stages.graph import Node, ready_model
from cwpo_dist.storage import MANIFEST, Store, parquet_bytes

ROWS = 4096  # of the made-up tables whose size tells that of a row
TOKEN_BYTES = 4
CHECKPOINT_BYTES = 12  # a trained parameter: its fp32 value and AdamW's two moments
SHARD_S = (15.0, 600.0)  # shorter shards cost the driver, longer ones are lost with a device


@dataclass(frozen=True)
class Fleet:
    """What is known of the devices.

    Attributes:
        price: of an hour of one, in any currency; None: not said.
        pairs_per_second: that one annotates; None: not measured.
    """

    price: float | None = None
    pairs_per_second: float | None = None

    @classmethod
    def known(cls, price: float | None, pairs_per_second: float | None, trial: str | None) -> Fleet:
        """From what the user says; a rate counts more than a trial.

        Raises:
            ConfigError: for a price or rate that is none, or a trial that has none.
        """
        if pairs_per_second is None and trial is not None:
            pairs_per_second = trial_rate(trial)
        if price is not None and price < 0:
            raise ConfigError(f"--price: {price}; give a price of 0 or more")
        if pairs_per_second is not None and pairs_per_second <= 0:
            raise ConfigError(f"--pairs-per-second: {pairs_per_second}; give a rate above 0")
        return cls(price, pairs_per_second)


def trial_rate(run: str) -> float:
    """Pairs a second that one device annotated in an earlier run, its idle time counted.

    Args:
        run: a run directory in which `annotate` has ended, of a sample of the same pairs, say.

    Raises:
        ConfigError: where no manifest there holds a measured rate.
    """
    store = Store(run).child("annotate")
    names = store.names() if store.filesystem.exists(store.root) else []
    manifests = [store.read_json(name) for name in names if name.endswith(f"/{MANIFEST}")]
    measured = [
        manifest["counts"]["throughput"]["device_hours_per_million_pairs"]
        for manifest in manifests
        if manifest["counts"].get("throughput", {}).get("device_hours_per_million_pairs")
    ]
    if not measured:
        raise ConfigError(
            f"--trial: {run!r} holds no finished `annotate` that scored a pair; run `cwpo "
            "annotate` on a sample there first (prepare.sources.0.limit), or give "
            "--pairs-per-second"
        )
    return 1e6 / (3600.0 * float(min(measured)))


def devices(config: Config, node: Node, estimate: Estimate) -> float:
    """GPUs that work at a stage side by side, or CPUs where it has none; 0: it asks for none."""
    trainings = {"fit": config.fit, "sft": config.sft, "align": config.align}
    pools = {
        "annotate": config.annotate,
        "reference": config.reference,
        "generate": config.evaluate,
    }
    if node.stage in pools:
        return _pool_devices(pools[node.stage])
    training = trainings.get(node.stage)
    return 0.0 if training is None else _training_devices(training, estimate)


def _pool_devices(config: PoolConfig) -> float:
    """As `annotate` counts device-hours when it runs."""
    pools = config.actor_pools()
    return sum(pool.max_actors * (pool.gpus_per_actor or pool.cpus_per_actor) for pool in pools)


def _training_devices(training: TrainingConfig, estimate: Estimate) -> float:
    on_gpu = training.use_gpu is not False and gpus(estimate.checked.machines) > 0
    return training.max_workers * (1.0 if on_gpu else training.cpus_per_worker)


def seconds(
    config: Config, node: Node, estimate: Estimate, cost: Cost, fleet: Fleet
) -> float | None:
    """About how long the stage takes at the measured rate; None where none was measured."""
    if node.stage != "annotate" or fleet.pairs_per_second is None:
        return None
    new = cost.tokens / max(estimate.lengths[_annotator(config, node)].shared, 1.0)
    rate = fleet.pairs_per_second * _pool_devices(config.annotate)
    return START_S["score"] + new / rate


def _annotator(config: Config, node: Node) -> str:
    """The field that names the model."""
    return "weak" if "fit" in node.inputs else ready_model(config, node)[0]


def stored(config: Config, node: Node, estimate: Estimate) -> int:
    """About how many bytes the stage leaves behind, rejects apart."""
    pairs = sum(estimate.counted.splits.values())
    text, row = _pair_bytes(estimate.counted.sample), _row_bytes()
    if node.stage == "prepare":
        return round(pairs * text)
    if node.stage == "annotate":
        scored = estimate.counted.pairs(*config.annotate.scored_splits())
        return round(scored * estimate.lengths[_annotator(config, node)].fits * row["annotate"])
    if node.stage == "tokens":
        return round(pairs * estimate.lengths["policy"].shared * TOKEN_BYTES)
    if node.stage == "reference":
        return round(estimate.counted.pairs(*node.settings["splits"]) * row["reference"])
    if node.stage == "weigh":
        return round(estimate.counted.pairs(*node.settings["splits"]) * text)
    return _model_bytes(config, node, estimate)


def _model_bytes(config: Config, node: Node, estimate: Estimate) -> int:
    """The trained model, and the checkpoints that are kept beside it."""
    training = {"fit": config.fit, "sft": config.sft, "align": config.align}.get(node.stage)
    if training is None:
        return 0
    size = estimate.checked.sizes["weak" if node.stage == "fit" else "policy"]
    number = 2 if gpus(estimate.checked.machines) else 4
    kept = training.save_total_limit * CHECKPOINT_BYTES * size.trained(training)
    return number * size.parameters + kept


def _pair_bytes(sample: tuple[ParsedPair, ...]) -> float:
    """Of one pair in Parquet, by writing the sampled ones."""
    if not sample:
        return 0.0
    rows = [
        {"pair_id": identity, "prompt": pair.prompt, "a": pair.first, "b": pair.second}
        for identity, pair in zip(_ids(len(sample)), sample, strict=True)
    ]
    return _bytes(pa.Table.from_pylist(rows)) / len(rows)


def _row_bytes() -> dict[str, float]:
    """Of one score and of one pair of log-probs, by writing made-up ones."""
    draw, ids = Random(0), _ids(ROWS)
    values = [draw.gauss(0, 3) for _ in range(ROWS)]
    lengths = [draw.randrange(300) for _ in range(ROWS)]
    scores = [ids, ["annotator"] * ROWS, values, values[::-1]]
    logps = [ids, values, values[::-1], lengths, lengths[::-1]]
    made = {"annotate": (scores, SCORE_SCHEMA), "reference": (logps, REFERENCE_SCHEMA)}
    return {
        name: _bytes(pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema)) / ROWS
        for name, (columns, schema) in made.items()
    }


def _bytes(table: pa.Table) -> int:
    return len(parquet_bytes(table))


def _ids(number: int) -> list[str]:
    draw = Random(1)
    return [f"{draw.getrandbits(128):032x}" for _ in range(number)]


def shard_notes(config: Config, fleet: Fleet) -> Iterator[str]:
    """Says so where a shard is far from a minute's work of a device."""
    if fleet.pairs_per_second is None:
        return
    took = config.prepare.rows_per_shard / fleet.pairs_per_second
    if not SHARD_S[0] <= took <= SHARD_S[1]:
        why = "a load on a large fleet's driver" if took < SHARD_S[0] else "lost with a device"
        yield (
            f"prepare.rows_per_shard: {config.prepare.rows_per_shard:,} pairs are {took:,.1f} s of "
            f"a device, {why}; {max(1, round(60 * fleet.pairs_per_second)):,} would be a minute"
        )


def hours_lines(hours: Sequence[tuple[str, float | None]], price: float | None) -> Iterator[str]:
    """Device-hours by stage and in all, and their money where an hour has a price."""
    known = [(name, number) for name, number in hours if number is not None]
    if known:
        each = ", ".join(f"{name} {number:,.3g}" for name, number in known)
        total = sum(number for _, number in known)
        money = "" if price is None else f", {total * price:,.2f} at {price:g} an hour"
        yield f"device-hours: {each}; in all {total:,.3g}{money}"
    if len(known) < len(hours):
        unknown = ", ".join(name for name, number in hours if number is None)
        yield f"device-hours of {unknown} are not known here: plan where their devices are"


def storage_line(stored: Sequence[tuple[str, int]]) -> str:
    """Bytes by stage and in all."""
    each = ", ".join(f"{name} {_size(number)}" for name, number in stored if number)
    return f"storage: about {_size(sum(number for _, number in stored))}: {each}"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
