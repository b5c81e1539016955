"""Loading: complete models only, nothing random but a new head, and that from its seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_causal_lm, tiny_classifier, tiny_tokenizer
from tiny_kinds import make
from transformers import AutoModelForCausalLM

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm import load_settings, loading
from cwpo_dist.lm.encoder import Encoder, load_tokenizer
from cwpo_dist.lm.fingerprints import model_fingerprint
from cwpo_dist.lm.load_settings import straight_to
from cwpo_dist.lm.loading import (
    ModelError,
    classifier_skeleton,
    load_annotator_base,
    load_policy,
    load_reward_model,
    save,
)

IDS = torch.arange(3, 23)[None]


def config(path: Path | str, **settings) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(path), **settings)


def without(folder: Path, *names: str) -> Path:
    """The model with tensors taken out of its file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in names:
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def edited(folder: Path, **changes) -> Path:
    """The model with changes in its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.fixture
def llama(tmp_path) -> Path:
    folder = save_tiny(tmp_path / "llama", "llama")
    tiny_tokenizer(pad_is_eos=True).save_pretrained(folder)
    return folder


def annotator(folder: Path, seed: int = 0):
    tokenizer = load_tokenizer(folder, distinct_pad=True)
    return load_annotator_base(config(folder), tokenizer, seed)


def test_policy_is_the_stock_model(llama):
    policy = load_policy(config(llama), device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(llama)
    assert not policy.training
    assert policy.dtype == torch.float32
    assert policy.config._attn_implementation == "sdpa"
    assert torch.equal(policy(IDS).logits, stock(IDS).logits)
    eager = load_policy(config(llama, attn_implementation="eager", torch_dtype="bfloat16"))
    assert (eager.config._attn_implementation, eager.dtype) == ("eager", torch.bfloat16)


@pytest.mark.parametrize(
    ("arch", "tensor"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "lm_head.weight"),
        ("opt", "model.decoder.layers.0.fc1.bias"),
    ],
)
def test_missing_tensors_are_refused_by_name(tmp_path, arch, tensor):
    folder = without(save_tiny(tmp_path, arch, tie_word_embeddings=False), tensor)
    with pytest.raises(ModelError, match=f"model_name_or_path: .* lacks the tensors {tensor} of"):
        load_policy(config(folder))


def test_tied_embeddings_are_not_missing(tmp_path):
    folder = save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_policy(config(folder))


def test_a_long_list_of_missing_tensors_is_cut(llama):
    names = [name for name in load_file(llama / "model.safetensors") if "layers.1" in name]
    with pytest.raises(ModelError, match=f"and {len(names) - 5} more"):
        load_policy(config(without(llama, *names)))


def test_pickled_weights_and_remote_code_are_refused(llama):
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_policy(config(llama))
    (llama / "remote.py").write_text("open('was-here', 'w')")
    edited(llama, model_type="mine", auto_map={"AutoConfig": "remote.Mine"})
    with pytest.raises(ModelError, match=r"trust_remote_code|custom code"):
        load_policy(config(llama))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="model_name_or_path: no folder '/nowhere/model'"):
        load_policy(config("/nowhere/model"))
    with pytest.raises(ModelError, match="model_name_or_path: "):
        load_policy(config(tmp_path))
    with pytest.raises(ModelError, match="the tokenizer of "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("arch", "layers"),
    [("llama", "layers"), ("qwen2", "layers"), ("gpt2", "h"), ("gpt_neox", "layers")],
)
def test_first_layers(tmp_path, arch, layers):
    save_tiny(tmp_path, arch, num_hidden_layers=3)
    cut = load_policy(config(tmp_path, num_hidden_layers=2))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    setattr(stock.base_model, layers, getattr(stock.base_model, layers)[:2])
    stock.config.num_hidden_layers = 2
    assert torch.equal(cut(IDS).logits, stock(IDS, use_cache=False).logits)
    # and its folder is that of a model of two layers
    save(cut, tiny_tokenizer(), tmp_path / "cut")
    assert torch.equal(load_policy(config(tmp_path / "cut"))(IDS).logits, cut(IDS).logits)


def test_more_layers_than_there_are_is_refused(llama):
    with pytest.raises(ModelError, match=r"num_hidden_layers: 9, but .* has 2"):
        load_policy(config(llama, num_hidden_layers=9))


def test_layers_whose_kinds_follow_from_their_number_are_cut_too(tmp_path):
    make("mamba", tmp_path)
    assert len(load_policy(config(tmp_path, num_hidden_layers=1)).backbone.layers) == 1


def test_a_configuration_that_refuses_fewer_layers_is_named(tmp_path):
    """GPT-Neo's lists the kinds of all of its layers in a field of its own."""
    make("gpt_neo", tmp_path)
    with pytest.raises(ModelError, match=r"num_hidden_layers: 1, but a gpt_neo cannot be cut \("):
        load_policy(config(tmp_path, num_hidden_layers=1))


