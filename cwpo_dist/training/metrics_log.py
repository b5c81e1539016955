"""Log records of a training in; the line that one watches, and `metrics.jsonl`, out.

Each checkpoint's records are a file of their own, written before the checkpoint is committed: a
restart loses none, and may log a step twice. At the end they become one file, each step once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from cwpo_dist.storage import Store

PARTS, FILE = "metrics", "metrics.jsonl"
BAR = 20  # characters


def write_part(store: Store, step: int, records: Sequence[Mapping[str, float]]) -> None:
    """The records up to a checkpoint's step; those of an earlier attempt at it stay."""
    store.create(f"{PARTS}/{step:06d}.jsonl", _lines(records))


def join(store: Store) -> dict[str, float]:
    """Writes `metrics.jsonl` from the parts of all attempts, each step once; its last record."""
    records: dict[float, dict[str, float]] = {}
    for name in store.names(PARTS):
        for line in store.read(name).decode().splitlines():
            numbers = json.loads(line)
            records.setdefault(numbers["step"], numbers)
    ordered = [records[step] for step in sorted(records)]
    store.write(FILE, _lines(ordered))
    return ordered[-1] if ordered else {}


def _lines(records: Sequence[Mapping[str, float]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def say(line: str) -> None:
    """Ray brings a rank's standard output to the driver's."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def progress(numbers: Mapping[str, float]) -> str:
    """A bar and the numbers that one watches."""
    done, total = numbers["step"], numbers["total_steps"]
    seconds = int((total - done) * numbers["pairs_per_step"] / numbers["pairs_per_second"])
    left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    shown = {
        "loss": f"{numbers['loss']:.4f}",
        "accuracy": _percent(numbers, "rewards/accuracies", "accuracy"),
        "held out": _percent(numbers, "eval_rewards/accuracies", "eval_accuracy"),
        "grad": f"{numbers['grad_norm']:.3g}",
        "lr": f"{numbers['learning_rate']:.2e}",
    }
    said = "  ".join(f"{name} {value}" for name, value in shown.items() if value)
    full = int(BAR * done // total)
    return (
        f"[{'=' * full}{' ' * (BAR - full)}] step {done}/{total}  {said}  "
        f"{numbers['tokens_per_second']:,.0f} tokens/s  {left} left"
    )


def _percent(numbers: Mapping[str, float], *names: str) -> str:
    """The first of these that the record has, as a percentage."""
    return next((f"{numbers[name]:.0%}" for name in names if name in numbers), "")
