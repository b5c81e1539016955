"""Several heads on one model: their losses, weights, scores, disagreement, folder and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from plain_loop import make_config
from test_many_answers import OneOfTwo
from tiny import save_tiny, tiny_classifier, tiny_tokenizer
from torch.nn.functional import logsigmoid
from world import HIGHER, LABELS, OTHER, SHARDS, World, margin, named
from zero_cases import couples, make_rows

from cwpo_dist.config import Config, FitConfig, ModelConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.docstrings import described
from cwpo_dist.execution import ask
from cwpo_dist.graph import nodes_until
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.heads import name_heads
from cwpo_dist.lm.loading import ModelError, load_annotator_base, load_reward_model, save
from cwpo_dist.lm.modules import AnswerScores
from cwpo_dist.lm.rows import Row, collate
from cwpo_dist.pairs.records import HEADS_SCHEMA, unit_hash
from cwpo_dist.runs.checks import check
from cwpo_dist.runs.model_checks import check_model
from cwpo_dist.runs.sizes import annotator
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.earlier_scores import EarlierScores, NewAnswersWorker, ranged_files
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.scoring.invariant import InvariantForward
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import RewardWorker
from cwpo_dist.stages import evaluate, fit, weigh
from cwpo_dist.storage import Store
from cwpo_dist.training import metrics_log
from cwpo_dist.training.group import TrainSpec
from cwpo_dist.training.heads import ManyHeads, bootstrap
from cwpo_dist.training.loop import Hooks, Run, gradients, train
from cwpo_dist.training.tasks import BradleyTerry
from cwpo_dist.training.torch_engine import TorchEngine

HEADS, SEED = 3, 5
IDS = [f"{i // 2:018x}{i:014x}" for i in range(22)]  # two pairs of each prompt


def many(arch: str = "llama", heads: int = HEADS, **changes: Any) -> Any:
    """A tiny classifier with so many heads."""
    model: Any = tiny_classifier(arch, **changes)
    top = "score" if hasattr(model, "score") else "classifier"
    old = getattr(model, top)
    new = torch.nn.Linear(old.in_features, heads, bias=old.bias is not None)
    generator = torch.Generator().manual_seed(1)
    for parameter in new.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    setattr(model, top, new)
    model.num_labels = heads
    name_heads(model.config, heads)
    return model


def alone(model: Any, k: int) -> Any:
    """The same model with its head k as the only one."""
    one: Any = tiny_classifier(model.config.model_type)
    top = "score" if hasattr(model, "score") else "classifier"
    state = model.state_dict()
    state |= {name: value[k : k + 1] for name, value in state.items() if name.startswith(top)}
    one.load_state_dict(state)
    return one


def test_the_gradient_is_the_sum_of_the_heads_own_on_one_trunk() -> None:
    """Against stock models with a head each, a sequence at a time, under plain autograd."""
    rows, chosen = couples(make_rows()), list(range(8))
    task = ManyHeads(rows, IDS, None, HEADS, SEED)
    engine = TorchEngine(AnswerScores(many()), make_config())
    result = gradients(task, engine, Run(make_config(), 0, "shared", 2), 0, chosen)
    ours = {name: p.grad for name, p in engine.module.model.named_parameters()}
    oracles = [alone(many(), k) for k in range(HEADS)]
    losses = []
    for k, model in enumerate(oracles):
        for i in chosen:
            weight = -math.log1p(-unit_hash(SEED, "head", str(k), IDS[i]))
            good, bad = (
                model(torch.tensor([[*rows[i].prompt, *answer]]), use_cache=False).logits[0, 0]
                for answer in rows[i].answers
            )
            losses.append(-weight * logsigmoid(good - bad) / len(chosen))
    torch.stack(losses).sum().backward()
    assert result.loss == pytest.approx(float(torch.stack(losses).sum()), rel=1e-6)
    for name, gradient in ours.items():
        found = [dict(model.named_parameters())[name].grad for model in oracles]
        wanted = torch.cat(found) if name == "score.weight" else sum(found)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_in_one_pass_each_head_scores_as_it_does_alone(arch: str) -> None:
    model, rows = many(arch), [replace(row) for row in make_rows()[:6]]
    found = RowForward(AnswerScores(model), 2, 64, 200)(rows).values
    for k in range(HEADS):
        wanted = RowForward(AnswerScores(alone(model, k)), 2, 64, 200)(rows).values
        for of_heads, of_one in zip(found, wanted, strict=True):
            assert [answer[k] for answer in of_heads] == pytest.approx(of_one, abs=1e-6)


def test_ranks_that_share_a_model_score_for_each_head() -> None:
    """A batch is one rank's, whose part of the sum has the scores of all heads."""
    rows, module = make_rows()[:6], AnswerScores(many()).eval()
    wanted = RowForward(module, 2, 64, 60)(rows).values
    parts: list[Any] = [
        RowForward(module, 2, 64, 60, rank)(rows).values  # type: ignore[arg-type]  # part of an engine
        for rank in (OneOfTwo(number, module) for number in range(2))
    ]
    assert all(0 < np.count_nonzero(part) < np.size(wanted) for part in parts)
    np.testing.assert_allclose(np.sum(parts, axis=0), wanted, atol=1e-6)


