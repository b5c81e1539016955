"""Which model, how it is loaded, and LoRA on it."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field

from cwpo_dist.config.base import Place, PositiveInt, Section

# What Llama 3.1's template prints where nobody tells it the date.
TEMPLATE_DATE = date(2024, 7, 26)


class ModelConfig(Section):
    """A causal language model and how text becomes its tokens."""

    model_name_or_path: Place = Field(description="folder, URI, or a Hugging Face hub id")
    revision: str | None = Field(
        None, description="commit, branch or tag of a hub model; null: main"
    )
    num_hidden_layers: PositiveInt | None = Field(
        None, description="keep the first N layers; null: all"
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="how attention is computed; auto: as transformers does for the model"
    )
    torch_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of weights as they are loaded; auto: bfloat16 on CUDA, float32 on CPU"
    )
    chat_template: str = Field(
        "tokenizer",
        description="tokenizer (its own), plain (bare text, HH transcripts), or a Jinja file",
    )
    template_date: date = Field(
        TEMPLATE_DATE, description="printed by templates that print today's, the same every day"
    )
    max_length: PositiveInt = Field(512, description="tokens of a prompt + an answer")
    over_length: Literal["drop", "truncate"] = Field(
        "drop",
        description="what becomes of a longer answer; truncate: the prompt's oldest tokens go "
        "first, then the answer's last",
    )


class LoraConfig(Section):
    """Low-rank adapters (peft), with peft's names."""

    r: PositiveInt = Field(8, description="rank of an adapter's two matrices")
    lora_alpha: PositiveInt = Field(
        16, description="what an adapter adds is multiplied by lora_alpha / r"
    )
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(  # at 1 nothing would be learned
        0.05,
        description="share of an adapter's inputs hidden at random; none of fused experts'",
    )
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="names of the modules that are adapted; all-linear: every linear layer of the "
        "decoder and the fused experts, no router",
    )
