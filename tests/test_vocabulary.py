"""Log-probs by blocks of the vocabulary against torch's cross entropy on whole logits."""

from __future__ import annotations

import pytest
import torch

from cwpo_dist.lm import vocabulary
from cwpo_dist.lm.vocabulary import vocabulary_log_probs

N, H, V = 23, 16, 101


def problem(seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator) * scale
    weight = torch.randn(V, H, generator=generator)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def oracle(hidden, weight, target):
    logits = hidden.double() @ weight.double().T
    return -torch.nn.functional.cross_entropy(logits, target, reduction="none")


def gradients(log_probs, *inputs):
    """Of a sum with unequal weights, so that no two tokens can be swapped unseen."""
    weights = torch.linspace(0.5, -1.5, len(log_probs), dtype=log_probs.dtype)
    return torch.autograd.grad((weights * log_probs).sum(), inputs)


@pytest.fixture(params=[7, 50, 101, 2048], ids=lambda words: f"blocks of {words}")
def block(request, monkeypatch):
    monkeypatch.setitem(vocabulary._BLOCK_WORDS, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kept", [0, N * 50, 2**25], ids=["none kept", "some kept", "all kept"])
def test_values_and_gradients_are_those_of_cross_entropy(block, kept, seed, monkeypatch):
    monkeypatch.setattr(vocabulary, "KEPT_NUMBERS", kept)
    hidden, weight, target = problem(seed)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    expected, found = oracle(hidden, weight, target), vocabulary_log_probs(hidden, weight, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_overflows_where_logits_are_huge(block):
    hidden, weight, target = problem(0, scale=300.0)
    found = vocabulary_log_probs(hidden, weight, target)
    assert float(found.min()) < -1000
    torch.testing.assert_close(found.double(), oracle(hidden, weight, target), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("scale", [0.1, 1.0, 300.0], ids=["flat", "mixed", "sure"])
def test_squares_are_the_expected_probability_and_change_no_gradient(block, scale):
    hidden, weight, target = problem(0, scale)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    plain = vocabulary_log_probs(*inputs, target)
    log_probs, squares = vocabulary_log_probs(*inputs, target, squares=True).unbind(1)
    logits = hidden.double() @ weight.double().T
    expected = torch.logsumexp(2 * logits.log_softmax(1), 1)
    torch.testing.assert_close(squares.double(), expected, rtol=1e-5, atol=1e-5 * max(scale, 1))
    assert torch.equal(log_probs, plain)
    wanted = gradients(plain, *inputs)
    assert all(map(torch.equal, gradients(log_probs + squares, *inputs), wanted))


def test_in_place_adds_the_same_gradient_to_what_is_there(block):
    hidden, weight, target = problem(0)
    weight.requires_grad_()
    for count in (1, 2):
        other = hidden * count
        handed = vocabulary_log_probs(other.requires_grad_(), weight, target, in_place=True)
        handed.sum().backward()
    expected = torch.autograd.grad(
        oracle(hidden, weight, target).sum() + oracle(2 * hidden, weight, target).sum(), weight
    )[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient(block):
    hidden, weight, target = problem(0)
    hidden.requires_grad_()
    found = vocabulary_log_probs(hidden, weight, target, in_place=True)
    (ours,) = gradients(found, hidden)
    (theirs,) = gradients(oracle(hidden, weight, target), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert weight.grad is None


def test_bfloat16_models_have_log_probs_of_unrounded_logits(block):
    """Stock rounds logits to bf16 first: a hundred times further off."""
    hidden, weight, target = (t.bfloat16() if t.is_floating_point() else t for t in problem(0))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    found, expected = vocabulary_log_probs(hidden, weight, target), oracle(hidden, weight, target)
    stock = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target, reduction="none")
    error, stock_error = ((each - expected).abs().max() for each in (found, -stock))
    assert error < 1e-5
    assert error < stock_error / 100
    for ours, theirs in zip(
        gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 2**25], ids=["none kept", "all kept"])
def test_a_sure_token_has_its_own_small_slope_and_never_a_positive_log_prob(
    dtype, kept, block, monkeypatch
):
    """Where p > 0.99, ∂ log p/∂h is (1 − p) · (w_target − the others' mean): small, not noise."""
    monkeypatch.setattr(vocabulary, "KEPT_NUMBERS", kept)
    _, weight, target = problem(0)
    weight = weight.to(dtype)
    hidden = (weight[target] * 1.5).requires_grad_()
    found, expected = vocabulary_log_probs(hidden, weight, target), oracle(hidden, weight, target)
    sure = expected.exp() > 0.99
    assert sure.sum() > 10
    assert float(found.max()) <= 0.0
    (ours,) = torch.autograd.grad(found.sum(), hidden)
    (theirs,) = torch.autograd.grad(expected.sum(), hidden)
    errors = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert float(errors[sure].max()) < (0.02 if dtype == torch.bfloat16 else 2e-5)
