"""What gets adapters: linear layers and fused experts, no routers; or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_runs import Alone
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from tiny import tiny_causal_lm
from tiny_kinds import make
from torch import nn
from transformers import AutoModelForCausalLM

from cwpo_dist.config import LoraConfig, ModelConfig
from cwpo_dist.lm.identity import Identity
from cwpo_dist.lm.loading import load_policy
from cwpo_dist.runs.sizes import policy, trained_size
from cwpo_dist.training.lora import adapter_notes, add_lora, lora_layers, save_adapter
from cwpo_dist.training.saving import gather_weights, trainable_names
from cwpo_dist.training.targets import LoraError

MIXTURES = ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "qwen3_next", "gpt_oss", "llama4_text"]


def adapted(folder: Path, name: str, **changes: Any) -> PeftModel:
    make(name, folder)
    model = load_policy(ModelConfig(model_name_or_path=str(folder)), device="cpu")
    return add_lora(model, LoraConfig(**{"r": 4, "lora_alpha": 8} | changes), "logps", 0)


def leaves(model: PeftModel) -> set[str]:
    return {name.rpartition(".")[2] for name in lora_layers(model)} - {"base_layer"}


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_of_a_mixture_is_its_layers_and_its_experts_without_the_router(
    tmp_path: Path, name: str
) -> None:
    model = adapted(tmp_path, name, lora_dropout=0.05)
    assert "experts" in leaves(model)
    assert leaves(model) >= {"o_proj"}
    assert not leaves(model) & {"gate", "router", "lm_head", "embed_tokens"}
    fused = [layer for layer in model.modules() if isinstance(layer, ParamWrapper)]
    assert {layer.parameter_name for layer in fused} == {"gate_up_proj", "down_proj"}
    for layer in fused:
        rank = 8 if layer.parameter_name == "gate_up_proj" else 4
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 2.0)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_take_no_dropout_and_other_layers_have_it(tmp_path: Path, name: str) -> None:
    """And peft loads the adapter again, as it is: random weights on every adapter."""
    model = adapted(tmp_path / "model", name, lora_dropout=0.25)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            dropout: Any = layer.lora_dropout["default"]
            assert getattr(dropout, "p", 0.0) == (0.0 if isinstance(layer, ParamWrapper) else 0.25)
    (note,) = adapter_notes(model, LoraConfig(lora_dropout=0.25))
    assert note.startswith("lora_dropout 0.25 is left out on the fused experts")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    whole = gather_weights(Alone(), model, trainable_names(model))
    save_adapter(model, whole, tmp_path / "adapter", Identity("model", on_hub=False))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.randint(3, 260, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_dropout_of_a_model_without_experts_stands_in_the_adapter() -> None:
    model = add_lora(tiny_causal_lm("llama"), LoraConfig(lora_dropout=0.1), "logps", 0)
    assert model.peft_config["default"].lora_dropout == 0.1
    assert not [*adapter_notes(model, LoraConfig(lora_dropout=0.1))]


def test_state_spaces_keep_what_their_kernels_read_past_an_adapter(tmp_path: Path) -> None:
    assert leaves(adapted(tmp_path / "a", "mamba")) == {"in_proj", "x_proj"}
    assert "out_proj" not in leaves(adapted(tmp_path / "b", "bamba"))


def test_a_linear_layer_of_groups_is_left_out_and_one_of_a_spelling_of_its_own_is_not(
    tmp_path: Path,
) -> None:
    grouped = adapted(tmp_path / "a", "deepseek_v4")
    assert not {"o_a_proj", "wo_a"} & leaves(grouped)
    assert all(
        type(layer.get_base_layer()).forward is nn.Linear.forward
        for layer in lora_layers(grouped).values()
        if not isinstance(layer, ParamWrapper)
    )
    assert leaves(adapted(tmp_path / "b", "falcon")) >= {"query_key_value", "dense_h_to_4h"}


@pytest.mark.parametrize(
    ("name", "given", "wrong"),
    [
        ("llama", ["q_proj", "v_porj"], "v_porj"),
        ("llama", ["query_key_value"], "query_key_value"),
        ("gpt2", ["c_attn", "q_proj"], "q_proj"),
        ("mixtral", ["q_proj", "w4"], "w4"),
        ("mixtral", ["experts.gate_proj"], "experts.gate_proj"),
    ],
)
def test_a_name_that_nothing_has_is_refused_with_those_that_there_are(
    tmp_path: Path, name: str, given: list[str], wrong: str
) -> None:
    """Also where others match: peft would train without it."""
    with pytest.raises(LoraError, match="is not a module of") as caught:
        adapted(tmp_path, name, target_modules=given)
    assert str(caught.value).startswith(f"lora.target_modules: {wrong!r} is not a module of")
    layers = {
        "gpt2": "c_attn, c_proj, c_fc, lm_head, wte, wpe",
        "llama": "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head, embed_to",
        "mixtral": "q_proj, k_proj, v_proj, o_proj, experts.down_proj, experts.gate_up_proj, lm_he",
    }
    assert f"; it has {layers[name]}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_experts_can_be_named_by_their_parameter_or_as_they_were_once_called(
    tmp_path: Path,
) -> None:
    for number, names in enumerate((["experts.gate_up_proj", "o_proj"], ["w1", "w3", "o_proj"])):
        model = adapted(tmp_path / str(number), "mixtral", target_modules=names)
        found = {m.parameter_name for m in model.modules() if isinstance(m, ParamWrapper)}
        assert found == {"gate_up_proj"}
        assert leaves(model) == {"experts", "o_proj"}


@pytest.mark.parametrize("given", [["input_layernorm"], ["w1", "o_proj"]])
def test_what_peft_cannot_adapt_is_refused_in_one_line(tmp_path: Path, given: list[str]) -> None:
    """A norm; and one of two projections that are fused today."""
    with pytest.raises(LoraError, match="peft cannot adapt MixtralForCausalLM") as caught:
        adapted(tmp_path, "mixtral", target_modules=given)
    assert "\n" not in str(caught.value)


def test_adapters_that_peft_would_lose_on_reading_are_refused_by_plan(tmp_path: Path) -> None:
    """Transformers renames this type's `shared_expert` with an expression that meets more."""
    make("laguna", tmp_path)
    model = ModelConfig(model_name_or_path=str(tmp_path))
    with pytest.raises(LoraError, match="would lose the adapters of gate_proj, up_proj"):
        trained_size(model, policy, LoraConfig())
    kept = trained_size(model, policy, LoraConfig(target_modules=["q_proj", "o_proj"]))
    assert kept.parameters > 0


@pytest.mark.parametrize("name", ["llama", "mixtral", "falcon", "mamba", "deepseek_v3"])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, lora_alpha=8)])
def test_what_is_trained_is_counted_without_memory(
    tmp_path: Path, name: str, lora: LoraConfig | None
) -> None:
    make(name, tmp_path)
    given = ModelConfig(model_name_or_path=str(tmp_path))
    model: Any = load_policy(given, device="cpu")
    model = model.requires_grad_(True) if lora is None else add_lora(model, lora, "logps", 0)
    size = trained_size(given, policy, lora)
    assert size.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.unknown == ""
    assert size.kept is not None
    assert size.kept.numbers > 0


def test_an_estimate_that_cannot_be_made_says_why_and_ends_nothing(tmp_path: Path) -> None:
    make("dbrx", tmp_path)
    size = trained_size(ModelConfig(model_name_or_path=str(tmp_path)), policy, LoraConfig())
    assert size.kept is None
    assert "cannot be called on meta tensors" in size.unknown
    assert size.parameters > 0
