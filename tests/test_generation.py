"""No key of a model's `generation_config.json` acts; models that heed no pads; turning RoPE."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_causal_lm, tiny_tokenizer
from tiny_kinds import make
from transformers import AutoModelForCausalLM, GenerationConfig

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.generation import generate
from cwpo_dist.lm.loading import load_policy

PROMPTS = [[5, 6, 7], [9] * 11, list(range(20, 27)), [30]]
# What a key says where its default would say nothing, by the key or by its kind.
HOSTILE: dict[str, Any] = {
    "assistant_ensemble_weight": 0.5,
    "bad_words_ids": [[token] for token in range(60, 260)],
    "begin_suppress_tokens": list(range(60, 260)),
    "cache_implementation": "static",
    "compile_config": {"mode": "default"},
    "constraints": ["none"],
    "dola_layers": "low",
    "do_sample": True,
    "early_stopping": True,
    "exponential_decay_length_penalty": [1, 9.0],
    "force_words_ids": [[70]],
    "forced_bos_token_id": 50,
    "forced_eos_token_id": 51,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "sequence_bias": [[[70], 100.0]],
    "speculation_type": "dflash",
    "stop_strings": ["e"],
    "suppress_tokens": list(range(60, 260)),
    "temperature": 0.01,
    "top_p": 0.1,
    "use_cache": False,
    "watermarking_config": {"bias": 9.0},
}
# Special tokens: EOS ends an answer by intent, and the others come from the tokenizer.
OURS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")


def keys() -> list[str]:
    """All that transformers reads from the file."""
    return [
        name
        for name in vars(GenerationConfig())
        if name not in OURS and not name.startswith(("_", "transformers"))
    ]


def hostile(key: str) -> Any:
    """A value under which stock generation fails or answers otherwise; for some keys, any value."""
    if key in HOSTILE:
        return HOSTILE[key]
    if key.startswith(("output_", "return_")) or key in ("low_memory", "token_healing"):
        return True
    return 0.3 if key.endswith(("_p", "_cutoff", "_threshold", "top_h")) else 3


def answers(model: Any, temperature: float, batch_size: int = 4) -> list[str]:
    return generate(
        model,
        tiny_tokenizer(),
        PROMPTS,
        max_new_tokens=10,
        temperature=temperature,
        seed=1,
        batch_size=batch_size,
    )


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_no_key_of_a_models_own_file_acts(tmp_path: Path, temperature: float) -> None:
    """Each key alone on the loaded model, and all that can be loaded together from the file."""
    wanted = answers(tiny_causal_lm("llama"), temperature)
    for key in keys():
        model: Any = tiny_causal_lm("llama")
        setattr(model.generation_config, key, hostile(key))
        assert answers(model, temperature) == wanted, key
        assert getattr(model.generation_config, key) == hostile(key), "left as it was"
    assert len(keys()) > 50

    save_tiny(tmp_path, "llama")
    file = tmp_path / "generation_config.json"
    loadable = set(keys()) - {"compile_config", "watermarking_config", "constraints"}
    file.write_text(json.dumps({key: hostile(key) for key in loadable}))
    loaded = load_policy(ModelConfig(model_name_or_path=str(tmp_path)), device="cpu")
    assert loaded.generation_config.suppress_tokens is not None, "the file was read"
    assert answers(loaded, temperature) == wanted


def test_the_models_own_end_tokens_end_an_answer() -> None:
    model: Any = tiny_causal_lm("llama")
    (first, *_) = generate(
        model, tiny_tokenizer(), [[5, 6, 7]], max_new_tokens=1, temperature=0, seed=0, batch_size=1
    )
    (token,) = tiny_tokenizer()(first, add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [1, token]
    assert answers(model, 0.0)[0] == first


@pytest.mark.parametrize(
    ("name", "heeds"), [("llama", True), ("rwkv", False), ("bart", False), ("qwen3_next", True)]
)
def test_a_model_that_does_not_heed_pads_answers_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, heeds: bool
) -> None:
    make(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for temperature in (0.0, 0.9):
        with caplog.at_level(logging.WARNING, logger="cwpo_dist.lm.generation"):
            together = answers(model, temperature)
        assert together == answers(model, temperature, batch_size=1)
    assert ("one by one" in caplog.text) is not heeds


@pytest.mark.parametrize("name", ["phi3, longrope", "llama, dynamic RoPE"])
def test_answers_in_which_rotary_positions_turn_do_not_depend_on_others(
    tmp_path: Path, name: str
) -> None:
    """Beyond 24 tokens; what a fresh stock model writes, greedily, is the judge."""
    make(name, tmp_path)
    prompts = [list(range(3, 3 + n)) for n in (5, 20, 40, 12)]
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    model = load_policy(ModelConfig(model_name_or_path=str(tmp_path)), device="cpu")
    tokenizer = tiny_tokenizer()
    together = generate(model, tokenizer, prompts, batch_size=4, **settings)
    for prompt, found in zip(prompts, together, strict=True):
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        ids = torch.tensor([prompt])
        output = fresh.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        wanted = tokenizer.decode(
            output[0, len(prompt) :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert found == wanted, len(prompt)