def test_the_same_bits_in_any_company_hold_for_each_head() -> None:
    rows = make_rows()[:6]
    forward = InvariantForward(AnswerScores(many()), 2, 64, 4096)
    assert forward.tiled, "by packed rows of fixed shapes, as for one head"
    together = forward(rows).values
    assert [forward([row]).values[0] for row in rows] == together


def test_weights_are_exponential_and_depend_on_seed_head_and_pair_alone() -> None:
    names = [f"pair{i}" for i in range(4000)]
    found = bootstrap(7, names, 4)
    assert found[2, 3] == -math.log(1 - unit_hash(7, "head", "3", "pair2"))
    assert found.mean() == pytest.approx(1, abs=0.03)
    assert found.var() == pytest.approx(1, abs=0.08)
    for share in (0.1, 0.5, 0.9):  # at or below −log(1 − share) lies that share
        assert np.mean(found <= -math.log1p(-share)) == pytest.approx(share, abs=0.02)
    between = np.corrcoef(found.T) - np.eye(4)
    assert np.abs(between).max() < 0.06, "heads are drawn apart"
    np.testing.assert_array_equal(bootstrap(7, names[9:3:-1], 4), found[9:3:-1])
    np.testing.assert_array_equal(bootstrap(7, names[:5], 2), found[:5, :2])
    assert not np.isclose(bootstrap(8, names[:50], 4), found[:50]).any()


def test_losses_and_metrics_by_hand() -> None:
    rows, ids = make_rows()[:2], IDS[:2]
    scores = torch.tensor([[[2.0, 0.0], [1.0, 1.0]], [[0.0, 3.0], [2.0, 3.0]]]).double()
    up, down, tie = (math.log1p(math.exp(-m)) for m in (1, -1, 0))
    plain = ManyHeads(rows, ids, None, 2)
    far = math.log1p(math.exp(2))
    assert plain.losses(scores, [0, 1]).tolist() == pytest.approx([up + down, far + tie])
    shares = ManyHeads(rows, ids, [0.75, 1.0], 2)
    soft = 0.75 * up + 0.25 * down + 0.75 * down + 0.25 * up
    assert shares.losses(scores, [0, 1]).tolist() == pytest.approx([soft, far + tie])
    (weights, _) = bootstrap(SEED, ids, 2)
    told = ManyHeads(rows, ids, None, 2, SEED).losses(scores, [0, 1])
    assert float(told[0]) == pytest.approx(weights[0] * up + weights[1] * down)
    metrics = plain.metrics(scores, [0, 1])  # margins 1, −1 and −2, 0: means 0 and −1
    assert metrics == {"accuracy": 0.0, "margin": -0.5, "disagreement": 1.0}
    assert metrics.keys() <= set(described(metrics_log)), "the reference page says what each is"


