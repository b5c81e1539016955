"""What `plan` says of sampled answers that would be too long for who judges them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tiny_classifier, tiny_tokenizer

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.lm.loading import save
from cwpo_dist.planning.plan import plan

# Under `plain` a letter is a token, one opens the prompt and one ends the answer: 12 and 22 tokens.
PROMPTS = ["p" * 10, "p" * 20]
ABOUT = re.compile(r"evaluate.max_new_tokens \((\d+)\) to (\d+) of (\d+) sampled prompts")


def config_of(folder: Path, gold: dict[str, Any] | None, **changes: Any) -> Config:
    save_tiny(folder / "model", "llama")
    save(tiny_classifier("llama"), tiny_tokenizer(), folder / "gold")
    rows = [
        {"prompt": f"{prompt[:-3]}{k:03d}", "chosen": f"yes {k}", "rejected": f"no {k}"}
        for k in range(20)
        for prompt in PROMPTS
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    model = {"model_name_or_path": str(folder / "model"), "chat_template": "plain"}
    given: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "arms": ["human"],
        "prepare": {"sources": [{"path": str(folder / "pairs.jsonl")}], "test_fraction": 0.2},
        "policy": model | changes.pop("policy", {}),
        "evaluate": {"num_prompts": 4, "max_new_tokens": 30, **changes},
    }
    if gold is not None:
        named = {"model_name_or_path": str(folder / "gold")}
        given["evaluate"]["gold_model"] = model | named | gold
    return parse_config(given)


def notes(config: Config) -> list[str]:
    return [note for note in plan(config).notes if "max_new_tokens" in note]


def test_a_gold_model_with_no_room_for_the_longest_answers_is_told_with_what_to_set(
    tmp_path: Path,
) -> None:
    (note,) = notes(config_of(tmp_path, {"max_length": 45}))
    assert note.startswith("evaluate.gold_model.max_length: 45 tokens do not hold")
    found = ABOUT.search(note)
    assert found is not None
    assert found.groups() == ("30", "20", "40"), "the longer ones"
    assert "GRA leaves such prompts out" in note
    assert "Raise it to 52, lower evaluate.max_new_tokens to 23, or set " in note
    assert "evaluate.gold_model.over_length=truncate" in note


@pytest.mark.parametrize(
    ("gold", "changes"),
    [
        ({"max_length": 52}, {}),
        ({"max_length": 45}, {"max_new_tokens": 23}),
        ({"max_length": 45, "over_length": "truncate"}, {}),
        ({"max_length": 13}, {"num_prompts": 0}),
        (None, {}),
        ({"max_length": 45}, {"policy": {"max_length": 20}}),  # answers the shorter ones alone
    ],
)
def test_where_all_answers_fit_nothing_is_told(
    gold: dict[str, Any] | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    assert notes(config_of(tmp_path, gold, **changes)) == []


@pytest.mark.parametrize("max_length", [8, 12])
def test_a_gold_model_that_no_prompt_fits_is_refused(max_length: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"gold_model\.max_length: no .* fits {max_length} tok"):
        plan(config_of(tmp_path, {"max_length": max_length}))
    (note,) = notes(config_of(tmp_path, {"max_length": 13}))
    assert "Raise it to 52, or set" in note, "no max_new_tokens is of use to the longer ones"


def test_kl_has_the_bound_of_a_policy_that_cuts_prompts(tmp_path: Path) -> None:
    truncated = {"max_length": 45, "over_length": "truncate"}
    (note,) = notes(config_of(tmp_path, None, kl=True, policy=truncated))
    assert note.startswith("policy.max_length: 45 tokens do not hold")
    assert "KL leaves such prompts out" in note
    assert "Raise it to 52, lower evaluate.max_new_tokens to 23; or set policy.over_length" in note
    assert notes(config_of(tmp_path, None, kl=False, policy=truncated)) == []
    assert notes(config_of(tmp_path, None, kl=True, policy={"max_length": 45})) == []


def test_held_out_pairs_that_gold_alone_would_judge_are_told(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"max_length": 26}, max_new_tokens=4)
    assert not [note for note in plan(config).notes if "accuracies by gold" in note]
    rows = (tmp_path / "pairs.jsonl").read_text().splitlines()
    unlabelled = [
        {"prompt": row["prompt"], "response_a": row["chosen"], "response_b": row["rejected"]}
        for row in map(json.loads, rows)
    ]
    text = "".join(json.dumps(each) + "\n" for each in unlabelled)
    (tmp_path / "more.jsonl").write_text(text.replace("ppp", "qqq"))
    sources = [{"path": str(tmp_path / name)} for name in ("pairs.jsonl", "more.jsonl")]
    given = config.model_dump(mode="json", exclude_unset=True, by_alias=True)
    given["prepare"]["sources"] = sources
    (note,) = [n for n in plan(parse_config(given)).notes if "accuracies by gold" in n]
    assert "of test are left out" in note
