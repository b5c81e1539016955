"""Gold functions by name, and answers that depend on (seed, prompt) and not on the batch."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import tiny_causal_lm, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cwpo_dist.config import ConfigError
from cwpo_dist.evaluation.gold_function import GoldError, load_function
from cwpo_dist.lm.generation import GumbelNoise, generate

TEXTS = ["Hello there", "Why?", "A somewhat longer prompt, with more tokens", "ok", "the end"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_causal_lm("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    *,
    temperature: float = 0.95,
    seed: int = 3,
    batch_size: int = 2,
    max_new_tokens: int = 12,
) -> list[str]:
    return generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )


def test_answers_do_not_depend_on_the_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    whole = _generate(model, tokenizer, prompts, batch_size=5)
    assert whole == _generate(model, tokenizer, prompts, batch_size=1)
    assert whole == _generate(model, tokenizer, prompts[::-1], batch_size=3)[::-1]
    assert len(set(whole)) == len(whole)
    assert whole[0] == _generate(model, tokenizer, [prompts[0], prompts[0]])[1]


def test_seed_decides_and_global_randomness_is_left_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _generate(model, tokenizer, prompts)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert first == _generate(model, tokenizer, prompts)
    assert first != _generate(model, tokenizer, prompts, seed=4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_greedy_equals_a_loop_without_padding_or_cache(
    arch: str, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    model = tiny_causal_lm(arch)
    answers = _generate(model, tokenizer, prompts, temperature=0, batch_size=5)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert answer == expected


@pytest.mark.parametrize("known_to", ["tokenizer", "model"])
def test_answer_ends_at_eos_and_shows_no_special_tokens(
    known_to: str, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """The model's end need not be the tokenizer's: chat models often name several."""
    model = tiny_causal_lm("llama")
    end = tokenizer.eos_token_id if known_to == "tokenizer" else tokenizer.bos_token_id
    model.generation_config.eos_token_id = None if known_to == "tokenizer" else [end]
    letter = tokenizer.convert_tokens_to_ids("x")
    calls: list[int] = []

    def two_letters(_: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1e9)
        calls.append(1)
        forced[..., end if len(calls) == 3 else letter] = 0
        return forced

    model.get_output_embeddings().register_forward_hook(two_letters)
    assert _generate(model, tokenizer, prompts[:1]) == ["xx"]


def test_models_own_generation_settings_do_not_leak(
    tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    plain, tuned = tiny_causal_lm("llama"), tiny_causal_lm("llama")
    for model in (plain, tuned):
        model.get_output_embeddings().register_forward_hook(_end_soon)
    settings = tuned.generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size = 5.0, 1
    settings.do_sample, settings.top_k, settings.temperature = True, 1, 0.01
    settings.min_length = 500
    found = []
    for temperature in (0.0, 0.95):
        answers = _generate(plain, tokenizer, prompts, temperature=temperature)
        assert answers == _generate(tuned, tokenizer, prompts, temperature=temperature)
        found += answers
    assert min(map(len, found)) < 12 - 2, "an answer ended before its time, else nothing is shown"


def _end_soon(_: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
    """Makes EOS (id 1) nearly as likely as the best token."""
    best = logits.amax(-1) - 0.5
    return torch.cat([logits[..., :1], best[..., None], logits[..., 2:]], dim=-1)


def test_each_prompt_has_noise_of_its_own(
    tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """A model that finds all tokens equally likely shows the noise alone."""
    model = tiny_causal_lm("llama")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    answers = _generate(model, tokenizer, prompts, batch_size=5)
    assert len(set(answers)) == len(answers)


def test_gumbel_noise_draws_from_the_tempered_distribution() -> None:
    logits, temperature, draws = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 0.7, 20_000
    noise = GumbelNoise([11], temperature, torch.device("cpu"))
    found = Counter(int(noise(torch.empty(0), logits).argmax()) for _ in range(draws))
    for token, expected in enumerate((logits[0] / temperature).softmax(0).tolist()):
        spread = math.sqrt(expected * (1 - expected) / draws)
        assert found[token] / draws == pytest.approx(expected, abs=4 * spread)


def test_masked_tokens_are_never_drawn() -> None:
    noise = GumbelNoise([0], 1.0, torch.device("cpu"))
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    assert all(int(noise(torch.empty(0), logits).argmax()) != 1 for _ in range(200))


def test_no_prompts_no_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert _generate(model, tokenizer, []) == []


def test_generate_refuses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.max_new_tokens: 510 after a prompt of 3"):
        _generate(model, tokenizer, [[5, 6, 7]], max_new_tokens=510)
    with pytest.raises(ValueError, match="no tokens"):
        _generate(model, tokenizer, [[]])


def test_function_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_gold.py").write_text(
        "RULE = 3\n"
        "def length(prompt, answer):\n    return len(answer)\n"
        "def nothing(prompt, answer):\n    return None\n"
        "def endless(prompt, answer):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("my_gold:length")("p", "four") == 4.0
    for name in ("nothing", "endless"):
        with pytest.raises(GoldError, match=rf"'my_gold:{name}' returned (None|nan)"):
            load_function(f"my_gold:{name}")("p", "a")
    for name, remedy in [
        ("my_gold.length", "write package.module:function"),
        ("my_gold:", "write package.module:function"),
        ("no_such_gold:length", "cannot be imported"),
        ("my_gold:width", "has no function 'width'"),
        ("my_gold:RULE", "has no function 'RULE'"),
    ]:
        with pytest.raises(ConfigError, match=remedy) as caught:
            load_function(name)
        assert "evaluate.gold_function" in str(caught.value)
        assert repr(name) in str(caught.value)
