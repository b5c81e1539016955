"""A whole run: all sections, the arms, and comparisons of them."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, field_validator, model_validator

from cwpo_dist.config.base import (
    Fraction,
    Place,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Split,
)
from cwpo_dist.config.data import PrepareConfig
from cwpo_dist.config.models import ModelConfig
from cwpo_dist.config.pairwise import AlignConfig, FitConfig
from cwpo_dist.config.scoring import AnnotateConfig, EvaluateConfig, ReferenceConfig
from cwpo_dist.config.training import SftConfig

S = TypeVar("S", bound=Section)


WeighPairing = Literal["given", "best_worst"]
# As in `acquisition`, which is heavy to import.
Strategies = Literal["uncertain", "random", "disagree", "delta_ucb", "information"]


class WeighConfig(Section):
    """margin → confidence → weight."""

    # `from` is no name in Python, but the one that reads well in YAML.
    model_config = ConfigDict(serialize_by_alias=True)

    from_: Literal["annotator", "columns", "both"] = Field(
        "annotator",
        alias="from",
        description="whose numbers arms that read an annotator weigh by: its scores; the data's "
        "own (weight, confidence, or two scores), without any annotator; both, as an ensemble",
    )
    column: Literal["weight", "confidence", "scores"] | None = Field(
        None, description="which of the data's own numbers; null: the one that they have"
    )
    weight_function: (
        Literal[
            "confidence", "sigmoid", "clipped", "clipped_fifth", "one", "madpo", "lower_confidence"
        ]
        | None
    ) = Field(
        None,
        description="of arms that weigh, in this order: C, σ(m), min(m,1), min(0.2m,1), 1, that of "
        "MADPO (docs/arms.md), C(m − disagreement); null: the arm's",
    )
    pairing: WeighPairing = Field(
        "given",
        description="best_worst: of each prompt only the pair whose scores lie furthest apart, "
        "which with prepare.pairing: all is the best answer against the worst; given: every pair",
    )
    top_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="keep the most confident share of pairs; null: the arm's"
    )
    min_confidence: Fraction | None = Field(
        None, description="keep pairs at least so confident; null: all"
    )
    temperature: PositiveFloat | Literal["fitted"] | None = Field(
        None, description="margins are divided by it; fitted: to human labels; null: the arm's"
    )
    calibration_split: Literal["validation", "labelled"] = Field(
        "validation", description="where temperatures are fitted; labelled: ready models only"
    )


class Grid(Section):
    """Trials to compare: every arm × loss × labelled share × share of flipped labels."""

    arms: list[str] = Field(min_length=1, description="names of arms, as under `arms` of the run")
    losses: list[str] | None = Field(None, description="as align.loss_type; null: that alone")
    labelled_fractions: list[Fraction] | None = Field(
        None, description="as prepare.labelled_fraction; null: that alone"
    )
    flipped_labels: list[Fraction] | None = Field(
        None, description="as prepare.flipped_labels; null: that alone"
    )


class AskTrials(Section):
    """Annotators to compare, by the labels that they asked for: one a budget."""

    strategy: Strategies = Field(description="which pairs it asks for, see docs/ask.md")
    budgets: list[PositiveInt] = Field(
        min_length=1,
        description="how many pairs it asks for, with each seed, beside the labelled part",
    )


class CompareConfig(Section):
    """What `cwpo compare` runs, each trial once a seed."""

    seeds: list[Seed] = Field(
        [0, 1, 2], min_length=1, description="each takes the place of `seed`, in every trial"
    )
    grids: list[Grid] = Field(
        default_factory=list, description="trials; none: the run's arms, unless `ask` has some"
    )
    ask: list[AskTrials] = Field(
        default_factory=list,
        description="strategies of `cwpo ask` to hold against each other, such as [{strategy: "
        "random, budgets: [100]}]; labels that prepare.labelled_fraction hides stand in for people",
    )
    learning_rates: list[PositiveFloat] = Field(
        default_factory=list,
        description="of align: each trial takes the best on validation, with the first seed; "
        "none: align.learning_rate",
    )
    baseline: str | None = Field(
        None,
        description="the trial that others are held against: its arm, and what tells it from other "
        "trials of that arm (`cw, 30 % labelled`); null: the first",
    )
    stop_losers: bool = Field(
        False,
        description="after three seeds and each further one, give no more seeds to a trial that is "
        "surely below the baseline on held-out labels",
    )

    @field_validator("seeds", "learning_rates")
    @classmethod
    def _distinct(cls, values: list[float]) -> list[float]:
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{value} appears twice and would count as two; remove one")
        return values


class Config(Section):
    """A whole run."""

    output_dir: Place = Field(
        description="the run directory, a path or URI; a later run adds to it"
    )
    seed: Seed = Field(
        0, description="of splits, flipped labels, adapters, the order of training, sampled answers"
    )
    arms: list[str] = Field(
        default_factory=lambda: ["cw"],
        min_length=1,
        description="ways to use the labels, each with a policy of its own: human, weak, cw, …; "
        "where one reads an annotator, almost all keep to the pairs that it could read",
    )
    simulated_labels: bool = Field(
        False,
        description="say in plan, report and cards that the labels come from a rule, not people",
    )
    prepare: PrepareConfig = Field(description="what is read and how it is split")
    weak: ModelConfig | None = Field(
        None, description="the weak model that becomes the annotator; null: none"
    )
    policy: ModelConfig | None = Field(
        None, description="the policy to align; null: the run ends before it"
    )
    fit: FitConfig = Field(FitConfig(), description="training of the weak model")
    annotate: AnnotateConfig = Field(AnnotateConfig(), description="scores of all answers")
    weigh: WeighConfig = Field(WeighConfig(), description="scores to preferences and weights")
    sft: SftConfig | None = Field(
        default_factory=SftConfig,
        description="fine-tuning of the policy; null (or none) for policies already instructed",
    )
    reference: ReferenceConfig = Field(
        ReferenceConfig(), description="log-probs of the policy as it was before `align`"
    )
    align: AlignConfig = Field(AlignConfig(), description="preference optimisation of the policy")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="held-out figures")
    compare: CompareConfig | None = Field(
        None, description="trials; read by `cwpo compare` and `plan` alone"
    )

    @field_validator(
        "sft", mode="before", json_schema_input_type=SftConfig | Literal["none"] | None
    )
    @classmethod
    def _sft_none(cls, given: object) -> object:
        """`sft: none` is how people write it."""
        return None if given == "none" else given

    @model_validator(mode="after")
    def _ties_are_learned(self) -> Self:
        """Elsewhere nothing reads a pair of the labelled part that has no label."""
        learned = self.fit.labels == "votes" and not self.annotate.ready()
        if self.prepare.ties == "labelled" and not learned:
            raise ValueError(
                "prepare.ties: 'labelled' gives pairs that people found equal to `fit`, which "
                "trains on them with fit.labels: votes alone, and where no annotator is given; "
                "give that, or leave ties unlabelled"
            )
        return self

    @model_validator(mode="after")
    def _known_arms(self) -> Self:
        named = [("arms", self.arms)]
        for k, grid in enumerate(self.compare.grids if self.compare else []):
            named.append((f"compare.grids.{k}.arms", grid.arms))
        for field, arms in named:
            for arm in arms:
                if arm not in ARMS:
                    known = ", ".join(sorted(ARMS))
                    raise ValueError(f"{field}: {arm!r} is unknown; choose from {known}")
        return self

    def sections(self, kind: type[S]) -> dict[str, S]:
        """Those of a kind that the run has, by their names."""
        return {name: section for name, section in self if isinstance(section, kind)}

    def arm(self, name: str) -> Arm:
        """The preset of that name, with whose numbers `weigh.from` says that it reads.

        No annotator was trained on any pair then, so the labelled part is trained on as well.
        """
        preset = ARMS[name]
        if not preset.reads_annotator or self.weigh.from_ == "annotator":
            return preset
        if self.weigh.from_ == "both":
            return preset.model_copy(update={"with_own": True})
        return preset.model_copy(update={"labels": "own", "splits": TRAINING})


TRAINING: tuple[Split, ...] = ("labelled", "unlabelled")


class Arm(Section):
    """A named preset over `weigh` and `align`."""

    labels: Literal["human", "annotator", "own"]  # own: by the numbers that the data have
    with_own: bool = False  # … beside the annotators', as one more of them
    with_human: bool = False  # people's of the labelled part, C = 1; the annotators' of the rest
    # People's, by annotators that did not learn from them: weighed, or without what these deny.
    judged: Literal["weighed", "cleaned"] | None = None
    annotator: Literal["fitted", "implicit"] = "fitted"  # implicit: rewards of a weak DPO policy
    splits: tuple[Split, ...] = ("unlabelled",)
    weight_function: Literal["confidence", "sigmoid", "one", "madpo", "lower_confidence"] = "one"
    top_fraction: float | None = None
    temperature: Literal["fitted"] | None = None
    weight_normalization: Literal["none", "batch", "dataset"] = "none"
    sampling: Literal["proportional"] | None = None  # C says how often, not how much
    soft_labels: bool = False  # the annotator's probability in place of a weight

    @property
    def reads_annotator(self) -> bool:
        """Whether its labels are those of a reward model."""
        return self.labels == "annotator" and self.annotator == "fitted"


# All presets in one table. `human*` arms alone may read labels of unlabelled rows, and those that
# weigh by the data's own numbers, which come with the labels that they are about.
ARMS: dict[str, Arm] = {
    "human": Arm(labels="human"),
    "human100": Arm(labels="human", splits=TRAINING),
    "labelled_only": Arm(labels="human", splits=("labelled",)),
    "human_weighed": Arm(
        labels="human", judged="weighed", splits=("labelled",), weight_function="sigmoid"
    ),
    "human_madpo": Arm(
        labels="human", judged="weighed", splits=("labelled",), weight_function="madpo"
    ),
    "human_cleaned": Arm(labels="human", judged="cleaned", splits=("labelled",)),
    "ws_dpo": Arm(labels="annotator", annotator="implicit"),
    "weak": Arm(labels="annotator"),
    "cw": Arm(labels="annotator", weight_function="confidence"),
    "cw_mean": Arm(
        labels="annotator", weight_function="confidence", weight_normalization="dataset"
    ),
    "semi": Arm(labels="annotator", with_human=True, splits=TRAINING, weight_function="confidence"),
    "cw_calibrated": Arm(labels="annotator", weight_function="confidence", temperature="fitted"),
    "ensemble": Arm(labels="annotator", weight_function="lower_confidence"),
    "proportional": Arm(labels="annotator", weight_function="confidence", sampling="proportional"),
    "soft": Arm(labels="annotator", soft_labels=True),
    "top30": Arm(labels="annotator", top_fraction=0.3),
    "own": Arm(labels="own", splits=TRAINING, weight_function="confidence"),
}
