"""`cwpo annotate --retry-rejects`: what failed is scored again, what was committed stays."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from test_earlier_scores import growing, write
from test_stages import annotate_only
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.cli.app import main
from cwpo_dist.config import Config
from cwpo_dist.execution.run import run
from cwpo_dist.graph import STAGES, graph, nodes_until
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.runs import scored_by
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.joined import ScoresIn
from cwpo_dist.runs.output_key import retry_manifest
from cwpo_dist.scoring.driver import run_here
from cwpo_dist.stages import annotate
from cwpo_dist.storage import MANIFEST, Store

FAILED = "rejects: non-finite score"
SICK = [3, 13, 23, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39]  # those with the digit 3


def spoil(weights: Path, digits: str) -> None:
    """Rows with one of the digits get no finite score; size and time of the file stay."""
    before, made = weights.stat(), weights.parent.with_name("made")
    model = tiny_classifier("llama")
    for digit in tiny_tokenizer()(digits, add_special_tokens=False)["input_ids"]:
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
    spoil(weights, "3")
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
    spoil(weights, "")
    (tmp_path / "run.json").write_text(config.model_dump_json())
    main_ok(["annotate", str(tmp_path / "run.json"), "--retry-rejects"])
    assert f"{nodes['weigh'].path} was made of the scores before" in caplog.text
    assert {name: output.read(name) for name in files} == files, "what was committed changed"

    retried = output.read_json("manifest.retry-1.json")
    assert retried["device_hours"] > output.read_json(MANIFEST)["device_hours"], "of both together"
    counts = retried["counts"]
    assert (counts["rows_in"], counts["rows"], counts["rejects"]) == (80, 80, 0)
    assert counts[FAILED] == 0 < first[FAILED] == first["rejects"]
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


@pytest.mark.usefixtures("in_process")
def test_what_fails_again_counts_once_and_other_devices_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two retries, each after one more digit was mended; the second by actors without a GPU."""
    monkeypatch.setattr(scored_by, "run_shards", lambda job, pool, check: run_here(job))
    tiny_classifier("llama").save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    write(tmp_path / "in" / "a.jsonl", 0, 20)
    given = growing(tmp_path).model_dump(exclude_unset=True)
    given["annotate"] |= {"max_reject_fraction": 1.0}
    on_gpus = given | {"annotate": given["annotate"] | {"gpus_per_actor": 1}}
    context, found = Context(Store(given["output_dir"])), []
    for digits, told in (("37", on_gpus), ("3", on_gpus), ("", given)):
        spoil(tmp_path / "reward" / "model.safetensors", digits)
        nodes = nodes_until(Config.model_validate(told), "cw", "annotate")
        node, store = nodes["annotate"], context.place(nodes["annotate"])
        assert "begun in another precision" not in caplog.text
        if not found:
            counts = STAGES["prepare"].make(context, nodes["prepare"])
            context.place(nodes["prepare"]).create_json(MANIFEST, {"counts": counts})
        counts = annotate.retry(context, node) if found else annotate.make(context, node)
        assert counts is not None
        store.create_json(retry_manifest(len(found)) if found else MANIFEST, {"counts": counts})
        found.append((counts["rows_in"], counts["rows"], counts["rejects"], counts[FAILED]))
    assert all(rows_in == rows + rejects for rows_in, rows, rejects, _ in found)
    left = [rejects for _, _, rejects, _ in found]
    assert left == [failed for *_, failed in found]
    assert left[0] > left[1] > left[2] == 0
    assert "begun in another precision" in caplog.text, "and nobody copies from it"
    assert store.exists(f"mixed.{annotate.SAME.file}")


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert not exited.value.code
