"""A configuration and an arm in; what it asks of each stage, and marks of its files, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from cwpo_dist.config import (
    ARMS,
    AlignConfig,
    Arm,
    Config,
    ConfigError,
    EvaluateConfig,
    SftConfig,
    Split,
    WeighConfig,
    WeighPairing,
)
from cwpo_dist.pairs.numbers import Own
from cwpo_dist.pairs.sources import Fingerprint, source_fingerprints
from cwpo_dist.pairs.splits import Fold
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.output_key import Nodes
from cwpo_dist.storage import Store


@dataclass(frozen=True)
class ArmRun:
    """One arm of a run, or the run by which WS-DPO's annotator is made.

    Attributes:
        config: the run.
        arm: the arm's preset.
        annotates: whether its pairs are scored by the annotators of the run.
        policy_field: the field that names its policy.
        rewarded: the splits whose answers get the policy's implicit rewards.
        taught: the outputs of its `teacher`, by their roles there.
    """

    config: Config
    arm: Arm
    annotates: bool
    policy_field: Literal["policy", "weak"] = "policy"
    rewarded: tuple[Split, ...] = ()
    taught: Nodes = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, name: str) -> ArmRun:
        """An arm of the configuration."""
        arm = config.arm(name)
        # Own numbers stand on whichever pairs have them, read by whom they may.
        by_model = arm.annotator == "fitted" and arm.labels != "own"
        reads = arm.judged is not None or needs_annotator(config)
        return cls(config, arm, by_model and reads)

    @property
    def root(self) -> Store:
        """The run directory."""
        return Store(self.config.output_dir)

    @cached_property
    def sources_now(self) -> list[Fingerprint]:
        """Marks of the sources, listed once: all outputs of an arm descend from the same files."""
        return source_fingerprints(self.config.prepare)

    @cached_property
    def policy(self) -> GivenModel | None:
        """The policy as it was given; None: the run ends before it."""
        model = self.config.policy
        return None if model is None else GivenModel.of(self.policy_field, model)

    @cached_property
    def weak(self) -> GivenModel | None:
        """The weak model that `fit` trains."""
        model = self.config.weak
        return None if model is None else GivenModel.of("weak", model)

    @cached_property
    def ready(self) -> list[GivenModel]:
        """The reward models that annotate in its stead."""
        return [GivenModel.of(field, model) for field, model in self.config.annotate.ready()]

    @cached_property
    def gold(self) -> GivenModel | None:
        """The reward model that judges answers."""
        model = self.config.evaluate.gold_model
        return None if model is None else GivenModel.of("evaluate.gold_model", model)

    @property
    def folds(self) -> Sequence[Fold | None]:
        """What each annotator does not learn from and judges; None: it learns from all."""
        if self.arm.judged is None:
            return [None]
        number, seed = self.config.fit.folds, self.config.seed
        return [Fold(seed, number, k) for k in range(number)]

    @property
    def teacher(self) -> ArmRun | None:
        """What makes WS-DPO's annotator (Tao & Li 2025): SFT and DPO of the weak model.

        On the labelled part alone; None: the arm has another annotator.

        Raises:
            ConfigError: when the arm needs it and `weak` is not given.
        """
        if self.arm.annotator != "implicit":
            return None
        if self.config.weak is None:
            raise ConfigError(
                "weak: arm 'ws_dpo' trains it by SFT and DPO; give weak.model_name_or_path"
            )
        # Ours, whatever ready models there are beside it: not what it was trained on.
        ours = self.config.annotate.model_copy(update={"model": None, "models": []})
        config, arm = teacher_config(self.config), ARMS["labelled_only"]
        return ArmRun(config, arm, False, "weak", tuple(ours.scored_splits()))


def needs_annotator(config: Config) -> bool:
    """True when any arm reads the labels of an annotator that `fit` made, or a ready one.

    Then every arm of the run, `human` too, keeps to the pairs that the annotator could read, so
    that arms are compared on the same pairs; but those that weigh by the data's own numbers.
    """
    return any(config.arm(name).reads_annotator for name in config.arms)


def implicit_arms(config: Config) -> list[str]:
    """The arms whose labels are the implicit rewards of the weak model, trained as a policy."""
    return [arm for arm in config.arms if config.arm(arm).annotator == "implicit"]


def judged_arms(config: Config) -> list[str]:
    """The arms in which annotators judge people's labels."""
    return [arm for arm in config.arms if config.arm(arm).judged is not None]


