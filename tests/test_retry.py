"""`cwpo annotate --retry-rejects`: what failed is scored again, what was committed stays."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from test_stages import annotate_only
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.cli.app import main
from cwpo_dist.config import Config
from cwpo_dist.execution.run import run
from cwpo_dist.graph import graph
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.runs.joined import ScoresIn
from cwpo_dist.storage import MANIFEST, Store

SICK = [3, 13, 23, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39]  # those with the digit 3


def spoil(weights: Path, sick: bool) -> None:
    """Rows with a 3 get no finite score, or all do again; size and time of the file stay."""
    before, made = weights.stat(), weights.parent.with_name("made")
    model = tiny_classifier("llama")
    if sick:
        (digit,) = tiny_tokenizer()("3", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model.get_input_embeddings().weight[digit] = float("nan")
    model.save_pretrained(made)
    weights.write_bytes((made / weights.name).read_bytes())
    assert weights.stat().st_size == before.st_size
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.usefixtures("ray_local")
def test_what_failed_is_scored_again_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = annotate_only(tmp_path, "llama", num_actors=2)
    policy = {"policy": {"model_name_or_path": str(tmp_path / "reward")}}
    config = Config.model_validate(config.model_dump() | policy)
    weights = tmp_path / "reward" / "model.safetensors"
    spoil(weights, sick=True)
    said = r"of 80 answers were set aside \(\d+ × non-finite score\).*--retry-rejects"
    with pytest.raises(RejectsError, match=said):
        run(config, until="annotate")
    lenient = config.model_copy(
        update={"annotate": config.annotate.model_copy(update={"max_reject_fraction": 1.0})}
    )
    run(lenient, until="weigh")
    nodes = graph(config, "cw")
    output = Store(config.output_dir).child(*nodes["annotate"].path.split("/"))
    first = output.read_json(MANIFEST)["counts"]
    assert first["rejects"] >= 2 * len(SICK)
    files = {name: output.read(name) for name in output.names()}
    spoil(weights, sick=False)
    (tmp_path / "run.json").write_text(config.model_dump_json())
    main_ok(["annotate", str(tmp_path / "run.json"), "--retry-rejects"])
    assert f"{nodes['weigh'].path} was made of the scores before" in caplog.text
    assert {name: output.read(name) for name in files} == files, "what was committed changed"

    retried = output.read_json("manifest.retry-1.json")
    assert retried["device_hours"] > output.read_json(MANIFEST)["device_hours"], "of both together"
    counts = retried["counts"]
    assert (counts["rows_in"], counts["rows"], counts["rejects"]) == (80, 80, 0)
    assert first["rejects: non-finite score"] == first["rejects"]
    assert counts["rejects: non-finite score"] == 0, "of these reasons none is left"
    prepared = Store(config.output_dir).child(*nodes["prepare"].path.split("/"))
    scored = [ScoresIn(output, 1, prepared).read(i) for i in range(3)]
    assert sum(map(len, scored)) == 40
    ids = [pair_id for shard in scored for pair_id in shard]
    assert len(set(ids)) == 40
    rows = sum(output.read_table(n).num_rows for n in output.names("scores") if "retry" in n)
    assert rows == first["rejects"], "only these were scored"

    after = graph(config, "cw")
    assert after["annotate"].key == nodes["annotate"].key
    assert after["weigh"].key != nodes["weigh"].key
    assert after["prepare"].key == nodes["prepare"].key
    run(config, until="weigh")
    weighed = Store(config.output_dir).child(*after["weigh"].path.split("/"))
    old = Store(config.output_dir).child(*nodes["weigh"].path.split("/"))
    assert (
        weighed.read_json(MANIFEST)["counts"]["pairs"] > old.read_json(MANIFEST)["counts"]["pairs"]
    )
    main_ok(["annotate", str(tmp_path / "run.json"), "--retry-rejects"])
    assert "nothing was set aside" in caplog.text
    assert not output.exists("manifest.retry-2.json")


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert not exited.value.code
