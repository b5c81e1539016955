"""Packed rows by one kernel: its plan of segments on the CPU, with plain attention in its place.

The kernel itself needs a GPU. What is shown here: which keys each query gets, that torch's function
takes what it is given, that whole models then say what they say row by row, and that a kernel that
is wrong or fails is not used.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_modules import PAD, SHARING, flat_gradient, random_rows, stock_logps
from tiny import tiny_causal_lm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from cwpo_dist.lm import packed, varlen
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.packed import NAME
from cwpo_dist.lm.rows import collate, shared_mask

CPU = torch.device("cpu")
KERNEL = varlen.varlen_attn


def plain_attention(
    query: Any,
    key: Any,
    value: Any,
    query_ends: Any,
    key_ends: Any,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    shift: int = 0,
) -> Any:
    """What torch's documentation says of the kernel, a segment at a time; `shift` spoils it."""
    assert window_size == (-1, 0)
    assert query_ends.dtype == key_ends.dtype == torch.int32
    sizes = [ends.diff().tolist() for ends in (query_ends, key_ends)]
    assert [max(each) for each in sizes] == [longest_query, longest_key]
    outputs = []
    pieces = (tensor.split(size) for tensor, size in ((query, sizes[0]), (key, sizes[1])))
    for q, k, v in zip(*pieces, value.split(sizes[1]), strict=True):
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q) + shift)
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has packed rows take the kernel's way, with plain attention as the kernel; counts calls."""
    called: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append("kernel")
        return plain_attention(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(varlen, "usable", lambda *_: True)
    return called


lengths = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=6), min_size=1, max_size=5)


@given(lengths)
@settings(max_examples=200)
def test_each_query_sees_its_prompt_and_its_own_answer_and_nothing_else(rows: Any) -> None:
    segments = varlen.Segments.of(rows, CPU)
    size = sum(map(sum, rows))
    seen = torch.zeros(size, size, dtype=torch.bool)
    ends = zip(segments.query_ends.tolist(), segments.key_ends.tolist(), strict=True)
    start_q, start_k = next(ends)
    for end_q, end_k in ends:
        keys = segments.keys[start_k:end_k]
        for query in range(start_q, end_q):  # the last one sees the last key
            seen[query, keys[: len(keys) - (end_q - 1 - query)]] = True
        start_q, start_k = end_q, end_k
    parts = [[k for k, n in enumerate(row) for _ in range(n)] for row in rows]
    masks = [shared_mask(torch.tensor([part]))[0, 0] for part in parts]
    assert torch.equal(seen, torch.block_diag(*masks).bool())


@pytest.mark.parametrize("arch", SHARING)
def test_models_say_what_they_say_rowby_row(arch: str, kernel: list[str]) -> None:
    """Log-probs and gradients, those of grouped key heads among them."""
    rows = random_rows()
    model = tiny_causal_lm(arch, attn_implementation=NAME)
    module = AnswerLogProbs(model)
    logps = module.token_logps(collate(rows, "packed", PAD))
    gradient = flat_gradient(model, logps.sum())
    assert kernel
    del kernel[:]
    stock = tiny_causal_lm(arch)
    expected = stock_logps(stock, rows)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, flat_gradient(stock, expected.sum()), rtol=0, atol=1e-4)
    assert not kernel


def test_the_plan_is_made_once_for_all_layers(
    kernel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    of = varlen.Segments.of
    monkeypatch.setattr(varlen.Segments, "of", lambda *given: made.append(1) or of(*given))
    model = tiny_causal_lm("llama", attn_implementation=NAME, num_hidden_layers=3)
    AnswerLogProbs(model).token_logps(collate(random_rows(), "packed", PAD))
    assert (len(kernel), len(made)) == (3, 1)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2)])
def test_torch_takes_what_we_give_its_kernel(heads: int, key_heads: int) -> None:
    """By torch's own shapes of it, forward and backward, on a device that is not there."""
    with FakeTensorMode():
        query = torch.empty(1, heads, 12, 64, dtype=torch.bfloat16, requires_grad=True)
        key, value = (
            torch.empty(1, key_heads, 12, 64, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(2)
        )
        segments = varlen.Segments.of([[3, 2, 2], [1, 2], [1, 1]], CPU)
        output = varlen.attend(query, key, value, segments, 0.1)
        assert output.shape == query.shape
        output.sum().backward()
        assert query.grad is not None
        assert query.grad.shape == query.shape
        assert key.grad is not None
        assert key.grad.shape == key.shape


@pytest.mark.parametrize(
    ("attention", "works"),
    [
        (plain_attention, True),
        (lambda *args, **given: plain_attention(*args, **given, shift=-1), False),
        (lambda *args, **given: plain_attention(*args, **given, shift=1), False),
        (lambda *args, **given: plain_attention(*args, **given) * 1.2, False),
        (KERNEL, False),
    ],
    ids=["right", "sees too little", "sees too much", "scaled", "not for this device"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_that_is_wrong_is_not_used(
    attention: Any,
    works: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", attention)
    varlen._proved.cache_clear()
    assert varlen._proved(CPU, dtype, 6, 2, 16, packed.by_row) == works
    assert varlen._proved(CPU, dtype, 6, 2, 16, packed.by_row) == works
    varlen._proved.cache_clear()
    if not works:
        (line,) = caplog.messages
        assert line.startswith("packed rows take attention row by row, which is slower: torch's")
        assert f"for 6 heads of 16 in {str(dtype)[6:]} on cpu, as it" in line


def test_an_older_gpu_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    varlen._proved.cache_clear()
    assert not varlen._proved(torch.device("cuda"), torch.float16, 6, 2, 16, packed.by_row)
    varlen._proved.cache_clear()
    assert "it needs a device of compute capability 8.0 or more" in caplog.text


def test_a_gradient_that_is_wrong_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_only(*args: Any, **given: Any) -> Any:
        query, key, value, *others = args
        return plain_attention(query, key.detach(), value, *others, **given) + 0 * key.sum()

    monkeypatch.setattr(varlen, "varlen_attn", forward_only)
    output, gradient = varlen.differences(CPU, torch.float32, 4, 2, 16, packed.by_row)
    assert output < 1e-5
    assert gradient > 0.5


@pytest.mark.parametrize(
    ("changed", "used"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"is_cuda": False}, False),
        ({"width": 60}, False),
        ({"width": 512}, False),
        ({"dropout": 0.1}, False),
        ({"value_width": 32}, False),
    ],
)
def test_what_the_kernel_is_asked_for(
    changed: dict[str, Any], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: dict[str, Any] = {"dtype": torch.bfloat16, "is_cuda": True, "width": 64, "dropout": 0.0}
    case |= changed
    monkeypatch.setattr(varlen, "_proved", lambda *_: True)

    def faked(heads: int, width: int) -> Any:
        shape = (1, heads, 9, width)
        return SimpleNamespace(
            is_cuda=case["is_cuda"], dtype=case["dtype"], shape=shape, device="cuda:0"
        )

    query, key = faked(8, case["width"]), faked(2, case["width"])
    value = faked(2, case.get("value_width", case["width"]))
    assert varlen.usable(query, key, value, case["dropout"], packed.by_row) == used
