"""Stages alone: annotating with any reward model, what a changed input does, and object storage."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared import ids_of, whole
from small_run import small_config, write_config
from test_kills import finish, kill_when
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import load_config, parse_config
from cwpo_dist.execution.run import run
from cwpo_dist.graph import graph, nodes_until
from cwpo_dist.node_disk import upload
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import MANIFEST, Store


def annotate_only(folder: Path, arch: str, **annotate: Any) -> Config:
    """Pairs without any label, and a ready reward model."""
    folder.mkdir(exist_ok=True)
    tiny_classifier(arch).save_pretrained(folder / "reward")
    tiny_tokenizer().save_pretrained(folder / "reward")
    rows = [
        {"prompt": f"Question {i}?", "response_a": f"yes {i}", "response_b": f"no {i * i}"}
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_config(
        {
            "output_dir": str(folder / "run"),
            "prepare": {
                "sources": [{"path": str(folder / "pairs.jsonl")}],
                "rows_per_shard": 16,
                "num_cpus": 0.5,
            },
            "annotate": {
                "model": {"model_name_or_path": str(folder / "reward"), "max_length": 400},
                "cpus_per_actor": 0.5,
                **annotate,
            },
        }
    )


def scores(config: Config) -> list[dict[str, Any]]:
    nodes = nodes_until(config, "cw", "annotate")
    store = Store(config.output_dir).child(*nodes["annotate"].path.split("/"))
    names = store.names("scores")
    return [row for name in names for row in store.read_table(name).to_pylist()]


def _as_it_is_read(arch: str, tokenizer: Any, prompt: str, answer: str) -> Any:
    """A decoder reads its own rendering, to its end; BERT question and answer."""
    if arch == "bert":
        return tokenizer(prompt, answer, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_annotating_alone_gives_the_stock_models_scores(tmp_path: Path, arch: str) -> None:
    config = annotate_only(tmp_path, arch)
    run(config, until="annotate")
    found = scores(config)
    assert len(found) == 80
    model, tokenizer = tiny_classifier(arch), tiny_tokenizer()
    nodes = nodes_until(config, "cw", "annotate")
    store = Store(config.output_dir).child(*nodes["prepare"].path.split("/"))
    texts = {
        name: (pair["prompt"], pair[f"response_{side}"])
        for pair in whole(store).to_pylist()
        for side, name in zip("ab", ids_of(pair), strict=True)
    }
    assert sorted(texts) == sorted(row["answer_id"] for row in found)
    for row in found[::9]:
        given = _as_it_is_read(arch, tokenizer, *texts[row["answer_id"]])
        with torch.no_grad():
            expected = float(model(**given).logits[0, 0])
        assert row["score"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("ray_local")
def test_a_score_that_is_not_finite_is_set_aside_and_too_many_are_refused(tmp_path: Path) -> None:
    config = annotate_only(tmp_path, "llama")
    model = tiny_classifier("llama")
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "reward")
    with pytest.raises(RejectsError, match=r" of 80 answers .* annotate\.max_reject_fraction 0.05"):
        run(config, until="annotate")
    lenient = annotate_only(tmp_path, "llama", max_reject_fraction=1.0)
    model.save_pretrained(tmp_path / "reward")
    run(lenient, until="annotate")
    nodes = nodes_until(lenient, "cw", "annotate")
    store = Store(lenient.output_dir).child(*nodes["annotate"].path.split("/"))
    rejects = [r for name in store.names("rejects") for r in store.read_table(name).to_pylist()]
    assert {row["reason"] for row in rejects} == {"non-finite score"}
    counts = store.read_json(MANIFEST)["counts"]
    assert counts["rows_in"] == counts["rows"] + counts["rejects"] == len(rejects) == 80


@pytest.mark.usefixtures("ray_local")
def test_inputs_that_changed_half_way_are_refused_for_resume_and_said_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = annotate_only(tmp_path, "llama")
    run(config, until="annotate")
    old = nodes_until(config, "cw", "annotate")["annotate"]
    (tmp_path / "run" / old.path / MANIFEST).unlink()  # as if the driver had died before it
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "New?", "response_a": "y", "response_b": "n"}) + "\n")
    run(config, until="prepare")
    with pytest.raises(ConfigError, match=r"annotate: inputs\.prepare changed .*--resume refuses"):
        run(config, until="annotate", resume=True)
    with caplog.at_level(logging.WARNING):
        run(config, until="annotate")
    assert "inputs.prepare changed since the unfinished annotate/" in caplog.text
    assert len(scores(config)) == 82


@pytest.mark.long
@pytest.mark.timeout(600)
def test_prepare_to_weigh_on_object_storage_with_a_killed_and_resumed_training(
    s3_store: Store, tmp_path: Path
) -> None:
    """The weak model lies there as well; both workers train on the node's one copy of it."""
    changes = small_config(tmp_path / "in", s3_store.uri, fit__num_train_epochs=12)
    model = s3_store.child("weak-model")
    upload(tmp_path / "in" / "model", model)
    changes["weak"]["model_name_or_path"] = model.uri
    changes["fit"]["num_workers"] = 2
    path = write_config(tmp_path / "s3.yaml", changes)
    config, log = load_config(path), tmp_path / "log"
    fit = s3_store.child(*graph(config, "cw")["fit"].path.split("/"))

    def checkpointed() -> bool:
        found = fit.filesystem.exists(fit.root) and fit.names("checkpoints")
        return any(name.endswith("commit.json") for name in found or [])

    kill_when(path, log, checkpointed)
    assert not fit.exists(MANIFEST), "fit was not in flight"
    finish(path, log, "weigh")
    counts = fit.read_json(MANIFEST)["counts"]
    lines = fit.read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, counts["steps"] + 1))
    said = log.read_text().splitlines()
    starts = [line for line in said if "fit:" in line and "rows, step" in line]
    assert "step 0 of" not in starts[-1], "it began anew"
    weigh = s3_store.child(*graph(config, "cw")["weigh"].path.split("/"))
    assert weigh.read_json(MANIFEST)["counts"]["selected"] > 0
    assert weigh.read_table(part("preferences", 0)).num_rows > 0
