"""Exports of every form, after every kind of SFT, loaded where nothing of the run is left."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_runs import IDS, FinishedRun, finish, log_probs, tiny_policy
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cwpo_dist.config import LoraConfig, ModelConfig
from cwpo_dist.lm.identity import Identity, identify
from cwpo_dist.manifest import Manifest
from cwpo_dist.node_disk import upload
from cwpo_dist.results.export import ExportError, _alone, export
from cwpo_dist.storage import Store

FORMS = ("full", "merged", "adapter")
SFTS = (None, "full", "lora")


def cell(form: str, sft: str | None, place: str, tied: bool) -> Any:
    """One of the matrix; of the short form are a tied policy on disk, and adapters on S3."""
    short = (place == "disk" and tied) or (place == "s3" and not tied and form == "adapter")
    name = f"{form}-after-{sft}-{place}-{'tied' if tied else 'untied'}"
    return pytest.param(form, sft, place, tied, id=name, marks=() if short else pytest.mark.long)


MATRIX = [
    cell(form, sft, place, tied)
    for form, sft, place, tied in itertools.product(FORMS, SFTS, ("disk", "s3"), (True, False))
]


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def load(to: Path, base: Path) -> Any:
    """By transformers, or by peft where the folder is an adapter's."""
    if not (to / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(to)
    below = to / "base" if (to / "base").exists() else base
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(below), to)


