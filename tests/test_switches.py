"""Dropout and extra outputs are off while a model is used; its folder has them as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import rows
from exported_runs import Alone
from tiny import save_tiny, tiny_causal_lm, tiny_tokenizer
from tiny_kinds import make
from transformers import AutoConfig

from cwpo_dist.config import LoraConfig, ModelConfig
from cwpo_dist.lm.generation import generate
from cwpo_dist.lm.loading import load_config, load_policy
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.recompute import let_recompute, recompute, start_training
from cwpo_dist.lm.rows import Row, collate
from cwpo_dist.lm.switches import unused_losses
from cwpo_dist.storage import Store
from cwpo_dist.training import saving
from cwpo_dist.training.lora import add_lora

ROWS = [Row([5, 6, 7], ([8, 9, 1], [10, 1])), Row([11] * 9, ([12, 1], [13] * 5))]
LOUD = {
    "output_router_logits": True,
    "output_hidden_states": True,
    "router_jitter_noise": 0.5,
    "attention_dropout": 0.3,
}


def tell(folder: Path, **fields: Any) -> ModelConfig:
    """Sets fields of a folder's configuration."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return ModelConfig(model_name_or_path=str(folder), max_length=64)


def test_what_a_configuration_asks_for_beside_states_changes_nothing(tmp_path: Path) -> None:
    """A router's logits, and the loss on them, crash plain generation."""
    make("mixtral", tmp_path)
    quiet = load_policy(ModelConfig(model_name_or_path=str(tmp_path)), device="cpu")
    loud = load_policy(tell(tmp_path, **LOUD, return_dict=False), device="cpu")
    modules = [AnswerLogProbs(model).eval() for model in (quiet, loud)]
    for module in modules:
        assert choose_layout(module, longest=64).layout == "packed"
        start_training(module)
    one, other = (module(collate(ROWS, "packed", 2)) for module in modules)
    assert torch.equal(one, other)
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    prompts = [row.prompt for row in ROWS]
    answers = [
        generate(model, tiny_tokenizer(), prompts, batch_size=2, **settings)
        for model in (quiet, loud)
    ]
    assert answers[0] == answers[1]


def test_a_trained_folder_is_configured_as_its_base_was(tmp_path: Path) -> None:
    make("mixtral", tmp_path / "base")
    given = tell(tmp_path / "base", **LOUD)
    wanted = AutoConfig.from_pretrained(tmp_path / "base").to_dict()
    assert wanted["use_cache"]
    for lora in (None, LoraConfig(r=2, lora_dropout=0.0)):
        model = load_policy(given, device="cpu")
        model.config.use_cache = False  # as a worker does
        store = Store(str(tmp_path / f"out{lora is None}"))
        if lora is None:
            saving.export_full(Alone(), model, tiny_tokenizer(), store, lambda: None)
        else:
            adapted = add_lora(model, lora, "logps", 0)
            weights = saving.gather_weights(Alone(), adapted, saving.trainable_names(adapted))
            saving.export_lora(
                adapted, weights, tiny_tokenizer(), store, given, "logps", 0, lambda: None
            )
        found = AutoConfig.from_pretrained(store.path("model")).to_dict()
        for name in [*LOUD, "use_cache"]:
            assert found[name] == wanted[name], (name, lora)


def test_a_loss_that_no_objective_has_is_known(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    assert unused_losses(load_config(ModelConfig(model_name_or_path=str(tmp_path)))) == []
    asked = tell(tmp_path, output_router_logits=True)
    assert unused_losses(load_config(asked)) == ["output_router_logits"]


@pytest.mark.parametrize("name", ["phimoe", "mixtral, router's loss and jitter", "gemma3n_text"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_model_trains_as_it_scores(tmp_path: Path, name: str, recomputed: bool) -> None:
    """In transformers' training mode these draw experts or noise, or read past an adapter."""
    make(name, tmp_path)
    given = ModelConfig(model_name_or_path=str(tmp_path))
    model: Any = load_policy(given, device="cpu")
    let_recompute(model)
    adapted = add_lora(model, LoraConfig(r=2, lora_dropout=0.0), "logps", 0)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    module, batch = AnswerLogProbs(adapted).eval(), collate(rows(8), "plain", 2)
    scored = module(batch)
    start_training(module)
    recompute(module, on=recomputed)
    trained = module(batch)
    torch.testing.assert_close(trained, scored, atol=1e-5, rtol=0)
    trained.sum().backward()
    module.train()
    torch.manual_seed(0)
    assert float((module(batch) - scored).detach().abs().max()) > 1e-3, "what it would be"


def test_dropout_of_adapters_and_recomputation_are_on_in_training() -> None:
    model: Any = tiny_causal_lm("llama", num_hidden_layers=3)
    let_recompute(model)
    module = AnswerLogProbs(add_lora(model, LoraConfig(lora_dropout=0.5), "logps", 0))
    start_training(module)
    training = {name for name, part in module.named_modules() if part.training}
    assert {n for n in training if n.endswith("lora_dropout.default")}
    layers = {n for n in training if n.split(".")[-1].isdigit()}
    assert {name.rpartition(".")[2] for name in layers} == {"0", "1"}, "the last never recomputes"
    assert not [n for n in training if n.endswith(("mlp", "self_attn", "norm"))]
