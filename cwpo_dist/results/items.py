"""What `evaluate` left of arms in; each figure item by item, and arms held against each other, out.

An item is a held-out pair, or a prompt that was answered: arms are compared on those of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from cwpo_dist.evaluation.paired import Items, length_balanced, paired
from cwpo_dist.evaluation.prediction_powered import powered
from cwpo_dist.evaluation.shares import group_numbers
from cwpo_dist.pairs.records import prompt_of, read_rows
from cwpo_dist.runs.agreed import AGREED, AGREED_SCHEMA, Agreed
from cwpo_dist.runs.judged_answers import JUDGED_SCHEMA, JudgedAnswer
from cwpo_dist.stages.evaluate import (
    ANSWERS,
    BASELINES,
    ITEM_SCHEMA,
    ITEMS,
    MeasuredPair,
)
from cwpo_dist.storage import Store

BySeed = Mapping[str, Mapping[int, Items]]  # figure → seed → its items


def differences(evaluated: Mapping[str, Store]) -> dict[str, object] | None:
    """The arms of one run held against each other, first all against people's labels.

    Args:
        evaluated: by arm, what `evaluate` left.

    Returns:
        What a comparison of several seeds holds of its trials, of one; None for a single arm.
    """
    if len(evaluated) < 2:
        return None
    items = {
        arm: {figure: {0: of} for figure, of in by_item(store)} for arm, store in evaluated.items()
    }
    trials = {
        arm: {"arm": arm, "against": {o: against(ours, items[o]) for o in items if o != arm}}
        for arm, ours in items.items()
    }
    return {"baseline": "human" if "human" in items else next(iter(items)), "trials": trials}


def against(ours: BySeed, theirs: BySeed, n_looks: int = 1) -> dict[str, object]:
    """Each figure that both have: the mean difference, paired by seed and item.

    Its p counts how often one looked before a trial was stopped.
    """
    found = {k: paired(v, theirs[k]) for k, v in ours.items() if k in theirs}
    return {
        k: replace(v, p=None if v.p is None else min(1.0, n_looks * v.p)).as_dict()
        for k, v in found.items()
    }


def with_gold(evaluated: Sequence[Store]) -> dict[str, dict[str, object]]:
    """How often annotator and policy agree with people: by people, by gold, and by both.

    A tie, of people's too, is a half.

    Args:
        evaluated: what `evaluate` left of an arm, seed by seed; a seed's pairs are added to those
            of the others.

    Returns:
        `annotator` and `policy`, each a `Powered`, and under `unread` how many pairs it is not of,
        as gold could not read them; nothing where gold knows no more than people.
    """
    left = [store for store in evaluated if store.exists(AGREED)]
    pairs = [row for store in left for row in read_rows(store, AGREED, Agreed, AGREED_SCHEMA)]
    found = {}
    for of in sorted({pair.of for pair in pairs}):
        every = [pair for pair in pairs if pair.of == of]
        some = [pair for pair in every if pair.gold is not None]
        people = np.array([pair.people for pair in some], dtype=np.float64)  # NaN where null
        gold = np.array([pair.gold for pair in some], dtype=np.float64)
        groups = group_numbers([prompt_of(pair.pair_id) for pair in some], len(some))
        if some:
            unread = {"unread": len(every) - len(some)}
            found[of] = powered(people, gold, groups).as_dict() | unread
    return found


def by_item(store: Store) -> Iterator[tuple[str, Items]]:
    """What is known item by item: a tie counts a half, but in GRA, where it counts as a loss."""
    pairs = read_rows(store, ITEMS, MeasuredPair, ITEM_SCHEMA)
    accuracy = _of(pairs, [(1 + np.sign(pair.margin)) / 2 for pair in pairs])
    yield "accuracy", accuracy
    longer_by = np.array([pair.longer_by for pair in pairs])
    yield "length_balanced", length_balanced(accuracy, longer_by)
    if not store.exists(ANSWERS):
        return
    answers = read_rows(store, ANSWERS, JudgedAnswer, JUDGED_SCHEMA)
    for name in BASELINES:
        yield from _judged(name, [answer for answer in answers if answer.against == name])


def _judged(name: str, rows: Sequence[JudgedAnswer]) -> Iterator[tuple[str, Items]]:
    """Figures of answers held against those of one baseline."""
    if name == "common":
        yield "length", _of(rows, [row.length for row in rows])
    if scored := [row for row in rows if row.gold is not None]:
        ours = np.array([row.gold for row in scored], dtype=np.float64)
        theirs = np.array([row.baseline_gold for row in scored], dtype=np.float64)
        yield f"gra_{name}", _of(scored, ours > theirs)
        yield f"ties_{name}", _of(scored, ours == theirs)


def _of(rows: Sequence[MeasuredPair] | Sequence[JudgedAnswer], values: ArrayLike) -> Items:
    return Items(
        [row.pair_id for row in rows],
        [row.prompt for row in rows],
        np.array(values, dtype=np.float64),
    )
