"""Log-probs of answers: stock Hugging Face models are the oracle, for values and for gradients."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from tiny import tiny_causal_lm, tiny_classifier, tiny_config
from transformers import AutoModelForCausalLM

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm import packed
from cwpo_dist.lm.encoder import Encoder, load_tokenizer
from cwpo_dist.lm.loading import ModelError, load_policy
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.rows import Row, collate

EOS, PAD = 1, 2
SDPA_LAYOUTS = ("shared", "plain")
SHARING = ("llama", "qwen2", "mistral", "opt", "gpt2", "gpt_neox")


def random_rows(seed: int = 0, count: int = 5, n_answers: int = 2) -> list[Row]:
    """Rows of unequal lengths whose answers end in EOS."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 266, (length,), generator=generator).tolist()

    return [
        Row([0, *draw(1, 20)], tuple([*draw(1, 30), EOS] for _ in range(n_answers)))
        for _ in range(count)
    ]


def stock_logps(model: Any, rows: list[Row]) -> torch.Tensor:
    """Log-probs of answer tokens, one conversation at a time, from the model's own logits."""
    found = []
    for row in rows:
        for answer in row.answers:
            ids = torch.tensor([[*row.prompt, *answer]])
            logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
            start = len(row.prompt)
            found.append(logps[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(found)


def flat_gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in model.parameters()
            if p.requires_grad
        ]
    )


def assert_same_gradient(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-4) -> None:
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= relative * theirs.norm()


def coefficients(count: int) -> torch.Tensor:
    """Unequal weights, so that tokens cannot be swapped unseen."""
    return torch.linspace(0.5, -1.5, count)


@pytest.mark.parametrize("attention", ["sdpa", "eager", packed.NAME])
@pytest.mark.parametrize("arch", SHARING)
def test_all_layouts_equal_stock_plain_rows(arch, attention):
    model = tiny_causal_lm(arch, attn_implementation=attention)
    module, rows = AnswerLogProbs(model), random_rows()
    expected = stock_logps(model, rows)
    weights = coefficients(len(expected))
    expected_gradient = flat_gradient(model, (weights * expected).sum())
    for layout in ("packed", "shared", "plain") if attention == packed.NAME else SDPA_LAYOUTS:
        found = module.token_logps(collate(rows, layout, PAD))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert_same_gradient(flat_gradient(model, (weights * found).sum()), expected_gradient)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", SHARING)
def test_a_leaky_mask_or_position_misses_by_far(arch, attention):
    """The tolerance above would not hide answer b seeing answer a, nor positions running on."""
    model = tiny_causal_lm(arch, attn_implementation=attention)
    module, rows = AnswerLogProbs(model), random_rows()
    batch = collate(rows, "shared", PAD)
    length = batch.input_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    running_on = torch.arange(length).expand_as(batch.position_ids)
    with torch.no_grad():
        expected = stock_logps(model, rows)

        def error(changed):
            return (module.token_logps(changed) - expected).abs().max()

        right = max(error(batch), torch.tensor(1e-7))
        leaky = replace(batch, attention_mask=causal.expand(len(rows), 1, -1, -1))
        assert error(leaky) > 100 * right
        assert error(leaky) > 1e-2
        assert error(replace(batch, position_ids=running_on)) > 100 * right


