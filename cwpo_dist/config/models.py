"""Which model, how it is loaded, and LoRA on it."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field

from cwpo_dist.config.base import Fraction, Place, PositiveInt, Section

# What Llama 3.1's template prints where nobody tells it the date.
TEMPLATE_DATE = date(2024, 7, 26)


class ModelConfig(Section):
    """A causal language model and how text becomes its tokens."""

    model_name_or_path: Place
    revision: str | None = None
    num_hidden_layers: PositiveInt | None = Field(None, description="keep the first N layers")
    attn_implementation: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="auto: what transformers takes for the model"
    )
    torch_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 on CPU"
    )
    chat_template: str = Field("tokenizer", description="tokenizer, plain, or a Jinja file")
    template_date: date = Field(
        TEMPLATE_DATE, description="printed by templates that print today's, the same every day"
    )
    max_length: PositiveInt = Field(512, description="tokens of a prompt + an answer")
    over_length: Literal["drop", "truncate"] = "drop"


class LoraConfig(Section):
    """Low-rank adapters (peft), with peft's names."""

    r: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_dropout: Fraction = 0.05
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
