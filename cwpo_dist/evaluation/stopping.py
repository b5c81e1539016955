"""A trial's difference from the baseline after some of its seeds in; whether it has lost, out.

How many seeds there will be at most is known from the start, and so is how often one looks. Each
look is a test at the level divided by the number of looks (Bonferroni), so that a trial that is not
worse is stopped wrongly in at most 2.5 % of comparisons, by whatever the interval of `paired` is
right about. Rules for any number of looks (betting, Waudby-Smith and Ramdas 2024; the mixture t
test, Wang and Ramdas 2025) stop less often where seeds are five or ten: see BENCHMARKS.md.
"""

from __future__ import annotations

from cwpo_dist.evaluation.paired import Mean

FIRST_LOOK = 3  # seeds: two say next to nothing of the spread between seeds
LEVEL = 0.05  # two-sided, of which half is on the losing side


def looks(seeds: int) -> range:
    """After how many seeds one looks; not after the last, when nothing is left to save."""
    return range(FIRST_LOOK, seeds)


def lost(difference: Mean, seeds: int) -> bool:
    """Whether a trial is stopped.

    Args:
        difference: the trial's mean less the baseline's, over the seeds so far.
        seeds: how many each trial has at most.
    """
    if difference.mean is None or difference.p is None:
        return False
    return difference.mean < 0 and len(looks(seeds)) * difference.p <= LEVEL