@pytest.mark.parametrize(("form", "sft", "place", "tied"), MATRIX)
def test_exports_load_elsewhere(
    form: str,
    sft: Any,
    place: str,
    tied: bool,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With nothing but the export and, for an adapter, a copy of the policy as it was given."""
    here, there = tmp_path / "here", tmp_path / "there"
    policy = tiny_policy(here / "policy", tied)
    shutil.copytree(here / "policy", there / "policy")
    root = Store(str(here / "run"))
    if place == "s3":
        root = request.getfixturevalue("s3_store")
        upload(here / "policy", root.child("policy"))
        policy = policy.model_copy(update={"model_name_or_path": root.child("policy").uri})
    run = finish(root, policy, sft, "full" if form == "full" else "lora")
    target = Store(f"{root.uri}-export")
    export(root.uri, None, target.uri, adapter=form == "adapter")
    to = there / "export"
    for name in target.names():
        target.fetch(name, to / name)
    root.remove()
    shutil.rmtree(here)
    assert (
        log_probs(AutoModelForCausalLM.from_pretrained(there / "policy")) - run.wanted
    ).abs().max() > 1
    run.close_to(load(to, there / "policy"))
    secrets = [root.root, str(tmp_path), "cwpo-stage", "cwpo-export"]
    for name, data in everything(to).items():
        assert not [secret for secret in secrets if secret.encode() in data], name
    if form == "adapter":  # where it says that its base is
        monkeypatch.chdir(to if sft == "full" else there)
        run.close_to(AutoPeftModelForCausalLM.from_pretrained(to))
    assert AutoTokenizer.from_pretrained(to).chat_template


COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_LOADS = """
import sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor({ids})
with torch.no_grad():
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
torch.save(logps.gather(-1, ids[:, 1:, None])[..., 0], sys.argv[2])
"""


@pytest.mark.parametrize("sft", [pytest.param(None, marks=pytest.mark.long), "lora"])
def test_an_adapter_names_the_hubs_model(sft: Any, tmp_path: Path) -> None:
    """With its commit; another machine, which has the hub's model, needs nothing else."""
    here, cache = tmp_path / "here", tmp_path / "cache"
    policy = tiny_policy(here / "policy", tied=True)
    repository = cache / "models--people--tiny"
    shutil.copytree(here / "policy", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("f" * 40)  # main has moved on
    root = Store(str(here / "run"))
    place = str(repository / "snapshots" / COMMIT)  # as it lies in the hub's own cache
    run = finish(root, policy.model_copy(update={"model_name_or_path": place}), sft, "lora")
    export(root.uri, None, str(tmp_path / "out"), adapter=True)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "people/tiny"
    assert settings["revision"] == COMMIT
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "people/tiny"
    assert f'from_pretrained("people/tiny", revision="{COMMIT}")' in card.text
    shutil.rmtree(here)
    found = tmp_path / "found.pt"
    code = HUB_LOADS.replace("{ids}", str(IDS.tolist()))
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(found)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=200)
    torch.testing.assert_close(torch.load(found), run.wanted, atol=1e-4, rtol=0)


def exported_adapter(tmp_path: Path, sft: Any, **changes: Any) -> tuple[FinishedRun, Path]:
    policy = tiny_policy(tmp_path / "policy", tied=False, **changes)
    run = finish(Store(str(tmp_path / "run")), policy, sft, "lora")
    export(run.root.uri, None, str(tmp_path / "out"), adapter=True)
    return run, tmp_path / "out"


def test_the_card_of_an_adapter_says_which_base_and_how_it_is_known(tmp_path: Path) -> None:
    """A folder by its name and what its weights are, which the hub shows of each file, too."""
    _, to = exported_adapter(tmp_path, None)
    card = ModelCard.load(to / "README.md")
    digest = hashlib.sha256((tmp_path / "policy" / "model.safetensors").read_bytes()).hexdigest()
    assert f"- `model.safetensors`: `{digest}`" in card.text
    assert "It needs `policy`.\n" in card.text
    assert card.data.base_model is None
    settings = json.loads((to / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "./policy", "which is no hub id"


def test_one_adapter_does_what_both_did(tmp_path: Path) -> None:
    """Its rank is theirs together, and the card says that it belongs on the policy before SFT."""
    _, to = exported_adapter(tmp_path, "lora")
    settings = json.loads((to / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (5, 5)
    assert not (to / "base").exists()
    assert (
        "It needs `policy`, before SFT: it does what SFT did, too."
        in (to / "README.md").read_text()
    )


def test_in_half_precision_one_adapter_is_as_near_as_rounding_lets_it(tmp_path: Path) -> None:
    """SFT's merged weights are rounded, those of policy and adapter are not."""
    policy = tiny_policy(tmp_path / "policy", tied=True, torch_dtype="bfloat16")
    run = finish(Store(str(tmp_path / "run")), policy, "lora", "lora")
    export(run.root.uri, None, str(tmp_path / "out"), adapter=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert (log_probs(base) - run.wanted).abs().max() > 1
    run.close_to(PeftModel.from_pretrained(base, tmp_path / "out"), atol=0.2)


def test_a_base_between_comes_along(tmp_path: Path) -> None:
    run, to = exported_adapter(tmp_path, "full")
    assert "lies in `base/`, and no other model" in (to / "README.md").read_text()
    assert ModelCard.load(to / "README.md").data.base_model is None
    assert AutoTokenizer.from_pretrained(to / "base").chat_template
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    wrong = log_probs(PeftModel.from_pretrained(alone, to))
    assert (wrong - run.wanted).abs().max() > 1, "on the policy as it was given it is another"


def test_the_first_layers_of_a_model_lie_nowhere(tmp_path: Path) -> None:
    """Without SFT there is no such base; SFT makes one."""
    with pytest.raises(ExportError, match=r"--adapter: the policy is the first 1 layers.*without"):
        exported_adapter(tmp_path / "none", None, num_hidden_layers=1)
    assert not (tmp_path / "none" / "out").exists()
    run, to = exported_adapter(tmp_path / "lora", "lora", num_hidden_layers=1)
    run.close_to(load(to, tmp_path / "nowhere"))


def test_adapters_that_cannot_be_stacked_come_with_their_base(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path / "policy", tied=False)
    run = finish(Store(str(tmp_path / "run")), policy, "lora", "lora")
    name = "sft/sft-key/adapter/adapter_config.json"
    settings = run.root.read_json(name) | {"alpha_pattern": {"q_proj": 1}}
    run.root.write(name, json.dumps(settings).encode())
    export(run.root.uri, None, str(tmp_path / "out"), adapter=True)
    run.close_to(load(tmp_path / "out", tmp_path / "nowhere"))


def test_the_user_may_say_what_the_base_is_called(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path / "policy", tied=False)
    run = finish(Store(str(tmp_path / "run")), policy, None, "lora")
    export(run.root.uri, None, str(tmp_path / "out"), adapter=True, base="people/tiny")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "people/tiny"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "people/tiny"
    assert "`people/tiny` is the model whose files have these SHA-256" in card.text
    with pytest.raises(ExportError, match=r"--base: .* give --adapter too"):
        export(run.root.uri, None, str(tmp_path / "again"), base="people/tiny")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_full_disk_is_said_and_leaves_nothing(
    adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(tmp_path / "policy", tied=False)
    run = finish(Store(str(tmp_path / "run")), policy, "full", "lora")
    copying = shutil.copyfile

    def full(source: Any, to: Any) -> Any:
        if "model.safetensors" in str(to):
            Path(to).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(to))
        return copying(source, to)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(ExportError, match=r"--to: no room .*No space left.*TMPDIR") as error:
            export(run.root.uri, None, str(tmp_path / "out"), adapter=adapter)
    assert "\n" not in str(error.value)
    assert not everything(tmp_path / "out")
    # As killed writers leave it: of the run's model, and of a copy before.
    left = f"model.safetensors.{'0a' * 16}.partial"
    for folder in (*(tmp_path / "run").glob("align/*/*"), tmp_path / "out"):
        if folder.is_dir():
            (folder / left).write_bytes(b"half")
    export(run.root.uri, None, str(tmp_path / "out"), adapter=adapter)
    assert not [name for name in everything(tmp_path / "out") if name.endswith(".partial")]
    run.close_to(load(tmp_path / "out", tmp_path / "policy"))


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_trl_trains_on_from_it(form: str, tmp_path: Path) -> None:
    """Its model, before a step, gives the log-probs of the aligned one."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy = tiny_policy(tmp_path / "policy", tied=True)
    plain = LoraConfig(lora_dropout=0.0)  # on all linear layers but the head, which TRL refuses
    run = finish(Store(str(tmp_path / "run")), policy, "lora", "lora", loras=(plain, plain))
    to = tmp_path / "out"
    export(run.root.uri, None, str(to), adapter=form == "adapter")
    pairs = Dataset.from_list([{"prompt": "Why?", "chosen": "So.", "rejected": "No."}] * 2)
    settings = DPOConfig(str(tmp_path / "trl"), use_cpu=True, report_to="none", bf16=False)
    model: Any = str(to) if form == "merged" else load(to, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(to)
    trainer = DPOTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer)
    run.close_to(trainer.model)


@pytest.mark.parametrize(
    ("name", "fingerprint", "known"),
    [
        ("org/name", [["org/name", "abc"]], Identity("org/name", True, "abc")),
        ("gpt2", [["gpt2", "abc"]], Identity("gpt2", True, "abc")),
        # A relative path that looks like a hub id, on a machine where it was a folder.
        ("models/llama", [["config.json", 1, "2"]], Identity("llama", False)),
        ("/home/me/models/llama/", [["config.json", 1, "2"]], Identity("llama", False)),
        ("s3://bucket/llama", [["a.json", 1, "2"], ["b.json", 1, "2"]], Identity("llama", False)),
        (
            f"/x/models--o--n/snapshots/{COMMIT}",
            [["a.json", 1, "2"]],
            Identity("o/n", True, COMMIT),
        ),
        (f"/x/models--gpt2/snapshots/{COMMIT}", None, Identity("gpt2", True, COMMIT)),
        ("org/name", None, Identity("org/name", True)),
        ("/a/llama", None, Identity("llama", False)),
    ],
)
def test_what_a_model_is_known_by(name: str, fingerprint: Any, known: Identity) -> None:
    assert identify(ModelConfig(model_name_or_path=name), fingerprint) == known


def test_an_annotator_of_an_ensemble_has_its_own_figures_on_its_card() -> None:
    members = [{"name": f"seed {seed}", "agreement": {"accuracy": seed / 10}} for seed in (3, 4)]
    for seed in (3, 4):
        found = _alone({"members": members}, Manifest(settings={"seed": seed}))
        assert found["agreement"]["accuracy"] == seed / 10
    assert _alone({"agreement": 1}, Manifest(settings={"seed": 3})) == {"agreement": 1}
