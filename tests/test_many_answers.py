"""Rows of one to eight answers, as many in each or not: equal to stock models on plain rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_modules import (
    PAD,
    assert_same_gradient,
    coefficients,
    flat_gradient,
    random_rows,
    stock_logps,
)
from tiny import tiny_causal_lm, tiny_classifier
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from cwpo_dist.lm import packed
from cwpo_dist.lm.flops import UsefulFlops
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.rows import Layout, Row, RowBatch, collate, cut, shared_mask
from cwpo_dist.lm.stock import apart
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.scoring.invariant import InvariantForward

ARCHS = ("llama", "qwen2", "opt", "gpt_neox", "gemma")
LAYOUTS: tuple[Layout, ...] = ("packed", "shared", "plain")
MIXED = (3, 1, 8, 2)
COUNTS = [*((k, k) for k in range(1, 9)), MIXED, (1, 5, 1)]


def rows_of(counts: Sequence[int]) -> list[Row]:
    return [random_rows(seed, 1, count)[0] for seed, count in enumerate(counts)]


def stock_scores(model: Any, rows: list[Row]) -> Tensor:
    """One conversation at a time, by the classifier's own forward."""
    ids = (torch.tensor([[*row.prompt, *row.answers[0]]]) for row in apart(rows))
    return torch.cat([model(input_ids=each).logits[:, 0] for each in ids])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_log_probs_are_the_stock_models(arch: str, counts: tuple[int, ...]) -> None:
    model = tiny_causal_lm(arch, attn_implementation=packed.NAME)
    module, rows = AnswerLogProbs(model), rows_of(counts)
    expected = stock_logps(model, rows)
    lengths = [len(answer) for row in rows for answer in row.answers]
    sums = torch.stack([own.sum() for own in expected.split(lengths)]).detach()
    weights = coefficients(len(expected))
    gradient = flat_gradient(model, (weights * expected).sum())
    for layout in LAYOUTS:
        batch = collate(rows, layout, PAD)
        found = module.token_logps(batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert_same_gradient(flat_gradient(model, (weights * found).sum()), gradient)
        with torch.no_grad():
            torch.testing.assert_close(module(batch), sums, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_scores_are_the_stock_classifiers(arch: str, counts: tuple[int, ...]) -> None:
    model = tiny_classifier(arch, attn_implementation=packed.NAME)
    module, rows = AnswerScores(model), rows_of(counts)
    expected = stock_scores(model, rows)
    weights = coefficients(len(expected))
    gradient = flat_gradient(model, (weights * expected).sum())
    for layout in LAYOUTS:
        found = module(collate(rows, layout, PAD))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert_same_gradient(flat_gradient(model, (weights * found).sum()), gradient)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_dense_mask_holds_under_eager_attention(arch: str) -> None:
    model = tiny_causal_lm(arch, attn_implementation="eager")
    rows = rows_of(MIXED)
    with torch.no_grad():
        found = AnswerLogProbs(model).token_logps(collate(rows, "shared", PAD))
        torch.testing.assert_close(found, stock_logps(model, rows), rtol=0, atol=1e-5)


def leaking(answer: int | None) -> Callable[..., Tensor]:
    """Attention row by row, in which one answer (from 1) sees that before it."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Sequence[Sequence[int]],
        scaling: float | None,
        dropout: float = 0.0,
    ) -> Tensor:
        masks = []
        for row in lengths:
            part = torch.tensor([k for k, length in enumerate(row) for _ in range(length)])
            mask = shared_mask(part[None])[0, 0]
            if answer is not None:
                mask |= (part[:, None] == answer) & (part == answer - 1)
            masks.append(mask)
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        mask = torch.block_diag(*masks).bool()
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)

    return attend


@pytest.mark.parametrize("answer", [2, 3, 8])
@pytest.mark.parametrize("arch", ARCHS)
def test_an_answer_that_sees_a_sibling_misses_by_far(
    arch: str, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other answer does: a hundred times what the tests above allow, and what they find."""
    model = tiny_causal_lm(arch, attn_implementation=packed.NAME)
    module, (row,) = AnswerLogProbs(model), rows_of([answer])
    segments = [k for k, part in enumerate((row.prompt, *row.answers)) for _ in part]
    part = torch.tensor(segments)
    with torch.no_grad():
        expected = stock_logps(model, [row])
        for layout in ("packed", "shared"):
            batch = collate([row], layout, PAD)
            right = (module.token_logps(batch) - expected).abs()
            if layout == "packed":
                monkeypatch.setattr(packed, "by_row", leaking(answer))
            else:
                leak = (part[:, None] == answer) & (part == answer - 1)
                batch = replace(batch, attention_mask=batch.attention_mask | leak)
            wrong = (module.token_logps(batch) - expected).abs()
            monkeypatch.undo()
            its_own = batch.answer == answer - 1
            assert wrong[its_own].max() > 100 * max(float(right.max()), 1e-5)
            assert wrong[~its_own].max() <= 1e-5


@pytest.mark.parametrize(("leak", "layout"), [(None, "packed"), (2, "shared"), (3, "shared")])
def test_the_probe_sees_leaks_that_two_answers_do_not_show(
    leak: int | None, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "by_row", leaking(leak))
    module = AnswerLogProbs(tiny_causal_lm("llama", attn_implementation="sdpa"))
    assert choose_layout(module, longest=64).layout == layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_skipped_tokens_are_seen_and_count_for_nothing(arch: str, layout: Layout) -> None:
    model = tiny_causal_lm(arch, attn_implementation=packed.NAME)
    module = AnswerLogProbs(model)
    whole = rows_of(MIXED)
    skips = [tuple(min(k, len(a) - 1) for k, a in enumerate(row.answers)) for row in whole]
    rows = [replace(row, skipped=skipped) for row, skipped in zip(whole, skips, strict=True)]
    each = stock_logps(model, whole).split([len(a) for row in whole for a in row.answers])
    expected = [logps[n:] for logps, n in zip(each, sum(skips, ()), strict=True)]
    batch = collate(rows, layout, PAD)
    found = module.token_logps(batch)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)
    gradient = flat_gradient(model, (coefficients(len(found)) * torch.cat(expected)).sum())
    assert_same_gradient(flat_gradient(model, (coefficients(len(found)) * found).sum()), gradient)
    sums = torch.stack([logps.sum() for logps in expected])
    torch.testing.assert_close(module(batch), sums, rtol=1e-6, atol=1e-4)


def test_what_reads_no_log_probs_does_not_care_for_skipped_tokens() -> None:
    """Scores; a classifier of pairs of texts is told that they are of the prompt."""
    (row,) = rows_of([3])
    more = [7, 8]
    moved = Row(row.prompt, tuple([*more, *answer] for answer in row.answers), (2, 2, 2))
    longer = Row([*row.prompt, *more], row.answers)
    for arch, layout in (("llama", "packed"), ("bert", "plain")):
        attention = packed.NAME if layout == "packed" else "eager"
        model = tiny_classifier(arch, attn_implementation=attention)
        module = AnswerScores(model, token_types=True)
        with torch.no_grad():
            found, wanted = (module(collate([each], layout, PAD)) for each in (moved, longer))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    head = UsefulFlops(0, 0, 1, head_reads_answers=True)
    assert head.forward([moved]) == head.forward([longer]) == 2 * sum(map(len, row.answers))


@pytest.mark.parametrize(
    ("arch", "attention", "layout"),
    [("llama", "sdpa", "packed"), ("llama", "eager", "shared"), ("bert", "eager", "plain")],
)
def test_rows_that_are_cut_say_what_whole_rows_say(
    arch: str, attention: str, layout: Layout
) -> None:
    # The last has many short answers: as plain rows they are not to be padded to a long one's.
    rows = [*rows_of([8, 1, 5, 2, 1, 1]), Row([0, 3], tuple([k, 1] for k in range(4, 12)))]
    module = AnswerScores(tiny_classifier(arch, attn_implementation=attention))
    whole = RowForward(module, PAD, 64, 10_000)(rows)
    for budget in (40, 70):
        forward = RowForward(module, PAD, 64, budget)
        assert forward.layout == layout
        seen: list[RowBatch] = []
        with module.register_forward_pre_hook(lambda _module, args, seen=seen: seen.extend(args)):
            found = forward(rows)
        assert all(each.padded_tokens <= budget or len(each.last) == 1 for each in seen)
        assert [len(values) for values in found.values] == [8, 1, 5, 2, 1, 1, 8]
        for values, wanted in zip(found.values, whole.values, strict=True):
            assert values == pytest.approx(wanted, abs=1e-5)
        assert sum(len(batch.last) for batch in seen) == 26
        # A dense row is no longer than a pair of the longest answers, whatever the budget.
        longest = 2 * 64 if layout == "shared" else 10_000
        before, now = ([len(cut(r, at, layout)) for r in rows] for at in (longest, budget))
        repeated = sum(len(r.prompt) * (n - b) for r, n, b in zip(rows, now, before, strict=True))
        assert repeated > 0
        assert found.counts["tokens"] == whole.counts["tokens"] + repeated
        assert found.counts["flops"] == whole.counts["flops"]


def test_log_probs_of_cut_rows_too() -> None:
    rows = rows_of(MIXED)
    module = AnswerLogProbs(tiny_causal_lm("qwen2"))
    whole, parts = (RowForward(module, PAD, 64, budget)(rows) for budget in (10_000, 60))
    for values, wanted in zip(parts.values, whole.values, strict=True):
        assert values == pytest.approx(wanted, abs=1e-4)
    assert RowForward(module, PAD, 64, 60)([]).values == []


class OneOfTwo:
    """A rank beside another that is not there: sums are its own part."""

    world_size, device = 2, torch.device("cpu")

    def __init__(self, rank: int, module: Any) -> None:
        self.rank, self.module = rank, module

    def forward(self, batch: RowBatch) -> Tensor:
        with torch.no_grad():
            return self.module(batch)

    def total(self, numbers: Tensor) -> Tensor:
        return numbers


def test_ranks_share_rows_of_unequal_numbers_of_answers() -> None:
    rows = rows_of([8, 1, 5, 2, 1])
    module = AnswerLogProbs(tiny_causal_lm("llama")).eval()
    alone = RowForward(module, PAD, 64, 60)(rows)
    parts: list[Any] = [
        RowForward(module, PAD, 64, 60, engine)(rows)  # type: ignore[arg-type]  # part of an engine
        for engine in (OneOfTwo(rank, module) for rank in range(2))
    ]
    for wanted, *found in zip(alone.values, *(part.values for part in parts), strict=True):
        assert [sum(both) for both in zip(*found, strict=True)] == wanted
    assert sum(p.counts["padded_tokens"] for p in parts) == alone.counts["padded_tokens"]


def test_bits_of_an_answer_are_its_own_however_many_stand_beside_it() -> None:
    rows = rows_of(MIXED)
    forward = InvariantForward(AnswerScores(tiny_classifier("llama")), PAD, 64, 4096)
    assert forward.tiled
    together = [value for values in forward(rows).values for value in values]
    assert together == [forward([row]).values[0][0] for row in apart(rows)]
