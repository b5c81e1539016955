"""What plan says where an answer stands in many pairs: models read it once, and its prompt once."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from small_run import small_config
from test_earlier_scores import scores

from cwpo_dist.config import Config, FitConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.graph import prepare_node
from cwpo_dist.pairs import counted_rows
from cwpo_dist.pairs.estimate import Census, census
from cwpo_dist.pairs.splits import Fold
from cwpo_dist.planning.costs import START_S, AnswerLengths, Lengths, together
from cwpo_dist.planning.fleet import TOKEN_BYTES
from cwpo_dist.planning.plan import StagePlan, plan
from cwpo_dist.planning.sampled import read_sample
from cwpo_dist.runs.checks import check
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.same_model import SameModel, share_in
from cwpo_dist.runs.stage import Training
from cwpo_dist.scoring.earlier_scores import EarlierScores, ranged_files
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import MANIFEST, Store

PROMPTS, SPLITS = 6, ("labelled", "unlabelled", "validation", "test")
ANSWERS = ("yes", "not at all", "it may be so", "nobody can tell")


def given(folder: Path, **changes: Any) -> Config:
    """Six prompts of one length, of each all six pairs of its four answers."""
    config = small_config(folder, annotate__splits=list(SPLITS), **changes)
    rows = [
        {"prompt": f"Is {k} enough?", "response_a": a, "response_b": b, "label": "a"}
        for k in range(PROMPTS)
        for a, b in combinations(ANSWERS, 2)
    ]
    source = Path(config["prepare"]["sources"][0]["path"])
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_config(config)


def stages(config: Config) -> dict[str, StagePlan]:
    return {stage.stage: stage for stage in plan(config).stages}


def labelled_prompts(config: Config) -> int:
    return census(config.prepare, config.seed).prompts_of("labelled")


def a_prompt(config: Config, field: str) -> int:
    """A model's tokens of a prompt and its four answers, in one row."""
    return check(config).encoders[field].encode("Is 0 enough?", ANSWERS).n_tokens


def test_an_answer_of_many_pairs_goes_through_a_model_once(tmp_path: Path) -> None:
    config = given(tmp_path)
    found, once = stages(config), {name: a_prompt(config, name) for name in ("weak", "policy")}
    assert found["annotate"].work == "24 answers to 6 prompts"
    assert found["annotate"].tokens == PROMPTS * once["weak"]
    assert found["tokens"].work == "24 answers to 6 prompts, tokenised once"
    assert found["tokens"].stored == PROMPTS * once["policy"] * TOKEN_BYTES
    reference = found["reference"]
    answers, _, _, prompts, _ = reference.work.split()
    assert int(answers) == 4 * int(prompts) > 0
    assert reference.tokens == int(prompts) * once["policy"]
    assert found["fit"].work.endswith("steps of 8 (full)"), "trainings are of pairs"
    assert int(found["fit"].work.split()[0]) % 6 == 0


def test_an_answer_is_sampled_for_a_prompt_and_not_for_each_of_its_pairs(tmp_path: Path) -> None:
    config = given(tmp_path, evaluate__num_prompts=50)
    counted = census(config.prepare, config.seed)
    prompts = counted.prompts_of("test")
    assert 0 < 6 * prompts == counted.pairs("test") < 50
    generate = stages(config)["generate (answers_aligned)"]
    assert generate.work == f"{prompts} prompts, at most 8 new tokens each"
    assert generate.tokens == 8 * prompts
    few = stages(given(tmp_path, evaluate__num_prompts=1))["generate (answers_aligned)"]
    assert few.tokens == 8, "no more than are asked for"


