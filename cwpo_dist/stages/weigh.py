"""pairs, scores → preferences: who won, by what margin, how confidently, with what weight.

Each shard is a Ray task that decides alone (`runs/weighed_shards.py`). What a pair's weight needs
to know of all others is found in passes of their own where it is asked for: the fitted temperature,
the pair that is kept of a prompt whose pairs lie in several shards, the last pair of the top share,
and the mean weight.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from cwpo_dist.config import ConfigError
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.labels import LabelSource
from cwpo_dist.pairs.numbers import Own
from cwpo_dist.pairs.records import prompt_of, rows_of
from cwpo_dist.runs.annotations import (
    annotated,
    decided_pairs,
    gather,
    kept_pairs,
    label_source,
    own_kind,
)
from cwpo_dist.runs.arms import ArmRun, Chooser, Weighting, weighting
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings, scored
from cwpo_dist.runs.own_numbers import OwnNumbersError, void_fault
from cwpo_dist.runs.stage import Stage, Work
from cwpo_dist.runs.weighed_shards import (
    CONFIDENCES,
    ENDS,
    WEIGHTS,
    WRITTEN,
    Furthest,
    Weighing,
    Written,
)
from cwpo_dist.storage import StorageError
from cwpo_dist.weighting import Selection, last_of_top

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeighSettings(Settings):
    """What `weigh` is told.

    Attributes:
        weighting: who chooses, and what becomes of margins.
        messages: whether text is written as the messages that the policy's template gets of it.
        most_void: the share of the data's own numbers that may be of no use
            (`prepare.max_reject_fraction`).
    """

    stage = "weigh"
    format = 5

    weighting: Weighting
    messages: bool
    most_void: float = field(metadata=BESIDE_KEY)


def chooser_of(node: Node) -> Chooser:
    """Who chose in an output of `weigh`."""
    assert isinstance(node.settings, WeighSettings), f"{node.path} is no output of `weigh`"
    return node.settings.weighting.chooser


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """The arm's preferences."""
    config = run.config
    # Text is prompt + answer under 'plain' alone; every other template gets it as messages.
    messages = config.policy is None or config.policy.chat_template != "plain"
    how, most = weighting(config, run.arm), config.prepare.max_reject_fraction
    read = {"prepare": given["prepare"]} | scored(given)
    return {"weigh": Node(WeighSettings(how, messages, most), read)}


def work(context: Context, node: Node[WeighSettings], counted: Census) -> Work:
    """All pairs whose better answer somebody knows."""
    how = node.settings.weighting
    decided, kept = decided_pairs(how.chooser, counted), kept_pairs(how, counted)
    text = f"{decided:,} pairs" + (f", of which {kept:,} are kept" if kept < decided else "")
    pairs = counted.pairs(*how.chooser.splits)
    return Work(text, pairs if how.pairing == "given" else kept, "pairs")


def make(context: Context, node: Node[WeighSettings]) -> Mapping[str, object]:
    """Writes `preferences/part-*.parquet` (TRL's names) and returns the counts.

    Raises:
        ConfigError: where the sources have answers alone, and no pair to weigh.
        OwnNumbersError: where the data's own numbers are asked for and hardly any can be used.
    """
    how, chooser = node.settings.weighting, node.settings.weighting.chooser
    prepared = context.counts(node.inputs["prepare"])
    if not prepared["pairs"]:
        raise ConfigError(
            "prepare.pairing: no prompt has two responses that make a pair, so that there is "
            "nothing to weigh; give more responses, or another pairing"
        )
    own = own_kind(context, node, chooser)
    if own is not None:
        _check_own(context, node, own)
    read = annotated(context, node, chooser)
    weighing = Weighing(
        annotated=read,
        output=context.place(node),
        labels=label_source(context, node, chooser),
        own=chooser.labels == "own",
        splits=chooser.splits,
        weight_function=how.weight_function,
        kind=prepared["kind"],
        message_keys=tuple(prepared["message_keys"]),
        messages=node.settings.messages,
        pairing=how.pairing,
    )
    if how.pairing == "best_worst":
        weighing = replace(weighing, elsewhere=_across_shards(weighing))
    selection = Selection(_last(weighing, how.top_fraction), how.min_confidence)
    if how.divided_by_mean:
        weighing = replace(weighing, divisor=_mean_weight(weighing, selection))
    return _summary(_write(weighing, selection), weighing)


def _check_own(context: Context, node: Node[WeighSettings], own: Own) -> None:
    """Refuses what `plan` refuses, by what `prepare` counted.

    Raises:
        OwnNumbersError: where too many of them cannot be used.
    """
    counts, most = context.counts(node.inputs["prepare"]), node.settings.most_void
    fault = void_fault(own, counts["void_numbers"], counts["rows_in"], most)
    if fault is not None:
        raise OwnNumbersError(fault)


def _across_shards(weighing: Weighing) -> dict[str, str]:
    """The pair that is kept of each prompt whose pairs may lie in several shards, by the prompt."""
    found = gather(weighing.at_the_ends, weighing.annotated.shards, ENDS)
    ends = zip(*(found[name].to_pylist() for name in ENDS.names), strict=True)
    best: dict[str, Furthest] = {}
    for furthest in sorted(ends, reverse=True):  # the least last
        best[prompt_of(furthest[1])] = furthest
    return {prompt: pair_id for prompt, (_, pair_id) in best.items()}