def test_heads_agree_on_what_they_learned_and_differ_elsewhere() -> None:
    """Every head puts the winner first; of other pairs they are not of one mind."""
    rows = make_rows()
    task = ManyHeads(rows[:8], [f"pair{i}" for i in range(8)], None, HEADS, SEED)
    config = make_config(
        max_steps=60, global_batch_size=8, optim="adamw", learning_rate=1e-2, logging_steps=60
    )
    engine = TorchEngine(AnswerScores(many()), config)
    train(task, engine, Run(config, 0, "shared", 2), Hooks())
    with torch.no_grad():
        scores = engine.module(collate(rows, "shared", 2)).view(len(rows), 2, HEADS)
    margins_NM = scores[:, 0] - scores[:, 1]
    assert bool((margins_NM[:8] > 0).all())
    spread_N = torch.sigmoid(margins_NM).std(1, correction=0)
    assert float(spread_N[8:].mean()) > 3 * float(spread_N[:8].mean())


def test_a_resumed_training_ends_where_the_whole_one_does() -> None:
    """Weights of pairs are drawn by step, whoever takes it."""
    task = ManyHeads(make_rows(), IDS, None, HEADS, SEED)
    config = make_config(max_steps=4)
    run = Run(config, 0, "shared", 2)
    whole, parted = (TorchEngine(AnswerScores(many()), config) for _ in range(2))
    train(task, whole, run, Hooks())
    again = ManyHeads(make_rows(), IDS, None, HEADS, SEED)
    stopped = replace(run, config=config.model_copy(update={"max_steps": 2}))
    train(task, parted, stopped, Hooks())
    train(again, parted, run, Hooks(), start_step=2)
    for ours, theirs in zip(whole.module.parameters(), parted.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def told(tmp_path: Path, **changes: Any) -> Config:
    if not (tmp_path / "weak").exists():
        save_tiny(tmp_path / "weak", "llama")
        row = '{"prompt": "p", "chosen": "yes", "rejected": "no"}'
        (tmp_path / "pairs.jsonl").write_text(f"{row}\n")
    weak = {"model_name_or_path": str(tmp_path / "weak"), "max_length": 64}
    given = {"output_dir": str(tmp_path / "run"), "arms": ["cw"], "weak": weak}
    given |= {"prepare": {"sources": [{"path": str(tmp_path / "pairs.jsonl")}]}}
    return parse_config(given | changes)


def test_one_head_leaves_keys_as_they_were_and_several_change_them(tmp_path: Path) -> None:
    assert "heads" not in FitConfig().identity()
    assert FitConfig(heads=2).identity() == FitConfig().identity() | {"heads": 2}
    plain, one, two = (
        nodes_until(told(tmp_path, fit=told_fit), "cw", "weigh")
        for told_fit in ({}, {"heads": 1}, {"heads": 2})
    )
    assert {role: node.key for role, node in plain.items()} == {
        role: node.key for role, node in one.items()
    }
    for role in ("fit", "annotate", "weigh"):
        assert two[role].key != plain[role].key
    assert (plain["annotate"].settings.heads, two["annotate"].settings.heads) == (1, 2)


def test_fit_trains_the_heads_and_follows_them_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, ["cw"], fit={"heads": HEADS, "seeds": [9]})
    specs: list[TrainSpec] = []
    monkeypatch.setattr(fit, "train", lambda spec: specs.append(spec) or {})
    fit.make(world.context, world.node("fit"))
    (spec,) = specs
    assert spec.heads == HEADS
    assert spec.make_held_out is not None
    task, held_out = spec.make_task(world.encoder), spec.make_held_out(world.encoder)
    assert isinstance(task, ManyHeads)
    assert isinstance(held_out, ManyHeads)
    assert (task.heads, task.seed, held_out.seed) == (HEADS, 9, None)
    world = World(tmp_path, ["cw"])
    fit.make(world.context, world.node("fit"))
    assert type(specs[1].make_task(world.encoder)) is BradleyTerry


