"""Training on pairs: what `fit` and `align` are told beyond what every training is."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from cwpo_dist.config.base import Epochs, PositiveFloat, PositiveInt, Seed
from cwpo_dist.config.models import LoraConfig
from cwpo_dist.config.training import (
    Adapters,
    BatchBy,
    LearningRate,
    PairsAStep,
    TrainingConfig,
    WarmupSteps,
    WeightDecay,
)


class PairsConfig(TrainingConfig):
    """What those share that train on pairs."""

    batch_by: BatchBy = Field(
        "pair",
        description="what is shuffled; prompt: pairs of a prompt stay side by side, so that they "
        "mostly meet in a batch, where an answer of several pairs is computed once, as far as they "
        "fit a micro-batch: the same losses in another order",
    )

    def identity(self) -> dict[str, object]:
        """As of any training; without what older keys do not know, where it is as it was."""
        settings = super().identity()
        if self.batch_by == "pair":
            del settings["batch_by"]
        return settings


class FitConfig(PairsConfig):
    """The annotator's training, Bradley–Terry (paper eq. 4–5, table 7)."""

    # Each seed, and each fold, is in the key of the annotator that it makes.
    compute_fields: ClassVar[frozenset[str]] = TrainingConfig.compute_fields | {"seeds", "folds"}

    learning_rate: LearningRate = 1e-5
    num_train_epochs: Epochs = 5.0
    global_batch_size: PairsAStep = 32
    labels: Literal["hard", "votes"] = Field(
        "hard",
        description="hard: of each pair its label; votes: pairs that were voted on are learned "
        "as the share of votes, soft Bradley–Terry",
    )
    seeds: list[Seed] | None = Field(
        None, min_length=1, description="an ensemble, one annotator a seed; null: the run's seed"
    )
    heads: PositiveInt = Field(
        1,
        description="an ensemble on one model: so many heads, each with weights of the pairs of "
        "its own (docs/arms.md); 1: the annotator of the paper",
    )
    folds: Annotated[int, Field(ge=2)] = Field(
        5,
        description="for arms that judge people's labels: the labelled prompts in so many parts, "
        "each judged by an annotator (of each seed) that is trained on the other parts",
    )

    def identity(self) -> dict[str, object]:
        """As of any training on pairs; without the heads that older keys do not know, of one."""
        settings = super().identity()
        if self.heads == 1:
            del settings["heads"]
        return settings

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds is not None and len(set(seeds)) < len(seeds):
            raise ValueError("a seed appears twice; equal seeds make the same annotator")
        return seeds


class AlignConfig(PairsConfig):
    """Confidence-weighted preference optimisation (paper eq. 7–11, table 9)."""

    learning_rate: LearningRate = 5e-6
    num_train_epochs: Epochs = 5.0
    warmup_steps: WarmupSteps = 100
    weight_decay: WeightDecay = 0.05
    lora: Adapters = LoraConfig()
    loss_type: str = Field(
        "sigmoid",
        description="the loss, by TRL's names: sigmoid (DPO), ipo (summed, the paper's), "
        "ipo_norm (per token, TRL's ipo), sigmoid_norm (DPO per token), robust (rDPO), ropo, "
        "re_dpo (RE-PO of DPO), dr_dpo (Dr. DPO), wpo, hinge, simpo, orpo",
    )
    beta: PositiveFloat = Field(
        0.5,
        description="β of the loss, how strongly it holds to the reference; of orpo the paper's λ",
    )
    beta_column: str | None = Field(
        None,
        description="a column of prepare.keep_columns whose numbers, above 0, multiply beta, each "
        "that of its pair; null: beta alone",
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] | None = Field(
        None,
        description="ε: of robust its share of flipped labels (null: the paper's 0.1), of re_dpo "
        "where its estimate begins (null: the paper's 0.1), of sigmoid conservative DPO, of simpo "
        "the same (null: 0)",
    )
    simpo_gamma: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="γ, SimPO's target margin (null: TRL's 0.5)"
    )
    ropo_alpha: Annotated[float, Field(ge=1.0)] | None = Field(
        None, description="α, how much ROPO's noise-tolerant term counts (null: the paper's 14)"
    )
    dr_dpo_beta: PositiveFloat | None = Field(
        None, description="β' of Dr. DPO; the larger, the more alike pairs count (null: 1)"
    )
    sft_coefficient: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="λ of −log π(y⁺)/|y⁺|, in nats a token, added to a pair's loss before its "
        "weight; 0: none",
    )
    weight_normalization: Literal["none", "batch", "dataset"] | None = Field(
        None,
        description="what weights are divided by: 1 (none, the paper), ΣC of the batch, mean C of "
        "the data set; null: as the arm says",
    )

    def identity(self) -> dict[str, object]:
        """As of any training; without what older keys do not know, where it is not used."""
        settings = super().identity()
        for name in ("sft_coefficient", "ropo_alpha", "dr_dpo_beta", "beta_column"):
            if not settings[name]:
                del settings[name]
        return settings
