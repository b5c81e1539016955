"""Text that others wrote in; the same as a terminal may be given it out."""

from __future__ import annotations

# All control characters but tab and line feed: with these a file's name, or a row, could wipe out
# what stands on a terminal and write something else in its place.
_SPELLED = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def harmless(text: str) -> str:
    """The text, its control characters spelled out."""
    return text.translate(_SPELLED)
