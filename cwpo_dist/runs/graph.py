"""A configuration and an arm in; the stage outputs they stand for, each under its content key."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cwpo_dist.config import (
    ARMS,
    AlignConfig,
    Arm,
    Config,
    ConfigError,
    EvaluateConfig,
    ModelConfig,
    SftConfig,
    Split,
    WeighConfig,
)
from cwpo_dist.evaluation.gold_function import load_function
from cwpo_dist.lm.fingerprints import model_fingerprint, tokenizer_fingerprint
from cwpo_dist.objectives import objective
from cwpo_dist.pairs.sources import source_fingerprints
from cwpo_dist.storage import Store, digest

TRAINING_STAGES = ("fit", "sft", "align")
SCORES = ("annotate", "implicit")  # the stages that give a pair's two answers a score
# Of what stages write: raised when the same settings would give other files.
FORMAT = 3
FORMAT_OF = {"tokens": 5, "implicit": 4, "annotate": 4, "weigh": 5, "evaluate": 4}


@dataclass(frozen=True)
class Node:
    """One stage output: what it reads and the settings that decide its content.

    Attributes:
        stage: the folder it lies in.
        settings: everything but its inputs that its content depends on.
        inputs: the outputs that it reads.
        of: the section whose model the output is about or of; no part of the key, which knows the
            model itself. `weak`: the weak model trained as a policy, for its implicit rewards.
        retries: how many retries of its rejects are committed. They add rows to an output whose
            settings and inputs stay the same, so they are no part of its own key, but of the keys
            of all that reads it.
    """

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, Node] = field(default_factory=dict)
    retries: int = 0
    of: Literal["policy", "weak"] = "policy"

    @cached_property
    def key(self) -> str:
        """16 hex digits: the same settings and inputs give the same key on any machine."""
        inputs = {name: node.content for name, node in self.inputs.items()}
        return digest([FORMAT_OF.get(self.stage, FORMAT), self.stage, self.settings, inputs])

    @property
    def content(self) -> str:
        """The key, and which retry: what the keys of its readers hash."""
        return f"{self.key}+retry-{self.retries}" if self.retries else self.key

    @property
    def path(self) -> str:
        """The output's folder below the run directory."""
        return f"{self.stage}/{self.key}"


def graph(config: Config, arm: str) -> dict[str, Node]:
    """The nodes of one arm by role, each after those that it reads.

    Raises:
        ConfigError: when the arm needs a model that the config lacks.
    """
    nodes = _scoring_nodes(config, arm)
    if config.policy is None:
        raise ConfigError(f"policy: arm {arm!r} aligns a policy; give policy.model_name_or_path")
    nodes |= _policy_nodes(config, config.policy, config.arm(arm), nodes)
    measured = _evaluate_settings(config.evaluate)
    measured["calibration_split"] = config.weigh.calibration_split
    measured["items"] = 1  # raised when `evaluate` writes other columns of single pairs and answers
    nodes["evaluate"] = Node("evaluate", measured, dict(nodes))
    return nodes


def weighing_nodes(config: Config, arm: str) -> dict[str, Node]:
    """An arm's nodes up to `weigh`, the same as in `graph`; they need no policy.

    Raises:
        ConfigError: when the arm needs an annotator that the config lacks.
    """
    nodes = _scoring_nodes(config, arm)
    return nodes | {"weigh": _weigh_node(config, config.arm(arm), nodes)}


def _scoring_nodes(config: Config, arm: str) -> dict[str, Node]:
    """`prepare`, and what gives the arm's pairs their scores."""
    prepared = prepare_node(config)
    nodes = {"prepare": prepared}
    if config.arm(arm).annotator == "implicit":
        return nodes | implicit_nodes(config, prepared)
    if config.arm(arm).labels == "own":  # on whichever pairs have numbers, read by whom they may
        return nodes
    return nodes | (annotator_nodes(config, prepared) if needs_annotator(config) else {})


