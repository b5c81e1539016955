"""A policy's log-probs of answers that it read before, in whatever output: they are copied."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from small_run import small_config
from tiny import save_tiny, tiny_causal_lm, tiny_tokenizer
from torch import Tensor

from cwpo_dist.config import AlignConfig, Config, ModelConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution.side_by_side import Job, _can_start
from cwpo_dist.graph import STAGES, graph
from cwpo_dist.lm.rows import Row, RowBatch
from cwpo_dist.pairs.records import LOG_PROB_SCHEMA, LogProb, read_rows
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.placement import Machine
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs import same_model, scored_by
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.same_model import precision
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.driver import run_here
from cwpo_dist.scoring.earlier_scores import EarlierScores, NewAnswersWorker, ranged_files
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.retries import Input, ShardOutput
from cwpo_dist.scoring.scorers import ReferenceWorker, policy_module
from cwpo_dist.stages import reference
from cwpo_dist.stages.tokens import TokensSettings
from cwpo_dist.storage import MANIFEST, Store

LogProbs = dict[str, LogProb]
FEW = {"arms": ["labelled_only"]}


@pytest.fixture
def computed(in_process: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No Ray; the ids of the answers that went through a policy."""
    names: list[str] = []
    apply = ReferenceWorker.__call__

    def noted(worker: ReferenceWorker, index: int, rows: Sequence[Input[Row]]) -> ShardOutput:
        names.extend(row.name for row in rows)
        return apply(worker, index, rows)

    monkeypatch.setattr(ReferenceWorker, "__call__", noted)
    monkeypatch.setattr(scored_by, "run_shards", lambda job, pool, check: run_here(job))
    return names


def growing(folder: Path, output: str = "run", **changes: Any) -> Config:
    """Files of labelled pairs, and a policy that is aligned as it was given."""
    source = {"path": str(folder / "in" / "*.jsonl")}
    told = small_config(folder, str(folder / output), arms=["human"], sft=None, **changes)
    told["prepare"]["sources"] = [source]
    return parse_config(told)


def write(folder: Path, start: int, stop: int) -> None:
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": f"no {i * i}"}
        for i in range(start, stop)
    ]
    (folder / "in").mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "in" / f"{start}.jsonl").write_text(text)


def made(config: Config, role: str = "reference") -> tuple[dict[str, Any], LogProbs]:
    """Makes an output and what it reads; its counts and, in their order, its log-probs."""
    nodes, context = graph(config, config.arms[0]), Context(Store(config.output_dir))
    for node in (nodes["prepare"], nodes["tokens"], nodes[role]):
        if not context.done(node):
            counts = STAGES[node.stage].make(context, node)
            context.place(node).create_json(MANIFEST, {"counts": counts})
    store = context.place(nodes[role])
    rows = [
        row
        for name in store.names("reference")
        for row in read_rows(store, name, LogProb, LOG_PROB_SCHEMA)
    ]
    counts = store.read_json(MANIFEST)["counts"]
    assert counts["rows"] == len({row.answer_id for row in rows}) == len(rows)
    return counts, {row.answer_id: row for row in rows}


def assert_same(ours: LogProbs, theirs: LogProbs) -> None:
    """The same answers in the same order, and their numbers but for rounding."""
    assert list(ours) == list(theirs)
    assert [row[2:] for row in ours.values()] == [row[2:] for row in theirs.values()]
    wanted = [row.logp for row in theirs.values()]
    assert [row.logp for row in ours.values()] == pytest.approx(wanted, abs=1e-5)


def work_of(config: Config) -> str:
    return {stage.stage: stage.work for stage in plan(config).stages}["reference"]