def test_a_dense_causal_mask_over_packed_rows_misses_by_far():
    """What tells packed rows apart is not decoration."""
    rows = random_rows()
    batch = collate(rows, "packed", PAD)
    size = batch.useful_tokens
    causal = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
    leaky = replace(batch, attention_mask=causal, layout="shared")
    with torch.no_grad():
        expected = stock_logps(tiny_causal_lm("llama"), rows)
        module = AnswerLogProbs(tiny_causal_lm("llama", attn_implementation="eager"))
        assert (module.token_logps(leaky) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
@pytest.mark.parametrize("n_answers", [1, 2])
def test_log_probs_are_summed_per_answer(n_answers, layout):
    model = tiny_causal_lm("llama", attn_implementation=packed.NAME)
    rows = random_rows(n_answers=n_answers)
    with torch.no_grad():
        tokens = stock_logps(model, rows)
        counts = [len(answer) for row in rows for answer in row.answers]
        sums = torch.stack([part.sum() for part in tokens.split(counts)])
        found = AnswerLogProbs(model)(collate(rows, layout, PAD))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sums, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 7.0}),
    ],
)
def test_heads_of_all_kinds(arch, settings):
    """Tied embeddings, capped logits and scaled logits give the stock model's log-probs."""
    common = {"hidden_size": 32, "intermediate_size": 64} if arch != "gpt2" else {}
    config = tiny_config(arch, **{**common, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows, module = random_rows(), AnswerLogProbs(model)
    module.head.chunk_size = 11
    expected = stock_logps(model, rows)
    expected_gradient = flat_gradient(model, expected.sum())
    found = module.token_logps(collate(rows, "plain", PAD))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_same_gradient(flat_gradient(model, found.sum()), expected_gradient)


def test_head_test_above_would_notice_a_missing_cap():
    torch.manual_seed(0)
    config = tiny_config(
        "gemma2", hidden_size=32, intermediate_size=64, head_dim=8, final_logit_softcapping=3.0
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    rows, module = random_rows(), AnswerLogProbs(model)
    module.head.softcap = None
    with torch.no_grad():
        difference = module.token_logps(collate(rows, "plain", PAD)) - stock_logps(model, rows)
    assert difference.abs().max() > 1e-2


def test_chunks_keep_no_logits_until_the_backward(monkeypatch):
    model, rows = tiny_causal_lm("llama", tie_word_embeddings=True), random_rows()
    module, batch = AnswerLogProbs(model), collate(rows, "shared", PAD)
    module.head.is_matrix = False  # as a head with a bias, LoRA or a cap inside
    module.head.chunk_size = 16
    logits: list[weakref.ref[torch.Tensor]] = []
    sizes: list[int] = []

    project = model.lm_head.forward

    def recorded(hidden):
        output = project(hidden)
        logits.append(weakref.ref(output))
        sizes.append(len(output))
        return output

    monkeypatch.setattr(model.lm_head, "forward", recorded)
    loss = module(batch).sum()
    gc.collect()
    n_chunks = -(-len(batch.target) // 16)
    assert len(sizes) == n_chunks > 3
    assert max(sizes) == 16
    assert sum(sizes) == len(batch.target)  # answer tokens alone reach the vocabulary
    assert all(reference() is None for reference in logits)
    loss.backward()
    assert len(sizes) == 2 * n_chunks  # made again, once


def test_names_and_parameters_are_the_models_own():
    """Every parameter appears once, under its Hugging Face name; the head holds its own too."""
    model = tiny_causal_lm("llama", tie_word_embeddings=True)
    module = AnswerLogProbs(model)
    assert [name for name, _ in module.named_parameters()] == [
        f"model.{name}" for name, _ in model.named_parameters()
    ]
    # ZeRO-3 gathers what a module itself holds for as long as it runs: one gather for all chunks
    assert dict(module.head.named_parameters())["weight"] is model.lm_head.weight
    assert not list(module.head.children())


def lora(model: Any, task: TaskType) -> Any:
    settings = LoraConfig(r=4, target_modules="all-linear", task_type=task, init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, settings)


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_lora_layers_stay_active_inside_peft(arch):
    model, rows = tiny_causal_lm(arch), random_rows()
    with torch.no_grad():
        bare = AnswerLogProbs(model)(collate(rows, "shared", PAD))
    wrapped = lora(model, TaskType.CAUSAL_LM).eval()
    module = AnswerLogProbs(wrapped)
    expected = stock_logps(wrapped, rows)
    expected_gradient = flat_gradient(wrapped, expected.sum())
    found = module.token_logps(collate(rows, "shared", PAD))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_same_gradient(flat_gradient(wrapped, found.sum()), expected_gradient)
    trained = [name for name, p in module.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    assert (module(collate(rows, "shared", PAD)) - bare).abs().max() > 1e-2


@pytest.mark.parametrize("make", [tiny_causal_lm, tiny_classifier])
def test_gradient_checkpointing_changes_nothing_but_work(make):
    """Each layer runs a second time in the backward, and the gradient is the same."""
    model = make("llama")
    module = (AnswerLogProbs if make is tiny_causal_lm else AnswerScores)(model)
    module.train()
    batch = collate(random_rows(), "shared", PAD)
    runs: list[int] = []
    projection = model.base_model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda *_: runs.append(1))
    plain = flat_gradient(model, module(batch).square().sum())
    assert len(runs) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = flat_gradient(model, module(batch).square().sum())
    assert len(runs) == 3
    assert_same_gradient(checkpointed, plain, relative=1e-6)


def test_models_without_output_embeddings_are_refused():
    with pytest.raises(ModelError, match="no output embeddings"):
        AnswerLogProbs(tiny_causal_lm("llama").model)


def test_generation_cache_is_off():
    model = tiny_causal_lm("llama")
    seen: list[Any] = []
    model.model.register_forward_hook(
        lambda _m, _a, kwargs, output: seen.append((kwargs["use_cache"], output.past_key_values)),
        with_kwargs=True,
    )
    AnswerLogProbs(model)(collate(random_rows(), "shared", PAD))
    assert seen == [(False, None)]


def hh_rows(data: Path, tokenizer: Any, count: int) -> list[Row]:
    """The first pairs of HH harmless, as one user message and an answer each."""
    encoder = Encoder(tokenizer, "tokenizer")
    rows = []
    with gzip.open(data / "hh_harmless.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in itertools.islice(lines, count):
            pair = json.loads(line)
            start, chosen = pair["chosen"].rsplit("\n\nAssistant:", 1)
            rejected = pair["rejected"].rsplit("\n\nAssistant:", 1)[1]
            rows.append(encoder.encode(start, [chosen, rejected]))
    return rows


def test_smollm2_on_human_preferences(smollm2, cwpo_data):
    """The first 4 layers of a real model: shared rows against its own logits, and a leak."""
    settings = ModelConfig(model_name_or_path=str(smollm2), num_hidden_layers=4)
    model = load_policy(settings)
    module = AnswerLogProbs(model)
    rows = hh_rows(cwpo_data, load_tokenizer(settings), 3)
    batch = collate(rows, "shared", 0)
    length = batch.input_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(rows), 1, -1, -1)
    with torch.no_grad():
        expected = stock_logps(model, rows)
        torch.testing.assert_close(module.token_logps(batch), expected, rtol=0, atol=1e-4)
        model.set_attn_implementation(packed.NAME)
        found = module.token_logps(collate(rows, "packed", 0))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        leaky = module.token_logps(replace(batch, attention_mask=causal))
    assert (leaky - expected).abs().max() > 1


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_scores_of_a_bf16_model_are_not_rounded_to_bf16(arch):
    """They are the head's product with the states that the model gives it, as fp32 computes it."""
    rows = random_rows(count=24)
    core = tiny_classifier(arch).bfloat16()
    with torch.no_grad():
        core.score.weight.mul_(100)  # scores of the size that trained models give
    batch = collate(rows, "plain", PAD)
    with torch.no_grad():
        ids, mask = batch.input_ids, batch.attention_mask
        states = core.model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = states.flatten(0, 1)[batch.last]
        expected = last.float() @ core.score.weight.float().T
        stock = core.score(last).float()
        scores = AnswerScores(core)(batch).view(-1, 1)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert (stock - expected).abs().max() > 1e-3, "the stock head rounds"


def test_a_pads_row_of_tied_embeddings_learns_by_the_head_alone() -> None:
    """As torch has it, which gives no gradient to what is looked up for a pad."""
    rows = [Row([0, PAD, *row.prompt], row.answers) for row in random_rows()]
    model, stock = (tiny_causal_lm("llama", tie_word_embeddings=True) for _ in range(2))
    assert stock.get_input_embeddings().padding_idx == PAD
    logps = AnswerLogProbs(model).token_logps(collate(rows, "shared", PAD))
    loss = stock_logps(stock, rows)
    theirs = flat_gradient(stock, (loss * coefficients(len(loss))).sum())
    assert_same_gradient(flat_gradient(model, (logps * coefficients(len(logps))).sum()), theirs)
