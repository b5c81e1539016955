"""A loaded model and the tensors of its files that it has no place for in; a word about them out.

transformers passes over them with a report that nobody reads here: a bias that the architecture
lacks, a head of another kind. What the model says is then not what its author saw.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from functools import cache

from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

NAMES_SHOWN = 5
_LAYER = re.compile(r"\.(\d+)\.")


def tell_unread(
    loaded: PreTrainedModel, unread: Collection[str], layers: int | None, *, new_head: bool
) -> None:
    """Warns of tensors that are not read, but for those that were to be left out; once a process.

    Args:
        loaded: the model.
        unread: the names of tensors that it has no place for.
        layers: the first ones that were asked for; None: all.
        new_head: its head is a new one, so that others of the files are none of it.
    """
    trunk = f"{loaded.base_model_prefix}." if new_head else ""
    left = sorted(name for name in unread if name.startswith(trunk) and not _beyond(name, layers))
    if left:
        _tell(loaded.config.name_or_path, type(loaded).__name__, tuple(left))


def _beyond(name: str, layers: int | None) -> bool:
    """Whether a tensor is of a layer that was cut off."""
    of_layer = _LAYER.search(name)
    return layers is not None and of_layer is not None and int(of_layer[1]) >= layers


def shown(names: Collection[str]) -> str:
    """Some names, and how many more there are."""
    first = ", ".join(list(names)[:NAMES_SHOWN])
    return first + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


@cache
def _tell(name: str, kind: str, unread: tuple[str, ...]) -> None:
    logger.warning(
        "%s: its files have tensors that no %s has a place for, and that are not read: %s; where "
        "its author's code reads them, its numbers are others",
        *(name, kind, shown(unread)),
    )