def test_only_the_answers_of_new_files_and_other_splits_are_computed(
    tmp_path: Path, computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 0, 60)
    first, yesterday = made(growing(tmp_path))
    assert (first["rows"], first["reused"]) == (len(computed), 0)
    assert set(computed) == yesterday.keys()
    computed.clear()

    write(tmp_path, 60, 80)
    work = work_of(growing(tmp_path))
    said = re.fullmatch(r"(\d+) answers to \d+ prompts, about (\d+) of them computed before", work)
    assert said is not None, work
    with caplog.at_level("INFO", "cwpo_dist.stages.reference"):
        grown, today = made(growing(tmp_path))
    assert (grown["rows"], grown["reused"]) == (int(said[1]), first["rows"])
    assert first["rows"] == pytest.approx(int(said[2]), abs=0.2 * grown["rows"])
    assert f"log-probs of {grown['rows']} answers" in caplog.text
    assert f"{grown['reused']} of them computed before" in caplog.text
    assert sorted(computed) == sorted(today.keys() - yesterday.keys()) != []
    assert {name: today[name] for name in yesterday} == yesterday
    afresh, all_new = made(growing(tmp_path, "other"))
    assert afresh["reused"] == 0
    assert grown["tokens"] == afresh["tokens"] - first["tokens"] > 0
    assert_same(today, all_new)

    # Another seed draws other splits and places, which no log-prob knows.
    computed.clear()
    again, seeded = made(growing(tmp_path, seed=7))
    known = seeded.keys() & today.keys()
    assert again["reused"] == len(known) > again["rows"] / 2
    assert sorted(computed) == sorted(seeded.keys() - known)
    assert {name: seeded[name] for name in known} == {name: today[name] for name in known}
    assert " before" not in work_of(growing(tmp_path, seed=7)), "what is done is not to be done"


def test_what_an_arm_of_other_splits_computed_is_copied_also_from_what_is_unfinished(
    tmp_path: Path, computed: list[str]
) -> None:
    write(tmp_path, 0, 60)
    human = growing(tmp_path)
    few = parse_config(json.loads(human.model_dump_json(exclude_unset=True)) | FEW)
    first, labelled = made(few)
    place = Context(Store(human.output_dir)).place(graph(few, "labelled_only")["reference"])
    place.remove(MANIFEST)
    computed.clear()
    second, unlabelled = made(human)
    common = labelled.keys() & unlabelled.keys()
    assert 0 < len(common) == second["reused"] < min(first["rows"], second["rows"])
    assert sorted(computed) == sorted(unlabelled.keys() - common)


def test_another_policy_or_other_tokens_share_nothing(tmp_path: Path, computed: list[str]) -> None:
    write(tmp_path, 0, 6)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    config = growing(tmp_path)
    _, numbers = made(config)
    others: dict[str, dict[str, Any]] = {
        "max_length": {"max_length": 60},
        "over_length": {"over_length": "truncate"},
        "chat_template": {"chat_template": "plain"},
        "num_hidden_layers": {"num_hidden_layers": 1},
        "torch_dtype": {"torch_dtype": "bfloat16"},
    }
    assert config.policy is not None
    policy = json.loads(config.policy.model_dump_json(exclude_unset=True))
    for name, changes in others.items():
        counts, _ = made(growing(tmp_path, policy=policy | changes))
        assert (name, counts["reused"]) == (name, 0)
    computed.clear()
    save_tiny(tmp_path / "model", "llama", 1)  # other weights in the same place
    counts, trained = made(growing(tmp_path))
    assert (counts["reused"], len(computed)) == (0, counts["rows"])
    assert trained.keys() == numbers.keys()
    assert all(trained[name].logp != numbers[name].logp for name in numbers)


def test_log_probs_are_one_policys_by_settings_training_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 0, 6)

    def who(role: str = "reference", **changes: Any) -> str:
        config = parse_config(
            json.loads(growing(tmp_path).model_dump_json(exclude_unset=True)) | changes
        )
        return reference.SAME.who(Context(Store(config.output_dir)), node_of(config, role))

    same = who()
    assert who(seed=3) == same, "whatever answers it is given"
    split = {"num_prompts": 0, "split": "validation"}
    assert who(evaluate=split) == same
    on_gpus = {"gpus_per_actor": 1}
    assert who(reference=on_gpus) != same, "bf16 there"
    auto = json.loads(growing(tmp_path).model_dump_json(exclude_unset=True))["policy"]
    told = {"policy": auto | {"torch_dtype": "float32"}}
    assert who(**told) == who(**told, reference=on_gpus)
    trained = []
    for seconds in (1.0, 2.0):
        sft = {"learning_rate": 1e-3, "max_steps": 2}
        config = parse_config(
            json.loads(growing(tmp_path).model_dump_json(exclude_unset=True)) | {"sft": sft}
        )
        output = Context(Store(config.output_dir)).place(node_of(config, "sft"))
        output.write(MANIFEST, json.dumps({"seconds": seconds}).encode())
        trained.append(who(sft=sft))
    assert len({same, *trained}) == 3, "one that was removed and trained again is another"
    monkeypatch.setattr(TokensSettings, "format", TokensSettings.format + 1)
    assert who() != same, "its tokens are made otherwise"


