"""What is measured, on which pairs and the right way round, on the paths that few runs take.

Losses without a reference, calibration, sampled answers, KL; what the explorer shows of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from world import HIGHER, LABELS, World, answer, margin

from cwpo_dist.evaluation.annotators import HeldOut
from cwpo_dist.evaluation.left_out import LeftOut
from cwpo_dist.graph import graph
from cwpo_dist.pairs.answers import read_compared
from cwpo_dist.pairs.records import (
    ANSWER_SCHEMA,
    LOG_PROB_SCHEMA,
    LogProb,
    Prompt,
    answer_id,
    prompt_id,
    table_of,
)
from cwpo_dist.results import sample
from cwpo_dist.runs import divergence, scored_by
from cwpo_dist.runs.scored_by import Scorers
from cwpo_dist.scoring.answers_in import read_tokens
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.stages import evaluate, generate

OTHER = {"a": "b", "b": "a"}
SIGN = {"a": 1, "b": -1}


def logp(text: str) -> float:
    """A log-prob by which each answer is known again."""
    return -3.0 - len(text) - 20.0 * ("won" in text) - 40.0 * ("high" in text)


def test_without_a_reference_the_reward_is_of_a_tokens_mean(tmp_path: Path) -> None:
    """By hand, pair by pair: the mean of the answer that people chose less that of the other."""
    world = World(tmp_path, ["human"], align={"loss_type": "simpo", "beta": 2.0})
    world.log_probs("aligned", None, logp)
    evaluate.make(world.context, world.node("evaluate"))
    items = world.place("evaluate").read_table(evaluate.ITEMS).to_pylist()
    expected = {}
    for k in range(3):
        won, lost = (answer("test", k, side) for side in (LABELS[k], OTHER[LABELS[k]]))
        expected[f"test-{k}"] = 2.0 * (logp(won) / len(won) - logp(lost) / len(lost))
    assert {row["pair_id"]: row["margin"] for row in items} == pytest.approx(expected, abs=1e-5)
    policy = world.place("evaluate").read_json("metrics.json")["policy"]
    assert policy["agreement"]["correct"] == sum(value > 0 for value in expected.values())
    assert policy["mean_margin"] == pytest.approx(sum(expected.values()) / 3)


def test_annotators_are_measured_on_test_and_calibrated_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With people's votes and lengths on the side of the answers that they belong to."""
    world = World(tmp_path, ["cw_calibrated"])
    world.score()
    world.log_probs("reference", None, logp)
    world.log_probs("aligned", None, logp)
    given: list[Any] = []

    def figures(*told: Any, by_member: bool) -> dict[str, Any]:
        given.append((*told, by_member))
        return {}

    monkeypatch.setattr(evaluate, "annotator_figures", figures)
    evaluate.make(world.context, world.node("evaluate"))
    ((measured, calibrated, names, by_member),) = given
    assert (names, by_member) == (["seed 0"], True)
    _is_held_out(measured, "test")
    _is_held_out(calibrated, "validation")
    same = World(tmp_path / "same", ["weak"], evaluate={"split": "validation"})
    same.score()
    same.log_probs("reference", None, logp)
    same.log_probs("aligned", None, logp)
    evaluate.make(same.context, same.node("evaluate"))
    measured, calibrated, _, by_member = given[1]
    _is_held_out(measured, "validation")
    assert calibrated is None, "temperatures are never fitted to what is measured"
    assert not by_member


