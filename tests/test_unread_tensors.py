"""Tensors of a model's files that its architecture has no place for: named, but those left out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.loading import load_annotator_base, load_reward_model


@pytest.mark.parametrize("kind", ["reward model", "annotator", "first layer"])
def test_tensors_that_no_part_reads_are_named(tmp_path, kind, caplog):
    """A bias that the architecture lacks is another model; other heads and cut layers are not."""
    tiny_classifier("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    biases = ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.bias"]
    more = {name: torch.ones(32) for name in [*biases, "lm_head.weight"]}
    save_file(load_file(file) | more, file, {"format": "pt"})
    layers = 1 if kind == "first layer" else None
    model = ModelConfig(model_name_or_path=str(tmp_path), num_hidden_layers=layers)
    if kind == "annotator":
        load_annotator_base(model, load_tokenizer(model, distinct_pad=True), 0)
    else:
        load_reward_model(model)
    (said,) = caplog.messages
    named = [name in said for name in (*biases, "lm_head.weight")]
    assert named == [True, kind != "first layer", kind != "annotator"]
