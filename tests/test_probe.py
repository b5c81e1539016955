"""The probe: shared rows where they are exact, plain ones with a reason everywhere else."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from tiny import tiny_causal_lm, tiny_classifier
from tiny_kinds import make
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.loading import ModelError, load_policy
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores, refuse_one_by_one
from cwpo_dist.lm.packed import packed_attention
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.rows import collate
from cwpo_dist.lm.stock import probe_rows

ONE_ROW = torch.tensor([[[[1, 1]]]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "opt", "gpt2", "gpt_neox"])
def test_packed_or_shared_where_it_is_proved(arch, attention):
    for module in (
        AnswerLogProbs(tiny_causal_lm(arch, attn_implementation=attention)),
        AnswerScores(tiny_classifier(arch, attn_implementation=attention)),
    ):
        choice = choose_layout(module, longest=512)
        assert choice.layout == {"sdpa": "packed", "eager": "shared"}[attention]
        assert choice.max_difference is not None
        assert choice.max_difference < 1e-5


def test_alibi_falls_back_and_says_so_once(caplog):
    model = tiny_causal_lm("bloom")
    model.config.name_or_path = "a-bloom"
    with caplog.at_level(logging.INFO, logger="cwpo_dist.lm.probe"):
        choices = [choose_layout(AnswerLogProbs(model), longest=64) for _ in range(3)]
    assert {choice.layout for choice in choices} == {"plain"}
    assert "ALiBi" in choices[0].reason
    told = [record for record in caplog.records if "a-bloom" in record.message]
    assert len(told) == 1
    assert told[0].levelname == "WARNING"
    assert "a-bloom (eager): plain rows" in told[0].message
    assert choices[0].reason in told[0].message


def test_a_sliding_window_counts_only_where_it_is_shorter_than_rows():
    module = AnswerLogProbs(tiny_causal_lm("mistral", sliding_window=64))
    assert choose_layout(module, longest=64).layout == "packed"
    choice = choose_layout(module, longest=65)
    assert choice.layout == "plain"
    assert "sliding window of 64 is shorter than rows of 65" in choice.reason


def test_a_window_of_no_tokens_is_none(tmp_path):
    make("qwen2_moe", tmp_path)
    model = load_policy(ModelConfig(model_name_or_path=str(tmp_path)), device="cpu")
    assert model.config.sliding_window == 0
    assert choose_layout(AnswerLogProbs(model), longest=64).layout == "packed"


def test_flash_attention_and_encoders_take_plain_rows(monkeypatch):
    model = tiny_classifier("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with monkeypatch.context() as patch:  # it needs a GPU: here another computes what it would
        for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            patch.setitem(table._global_mapping, "flash_attention_2", table["sdpa"])
        choice = choose_layout(AnswerScores(model), longest=64)
    assert choice.layout == "plain"
    assert "packed sequences" in choice.reason
    choice = choose_layout(AnswerScores(tiny_classifier("bert")), longest=64)
    assert choice.layout == "plain"
    assert "as a whole" in choice.reason


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_mask_or_positions_is_found_out(ignored):
    model = tiny_causal_lm("llama")

    def drop(_module, args, kwargs):
        if "position_ids" in kwargs:
            length = kwargs["input_ids"].shape[1]
            causal = torch.ones(length, length).tril().log()[None, None]
            stand_in = {"attention_mask": causal, "position_ids": torch.arange(length)[None]}
            kwargs = {**kwargs, ignored: stand_in[ignored]}
        return args, kwargs

    model.model.register_forward_pre_hook(drop, with_kwargs=True)
    choice = choose_layout(AnswerLogProbs(model), longest=64)
    assert choice.layout == "plain"
    assert choice.max_difference is not None
    assert choice.max_difference < 1e-5, "of plain rows, which it reads as they are"
    missed = re.match(r"shared rows miss plain ones by (\S+),", choice.reason)
    assert missed is not None
    assert float(missed[1]) > 1e-2


def test_a_model_that_refuses_the_mask_takes_plain_rows():
    model = tiny_causal_lm("llama")

    def refuse(_module, _args, kwargs):
        if kwargs["attention_mask"].ndim == 4:
            raise ValueError("mask must have two dimensions")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    choice = choose_layout(AnswerLogProbs(model), longest=64)
    assert choice.layout == "plain"
    assert "refuses shared rows: mask must have two" in choice.reason


def test_attention_that_packed_rows_do_not_know_takes_shared_rows():
    """Some models cap their attention scores, for one, which packed rows would leave out."""
    with pytest.raises(ValueError, match="softcap"):
        packed_attention(torch.nn.Identity(), *[torch.ones(1, 2, 2, 4)] * 3, ONE_ROW, softcap=50.0)
    model = tiny_causal_lm("llama", attn_implementation="sdpa")

    def refuse(_module, _args, kwargs):
        if kwargs["attention_mask"].dtype == torch.int64 and kwargs["attention_mask"].ndim == 4:
            raise ValueError("packed rows do not support softcap")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert choose_layout(AnswerLogProbs(model), longest=64).layout == "shared"
    assert model.config._attn_implementation == "sdpa"


def change_logits(module, change):
    def changed(_module, _args, _kwargs, output):
        output.logits = change(output.logits)
        return output

    module.model.register_forward_hook(changed, with_kwargs=True)


@pytest.mark.parametrize("change", [torch.sin, lambda logits: logits + torch.arange(266)])
def test_logits_that_are_not_the_heads_are_refused(change):
    module = AnswerLogProbs(tiny_causal_lm("llama"))
    change_logits(module, change)
    with pytest.raises(ModelError, match="its architecture is not supported"):
        choose_layout(module, longest=64)


def test_a_factor_of_logits_that_no_field_names_is_measured():
    module = AnswerLogProbs(tiny_causal_lm("llama"))
    change_logits(module, lambda logits: logits * 7)
    choose_layout(module, longest=64)
    assert module.head.scale == pytest.approx(7, rel=1e-4)


def by_length(_module, _args, kwargs, output):
    """Weighs logits by the length of the sequence, pads and all."""
    output.logits = output.logits * kwargs["input_ids"].shape[1]
    return output


def test_a_decoder_that_is_not_read_at_its_last_token_is_refused():
    model = tiny_classifier("llama")
    choose_layout(AnswerScores(model), longest=64)
    model.register_forward_hook(by_length, with_kwargs=True)
    with pytest.raises(ModelError, match="not read at the last token"):
        choose_layout(AnswerScores(model), longest=64)


def test_a_classifier_that_sees_pads_takes_sequences_one_by_one(caplog):
    model = tiny_classifier("bert")
    rows = probe_rows(266)
    module = AnswerScores(model).eval()
    choose_layout(module, longest=64)
    assert not module.one_by_one
    model.register_forward_hook(by_length, with_kwargs=True)
    choose_layout(module, longest=64)
    assert module.one_by_one
    with pytest.raises(ModelError, match="not be trained or shared by workers"):
        refuse_one_by_one(module)
    assert "one sequence at a time" in caplog.text
    with torch.no_grad():
        alone = [
            float(model(input_ids=torch.tensor([[*row.prompt, *answer]])).logits)
            for row in rows
            for answer in row.answers
        ]
        found = module(collate(rows, "plain", 2))
    torch.testing.assert_close(found, torch.tensor(alone))


def test_the_probe_leaves_the_training_mode_alone():
    module = AnswerLogProbs(tiny_causal_lm("llama")).train()
    choose_layout(module, longest=64)
    assert module.training
    assert module.model.model.layers[0].training
