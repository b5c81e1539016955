"""Rows and numbers of a data set in; weighted losses, their denominator and metrics out.

The three objectives of the one training loop. A task knows nothing of ranks or micro-batches: the
loop sums its losses wherever they were computed, and divides once by the denominator of the global
batch.

Shapes: P = rows (pairs) of a micro-batch or of a global batch, K = answers a row (chosen first).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_dist.config import BatchBy
from cwpo_dist.lm.batches import Order, proportional, uniform
from cwpo_dist.lm.feeding import placed
from cwpo_dist.lm.rows import Row
from cwpo_dist.objectives import OBJECTIVES, LossSettings, PairLogps, bradley_terry
from cwpo_dist.pairs.records import prompt_of

Indices = Sequence[int]
Numbers = Sequence[float] | NDArray[np.floating[Any]]  # one a row, such as a view of a file
Normalization = Literal["none", "batch"]
Sampling = Literal["proportional"] | None


class TaskError(ValueError):
    """A data set that cannot be trained on; the message names what is wrong and the remedy."""


@dataclass(frozen=True)
class Task(ABC):
    """An objective over a data set: lists, or views of a file that is mapped (`token_file`).

    Attributes:
        rows: tokens; the chosen answer first. Rows of a file all have the same number of answers.
        pair_ids: the name of each row, for messages.
        left_out: how many pairs are not among them, by reason; empty where nobody counted.
        batch_by: 'prompt': pairs of a prompt, which lie side by side, stay so in every epoch.
    """

    rows: Sequence[Row]
    pair_ids: Sequence[str]
    left_out: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    batch_by: BatchBy = field(default="pair", kw_only=True)

    def __post_init__(self) -> None:
        """Checks that every row can be trained on."""
        if not self.rows:
            raise TaskError("no pairs to train on: check the splits and max_length of the config")
        if len(self.rows) != len(self.pair_ids):
            raise TaskError(f"{len(self.rows)} rows have {len(self.pair_ids)} pair ids")
        looked_at = len(self.rows) if isinstance(self.rows, list | tuple) else 1
        for row, pair in zip(self.rows[:looked_at], self.pair_ids, strict=False):
            if len(row.answers) != self.n_answers:
                raise TaskError(
                    f"pair {pair}: {len(row.answers)} answers, the objective takes {self.n_answers}"
                )

    @property
    def n_answers(self) -> int:
        """K, the answers of a row."""
        return 2

    @property
    def outputs(self) -> tuple[int, ...]:
        """The shape of a row's outputs: a number an answer."""
        return (self.n_answers,)

    @cached_property
    def order(self) -> Order:
        """Which rows an epoch goes through, and in what order."""
        return uniform(len(self.rows), self._prompts())

    def _prompts(self) -> NDArray[np.int64] | None:
        """[N] the number of each row's prompt, where the order asks for it."""
        if self.batch_by == "pair":
            return None
        sizes = [sum(1 for _ in pairs) for _, pairs in groupby(self.pair_ids, prompt_of)]
        return np.repeat(np.arange(len(sizes)), sizes)

    @cached_property
    def learned(self) -> list[float]:
        """What global batches have taught the loss itself; a checkpoint holds it."""
        return []

    @property
    def looks_ahead(self) -> bool:
        """Whether it learns from a batch before that batch's losses; else after its step."""
        return False

    def learn(self, outputs_PK: Tensor, indices: Indices) -> None:  # noqa: B027 (most learn nothing)
        """Takes all outputs of a global batch."""

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
    """−log σ(s⁺ − s⁻) of an annotator's scores, mean over pairs (paper eq. 5).

    Attributes:
        shares: [N] the share of people that prefer each row's first answer, from 0 to 1; None: all
            of them do, a hard label.
    """

    shares: Numbers | None = None

    def __post_init__(self) -> None:
        """Checks the shares, too."""
        super().__post_init__()
        if self.shares is None:
            return
        shares = np.asarray(self.shares)
        if len(shares) != len(self.rows):
            raise TaskError(f"{len(self.rows)} pairs have {len(shares)} shares of votes")
        if not ((shares >= 0) & (shares <= 1)).all():
            raise TaskError(f"shares of votes: from {shares.min()} to {shares.max()}")

    def losses(self, outputs_PK: Tensor, indices: Indices) -> Tensor:
        """[P]."""
        return bradley_terry(outputs_PK[:, 0], outputs_PK[:, 1], self._shares(outputs_PK, indices))

    def metrics(self, outputs_PK: Tensor, indices: Indices) -> dict[str, float]:
        """Accuracy against the majority, to which a tie is half right, and mean margin."""
        margins_P = outputs_PK[:, 0] - outputs_PK[:, 1]
        right_P = (margins_P > 0).double()
        shares_P = self._shares(outputs_PK, indices)
        if shares_P is not None:
            right_P = torch.where(shares_P < 0.5, (margins_P < 0).double(), right_P)
            right_P = torch.where(shares_P == 0.5, 0.5, right_P)
        return {"accuracy": float(right_P.mean()), "margin": float(margins_P.mean())}

    def _shares(self, like: Tensor, indices: Indices) -> Tensor | None:
        shares = self.shares
        return None if shares is None else _of(shares, indices, like)


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
        return float(sum(self.rows[i].n_scored[0] for i in indices))

    def metrics(self, outputs_PK: Tensor, indices: Indices) -> dict[str, float]:
        """None beside the loss."""
        return {}


