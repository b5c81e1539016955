"""Models that exceed a GPU: what a plan refuses, says to set, and then takes them to hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from small_run import small_config
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.placement import Machine
from cwpo_dist.planning.plan import Plan, plan
from cwpo_dist.runs import checks, engine_checks
from cwpo_dist.runs.sizes import ModelSize

pytestmark = pytest.mark.timeout(900)

LLAMA_70B = {
    **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
}


def hollow(folder: Path, kind: Any, **more: Any) -> str:
    """A model's folder, whose files of weights are as long as those of a real one, and empty."""
    config = AutoConfig.for_model(
        "llama", **LLAMA_70B, **more, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tensors = model.state_dict()
    shards = split_torch_state_dict_into_shards(tensors)
    for name, members in shards.filename_to_tensors.items():
        end, header = 0, {}
        for member in members:
            start, end = end, end + 2 * tensors[member].numel()
            shape = [*tensors[member].shape]
            header[member] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans a run of a 70B policy and reward model on a node of eight A100."""
    monkeypatch.setattr(checks, "available", lambda: [Machine(96.0, 8.0, {KIND: 1.0})])
    monkeypatch.setattr(engine_checks, "_installed", lambda: True)
    policy = hollow(tmp_path / "policy", AutoModelForCausalLM)
    gold = hollow(tmp_path / "gold", AutoModelForSequenceClassification, num_labels=1)

    def made(**changes: Any) -> Plan:
        pools = ("annotate", "reference", "evaluate")
        config = small_config(tmp_path)
        config["policy"]["model_name_or_path"] = policy
        model = config["policy"] | {"model_name_or_path": gold}
        config["annotate"]["model"] = config["evaluate"]["gold_model"] = model
        for pool in pools:
            config[pool]["gpus_per_actor"] = 1
        for training in ("sft", "align"):
            config[training] |= {"num_workers": 8, "zero_stage": 3}
        for section, told in changes.items():
            config[section] |= told
        return plan(parse_config(config))

    return made


KIND = "accelerator_type:A100"


def test_what_exceeds_a_gpu_is_refused_with_what_to_set_and_then_fits(planned: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        planned()
    said = str(refused.value).splitlines()
    assert [line.split(" holds ")[0] for line in said] == [
        "annotate.model.model_name_or_path: annotate",
        "policy.model_name_or_path: evaluate",
        "policy.model_name_or_path: reference",
        "evaluate.gold_model.model_name_or_path: evaluate",
    ]
    assert "141 GB of weights on 1 × 80 GB (A100); set reference.sharded to true, and" in said[2]
    assert said[1].endswith("set evaluate.engine to vllm, and its gpus_per_actor to 4")

    shared = {"sharded": True}
    writes = {"engine": "vllm", "gpus_per_actor": 4}
    with pytest.raises(ConfigError, match=r"raise fit\.num_workers to 4"):
        planned(annotate=shared, reference=shared, evaluate=shared | writes)
    fits = {"annotate": shared, "reference": shared, "evaluate": shared | writes}
    found = {stage.stage: stage for stage in planned(fit={"num_workers": 8}, **fits).stages}
    gib = {name: (stage.memory or 0) / 2**30 for name, stage in found.items()}
    assert 131.4 / 8 < gib["annotate"] < 20 > gib["reference"] > 131.4 / 8
    assert 131.4 / 4 < gib["generate (answers_base)"] < 40


def test_what_vllm_cannot_do_as_our_own_loop_does_is_refused() -> None:
    sources = {"sources": [{"path": "p"}]}
    config = parse_config({"output_dir": "run", "prepare": sources, "evaluate": {"engine": "vllm"}})
    policy = ModelConfig(model_name_or_path="p", num_hidden_layers=2, max_length=400)
    size = replace(ModelSize(9, 9, 9, 2, 8, 9), turning=500)
    missing, layers, turning = engine_checks.vllm_faults(config, policy, size)
    assert "pip install 'cwpo_dist[vllm]'" in missing
    assert layers.startswith("policy.num_hidden_layers: 2, but vLLM reads whole models")
    assert "are 912, but the rotary positions of 'p' turn beyond 500" in turning


def test_gpus_that_vllm_cannot_divide_heads_by_are_refused(planned: Any) -> None:
    with pytest.raises(ConfigError, match=r"gpus_per_actor: 3, but .* 64 attention heads"):
        planned(evaluate={"engine": "vllm", "gpus_per_actor": 3})
