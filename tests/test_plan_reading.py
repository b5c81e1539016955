"""What `plan` says of how models read the pairs, and that the run finds the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHAT_TEMPLATE, save_tiny, tiny_classifier, tiny_tokenizer, word_tokenizer

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.graph import STAGES, nodes_until
from cwpo_dist.lm.loading import save
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs import scored_by
from cwpo_dist.runs.checks import check
from cwpo_dist.runs.context import Context
from cwpo_dist.scoring.driver import run_here
from cwpo_dist.storage import MANIFEST, Store

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + CHAT_TEMPLATE
)
TRIMS = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHAT_TEMPLATE
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part['text'] }}"
    "{% endfor %}\n{% endfor %}"
)
DROPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}\n{% endfor %}"

Row = dict[str, Any]


def row(i: int, system: bool = False, same: bool = False) -> Row:
    start = [{"role": "system", "content": "Answer with care."}] if system else []
    answers = ("yes", " yes\n") if same else (f"It is {2 * i}.", f"Surely {2 * i + 1}, I think.")
    return {
        "prompt": [*start, {"role": "user", "content": f"What is {i} + {i}?"}],
        "response_a": [{"role": "assistant", "content": answers[0]}],
        "response_b": [{"role": "assistant", "content": answers[1]}],
        "label": "a",
    }


def config_of(folder: Path, template: str, rows: list[Row], **changes: Any) -> Config:
    """Pairs to be annotated by a ready reward model with a template."""
    save_ready(folder / "rm", template)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    model = {"model_name_or_path": str(folder / "rm"), **changes}
    return parse_config(
        {
            "output_dir": str(folder / "run"),
            "prepare": {
                "sources": [{"path": str(folder / "pairs.jsonl")}],
                "labelled_fraction": 1.0,
                "test_fraction": 0.0,
            },
            "annotate": {"cpus_per_actor": 0.5, "model": model},
        }
    )


def save_ready(folder: Path, template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    save(tiny_classifier("llama"), tokenizer, folder)


@pytest.fixture
def annotated(
    in_process: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Config], dict[str, Any]]:
    """Runs a configuration up to `annotate`, in this process; its counts."""

    def here(job: Any, _pool: Any, _check: Any) -> dict[str, Any]:
        return run_here(job)

    monkeypatch.setattr(scored_by, "run_shards", here)

    def counts(config: Config) -> dict[str, Any]:
        context = Context(Store(config.output_dir))
        for node in nodes_until(config, "cw", "annotate").values():
            found = STAGES[node.stage].make(context, node)
            context.place(node).create_json(MANIFEST, {"counts": found})
        return found

    return counts


def test_one_pair_that_a_template_refuses_is_told_and_set_aside(
    tmp_path: Path, annotated: Callable[[Config], dict[str, Any]]
) -> None:
    rows = [row(i, system=i == 7) for i in range(60)]
    config = config_of(tmp_path, NO_SYSTEM, rows)
    (note,) = [note for note in plan(config).notes if "set aside" in note]
    assert note.startswith("annotate.model: 1 of 60 sampled pairs are set aside: 1 × refused by")
    assert "no system here" in note
    counts = annotated(config)
    assert (counts["rows_in"], counts["rows"], counts["rejects"]) == (120, 118, 2)
    assert counts["rejects: refused by the chat template"] == 2, "both answers to one prompt"


@pytest.mark.parametrize(
    ("template", "rows", "reason"),
    [
        (TRIMS, [row(i, same=True) for i in range(20)], "the same tokens for both answers"),
        (TRIMS, [row(0, same=True)], "the same tokens for both answers"),
        (TRIMS, [row(i, same=i < 3) for i in range(40)], "the same tokens for both answers"),
        (DROPS, [row(i) for i in range(20)], "left out by the chat template"),
        (NO_SYSTEM, [row(i, system=True) for i in range(20)], "refused by the chat template"),
    ],
)
def test_many_pairs_that_a_model_cannot_read_are_refused_by_plan_and_run(
    template: str,
    rows: list[Row],
    reason: str,
    tmp_path: Path,
    annotated: Callable[[Config], dict[str, Any]],
) -> None:
    config = config_of(tmp_path, template, rows)
    with pytest.raises(ConfigError) as caught:
        plan(config)
    said = str(caught.value)
    assert said.startswith(f"annotate.model.chat_template: '{tmp_path}/rm' with 'tokenizer' cannot")
    assert reason in said
    assert "annotate.max_reject_fraction (0.05)" in said
    assert "max_length" not in said
    with pytest.raises(RejectsError, match=rf"× {reason}.*annotate\.max_reject_fraction 0\.05"):
        annotated(config)


def test_what_a_fraction_allows_is_a_note_and_a_count(
    tmp_path: Path, annotated: Callable[[Config], dict[str, Any]]
) -> None:
    config = config_of(tmp_path, TRIMS, [row(i, same=i < 2) for i in range(40)])
    (note,) = [note for note in plan(config, show=1).notes if "set aside" in note]
    assert "2 of 40 sampled pairs are set aside: 2 × the same tokens for both answers" in note
    counts = annotated(config)
    assert (counts["rows"], counts["rejects"], counts["alike"]) == (80, 0, 2)


def test_a_template_that_reads_lists_of_parts_is_no_fault(
    tmp_path: Path, annotated: Callable[[Config], dict[str, Any]]
) -> None:
    config = config_of(tmp_path, PARTS, [row(i) for i in range(12)])
    planned = plan(config, show=1)
    assert "What is" in planned.rows[0].prompt
    assert annotated(config)["rows"] == 24


def test_which_token_is_read_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    rows = [row(i, system=i % 2 == 0) for i in range(10)]
    content = "{% if message.role != 'system' %}{{ message.content }}{% endif %}"
    silent = CHAT_TEMPLATE.replace("{{ message['content'] }}", content)
    notes = plan(config_of(tmp_path, silent, rows)).notes
    assert r"annotate.model reads the last token of its own rendering: '\n' after '</s>'" in notes
    assert (
        "annotate.model: its chat template writes nothing of messages of role 'system' in 5 of 10 "
        "sampled pairs" in notes
    )


def test_each_kind_of_model_says_how_it_reads(tmp_path: Path) -> None:
    save_tiny(tmp_path / "lm", "llama")
    save(
        tiny_classifier("bert", vocab_size=len(word_tokenizer()), pad_token_id=2),
        word_tokenizer(),
        tmp_path / "bert",
    )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
    lm = {"model_name_or_path": str(tmp_path / "lm")}
    config = parse_config(
        {
            "output_dir": str(tmp_path / "run"),
            "prepare": {"sources": [{"path": str(tmp_path / "pairs.jsonl")}]},
            "weak": lm,
            "policy": lm,
            "evaluate": {"gold_model": {"model_name_or_path": str(tmp_path / "bert")}},
        }
    )
    notes = plan(config).notes
    assert "weak reads the last token of its own rendering: '</s>'" in notes
    assert "policy reads the tokens of an answer up to EOS, '</s>'" in notes
    (gold,) = [note for note in notes if note.startswith("evaluate.gold_model ")]
    assert "reads tokenizer(question, answer) as a whole: '[CLS] question [SEP] answer [SEP]" in (
        gold.replace(" ##", "")
    )


def test_a_template_with_todays_date_is_pinned_said_and_in_the_key(tmp_path: Path) -> None:
    config = config_of(tmp_path, DATED, [row(i) for i in range(8)])
    (note,) = [note for note in plan(config).notes if "date" in note]
    assert "it is 26 Jul 2024 every day (annotate.model.template_date)" in note
    other = config_of(tmp_path, DATED, [row(i) for i in range(8)], template_date="2025-01-31")
    (note,) = [note for note in plan(other).notes if "date" in note]
    assert "31 Jan 2025" in note
    keys = {nodes_until(each, "cw", "annotate")["annotate"].key for each in (config, other)}
    assert len(keys) == 2
    shown = plan(other, show=1).rows[0].prompt
    assert shown.startswith("2025-01-31")


def test_positions_behind_the_pad_token_are_none_to_use(tmp_path: Path) -> None:
    """RoBERTa's table of 514 serves 512 tokens, as its forward shows."""
    tokenizer = word_tokenizer("roberta")
    settings = {"vocab_size": len(tokenizer), "pad_token_id": 1, "max_position_embeddings": 514}
    model = tiny_classifier("roberta", **settings)
    config = config_of(tmp_path, CHAT_TEMPLATE, [row(i) for i in range(8)], max_length=513)
    save(model, tokenizer, tmp_path / "rm")
    with torch.no_grad():
        model(torch.full((1, 512), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 513), 5))
    with pytest.raises(ConfigError, match=r"513 tokens, but .* has positions for 512"):
        check(config, "annotate")
    fits = config_of(tmp_path, CHAT_TEMPLATE, [row(i) for i in range(8)], max_length=512)
    save(model, tokenizer, tmp_path / "rm")
    assert check(fits, "annotate").sizes["annotate.model"].positions == 512


def test_pairs_that_are_all_set_aside_are_no_fault_of_max_length(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "p", "response_a": "", "response_b": "b"}] * 9
    with pytest.raises(ConfigError) as caught:
        plan(config_of(tmp_path, CHAT_TEMPLATE, rows))
    assert "none of the first 9 rows" in str(caught.value)
    assert "max_length" not in str(caught.value)


def test_a_max_length_that_nothing_can_be_cut_to_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, CHAT_TEMPLATE, [row(0)], max_length=4, over_length="truncate")
    with pytest.raises(ConfigError, match=r"annotate\.model\.max_length: 4 .*use at least 5"):
        check(config, "annotate")
