"""Rows and numbers of a data set in; weighted losses, their denominator and metrics out.

The three objectives of the one training loop. A task knows nothing of ranks or micro-batches: the
loop sums its losses wherever they were computed, and divides once by the denominator of the global
batch.

Shapes: P = rows (pairs) of a micro-batch or of a global batch, K = answers a row (chosen first).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cwpo_dist.lm.rows import Row
from cwpo_dist.objectives import LOSSES, bradley_terry

Indices = Sequence[int]
Normalization = Literal["none", "batch", "dataset"]


class TaskError(ValueError):
    """A data set that cannot be trained on; the message names what is wrong and the remedy."""


@dataclass(frozen=True)
class Task(ABC):
    """An objective over a data set that every worker holds in memory.

    Attributes:
        rows: tokens; the chosen answer first.
        pair_ids: the name of each row, for messages.
    """

    rows: Sequence[Row]
    pair_ids: Sequence[str]

    def __post_init__(self) -> None:
        """Checks that every row can be trained on."""
        if not self.rows:
            raise TaskError("no pairs to train on: check the splits and max_length of the config")
        if len(self.rows) != len(self.pair_ids):
            raise TaskError(f"{len(self.rows)} rows have {len(self.pair_ids)} pair ids")
        for row, pair in zip(self.rows, self.pair_ids, strict=True):
            if len(row.answers) != self.n_answers:
                raise TaskError(
                    f"pair {pair}: {len(row.answers)} answers, the objective takes {self.n_answers}"
                )

    @property
    def n_answers(self) -> int:
        """K, the answers of a row."""
        return 2

    @abstractmethod
    def losses(self, outputs_PK: Tensor, indices: Indices) -> Tensor:
        """The loss of each row times its weight, [P]; their sum is divided by `denominator`.

        Args:
            outputs_PK: the module's output for these rows: scores, or log-probs in nats.
            indices: which rows of the data set they are.
        """

    def denominator(self, indices: Indices) -> float:
        """What the summed loss of one global batch is divided by."""
        return float(len(indices))

    @abstractmethod
    def metrics(self, outputs_PK: Tensor, indices: Indices) -> dict[str, float]:
        """Numbers of one global batch for the log, beside its loss."""


@dataclass(frozen=True)
class BradleyTerry(Task):
    """−log σ(s⁺ − s⁻) of an annotator's scores, mean over pairs (paper eq. 5)."""

    def losses(self, outputs_PK: Tensor, indices: Indices) -> Tensor:
        """[P]."""
        return bradley_terry(outputs_PK[:, 0], outputs_PK[:, 1])

    def metrics(self, outputs_PK: Tensor, indices: Indices) -> dict[str, float]:
        """Accuracy and mean margin."""
        margins_P = outputs_PK[:, 0] - outputs_PK[:, 1]
        return {"accuracy": _share(margins_P > 0), "margin": float(margins_P.mean())}


@dataclass(frozen=True)
class Sft(Task):
    """−log π(y|x), mean over the answer tokens of the global batch."""

    @property
    def n_answers(self) -> int:
        """One: the chosen answer."""
        return 1

    def losses(self, outputs_PK: Tensor, indices: Indices) -> Tensor:
        """[P], each summed over its tokens."""
        return -outputs_PK[:, 0]

    def denominator(self, indices: Indices) -> float:
        """Answer tokens of the global batch."""
        return float(sum(len(self.rows[i].answers[0]) for i in indices))

    def metrics(self, outputs_PK: Tensor, indices: Indices) -> dict[str, float]:
        """None beside the loss."""
        return {}


@dataclass(frozen=True)
class Preference(Task):
    """C·ℓ of log-probs against a frozen reference (paper eq. 7–11).

    Attributes:
        weights: C of each pair, not negative.
        references: [N, 2] log-probs of chosen and rejected under the reference, in nats.
        loss_type: key of `objectives.LOSSES`.
        beta: β.
        label_smoothing: ε of the robust loss.
        normalization: the denominator of Σ C·ℓ over a global batch: 'none', its pairs (the
            paper); 'batch', its ΣC; 'dataset', its pairs × the data set's mean C.
    """

    weights: Sequence[float]
    references: Sequence[tuple[float, float]]
    loss_type: str
    beta: float
    label_smoothing: float = 0.0
    normalization: Normalization = "none"

    def __post_init__(self) -> None:
        """Checks numbers and their count, too."""
        super().__post_init__()
        if not len(self.rows) == len(self.weights) == len(self.references):
            raise TaskError(
                f"{len(self.rows)} pairs have {len(self.weights)} weights and "
                f"{len(self.references)} reference log-probs: run `reference` and `weigh` again"
            )
        for name in ("weights", "references"):
            finite_N = torch.isfinite(torch.tensor(getattr(self, name))).reshape(len(self.rows), -1)
            bad = torch.nonzero(~finite_N.all(dim=1)).flatten().tolist()
            if bad:
                pairs = ", ".join(self.pair_ids[i] for i in bad[:5])
                raise TaskError(f"{name}: not finite for {len(bad)} pairs ({pairs}); drop them")
        if min(self.weights) < 0 or max(self.weights) == 0:
            raise TaskError(
                f"weights: from {min(self.weights)} to {max(self.weights)}; they must not be "
                "negative and not all zero (all ties?)"
            )

    @cached_property
    def mean_weight(self) -> float:
        """The data set's mean C."""
        return sum(self.weights) / len(self.weights)

    def losses(self, outputs_PK: Tensor, indices: Indices) -> Tensor:
        """[P], each times its weight."""
        references_PK = self._references(outputs_PK, indices)
        loss_P = LOSSES[self.loss_type](
            outputs_PK[:, 0],
            outputs_PK[:, 1],
            references_PK[:, 0],
            references_PK[:, 1],
            self.beta,
            self.label_smoothing,
        )
        return self._weights(outputs_PK, indices) * loss_P

    def denominator(self, indices: Indices) -> float:
        """By `normalization`; 1 for a batch of ties alone, whose sum is 0 too."""
        if self.normalization == "batch":
            return sum(self.weights[i] for i in indices) or 1.0
        if self.normalization == "dataset":
            return len(indices) * self.mean_weight
        return float(len(indices))

    def metrics(self, outputs_PK: Tensor, indices: Indices) -> dict[str, float]:
        """TRL's names: implicit rewards β·log π/π_ref, unweighted, and the mean weight."""
        reward_PK = self.beta * (outputs_PK - self._references(outputs_PK, indices))
        margins_P = reward_PK[:, 0] - reward_PK[:, 1]
        return {
            "rewards/chosen": float(reward_PK[:, 0].mean()),
            "rewards/rejected": float(reward_PK[:, 1].mean()),
            "rewards/accuracies": _share(margins_P > 0),
            "rewards/margins": float(margins_P.mean()),
            "logps/chosen": float(outputs_PK[:, 0].mean()),
            "logps/rejected": float(outputs_PK[:, 1].mean()),
            "weight": float(self._weights(outputs_PK, indices).mean()),
        }

    def _references(self, like: Tensor, indices: Indices) -> Tensor:
        return like.new_tensor([self.references[i] for i in indices])

    def _weights(self, like: Tensor, indices: Indices) -> Tensor:
        return like.new_tensor([self.weights[i] for i in indices])


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
