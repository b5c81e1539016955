"""Numbers and tokens of answers, joined to the pairs that compare them: a, b, and those alike."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scored import store_of
from tiny import save_tiny, tiny_classifier, tiny_tokenizer

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.templates import Fault
from cwpo_dist.pairs.records import (
    SCORE_SCHEMA,
    Reject,
    Score,
    answer_id,
    prompt_id,
    table_of,
)
from cwpo_dist.pairs.stored import Pair
from cwpo_dist.runs.joined import ScoresIn, pair_log_probs, pair_prompts, pair_rows, read_log_probs
from cwpo_dist.scoring.answers_in import AnswersIn, read_tokens
from cwpo_dist.scoring.driver import run_here
from cwpo_dist.scoring.earlier_scores import EarlierScores, NewAnswersWorker, ranged_files
from cwpo_dist.scoring.pipeline import ShardJob, committed_rejects, part
from cwpo_dist.scoring.scorers import ReferenceWorker, RewardWorker, TokenWorker
from cwpo_dist.stages.implicit import rewards
from cwpo_dist.storage import Store

TRIMS = "{% for message in messages %}{{ message['content'] | trim }}|{% endfor %}"
LONG = "rather long " * 20
PAIRS = [
    Pair("better", "Which?", "yes", "no"),
    Pair("worse", "Which?", "no", " yes\n"),
    Pair("alike", "Which?", "yes", " yes\n"),
    Pair("long", "Who?", "I", LONG),
    Pair("other", "Who?", "I", "you"),
]
KNOWN = {"better", "worse", "other"}  # both answers can be read, and told apart


def named(pair: Pair) -> tuple[str, str]:
    """The ids of its answers."""
    a, b = (answer_id(prompt_id(pair.prompt), text) for text in pair.answers)
    return a, b


@pytest.fixture
def prepared(tmp_path: Path) -> Store:
    return store_of(tmp_path / "prepared", PAIRS)


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    """A policy and, beside it, a reward model, whose template trims."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TRIMS
    tiny_classifier("llama").save_pretrained(tmp_path / "reward")
    for folder in (save_tiny(tmp_path / "policy", "llama"), tmp_path / "reward"):
        tokenizer.save_pretrained(folder)
    return ModelConfig(model_name_or_path=str(tmp_path / "policy"), max_length=60)


def made(output: Store, name: str, worker: Any, *told: Any) -> dict[str, Any]:
    counts: dict[str, Any] = run_here(ShardJob(name, output, 1, partial(worker, *told)))
    return counts


def told_of_pairs(output: Store, name: str) -> list[Reject]:
    found = committed_rejects(output, part(name, 0))
    return [reject for reject in found if reject.source.startswith("pairs/")]


def test_margins_are_of_pairs_whose_answers_have_scores_and_differ(
    tmp_path: Path, prepared: Store, model: ModelConfig
) -> None:
    output, answers = Store(str(tmp_path / "scores")), AnswersIn(prepared)
    reward = model.model_copy(update={"model_name_or_path": str(tmp_path / "reward")})
    counts = made(output, "scores", RewardWorker, answers, reward, "it", 1024)
    assert (counts["rows_in"], counts["rows"], counts["over_length"]) == (6, 5, 1)
    assert (counts["rejects"], counts["alike"]) == (0, 1), "of pairs, and no answers"
    (reject,) = told_of_pairs(output, "scores")
    assert (reject.row, reject.source, reject.position) == ("alike", "pairs/part-00000.parquet", 2)
    assert reject.reason.startswith(f"{Fault.IDENTICAL}: ")
    rows = output.read_table(part("scores", 0)).to_pylist()
    score = {row["answer_id"]: row["score"] for row in rows}
    assert len(rows) == len(score) == 5
    found = ScoresIn(output, 0, prepared).read(0)
    by_id = {pair.pair_id: named(pair) for pair in PAIRS}
    assert found == {name: score[by_id[name][0]] - score[by_id[name][1]] for name in KNOWN}
    assert found["better"] == -found["worse"] != 0