def score_heads(world: World, factors: list[float]) -> None:
    """Scores of all answers but the labelled part's: head k gives margins times factors[k]."""
    for index, splits in enumerate(SHARDS):
        rows = []
        for split in set(splits) - {"labelled"}:
            for k in range(3):
                for side, worth in ((HIGHER[k], margin(k)), (OTHER[HIGHER[k]], 0.0)):
                    heads = [factor * worth for factor in factors]
                    told = {"answer_id": named(split, k, side), "annotator": "world"}
                    rows.append(told | {"score": float(np.mean(heads)), "heads": heads})
        rows.sort(key=lambda row: row["answer_id"])
        table = pa.Table.from_pylist(rows, schema=HEADS_SCHEMA)
        world.place("annotate").create_table(part("scores", index), table)


def test_heads_are_the_members_of_an_ensemble(tmp_path: Path) -> None:
    """Margins m, −m and 3m: the mean is m, the deviation 1.63 m, and one head votes against it."""
    world = World(tmp_path, ["ensemble", "cw"], fit={"heads": 3})
    score_heads(world, [1.0, -1.0, 3.0])
    deviation = math.sqrt(8 / 3)
    for arm, lower in (("ensemble", True), ("cw", False)):
        counts = weigh.make(world.context, world.node("weigh", arm))
        store = world.place("weigh", arm)
        tables = [store.read_table(name) for name in store.names("preferences")]
        rows = {row["pair_id"]: row for row in pa.concat_tables(tables).to_pylist()}
        assert len(rows) == 3
        for k in range(3):
            row, m = rows[f"unlabelled-{k}"], margin(k)
            assert row["label"] == HIGHER[k]
            assert row["margin"] == pytest.approx(m)
            assert row["disagreement"] == pytest.approx(deviation * m)
            weight = 0.0 if lower else math.tanh(m / 2)
            assert row["weight"] == pytest.approx(weight)
        assert counts["ensemble"]["annotators"] == counts["ensemble"]["contested"] == 3
    figures: Any = evaluate._annotator(world.context, world.node("evaluate"))
    assert [member["name"] for member in figures["members"]] == [
        f"seed 0, head {k}" for k in range(3)
    ]
    agreed = sum(HIGHER[k] == LABELS[k] for k in range(3)) / 3
    right = [member["agreement"]["accuracy"] for member in figures["members"]]
    assert right == pytest.approx([agreed, 1 - agreed, agreed])


def test_questions_are_chosen_by_the_heads(tmp_path: Path) -> None:
    changes = {"prepare": told(tmp_path).prepare.model_dump() | {"labelled_fraction": 1.0}}
    with pytest.raises(ValueError, match=r"'disagree' needs 2 annotators.* give fit\.heads"):
        ask._planned(told(tmp_path, **changes), 5, "disagree", "cw")
    config = told(tmp_path, fit={"heads": 2}, **changes)
    node, _ = ask._planned(config, 5, "disagree", "cw")
    assert [*node.inputs] == ["prepare", "annotate"]


def trained(folder: Path, heads: int = HEADS) -> ModelConfig:
    """A folder that `fit` leaves of so many heads."""
    if not (folder / "weak").exists():
        save_tiny(folder / "weak", "llama")
    weak = ModelConfig(model_name_or_path=str(folder / "weak"), chat_template="plain")
    tokenizer = load_tokenizer(weak, distinct_pad=True)
    made = load_annotator_base(weak, tokenizer, SEED, heads=heads)
    save(made, tokenizer, folder / f"heads{heads}")
    return weak.model_copy(update={"model_name_or_path": str(folder / f"heads{heads}")})


