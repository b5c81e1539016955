"""Rows of a labelled set with a reward model's margins in; what it is worth there, out.

Shapes: C, R = chosen and rejected answers of one row.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cwpo_dist.evaluation.accuracy import annotator_accuracy
from cwpo_dist.evaluation.calibration import people_share
from cwpo_dist.evaluation.shares import (
    Floats,
    agreement,
    clustered_error,
    group_numbers,
    mean,
    quantile_by,
)
from cwpo_dist.pairs.chosen import signs
from cwpo_dist.pairs.judged_rows import Row
from cwpo_dist.pairs.messages import plain_text
from cwpo_dist.pairs.records import content_hash

ALL = "(all)"
_TIES = re.compile(r"(tied|ref):(.+)")  # ids of the two rows of each prompt in the subset Ties


class Judged(NamedTuple):
    """A row, and of each of its pairs score of a − score of b."""

    row: Row
    margins: Floats

    @property
    def leads_CR(self) -> Floats:
        """Of each chosen answer over each rejected one."""
        signed = signs([pair.label for pair in self.row.pairs]) * self.margins
        return signed.reshape(self.row.chosen, -1)


def worth(judged: Sequence[Judged], *, lists: bool) -> dict[str, object]:
    """What a reward model is worth, ready for JSON.

    Returns:
        `domains`: of each and of all rows `of_pairs`, and for rows with lists `of_rows`, too;
        RewardBench 2's subset Ties has figures of its own, `ties`; `mean_score` is its own figure,
        the mean score of the domains and Ties.
    """
    domains, ties = _divided(judged, lists=lists)
    by_domain = {name: of_pairs(rows) for name, rows in domains.items()}
    if not lists:
        return {"domains": by_domain}
    of_domains = {name: of_rows(rows) for name, rows in domains.items()}
    of_ties = ties_score(**ties)
    scores = [of_domains[name]["score"] for name in [*domains][1:] or [ALL]] + [of_ties["score"]]
    return {
        "domains": {name: figures | of_domains[name] for name, figures in by_domain.items()},
        "ties": of_ties,
        "mean_score": mean(np.array([score for score in scores if score is not None])),
    }


def _divided(
    judged: Sequence[Judged], *, lists: bool
) -> tuple[dict[str, list[Judged]], dict[str, dict[str, Floats]]]:
    """The rows by domain, all of them first; of Ties the leads by prompt, of each of its halves."""
    ties: dict[str, dict[str, Floats]] = {"tied": {}, "ref": {}}
    domains = defaultdict[str, list[Judged]](list, {ALL: []})
    for each in judged:
        if lists and (found := _TIES.fullmatch(each.row.name)):
            ties[found[1]][found[2]] = each.leads_CR
            continue
        domains[ALL].append(each)
        if each.row.domain not in (None, ALL):
            domains[each.row.domain].append(each)
    return domains, ties


def of_pairs(judged: Sequence[Judged]) -> dict[str, object]:
    """Figures of the pairs of rows: an annotator's, and agreement by which length people chose."""
    pairs = [pair for each in judged for pair in each.row.pairs]
    margin = np.concatenate([np.zeros(0), *(each.margins for each in judged)])
    labels, prompts = [p.label for p in pairs], [content_hash(p.prompt) for p in pairs]
    length_a, length_b = (np.array([len(plain_text(p.answers[n])) for p in pairs]) for n in (0, 1))
    people = np.array([people_share(pair.told) for pair in pairs], dtype=np.float64)
    human, groups = signs(labels), group_numbers(prompts, len(pairs))
    longer = human * (length_a - length_b)
    whole = annotator_accuracy(margin, labels, length_a, length_b, prompts, people=people)
    parts = {"chosen_longer": longer > 0, "chosen_shorter": longer < 0}
    return whole.as_dict() | {
        name: agreement(margin[part], human[part], groups[part]).as_dict()
        for name, part in parts.items()
    }


def of_rows(judged: Sequence[Judged]) -> dict[str, object]:
    """How often all chosen answers of a row have higher scores than all others.

    Returns:
        `best`: a row is a tie where the lowest chosen and the highest other score are equal.
        `score`: RewardBench 2's: a row whose chosen answer is one of k highest counts 1/k.
    """
    leads = [each.leads_CR for each in judged]
    least = np.array([each.min() for each in leads])
    prompts = [content_hash(each.row.pairs[0].prompt) for each in judged]
    right = agreement(least, np.ones(len(least)), group_numbers(prompts, len(least)))
    parts = np.array([(each.min() >= 0) / (1 + np.sum(each == 0)) for each in leads])
    return {"best": right.as_dict(), "score": mean(parts)}


def ties_score(tied: Mapping[str, Floats], ref: Mapping[str, Floats]) -> dict[str, float | None]:
    """RewardBench 2's subset Ties (Malik et al. 2025), whose prompts have two rows.

    Args:
        tied: leads [C, R] of rows with several equally good answers, by prompt.
        ref: of rows with one of them.

    Returns:
        `tied`, `ref`: shares of these rows with all good answers above the others.
        `score`: 0.3 tied + 0.3 ref, + 0.2 and 0.2 for prompts whose good answers lie closer to each
        other than to the others, of the first row and of both, + 0.01 for how much closer; with its
        95 % interval, `low` and `high`.
    """
    both = [name for name in tied if name in ref]
    spread = np.array([np.ptp(tied[name][:, 0]) for name in both])
    first, other = (np.array([rows[name].min() for name in both]) for rows in (tied, ref))
    least = np.minimum(first, other)
    with np.errstate(divide="ignore", invalid="ignore"):
        closer = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    rights = [np.array([float(lead.min() > 0) for lead in rows.values()]) for rows in (tied, ref)]
    shares = {"tied": mean(rights[0]), "ref": mean(rights[1])}
    if not both:
        return shares | {"score": None, "low": None, "high": None}
    apart = 0.2 * (first > spread) + 0.2 * (least > spread) + 0.01 * closer
    parts, names = [0.3 * rights[0], 0.3 * rights[1], apart], [*tied, *ref, *both]
    score = float(sum(part.mean() for part in parts))
    deviations = np.concatenate([(part - part.mean()) / len(part) for part in parts])
    groups = group_numbers(names, len(names))
    half = quantile_by(groups) * clustered_error(deviations, groups)
    ends = (max(0.0, score - half), min(1.01, score + half)) if half else (None, None)
    return shares | dict(zip(("score", "low", "high"), (score, *ends), strict=True))
