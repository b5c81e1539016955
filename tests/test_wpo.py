"""WPO: by hand, in a whole step against whole logits in plain autograd, and what its paper says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from plain_loop import ROWS, make_engine, make_run, make_task
from tiny import tiny_causal_lm
from torch import Tensor
from torch.nn.functional import logsigmoid

from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.rows import Row, collate
from cwpo_dist.objectives import LossSettings, PairLogps, dpo, wpo
from cwpo_dist.training import held_out
from cwpo_dist.training.loop import gradients
from cwpo_dist.training.tasks import Preference
from cwpo_dist.training.torch_engine import TorchEngine

HALF = LossSettings(0.5)
INDICES = [1, 4, 6, 9, 12, 17]


def pair() -> PairLogps:
    """Tokens of y⁺ have p = ½, ⅛ where Σ p² = ½, ½; that of y⁻ has p = ¼ where Σ p² = ½."""
    chosen, rejected, square = (
        torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
        for p in (1 / 16, 1 / 4, 1 / 2)
    )
    same = [n.detach() for n in (chosen, rejected)]
    counts = torch.tensor([2.0]), torch.tensor([1.0])
    return PairLogps(chosen, rejected, *counts, *same, (2 * square, square))


def test_by_hand() -> None:
    """w(y⁺) = √(1 · ¼) = ½, w(y⁻) = ½, and DPO's loss of policy = reference is ln 2."""
    given = pair()
    loss = wpo(given, HALF)
    assert loss.item() == pytest.approx(math.log(2) / 4)
    slopes = torch.autograd.grad(loss, (given.chosen, given.rejected))
    assert [s.item() for s in slopes] == pytest.approx([-0.25 / 4, 0.25 / 4]), "held fixed"
    assert given.squares is not None
    doubled = replace(given, squares=(2 * given.squares[0], given.squares[1]))
    assert wpo(doubled, HALF).item() == pytest.approx(math.log(2) / 2), "expected to be unlikelier"


def test_swapped_answers_turn_the_gradient_round() -> None:
    given = pair()
    assert given.squares is not None
    swapped = PairLogps(
        given.rejected,
        given.chosen,
        given.n_rejected,
        given.n_chosen,
        given.ref_rejected,
        given.ref_chosen,
        given.squares[::-1],
    )
    here, there = (
        torch.autograd.grad(wpo(each, HALF), (given.chosen, given.rejected))
        for each in (given, swapped)
    )
    assert [-slope.item() for slope in here] == [slope.item() for slope in there]


def test_what_the_policy_writes_itself_counts_as_one_on_average() -> None:
    """Its sampled alignment, of answers of one token: for each Σ_v π(v) · π(v) / Σ π² = 1."""
    log_probs = torch.randn(11, dtype=torch.float64).log_softmax(0)
    square = torch.logsumexp(2 * log_probs, 0).expand(11 * 11)
    chosen, rejected = torch.cartesian_prod(log_probs, log_probs).unbind(1)
    ones = torch.ones_like(chosen)
    pairs = PairLogps(chosen, rejected, ones, ones, chosen, rejected, (square, square))
    weights = wpo(pairs, HALF) / dpo(pairs, HALF)
    assert float(((chosen + rejected).exp() * weights).sum()) == pytest.approx(1.0)


def whole_logits(engine: TorchEngine, row: Row) -> Tensor:
    """Of both answers Σ log π and Σ log Σ_v π(v)², [2, 2], by the stock model's own forward."""
    numbers = []
    for answer in row.answers:
        ids = torch.tensor([[*row.prompt, *answer]])
        logits = engine.module.model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        told = log_probs[torch.arange(len(answer)), torch.tensor(answer)]
        numbers.append(torch.stack([told.sum(), (log_probs.exp() ** 2).sum(-1).log().sum()]))
    return torch.stack(numbers)


def learner() -> TorchEngine:
    """Another model than the reference, which says what a task of squares asks for."""
    engine = make_engine(seed=1)
    engine.module.squares = True
    return engine


def flat(engine: TorchEngine) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in engine.module.parameters()])


@pytest.mark.parametrize("budget", [10**6, 130, 61], ids=["one", "some", "many"])
def test_a_steps_gradient_is_that_of_whole_logits_in_any_micro_batches(budget: int) -> None:
    task, engine, plain = make_task(loss_type="wpo"), learner(), make_engine(seed=1)
    total = torch.zeros(())
    for i in INDICES:
        (chosen, rejected), row = whole_logits(plain, ROWS[i]), ROWS[i]
        means = [n / len(a) for n, a in zip((chosen, rejected), row.answers, strict=True)]
        weight = math.prod(torch.exp(mean[0] - mean[1]).item() for mean in means)
        assert task.references is not None
        reference = task.references[i]
        h = chosen[0] - reference[0] - rejected[0] + reference[1]
        total = total - task.weights[i] * weight * logsigmoid(0.5 * h) / len(INDICES)
    total.backward()
    found = gradients(task, engine, make_run(budget), 0, INDICES)
    assert found.loss == pytest.approx(total.item(), rel=1e-5)
    assert found.outputs_PK.shape == (len(INDICES), 2, 2)
    assert float((flat(engine) - flat(plain)).norm()) < 1e-5 * float(flat(plain).norm())


def test_held_out_pairs_and_metrics_read_the_log_probs() -> None:
    told = {"weights": [1.0] * len(ROWS)}
    found = held_out.evaluate(make_task(loss_type="wpo", **told), learner(), make_run(), 1)
    plain = held_out.evaluate(make_task(**told), make_engine(seed=1), make_run(), 1)
    assert found.pop("eval_loss") != pytest.approx(plain.pop("eval_loss"), rel=1e-3)
    assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_a_head_that_is_no_matrix_says_the_same(grad: bool) -> None:
    """Its chunks are computed twice for the backward pass, and each gives both numbers."""
    model = tiny_causal_lm("llama")
    fast, slow = (AnswerLogProbs(model, squares=True) for _ in range(2))
    slow.head.is_matrix, slow.head.chunk_size = False, 7
    batch = collate(ROWS[:5], "shared", 2)
    with torch.set_grad_enabled(grad):
        whole, chunks = fast(batch), slow(batch)
    assert whole.shape == (10, 2)
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[:, 0], AnswerLogProbs(model)(batch), rtol=0, atol=0)


def test_a_task_asks_for_squares_where_its_loss_reads_them() -> None:
    given = ROWS, [f"{i}" for i in range(len(ROWS))], [1.0] * len(ROWS), [(0.0, 0.0)] * len(ROWS)
    shapes = {name: Preference(*given, name, 0.5).outputs for name in ("wpo", "sigmoid")}
    assert shapes == {"wpo": (2, 2), "sigmoid": (2,)}