def teacher_config(config: Config) -> Config:
    """The run in which the weak model is the policy: on its schedule as an annotator, twice."""
    schedule = config.fit.model_dump(exclude={"seeds", "heads", "folds", "labels", "batch_by"})
    of_pairs = {"beta": config.align.beta, "lora": config.fit.lora, "batch_by": config.fit.batch_by}
    align = AlignConfig.model_validate(schedule | of_pairs)
    return config.model_copy(
        update={
            "policy": config.weak,
            "sft": SftConfig.model_validate(schedule),
            "align": align,
            "arms": ["labelled_only"],
            "weigh": WeighConfig(),
            "compare": None,
            # Nothing is measured here: where the run is measured must not change the annotator.
            "evaluate": EvaluateConfig(split="test", num_prompts=0),
        }
    )


def held_out_split(config: Config) -> Split:
    """Where training may be followed on human labels: `validation`, else the judged split."""
    prepare = config.prepare
    if prepare.validation_fraction > 0 or any(s.into == "validation" for s in prepare.sources):
        return "validation"
    return config.evaluate.split


@dataclass(frozen=True)
class Chooser:
    """Who says which answer of a pair is the better one.

    Attributes:
        labels: people, the annotators, or the data's own numbers.
        splits: of which pairs.
        own: whether the data's own numbers act alone or beside annotators; None: not at all.
        with_human: whether people decide the labelled part all the same.
        judged: what becomes of people's labels that annotators judge; None: they judge none.
        column: which of them; None: those that there are.
        temperature: what divides margins; None: nothing.
        calibration_split: where it is fitted, if it is.
    """

    labels: Literal["human", "annotator", "own"]
    splits: tuple[Split, ...]
    own: Literal["alone", "beside"] | None = None
    with_human: bool = False
    judged: Literal["weighed", "cleaned"] | None = None
    column: Own | None = None
    temperature: float | Literal["fitted"] | None = None
    calibration_split: Split | None = None

    def identity(self) -> dict[str, object]:
        """What decides who is chosen; what few arms have is there for them alone."""
        content: dict[str, object] = {"labels": self.labels, "splits": list(self.splits)}
        if self.own is not None:
            content |= {"own": self.own, "column": self.column}
        if self.with_human:
            content["with_human"] = True
        if self.judged is not None:
            content["judged"] = self.judged
        if self.temperature is not None:
            content["temperature"] = self.temperature
        if self.calibration_split is not None:
            content["calibration_split"] = self.calibration_split
        return content


@dataclass(frozen=True)
class Weighting:
    """What becomes of a margin: the arm's preset with what the user set over it.

    Attributes:
        chooser: whose margins they are.
        weight_function: its name.
        pairing: which pairs of a prompt are kept.
        top_fraction: the share of pairs that is kept of these; None: all.
        min_confidence: pairs below are left out; None: none is.
        divided_by_mean: whether weights are divided by their mean.
    """

    chooser: Chooser
    weight_function: str
    pairing: WeighPairing
    top_fraction: float | None
    min_confidence: float | None
    divided_by_mean: bool

    def identity(self) -> dict[str, object]:
        """All of it; division and pairing are there where they are done."""
        content = self.chooser.identity() | {
            "weight_function": self.weight_function,
            "top_fraction": self.top_fraction,
            "min_confidence": self.min_confidence,
            "temperature": self.chooser.temperature,
        }
        if self.divided_by_mean:
            content["divided_by_mean"] = True
        if self.pairing != "given":
            content["pairing"] = self.pairing
        return content


def weighting(config: Config, arm: Arm) -> Weighting:
    """How an arm weighs.

    Another weight function is for arms that weigh at all (`weak` stays at 1); a selection, a
    pairing and a temperature are for every arm that has confidences.
    """
    user = config.weigh
    weighs, scored = arm.weight_function != "one", arm.labels != "human"
    return Weighting(
        chooser=_chooser(user, arm),
        weight_function=(weighs and scored and user.weight_function) or arm.weight_function,
        pairing=user.pairing if scored else "given",
        top_fraction=(user.top_fraction if scored else None) or arm.top_fraction,
        min_confidence=user.min_confidence if scored else None,
        divided_by_mean=weighs and arm.sampling is None and normalization(config, arm) == "dataset",
    )


def _chooser(user: WeighConfig, arm: Arm) -> Chooser:
    scored, has_own = arm.labels != "human", arm.labels == "own" or arm.with_own
    temperature = (user.temperature if scored else None) or arm.temperature
    return Chooser(
        labels=arm.labels,
        splits=arm.splits,
        own=("beside" if arm.with_own else "alone") if has_own else None,
        with_human=arm.with_human,
        judged=arm.judged,
        column=user.column if has_own else None,
        temperature=temperature,
        calibration_split=user.calibration_split if temperature == "fitted" else None,
    )


def normalization(config: Config, arm: Arm) -> str:
    """What the summed loss, or every weight, is divided by."""
    return config.align.weight_normalization or arm.weight_normalization
