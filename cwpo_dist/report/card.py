"""An arm's configuration, stage outputs and figures in; the card of its policy or annotator out.

The card names models and data sets by hub id, or by the last part of their path: where somebody's
files lie is nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from huggingface_hub import ModelCardData

from cwpo_dist.config import Arm, Config, ModelConfig, PairsConfig, TrainingConfig
from cwpo_dist.lm.identity import Identity, hub_id, identify, public_name
from cwpo_dist.manifest import Manifest
from cwpo_dist.report.arms_in_words import WEIGHTS_OF_JUDGED
from cwpo_dist.report.cells import at, ties

Figures = Mapping[str, Any]
BESIDE = "base"  # the folder of a base that comes with its adapter
_WHOSE = {
    "human": "people",
    "annotator": "the annotator",
    "own": "the data: their labels, or their own scores",
}
TITLES = {
    ("annotator", "agreement"): "annotator, pairs right",
    ("annotator", "length_baseline"): "the longer answer, pairs right",
    ("policy", "agreement"): "implicit reward, pairs right",
}


def model_card(
    config: Config,
    arm: str,
    keys: Mapping[str, str],
    figures: Figures,
    policy: Identity,
    below: Identity | None = None,
    *,
    shipped: bool = False,
) -> str:
    """README.md of an exported folder: YAML front matter as the hub expects it, and provenance.

    Args:
        config: as it was resolved for this arm.
        arm: its name.
        keys: role → content key of its stage outputs.
        figures: of its metrics.json.
        policy: what the policy as it was given is known by.
        below: of a folder with the LoRA adapter alone, the model that it needs.
        shipped: whether that is the policy after SFT, in a folder beside the adapter.
    """
    data = list(filter(None, map(hub_id, _data(config))))
    base = policy if below is None else below
    front = ModelCardData(
        base_model=base.name if base.on_hub else None,
        library_name="transformers" if below is None else "peft",
        pipeline_tag="text-generation",
        datasets=data or None,
        tags=["alignment", "preference-optimization", config.align.loss_type, "cwpo_dist"],
    )
    lines = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {policy.name}, aligned by cwpo_dist\n",
        "Confidence-weighted preference optimisation (arXiv 2603.04968)"
        + (".\n" if below is None else ": the LoRA adapter alone.\n"),
        *simulated(config),
        *(() if below is None else _how_to_load(config, below, shipped=shipped)),
        *table("What it was made from", _provenance(config, arm, figures, policy)),
        *table("Recipe", _recipe(config, arm)),
        *table("Held-out figures", _figures(config, figures)),
        *table("Stage outputs", ((role, f"`{key}`") for role, key in keys.items())),
        *table("Versions", (at(figures, "versions") or {}).items()),
    ]
    return "\n".join(lines)


def annotator_card(
    config: Config, keys: Mapping[str, str], figures: Figures, training: Manifest
) -> str:
    """README.md of an exported annotator: what it learned from, and what its scores are worth.

    Args:
        config: as it was resolved for an arm.
        keys: role → content key of the stage outputs that it was made of.
        figures: of this annotator on held-out pairs; empty where it was not measured alone.
        training: the manifest of its training.
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
        ("learned from", f"{learned}, of {training.counts['rows']} pairs"),
    ]
    recipe = [
        ("loss", "Bradley–Terry"),
        ("learning rate", f"{fit.learning_rate:g}, {fit.lr_scheduler_type}"),
        ("length", _length(fit)),
        ("global batch", _batch(fit)),
        ("parameters", _parameters(fit)),
        ("seed", str(training.settings["seed"])),
    ]
    lines = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {public_name(weak.model_name_or_path)}, an annotator made by cwpo_dist\n",
        f"{_labels(fit.heads)}: the difference of two answers' scores is the log-odds that the "
        "first is better.\n",
        *simulated(config),
        *table("What it was made from", made),
        *table("Recipe", recipe),
        *table(f"On split `{config.evaluate.split}`", _worth(figures)),
        *table("Stage outputs", ((role, f"`{key}`") for role, key in keys.items())),
        *table("Versions", training.versions.items()),
    ]
    return "\n".join(lines)


