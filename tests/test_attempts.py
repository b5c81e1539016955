"""Rows that make a model or tokenizer fail: tried again, found by bisection, set aside."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny import tiny_classifier, tiny_tokenizer
from world import World

from cwpo_dist.config import ModelConfig
from cwpo_dist.pairs.records import REJECT_SCHEMA, answer_id, prompt_id
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.pairs.stored import pairs_of, whole_schema, write_pairs
from cwpo_dist.scoring import scorers
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.driver import run_here
from cwpo_dist.scoring.retries import TRIES, Input, ShardOutput, attempt
from cwpo_dist.scoring.scorers import RewardWorker
from cwpo_dist.scoring.set_aside import Limit
from cwpo_dist.scoring.tickets import ShardError
from cwpo_dist.stages import generate
from cwpo_dist.storage import StorageError, Store

N = 37
SOURCE = "pairs/part-00000.parquet"


@dataclass
class Doubling:
    """Doubles numbers; fails on some of them, in its first calls, or when some meet."""

    bad: Mapping[int, Exception] = field(default_factory=dict)
    bad_calls: int = 0
    never_together: frozenset[int] = frozenset()
    calls: int = 0

    def read(self, index: int) -> list[Input[int]]:
        return [Input(str(i), 100 + i, i) for i in range(N)]

    def __call__(self, index: int, rows: Sequence[Input[int]]) -> ShardOutput:
        self.calls += 1
        if self.calls <= self.bad_calls:
            raise RuntimeError("the network blinked")
        numbers = [row.given for row in rows]
        for number in numbers:
            if number in self.bad:
                raise self.bad[number]
        if self.never_together and self.never_together <= set(numbers):
            raise RuntimeError("together")
        table = pa.table({"double": pa.array([2 * number for number in numbers], pa.int64())})
        counts = {"rows_in": len(rows), "rows": len(rows), "rejects": 0, "over_length": 0}
        return ShardOutput(table, REJECT_SCHEMA.empty_table(), counts)


def blamed(output: ShardOutput) -> dict[str, str]:
    return {row["row"]: row["reason"] for row in output.rejects.to_pylist()}


@pytest.mark.parametrize("bad", [{0}, {36}, {7, 8, 20}, set(range(1, N))])
def test_the_rows_that_fail_are_found_and_the_rest_is_one_run_without_them(bad: set[int]) -> None:
    errors = {number: IndexError(f"{number} at <M object at 0x7f12ab>\nmore") for number in bad}
    output = attempt(Doubling(errors), 0, SOURCE)
    assert blamed(output) == {str(n): f"IndexError: {n} at <M object at 0x…>" for n in bad}
    assert output.rows["double"].to_pylist() == [2 * n for n in range(N) if n not in bad]
    assert {row["position"] - 100 for row in output.rejects.to_pylist()} == bad
    assert {row["source"] for row in output.rejects.to_pylist()} == {SOURCE}
    left = N - len(bad)
    expected = {"rows_in": N, "rows": left, "rejects": len(bad), "over_length": 0}
    assert output.counts == expected | {"rejects: IndexError": len(bad)}


@pytest.mark.parametrize("bad_calls", [1, TRIES, TRIES + 3])
def test_a_fault_that_passes_leaves_no_trace_in_the_output(bad_calls: int) -> None:
    undisturbed = attempt(Doubling(), 0, SOURCE)
    output = attempt(Doubling(bad_calls=bad_calls), 0, SOURCE)
    assert output.rows.equals(undisturbed.rows)
    assert output.counts == undisturbed.counts
    assert output.rejects.num_rows == 0


@pytest.mark.parametrize(
    "error",
    [
        StorageError("storage refused to write"),
        OSError(errno.EIO, "disk"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ImportError("no module"),
    ],
)
def test_what_no_row_can_be_blamed_for_ends_the_run_at_once(error: Exception) -> None:
    worker = Doubling({5: error})
    with pytest.raises((OSError, ImportError, ShardError)):
        attempt(worker, 0, SOURCE)
    assert worker.calls == 1


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        (
            {"tokens beyond the embeddings": 39, "left out by the chat template": 1},
            "; see .* resize",
        ),
        ({"left out by the chat template": 39, "non-finite score": 1}, "; see .* chat_template"),
        ({"non-finite score": 39, "left out by the chat template": 1}, "; see .* --retry-rejects"),
        ({"IndexError": 40}, r"\(40 × IndexError\).* --retry-rejects"),
    ],
)
def test_the_remedy_is_that_of_most_of_what_was_set_aside(
    found: dict[str, int], remedy: str, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    limit = Limit("annotate", "annotate.max_reject_fraction", 0.05, 80, 40, store)
    counts = {f"rejects: {reason}": number for reason, number in found.items()}
    with pytest.raises(RejectsError, match=f"^annotate: 40 of 80 answers were set aside.*{remedy}"):
        limit.check(counts | {"rows_in": 80, "rejects": 40}, whole=True)


def test_where_every_row_fails_none_is_blamed() -> None:
    errors = {number: KeyError("lm_head") for number in range(N)}
    with pytest.raises(ShardError, match=r"each of its 37 rows fails \(KeyError: 'lm_head'\)"):
        attempt(Doubling(errors), 0, SOURCE)


def test_rows_that_fail_only_together_are_not_blamed() -> None:
    with pytest.raises(ShardError, match=r"fails as a whole \(RuntimeError: together\)"):
        attempt(Doubling(never_together=frozenset({3, 30})), 0, SOURCE)


def test_a_token_that_the_model_does_not_have_costs_its_row_alone(tmp_path: Path) -> None:
    tiny_classifier("llama").save_pretrained(tmp_path / "reward")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "reward")
    model = ModelConfig(model_name_or_path=str(tmp_path / "reward"))
    rows: list[dict[str, Any]] = [
        {"pair_id": f"{i:02}", "prompt": f"Why {i}?", "response_a": f"yes {i}", "response_b": "no"}
        for i in range(24)
    ]

    def scored(folder: str) -> ShardOutput:
        store = Store(str(tmp_path / folder))
        table = pa.Table.from_pylist(rows, schema=whole_schema("text"))
        write_pairs(store, 0, pairs_of(table))
        return attempt(RewardWorker(AnswersIn(store), model, "tiny", 512), 0, SOURCE)

    bad = set()
    for place in (4, 17):
        rows[place]["response_b"] = "a <new> word"
        bad.add(answer_id(prompt_id(rows[place]["prompt"]), "a <new> word"))
    output = scored("bad")
    blame = blamed(output)
    assert blame.keys() == bad, "the other answer of each pair has its score"
    assert output.rows.num_rows == 46
    for reason in blame.values():
        assert reason.startswith("tokens beyond the embeddings: prompt or answer: token '<new>'")
    for place in (4, 17):
        rows[place]["response_b"] = rows[place]["response_a"]
    assert output.rows.equals(scored("good").rows), "byte for byte that of a shard without them"


def test_a_prompt_that_cannot_be_answered_is_named_by_the_file_it_was_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, ["cw"], evaluate={"num_prompts": 3, "generation_batch_size": 2})
    world.tokenise()
    node, asked = world.node("answers_base"), "prompt test 2: "

    def answer(policy: Any, tokenizer: Any, prompts: list[list[int]], **_: Any) -> list[str]:
        if any(asked in tokenizer.decode(prompt) for prompt in prompts):
            raise IndexError("a token that the model does not have")
        return ["answer"] * len(prompts)

    monkeypatch.setattr(scorers, "generate", answer)
    monkeypatch.setattr(generate, "run_shards", lambda job, pool: run_here(job))
    generate.make(world.context, node)
    output = world.place("answers_base")
    (name,) = output.names("rejects")
    (reject,) = output.read_table(name).to_pylist()
    prompt = output.read_table(reject["source"]).to_pylist()[reject["position"]]
    assert prompt["pair_id"] == reject["row"] == "test-2"
