"""Takes a prompt and an answer, returns how well the demo's simulated human likes the answer.

The simulated human likes answers that speak to the reader ("you", "your") and that use short,
plain words.  Both are shares of the answer's words, so a longer answer is not a better one.

This is a toy of taste, not a model of what people prefer: it exists so that the demo has labels
whose origin is known exactly and whose success can be measured without asking anybody.
"""

import math
import re

# Weight of one unit of share: a tenth more words to the reader counts as much as a tenth fewer
# long words times the ratio of the two.
WARMTH = 2.0
PLAINNESS = 1.0
LONG_WORD = 8
# Chosen so that about one label in nine contradicts the rule on the demo's pairs.
TEMPERATURE = 0.05

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_TO_READER = frozenset({"you", "your", "yours", "yourself", "yourselves"})


def _words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without digits and punctuation."""
    return _WORD.findall(text.lower())


def _speaks_to_reader(word: str) -> bool:
    """Tells whether a word addresses the reader; "you'll" and "you're" count as "you"."""
    return re.split("['’]", word, maxsplit=1)[0] in _TO_READER


def score(prompt: str, response: str) -> float:
    """Scores one answer: share of words to the reader (doubled) minus share of long words.

    Args:
        prompt: the prompt; this taste does not look at it, others may.
        response: the answer.

    Returns:
        A number from -1 (only long words) to 2 (only "you"); 0 for a text without words.
    """
    del prompt
    words = _words(response)
    if not words:
        return 0.0
    warm = sum(map(_speaks_to_reader, words)) / len(words)
    long = sum(len(word) >= LONG_WORD for word in words) / len(words)
    return WARMTH * warm - PLAINNESS * long


def probability(prompt: str, a: str, b: str) -> float:
    """Gives the Bradley-Terry probability that the simulated human prefers answer a.

    Args:
        prompt: the prompt of both answers.
        a: one answer.
        b: the other answer.

    Returns:
        A number from 0 to 1, one half for two answers of equal score.
    """
    margin = (score(prompt, a) - score(prompt, b)) / TEMPERATURE
    # The hyperbolic tangent is the logistic function without its overflow.
    return 0.5 + 0.5 * math.tanh(margin / 2)
