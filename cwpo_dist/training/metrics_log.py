"""Log records of a training in; the line that one watches, and `metrics.jsonl`, out.

Each checkpoint's records are a file of their own, written before the checkpoint is committed: a
restart loses none, and may log a step twice. At the end they become one file, each step once.

Metrics:
    step, total_steps: optimizer steps that are done, and that there are.
    epoch: passes over the data that are done.
    loss: Σ weight·loss over the global batch, divided by its pairs or its weights; of `sft` the
        mean over answer tokens, in nats; of several heads their sum.
    grad_norm: the norm of the whole gradient, before it is clipped.
    learning_rate: of the step.
    accuracy: of `fit`, the share of pairs in which the human's choice has the higher score.
    margin: of `fit`, the mean score of the human's choice less that of the other.
    disagreement: of `fit` with several heads, the mean standard deviation of their margins.
    rewards/chosen, rewards/rejected: the mean implicit reward, β·log π/π_ref, unweighted.
    rewards/accuracies: the share of pairs whose chosen answer has the higher implicit reward.
    rewards/margins: the mean difference of both rewards.
    logps/chosen, logps/rejected: the mean log-prob of a whole answer, in nats.
    kl: the mean of log π_ref(y) − log π(y) over both answers, in nats an answer. It would be
        KL(π_ref‖π) if the reference had written the answers: how far training has gone.
    weight: the mean weight of the batch's pairs.
    flipped: of `re_dpo`, the share of wrong labels that the losses took, from the steps before.
    eval_*: the same of held-out pairs, every `eval_steps` steps, but for `weight` and `flipped`.
    pairs_per_step: the mean size of a global batch since the last record.
    pairs_per_second, tokens_per_second: pairs and useful tokens of all ranks, since then.
    padding: the share of tokens that are padding.
    useful_flops_per_second: of all ranks, without padding and recomputation.
    mfu: its share of the GPUs' peak, where that is known.
    time/data, time/forward, time/backward, time/communication, time/optimizer: seconds a step.
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
