"""An arm's configuration, stage outputs and figures in; the card of its policy or annotator out.

The card names models and data sets by hub id, or by the last part of their path: where somebody's
files lie is nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cwpo_dist.config import Config, ModelConfig, TrainingConfig
from cwpo_dist.report.cells import at

Figures = Mapping[str, Any]
_WHOSE = {
    "human": "people",
    "annotator": "the annotator",
    "own": "the data: their labels, or their own scores",
}
FILES = (".jsonl", ".gz", ".parquet", ".csv", ".json")  # of pairs
TITLES = {
    ("annotator", "agreement"): "annotator, pairs right",
    ("annotator", "length_baseline"): "the longer answer, pairs right",
    ("policy", "agreement"): "implicit reward, pairs right",
}


def model_card(
    config: Config, arm: str, keys: Mapping[str, str], figures: Figures, *, adapter: bool = False
) -> str:
    """README.md of an exported folder: YAML front matter as the hub expects it, and provenance.

    Args:
        config: as it was resolved for this arm.
        arm: its name.
        keys: role → content key of its stage outputs.
        figures: of its metrics.json.
        adapter: whether the folder holds the LoRA adapter alone.
    """
    policy = config.policy
    assert policy is not None, "an aligned arm has a policy"
    base, data = hub_id(policy.model_name_or_path), list(filter(None, map(hub_id, _data(config))))
    front = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=data or None,
        tags=["alignment", "preference-optimization", config.align.loss_type, "cwpo_dist"],
    )
    lines = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {public_name(policy.model_name_or_path)}, aligned by cwpo_dist\n",
        "Confidence-weighted preference optimisation (arXiv 2603.04968)"
        + (": the LoRA adapter alone." if adapter else ".")
        + "\n",
        *_simulated(config),
        *_table("What it was made from", _provenance(config, arm, figures)),
        *_table("Recipe", _recipe(config, arm)),
        *_table("Held-out figures", _figures(config, figures)),
        *_table("Stage outputs", ((role, f"`{key}`") for role, key in keys.items())),
        *_table("Versions", (at(figures, "versions") or {}).items()),
    ]
    return "\n".join(lines)


def annotator_card(
    config: Config, keys: Mapping[str, str], figures: Figures, training: Figures
) -> str:
    """README.md of an exported annotator: what it learned from, and what its scores are worth.

    Args:
        config: as it was resolved for an arm.
        keys: role → content key of the stage outputs that it was made of.
        figures: of this annotator on held-out pairs; empty where it was not measured alone.
        training: of its manifest: settings, counts, versions.
    """
    weak, fit = config.weak, config.fit
    assert weak is not None, "an annotator that `fit` made has a model"
    data = list(filter(None, map(hub_id, _data(config))))
    front = ModelCardData(
        base_model=hub_id(weak.model_name_or_path),
        library_name="transformers",
        pipeline_tag="text-classification",
        datasets=data or None,
        tags=["reward-model", "bradley-terry", "cwpo_dist"],
    )
    learned = "shares of votes, where people voted" if fit.labels == "votes" else "labels of people"
    made = [
        ("base model", _model(weak)),
        ("data", ", ".join(public_name(path) for path in _data(config))),
        ("learned from", f"{learned}, of {at(training, 'counts', 'rows')} pairs"),
    ]
    recipe = [
        ("loss", "Bradley–Terry"),
        ("learning rate", f"{fit.learning_rate:g}, {fit.lr_scheduler_type}"),
        ("length", _length(fit)),
        ("global batch", f"{fit.global_batch_size} pairs"),
        ("parameters", _parameters(fit)),
        ("seed", str(at(training, "settings", "seed"))),
    ]
    lines = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {public_name(weak.model_name_or_path)}, an annotator made by cwpo_dist\n",
        "A one-label reward model: the difference of two answers' scores is the log-odds that the "
        "first is better.\n",
        *_simulated(config),
        *_table("What it was made from", made),
        *_table("Recipe", recipe),
        *_table(f"On split `{config.evaluate.split}`", _worth(figures)),
        *_table("Stage outputs", ((role, f"`{key}`") for role, key in keys.items())),
        *_table("Versions", (at(training, "versions") or {}).items()),
    ]
    return "\n".join(lines)


def _worth(figures: Figures) -> Iterator[tuple[str, str]]:
    """How often it is right, and how often length alone would be."""
    titles = {"agreement": "pairs right", "length_baseline": "the longer answer, pairs right"}
    for name, title in titles.items():
        found = at(figures, name)
        if found and found.get("accuracy") is not None:
            yield title, _share(found)
    correlated = at(figures, "margin_length", "pearson")
    if correlated is not None:
        yield "correlation of margin and length difference", f"{correlated:.2f}"
    error = at(figures, "expected_calibration_error")
    if error is not None:
        yield "calibration error", f"{error:.1%}"


def hub_id(name: str) -> str | None:
    """The name, where it can be a hub's `owner/name` and is no path."""
    is_path = "://" in name or name.startswith((".", "/", "~")) or name.count("/") != 1
    is_path = is_path or "*" in name or name.endswith(FILES) or Path(name).exists()
    return None if is_path else name


