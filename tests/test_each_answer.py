"""Each answer's number is its own, of its pair, side and model, whatever is scored beside it."""

from __future__ import annotations

import itertools
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny import tiny_classifier, tiny_tokenizer
from world import SHARDS, World, answer, named

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.generation import generate
from cwpo_dist.lm.loading import ModelError, load_policy, load_reward_model
from cwpo_dist.pairs.records import PROMPT_SCHEMA, SCORE_SCHEMA
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.earlier_scores import EarlierScores, NewAnswersWorker, ranged_files
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import AnswerWorker, ReferenceWorker, RewardWorker, states_module
from cwpo_dist.stages import (
    annotate,
)
from cwpo_dist.storage import MANIFEST, Store


def model_input(world: World, split: str, k: int, side: str) -> tuple[int, torch.Tensor]:
    """Of one answer: the tokens of its prompt, and all ids as a stock model takes them."""
    row = world.encoder.encode(f"prompt {split} {k}: ", (answer(split, k, side),))
    return len(row.prompt), torch.tensor([[*row.prompt, *row.answers[0]]])


def test_each_answer_has_the_log_prob_that_the_model_gives_it(tmp_path: Path) -> None:
    """Whatever micro-batches its shard is cut into; of the asked splits alone."""
    world = World(tmp_path, ["human"])
    world.tokenise()
    policy = world.config.policy
    assert policy is not None
    stock, splits = load_policy(policy), ("test", "unlabelled")
    answers = AnswersIn(world.place("prepare"), splits)
    worker = ReferenceWorker(answers, world.place("tokens"), policy, max_tokens=100)
    for index, held in enumerate(SHARDS):
        rows = worker(index, worker.read(index)).rows.to_pylist()
        (split,) = set(held) & set(splits)
        found = {row["answer_id"]: row for row in rows}
        assert list(found) == sorted(named(split, k, side) for k in range(3) for side in "ab")
        for k, side in itertools.product(range(3), "ab"):
            row = found[named(split, k, side)]
            start, ids = model_input(world, split, k, side)
            with torch.no_grad():
                logps = stock(ids).logits.log_softmax(-1)[0, start - 1 : -1]
            value = float(logps.gather(1, ids[0, start:, None]).sum())
            assert row["logp"] == pytest.approx(value, rel=1e-4)
            assert row["tokens"] == ids.shape[1] - start


def test_each_answer_has_the_score_that_the_model_gives_it(tmp_path: Path) -> None:
    """Also where an earlier output holds some of them: those are copied, the others scored."""
    world = World(tmp_path, ["human"])
    tiny_classifier("llama").save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    model = ModelConfig(model_name_or_path=str(tmp_path / "reward"), chat_template="plain")
    stock = load_reward_model(model)
    answers = AnswersIn(world.place("prepare"), ("test", "validation"))

    def make_worker() -> RewardWorker:
        return RewardWorker(answers, model, "it", max_tokens=150)

    def scored(worker: Any) -> dict[str, float]:
        table = worker(1, worker.read(1)).rows
        return dict(zip(table["answer_id"].to_pylist(), table["score"].to_pylist(), strict=True))

    expected = {}
    for split, k, side in itertools.product(SHARDS[1], range(3), "ab"):
        with torch.no_grad():
            score = float(stock(model_input(world, split, k, side)[1]).logits)
        expected[named(split, k, side)] = pytest.approx(score, abs=1e-4)
    assert scored(make_worker()) == expected
    before = Store(str(tmp_path / "before"))
    one, other = named("test", 1, "a"), named("test", 2, "b")
    told = [{"answer_id": one, "annotator": "it", "score": 9.0}]
    before.create_table(part("scores", 0), pa.Table.from_pylist(told, schema=SCORE_SCHEMA))
    later = Store(str(tmp_path / "later"))
    told = [told[0] | {"score": 7.0}, told[0] | {"answer_id": other, "score": 8.0}]
    told.sort(key=itemgetter("answer_id"))
    later.create_table(part("scores", 0), pa.Table.from_pylist(told, schema=SCORE_SCHEMA))
    earlier = EarlierScores(ranged_files([before, later], "scores"))
    copied = {one: 9.0, other: 8.0}
    assert scored(NewAnswersWorker(earlier, answers, make_worker)) == expected | copied