@dataclass(frozen=True)
class Preference(Task):
    """C·ℓ of log-probs, against a frozen reference or without one (paper eq. 7–11).

    Attributes:
        weights: of each pair, not negative; those that are normalised by their mean are that
            already.
        references: [N, 2] log-probs of chosen and rejected under the reference, in nats; None for
            an objective without a reference.
        loss_type: key of `objectives.OBJECTIVES`.
        beta: β, of all pairs or of each.
        label_smoothing: ε of the losses that read it; with `re_dpo` where it begins.
        simpo_gamma: γ of SimPO.
        sft_coefficient: λ of the chosen answer's own likelihood, beside the loss.
        ropo_alpha: α of ROPO.
        dr_dpo_beta: β' of Dr. DPO.
        normalization: the denominator of Σ C·ℓ over a global batch: 'none', its pairs (the
            paper); 'batch', its ΣC.
        sampling: 'proportional': C is how often a pair is drawn, and its weight is then 1.
        probabilities: soft labels, the annotator's probability of each chosen answer; None: hard.
    """

    weights: Numbers
    references: Sequence[tuple[float, float]] | NDArray[np.floating[Any]] | None
    loss_type: str
    beta: float | NDArray[np.floating[Any]]
    label_smoothing: float = 0.0
    normalization: Normalization = "none"
    sampling: Sampling = None
    probabilities: Numbers | None = None
    simpo_gamma: float = LossSettings.simpo_gamma
    sft_coefficient: float = 0.0
    ropo_alpha: float = LossSettings.ropo_alpha
    dr_dpo_beta: float = LossSettings.dr_dpo_beta

    def __post_init__(self) -> None:
        """Checks numbers and their count, too."""
        super().__post_init__()
        for name in ("weights", "references", "probabilities"):
            if getattr(self, name) is not None:
                self._check_numbers(name, np.asarray(getattr(self, name)))
        weights = np.asarray(self.weights)
        if weights.min() < 0 or weights.max() == 0:
            raise TaskError(
                f"weights: from {weights.min()} to {weights.max()}; they must not be negative and "
                "not all zero (all ties?)"
            )
        if self.sampling and weights.max() > 1:
            raise TaskError(
                f"weights: up to {weights.max()}, but arm 'proportional' draws a pair with its "
                "weight as probability; divide them, or take another arm"
            )
        if self.references is None and OBJECTIVES[self.loss_type].reference:
            raise TaskError(f"loss_type {self.loss_type!r} needs references: run `reference`")

    def _check_numbers(self, name: str, numbers: NDArray[np.floating[Any]]) -> None:
        if len(numbers) != len(self.rows):
            raise TaskError(
                f"{len(self.rows)} pairs have {len(numbers)} {name}: run `reference` and `weigh` "
                "again"
            )
        finite_N = np.isfinite(numbers).reshape(len(self.rows), -1).all(axis=1)
        bad = np.flatnonzero(~finite_N)
        if len(bad):
            pairs = ", ".join(self.pair_ids[i] for i in bad[:5])
            raise TaskError(f"{name}: not finite for {len(bad)} pairs ({pairs}); drop them")

    @cached_property
    def order(self) -> Order:
        """All pairs, or as many as ΣC of them, each as often as its C asks."""
        if self.sampling == "proportional":
            return proportional(self.weights, self._prompts())
        return super().order

    @property
    def outputs(self) -> tuple[int, ...]:
        """A log-prob an answer; for a loss that reads squares, them too."""
        return (2, 2) if OBJECTIVES[self.loss_type].squares else (2,)

    def losses(self, outputs_PK: Tensor, indices: Indices) -> Tensor:
        """[P], each times its weight."""
        settings = self._settings(outputs_PK, indices)
        loss_P = OBJECTIVES[self.loss_type].losses(self._pairs(outputs_PK, indices), settings)
        return self._weights(outputs_PK, indices) * loss_P

    @cached_property
    def learned(self) -> list[float]:
        """The batch's level, or ε, where the loss learns one of them."""
        begin = 0.0 if self.looks_ahead else self.label_smoothing
        return [begin] if OBJECTIVES[self.loss_type].learns else []

    @property
    def looks_ahead(self) -> bool:
        """As the objective says."""
        return OBJECTIVES[self.loss_type].looks_ahead

    def learn(self, outputs_PK: Tensor, indices: Indices) -> None:
        """As the objective says."""
        learns = OBJECTIVES[self.loss_type].learns
        if learns is not None:
            pairs, settings = self._pairs(outputs_PK, indices), self._settings(outputs_PK, indices)
            self.learned[0] = float(learns(pairs, settings))

    def denominator(self, indices: Indices) -> float:
        """By `normalization`; 1 for a batch of ties alone, whose sum is 0 too."""
        if self.normalization == "batch" and not self.sampling:
            return float(sum(self.weights[i] for i in indices)) or 1.0
        return float(len(indices))

    def metrics(self, outputs_PK: Tensor, indices: Indices) -> dict[str, float]:
        """TRL's names, and more; `metrics_log` says what each is."""
        pairs = self._pairs(outputs_PK, indices)
        found = OBJECTIVES[self.loss_type]
        chosen_P, rejected_P = found.rewards(pairs, self._settings(outputs_PK, indices).beta)
        ratios_2P = torch.cat(pairs.ratios)
        return {
            "rewards/chosen": float(chosen_P.mean()),
            "rewards/rejected": float(rejected_P.mean()),
            "rewards/accuracies": float((chosen_P > rejected_P).double().mean()),
            "rewards/margins": float((chosen_P - rejected_P).mean()),
            "logps/chosen": float(pairs.chosen.mean()),
            "logps/rejected": float(pairs.rejected.mean()),
            **({"kl": float(-ratios_2P.mean())} if found.reference else {}),
            "weight": float(self._weights(outputs_PK, indices).mean()),
            **({"flipped": self.learned[0]} if self.learned and not self.looks_ahead else {}),
        }

    def _settings(self, like: Tensor, indices: Indices) -> LossSettings:
        """The numbers of the loss, with a pair's own β, and its own ε where labels are soft."""
        beta = _of(self.beta, indices, like) if isinstance(self.beta, np.ndarray) else self.beta
        learned = self.learned[0] if self.learned else self.label_smoothing
        epsilon: float | Tensor = self.label_smoothing if self.looks_ahead else learned
        if self.probabilities is not None:
            epsilon = 1 - _of(self.probabilities, indices, like)
        own = self.simpo_gamma, self.sft_coefficient, self.ropo_alpha, self.dr_dpo_beta
        return LossSettings(beta, epsilon, *own, level=learned)

    def _pairs(self, outputs_PK: Tensor, indices: Indices) -> PairLogps:
        """What the loss reads of these rows."""
        squares = None
        if outputs_PK.dim() == 3:
            outputs_PK, squares_PK = outputs_PK.unbind(2)
            squares = squares_PK[:, 0], squares_PK[:, 1]
        references_PK = torch.zeros_like(outputs_PK)
        if self.references is not None:
            references_PK = _of(self.references, indices, outputs_PK)
        counts_PK = placed([self.rows[i].n_scored for i in indices], outputs_PK)
        return PairLogps(
            chosen=outputs_PK[:, 0],
            rejected=outputs_PK[:, 1],
            n_chosen=counts_PK[:, 0],
            n_rejected=counts_PK[:, 1],
            ref_chosen=references_PK[:, 0],
            ref_rejected=references_PK[:, 1],
            squares=squares,
        )

    def _weights(self, like: Tensor, indices: Indices) -> Tensor:
        return like.new_ones(len(indices)) if self.sampling else _of(self.weights, indices, like)


def _of(numbers: Sequence[Any] | NDArray[Any], indices: Indices, outputs: Tensor) -> Tensor:
    """Those of some rows, [P, …]."""
    return placed([numbers[i] for i in indices], outputs)
