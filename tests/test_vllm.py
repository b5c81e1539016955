"""vLLM's answers against those of our own loop; it has an environment of its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import DEMO_PAIRS

from cwpo_dist.config import ModelConfig
from cwpo_dist.demo.gold import score as gold
from cwpo_dist.lm.generation import decoded, generate
from cwpo_dist.lm.loading import load_policy
from cwpo_dist.lm.reading import encoder_for

logger = logging.getLogger(__name__)

PYTHON = os.environ.get("CWPO_VLLM", "")
PROMPTS, LENGTH, TEMPERATURE = 40, 256, 0.95
TOLD: dict[str, Any] = {"max_new_tokens": 48, "temperature": 0.0, "seed": 3, "batch_size": 16}
ROUNDING = 1e-3  # of logits, whose spread is 3 or more

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not Path(PYTHON).is_file(), reason="needs CWPO_VLLM, a Python with vLLM"),
]


def by_vllm(folder: Path, model: ModelConfig, calls: list[tuple[float, Any]]) -> Any:
    """The tokens of the answers, call by call, each of a temperature and prompts."""
    asked = {"model": model.model_name_or_path, "max_length": LENGTH, "told": TOLD, "calls": calls}
    (folder / "asked.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("vllm_answers.py")
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    subprocess.run([PYTHON, str(script), str(folder)], check=True, timeout=2400, env=env)
    return json.loads((folder / "answers.json").read_text())


def test_its_greedy_answers_are_ours_but_for_rounding_and_seeds_decide_the_others(
    tmp_path: Path, smollm2: Path
) -> None:
    model = ModelConfig(model_name_or_path=str(smollm2), max_length=LENGTH)
    encoder, policy = encoder_for(model, "policy"), load_policy(model)
    rows = map(json.loads, DEMO_PAIRS.read_text().splitlines())
    texts = list(dict.fromkeys(row["prompt"] for row in rows))[:PROMPTS]
    prompts = [encoder.encode(text, ["x"]).prompt for text in texts]
    calls = [(0.0, prompts), (TEMPERATURE, prompts), (TEMPERATURE, prompts[::-1][:5])]
    greedy, drawn, others = by_vllm(tmp_path, model, calls)
    ours = generate(policy, encoder.tokenizer, prompts, **TOLD)
    warm = TOLD | {"temperature": TEMPERATURE}
    sampled = generate(policy, encoder.tokenizer, prompts, **warm)
    same = sum(a == b for a, b in zip(decoded(encoder.tokenizer, greedy), ours, strict=True))
    gaps = [gap(policy, *both) for both in zip(prompts, greedy, strict=True)]
    logger.info("%d of %d greedy answers are the same; gap %.1e", same, PROMPTS, max(gaps))
    assert len(prompts) == PROMPTS
    assert max(gaps) < ROUNDING, "each of its tokens is our greedy one"
    assert same >= 0.9 * PROMPTS
    assert others == drawn[::-1][:5], "whatever is answered beside it"
    assert_as_good(texts, decoded(encoder.tokenizer, drawn), sampled)


def assert_as_good(texts: list[str], theirs: list[str], ours: list[str]) -> None:
    """Drawn with other noise from the same distribution: the gold rule finds neither better."""
    pairs = [(gold(t, a), gold(t, b)) for t, a, b in zip(texts, theirs, ours, strict=True)]
    gold_N2 = np.array(pairs)
    won = sum(a > b for a, b in pairs) + sum(a == b for a, b in pairs) / 2
    differ_N = gold_N2[:, 0] - gold_N2[:, 1]
    error = differ_N.std(ddof=1) / len(pairs) ** 0.5
    told = *gold_N2.mean(axis=0), error, won / len(pairs)
    logger.info("gold of vLLM's answers %.3f, of ours %.3f (error %.3f); GRA %.3f", *told)
    assert theirs != ours
    assert abs(differ_N.mean()) < 4 * error


def gap(policy: Any, prompt: list[int], answer: list[int]) -> float:
    """By how much our logits prefer another token, at the place where they do most."""
    with torch.no_grad():
        logits_LV = policy(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    chosen_L = logits_LV.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits_LV.max(dim=1).values - chosen_L).max())