def test_states_are_a_projection_of_what_the_head_reads_and_the_score(tmp_path: Path) -> None:
    world = World(tmp_path, ["human"])
    tiny_classifier("llama").save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    model = ModelConfig(model_name_or_path=str(tmp_path / "reward"), chat_template="plain")
    stock, answers = load_reward_model(model), AnswersIn(world.place("prepare"), ("test",))
    worker = RewardWorker(answers, model, "it", max_tokens=150, load=states_module)
    table = worker(1, worker.read(1)).rows
    found = dict(zip(table["answer_id"].to_pylist(), table["heads"].to_pylist(), strict=True))
    width = stock.config.hidden_size
    drawn = torch.randn(min(64, width), width, generator=torch.Generator().manual_seed(0))
    for k, side in itertools.product(range(3), "ab"):
        with torch.no_grad():
            told = stock(model_input(world, "test", k, side)[1], output_hidden_states=True)
        state = drawn @ told.hidden_states[-1][0, -1]
        expected = [*state.tolist(), float(told.logits)]
        assert found[named("test", k, side)] == pytest.approx(expected, abs=1e-3)
    tiny_classifier("bert").save_pretrained(tmp_path / "reward")
    with pytest.raises(ModelError, match="its score is no matrix"):
        states_module(model, torch.device("cpu"))


def test_each_prompt_has_the_answer_that_was_sampled_for_it(tmp_path: Path) -> None:
    """Prompts of unlike length, which no batch leaves in their order."""
    world = World(tmp_path, ["human"])
    policy = world.config.policy
    assert policy is not None
    sampling = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    prompts = [list(range(5, 5 + n)) for n in (9, 3, 6)]
    given = Store(str(tmp_path / "given"))
    rows = [{"pair_id": f"p{len(prompt)}", "tokens": prompt} for prompt in prompts]
    given.create_table(part("prompts", 0), pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA))
    worker = AnswerWorker(given, policy, sampling, together=3)
    told = {r["pair_id"]: r["answer"] for r in worker(0, worker.read(0)).rows.to_pylist()}
    model, tokenizer = load_policy(policy), world.encoder.tokenizer
    for prompt in prompts:
        (alone,) = generate(model, tokenizer, [prompt], batch_size=1, **sampling)
        assert told[f"p{len(prompt)}"] == alone
    assert len(set(told.values())) == 3


def test_a_retry_is_of_the_answers_that_it_is_told(tmp_path: Path) -> None:
    world = World(tmp_path, ["human"])
    selected = [named("labelled", 0, "a"), named("test", 1, "b")]
    prepared = world.place("prepare")
    read = AnswersIn(prepared, None, selected=lambda index: selected)
    rows = [read.read(k) for k in range(2)]
    assert [[row.name for row in of] for of in rows] == [[name] for name in selected]
    (row,) = rows[1]
    file = prepared.read_table("answers/part-00001.parquet")
    assert file["answer_id"][row.position].as_py() == selected[1]
    assert file["answer"][row.position].as_py() == row.given.answer == answer("test", 1, "b")


def test_scores_are_one_annotators_by_weights_and_settings(tmp_path: Path) -> None:
    """Not by the seed that draws which answer is a: a score knows no pair."""

    def who(**more: Any) -> str:
        weights = more.pop("weights", b"as fitted")
        world = World(tmp_path, ["cw"], **more)
        store = world.place("fit")
        store.child("model").write("model.safetensors", weights)
        return annotate._who(world.context, world.node("annotate"))

    same = who()
    assert who() == same
    assert who(annotate={"splits": ["test"]}) == same, "whatever answers it is given"
    others = {
        who(weights=b"fitted otherwise"),
        who(fit={"learning_rate": 1.0}),
        who(seed=3),
    }
    assert len(others | {same}) == 4
    assert who(seed=3, fit={"seeds": [0]}) == same, "with a seed of its own `fit` is the same"
    world = World(tmp_path, ["cw"])
    context, node = world.context, world.node("annotate")
    other = context.root.child("annotate", "earlier")
    other.create_json(annotate.SAME.file, annotate._who(context, node))
    world.score()  # another output of this very annotator …
    lying = world.place("annotate").read(part("scores", 0))
    other.create(part("scores", 0), lying)
    assert annotate.SAME.earlier(context, node).files == (), "… whose weights are not there yet"
    world.place("fit").create_json(MANIFEST, {})
    (file,) = annotate.SAME.earlier(context, node).files
    assert file.store.uri == other.uri
