"""The user's gold function by its name in, a checked score of an answer out."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cwpo_dist.canonical import digest
from cwpo_dist.config import ConfigError

FIELD = "evaluate.gold_function"


class GoldError(ValueError):
    """A gold function returned no finite number; the message names it and what it returned."""


@dataclass(frozen=True)
class GoldFunction:
    """A user's rule that scores an answer, checked at every call.

    Attributes:
        name: 'package.module:function', as configured.
        function: (prompt text, answer text) → score; higher is better.
    """

    name: str
    function: Callable[[str, str], object]

    def __call__(self, prompt: str, answer: str) -> float:
        """The score of one answer.

        Raises:
            GoldError: where the function returns anything but a finite number.
        """
        value = self.function(prompt, answer)
        if not isinstance(value, int | float | np.number) or not math.isfinite(float(value)):
            raise GoldError(
                f"{FIELD}: {self.name!r} returned {value!r}; it must return a finite number"
            )
        return float(value)

    def source_digest(self) -> str | None:
        """What identifies the rule as it is now: its module's source; None where it has none."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self.function))
        except TypeError:  # a built-in, or an object of a class
            return None
        return None if file is None else digest(Path(file).read_text(encoding="utf-8"))


def load_function(name: str) -> GoldFunction:
    """Loads `package.module:function`.

    Raises:
        ConfigError: where the name has another form, or leads to nothing that can be called.
    """
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute):
        raise ConfigError(
            f"{FIELD}: {name!r} is not a function's name; write package.module:function"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{FIELD}: {name!r} cannot be imported ({error}); install the package, or put its "
            "folder on PYTHONPATH of every node"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(
            f"{FIELD}: {name!r}: module {module_name!r} has no function {attribute!r}; "
            "give one that takes (prompt, answer) and returns a number"
        )
    return GoldFunction(name, function)
