"""What is merged is compared with base and adapter before it is read; what differs is named."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from exported_runs import Alone, log_probs
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from cwpo_dist.config import LoraConfig, ModelConfig
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.loading import load_annotator_base, load_policy, load_reward_model
from cwpo_dist.storage import Store
from cwpo_dist.training import merge, merge_check, saving
from cwpo_dist.training.lora import Head, LoraError, add_lora
from cwpo_dist.training.merge_check import MergeMismatch
from cwpo_dist.training.saving import NoRoom

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(params=["whole", "projected", "layer by layer"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a model is compared: as it is, as a large one, or as one that memory cannot hold."""
    if request.param == "projected":
        monkeypatch.setattr(merge_check, "_SMALL", 0)
    if request.param == "layer by layer":
        monkeypatch.setattr(merge_check, "free_memory", lambda: 0)
    return str(request.param)


def exported(
    folder: Path,
    targets: list[str],
    *,
    arch: str = "llama",
    head: Head = "logps",
    heads: int = 1,
    dtype: Any = "float32",
    noise: float = 0.2,
    **changes: Any,
) -> tuple[Any, Store]:
    """An adapted model, and the stage that it was exported to."""
    place = tiny.save_tiny(folder / "base", arch, **changes)
    base = ModelConfig(model_name_or_path=str(place), max_length=64, torch_dtype=dtype)
    tokenizer = load_tokenizer(base, distinct_pad=head == "scores")
    model: Any = (
        load_policy(base, device="cpu")
        if head == "logps"
        else load_annotator_base(base, tokenizer, 0, heads=heads)
    )
    lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=targets)
    model = add_lora(model, lora, head, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += (
                torch.randn(parameter.shape, generator=generator).to(parameter) * noise
            )
    stage = Store(str(folder / "stage"))
    weights = saving.gather_weights(Alone(), model, saving.trainable_names(model))
    saving.export_lora(model, weights, tokenizer, stage, base, head, 0, lambda: None)
    return model, stage


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Merging that is wrong in one layer."""
    merged = merge._merged

    def wrong(weight: torch.Tensor, update: Any, dtype: Any) -> torch.Tensor:
        right = merged(weight, update, dtype)
        return change(right) if update is not None and update.up is spoilt[0] else right

    read = merge.read_updates
    spoilt: list[Any] = [None]

    def reads(*given: Any) -> Any:
        updates = read(*given)
        spoilt[0] = updates[f"{Q}.weight"].up
        return updates

    monkeypatch.setattr(merge, "_merged", wrong)
    monkeypatch.setattr(merge, "read_updates", reads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_wrong_layer_is_named_and_nothing_stays(
    tmp_path: Path, way: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A square weight the wrong way round, of three adapted layers the one."""
    spoil(monkeypatch, lambda weight: weight.T.contiguous())
    with pytest.raises(MergeMismatch, match=rf"not base and adapter: {Q}\.weight is off") as error:
        exported(tmp_path, ["q_proj", "k_proj"], dtype=dtype)
    assert "\n" not in str(error.value)
    names = Store(str(tmp_path / "stage")).names()
    assert not [name for name in names if name.startswith("model/")]
    assert "adapter/adapter_model.safetensors" in names, "what was trained is not lost"


def test_several_heads_are_merged_with_their_model(tmp_path: Path) -> None:
    """Twelve, of which a dictionary by text would have the tenth before the second."""
    adapted, stage = exported(tmp_path, ["q_proj"], head="scores", heads=12)
    place = ModelConfig(model_name_or_path=str(stage.path("model")), chat_template="plain")
    merged = load_reward_model(place)
    assert list(merged.config.id2label.values()) == [f"head_{k}" for k in range(12)]
    ids = torch.tensor([[5, 6, 7, 1]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("noise", [0.2, 1e-3])
def test_what_is_right_passes(tmp_path: Path, way: str, dtype: str, noise: float) -> None:
    targets = ["q_proj", "down_proj", "lm_head", "embed_tokens"]
    model, stage = exported(tmp_path, targets, dtype=dtype, noise=noise, tie_word_embeddings=True)
    merged = AutoModelForCausalLM.from_pretrained(stage.path("model"), dtype="auto")
    assert merged.dtype == getattr(torch, dtype)
    difference = (log_probs(merged) - log_probs(model)).abs().max()
    assert difference < (1e-4 if dtype == "float32" else 0.1)


def test_a_merge_that_forgets_a_small_adapter_is_noticed(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, by 2 % of the weight's norm."""
    base = load_policy(
        ModelConfig(model_name_or_path=str(tiny.save_tiny(tmp_path / "base", "llama")))
    )
    original = base.get_parameter(f"{Q}.weight").detach().to(torch.bfloat16)
    spoil(monkeypatch, lambda _: original)
    with pytest.raises(MergeMismatch, match=Q):
        exported(tmp_path, ["q_proj"], dtype="bfloat16", noise=0.04)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_embeddings_that_stay_tied_are_noticed(
    tmp_path: Path, way: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if LoRA never parted them: the layer that is not adapted changes, too."""
    monkeypatch.setattr(merge, "parted", lambda model, adapted: [])
    with pytest.raises(MergeMismatch, match=r"lm_head\.weight|model\.embed_tokens\.weight"):
        exported(tmp_path, [target], tie_word_embeddings=True)


def test_another_configuration_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is right, and what lies between them is not."""
    copied = merge._copy_configuration

    def wrong(base: Path, out: Path, *given: Any, **named: Any) -> None:
        copied(base, out, *given, **named)
        text = (out / "config.json").read_text()
        (out / "config.json").write_text(
            text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 9.0')
        )

    monkeypatch.setattr(merge, "_copy_configuration", wrong)
    with pytest.raises(MergeMismatch, match="nats, though every weight agrees"):
        exported(tmp_path, ["q_proj"])


def test_an_annotators_head_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained whole, beside LoRA."""
    exported(tmp_path / "right", ["q_proj"], head="scores")
    in_memory = merge.merge_in_memory

    def wrong(model: Any, *given: Any) -> None:
        merging = nn.Module.to

        def scaled(self: Any, *args: Any) -> Any:
            if hasattr(self, "score"):
                self.score.weight.data *= 1.5
            return merging(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "to", scaled)
            in_memory(model, *given)

    monkeypatch.setattr(saving, "merge_in_memory", wrong)
    with pytest.raises(MergeMismatch, match=r"score\.weight is off by 5"):
        exported(tmp_path / "wrong", ["q_proj"], head="scores")


@pytest.mark.parametrize("targets", [["c_proj", "lm_head"], ["c_attn", "lm_head"], ["wte", "c_fc"]])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_of_both_orientations(
    tmp_path: Path, way: str, targets: list[str], tied: bool
) -> None:
    """GPT-2 keeps its matrices the other way round than its head; peft has one flag for all."""
    model, stage = exported(tmp_path, targets, arch="gpt2", tie_word_embeddings=tied)
    merged = AutoModelForCausalLM.from_pretrained(stage.path("model"))
    torch.testing.assert_close(log_probs(merged), log_probs(model), atol=1e-4, rtol=0)


def test_a_weight_shared_by_other_layers_is_refused_before_training() -> None:
    """No file could say that one of them has changed."""
    model = tiny.tiny_causal_lm("llama")
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    second.k_proj.weight = first.k_proj.weight
    lora = LoraConfig(target_modules=["q_proj", "k_proj"])
    with pytest.raises(
        LoraError, match=r"lora\.target_modules: 'model\.layers\.0\.self_attn\.k_proj'"
    ):
        add_lora(model, lora, "logps", 0)


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_a_full_disk_is_said_in_a_line(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place and the remedy; what was written of the model makes room again."""

    def full(tensors: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(merge, "save_file", full)
    with pytest.raises(
        NoRoom, match=rf"output_dir: no room left in {tmp_path}/stage/model .* same command"
    ):
        exported(tmp_path, ["q_proj"])
    assert not Path(tmp_path, "stage", "model").exists()


def test_other_faults_of_storage_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(merge, "save_file", refused)
    with pytest.raises(PermissionError, match="not yours"):
        exported(tmp_path, ["q_proj"])


@pytest.mark.parametrize("version", ["", "memory/"])
def test_a_container_has_less_memory_than_its_node(tmp_path: Path, version: str) -> None:
    """What is cached of files can be dropped; without a limit the node's own counts."""
    names = ("memory.max", "memory.current", "inactive_file")
    if version:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        (tmp_path / "memory").mkdir()
    node = merge_check.free_memory(tmp_path / "none")
    assert node > 10**8
    (tmp_path / version / "memory.stat").write_text(f"anon 7\n{names[2]} 300000\n")
    (tmp_path / version / names[1]).write_text("900000\n")
    (tmp_path / version / names[0]).write_text("1000000\n")
    assert merge_check.free_memory(tmp_path) == 400000
    (tmp_path / version / names[0]).write_text("max\n")
    assert merge_check.free_memory(tmp_path) > 10**8


def test_a_model_that_memory_cannot_hold_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_check, "free_memory", lambda: 0)
    caplog.set_level(logging.INFO)
    exported(tmp_path, ["q_proj"])
    assert "checked layer by layer" in caplog.text
