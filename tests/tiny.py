"""Makers of tiny random models and a tiny byte-level tokenizer, so that no test downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# As SmolLM2's, the template ends each message with EOS and a newline, and writes no BOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<pad>"]
# Some merges straddle the border of a prompt and its answer: ": ", "\n\n", "the".
MERGES = [("Ċ", "Ċ"), (":", "Ġ"), ("h", "e"), ("t", "he"), ("Ġ", "the"), ("e", "r"), ("i", "n")]
CAUSAL = ("llama", "qwen2", "mistral", "opt", "gpt2", "gpt_neox", "bloom")
ENCODERS = ("bert", "deberta-v2")

_HEADED = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2},
    "mistral": {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2},
    "mixtral": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
    "qwen3": _HEADED,
    "gemma": _HEADED,
    "gemma2": _HEADED,
    "phi3": {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_inner": 64},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 64},
    "bloom": {"hidden_size": 32},
    "bert": {"hidden_size": 32, "intermediate_size": 64},
    "roberta": {"hidden_size": 32, "intermediate_size": 64},
    "electra": {"hidden_size": 32, "intermediate_size": 64, "embedding_size": 32},
    "distilbert": {"dim": 32, "hidden_dim": 64},
    "deberta-v2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
}


def tiny_tokenizer(pad_is_eos: bool = False, *, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 256 bytes and a few merges, with BOS, EOS, pad and a chat template.

    Args:
        pad_is_eos: as SmolLM2 has it.
        add_bos: whether encoding puts BOS in front, as Llama's tokenizers do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIALS, *alphabet, *("".join(pair) for pair in MERGES)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>" if pad_is_eos else "<pad>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def word_tokenizer(style: str = "bert") -> PreTrainedTokenizerFast:
    """An encoder's: lower-cased words and letters, and two texts in one sequence.

    Args:
        style: 'bert' marks the second text by token type 1, 'roberta' by two separators.
    """
    names = {"bert": ("[CLS]", "[SEP]", "[PAD]"), "roberta": ("<s>", "</s>", "<pad>")}[style]
    cls, sep, pad = names
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*names, "[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    middle = f"{sep}" if style == "bert" else f"{sep} {sep}"
    kind = ":1" if style == "bert" else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {middle} $B{kind} {sep}{kind}",
        special_tokens=[(cls, 0), (sep, 1)],
    )
    types = ["token_type_ids"] if style == "bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=cls,
        sep_token=sep,
        pad_token=pad,
        unk_token="[UNK]",
        model_input_names=["input_ids", *types, "attention_mask"],
    )


def tiny_config(arch: str, **overrides: Any) -> Any:
    """The configuration of a tiny model: 2 layers, width 32, 4 heads, 512 positions."""
    settings = {
        "vocab_size": len(SPECIALS) + 256 + len(MERGES),
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        # larger than usual, so that a wrong mask or position shows
        "initializer_range": 0.2,
        **_SIZES.get(arch, {}),
        **overrides,
    }
    return AutoConfig.for_model(arch, **settings)


def tiny_causal_lm(arch: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal LM in eval mode, float32; `overrides` change its configuration."""
    attention = overrides.pop("attn_implementation", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            tiny_config(arch, **overrides), attn_implementation=attention
        )
    model.eval()
    return model


def tiny_classifier(arch: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random one-label sequence classifier in eval mode (also `bert`, `deberta-v2`)."""
    attention = overrides.pop("attn_implementation", None)
    config = tiny_config(arch, num_labels=1, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(
            config, attn_implementation=attention
        )
    model.eval()
    return model


def save_tiny(folder: str | Path, arch: str, seed: int = 0, **overrides: Any) -> Path:
    """Writes a tiny model (a classifier for encoders) and its tokenizer as a HF folder."""
    make = tiny_classifier if arch in ENCODERS else tiny_causal_lm
    make(arch, seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