def needs_annotator(config: Config) -> bool:
    """True when any arm reads the labels of an annotator that `fit` made, or a ready one.

    Then every arm of the run, `human` too, keeps to the pairs that the annotator could read, so
    that arms are compared on the same pairs; but those that weigh by the data's own numbers.
    """
    return any(config.arm(name).reads_annotator for name in config.arms)


def prepare_node(config: Config) -> Node:
    """Sources, as they are now, and the split settings."""
    settings = config.prepare.identity() | {"seed": config.seed}
    if not config.prepare.flipped_labels:
        del settings["flipped_labels"]  # as before there was such a thing
    settings["sources_now"] = source_fingerprints(config.prepare)
    return Node("prepare", settings)


def annotator_nodes(config: Config, prepare: Node) -> dict[str, Node]:
    """`fit` (unless reward models are given) and `annotate`, numbered where there are several.

    Each annotator has a key of its own, which knows nothing of the others: to add one scores no
    pair anew by those that are there.

    Raises:
        ConfigError: when neither `weak` nor `annotate.model` is given.
    """
    made = list(_annotators(config, prepare))
    if len(made) == 1:
        return made[0]
    return {f"{role}_{k}": node for k, nodes in enumerate(made) for role, node in nodes.items()}


def _annotators(config: Config, prepare: Node) -> Iterator[dict[str, Node]]:
    scored = config.annotate.identity() | {"splits": sorted(config.annotate.scored_splits())}
    ready = config.annotate.ready()
    for _, model in ready:
        settings = scored | _identity(model)
        yield {"annotate": _retried(config, Node("annotate", settings, {"prepare": prepare}))}
    if ready:
        return
    if config.weak is None:
        raise ConfigError(
            "weak: an annotator is needed; give weak.model_name_or_path to fit one, or "
            "annotate.model.model_name_or_path for a ready one-label reward model"
        )
    for seed in config.fit.seeds or [config.seed]:
        settings = config.fit.identity() | _identity(config.weak) | {"seed": seed}
        fit = Node("fit", settings, {"prepare": prepare})
        annotate = Node("annotate", scored, {"prepare": prepare, "fit": fit})
        yield {"fit": fit, "annotate": _retried(config, annotate)}


def implicit_nodes(config: Config, prepare: Node) -> dict[str, Node]:
    """WS-DPO's annotator (Tao & Li 2025): the weak model after SFT and DPO on the labelled part.

    Its score of an answer is β·log π/π_SFT, the implicit reward.

    Raises:
        ConfigError: when `weak` is not given.
    """
    if config.weak is None:
        raise ConfigError(
            "weak: arm 'ws_dpo' trains it by SFT and DPO; give weak.model_name_or_path"
        )
    teacher = teacher_config(config)
    made = _policy_nodes(teacher, config.weak, ARMS["labelled_only"], {"prepare": prepare})
    kept = {role: made[role] for role in ("tokens", "sft", "reference", "weigh", "align")}
    # Ours, whatever ready models there are beside it: not what it was trained on.
    ours = config.annotate.model_copy(update={"model": None, "models": []})
    splits, tokens = ours.scored_splits(), made["tokens"]
    before = _log_probs(config.weak, splits, tokens, {"model": made["sft"]})
    after = _log_probs(config.weak, splits, tokens, {"model": made["align"]})
    nodes = {f"teacher_{role}": replace(node, of="weak") for role, node in kept.items()}
    nodes |= {
        "teacher_before": replace(before, of="weak"),
        "teacher_after": replace(after, of="weak"),
    }
    read = {"prepare": prepare, "before": before, "after": after}
    nodes["annotate"] = Node("implicit", {"beta": teacher.align.beta}, read, of="weak")
    return nodes


def teacher_config(config: Config) -> Config:
    """The run in which the weak model is the policy: on its schedule as an annotator, twice."""
    schedule = config.fit.model_dump(exclude={"seeds", "labels"})
    align = AlignConfig.model_validate(
        schedule | {"beta": config.align.beta, "lora": config.fit.lora}
    )
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


