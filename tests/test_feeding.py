"""What is laid out ahead of a device: in order, one ahead, in pinned memory, and the same bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zero_cases
from plain_loop import Record, make_engine, make_run, make_task
from tiny import tiny_classifier
from torch import Tensor

from cwpo_dist.lm.feeding import ahead, moved, pinned
from cwpo_dist.lm.modules import AnswerScores
from cwpo_dist.scoring import forward
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.training import micro_batches
from cwpo_dist.training.loop import train
from cwpo_dist.training.micro_batches import fed

WAIT_S = 20.0


def test_items_come_in_order_each_made_while_the_one_before_is_in_use() -> None:
    begun = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    found = []
    for number in ahead(items()):
        found.append(number)
        assert all(event.wait(WAIT_S) for event in begun[: number + 2])
        assert not any(event.is_set() for event in begun[number + 2 :]), "one ahead, no more"
    assert found == [0, 1, 2, 3]


def test_an_error_comes_where_its_item_would_be_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("spoilt")

    left = ahead(items())
    assert next(left) == 1
    with pytest.raises(KeyError, match="spoilt"):
        next(left)


@pytest.mark.parametrize("items", [[], [1], [1, 2, 3]])
def test_the_thread_ends_with_the_loop(items: list[int]) -> None:
    before = threading.active_count()
    for _ in ahead(items):
        break
    assert threading.active_count() == before
    assert list(ahead(items)) == items
    assert threading.active_count() == before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of tensors for which pinned memory was asked."""
    found: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        found.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return found


def test_memory_is_pinned_for_a_gpu_and_for_nothing_else(asked: list[int]) -> None:
    tensor = torch.ones(3)
    for device in ("cpu", "meta"):
        assert pinned(tensor, device) is tensor
        assert moved(tensor, device).device.type == device
    assert not asked
    pinned(tensor, "cuda")
    assert asked == [tensor.data_ptr()]
    pinned(torch.ones(3, device="meta"), "cuda")  # is on a device already
    assert len(asked) == 1


@pytest.mark.parametrize(("device", "pins"), [("cpu", False), ("cuda", True)])
@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
def test_whatever_is_laid_out_ahead_is_pinned_where_the_device_is_a_gpu(
    asked: list[int], layout: Any, device: str, pins: bool
) -> None:
    here = torch.device(device)
    engine: Any = SimpleNamespace(
        device=here, rank=0, world_size=1, sequence=make_engine().sequence
    )
    run = zero_cases.make_run(zero_cases.Case("x", 0), 130, layout)
    of_training = [micro.batch for micro in fed(make_task(), engine, run, [[0, 1, 2, 3]])]
    scorer = RowForward(AnswerScores(tiny_classifier("llama")), 2, 64, 130)
    scorer.device, scorer.layout = here, layout
    batches = [*of_training, *scorer._laid_out(zero_cases.make_rows())]
    tensors = [
        each for batch in batches for each in vars(batch).values() if isinstance(each, Tensor)
    ]
    assert len(batches) > 2
    assert {each.data_ptr() in asked for each in tensors} == {pins}


def test_training_and_scoring_ahead_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = zero_cases.make_rows()

    def found() -> tuple[list[Tensor], list[Any]]:
        engine, record = make_engine(), Record()
        train(make_task(), engine, make_run(61, max_steps=5), record)
        scorer = RowForward(AnswerScores(tiny_classifier("llama")), 2, 64, 130)
        assert record.steps == [0, 1, 2, 3, 4]
        return list(engine.module.parameters()), scorer(rows).values

    ours = found()
    monkeypatch.setattr(micro_batches, "ahead", iter)
    monkeypatch.setattr(forward, "ahead", iter)
    wanted = found()
    assert ours[1] == wanted[1]
    assert all(torch.equal(one, two) for one, two in zip(ours[0], wanted[0], strict=True))


def test_the_next_step_is_laid_out_while_this_one_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each step has one micro-batch here, so that only another step's can be ahead."""
    laid_out = [threading.Event() for _ in range(4)]
    parts_of = micro_batches.parts_of
    steps: list[int] = []

    def told(*args: Any) -> Any:
        found = parts_of(*args)
        steps.append(len(steps))
        laid_out[len(steps) - 1].set()
        return found

    monkeypatch.setattr(micro_batches, "parts_of", told)
    engine, computed = make_engine(), []

    def wait(*_: object) -> None:
        computed.append(1)
        following = min(len(computed), len(laid_out) - 1)
        assert laid_out[following].wait(WAIT_S)

    engine.module.register_forward_hook(wait)
    train(make_task(), engine, make_run(max_steps=4), Record())
    assert len(computed) == len(steps) == 4