def _mean_weight(weighing: Weighing, selection: Selection) -> float:
    """Of all preferences; 1 where there is no weight at all, which training refuses."""
    found = gather(partial(weighing.weights, selection), weighing.annotated.shards, WEIGHTS)
    found = found.sort_by("shard")  # so that the sum repeats to the bit
    pairs = sum(found["pairs"].to_pylist())
    return math.fsum(found["weight"].to_pylist()) / max(1, pairs) or 1.0


def _last(weighing: Weighing, top_fraction: float | None) -> tuple[float, str] | None:
    """The last pair of the top share.

    The driver holds 8 bytes of confidence and 36 of id a pair, and the confidences twice more
    while it looks for the last: 60 MB a million pairs. Measured at 1,000,448 pairs of two
    annotators, temperatures fitted: it grew by 98 MiB, Ray's own buffers among them.
    """
    if top_fraction is None:
        return None
    found = gather(weighing.confidences, weighing.annotated.shards, CONFIDENCES)
    confidences = found["confidence"].to_numpy()
    return last_of_top(confidences, found["pair_id"], top_fraction)


def _write(weighing: Weighing, selection: Selection) -> Counter[str]:
    """Writes every shard's preferences and returns the sums of their counts.

    Raises:
        StorageError: when storage refuses a write.
    """
    found = gather(partial(weighing.write, selection), weighing.annotated.shards, WRITTEN)
    totals: Counter[str] = Counter()
    for written in sorted(rows_of(Written, found)):  # by shard, so that sums repeat to the bit
        if written.refused:
            raise StorageError(written.refused)
        totals.update(json.loads(written.counts))
    return totals


def _summary(totals: Counter[str], weighing: Weighing) -> Mapping[str, object]:
    """The counts of the manifest; what only few arms have is there for them alone.

    Counts:
        pairs: those whose better answer somebody knows.
        selected: those that were written: preferences.
        ties: pairs with a margin of 0.
        mean_confidence: mean C of the pairs with a margin.
        mean_weight: mean weight of the preferences.
        weights_divided_by: the mean that the weights were divided by.
        temperatures: what each annotator's margins were divided by.
        ensemble: of several annotators: how many, pairs that some did not score (`partial`) or one
            alone did (`alone`), on which they differ (`contested`), and their mean disagreement.
        without_numbers, against_labels: of the data's own numbers, pairs that have none, and those
            whose scores prefer another answer than the label.
        unjudged, denied, dropped: of people's labels that annotators judge, those that none could,
            those that most deny, and those left out for it.
    """
    scored, selected, read = totals["scored"], totals["selected"], weighing.annotated
    counts: dict[str, object] = {
        "pairs": totals["pairs"],
        "selected": selected,
        "ties": totals["ties"],
        "mean_confidence": totals["confidence"] / scored if scored else None,
        "mean_weight": totals["weight"] / selected if selected else None,
    }
    if weighing.divisor != 1.0:
        counts["weights_divided_by"] = weighing.divisor
    if weighing.own:
        counts |= {"without_numbers": totals["without"], "against_labels": totals["against"]}
        _tell_own(totals, weighing.labels)
    counts |= _of_judged(totals, weighing.labels)
    if not scored or not read.scores:
        return counts
    counts["temperatures"] = [temperature * read.scale.joint for temperature in read.scale.members]
    if len(read.scores) > 1:
        counts["ensemble"] = {
            "annotators": len(read.scores),
            "partial": totals["partial"],
            "alone": totals["alone"],
            "contested": totals["contested"],
            "mean_disagreement": totals["disagreement"] / scored,
        }
    return counts


def _of_judged(totals: Counter[str], labels: LabelSource) -> Mapping[str, object]:
    """What annotators say of people's labels, which is told; nothing where they judge none."""
    if labels not in {"weighed", "cleaned"}:
        return {}
    logger.info(
        "weigh: of %d labels of people most annotators deny %d, whose pairs are %s; %d pairs that "
        "they could not score are left out",
        *(totals["pairs"] + totals["dropped"], totals["denied"]),
        *("dropped" if labels == "cleaned" else "kept", totals["unjudged"]),
    )
    return {name: totals[name] for name in ("unjudged", "denied", "dropped")}


def _tell_own(totals: Counter[str], labels: LabelSource) -> None:
    """What of the data's own numbers a reader should look at.

    Raises:
        OwnNumbersError: where no pair can be weighed by them.
    """
    without, pairs, against = totals["without"], totals["pairs"], totals["against"]
    if not pairs:
        what = "scores" if labels == "annotator" else f"a {labels} with a label that it is about"
        raise OwnNumbersError(
            f"weigh: none of {without} training pairs has {what}; see `cwpo plan`"
        )
    if without:
        logger.warning(
            "weigh: %d of %d training pairs have no number of their own that can be used, and are "
            "left out",
            *(without, without + pairs),
        )
    if against:
        logger.warning(
            "weigh: of %d of %d pairs the data's own scores prefer another answer than the label; "
            "the scores count",
            *(against, pairs),
        )


STAGE = Stage(WeighSettings, nodes, make, work)