def _retried(config: Config, node: Node) -> Node:
    """The node with the number of its committed retries, which stand in the run directory."""
    output = Store(config.output_dir).child(*node.path.split("/"))
    done = next(n for n in itertools.count() if not output.exists(retry_manifest(n + 1)))
    return replace(node, retries=done)


def retry_manifest(number: int) -> str:
    """The file that commits a retry of an output's rejects, numbered from 1."""
    return f"manifest.retry-{number}.json"


def ready_model(config: Config, node: Node) -> tuple[str, ModelConfig]:
    """The given reward model that an `annotate` node stands for, with the field that names it."""
    for field_name, model in config.annotate.ready():
        if _identity(model)["model"] == node.settings["model"]:
            return field_name, model
    raise AssertionError(f"{node.path} was not made from this configuration")


def members(node: Node) -> list[Node]:
    """The `annotate` outputs that a node reads."""
    return [given for given in node.inputs.values() if given.stage in SCORES]


def _policy_nodes(
    config: Config, policy: ModelConfig, arm: Arm, given: dict[str, Node]
) -> dict[str, Node]:
    """From tokens to the aligned policy and the model answers to be judged."""
    tokens = Node("tokens", _token_settings(policy), {"prepare": given["prepare"]})
    weigh = _weigh_node(config, arm, given)
    scored = weigh.inputs
    beside = weigh.settings.get("own") == "beside"
    scale = _joint_scale(weigh.settings) if len(members(weigh)) + beside > 1 else {}
    whose = ("labels", "splits", "own", "column")
    chosen = {name: weigh.settings[name] for name in whose if name in weigh.settings} | scale
    nodes = {"tokens": tokens}
    frozen = {}
    if config.sft is not None:
        settings = config.sft.identity() | _identity(policy) | chosen | {"seed": config.seed}
        nodes["sft"] = Node("sft", settings, scored | {"tokens": tokens})
        frozen = {"model": nodes["sft"]}
    held_out = config.evaluate.split
    compares, _ = objective(config.align, soft_labels=arm.soft_labels)
    if compares.reference:
        splits = [*arm.splits, *_measured(config), watched_split(config)]
        nodes["reference"] = _log_probs(policy, splits, tokens, frozen)
    nodes["weigh"] = weigh
    align = config.align.identity() | _identity(policy) | {"seed": config.seed}
    by_batch = _normalization(config, arm) == "batch"  # by the data set's mean: in the weights
    align["weight_normalization"] = "batch" if by_batch else "none"
    align |= {"sampling": arm.sampling, "soft_labels": arm.soft_labels}
    read = {name: nodes[name] for name in ("tokens", "weigh", "reference") if name in nodes}
    nodes["align"] = Node("align", align, read | frozen)
    nodes["aligned"] = _log_probs(policy, [held_out], tokens, {"model": nodes["align"]})
    if config.evaluate.num_prompts:
        models = {"base": {}, "sft": frozen, "aligned": {"model": nodes["align"]}}
        for place, (role, model) in enumerate(models.items()):
            # Samples of different models are independent, as in the paper: each has its own seed.
            seed = config.seed * len(models) + (place if model else 0)
            nodes[f"answers_{role}"] = _answers(config, policy, tokens, model, seed)
    return nodes


def _normalization(config: Config, arm: Arm) -> str:
    return config.align.weight_normalization or arm.weight_normalization


def _weigh_node(config: Config, arm: Arm, given: dict[str, Node]) -> Node:
    settings = {"labels": arm.labels, "splits": list(arm.splits)} | weigh_settings(config, arm)
    # Text is prompt + answer under 'plain' alone; every other template gets it as messages.
    settings["messages"] = config.policy is None or config.policy.chat_template != "plain"
    return Node("weigh", settings, {"prepare": given["prepare"]} | _scores(list(given.values())))


def _scores(nodes: list[Node]) -> dict[str, Node]:
    """The `annotate` outputs as inputs; several by key, since their order changes nothing."""
    found = [node for node in nodes if node.stage in SCORES]
    if len(found) > 1:
        return {f"annotate_{node.key}": node for node in sorted(found, key=lambda node: node.key)}
    return {"annotate": found[0]} if found else {}


