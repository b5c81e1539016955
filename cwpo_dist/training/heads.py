"""The scores of several heads on one model in; the sum of their Bradley–Terry losses out.

An ensemble for about the price of one annotator: each head starts from numbers of its own, and each
has weights of the pairs of its own. Osband et al. 2016 (arXiv 1602.04621) put bootstrapped heads on
one network so; the weights are those of the Bayesian bootstrap (Rubin 1981).

Shapes: P = pairs, 2 answers each, M = heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cwpo_dist.lm.feeding import placed
from cwpo_dist.objectives import bradley_terry
from cwpo_dist.pairs.records import unit_hash
from cwpo_dist.training.tasks import BradleyTerry, Indices
from cwpo_dist.weighting import Floats


@dataclass(frozen=True)
class ManyHeads(BradleyTerry):
    """Σ_m w_m·ℓ_m of a pair, mean over pairs.

    Attributes:
        heads: M.
        seed: of the weights, None: all are 1, as on pairs that are not trained on.
    """

    heads: int = 2
    seed: int | None = None

    @property
    def outputs(self) -> tuple[int, ...]:
        """A number an answer and head."""
        return (self.n_answers, self.heads)

    def losses(self, outputs_PKM: Tensor, indices: Indices) -> Tensor:
        """[P]."""
        shares_P = self._shares(outputs_PKM, indices)
        shares_P1 = None if shares_P is None else shares_P[:, None]
        loss_PM = bradley_terry(outputs_PKM[:, 0], outputs_PKM[:, 1], shares_P1)
        if self.seed is not None:
            names = [self.pair_ids[i] for i in indices]
            loss_PM = loss_PM * placed(bootstrap(self.seed, names, self.heads), loss_PM)
        return loss_PM.sum(1)

    def metrics(self, outputs_PKM: Tensor, indices: Indices) -> dict[str, float]:
        """Those of the heads' mean score; and by how much their margins differ."""
        margins_PM = outputs_PKM[:, 0] - outputs_PKM[:, 1]
        spread = float(margins_PM.std(1, correction=0).mean())
        return super().metrics(outputs_PKM.mean(2), indices) | {"disagreement": spread}


def bootstrap(seed: int, pair_ids: list[str], heads: int) -> Floats:
    """The weights [P, M] of pairs, each −log(1 − u), so that an average pair counts once.

    Drawn from (seed, head, pair) alone, whichever rank asks, and after whichever restart.
    """
    names = [str(head) for head in range(heads)]
    u_PM = [[unit_hash(seed, "head", head, pair) for head in names] for pair in pair_ids]
    weights: Floats = -np.log1p(-np.array(u_PM, np.float64))
    return weights
