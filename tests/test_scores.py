"""Scores of answers: stock Hugging Face classifiers are the oracle, also with LoRA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import TaskType
from test_modules import (
    EOS,
    PAD,
    SHARING,
    assert_same_gradient,
    coefficients,
    flat_gradient,
    lora,
    random_rows,
)
from tiny import save_tiny, tiny_classifier, tiny_config, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm import packed
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.loading import ModelError, load_annotator_base, save
from cwpo_dist.lm.modules import AnswerScores
from cwpo_dist.lm.rows import collate


@pytest.mark.parametrize("arch", [*SHARING, "bloom"])
def test_scores_equal_a_stock_classifier_reloaded_from_its_folder(arch, tmp_path):
    """As any user of the saved folder scores: right-padded prompt + answer ids that end in EOS."""
    save_tiny(tmp_path / "base", arch)
    tiny_tokenizer(pad_is_eos=True).save_pretrained(tmp_path / "base")
    settings = ModelConfig(
        model_name_or_path=str(tmp_path / "base"),
        attn_implementation="eager" if arch == "bloom" else "sdpa",
    )
    tokenizer = load_tokenizer(settings, distinct_pad=True)
    annotator = load_annotator_base(settings, tokenizer, seed=0)
    save(annotator, tokenizer, tmp_path / "annotator")

    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "annotator").eval()
    pad = stock.config.pad_token_id
    assert pad not in (None, tokenizer.eos_token_id)
    rows = random_rows()
    plain = collate(rows, "plain", pad)
    with torch.no_grad():
        expected = stock(plain.input_ids, attention_mask=plain.attention_mask).logits[:, 0]
        layouts = ("plain",) if arch == "bloom" else ("plain", "shared", "packed")
        for model in (annotator, stock):
            if arch != "bloom":
                model.set_attn_implementation(packed.NAME)
            for layout in layouts:
                found = AnswerScores(model)(collate(rows, layout, pad))
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_with_pad_equal_to_eos_the_stock_classifier_skips_the_eos():
    """Why the annotator carries a pad token of its own."""
    model = tiny_classifier("llama", pad_token_id=EOS)
    rows = random_rows()
    plain = collate(rows, "plain", EOS)
    with torch.no_grad():
        stock = model(plain.input_ids, attention_mask=plain.attention_mask).logits[:, 0]
        at_eos = AnswerScores(model)(plain)
        before_eos = AnswerScores(model)(replace(plain, last=plain.last - 1))
    torch.testing.assert_close(before_eos, stock)
    assert (at_eos - stock).abs().max() > 1e-2


def test_gradients_of_scores_equal_the_stock_classifiers():
    model, rows = tiny_classifier("qwen2"), random_rows()
    plain = collate(rows, "plain", PAD)
    stock = model(plain.input_ids, attention_mask=plain.attention_mask).logits[:, 0]
    weights = coefficients(len(stock))
    expected = flat_gradient(model, (weights * stock).sum())
    model.set_attn_implementation(packed.NAME)
    for layout in ("packed", "shared"):
        scores = AnswerScores(model)(collate(rows, layout, PAD))
        assert_same_gradient(flat_gradient(model, (weights * scores).sum()), expected)


@pytest.mark.parametrize("arch", ["bert", "deberta-v2"])
def test_encoders_score_plain_rows(arch):
    model = tiny_classifier(arch)
    rows = random_rows()
    with torch.no_grad():
        expected = [
            float(model(input_ids=torch.tensor([[*row.prompt, *answer]])).logits)
            for row in rows
            for answer in row.answers
        ]
        found = AnswerScores(model)(collate(rows, "plain", PAD))
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
        with pytest.raises(ModelError, match="layout 'plain'"):
            AnswerScores(model)(collate(rows, "shared", PAD))


def test_lora_on_a_classifier():
    wrapped = lora(tiny_classifier("llama"), TaskType.SEQ_CLS).eval()
    rows = random_rows()
    batch = collate(rows, "plain", PAD)
    stock = wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    found = AnswerScores(wrapped)(collate(rows, "shared", PAD))
    torch.testing.assert_close(found, stock[:, 0], rtol=0, atol=1e-5)


def test_models_without_a_scalar_head_are_refused():
    with pytest.raises(ModelError, match="3 labels"):
        AnswerScores(
            AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3))
        )
