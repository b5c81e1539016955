"""Whole trainings of several ranks; what they export, and the merge of adapters into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zero_cases
import zero_ranks
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zero_cases import assert_close, oracle_weights

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.loading import load_annotator_base, load_policy, load_reward_model
from cwpo_dist.lm.templates import PLAIN_TEMPLATE
from cwpo_dist.training.merge import MergeError, merge_adapter

pytestmark = pytest.mark.usefixtures("rank_results")


def exported(name: str, part: str = "model") -> Path:
    return zero_ranks.results() / "stages" / name / part


def as_model(folder: Path) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(folder), max_length=64)


@pytest.mark.parametrize("name", ["fit", "align"])
def test_full_export_is_what_was_trained(name: str) -> None:
    """From ZeRO-3 shards, file by file, into a folder that stock loaders take."""
    model = as_model(exported(name))
    loaded = load_reward_model(model) if name == "fit" else load_policy(model)
    assert_close(dict(loaded.named_parameters()), oracle_weights(name, zero_ranks.results()))
    assert len(list(exported(name).glob("model-*-of-*.safetensors"))) > 1
    if name == "align":  # log-probs, by transformers alone
        ids = torch.tensor([zero_cases.make_rows()[0].prompt])
        stock = AutoModelForCausalLM.from_pretrained(exported(name)).eval()
        base = load_policy(as_model(zero_ranks.results() / "model"))
        base.load_state_dict(oracle_weights(name, zero_ranks.results()), strict=False)
        with torch.no_grad():
            ours, wanted = (m(input_ids=ids).logits.log_softmax(-1) for m in (stock, base.eval()))
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)


def test_bfloat16_export() -> None:
    """In the precision that was trained in, and near to what float32 would have given."""
    stock = AutoModelForCausalLM.from_pretrained(exported("align-bf16"))
    assert stock.dtype == torch.bfloat16
    wanted = oracle_weights("align-bf16", zero_ranks.results())
    for parameter_name, parameter in stock.named_parameters():
        close = torch.isclose(parameter.float(), wanted[parameter_name].float(), atol=0.02)
        assert float(close.float().mean()) > 0.99, parameter_name


def test_tokenizer_travels_with_its_template() -> None:
    for name in zero_cases.STAGES:
        tokenizer = load_tokenizer(str(exported(name)))
        assert isinstance(tokenizer.chat_template, str)
        assert PLAIN_TEMPLATE in tokenizer.chat_template
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
        # an annotator's ends where it is scored
        assert text == ("<s>\n\nHuman: Q</s>" if name.startswith("fit") else "<s>\n\nHuman: Q")
        assert tokenizer.pad_token != tokenizer.eos_token
    assert (exported("align") / "generation_config.json").is_file()


@pytest.mark.parametrize("name", ["fit-lora", "align-lora"])
def test_merged_export_is_base_and_adapter(name: str) -> None:
    """As peft merges them; the adapter is what was trained."""
    base = as_model(zero_ranks.results() / "model")
    if name == "fit-lora":
        tokenizer = load_tokenizer(base, distinct_pad=True)
        model = load_annotator_base(base, tokenizer, zero_cases.SEED)
        loaded = load_reward_model(as_model(exported(name)))
    else:
        model = load_policy(base)
        loaded = load_policy(as_model(exported(name)))
    adapted = PeftModel.from_pretrained(model, str(exported(name, "adapter")))
    ours = {n: p.detach() for n, p in adapted.named_parameters() if "lora_" in n}
    assert_close(ours, oracle_weights(name, zero_ranks.results()))
    settings = json.loads((exported(name, "adapter") / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "./model", "the folder's name, and no path"
    merged = adapted.merge_and_unload()
    wanted = {n: p.detach() for n, p in merged.named_parameters()}
    for parameter_name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, wanted[parameter_name], atol=1e-6, rtol=0)


def test_metrics_of_all_steps() -> None:
    lines = (exported("align", "metrics.jsonl")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))
    assert json.loads(lines[0])["rewards/accuracies"] >= 0


def adapter_of(folder: Path, base: Path, **changes: Any) -> Path:
    """A random adapter of a base folder, written by peft itself."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_policy(as_model(base)), LoraConfig(**(settings | changes)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "opt"])
def test_streamed_merge_equals_peft(tmp_path: Path, arch: str) -> None:
    """Over several shards, too, and with biases."""
    base = tiny.save_tiny(tmp_path / "base", arch)
    load_policy(as_model(base)).save_pretrained(base, max_shard_size="40KB")
    (base / "model.safetensors").unlink()
    adapter = adapter_of(tmp_path / "adapter", base)
    merge_adapter(as_model(base), adapter, tmp_path / "out")
    wanted = PeftModel.from_pretrained(load_policy(as_model(base)), str(adapter))
    ours, theirs = load_policy(as_model(tmp_path / "out")), wanted.merge_and_unload()
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, parameter), (_, expected) in pairs:
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=0, msg=name)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_streamed_merge_of_transposed_weights(tmp_path: Path) -> None:
    """GPT-2's Conv1D; its files may lack the prefix that its class adds, which is refused."""
    base = tiny.save_tiny(tmp_path / "base", "gpt2")
    adapter = adapter_of(tmp_path / "adapter", base)
    merge_adapter(as_model(base), adapter, tmp_path / "out", dtype=torch.float32)
    wanted = PeftModel.from_pretrained(load_policy(as_model(base)), str(adapter))
    theirs = dict(wanted.merge_and_unload().named_parameters())
    for name, parameter in load_policy(as_model(tmp_path / "out")).named_parameters():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-6, rtol=0, msg=name)
    old = {
        n.removeprefix("transformer."): t for n, t in load_file(base / "model.safetensors").items()
    }
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="no tensor 'transformer"):
        merge_adapter(as_model(base), adapter, tmp_path / "again")


def test_more_than_plain_lora_is_refused(tmp_path: Path) -> None:
    base = tiny.save_tiny(tmp_path / "base", "llama")
    with pytest.raises(MergeError, match="use_rslora"):
        merge_adapter(
            as_model(base), adapter_of(tmp_path / "a", base, use_rslora=True), tmp_path / "out"
        )