def _labels(heads: int) -> str:
    if heads == 1:
        return "A one-label reward model"
    return f"A reward model of {heads} heads, a label each, whose mean is the score"


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
    for name, title in {"brier": "Brier score", "nll": "negative log-likelihood"}.items():
        value = at(figures, name, "value")
        if value is not None:
            yield title, f"{value:.3f}"


def _data(config: Config) -> Iterator[str]:
    yield from (source.path for source in config.prepare.sources)


def simulated(config: Config) -> Iterator[str]:
    """What must stand first where a rule stood in for people."""
    if config.simulated_labels:
        yield "**Simulated labels:** the preferences come from a rule, not from people.\n"


def _how_to_load(config: Config, below: Identity, *, shipped: bool) -> Iterator[str]:
    """What an adapter needs, and the lines that load it."""
    yield "## How to load it\n"
    at = f" at `{below.revision}`" if below.revision else ""
    base = below.name if below.on_hub else f"PATH/TO/{below.name}"
    if shipped:
        yield f"It needs the policy after SFT, which lies in `{BESIDE}/`, and no other model.\n"
        base = f"FOLDER/{BESIDE}"
    elif config.sft is not None:
        yield f"It needs `{below.name}`{at}, before SFT: it does what SFT did, too.\n"
    else:
        yield f"It needs `{below.name}`{at}.\n"
    revision = f', revision="{below.revision}"' if below.revision else ""
    yield _LOADS.format(base=base, revision=revision)
    if below.sha256:
        yield f"`{below.name}` is the model whose files have these SHA-256:\n"
        yield "\n".join(f"- `{file}`: `{digest}`" for file, digest in below.sha256.items()) + "\n"


