"""A run's metrics in; what it says of its annotators and arms, in a few sentences, out.

What a reader asks first: is the annotator better than a coin and than length, does its confidence
tell where it is right, which arm is ahead and by how much, and what is not decided.
"""

from __future__ import annotations

from collections.abc import Iterator

from cwpo_dist.report.cells import Metrics, arm_items, at, interval, share, written
from cwpo_dist.report.figures import Estimate, Share
from cwpo_dist.report.outcomes import Verdict, verdicts
from cwpo_dist.report.summary import annotators, held_out

_BY_GOLD, _BY_LABELS = "gra_common", "accuracy"  # of a comparison's figures


def of_annotators(metrics: Metrics) -> list[str]:
    """What is said of each annotator, a sentence each."""
    return [line for name, record in annotators(metrics) for line in _of_one(name, record, metrics)]


def of_arms(metrics: Metrics) -> tuple[list[Verdict], list[Verdict]]:
    """Arms held against each other: by the gold reward, else by labels; and by other figures."""
    told = verdicts(_in_order(metrics)) if at(metrics, "differences") else []
    by_gold = any(verdict.figure == _BY_GOLD for verdict in told)
    first = [each for each in told if each.figure == (_BY_GOLD if by_gold else _BY_LABELS)]
    return first, [each for each in told if each not in first]


def _in_order(metrics: Metrics) -> Metrics:
    """The differences with arms in the order of the run, which JSON does not keep."""
    found = metrics["differences"]
    arms = [name for name, _ in arm_items(metrics)]
    return {
        **found,
        "trials": {name: found["trials"][name] for name in arms if name in found["trials"]},
    }


def _of_one(name: str, record: Metrics, metrics: Metrics) -> Iterator[str]:
    right = Share.of(at(record, "agreement"))
    if right is None or right.low is None or right.high is None:
        return
    cell = share(at(record, "agreement"))
    above, sure = (Estimate.of(at(record, key)) for key in ("above_length", "sure_half"))
    yield (
        f"{name}: right in {cell.text} of {held_out(metrics)} ({cell.details[0]}), "
        f"{_told(right.low - 0.5, right.high - 0.5, 'chance')}{_than_length(above)}"
    )
    if sure is not None and sure.value is not None:
        yield f"{name}: {_sure(sure)}"


def _told(low: float, high: float, rival: str) -> str:
    if low > 0:
        return f"better than {rival}"
    return f"worse than {rival}" if high < 0 else f"not told from {rival}"


def _than_length(above: Estimate | None) -> str:
    """Beside the rule that the longer answer is the better one."""
    if above is None or above.value is None or above.low is None or above.high is None:
        return ""
    return f"; {_told(above.low, above.high, 'length alone')}, {_points(above)}"


def _sure(found: Estimate) -> str:
    """Whether confidence tells where it is right, by the halves of more and of less confidence."""
    low, high = found.low or 0.0, found.high or 0.0
    where = f"{_points(found)} from its less to its more confident half"
    if low > 0:
        return f"its confidence tells where it is right, {where}"
    if high < 0:
        return f"it is right LESS often where it is confident, {where}"
    return f"not decided whether its confidence tells where it is right, {where}"


def _points(found: Estimate) -> str:
    assert found.value is not None, "it is shown"
    text = f"{written(100 * found.value, '+.1f')} points"
    if found.low is None or found.high is None:
        return text
    return f"{text} ({interval(100 * found.low, 100 * found.high, '+.1f')})"