def test_a_policy_that_is_to_be_trained_has_computed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the run directory looked through for it: a comparison has many of them."""
    write(tmp_path, 0, 6)
    config = growing(tmp_path)
    context, node = Context(Store(config.output_dir)), node_of(config, "aligned")
    other = context.root.child("reference", "earlier")
    row = {"answer_id": "a", "logp": -1.0, "tokens": 3, "tokens_hash": 2}
    other.create_table(
        part("reference", 0), LOG_PROB_SCHEMA.empty_table().from_pylist([row], LOG_PROB_SCHEMA)
    )
    with monkeypatch.context() as patched:
        patched.setattr(Store, "names", lambda *_: pytest.fail("looked through"))
        assert reference.SAME.earlier(context, node).files == ()
    context.place(node.inputs["model"]).create_json(MANIFEST, {})
    other.create_json(reference.SAME.file, reference.SAME.who(context, node))
    (file,) = reference.SAME.earlier(context, node).files
    assert (file.store.uri, file.first) == (other.uri, "a")


def test_what_was_begun_in_another_precision_is_copied_by_nobody(
    tmp_path: Path, computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The first command has GPUs and is killed; the second one has none, and the same key."""
    write(tmp_path, 0, 6)
    config, on_gpus = growing(tmp_path), growing(tmp_path, reference__gpus_per_actor=1)
    context = Context(Store(config.output_dir))
    node, begun = node_of(config, "reference"), node_of(on_gpus, "reference")
    assert node.key == begun.key
    nothing: Any = None
    reference.SAME.only_new(context, begun, nothing, nothing)
    assert "begun in another precision" not in caplog.text
    made(config)
    assert "begun in another precision" in caplog.text
    for each in (growing(tmp_path, seed=7), growing(tmp_path, seed=7, reference__gpus_per_actor=1)):
        assert reference.SAME.earlier(context, node_of(each, "reference")).files == ()
    counts, _ = made(growing(tmp_path, seed=7))
    assert counts["reused"] == 0
    again, _ = made(growing(tmp_path, seed=8))
    assert again["reused"] > 0, "of the one that is whole"


def test_workers_that_share_a_model_compute_as_the_cluster_lets_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, here = ModelConfig(model_name_or_path="m"), Machine(2.0, 0.0)
    monkeypatch.setattr(same_model, "this_machine", lambda: here)
    assert precision(model, AlignConfig()) == "float32"
    monkeypatch.setattr(same_model, "this_machine", lambda: replace(here, gpus=1.0))
    assert precision(model, AlignConfig()) == "bfloat16"
    assert precision(model, AlignConfig(use_gpu=False)) == "float32"


def node_of(config: Config, role: str) -> Node:
    return graph(config, config.arms[0])[role]