def test_pairs_of_a_prompt_that_meet_in_a_batch_are_computed_together(tmp_path: Path) -> None:
    config = given(tmp_path)
    told = given(tmp_path, fit__batch_by="prompt", align__batch_by="prompt")
    apart, shared = stages(config), stages(told)
    for stage, field in (("fit", "weak"), ("align", "policy")):
        encode = check(config).encoders[field].encode
        pairs = [encode("Is 0 enough?", both).n_tokens for both in combinations(ANSWERS, 2)]
        batches = 1 + 5 / 8  # that a prompt of six pairs touches, of eight pairs each
        saved = batches * a_prompt(config, field) / sum(pairs)
        assert saved < 0.8
        assert shared[stage].tokens == pytest.approx(saved * apart[stage].tokens, abs=1)
        assert shared[stage].work == apart[stage].work, "as many steps of as many pairs"
    assert shared["sft"].tokens == apart["sft"].tokens
    whole = given(tmp_path, fit__batch_by="prompt", fit__global_batch_size=10**6)
    assert stages(whole)["fit"].tokens == labelled_prompts(config) * a_prompt(config, "weak")
    few = given(tmp_path, fit__batch_by="prompt", fit__global_batch_size=1)
    assert stages(few)["fit"].tokens == apart["fit"].tokens, "no more than pair by pair"


def test_a_prompts_answers_are_shared_by_the_pairs_that_are_trained_on() -> None:
    """By hand: of a hundred prompts of four answers a sixth of the pairs fits the model."""
    each = AnswerLengths(0.5, 100.0, 75.0)  # 150 tokens of each answer that fits
    lengths = Lengths(1 / 6, 400.0, 250.0, 300.0, each)
    config = FitConfig(global_batch_size=50, num_train_epochs=1.0)
    work = Training("", model="weak", pairs=600, training=config, prompts=100, answers=400)
    assert together(lengths, work, 100).shared == 100 * 100.0 / 100 + 400 * 75.0 / 100
    assert together(lengths, work, 100).answers == 300.0
    assert together(lengths, work, 30).shared == lengths.shared