def test_tokens_and_log_probs_are_of_a_and_b_in_their_order(
    tmp_path: Path, prepared: Store, model: ModelConfig
) -> None:
    tokens, output = Store(str(tmp_path / "tokens")), Store(str(tmp_path / "reference"))
    answers, tokenizer = AnswersIn(prepared), tiny_tokenizer()
    counts = made(tokens, "tokens", TokenWorker, answers, model)
    assert (counts["rows"], counts["over_length"], counts["alike"]) == (5, 1, 1)
    rows = pair_rows(tokens, prepared, 0)
    assert rows.keys() == KNOWN
    for pair in PAIRS:
        if pair.pair_id in rows:
            row = rows[pair.pair_id]
            texts = [
                tokenizer.decode([*row.prompt, *ids], skip_special_tokens=True)
                for ids in row.answers
            ]
            assert texts == [f"{pair.prompt}|{text.strip()}|" for text in pair.answers]
    made(output, "reference", ReferenceWorker, answers, tokens, model, 1024)
    assert [reject.row for reject in told_of_pairs(output, "reference")] == ["alike"]
    each, found = read_log_probs(output, 0), pair_log_probs(output, prepared, 0)
    assert each.keys() == read_tokens(tokens, 0).keys()
    assert found.keys() == KNOWN
    for pair in PAIRS:
        if pair.pair_id in found:
            assert found[pair.pair_id] == tuple(each[name] for name in named(pair))
    assert found["better"].sums == found["worse"].sums[::-1]
    assert len(set(found["better"].sums)) == 2


@pytest.mark.parametrize("copied", [{"yes"}, {" yes\n"}, {"yes", " yes\n"}])
def test_what_was_scored_before_changes_no_pair(
    copied: set[str], tmp_path: Path, prepared: Store, model: ModelConfig
) -> None:
    """Also where one of two answers that are alike was, or both were."""
    answers = AnswersIn(prepared)
    reward = model.model_copy(update={"model_name_or_path": str(tmp_path / "reward")})
    make_worker = partial(RewardWorker, answers, reward, "it", 1024)
    fresh, before, grown = (Store(str(tmp_path / name)) for name in ("fresh", "before", "grown"))
    told = made(fresh, "scores", make_worker)
    some = {answer_id(prompt_id("Which?"), text) for text in copied}
    read = AnswersIn(prepared, selected=lambda _: some)
    made(before, "scores", RewardWorker, read, reward, "it", 1024)
    earlier = EarlierScores(ranged_files([before], "scores"))
    counts = made(grown, "scores", NewAnswersWorker, earlier, answers, make_worker)
    assert counts["reused"] == len(copied)
    assert counts["alike"] == told["alike"] == 1
    assert told_of_pairs(grown, "scores") == told_of_pairs(fresh, "scores")
    found = ScoresIn(grown, 0, prepared).read(0)
    assert found == pytest.approx(ScoresIn(fresh, 0, prepared).read(0), abs=1e-5)
    assert found.keys() == KNOWN


