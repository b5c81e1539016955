"""The last layer works for the tokens that are read, and what is read stays the same.

That log-probs, scores and gradients of packed rows equal stock plain ones, with the last layer
restricted, is shown for each architecture in test_modules.py.
"""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_causal_lm, tiny_classifier

from cwpo_dist.lm import packed
from cwpo_dist.lm.last_layer import read_tokens
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.recompute import let_recompute, recompute
from cwpo_dist.lm.rows import collate
from cwpo_dist.lm.stock import probe_rows

ROWS = probe_rows(200)
BATCH = collate(ROWS, "packed", 0)
MODULES = {"answers": (AnswerLogProbs, tiny_causal_lm), "ends": (AnswerScores, tiny_classifier)}


def test_tokens_that_are_read_are_those_that_batches_name():
    lengths = packed.packed_lengths(BATCH.attention_mask)
    assert read_tokens(lengths, "answers").tolist() == sorted(set(BATCH.source.tolist()))
    assert read_tokens(lengths, "ends").tolist() == BATCH.last.tolist()


@pytest.mark.parametrize("again", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("reads", MODULES)
def test_only_they_reach_the_last_mlp_and_gradients_stay_the_same(reads, again):
    wrap, make = MODULES[reads]
    expected = gradient_of(wrap(make("llama")), "plain")
    module = wrap(make("llama", attn_implementation=packed.NAME))
    let_recompute(module.model)
    recompute(module, on=again)
    tokens: list[list[int]] = [[], []]
    for layer, seen in zip(module.model.base_model.layers, tokens, strict=True):
        layer.mlp.gate_proj.register_forward_pre_hook(
            lambda _module, inputs, seen=seen: seen.append(inputs[0].shape[1])
        )
    found = gradient_of(module, "packed")
    read = len(read_tokens(packed.packed_lengths(BATCH.attention_mask), reads))
    all_tokens = BATCH.useful_tokens
    assert read < all_tokens
    assert tokens == [[all_tokens] * (2 if again else 1), [read]], "the last layer is never redone"
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def gradient_of(module, layout):
    module.train()
    module(collate(ROWS, layout, 0)).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_stock_calls_of_the_same_model_are_left_alone():
    """Generation and anything else that is given no packed rows."""
    model = tiny_causal_lm("llama", attn_implementation=packed.NAME)
    ids = torch.tensor([ROWS[0].prompt])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        module = AnswerLogProbs(model)
        module(BATCH)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)


def test_a_last_mlp_that_mixes_tokens_is_found_out():
    """The probe refuses what the restriction would make wrong."""
    model = tiny_causal_lm("llama")
    mlp = model.model.layers[-1].mlp
    plain = mlp.forward
    # Each token's input moves to its neighbour: harmless to a causal model, not to a part of it.
    mlp.forward = lambda x: plain(torch.cat([x[:, :1], x[:, :-1]], dim=1))
    choice = choose_layout(AnswerLogProbs(model), longest=64)
    assert choice.layout != "packed"
