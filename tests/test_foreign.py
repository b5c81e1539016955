"""What others' code raises: its own faults are told, a want of memory is not blamed on it."""

from __future__ import annotations

import pytest
import tiny
import torch

from cwpo_dist.config import LoraConfig
from cwpo_dist.lm.foreign import FOREIGN_ERRORS, model_fault
from cwpo_dist.training import lora


def test_a_fault_is_told_in_one_line() -> None:
    assert model_fault(KeyError("x")) == "KeyError: 'x'"
    assert model_fault(ValueError("too\nmany")) == "too many"


def test_a_want_of_memory_passes() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert isinstance(error, FOREIGN_ERRORS), "so that it would be caught with them"
    with pytest.raises(torch.OutOfMemoryError):
        model_fault(error)


def test_adapters_that_find_no_memory_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lora, "get_peft_model", full)
    with pytest.raises(torch.OutOfMemoryError):
        lora.add_lora(tiny.tiny_causal_lm("llama"), LoraConfig(), "logps", 0)
