"""`preferences/` given to another trainer: TRL's tokens of them are those that the policy gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import small_config
from test_weigh_pairing import Run
from transformers import AutoModelForCausalLM
from world import World

from cwpo_dist.config.load import parse_config
from cwpo_dist.graph import graph
from cwpo_dist.lm.encoder import Encoder, load_tokenizer
from cwpo_dist.stages import weigh

SIDES = ("chosen", "rejected")


def trls_tokens(world: World, folder: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and answer together, of the chosen and of the rejected one, by pair."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    store = world.place("weigh")
    files = [f"{store.uri}/{name}" for name in store.names("preferences")]
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    model = str(folder / "model")
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(str(folder / "trl"), use_cpu=True, report_to="none", bf16=False),
        train_dataset=rows,
        processing_class=load_tokenizer(model),
    )
    made: Any = trainer.train_dataset
    return {
        row["pair_id"]: tuple(row["prompt_ids"] + row[f"{side}_ids"] for side in SIDES)
        for row in made
    }


@pytest.mark.parametrize("template", ["tokenizer", "plain"])
def test_trl_gets_the_tokens_that_the_policy_gets(tmp_path: Path, template: str) -> None:
    """But for what a template writes behind EOS, where our rows end."""
    world = World(tmp_path, ["cw"], policy={"chat_template": template})
    world.score()
    weigh.make(world.context, world.node("weigh"))
    world.tokenise()
    found = trls_tokens(world, tmp_path)
    assert len(found) == 3
    encoder = Encoder(load_tokenizer(str(tmp_path / "model")), template)
    store = world.place("weigh")
    rows = [r for name in store.names("preferences") for r in store.read_table(name).to_pylist()]
    behind = encoder.tokenizer("\n", add_special_tokens=False)["input_ids"]
    for row in rows:
        texts = [row[name] for name in ("prompt", *SIDES)]
        if template == "tokenizer":
            assert [message["role"] for (message,) in texts] == ["user", "assistant", "assistant"]
            texts = [message["content"] for (message,) in texts]
        own = encoder.encode(texts[0], texts[1:])
        for answer, theirs in zip(own.answers, found[row["pair_id"]], strict=True):
            ours = [*own.prompt, *answer]
            assert theirs == ours + (behind if template == "tokenizer" else [])


def test_how_texts_are_written_is_in_the_key(tmp_path: Path) -> None:
    keys = set()
    for template in ("tokenizer", "plain"):
        world = World(tmp_path, ["cw"], policy={"chat_template": template})
        keys.add(graph(world.config, "cw")["weigh"].key)
    assert len(keys) == 2


@pytest.mark.usefixtures("in_process")
def test_a_shard_without_pairs_has_the_columns_of_the_others(tmp_path: Path) -> None:
    """It has answers in rows of their own alone: no pair tells that its texts are messages."""

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    pairs = [
        {"prompt": said("user", f"Q{i}?")}
        | {side: said("assistant", f"{side} {i}") for side in ("chosen", "rejected")}
        for i in range(6)
    ]
    alone = [
        {"prompt": said("user", f"R{i}?"), "response": said("assistant", f"r {i}")}
        for i in range(40)
    ]
    config = small_config(tmp_path, prepare__rows_per_shard=2, prepare__labelled_fraction=0.0)
    sources = config["prepare"]["sources"] = []
    for rows, columns in ((pairs, {}), (alone, {"response": "response"})):
        file = tmp_path / f"{len(rows)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"path": str(file), "into": "train", "columns": columns})
    config["policy"]["chat_template"] = "plain"
    run = Run(parse_config(config))
    assert any(run.prepared.read_table(n).num_rows == 0 for n in run.prepared.names("pairs"))
    run.score(0, few=False)
    counts, rows = run.weigh()
    assert counts["selected"] == len(rows) == 6
    store = run.context.place(run.nodes["weigh"])
    schemas = {str(store.read_table(name).schema.types) for name in store.names("preferences")}
    assert len(schemas) == 1