_LOADS = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}"{revision})
model = PeftModel.from_pretrained(base, "FOLDER")  # this folder
```
"""


def _provenance(
    config: Config, arm: str, figures: Figures, policy: Identity
) -> Iterator[tuple[str, str]]:
    given = config.policy
    assert given is not None, "an aligned arm has a policy"
    yield "base model", _model(given, policy)
    yield "data", ", ".join(public_name(path) for path in _data(config))
    yield "pairs trained on", f"{at(figures, 'pairs')}"
    yield from labels_and_weights(config, arm, figures)


def labels_and_weights(config: Config, arm: str, figures: Figures) -> Iterator[tuple[str, str]]:
    """Who chose the better answer of an arm's pairs, and how much each counts."""
    preset = config.arm(arm)
    people = "people on the labelled part, elsewhere " if preset.with_human else ""
    yield "labels of", people + _WHOSE[preset.labels]
    if preset.labels == "own":
        yield "weight of a pair", _weight(config, arm)
        yield "mean weight", _mean_weight(figures)
    if preset.labels == "annotator" or preset.judged is not None:
        yield "annotator", _annotators(config, preset)
        yield "weight of a pair", _weight(config, arm)
        yield "mean weight", _mean_weight(figures)


def _annotators(config: Config, preset: Arm) -> str:
    ready = [_model(model) for _, model in config.annotate.ready()]
    weak = [_model(config.weak)] if config.weak is not None else []
    own = ["the data's own numbers"] if preset.with_own else []
    return ", ".join([*(ready or weak), *own])


def _model(model: ModelConfig, known: Identity | None = None) -> str:
    known = known or identify(model)
    revision = f" at {known.revision}" if known.revision else ""
    layers = f", first {model.num_hidden_layers} layers" if model.num_hidden_layers else ""
    return f"{known.name}{revision}{layers}"


def _weight(config: Config, arm: str) -> str:
    preset, user = config.arm(arm), config.weigh
    if preset.judged is not None:
        return WEIGHTS_OF_JUDGED[preset.weight_function]
    if preset.soft_labels:
        return "1, with the annotator's probability as a soft label"
    name: str = preset.weight_function
    if name != "one" and user.weight_function is not None:
        name = user.weight_function
    normalised = config.align.weight_normalization or preset.weight_normalization
    how = "drawn in proportion to it" if preset.sampling else f"normalised by {normalised}"
    if preset.labels == "own" and name == "confidence":
        return f"the data's own, or `confidence` of their own scores, {how}"
    people = "1 where people decided, else " if preset.with_human else ""
    return f"{people}`{name}` of the margin, {how}"


def _mean_weight(figures: Figures) -> str:
    """Of the weights before they are normalised; which of both acted is said beside it."""
    mean = f"{at(figures, 'mean_weight') or 0:.3f}"
    divisor = at(figures, "weigh", "weights_divided_by")
    return mean if divisor is None else f"{mean}, by which the weights that acted are divided"


def _recipe(config: Config, arm: str) -> Iterator[tuple[str, str]]:
    align = config.align
    yield "arm", f"`{arm}`"
    own = "" if align.beta_column is None else f" times the pair's `{align.beta_column}`"
    yield "loss", f"`{align.loss_type}`, β {align.beta:g}{own}"
    for name in ("label_smoothing", "simpo_gamma", "ropo_alpha", "dr_dpo_beta"):
        if getattr(align, name) is not None:
            yield name, f"{getattr(align, name):g}"
    if align.sft_coefficient:
        yield "sft_coefficient", f"{align.sft_coefficient:g}"
    yield "learning rate", f"{align.learning_rate:g}, {align.lr_scheduler_type}"
    yield "length", _length(align)
    yield "global batch", _batch(align)
    yield "parameters", _parameters(align)
    yield "SFT before", "no" if config.sft is None else _length(config.sft)
    yield "seed", str(config.seed)


def _parameters(training: TrainingConfig) -> str:
    lora = training.lora
    return "all" if lora is None else f"LoRA, r {lora.r}, α {lora.lora_alpha}"


def _batch(section: PairsConfig) -> str:
    by = "" if section.batch_by == "pair" else ", those of a prompt together"
    return f"{section.global_batch_size} pairs{by}"


def _length(training: TrainingConfig) -> str:
    steps, epochs = training.max_steps, training.num_train_epochs
    return f"{steps} steps" if steps > 0 else f"{epochs:g} epoch{'s' * (epochs != 1)}"


def _figures(config: Config, figures: Figures) -> Iterator[tuple[str, str]]:
    for path, title in TITLES.items():
        found = at(figures, *path)
        if found and found.get("accuracy") is not None:
            yield title, _share(found)
    for baseline in at(figures, "gra") or {}:
        yield f"gold reward accuracy against {baseline.replace('_', ' ')}", _gra(figures, baseline)
    last = (at(figures, "curves", "align") or [{}])[-1]
    if "loss" in last:
        yield "training loss at the end", f"{last['loss']:.4f}"
    yield "judged on", f"split `{config.evaluate.split}`"


def _gra(figures: Figures, baseline: str) -> str:
    """With the prompts that it is not of; older runs have not counted them. A tie is a loss."""
    found = at(figures, "gra", baseline)
    told = "of no prompt" if found["accuracy"] is None else _of(found, found["n"])
    if left_out := at(found, "left_out", "prompts"):
        told += f"; {left_out:,} prompts left out, as gold could not read their answers"
    return told


def _share(found: Figures) -> str:
    """Of the decided pairs."""
    tied = at(found, "ties") or 0
    return _of(found, found["n"] - tied) + (f"; {ties(tied)} apart" if tied else "")


def _of(found: Figures, n: int) -> str:
    low, high = found["low"], found["high"]
    return f"{found['accuracy']:.1%} of {n} (95 % interval {low:.1%}–{high:.1%})"


def table(title: str, rows: Iterable[tuple[object, object]]) -> Iterator[str]:
    """A heading and a table of two columns; nothing where there are no rows."""
    lines = [f"| {name} | {value} |" for name, value in rows]
    if lines:
        yield "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""])
