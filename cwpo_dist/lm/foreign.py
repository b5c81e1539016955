"""What other people's model code can raise, by class, and what it said, in one line.

transformers has hundreds of architectures, and peft reaches into each. Their code meets what its
authors did not try (tensors without memory, a mask of four dimensions, a kernel that is not
installed) and fails as Python code fails anywhere. Where that only costs an estimate or a faster
layout, or can be refused by name, these are caught, and nowhere else: `cwpo_dist`'s own code never
runs inside, and what is no fault of a model's code (no memory, an interrupt) passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,  # `'tuple' object has no attribute 'dtype'`
    ImportError,  # a kernel or an extra package
    LookupError,  # a table of a configuration without the key
    OSError,  # a file that is not there; a hub that is not
    RuntimeError,  # torch's, NotImplementedError among them
    SafetensorError,  # a file of weights that is none
    StrictDataclassError,  # a configuration that its own class refuses
    TypeError,
    ValueError,  # `too many values to unpack`
)
_LONGEST = 240  # characters of what an error said


def whole_number(config: object, name: str) -> int:
    """A field of a model's configuration that an estimate reads; 0 where there is none.

    Some configurations have it by layer, and raise when they are asked for one of all.
    """
    try:
        return int(getattr(config, name, None) or 0)
    except FOREIGN_ERRORS:
        return 0


@contextmanager
def refused_as(refusal: Callable[[str], Exception]) -> Iterator[None]:
    """What a stranger's files raise while libraries read them, as one refusal of ours.

    All is caught: tokenizers raises bare `Exception`, and its panics are not even that. What this
    package says itself, and a want of memory, passes.

    Args:
        refusal: from what was said, in one line, the error to raise.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # raised again, as it is or as a refusal
        is_panic = type(error).__name__ == "PanicException"  # of pyo3, which exports no such name
        ours = type(error).__module__.startswith("cwpo_dist.")
        if ours or not (is_panic or isinstance(error, Exception)):
            raise
        raise refusal(one_line(error)) from error


def model_fault(error: Exception) -> str:
    """What others' code said when it failed, in one line.

    Raises:
        OutOfMemoryError: the error itself, if it is one: what the device lacks is no fault of the
            code, though torch makes it a RuntimeError like any other.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return one_line(error)


def one_line(error: BaseException) -> str:
    """What an error said, on one line and not too long; its class where it said nothing."""
    said = " ".join(str(error).split())
    if not said:
        return type(error).__name__
    if len(said) > _LONGEST:
        said = said[: _LONGEST - 1].rstrip() + "…"
    # "KeyError: 'x'" says what "'x'" does not; those that speak in sentences need no name.
    return said if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {said}"
