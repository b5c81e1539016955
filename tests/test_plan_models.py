"""What plan says of models: estimates that never end it, and in one line each what cannot train."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_run import small_config
from tiny import CHAT_TEMPLATE, tiny_causal_lm, tiny_classifier, tiny_tokenizer
from tiny_kinds import make
from transformers import AutoConfig

from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.lm.foreign import one_line
from cwpo_dist.lm.loading import ModelError, load_policy
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.planning.plan import plan
from cwpo_dist.planning.plan_table import print_plan
from cwpo_dist.runs.checks import check

# No arm needs an annotator: the policy alone is looked at.
HUMAN: dict[str, Any] = {"arms": ["human"], "sft__gradient_checkpointing": True}


def config(folder: Path, name: str, **changes: Any) -> Any:
    make(name, folder / "policy")
    given = small_config(folder, **HUMAN | changes)
    given["policy"] = {"model_name_or_path": str(folder / "policy"), "max_length": 400}
    given["policy"] |= {key: changes[key] for key in ("max_length",) if key in changes}
    given.pop("max_length", None)
    return parse_config(given)


def faults(run: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(run)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "name",
    [
        *("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "qwen3_next", "bloom"),
        *("falcon, ALiBi", "llama4_text", "dbrx"),
    ],
)
def test_an_estimate_never_ends_a_run(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan(config(tmp_path, name))
    (sft,) = [stage for stage in planned.stages if stage.stage == "sft"]
    assert sft.memory
    assert sft.at_least is (name == "dbrx"), "which looks at values"
    print_plan(planned)
    shown = " ".join(capsys.readouterr().out.split())
    if name == "dbrx":
        assert re.search(r"sft .* ≥ [\d.]+ GiB", shown)
        assert "its activations are unknown (RuntimeError: Tensor.item() cannot be called" in shown


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_models_that_are_no_transformers_are_planned_too(tmp_path: Path, name: str) -> None:
    planned = plan(config(tmp_path, name, sft__gradient_checkpointing=False))
    assert all(stage.seconds is not None for stage in planned.stages)


def test_sections_are_sized_by_their_own_adapters(tmp_path: Path) -> None:
    run = config(tmp_path, "llama", sft__lora={"r": 4}, align__lora=None)
    size = check(run).sizes["policy"]
    assert size.of(run.align).parameters == size.parameters
    twice = config(tmp_path, "llama", sft__lora={"r": 8}, align__lora=None)
    doubled = check(twice).sizes["policy"].of(twice.sft).parameters
    assert size.of(run.sft).parameters * 2 == doubled < size.parameters


def test_a_misspelt_target_is_refused_with_the_section_and_the_names_that_there_are(
    tmp_path: Path,
) -> None:
    wrong = {"target_modules": ["q_proj", "v_porj"]}
    found = faults(config(tmp_path, "llama", sft__lora=wrong, align__lora={"r": 2, **wrong}))
    assert [line.split(" is not a module")[0] for line in found] == [
        "sft.lora.target_modules: 'v_porj'",
        "align.lora.target_modules: 'v_porj'",
    ]
    assert "it has q_proj, k_proj, v_proj, o_proj" in found[0]


@pytest.mark.parametrize("name", ["jetmoe", "openai-gpt"])
def test_layers_that_cannot_compute_again_are_refused(tmp_path: Path, name: str) -> None:
    (found,) = faults(config(tmp_path, name, align__lora=None, sft__lora=None))
    assert found.startswith("sft.gradient_checkpointing: ")
    assert found.endswith("set it to false")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bert", "bert is an encoder: it reads the tokens that it should predict"),
        ("xlm", "xlm is an encoder"),
        ("xlnet", "xlnet predicts tokens in any order"),
        ("modernbert-decoder", "has layers of its own between its decoder and its output layer"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_name(
    tmp_path: Path, name: str, why: str
) -> None:
    (found,) = faults(config(tmp_path, name))
    assert found.startswith("policy.model_name_or_path: ")
    assert why in found
    assert found.endswith("give a causal language model")


@pytest.mark.parametrize(
    ("name", "workers", "why"),
    [
        ("llama", 3, " has 4 attention heads; give a number that divides them"),
        ("qwen3_next", 2, ": its layers of kind 'linear_attention' hand states on from token to "),
        ("bloom", 2, ": its attention is 'eager', and only that of torch ('sdpa') is shared; set"),
        ("mamba", 2, ": its configuration names no attention heads; set it to 1"),
    ],
)
def test_workers_that_cannot_share_a_models_sequences_are_refused(
    tmp_path: Path, name: str, workers: int, why: str
) -> None:
    shared = {"align__num_workers": workers, "align__sequence_parallel_size": workers}
    shared |= {"align__cpus_per_worker": 0.1, "sft__gradient_checkpointing": False}
    (found,) = faults(config(tmp_path, name, **shared))
    assert found.startswith(
        f"align.sequence_parallel_size: {workers}: {str(tmp_path / 'policy')!r}"
    )
    assert why in found


def test_a_plan_says_how_workers_share_a_sequence(tmp_path: Path) -> None:
    shared = {"align__num_workers": 4, "align__sequence_parallel_size": 2}
    planned = plan(config(tmp_path, "llama", align__cpus_per_worker=0.1, **shared))
    (align,) = [stage for stage in planned.stages if stage.stage == "align"]
    said = "4 workers are 2 x 2, of which 2 share a micro-batch: 1/2 of its tokens and 2 of 4"
    assert any(said in line for line in align.details)


def test_a_section_whose_workers_share_a_ready_annotator_is_read_though_it_trains_nothing(
    tmp_path: Path,
) -> None:
    given = small_config(tmp_path, annotate__sharded=True, fit__deepspeed=str(tmp_path / "none"))
    tiny_classifier("llama").save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    given["annotate"]["model"] = {"model_name_or_path": str(tmp_path / "reward")}
    with pytest.raises(ConfigError, match=r"fit\.deepspeed: .*none"):
        check(parse_config(given), "annotate")


def test_an_architecture_without_a_classifier_is_no_annotator(tmp_path: Path) -> None:
    given = small_config(tmp_path, arms=["cw"])
    given["weak"]["model_name_or_path"] = str(tmp_path / "weak")
    make("granite", tmp_path / "weak")
    (found,) = faults(parse_config(given))
    assert found == (
        f"weak.model_name_or_path: {str(tmp_path / 'weak')!r}: transformers has no sequence "
        "classifier (which annotators are) of granite; give another architecture"
    )


def test_a_field_that_no_layer_asks_for_makes_no_encoder(tmp_path: Path) -> None:
    """GPT-NeoX Japanese has `is_decoder: false`, and masks what is ahead all the same."""
    run = config(tmp_path, "gpt_neox_japanese", sft__gradient_checkpointing=False)
    assert check(run).sizes["policy"].parameters > 0


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_the_attention_is_the_runs_whatever_a_configuration_asks_for(
    tmp_path: Path, attention: str
) -> None:
    """Some ask for a kernel that is not installed, and 'auto' takes one that is."""
    chosen = {f"{field}__attn_implementation": attention for field in ("weak", "policy")}
    given = small_config(tmp_path, **chosen)
    asking = json.loads((tmp_path / "model" / "config.json").read_text())
    asking["_attn_implementation"] = "flash_attention_2"
    (tmp_path / "model" / "config.json").write_text(json.dumps(asking))
    assert check(parse_config(given)).sizes.keys() == {"weak", "policy"}
    model = load_policy(ModelConfig(**given["policy"]), device="cpu")
    assert model.config._attn_implementation == {"auto": "sdpa"}.get(attention, attention)


def test_the_probe_finds_a_model_that_reads_ahead(tmp_path: Path) -> None:
    """Whatever its configuration says."""
    model: Any = tiny_causal_lm("llama", attn_implementation="eager")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, kwargs | {"attention_mask": None}),
            with_kwargs=True,
        )
    with pytest.raises(ModelError, match="LlamaForCausalLM reads ahead"):
        choose_layout(AnswerLogProbs(model), longest=64)


def test_a_foreign_models_error_is_one_line_and_named(tmp_path: Path) -> None:
    make("llama", tmp_path / "policy")
    broken = AutoConfig.from_pretrained(tmp_path / "policy")
    broken.rope_parameters = {"rope_type": "no such"}
    broken.save_pretrained(tmp_path / "policy")
    with pytest.raises(ModelError, match=r"^model_name_or_path: .*: KeyError: 'no such'$"):
        load_policy(ModelConfig(model_name_or_path=str(tmp_path / "policy")), device="meta")
    assert one_line(ValueError("one\n  two")) == "one two"
    assert one_line(KeyError("x")) == "KeyError: 'x'"
    assert one_line(NotImplementedError()) == "NotImplementedError"
    assert len(one_line(ValueError("word " * 400))) <= 240


def longer_tokenizer(folder: Path, *, written: bool) -> None:
    """Two tokens more than the embeddings; in the template or in none."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if written:
        tokenizer.chat_template = CHAT_TEMPLATE.replace("<|{{", "<|im_start|>{{")
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("field", ["policy", "weak", "annotate.model"])
def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path, field: str) -> None:
    from tiny import tiny_classifier

    arms = ["human"] if field == "policy" else ["cw"]
    given = small_config(tmp_path, arms=arms)
    tiny_classifier("llama").save_pretrained(tmp_path / "policy")
    if field != "annotate.model":
        make("llama", tmp_path / "policy")
    longer_tokenizer(tmp_path / "policy", written=True)
    model = {"model_name_or_path": str(tmp_path / "policy"), "max_length": 400}
    section, _, name = field.partition(".")
    given[section] = {**given[section], name: model} if name else model
    (found,) = [line for line in faults(parse_config(given)) if line.startswith(field)]
    assert found.startswith(f"{field}.model_name_or_path: ")
    assert "its tokenizer has 268 tokens, but the model has embeddings of 266" in found
    assert "none of '<|im_start|>', '<|im_end|>'" in found
    assert "resize the model (resize_token_embeddings(len(tokenizer)))" in found