def test_answers_are_sampled_to_prompts_of_the_judged_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, ["human"], evaluate={"num_prompts": 2, "temperature": 0.7})
    world.tokenise()
    jobs: list[ShardJob] = []
    monkeypatch.setattr(generate, "run_shards", lambda job, pool: jobs.append(job) or {})
    for role, trained in (
        ("answers_base", None),
        ("answers_sft", "sft"),
        ("answers_aligned", "align"),
    ):
        node = world.node(role)
        generate.make(world.context, node)
        store = world.place(role)
        rows = [row for n in store.names("prompts") for row in store.read_table(n).to_pylist()]
        assert [row["pair_id"] for row in rows] == ["test-0", "test-1"]
        texts = [world.encoder.tokenizer.decode(row["tokens"]) for row in rows]
        assert all(f"prompt test {k}: " in text for k, text in enumerate(texts))
        _, model, sampling, _ = jobs[-1].make_worker.args  # type: ignore[attr-defined]  # a partial
        policy = world.config.policy
        assert policy is not None
        place = world.place(trained).child("model").uri if trained else None
        assert model.model_name_or_path == (place or policy.model_name_or_path)
        assert sampling["seed"] == node.settings.identity()["seed"]
        assert sampling["temperature"] == 0.7


def test_a_resumed_sampling_keeps_its_files_under_another_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is the prompts of its first file; how many are answered at once is as told now."""
    jobs: list[ShardJob] = []
    monkeypatch.setattr(generate, "run_shards", lambda job, pool: jobs.append(job) or {})
    files = []
    world = World(tmp_path, ["human"], evaluate={"num_prompts": 3})
    world.tokenise()
    store = world.place("answers_base")
    for size in (2, 1, 3):
        changes = {"generation_batch_size": size}
        evaluate = world.config.evaluate.model_copy(update=changes)
        node = graph(world.config.model_copy(update={"evaluate": evaluate}), "human")
        generate.make(world.context, node["answers_base"])
        files.append([store.read_table(name).num_rows for name in store.names("prompts")])
        assert jobs[-1].shards == 2
        assert jobs[-1].make_worker.args[-1] == size  # type: ignore[attr-defined]  # a partial
    assert files == [[2, 1]] * 3


def _is_held_out(held: HeldOut, split: str) -> None:
    """The three pairs of a split, as `world` made them."""
    assert list(held.labels) == list(LABELS)
    signs = [SIGN[side] for side in HIGHER]
    assert held.margins_NK[:, 0].tolist() == [signs[k] * margin(k) for k in range(3)]
    share = [3 / (3 + k) for k in range(3)]  # of people who chose the label
    assert held.people.tolist() == [
        share[k] if LABELS[k] == "a" else 1 - share[k] for k in range(3)
    ]
    assert held.length_a.tolist() == [len(answer(split, k, "a")) for k in range(3)]
    assert held.length_b.tolist() == [len(answer(split, k, "b")) for k in range(3)]
    assert len(set(held.prompts)) == 3


def lay_answers(world: World, texts: dict[str, list[str]]) -> None:
    """Sampled answers of the three models to the prompts of the test pairs."""
    for role, told in texts.items():
        ids = [f"test-{k}" for k in range(len(told))]
        table = pa.table({"pair_id": ids, "answer": told}, schema=ANSWER_SCHEMA)
        world.place(role).create_table(part("answers", 0), table)


ANSWERS = {
    "answers_base": ["aaaa", "aa"],
    "answers_sft": ["zaaaaaaaa", "z"],
    "answers_aligned": ["zz", "zzzzz"],
}


def zs_less_length(prompt: str, text: str) -> float:
    return text.count("z") - len(text) / 100


def test_lengths_and_gold_scores_stand_on_their_side(tmp_path: Path) -> None:
    gold = {"num_prompts": 2, "gold_function": "test_measured:zs_less_length"}
    world = World(tmp_path, ["human"], evaluate=gold)
    lay_answers(world, ANSWERS)
    world.log_probs("reference", None, logp)
    world.log_probs("aligned", None, logp)
    evaluate.make(world.context, world.node("evaluate"))
    metrics = world.place("evaluate").read_json("metrics.json")
    ours = ANSWERS["answers_aligned"]
    for against, role in (("own_sft", "answers_sft"), ("common", "answers_base")):
        theirs = ANSWERS[role]
        told = metrics["answers"][against]
        assert told["length"] == np.mean([*map(len, ours)])
        assert told["baseline_length"] == np.mean([*map(len, theirs)])
        assert told["length_controlled"] > 0.8, "both are won, the one shorter, the other longer"
        rows = world.place("evaluate").read_table(evaluate.ANSWERS).to_pylist()
        for row in (row for row in rows if row["against"] == against):
            k = int(row["pair_id"][-1])
            assert (row["length"], row["baseline_length"]) == (len(ours[k]), len(theirs[k]))
            assert row["gold"] == zs_less_length("", ours[k])
            assert row["baseline_gold"] == zs_less_length("", theirs[k])


def test_kl_is_of_the_aligned_models_answers_aligned_less_sft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models read the aligned one's own answers alone: −2 less −7, and −1 less −2."""
    world = World(tmp_path, ["human"], evaluate={"num_prompts": 2, "kl": True})
    lay_answers(world, ANSWERS)
    for role in ("sft", "align"):
        shutil.copytree(tmp_path / "model", world.place(role).child("model").root)
    read = {"aligned": {"zz": -2.0, "zzzzz": -1.0}, "sft": {"zz": -7.0, "zzzzz": -2.0}}
    models: dict[str, str] = {}

    def run_shards(job: ShardJob, *_: Any) -> dict[str, Any]:
        role = job.output.uri.rsplit("/", 1)[-1]
        answers, tokens, model, _ = job.make_worker.args  # type: ignore[attr-defined]  # a partial
        models[role] = model.model_name_or_path
        rows = []
        found = read_tokens(tokens, 0)
        for k, pair in enumerate(read_compared(answers.store, 0)):
            told = [ANSWERS[of][k] for of in ("answers_sft", "answers_aligned")]
            asked = prompt_id(f"prompt test {k}: ")
            assert pair[:3] == (f"test-{k}", *(answer_id(asked, text) for text in told))
            (ids,) = found.pop(pair.answer_b).answers
            text = world.encoder.tokenizer.decode(ids, skip_special_tokens=True)
            assert text == told[1]
            rows += [LogProb(pair.answer_a, -100.0, 1), LogProb(pair.answer_b, read[role][text], 1)]
        assert not found, "of the baseline's answers there are no tokens"
        job.output.create_table(part("reference", 0), table_of(rows, LOG_PROB_SCHEMA))
        return {}

    monkeypatch.setattr(scored_by, "run_shards", run_shards)
    prompts = {f"test-{k}": Prompt(f"prompt test {k}: ") for k in range(2)}
    policy, by = world.config.policy, Scorers(world.config.reference, world.config.align)
    assert policy is not None
    found = divergence.kl_divergence(
        world.context, world.node("evaluate"), prompts, policy, by, new_tokens=8, rows_a_shard=1024
    )
    assert (found.n, found.mean, found.error) == (2, 3.0, 2.0)
    assert found.left_out == LeftOut()
    for role, trained in (("sft", "sft"), ("aligned", "align")):
        assert models[role] == world.place(trained).child("model").uri


def test_the_explorer_shows_what_a_policy_said_before_and_after(tmp_path: Path) -> None:
    world = World(tmp_path, ["cw"], evaluate={"num_prompts": 2})
    world.score()
    lay_answers(world, ANSWERS)
    found = {pair["id"]: pair for pair in sample.sample(world.context, world.graphs)["pairs"]}
    assert found["test-1"]["answers"] == {"cw": {"before": "z", "after": "zzzzz"}}
    assert found["test-2"]["answers"] == {}


def test_the_labelled_part_alone_uncovers_no_label_of_the_other(tmp_path: Path) -> None:
    """`labelled_only` trains on people's labels, but has read none of an unlabelled pair."""
    world = World(tmp_path, ["cw", "labelled_only"])
    world.score()
    found = {pair["id"]: pair for pair in sample.sample(world.context, world.graphs)["pairs"]}
    for pair_id, pair in found.items():
        split, k = pair_id.split("-")
        assert pair["label"] == (None if split == "unlabelled" else LABELS[int(k)])