class Alone:
    """A rank that is the only one."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, model: ModelConfig) -> None:
        self.module = policy_module(model, self.device).eval()

    @torch.inference_mode()
    def forward(self, batch: RowBatch) -> Tensor:
        return self.module(batch).float()

    def total(self, numbers: Tensor) -> Tensor:
        return numbers

    def agreed(self, value: Any) -> Any:
        return value

    def check_stop(self) -> None:
        pass


@pytest.mark.parametrize("known", [0.5, 1.0])
def test_ranks_that_share_a_policy_compute_the_others(
    tmp_path: Path, computed: list[str], known: float
) -> None:
    write(tmp_path, 0, 6)
    config = growing(tmp_path)
    counts, expected = made(config)
    nodes, context = graph(config, "human"), Context(Store(config.output_dir))
    before, names = Store(str(tmp_path / "before")), list(expected)[:: round(1 / known)]
    rows = [dict(expected[name]._asdict(), logp=-1.0) for name in names]
    table = pa.Table.from_pylist(rows, schema=LOG_PROB_SCHEMA)
    before.create_table(part("reference", 0), table)
    assert config.policy is not None
    answers = AnswersIn(context.place(nodes["prepare"]), nodes["reference"].settings.splits)
    tokens = context.place(nodes["tokens"])

    def make_worker(*ranks: Any) -> ReferenceWorker:
        return ReferenceWorker(answers, tokens, config.policy, 1024, *ranks)

    earlier = EarlierScores(ranged_files([before], "reference"))
    worker = NewAnswersWorker(earlier, answers, make_worker, Alone(config.policy))
    computed.clear()
    output = worker(0, worker.read(0))
    assert output.counts["reused"] == len(names)
    assert output.counts["rows_in"] == output.counts["rows"] == counts["rows"]
    assert sorted(computed) == sorted(expected.keys() - set(names))
    found = {row["answer_id"]: LogProb(**row) for row in output.rows.to_pylist()}
    copied = {name: expected[name]._replace(logp=-1.0) for name in names}
    assert_same(found, expected | copied)


def test_what_would_copy_from_one_another_is_not_made_side_by_side(tmp_path: Path) -> None:
    room = {"CPU": 8.0, "GPU": 0.0}

    def jobs(**changes: Any) -> list[Job]:
        runs = [
            parse_config(small_config(tmp_path, arms=["human"], seed=seed, **changes))
            for seed in (0, 1)
        ]
        context = Context(Store(str(tmp_path / "run")))
        return [Job(context, graph(run, "human")["reference"]) for run in runs]

    first, second = jobs(sft=None)
    assert _can_start(second, [], set(), room)
    assert not _can_start(second, [first], set(), room), "the same policy"
    for job in jobs():
        job.context.place(job.node.inputs["model"]).create_json(MANIFEST, {"key": job.node.key})
    (trained, _), (_, other) = jobs(), jobs(sft=None)
    assert _can_start(trained, [other], set(), room), "one that sft has trained"
    assert _can_start(*jobs()[:1], jobs()[1:], set(), room), "each has an sft of its own"
    tokens = {first.node.inputs["tokens"].path}
    assert not _can_start(first, [], tokens, room), "its tokens are not there"
    assert not _can_start(trained, [other], set(), {"CPU": 0.6, "GPU": 0.0}), "no room for both"


def test_a_damaged_output_of_the_same_policy_is_left_alone(
    tmp_path: Path, computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 0, 6)
    config = growing(tmp_path)
    _, numbers = made(config)
    for name in (tmp_path / "run" / "reference").glob("*/reference/*.parquet"):
        name.write_bytes(b"torn")
    computed.clear()
    counts, again = made(growing(tmp_path, seed=3))
    assert counts["reused"] == 0
    assert len(computed) == counts["rows"] > 0
    assert "nothing is copied from it" in caplog.text
    shared = again.keys() & numbers.keys()
    assert shared
    assert all(again[name].logp == pytest.approx(numbers[name].logp, abs=1e-5) for name in shared)


def test_a_policy_that_gives_no_numbers_is_refused_and_not_trained_on_the_rest(
    tmp_path: Path, computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Of answers with a 3 their log-probs are NaN: each is set aside, and said."""
    write(tmp_path, 0, 40)
    config = growing(tmp_path)
    sick = tiny_causal_lm("llama", 0)
    (digit,) = tiny_tokenizer()("3", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        sick.get_input_embeddings().weight[digit] = float("nan")
    sick.save_pretrained(tmp_path / "model")
    said = r"reference: \d+ of 66 answers .*non-finite log-prob.* prepare.max_reject_fraction 0.05"
    with pytest.raises(RejectsError, match=said):
        made(config)
    lenient = config.prepare.model_copy(update={"max_reject_fraction": 1.0})
    with caplog.at_level(logging.INFO):
        counts, _ = made(config.model_copy(update={"prepare": lenient}))
    assert (counts["rejects"], counts["rows"]) == (24, 42)
    assert f"{counts['rejects']} set aside" in caplog.text