def test_tokens_that_no_row_needs_are_named_and_refuse_nothing(tmp_path: Path) -> None:
    """As in Gemma 3's tokenizer, which has a token for images that its small models lack."""
    run = config(tmp_path, "llama")
    assert not [note for note in check(run).notes if "tokenizer" in note]
    longer_tokenizer(tmp_path / "policy", written=False)
    (note,) = [note for note in check(run).notes if "tokenizer" in note]
    assert "its tokenizer has 268 tokens, the model embeddings of 266" in note
    assert "'<|im_start|>', '<|im_end|>'; a pair with one is set aside" in note


def test_rows_in_which_rotary_positions_turn_are_noted(tmp_path: Path) -> None:
    run = config(tmp_path, "phi3, longrope")
    (note,) = [note for note in check(run).notes if "rotary" in note]
    assert note.startswith("policy.max_length: ")
    assert "turn in rows of more than 24 tokens" in note
    assert note in plan(run).notes


def test_what_a_mixture_asks_for_and_does_not_get_is_noted(tmp_path: Path) -> None:
    notes = check(config(tmp_path, "mixtral, router's loss and jitter")).notes
    assert [note for note in notes if note.startswith("policy: config.json has output_router_log")]
    (dropout,) = [note for note in notes if "lora_dropout" in note]
    assert dropout.startswith("sft.lora: lora_dropout 0.05 is left out on the fused experts")
