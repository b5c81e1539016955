"""Preferences and scores as data sets: `datasets` and TRL read them; the hub's client sends them.

The hub is `hub_stand_in.py`, a server on this machine. The client is the real one.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT
from hub_stand_in import TOKEN, HubStandIn, hub_stand_in
from huggingface_hub import constants
from world import HIGHER, World, answer, margin, pairs

from cwpo_dist.manifest import Manifest
from cwpo_dist.results.export import ExportError
from cwpo_dist.results.export_data import export_data
from cwpo_dist.results.push import PushError, push
from cwpo_dist.signing import compare
from cwpo_dist.stages import weigh
from cwpo_dist.storage import MANIFEST, Store, to_json


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run directory whose one arm is finished, as far as an export reads it."""
    world = World(tmp_path, ["cw"], policy={"chat_template": "tokenizer"}, simulated_labels=True)
    world.score()
    counts = {
        "prepare": dict(world.context.counts(world.node("prepare"))) | {"kind": "text"},
        "annotate": {"annotator": "world"},
        "weigh": weigh.make(world.context, world.node("weigh")),
        "align": {},
    }
    root, stages = world.context.root, {}
    for role, told in counts.items():
        node, place = world.node(role), world.place(role)
        inputs = {name: f"{given.stage}/{given.content}" for name, given in node.inputs.items()}
        settings = {"sources": [{"path": "/private/place/pairs.jsonl"}]}
        made = Manifest(stage=node.stage, settings=settings, inputs=inputs, counts=told)
        place.write(MANIFEST, to_json(dict(made)))
        stages[role] = {"stage": node.stage, "key": node.key}
    world.place("align").create("model/model.safetensors", b"weights")
    root.create_json("arms/cw/config.json", world.config.model_dump(mode="json"))
    root.create_json("arms/cw/stages.json", stages)
    root.create_json("arms/cw/metrics.json", {"pairs": 3})
    return root


def loaded(folder: Path) -> Any:
    return datasets.load_dataset(str(folder), split="train", cache_dir=f"{folder}-cache")


def test_datasets_reads_preferences_with_the_winner_as_the_chosen_one(
    run: Store, tmp_path: Path
) -> None:
    """Whom the annotator scores higher; people, who chose the others, were not asked."""
    export_data(run.uri, None, str(tmp_path / "out"), "preferences")
    rows = loaded(tmp_path / "out")
    assert len(rows) == 3
    for row in rows:
        (chosen,), (rejected,), k = row["chosen"], row["rejected"], int(row["pair_id"][-1])
        assert chosen == {"role": "assistant", "content": answer("unlabelled", k, HIGHER[k])}
        assert "low" in rejected["content"]
        assert row["label"] == HIGHER[k]
        assert row["margin"] == pytest.approx(margin(k))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Simulated labels:**" in card
    assert "| `weight` | what multiplies the pair's loss" in card
    assert "pairs.jsonl" in card
    assert "/private" not in card
    assert compare(Store(str(tmp_path / "out"))).lines() == []


def test_trls_trainer_learns_which_answer_is_the_better_one(run: Store, tmp_path: Path) -> None:
    """Two steps on the exported folder, at a rate at which the margin must grow."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    export_data(run.uri, "cw", str(tmp_path / "out"), "preferences")
    model = str(tmp_path / "model")
    how = DPOConfig(
        str(tmp_path / "trl"),
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=how,
        train_dataset=loaded(tmp_path / "out"),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    first, second = [log["rewards/margins"] for log in trainer.state.log_history[:2]]
    assert first == pytest.approx(0, abs=1e-4)
    assert second > first


def test_scores_come_with_their_texts(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an output by itself, too, of which no arm is known."""
    output = next(name for name in run.names("annotate") if name.endswith(MANIFEST))
    place = run.child(output.removesuffix(f"/{MANIFEST}")).uri
    monkeypatch.chdir(Path(place).parent)
    export_data(Path(place).name, None, str(tmp_path / "out"), "scores")  # a relative path
    rows = {row["answer"]: row for row in loaded(tmp_path / "out")}
    assert len(rows) == 18  # of the three splits that the annotator was not trained on
    for k, pair in enumerate(pairs("test")):
        a, b = rows[pair["response_a"]], rows[pair["response_b"]]
        assert a["prompt"] == b["prompt"] == pair["prompt"]
        assert abs(a["score"] - b["score"]) == pytest.approx(margin(k))
        assert (a["score"] > b["score"]) == (HIGHER[k] == "a")
    with pytest.raises(ExportError, match="is of 'annotate'; name one of weigh"):
        export_data(place, None, str(tmp_path / "more"), "preferences")
    with pytest.raises(ExportError, match=r"no finished arm.*annotate/<key>"):
        export_data(str(tmp_path / "none"), None, str(tmp_path / "more"), "scores")


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with hub_stand_in() as found:
        yield found


