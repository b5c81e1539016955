"""`weigh.pairing: best_worst`: of each prompt the pair whose scores lie furthest apart, whole runs.

Against what one sees by looking at all answers of a prompt at once, however shards cut them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from prepared import pairs, scores_of
from small_run import small_config
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.graph import graph
from cwpo_dist.pairs.answers import read_answers
from cwpo_dist.pairs.records import SCORE_SCHEMA, prompt_of
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs.arms import weighting
from cwpo_dist.runs.context import Context
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import weigh
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import MANIFEST, Store

COUNTS = [2, 7, 3, 7, 4, 2, 5, 7, 3, 2]  # responses to each prompt; of seven 21 pairs, 4 a shard
TEXTS = ("prompt", "chosen", "rejected")
Rows = dict[str, dict[str, Any]]


def sampled(folder: Path, **changes: Any) -> Config:
    """A source of lists of responses that nobody rated, of which all pairs are made."""
    given = {"prepare__pairing": "all", "prepare__rows_per_shard": 4, "prepare__test_fraction": 0.1}
    config = small_config(folder, **(given | changes))
    source = Path(config["prepare"]["sources"][0]["path"])
    rows = [
        {"prompt": f"What is {k}?", "responses": [f"it is {k} {j}" for j in range(count)]}
        for k, count in enumerate(COUNTS)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["prepare"]["labelled_fraction"] = 0.0
    scorer = folder / "scorer"
    if not scorer.exists():
        tiny_classifier("llama").save_pretrained(scorer)
        tiny_tokenizer().save_pretrained(scorer)
    config["annotate"]["model"] = {"model_name_or_path": str(scorer), "max_length": 400}
    return parse_config(config)


class Run:
    """Prepared pairs, and the scores that a test gives their answers."""

    def __init__(self, config: Config) -> None:
        self.context = Context(Store(config.output_dir))
        self.texts: dict[tuple[str, str], float] = {}  # the score of each answer by prompt and text
        self.nodes = graph(config, config.arms[0])
        self.prepared = self.context.place(self.nodes["prepare"])
        if not self.prepared.exists(MANIFEST):
            counts = prepare(self.prepared, config.prepare, config.seed)
            self.prepared.create_json(MANIFEST, {"counts": counts})
        self.shards = self.context.shards(self.nodes["weigh"])

    def score(self, seed: int, few: bool) -> dict[str, float]:
        """A score for each answer; `few`: of few values, so that many margins are equal."""
        draw, store, given = random.Random(seed), self.context.place(self.nodes["annotate"]), {}
        for index in range(self.shards):
            for answer in read_answers(self.prepared, index):
                score = draw.randint(0, 2) if few else draw.randint(-4000, 4000) / 1024
                given.setdefault(answer.answer_id, score)
                self.texts[str(answer.prompt), str(answer.answer)] = given[answer.answer_id]
            ids = sorted(answer.answer_id for answer in read_answers(self.prepared, index))
            rows = [{"answer_id": i, "annotator": "it", "score": given[i]} for i in ids]
            table = pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)
            store.create_table(part("scores", index), table)
        return given

    def weigh(self) -> tuple[dict[str, Any], Rows]:
        counts = dict(weigh.make(self.context, self.nodes["weigh"]))
        store = self.context.place(self.nodes["weigh"])
        table = pa.concat_tables([store.read_table(name) for name in store.names("preferences")])
        return counts, {row["pair_id"]: row for row in table.to_pylist()}


def furthest(run: Run, given: dict[str, float]) -> dict[str, float]:
    """By looking at it: of each prompt the id and margin of the pair furthest apart."""
    trained_on = [row for row in pairs(run.prepared) if row["split"] == "unlabelled"]
    scores = [{"answer_id": name, "score": score} for name, score in given.items()]
    of_prompt: dict[str, list[tuple[float, str]]] = {}
    for name, (a, b) in scores_of(trained_on, scores).items():
        of_prompt.setdefault(prompt_of(name), []).append((-abs(a - b), name))
    return {name: -margin for margin, name in map(min, of_prompt.values())}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("top_fraction", [None, 0.4])
def test_of_each_prompt_the_pair_furthest_apart_is_kept(
    few: bool, top_fraction: float | None, tmp_path: Path
) -> None:
    config = sampled(tmp_path, weigh={"pairing": "best_worst", "top_fraction": top_fraction})
    run = Run(config)
    given = run.score(3, few)
    across = [names for names in shards_of_prompts(run).values() if len(names) > 1]
    assert across, "some prompts have pairs in several shards"
    counts, rows = run.weigh()
    expected = furthest(run, given)
    if top_fraction is not None:
        surest = sorted(expected, key=lambda name: (-expected[name], name))
        expected = {name: expected[name] for name in surest[: -(-4 * len(surest) // 10)]}
    assert {name: row["margin"] for name, row in rows.items()} == pytest.approx(expected)
    assert counts["selected"] == len(rows) == len({prompt_of(name) for name in rows})
    every = [row for row in pairs(run.prepared) if row["split"] == "unlabelled"]
    assert counts["pairs"] == len(every) > len(rows)
    for row in rows.values():
        prompt, chosen, rejected = (row[name][-1]["content"] for name in TEXTS)
        scores = [score for (asked, _), score in run.texts.items() if asked == prompt]
        assert run.texts[prompt, chosen] == max(scores)
        assert run.texts[prompt, rejected] == min(scores)


def shards_of_prompts(run: Run) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in run.prepared.names("pairs"):
        for pair_id in run.prepared.read_table(name)["pair_id"].to_pylist():
            found.setdefault(prompt_of(pair_id), set()).add(name)
    return found


@pytest.mark.usefixtures("in_process")
def test_given_keeps_every_pair_and_the_key_that_it_had(tmp_path: Path) -> None:
    run = Run(sampled(tmp_path))
    run.score(3, few=False)
    counts, rows = run.weigh()
    assert len(rows) == counts["pairs"]
    given = run.nodes["weigh"].settings.identity()
    told = Run(sampled(tmp_path, weigh={"pairing": "best_worst"})).nodes["weigh"].settings
    assert "best_worst" not in str(given)
    assert "best_worst" in str(told.identity())


@pytest.mark.usefixtures("in_process")
def test_weights_are_divided_by_the_mean_of_what_is_kept(tmp_path: Path) -> None:
    run = Run(sampled(tmp_path, weigh={"pairing": "best_worst"}, arms=["cw_mean"]))
    run.score(5, few=False)
    _, rows = run.weigh()
    assert sum(row["weight"] for row in rows.values()) / len(rows) == pytest.approx(1.0)


def test_plan_counts_a_pair_a_prompt(tmp_path: Path) -> None:
    told = {stage.stage: stage.work for stage in plan(sampled(tmp_path)).stages}
    changed = sampled(tmp_path, weigh={"pairing": "best_worst"})
    found = {stage.stage: stage.work for stage in plan(changed).stages}
    pairs_of_all = int(told["weigh"].split()[0].replace(",", ""))
    decided, kept = (int(word) for word in found["weigh"].split() if word.isdigit())
    assert decided == pairs_of_all > kept
    assert int(found["align"].split()[0]) <= kept
    assert found["annotate"] == told["annotate"], "all answers are scored"


def test_people_and_weights_have_no_margins_to_pair_by(tmp_path: Path) -> None:
    config = sampled(tmp_path, weigh={"pairing": "best_worst"}, arms=["human", "cw"])
    assert weighting(config, config.arm("human")).pairing == "given"
    assert weighting(config, config.arm("cw")).pairing == "best_worst"
    given = small_config(tmp_path, arms=["own"], weigh={"pairing": "best_worst"})
    source = Path(given["prepare"]["sources"][0]["path"])
    row = {"prompt": "p", "chosen": "yes", "rejected": "no", "weight": 0.5}
    source.write_text("".join(json.dumps(row | {"prompt": f"p {k}"}) + "\n" for k in range(40)))
    with pytest.raises(ConfigError, match=r"'own' has weigh\.pairing, of margins"):
        plan(parse_config(given))