def test_what_differs_beyond_the_cut_alone_is_too_long_and_prompts_stay_whole(
    tmp_path: Path, model: ModelConfig
) -> None:
    """Answers of unlike length take unlike parts of a long prompt; who asks it takes the longer."""
    asked = [f"{k} what is the longest word of all?" for k in range(2)]
    pairs = [
        *(Pair(f"{k}", text, "yes", "no, never") for k, text in enumerate(asked)),
        Pair("cut", "Which?", "z" * 60 + "A", "z" * 60 + "B"),
    ]
    store = store_of(tmp_path / "long", pairs)
    output = Store(str(tmp_path / "tokens"))
    short = model.model_copy(update={"max_length": 24, "over_length": "truncate"})
    counts = made(output, "tokens", TokenWorker, AnswersIn(store), short)
    assert (counts["rows"], counts["over_length"]) == (6, 0)
    assert (counts["alike"], counts["alike_when_cut"]) == (0, 1)
    (reject,) = told_of_pairs(output, "tokens")
    assert (reject.row, reject.reason) == ("cut", Fault.OVER_LENGTH)
    rows, prompts = pair_rows(output, store, 0), pair_prompts(output, store, 0)
    assert rows.keys() == prompts.keys() == {"0", "1"}
    for k, text in enumerate(asked):
        told = tiny_tokenizer().decode(prompts[f"{k}"], skip_special_tokens=True)
        shorter, longer = sorted(len(read_tokens(output, 0)[n].prompt) for n in named(pairs[k]))
        assert shorter < longer == len(prompts[f"{k}"])
        assert told.endswith("all?|")
        assert told[0] == text[0]


def test_an_implicit_reward_knows_the_pairs_that_its_policy_cannot_tell_apart(
    tmp_path: Path, prepared: Store, model: ModelConfig
) -> None:
    answers, tokens = AnswersIn(prepared), Store(str(tmp_path / "tokens"))
    before, after = (Store(str(tmp_path / when)) for when in ("before", "after"))
    made(tokens, "tokens", TokenWorker, answers, model)
    made(before, "reference", ReferenceWorker, answers, tokens, model, 1024)
    other = str(save_tiny(tmp_path / "other", "llama", seed=1))
    trained = model.model_copy(update={"model_name_or_path": other})
    made(after, "reference", ReferenceWorker, answers, tokens, trained, 1024)
    output = Store(str(tmp_path / "scores"))
    scores = rewards(read_log_probs(before, 0), read_log_probs(after, 0), 0.5, "it")
    output.create_table(part("scores", 0), table_of(scores, SCORE_SCHEMA))
    assert len(scores) == 5
    old, new = (pair_log_probs(each, prepared, 0) for each in (before, after))
    found = ScoresIn(output, 0, prepared).read(0)
    assert found.keys() == KNOWN
    for name, margin in found.items():
        (a, b), (old_a, old_b) = new[name].sums, old[name].sums
        assert margin == pytest.approx(0.5 * ((a - old_a) - (b - old_b)), rel=1e-4)


def test_of_splits_that_are_asked_for_alone_pairs_are_told_to_be_alike(
    tmp_path: Path, model: ModelConfig
) -> None:
    """Both answers may be read for other pairs' sake."""
    pairs = [
        Pair("better", "Which?", "yes", "no", split="test"),
        Pair("worse", "Which?", "no", " yes\n", split="test"),
        Pair("alike", "Which?", "yes", " yes\n", split="labelled"),
    ]
    answers = AnswersIn(store_of(tmp_path / "of_splits", pairs), ("test",))
    output = Store(str(tmp_path / "tokens"))
    counts = made(output, "tokens", TokenWorker, answers, model)
    assert (counts["rows"], counts["alike"]) == (3, 0)
    assert told_of_pairs(output, "tokens") == []


def test_a_pair_has_a_margin_once_its_second_answer_was_scored(
    tmp_path: Path, prepared: Store
) -> None:
    """By a retry, say, whose file stands beside the first one."""
    output = Store(str(tmp_path / "scores"))
    (yes, no), (i, you) = named(PAIRS[0]), named(PAIRS[4])
    files = {0: {yes: 2.0, i: 0.5}, 1: {no: 0.25}, 2: {you: 4.5}}
    margins = [{}, {"better": 1.75}, {"better": 1.75, "other": -4.0}]
    for retry, given in files.items():
        rows = [Score(name, "it", score) for name, score in sorted(given.items())]
        output.create_table(part("scores", 0, retry), table_of(rows, SCORE_SCHEMA))
    for retries, expected in enumerate(margins):
        assert ScoresIn(output, retries, prepared).read(0) == expected
