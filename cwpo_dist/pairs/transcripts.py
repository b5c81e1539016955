"""A transcript in the spelling of HH in; its prompt and last answer, or its messages, out."""

from __future__ import annotations

import re

from cwpo_dist.pairs.records import Message
from cwpo_dist.pairs.rejects import BadRow, Reason

ANSWER_MARK = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: object) -> bool:
    """True for a string in the spelling of HH transcripts."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and ANSWER_MARK in value


def cut(transcript: str) -> tuple[str, str]:
    """Prompt (with the mark at its end) and answer of a transcript that stays text.

    Raises:
        BadRow: for a text whose last turn is not the assistant's.
    """
    prompt, mark, answer = transcript.rpartition(ANSWER_MARK)
    if not mark or _TURN.search(answer):
        raise BadRow(Reason.NO_ASSISTANT)
    return prompt + mark, answer


def turns(transcript: str) -> list[Message]:
    """Its messages, contents stripped.

    Raises:
        BadRow: for a text that does not begin with a turn.
    """
    start, *parts = _TURN.split("\n\n" + transcript.lstrip())
    if start.strip() or not parts:
        raise BadRow(Reason.NOT_TRANSCRIPT)
    return [
        {"role": _TURN_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
