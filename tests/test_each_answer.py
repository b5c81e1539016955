"""Each answer's number is its own, of its pair, side and model, whatever is scored beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny import tiny_classifier, tiny_tokenizer
from world import SHARDS, World, answer

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.generation import generate
from cwpo_dist.lm.loading import load_policy, load_reward_model
from cwpo_dist.pairs.records import PROMPT_SCHEMA, SCORE_SCHEMA
from cwpo_dist.scoring.earlier_scores import EarlierScores, NewPairsWorker, ranged_files
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import AnswerWorker, PairsIn, ReferenceWorker, RewardWorker
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
    pairs = PairsIn(world.place("prepare"), splits)
    worker = ReferenceWorker(pairs, world.place("tokens"), policy, max_tokens=100)
    for index, held in enumerate(SHARDS):
        rows = worker(index, worker.read(index)).rows.to_pylist()
        (split,) = set(held) & set(splits)
        assert [row["pair_id"] for row in rows] == [f"{split}-{k}" for k in range(3)]
        for k, row in enumerate(rows):
            for side in "ab":
                start, ids = model_input(world, split, k, side)
                with torch.no_grad():
                    logps = stock(ids).logits.log_softmax(-1)[0, start - 1 : -1]
                value = float(logps.gather(1, ids[0, start:, None]).sum())
                assert row[f"logp_{side}"] == pytest.approx(value, rel=1e-4)
                assert row[f"n_{side}"] == ids.shape[1] - start


def test_each_answer_has_the_score_that_the_model_gives_it(tmp_path: Path) -> None:
    """Also where an earlier output holds some of them: those are copied, the others scored."""
    world = World(tmp_path, ["human"])
    tiny_classifier("llama").save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    model = ModelConfig(model_name_or_path=str(tmp_path / "reward"), chat_template="plain")
    stock = load_reward_model(model)
    pairs = PairsIn(world.place("prepare"), ("test", "validation"))

    def make_worker() -> RewardWorker:
        return RewardWorker(pairs, model, "it", max_tokens=150)

    def scored(worker: Any) -> dict[str, tuple[float, float]]:
        rows = worker(1, worker.read(1)).rows.to_pylist()
        return {row["pair_id"]: (row["score_a"], row["score_b"]) for row in rows}

    expected = {}
    for split in SHARDS[1]:
        for k in range(3):
            with torch.no_grad():
                both = [float(stock(model_input(world, split, k, s)[1]).logits) for s in "ab"]
            expected[f"{split}-{k}"] = pytest.approx(tuple(both), abs=1e-4)
    assert scored(make_worker()) == expected
    before = Store(str(tmp_path / "before"))
    told = [{"pair_id": "test-1", "annotator": "it", "score_a": 9.0, "score_b": 8.0}]
    before.create_table(part("scores", 0), pa.Table.from_pylist(told, schema=SCORE_SCHEMA))
    later = Store(str(tmp_path / "later"))
    told = [told[0] | {"score_a": 7.0}, told[0] | {"pair_id": "test-2"}]
    later.create_table(part("scores", 0), pa.Table.from_pylist(told, schema=SCORE_SCHEMA))
    earlier = EarlierScores(ranged_files([before, later]))
    copied = {"test-1": (9.0, 8.0), "test-2": (9.0, 8.0)}
    assert scored(NewPairsWorker(earlier, make_worker)) == expected | copied


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
    worker = AnswerWorker(given, policy, sampling)
    told = {r["pair_id"]: r["answer"] for r in worker(0, worker.read(0)).rows.to_pylist()}
    model, tokenizer = load_policy(policy), world.encoder.tokenizer
    for prompt in prompts:
        (alone,) = generate(model, tokenizer, [prompt], batch_size=1, **sampling)
        assert told[f"p{len(prompt)}"] == alone
    assert len(set(told.values())) == 3


def test_a_retry_is_of_the_pairs_that_it_is_told(tmp_path: Path) -> None:
    world = World(tmp_path, ["human"])
    selected = {"test-1", "labelled-0"}
    read = PairsIn(world.place("prepare"), None, selected=lambda index: selected)
    assert [[row.pair_id for row in read.read(k)] for k in range(2)] == [
        ["labelled-0"],
        ["test-1"],
    ]
    assert [row.position for row in read.read(1)] == [4]


def test_scores_are_one_annotators_by_weights_settings_and_sides(tmp_path: Path) -> None:
    """Which answer is a hangs on the seed: under another one, scores would be swapped."""

    def who(**more: Any) -> str:
        weights = more.pop("weights", b"as fitted")
        world = World(tmp_path, ["cw"], **more)
        store = world.place("fit")
        store.child("model").write("model.safetensors", weights)
        return annotate._who(world.context, world.node("annotate"))

    same = who()
    assert who() == same
    assert who(annotate={"splits": ["test"]}) == same, "whatever pairs it is given"
    others = {
        who(weights=b"fitted otherwise"),
        who(fit={"learning_rate": 1.0}),
        who(seed=3),
        # With seeds of its own `fit` is the same, but places are drawn by the run's.
        who(seed=3, fit={"seeds": [0]}),
    }
    assert len(others | {same}) == 5
    world = World(tmp_path, ["cw"])
    context, node = world.context, world.node("annotate")
    other = context.root.child("annotate", "earlier")
    other.create_json(annotate.ANNOTATOR, annotate._who(context, node))
    world.score()  # another output of this very annotator …
    lying = world.place("annotate").read(part("scores", 0))
    other.create(part("scores", 0), lying)
    assert annotate.earlier_scores(context, node).files == (), "… whose weights are not there yet"
    world.place("fit").create_json(MANIFEST, {})
    (file,) = annotate.earlier_scores(context, node).files
    assert file.store.uri == other.uri