def test_a_loss_that_looks_ahead_takes_one_more_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA takes two, and both losses have the same pairs and tokens."""
    monkeypatch.setattr("cwpo_dist.planning.costs.measured_rate", lambda _: 1e6)
    plain = stages(given(tmp_path, align__lora={}))["align"].seconds
    ahead = stages(given(tmp_path, align__lora={}, align__loss_type="dr_dpo"))["align"].seconds
    assert plain is not None
    assert ahead is not None
    start = START_S["train"]
    assert ahead - start == pytest.approx((plain - start) * 3 / 2)


@pytest.mark.usefixtures("in_process")
def test_it_says_the_same_once_prepare_is_done(tmp_path: Path) -> None:
    config = given(tmp_path)
    before, node = stages(config), prepare_node(config)
    store = Context(Store(config.output_dir)).place(node)
    counts = prepare(store, config.prepare, config.seed)
    store.create_json(MANIFEST, {"counts": counts})
    after = stages(config)
    assert after["prepare"].done
    for name in ("annotate", "tokens", "reference"):
        told = [(s.work, s.tokens, s.stored) for s in (before[name], after[name])]
        assert told[0] == told[1]


def test_an_answer_fits_by_itself_whatever_it_is_compared_with(tmp_path: Path) -> None:
    config = given(tmp_path)
    encoder, sample = check(config).encoders["policy"], census(config.prepare, config.seed).sample
    every = {answer: encoder.encode("Is 0 enough?", [answer]) for answer in ANSWERS}
    longest = max(every.values(), key=lambda row: row.n_tokens)
    short = config.policy.model_copy(update={"max_length": longest.n_tokens - 1})
    lengths = read_sample(short, encoder, sample).lengths
    assert lengths.fits == 3 / 6
    assert lengths.each.fits == 3 / 4
    assert lengths.each.prompt == len(longest.prompt)
    fitting = [len(row.answers[0]) for row in every.values() if row is not longest]
    assert lengths.each.answer == sum(fitting) / 4
    assert lengths.each.tokens(2, 8) == 2 * (len(longest.prompt) + sum(fitting))
    none = config.policy.model_copy(update={"max_length": 5})
    assert read_sample(none, encoder, sample).lengths.each.tokens(6, 24) == 0


def test_answers_that_were_scored_before_go_through_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[str]] = {}

    def earlier(same: SameModel, *_: object) -> SimpleNamespace:
        def half(ids: list[str]) -> pa.Table:
            asked.setdefault(same.folder, ids)
            return pa.table({"answer_id": ids[::2]})

        return SimpleNamespace(files=["one"], of=half)

    config = given(tmp_path)
    all_new = stages(config)
    monkeypatch.setattr(SameModel, "earlier", earlier)
    halved = stages(config)
    assert len(asked["scores"]) == len(set(asked["scores"])) == 24
    assert halved["annotate"].work == "24 answers to 6 prompts, about 12 of them scored before"
    answers, rest = halved["reference"].work.split(" ", 1)
    ids = asked["reference"]
    assert len(ids) == len(set(ids)) == int(answers) < 24, "its splits' alone"
    assert rest.endswith(f" prompts, about {int(answers) // 2} of them computed before")
    assert halved["annotate"].tokens == all_new["annotate"].tokens / 2
    assert halved["reference"].tokens < all_new["reference"].tokens
    for name in ("annotate", "reference"):
        assert halved[name].stored == all_new[name].stored > 0
    monkeypatch.setattr(counted_rows, "SAMPLED", 4)
    asked.clear()
    assert stages(config)["annotate"].work.endswith("about 12 of them scored before")
    assert len(asked["scores"]) < 24


def test_what_was_computed_before_is_of_the_splits_and_fold_that_are_asked_for(
    tmp_path: Path,
) -> None:
    """By hand: all answers of the test, none of the labelled, and all of one fold of the rest."""
    folds, rest = (Fold(0, 2, 0), Fold(0, 2, 1)), [f"id {k}" for k in range(20)]
    in_one = [name for name in rest if name in folds[0]]
    assert 0 < len(in_one) < 20
    ids = {"test": ["a", "b"], "labelled": ["c", "d", "e", "f"], "unlabelled": rest}
    answers = {"test": 10, "labelled": 30, "unlabelled": 100, "validation": 9}
    counted = Census({}, {}, 0, True, (), answers=answers, sampled_ids=ids)
    store = Store(str(tmp_path))
    store.create_table("scores/part-00000.parquet", scores("a", "b", *sorted(in_one)))
    earlier = EarlierScores(ranged_files([store], "scores"))
    assert share_in(earlier, counted, ["test"]) == 1
    assert share_in(earlier, counted, ["labelled", "test"]) == 10 / 40
    assert share_in(earlier, counted, ["validation"]) == 0, "of none of which an id is known"
    assert [share_in(earlier, counted, ["unlabelled"], fold) for fold in folds] == [1, 0]
    assert share_in(earlier, counted, ["unlabelled"]) == len(in_one) / 20
    assert share_in(EarlierScores(()), counted, ["test"]) == 0


def test_what_a_given_policy_says_for_one_output_is_planned_once(tmp_path: Path) -> None:
    """Of three seeds, each planned as the first: one pass of the policy, and three of the trained.

    And of splits of which one holds the other, the larger one's answers.
    """
    config = given(tmp_path, arms=["human"], sft=None)
    alone = stages(config)
    first, trained = alone["reference"].tokens, alone["reference (aligned)"].tokens
    assert first > 0 < trained

    def in_all(**grid: Any) -> int:
        changes = {"compare": {"grids": [{"arms": ["human"], **grid}], "seeds": [0, 1, 2]}}
        return stages(given(tmp_path, sft=None, **changes))["reference"].tokens

    assert in_all() == first + 3 * trained
    larger = in_all(labelled_fractions=[0.2])
    assert larger > in_all(labelled_fractions=[0.6])
    for both in ([0.2, 0.6], [0.6, 0.2]):
        assert in_all(labelled_fractions=both) == pytest.approx(larger + 3 * trained, rel=0.01)