def weigh_settings(config: Config, arm: Arm) -> dict[str, Any]:
    """The arm's preset with what the user set over it.

    Another weight function is for arms that weigh at all (`weak` stays at 1); a selection and a
    temperature are for every arm that has confidences. What few have is there for them alone.
    """
    user = config.weigh
    weighs, scored = arm.weight_function != "one", arm.labels != "human"
    temperature = (user.temperature if scored else None) or arm.temperature
    more: dict[str, Any] = {}
    if temperature == "fitted":
        more["calibration_split"] = user.calibration_split
    if arm.labels == "own" or arm.with_own:
        more |= {"own": "beside" if arm.with_own else "alone", "column": user.column}
    if weighs and arm.sampling is None and _normalization(config, arm) == "dataset":
        more["divided_by_mean"] = True
    return {
        "weight_function": (weighs and user.weight_function) or arm.weight_function,
        "top_fraction": (user.top_fraction if scored else None) or arm.top_fraction,
        "min_confidence": user.min_confidence if scored else None,
        "temperature": temperature,
        **more,
    }


def watched_split(config: Config) -> Split:
    """Where training may be followed on human labels: `validation`, else the judged split."""
    prepare = config.prepare
    if prepare.validation_fraction > 0 or any(s.into == "validation" for s in prepare.sources):
        return "validation"
    return config.evaluate.split


def _joint_scale(weigh: dict[str, Any]) -> dict[str, Any]:
    """What of the weighting decides which answer several annotators choose together."""
    if weigh["temperature"] != "fitted":
        return {}
    return {name: weigh[name] for name in ("temperature", "calibration_split")}


def _measured(config: Config) -> list[str]:
    """The splits that a policy is measured on: where rates are chosen on validation, that too."""
    chosen = config.compare is not None and len(config.compare.learning_rates) > 1
    return ["test", "validation"] if chosen else [config.evaluate.split]


def _log_probs(
    policy: ModelConfig, splits: Sequence[str], tokens: Node, model: dict[str, Node]
) -> Node:
    settings = _identity(policy) | {"splits": sorted(set(splits))}
    return Node("reference", settings, {"tokens": tokens} | model)


def _answers(
    config: Config, policy: ModelConfig, tokens: Node, model: dict[str, Node], seed: int
) -> Node:
    names = {"split", "num_prompts", "max_new_tokens", "temperature", "generation_batch_size"}
    settings = config.evaluate.model_dump(include=names) | _identity(policy) | {"seed": seed}
    return Node("generate", settings, {"tokens": tokens} | model)


def _evaluate_settings(evaluate: EvaluateConfig) -> dict[str, Any]:
    """The section, and what judges answers as it is now: its weights, or its rule's source."""
    settings = evaluate.identity()
    if evaluate.gold_model is not None:
        settings["gold_model"] = _identity(evaluate.gold_model)
    elif evaluate.gold_function is not None:
        settings["gold_function_now"] = load_function(evaluate.gold_function).source_digest()
    return settings


def _identity(model: ModelConfig) -> dict[str, Any]:
    settings = model.identity() | {"chat_template": _template(model)}
    return {"model": settings, "model_now": model_fingerprint(model)}


def _template(model: ModelConfig) -> str:
    """A template file counts by its content: moved it is the same, edited it is another."""
    if model.chat_template in {"tokenizer", "plain"}:
        return model.chat_template
    return digest(Path(model.chat_template).read_text(encoding="utf-8"))


def _token_settings(model: ModelConfig) -> dict[str, Any]:
    """Tokens depend on the tokenizer, not on weights, depth or attention implementation."""
    names = {"model_name_or_path", "revision", "chat_template", "template_date"}
    names |= {"max_length", "over_length"}
    settings = model.model_dump(mode="json", include=names) | {"chat_template": _template(model)}
    return settings | {"tokenizer_now": tokenizer_fingerprint(model)}