@pytest.fixture
def client(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    """The hub, for huggingface_hub in this process, which read its environment before."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_the_command_makes_a_private_data_set_of_the_folder(
    run: Store, tmp_path: Path, hub: HubStandIn
) -> None:
    """With the environment that a user sets, and the token nowhere else."""
    told = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    told["HF_HUB_OFFLINE"] = "0"
    where = ["--data", "preferences", "--to", str(tmp_path / "out"), "--push", "me/prefs"]
    command = [sys.executable, "-m", "cwpo_dist.cli", "export", run.uri, *where]
    done = subprocess.run(
        command, env={**os.environ, **told}, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.endpoint}/datasets/me/prefs" in done.stdout
    found = hub.repositories["dataset", "me/prefs"]
    assert found.visibility == "private"
    assert found.files == files(tmp_path / "out") | {".gitattributes": b""}
    assert found.lfs == {name for name in found.files if name.endswith(".parquet")}
    everywhere = [done.stdout.encode(), done.stderr.encode(), *files(tmp_path).values()]
    assert not any(TOKEN.encode() in text for text in everywhere)


@pytest.mark.usefixtures("exit_code")
def test_a_model_pushed_again_takes_the_place_of_what_was_there(
    run: Store,
    tmp_path: Path,
    client: HubStandIn,
    exit_code: Callable[..., Any],
) -> None:
    for to in ("one", "two"):
        code = exit_code("export", run.uri, "--to", str(tmp_path / to), "--push", "me/model")
        assert code == 0
        found = client.repositories["model", "me/model"]
        assert found.files == files(tmp_path / to) | {".gitattributes": b""}
        found.files["of-an-older-model.safetensors"] = b"stale"
    assert len(found.commits) == 2


def test_a_folder_may_be_a_uri_and_have_a_space(
    run: Store, tmp_path: Path, client: HubStandIn
) -> None:
    to = tmp_path / "my out"
    export_data(run.uri, None, f"file://{to}", "preferences")
    push(f"file://{to}", "me/data", "dataset")
    assert client.repositories["dataset", "me/data"].files.keys() >= files(to).keys()
    client.refuses = {"/api": 500}
    with pytest.raises(PushError, match=re.escape(f"hf upload me/data '{to}' . ")):
        push(f"file://{to}", "me/data", "dataset")


@pytest.mark.usefixtures("client")
def test_a_hub_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cwpo_dist.results.push.PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(PushError, match=r"no answer.*look at the network"):
            push(str(tmp_path), "me/data", "dataset")


FAILURES = {
    "unknown": ({"/api": 401}, "me/m", "401.*does not know who pushes; give a token.*HF_TOKEN"),
    "forbidden": ({}, "them/m", "403.*may not write there; take one with write access"),
    "conflict": ({"/commit/": 409}, "me/m", "409.*another commit came in between; push again"),
    "full": ({"/lfs/": 413}, "me/m", "413.*larger than it takes"),
    "away": ({}, "me/m", "no answer.*look at the network and at HF_ENDPOINT"),
    "offline": ({}, "me/m", "HF_HUB_OFFLINE is set; unset it"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_push_says_its_remedy_and_leaves_the_export(
    name: str,
    run: Store,
    tmp_path: Path,
    client: HubStandIn,
    exit_code: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client.refuses, repository, says = FAILURES[name]
    if name == "away":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", name == "offline")
    to = tmp_path / "out"
    assert exit_code("export", run.uri, "--to", str(to), "--push", repository) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert said.startswith("error: --push: ")
    assert re.search(says, said), said
    again = f"hf upload {repository} {to} . --repo-type model --private --delete '*'"
    assert f"The export stays in {to}, and `{again}` sends it" in said
    assert TOKEN not in said
    assert compare(Store(str(to))).lines() == []


def test_what_cannot_be_pushed_is_said_before_anything_is_copied(
    run: Store,
    tmp_path: Path,
    exit_code: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for repository, to in (
        *((name, str(tmp_path / "out")) for name in ("a/b/c", "me/x.git", "me/a--b", "me/-x")),
        ("me/m", "memory://out"),
    ):
        assert exit_code("export", run.uri, "--to", to, "--push", repository) == 2
        assert capsys.readouterr().err.startswith("error: --push: ")
    assert not (tmp_path / "out").exists()