def test_heads_are_drawn_apart_and_their_folder_is_an_annotator_again(tmp_path: Path) -> None:
    """One score an answer, the mean, with each head's beside it; copied scores keep theirs."""
    model = trained(tmp_path)
    reward: Any = load_reward_model(model)
    assert reward.config.id2label == {0: "head_0", 1: "head_1", 2: "head_2"}
    assert len({row.tolist()[0] for row in reward.score.weight}) == HEADS
    again = load_annotator_base(model, tiny_tokenizer(), 9, heads=HEADS)
    assert torch.equal(again.get_submodule("score").weight, reward.score.weight)

    world = World(tmp_path, ["human"])
    answers = AnswersIn(world.place("prepare"), ("test", "validation"))

    def worker() -> RewardWorker:
        return RewardWorker(answers, model, "it", max_tokens=150)

    found = worker()(1, worker().read(1)).rows
    assert found.schema.equals(HEADS_SCHEMA)
    rows = found.to_pylist()
    assert len(rows) == 12
    for row in rows:
        assert row["score"] == pytest.approx(np.mean(row["heads"]), abs=1e-6)
        assert len(set(row["heads"])) == HEADS
    before = Store(str(tmp_path / "before"))
    before.create_table(part("scores", 0), found.slice(0, 5))
    earlier = EarlierScores(ranged_files([before], "scores"))
    later = NewAnswersWorker(earlier, answers, worker)
    output = later(1, later.read(1))
    assert output.counts["reused"] == 5
    assert output.rows.schema.equals(HEADS_SCHEMA)
    for row, new in zip(rows, output.rows.to_pylist(), strict=True):
        assert new["heads"] == pytest.approx(row["heads"], abs=1e-5)  # beside others in a batch


def test_what_heads_cannot_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model, ready = trained(tmp_path), {"model_name_or_path": str(tmp_path / "heads3")}
    with pytest.raises(ValueError, match=r"fit\.heads: 2, but annotate\.model is ready"):
        check(told(tmp_path, fit={"heads": 2}, annotate={"model": ready}), "annotate")
    with pytest.raises(ValueError, match=r"arm 'ws_dpo' labels by its model's log-probs"):
        check(told(tmp_path, fit={"heads": 2}, arms=["ws_dpo"], policy=ready), "weigh")
    for heads, other in ((1, 3), (3, 1)):
        given = trained(tmp_path, other)
        with pytest.raises(ModelError, match=f"{other} labels, but fit.heads is {heads}"):
            load_annotator_base(given, tiny_tokenizer(), 0, heads=heads)
        section = {"fit": FitConfig(heads=heads)}
        (fault,) = check_model("weak", given, annotator, section).faults
        assert fault.startswith("weak.model_name_or_path")
        assert f"fit.heads is {heads}; give a language model" in fault
    assert not check_model("weak", model, annotator, {"fit": FitConfig(heads=3)}).faults
    classes = tiny_classifier("llama").config
    classes.num_labels = 3
    tiny_classifier("llama").save_pretrained(tmp_path / "classes")
    classes.save_pretrained(tmp_path / "classes")
    with pytest.raises(ModelError, match="3 labels; give a reward model"):
        load_reward_model(model.model_copy(update={"model_name_or_path": f"{tmp_path}/classes"}))


def test_rows_share_prompts_under_several_heads() -> None:
    """An answer of two pairs is computed once, and its gradient is the sum of both."""
    row = make_rows()[0]
    task = ManyHeads([row, Row(row.prompt, row.answers[::-1])], IDS[:2], None, 2)
    engine = TorchEngine(AnswerScores(many(heads=2)), make_config())
    result = gradients(task, engine, Run(make_config(), 0, "shared", 2), 0, [0, 1])
    assert torch.equal(result.outputs_PK[0], result.outputs_PK[1].flip(0))
