"""Every causal language model of transformers: exact, or refused by name; and the table of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import Outcome, table, walk
from tiny_kinds import FIXED, NAMES

ROOT = Path(__file__).parents[1]
NATS = 1e-3  # of an answer of up to 30 tokens, in fp32: 3e-5 a token
# transformers zeroes the pad's embedding whenever it loads this type: it is tied to the output.
RELOADED = {"youtu": 1e-2}
MERGED = ("jetmoe", "zamba")  # LoRA is refused by words of its own


def params() -> list[Any]:
    return [n if n in FIXED else pytest.param(n, marks=pytest.mark.long) for n in NAMES]


@pytest.mark.parametrize("name", params())
def test_an_architecture_is_exact_or_refused_by_name(tmp_path: Path, name: str) -> None:
    found = walk(name, tmp_path)
    if found.refused:
        assert found.refused.startswith("policy.")
        assert "\n" not in found.refused
        return
    assert found.log_probs < NATS
    assert found.gradient < 1e-4
    assert found.full < RELOADED.get(name, NATS)
    if isinstance(found.lora, str):
        assert "lora.target_modules" in found.lora
    else:
        assert found.lora < RELOADED.get(name, NATS)
    assert "DEPEND" not in found.answers


def test_the_fixed_dozen_are_of_many_kinds() -> None:
    assert len(FIXED) == len(set(FIXED)) == 12
    assert set(FIXED) <= set(NAMES)


def test_the_page_says_what_came_of_each() -> None:
    page = table(
        [
            Outcome("one", "sdpa", "packed", "equal", 1e-6, 2e-7, 3e-6, 4e-6, "in batches"),
            Outcome("two", "eager", "plain", "of ALiBi", 0.0, 0.0, 0.0, "no such", "one by one"),
            Outcome("three", refused="policy.model_name_or_path: it reads ahead"),
        ]
    )
    assert "| one | sdpa | packed | 1e-06 | 2e-07 | 3e-06 | 4e-06 | in batches |" in page
    assert "| two | eager | plain | 0e+00 | 0e+00 | 0e+00 | no such | one by one |" in page
    assert "- two: of ALiBi" in page
    assert "- three: policy.model_name_or_path: it reads ahead" in page


def test_the_page_that_is_kept_has_all_of_them() -> None:
    kept = (ROOT / "docs" / "architectures.md").read_text()
    missing = [name for name in NAMES if f"| {name} |" not in kept and f"- {name}: " not in kept]
    assert not missing, "make architectures"
