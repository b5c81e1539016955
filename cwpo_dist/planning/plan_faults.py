"""What a run would find in its sources, and what models make of it, in; its end foreseen, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cwpo_dist.config import Config, ModelConfig
from cwpo_dist.pairs.counted_rows import Standing
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.kept_columns import is_above_zero
from cwpo_dist.pairs.pieces import damage_fault
from cwpo_dist.pairs.sources import MAP_LABELS
from cwpo_dist.planning.costs import Estimate
from cwpo_dist.planning.label_faults import label_faults
from cwpo_dist.planning.sampled import SampleRead
from cwpo_dist.planning.sampled_answers import answer_faults
from cwpo_dist.runs.arms import held_out_split, judged_arms, needs_annotator
from cwpo_dist.runs.checks import models, reached, trainings
from cwpo_dist.runs.own_checks import own_counts_faults
from cwpo_dist.runs.own_numbers import chosen

_GOLD = "evaluate.gold_model"


def until_of(config: Config) -> str | None:
    """Without a policy, labelling is the whole of the run; without any model, preparing."""
    if config.policy is not None:
        return None
    if needs_annotator(config):
        return "annotate" if config.weak or config.annotate.ready() else "prepare"
    return "weigh"


def run_faults(estimate: Estimate, read: Mapping[str, SampleRead]) -> Iterator[str]:
    """Stages that would find no pair, or too many rows that are none."""
    config, counted = estimate.config, estimate.counted
    yield from _set_aside(counted, config.prepare.max_reject_fraction)
    for name, model, _ in models(config, until_of(config)):
        yield from _unread(config, counted, name, model, read[name])
    names = {name for name, *_ in trainings(config, until_of(config))}
    if "fit" in names and counted.lacks("labelled"):
        yield (
            f"prepare.labelled_fraction: {config.prepare.labelled_fraction:g} leaves no labelled "
            f"pair to fit an annotator on; {_labels_remedy(counted)}, or give annotate.model"
        )
    if "fit" in names and judged_arms(config) and counted.prompts_of("labelled") == 1:
        yield (
            f"fit.folds: {config.fit.folds}, but the labelled part has one prompt, and no other to "
            "learn from who judges its labels; raise prepare.labelled_fraction, or give "
            "annotate.model"
        )
    yield from _without_answers(config, counted)
    yield from _without_pairs(config, counted)
    yield from answer_faults(config, read)
    yield from _beta_faults(config, counted)
    yield from label_faults(config, counted, until_of(config))
    if until_of(config) in {None, "weigh"}:
        yield from own_counts_faults(config, counted)
    yield from _empty_splits(config, counted) if config.policy is not None else ()


def _beta_faults(config: Config, counted: Census) -> Iterator[str]:
    """A column of βs in which sampled pairs that `align` reads have no number above 0."""
    column = config.align.beta_column
    if column is None or config.policy is None:
        return
    where = zip(counted.sample, counted.standing, strict=True)
    values = [pair.kept.get(column) for pair, at in where if at and _aligns(config, counted, at)]
    if bad := [value for value in values if not is_above_zero(value)]:
        yield (
            f"align.beta_column: {column!r} is {bad[0]!r} in a pair, and no number above 0 in "
            f"{len(bad)} of {len(values)} that were looked at; β is multiplied by it: correct "
            "these rows, or leave them out"
        )


def _aligns(config: Config, counted: Census, at: Standing) -> bool:
    """Whether `align` of some arm reads a pair: to train on, or to follow that by its label."""
    followed = config.align.eval_steps is not None and at.labelled
    if followed and at.split == held_out_split(config):
        return True
    return any(_trains_on(config, counted, arm, at) for arm in _arms(config))


def _trains_on(config: Config, counted: Census, name: str, at: Standing) -> bool:
    """Whether somebody says which answer of a pair is the better one, for an arm that has it."""
    arm = config.arm(name)
    if at.split not in arm.splits:
        return False
    if arm.labels == "own":
        return chosen(config.weigh.column, counted.own) in at.own
    return arm.labels != "human" or at.labelled


def _arms(config: Config) -> list[str]:
    """Those of a run; of a trial its own, which stands first."""
    return config.arms[:1] if config.compare else config.arms


def _set_aside(counted: Census, most: float) -> Iterator[str]:
    """Rows, responses in lists or files that are bad, of which more than this share are."""
    if counted.made:  # and the share is not asked for again
        return
    if fault := counted.row_fault(most):
        yield f"{fault}\n  fix them (`cwpo prepare` writes each to rejects/), or raise the fraction"
    reasons = counted.of_lists.lines()
    if counted.exact and (fault := counted.lists.fault(most, reasons)):
        yield fault
    if fault := damage_fault(counted.damaged, counted.files, most):
        yield fault


def _empty_splits(config: Config, counted: Census) -> Iterator[str]:
    """A split that a run with a policy is judged on, without a pair."""
    split = config.evaluate.split
    if counted.lacks(split):
        drawn = any(source.into is None for source in config.prepare.sources)
        raised = f"raise prepare.{split}_fraction, or " if drawn else ""
        yield (f"evaluate.split: no pair is in {split!r}; {raised}give a source with into: {split}")


def _unread(
    config: Config, counted: Census, name: str, model: ModelConfig, read: SampleRead
) -> Iterator[str]:
    """A model that cannot read more than its stage may set aside, or that no pair fits."""
    field, fraction = _most_unread(config, name, read)
    whole = counted.exact and read.number >= sum(counted.splits.values()) and name != "weak"
    # A policy needs pairs; without one, what of each can be scored is what was asked for.
    alone = config.policy is None and name != "weak"
    none = read.reads_none(of_pairs=not alone)  # which no fraction allows: nothing would be left
    if none or read.exceeds(fraction, whole, of_pairs=name == "weak"):
        raising = f"fix the pairs, or raise {field} ({fraction:g})"
        more = raising if fraction < 1 else "or fix the pairs"
        yield (
            f"{name}.chat_template: {model.model_name_or_path!r} with {model.chat_template!r} "
            f"cannot read {read.refused} of {read.number} sampled pairs: {read.reasons()}. Give "
            f"another template or model, {more}"
        )
    elif name != _GOLD:  # of which `answer_faults` tells
        yield from _too_long(name, model, read, alone)


def _too_long(name: str, model: ModelConfig, read: SampleRead, alone: bool) -> Iterator[str]:
    """A model that no pair fits or, where answers stand alone, no answer."""
    what, number, fits = "pair", read.number, read.lengths.fits
    if alone:
        what, number, fits = "answer", read.answers, read.lengths.each.fits
    if number and not fits:
        yield (
            f"{name}.max_length: no sampled {what} fits {model.max_length} tokens; raise it, or "
            f"set {name}.over_length=truncate"
        )


def _most_unread(config: Config, name: str, read: SampleRead) -> tuple[str, float]:
    """The share that the stage of a model may set aside, and the field that says so."""
    if name == _GOLD:  # which reads other answers, and may leave some out
        return "prepare.max_reject_fraction", 1.0 if read.refused < read.number else 0.0
    if name.startswith("annotate."):
        return "annotate.max_reject_fraction", config.annotate.max_reject_fraction
    return "prepare.max_reject_fraction", config.prepare.max_reject_fraction


def _without_answers(config: Config, counted: Census) -> Iterator[str]:
    """An annotator that would have nothing to score, which `annotate` refuses after `fit`."""
    if not needs_annotator(config) or "annotate" not in reached(config, until_of(config)):
        return
    splits = config.annotate.scored_splits()
    answers, (alone, _) = counted.answers_of(*splits), counted.alone_of(*splits)
    if counted.begun and not answers + alone:
        share = config.prepare.labelled_fraction
        yield (
            f"annotate.splits: no answer is in {' or '.join(splits) or 'them'}, whose answers are "
            f"scored; give others, or a smaller prepare.labelled_fraction ({share:g})"
        )


def _without_pairs(config: Config, counted: Census) -> Iterator[str]:
    """Arms that would train a policy on nothing."""
    for arm in _arms(config) if config.policy is not None else []:
        preset = config.arm(arm)
        of_people = preset.labels == "human"
        lacks = counted.lacks_labels if of_people else counted.lacks
        if lacks(*preset.splits):
            splits = " and ".join(preset.splits)
            remedy = _labels_remedy(counted) if of_people else "give a smaller share"
            yield (
                f"prepare.labelled_fraction: {config.prepare.labelled_fraction:g} leaves arm "
                f"{arm!r} no pair of the {splits} part to train on; {remedy}"
            )


def _labels_remedy(counted: Census) -> str:
    """What gives a part labels: another share, unless no pair has any."""
    if not counted.labelled_pairs("labelled", "unlabelled"):
        return f"no training pair has a label: {MAP_LABELS}"
    return "give a share that does"
