"""`cwpo check`: right on this machine, and wrong where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cwpo_dist.check import command, device, ranks, tiny_models
from cwpo_dist.check.command import CheckError, Place, chosen
from cwpo_dist.check.finding import Finding, found
from cwpo_dist.cli import app as cli
from cwpo_dist.lm import packed
from cwpo_dist.training.torch_engine import TorchEngine

CPU = torch.device("cpu")
PARTS = {"versions", "packed rows", "optimizer", "generation", "same bits twice"}
FIGURES = {"matrix products", "annotate", "align"}
TOGETHER = {"exchange", "resume", *(f"ZeRO {stage}, fp32" for stage in range(4))}


@pytest.mark.usefixtures("ray_local")
@pytest.mark.long
def test_this_machine_is_right(tmp_path: Path) -> None:
    to = tmp_path / "check.json"
    outcome = CliRunner().invoke(cli.app, ["check", "--to", str(to)])
    assert outcome.exit_code == 0, outcome.output
    assert "all right" in outcome.output
    record = json.loads(to.read_text())
    assert record["right"] is True
    (findings,) = record["devices"].values()
    parts = {each["part"]: each for each in [*findings, *record["together"]["findings"]]}
    assert parts.keys() == PARTS | FIGURES | TOGETHER
    figures = {"versions", *FIGURES}
    assert {name for name, each in parts.items() if each["right"] is None} == figures
    assert parts["versions"]["figures"]["torch"] == torch.__version__
    assert parts["packed rows"]["figures"]["layout"] == "packed"
    assert 0 < parts["align"]["figures"]["share_of_products"] < 1.2
    assert record["together"]["ranks"] == parts["exchange"]["figures"]["ranks"] == 2
    assert parts["ZeRO 3, fp32"]["figures"]["moved"] > 0.1, "losses tell of the updates"


def test_a_kernel_that_sees_too_much_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(query: Any, key: Any, value: Any, *_: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    monkeypatch.setattr(packed, "by_row", blind)
    right, said, figures = device.packed_rows(CPU, torch.float32)
    assert right is False
    assert figures["layout"] == "shared"
    assert said.startswith("shared, attention")


def test_an_optimizer_that_forgets_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.optimizer_step(CPU)[0] is True

    class Forgets(TorchEngine):
        def step(self, learning_rate: float) -> float:
            for state in self.optimizer.state.values():
                state["exp_avg"].zero_()
            return super().step(learning_rate)

    monkeypatch.setattr(device, "TorchEngine", Forgets)
    assert device.optimizer_step(CPU)[0] is False


def test_noise_between_two_passes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = device.AnswerLogProbs.token_logps
    monkeypatch.setattr(
        device.AnswerLogProbs,
        "token_logps",
        lambda *given: whole(*given) + 1e-3 * torch.rand(()),
    )
    right, said, _ = device.same_bits(CPU, torch.float32)
    assert right is False
    assert "log-probs not the same" in said


def test_ranks_that_train_otherwise_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose steps are half as long."""

    class Closing(TorchEngine):
        def close(self) -> None: ...

    def other(*_: Any) -> Any:
        engine = ranks.alone(CPU)
        engine.__class__ = Closing
        return engine

    monkeypatch.setattr(ranks, "sharded", other)
    assert ranks._zero(2, torch.float32, CPU)()[0] is True

    def slower(self: Any, learning_rate: float) -> float:
        return TorchEngine.step(self, 0.5 * learning_rate)

    monkeypatch.setattr(Closing, "step", slower, raising=False)
    right, _, figures = ranks._zero(2, torch.float32, CPU)()
    assert right is False
    assert figures["largest_error"] > 1e-2


def test_a_part_that_fails_is_a_finding_and_the_others_go_on() -> None:
    def fail() -> Any:
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    finding = found("packed rows", fail)
    assert finding.right is False
    assert finding.said == "RuntimeError: CUDA error: no kernel image is available"


def node(name: str, cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "which", "checked", "together"),
    [
        ([node("a", 4)], "one", "a", "aa"),
        ([node("a", 1)], "one", "a", "a"),
        ([node("a", 4), node("b", 4)], "one", "a", "ab"),
        ([node("a", 4), node("b", 4), node("c", 4)], "all", "abc", "abc"),
        ([node("a", 4), node("b", 16, 2), node("c", 16, 2)], "one", "b", "bb"),
        ([node("a", 4), node("b", 16, 2), node("c", 16, 2)], "all", "bbcc", "bbcc"),
        ([node("a", 8, 1)], "all", "a", "a"),
        ([node("a", 8, 1, alive=False), node("b", 2)], "all", "b", "bb"),
    ],
)
def test_which_devices_are_checked(
    nodes: list[dict[str, Any]], which: Any, checked: str, together: str
) -> None:
    places, group = chosen(nodes, which)
    assert "".join(place.node for place in places) == checked
    assert "".join(place.node for place in group) == together
    assert {place.gpu for place in places} == {
        any("GPU" in n["Resources"] for n in nodes if n["Alive"])
    }


def test_a_cluster_without_processors_is_said() -> None:
    with pytest.raises(CheckError, match="no node with a CPU"):
        chosen([node("a", 0)], "one")


def test_what_one_rank_finds_wrong_counts_for_all() -> None:
    fine, bad = Finding("exchange", True, "fine"), Finding("exchange", False, "bad")
    assert command._agreed([[fine], [bad]]) == [bad]
    assert command._agreed([[fine], [fine]]) == [fine]


def test_what_is_wrong_ends_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = Place("n", "here", gpu=False)
    monkeypatch.setattr(command, "connect", lambda: None)
    monkeypatch.setattr(command, "chosen", lambda *_: ([place], [place]))
    monkeypatch.setattr(command.ray, "nodes", list)
    monkeypatch.setattr(command, "tell_waiting", lambda *_: False)  # there is no Ray to ask
    wrong = Finding("optimizer", False, "AdamW off by 1")
    monkeypatch.setattr(command, "_of_devices", lambda *_: iter([("here, CPU 0", [wrong])]))
    monkeypatch.setattr(command, "_of_group", lambda *_: [])
    outcome = CliRunner().invoke(cli.app, ["check", "--to", str(tmp_path / "check.json")])
    assert outcome.exit_code == 1
    assert "WRONG" in outcome.output
    assert json.loads((tmp_path / "check.json").read_text())["right"] is False


def test_the_models_folder_loads_as_people_load_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_models.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Why? é\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.config.vocab_size == tiny_models.VOCABULARY