def public_name(name: str) -> str:
    """A hub id whole; of a path or URI its last part."""
    return hub_id(name) or name.rstrip("/").rsplit("/", 1)[-1]


def _data(config: Config) -> Iterator[str]:
    yield from (source.path for source in config.prepare.sources)


def _simulated(config: Config) -> Iterator[str]:
    if config.simulated_labels:
        yield "**Simulated labels:** the preferences come from a rule, not from people.\n"


def _provenance(config: Config, arm: str, figures: Figures) -> Iterator[tuple[str, str]]:
    policy, preset = config.policy, config.arm(arm)
    assert policy is not None
    yield "base model", _model(policy)
    yield "data", ", ".join(public_name(path) for path in _data(config))
    yield "pairs trained on", f"{at(figures, 'pairs')}"
    yield "labels of", _WHOSE[preset.labels]
    if preset.labels == "own":
        yield "weight of a pair", _weight(config, arm)
        yield "mean weight", _mean_weight(figures)
    if preset.labels == "annotator":
        ready = [_model(model) for _, model in config.annotate.ready()]
        weak = [_model(config.weak)] if config.weak is not None else []
        own = ["the data's own numbers"] if preset.with_own else []
        yield "annotator", ", ".join([*(ready or weak), *own])
        yield "weight of a pair", _weight(config, arm)
        yield "mean weight", _mean_weight(figures)


def _model(model: ModelConfig) -> str:
    named = public_name(model.model_name_or_path)
    revision = f" at {model.revision}" if model.revision else ""
    layers = f", first {model.num_hidden_layers} layers" if model.num_hidden_layers else ""
    return f"{named}{revision}{layers}"


def _weight(config: Config, arm: str) -> str:
    preset, user = config.arm(arm), config.weigh
    if preset.soft_labels:
        return "1, with the annotator's probability as a soft label"
    name: str = preset.weight_function
    if name != "one" and user.weight_function is not None:
        name = user.weight_function
    normalised = config.align.weight_normalization or preset.weight_normalization
    how = "drawn in proportion to it" if preset.sampling else f"normalised by {normalised}"
    if preset.labels == "own" and name == "confidence":
        return f"the data's own, or `confidence` of their own scores, {how}"
    return f"`{name}` of the margin, {how}"


def _mean_weight(figures: Figures) -> str:
    """Of the weights before they are normalised; which of both acted is said beside it."""
    mean = f"{at(figures, 'mean_weight') or 0:.3f}"
    divisor = at(figures, "weigh", "weights_divided_by")
    return mean if divisor is None else f"{mean}, by which the weights that acted are divided"


def _recipe(config: Config, arm: str) -> Iterator[tuple[str, str]]:
    align = config.align
    yield "arm", f"`{arm}`"
    yield "loss", f"`{align.loss_type}`, β {align.beta:g}"
    for name in ("label_smoothing", "simpo_gamma"):
        if getattr(align, name) is not None:
            yield name, f"{getattr(align, name):g}"
    yield "learning rate", f"{align.learning_rate:g}, {align.lr_scheduler_type}"
    yield "length", _length(align)
    yield "global batch", f"{align.global_batch_size} pairs"
    yield "parameters", _parameters(align)
    yield "SFT before", "no" if config.sft is None else _length(config.sft)
    yield "seed", str(config.seed)


def _parameters(training: TrainingConfig) -> str:
    lora = training.lora
    return "all" if lora is None else f"LoRA, r {lora.r}, α {lora.lora_alpha}"


def _length(training: TrainingConfig) -> str:
    steps, epochs = training.max_steps, training.num_train_epochs
    return f"{steps} steps" if steps > 0 else f"{epochs:g} epoch{'s' * (epochs != 1)}"


def _figures(config: Config, figures: Figures) -> Iterator[tuple[str, str]]:
    for path, title in TITLES.items():
        found = at(figures, *path)
        if found and found.get("accuracy") is not None:
            yield title, _share(found)
    for baseline in at(figures, "gra") or {}:
        found = at(figures, "gra", baseline)
        yield f"gold reward accuracy against {baseline.replace('_', ' ')}", _share(found)
    last = (at(figures, "curves", "align") or [{}])[-1]
    if "loss" in last:
        yield "training loss at the end", f"{last['loss']:.4f}"
    yield "judged on", f"split `{config.evaluate.split}`"


def _share(found: Figures) -> str:
    low, high = found["low"], found["high"]
    return f"{found['accuracy']:.1%} of {found['n']} (95 % interval {low:.1%}–{high:.1%})"


def _table(title: str, rows: Any) -> Iterator[str]:
    lines = [f"| {name} | {value} |" for name, value in rows]
    if lines:
        yield "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""])
