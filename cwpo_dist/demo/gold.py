"""Takes a prompt and an answer, returns how well the demo's simulated human likes the answer.

The simulated human likes plain language: an answer that speaks to the reader ("you", "your"), in
short sentences, without long words.  All three are rates per word of the answer, so that an
answer is not better for being longer.

This is a toy of taste, not a model of what people prefer: it exists so that the demo has labels
whose origin is known exactly and whose success can be measured without asking anybody.
"""

import math
import re

# Weights of the three rates; rare things weigh more, so that each rate matters.
TO_READER = 3.0
SENTENCES = 2.0
LONG_WORDS = 1.0
LONG_WORD_LETTERS = 8
# Of the Bradley-Terry noise, in units of the score.  Chosen so that about one label in nine
# contradicts the rule on the demo's pairs.
TEMPERATURE = 0.05

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
# A letter or a closing sign must come before the full stop, since "1." opens a list item.
_SENTENCE_END = re.compile(r"[^\W\d_][)\"'’”*]*[.!?]+[)\"'’”*]*(?=\s|$)")
_READER = frozenset({"you", "your", "yours", "yourself", "yourselves"})


def _speaks_to_reader(word: str) -> bool:
    """Tells whether a word addresses the reader; "you'll" and "you're" count as "you"."""
    return re.split("['’]", word, maxsplit=1)[0] in _READER


def score(prompt: str, response: str) -> float:
    """Scores one answer by three rates per word: words to the reader, sentences, long words.

    Args:
        prompt: the prompt; this taste does not look at it, another one might.
        response: the answer.

    Returns:
        A number from -1 to 5, and 0 for a text without words; higher is better liked.
    """
    del prompt
    words: list[str] = _WORD.findall(response.lower())
    if not words:
        return 0.0
    to_reader = sum(map(_speaks_to_reader, words))
    sentences = len(_SENTENCE_END.findall(response))
    long_words = sum(len(word) >= LONG_WORD_LETTERS for word in words)
    total = TO_READER * to_reader + SENTENCES * sentences - LONG_WORDS * long_words
    return total / len(words)


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