@pytest.mark.parametrize("arch", ["gpt2", "opt", "bloom", "gpt_neox"])
def test_dropout_is_off(tmp_path, arch):
    rates = {
        "gpt2": {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3},
        "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3},
        "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
        "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    }[arch]
    save_tiny(tmp_path, arch, **rates)
    attention = "eager" if arch == "bloom" else "sdpa"
    policy = load_policy(config(tmp_path, attn_implementation=attention)).train()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert torch.equal(policy(IDS).logits, policy(IDS).logits)
    assert not torch.equal(stock(IDS).logits, stock(IDS).logits)
    tokenizer = load_tokenizer(tmp_path)
    settings = config(tmp_path, attn_implementation=attention)
    base = load_annotator_base(settings, tokenizer, 0).train()
    assert torch.equal(base(IDS).logits, base(IDS).logits)


def test_new_head_comes_from_the_seed_alone(llama):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = annotator(llama, seed=7).score.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(annotator(llama, seed=7).score.weight, first)
    assert not torch.equal(annotator(llama, seed=8).score.weight, first)
    assert first.shape == (1, 32)
    assert 0.1 < first.std() < 0.3  # the tiny configuration's initializer_range is 0.2


def test_annotator_base_keeps_the_weak_models_trunk(llama):
    base = annotator(llama)
    weak = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(base.model(IDS).last_hidden_state, weak.model(IDS).last_hidden_state)
    # the new pad token has a row of its own, and EOS, which was the pad, learns again
    assert base.config.pad_token_id == 266
    assert base.config.num_labels == 1
    assert base.model.embed_tokens.weight.shape == (267, 32)
    base(torch.tensor([[3, 1, 4]])).logits.sum().backward()
    assert base.model.embed_tokens.weight.grad[1].abs().sum() > 0


def test_a_trained_head_is_kept(llama, tmp_path):
    trained = annotator(llama, seed=1)
    save(trained, load_tokenizer(llama, distinct_pad=True), tmp_path / "trained")
    again = annotator(tmp_path / "trained", seed=2)
    assert torch.equal(again.score.weight, trained.score.weight)
    reward = load_reward_model(config(tmp_path / "trained"))
    assert torch.equal(reward(IDS).logits, trained(IDS).logits)


def test_only_the_head_may_be_missing(llama):
    without(llama, "model.norm.weight")
    with pytest.raises(ModelError, match=r"lacks the tensors model\.norm\.weight"):
        annotator(llama)


def test_annotator_needs_a_pad_token_of_its_own(llama):
    with pytest.raises(ModelError, match="distinct_pad=True"):
        load_annotator_base(config(llama), load_tokenizer(llama), 0)


def test_reward_model_needs_its_head_and_one_label(llama, tmp_path):
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.* has 2 labels"):
        load_reward_model(config(llama))
    edited(llama, id2label={"0": "reward"}, label2id={"reward": 0})
    with pytest.raises(ModelError, match=r"lacks the tensors score\.weight"):
        load_reward_model(config(llama))
    tiny_classifier("bert").save_pretrained(tmp_path / "bert")
    assert load_reward_model(config(tmp_path / "bert")).num_labels == 1


def test_attention_is_what_transformers_would_take(tmp_path):
    """Gemma 2 caps its scores, which only eager attention knows."""
    save(tiny_causal_lm("gemma2"), tiny_tokenizer(), tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    policy = load_policy(config(tmp_path))
    chosen = stock.config._attn_implementation
    assert policy.config._attn_implementation == chosen == "eager"
    assert torch.equal(policy(IDS).logits, stock(IDS).logits)
    with pytest.raises(ModelError, match="scaled_dot_product_attention"):
        load_policy(config(tmp_path, attn_implementation="sdpa"))


def test_a_pad_token_that_the_model_cannot_hold_is_refused(llama):
    edited(llama, pad_token_id=266)
    for load in (load_policy, classifier_skeleton):
        with pytest.raises(ModelError, match="pad_token_id 266, but vocab_size 266"):
            load(config(llama))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_an_adapter_is_refused_and_its_message_merges_it(llama, tmp_path, task, monkeypatch):
    """The three lines are run as they stand there."""
    from peft import LoraConfig, get_peft_model

    scores = task == "SEQ_CLS"
    base = tiny_classifier("llama") if scores else tiny_causal_lm("llama")
    save(base, tiny_tokenizer(), llama)
    again = (load_reward_model if scores else load_policy)(config(llama))
    adapted = get_peft_model(again, LoraConfig(task_type=task, r=2, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    load = load_reward_model if scores else load_policy
    with pytest.raises(ModelError, match=r"is a peft adapter .* of '.*llama'") as caught:
        load(config(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert len(lines) == 3
    exec("\n".join(lines), {})  # noqa: S102 (what we tell users to run)
    merged = load(config("./merged"))
    torch.testing.assert_close(merged(IDS).logits, adapted.eval()(IDS).logits, rtol=0, atol=1e-4)
    assert load_tokenizer("./merged").eos_token == "</s>"


def test_an_adapter_of_several_heads_is_loaded_with_as_many(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    weights = {"base_model.model.score.weight": torch.zeros(8, 4)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"from_pretrained\(.*, num_labels=8\)"):
        load_reward_model(config(tmp_path))


def test_a_store_is_staged(llama):
    memory = fsspec.filesystem("memory")
    memory.put(f"{llama}/", "/models/staged/", recursive=True)
    settings = config("memory://models/staged")
    assert Encoder(load_tokenizer(settings)).encode("a", ["b"]).prompt
    stock = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(load_policy(settings)(IDS).logits, stock(IDS).logits)
    names = [name for name, *_ in model_fingerprint(settings)]
    assert "model.safetensors" in names


def test_fingerprint_follows_weights_config_and_template(llama, tmp_path):
    first = model_fingerprint(config(llama))
    assert [name for name, *_ in first] == sorted(
        [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    (llama / "README.md").write_text("read me")
    assert model_fingerprint(config(llama)) == first
    tiny_causal_lm("llama", seed=1).save_pretrained(llama)
    assert model_fingerprint(config(llama)) != first
    assert json.loads(json.dumps(first)) == first  # it goes into keys


def test_fingerprint_of_a_hub_model_is_its_commit(llama, tmp_path, monkeypatch):
    """A cache as the hub client lays it out, so that nothing is asked of a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    llama.rename(cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model_fingerprint(config("someone/small")) == [["someone/small", commit]]
    assert load_policy(config("someone/small")).config.num_hidden_layers == 2


def test_saved_folder_is_safetensors_with_its_template(llama, tmp_path):
    tokenizer = Encoder(load_tokenizer(llama), "plain").tokenizer
    save(load_policy(config(llama)), tokenizer, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    assert load_tokenizer(tmp_path / "out").chat_template == tokenizer.chat_template


def test_weights_are_read_to_where_they_are_wanted(llama, monkeypatch):
    cuda = torch.device("cuda", 3)
    assert straight_to("cpu", new_head=False) is None
    assert straight_to("meta", new_head=True) == {"": torch.device("meta")}
    assert straight_to(cuda, new_head=False) == {"": cuda}
    assert straight_to(cuda, new_head=True) is None, "drawn on the CPU, as everywhere"
    with monkeypatch.context() as patch:
        patch.setattr(load_settings, "is_deepspeed_zero3_enabled", lambda: True)
        assert straight_to(cuda, new_head=False) is None, "in shards"
    usual = load_policy(config(llama)).state_dict()
    monkeypatch.setattr(loading, "straight_to", lambda *_, **__: {"": torch.device("cpu")})
    straight = load_policy(config(llama))
    assert straight.state_dict().keys() == usual.keys()
    assert all(torch.equal(tensor, usual[name]) for name, tensor in straight.state_dict().items())
    assert not any(hasattr(part, "_hf_hook") for part in straight.modules())


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            '{"metadata": {}, "weight_map": {"w": "pytorch_model.bin"}}',
            "names 'pytorch_model.bin', and only",
        ),
        (
            '{"metadata": {}, "weight_map": {"w": "model.safetensors", "v": "../x.pt"}}',
            r"names '\.\./x\.pt'",
        ),
        ('{"weight_map": ', "is not an index of weights"),
        ('{"weights": {}}', "is not an index of weights"),
        ('{"weight_map": ["a"]}', "is not an index of weights"),
        ("[]", "is not an index of weights"),
    ],
)
def test_an_index_of_safetensors_names_no_other_files(llama, index, said, tmp_path):
    """Whatever they hold: transformers would hand them to torch.load."""
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=said):
        load_policy(config(folder))


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(torch.OutOfMemoryError("of a GPU"), torch.OutOfMemoryError), (RuntimeError("x"), ModelError)],
)
def test_a_want_of_memory_is_no_fault_of_the_model(llama, raised, seen, monkeypatch):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(seen):
        load_policy(config(llama))
