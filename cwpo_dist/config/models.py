"""Which model, how it is loaded, and LoRA on it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cwpo_dist.config.base import Fraction, PositiveInt, Section


class ModelConfig(Section):
    """A causal language model and how text becomes its tokens."""

    model_name_or_path: str
    revision: str | None = None
    num_hidden_layers: PositiveInt | None = Field(None, description="keep the first N layers")
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    torch_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 on CPU"
    )
    chat_template: str = Field("tokenizer", description="tokenizer, plain, or a Jinja file")
    max_length: PositiveInt = Field(512, description="tokens of prompt + the longer answer")
    over_length: Literal["drop", "truncate"] = "drop"


class LoraConfig(Section):
    """Low-rank adapters (peft), with peft's names."""

    r: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_dropout: Fraction = 0.05
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
