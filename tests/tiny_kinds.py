"""Every causal language model that transformers has, tiny: which there are, and one of each made.

Random models of width 32 and a few layers, with the tokenizer of tiny.py. What a type needs beside
its sizes stands here, and which types are left out, and why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# A size by the name that configurations give it; whatever has another name keeps its default.
_NAMES = {
    1: "first_k_dense_replace moe_num_shared_experts n_group n_groups n_shared_experts "
    "num_dense_layers num_expert_group num_shared_experts topk_group mamba_n_groups mamba_ngroups",
    2: "decoder_layers encoder_layers linear_num_key_heads moe_k moe_top_k moe_topk n_layer "
    "n_layers num_experts_per_tok num_experts_per_token num_hidden_layers num_key_value_heads "
    "num_kv_heads num_layers num_query_groups",
    4: "attention_heads decoder_attention_heads encoder_attention_heads linear_num_heads "
    "linear_num_value_heads moe_num_experts n_head n_heads n_routed_experts num_attention_heads "
    "num_blocks num_experts num_heads num_local_experts o_groups rotary_dim index_n_heads",
    8: "attention_head_dim attention_head_size chunk_size d_head dim_head global_head_dim head_dim "
    "index_head_dim kv_lora_rank linear_head_dim linear_key_head_dim linear_value_head_dim "
    "mamba_chunk_size mamba_d_head mamba_d_state mamba_head_dim mamba_headdim mamba_n_heads "
    "mamba_num_heads n_mamba_heads o_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim "
    "ssm_state_size state_size swa_head_dim v_head_dim mamba_dt_rank router_hidden_size",
    16: "expert_ffn_hidden_size moe_intermediate_size shared_experts_intermediate_size",
    32: "attention_hidden_size d_model emb_dim embedding_dim embedding_size hidden_size "
    "hidden_size_per_layer_input input_embedding_size lru_width n_embd output_embedding_size "
    "pronunciation_embed_dim shape_embed_dim shared_expert_intermediate_size word_embed_proj_dim",
    64: "d_inner decoder_ffn_dim dense_intermediate_size dff dim_ff encoder_ffn_dim "
    "feed_forward_size ffn_dim ffn_hidden_size intermediate_size intermediate_size_mlp n_inner "
    "shared_intermediate_size",
    266: "vocab_size vocab_size_per_layer_input",  # the tokens of tiny_tokenizer
    512: "attention_window_size context_length max_position_embeddings max_seq_len "
    "model_max_length n_ctx n_positions sliding_window",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TYPES = ("layer_types", "layers_block_type", "mlp_layer_types")

_LATENT = {"num_key_value_heads": 4}  # attention over latent keys has as many as heads
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MIXED = ["linear_attention", "hybrid"] * 2
# What a type needs beside its sizes.
_OWN: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {**_LATENT, "per_layer_config": {}, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": 64,
        "num_kv_shared_layers": 0,
    },
    "gemma4_text": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": _LATENT,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**_LATENT, "zero_expert_num": 4},
    "mamba2": {"num_heads": 8},
    "minicpm3": _LATENT,
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layers_block_type": _MIXED,
        "num_hidden_layers": 4,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 2},  # widths are rounded
    "zamba2": {"attention_head_dim": 16, "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}
# Others of a type, which its default does not show.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 24,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, ALiBi": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True}),
    "falcon_h1, scaled": ("falcon_h1", {"lm_head_multiplier": 0.0390625}),
    "gemma2, short window": ("gemma2", {"sliding_window": 16}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "granite, scaled": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "hyperclovax, scaled": ("hyperclovax", {"logits_scaling": 0.25}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, dynamic RoPE": (
        "llama",
        {
            "max_position_embeddings": 24,
            "rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 4.0},
        },
    ),
    "llama, YaRN": (
        "llama",
        {
            "rope_parameters": {
                **_ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 24,
            }
        },
    ),
    "mistral, short window": ("mistral", {"sliding_window": 16}),
    "mixtral, router's loss and jitter": (
        "mixtral",
        {"output_router_logits": True, "router_jitter_noise": 0.5},
    ),
    "opt, as 350m": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi3, longrope": (
        "phi3",
        {"original_max_position_embeddings": 24, "rope_parameters": _LONGROPE},
    ),
    "qwen2, short window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}
# Types without a tiny configuration: what they need is no part of a text model, or not here.
LEFT_OUT = {
    "blt": "reads bytes through four configurations of its own",
    "dots3_note": "for images; see dots3_note_text",
    "emu3": "for images",
    "gemma3": "for images; see gemma3_text",
    "gemma3n": "for images, by a package of its own; see gemma3n_text",
    "gemma4": "for images; see gemma4_text",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "git": "for images",
    "got_ocr2": "for images",
    "mllama": "for images",
    "moss_transcribe_diarize": "for speech",
    "musicgen": "for music",
    "musicgen_melody": "for music",
    "phi4_multimodal": "for images and speech",
    "qwen4_exp": "for images; see qwen4_exp_text",
}
TYPES = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in LEFT_OUT]
NAMES = sorted([*TYPES, *VARIANTS])
FIXED = (  # of `make test`
    "bert",
    "bloom",
    "deepseek_v3",
    "falcon, ALiBi",
    "gemma2",
    "gpt2",
    "llama, tied",
    "mamba",
    "mixtral, router's loss and jitter",
    "phi3, longrope",
    "qwen3_next",
    "rwkv",
)


def make(name: str, folder: Path) -> Path:
    """Writes a tiny random model and its tokenizer; norms and biases are not at their neutrals."""
    kind, changes = VARIANTS.get(name, (name, {}))
    given = AutoConfig.for_model(kind)
    settings = tiny_settings(given.get_text_config(), kind) | changes
    if given.get_text_config() is not given:
        settings = {"text_config": settings}
    config = AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1 and parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_settings(text: Any, kind: str) -> dict[str, Any]:
    """Arguments of the configuration of a text model of width 32 and a few layers."""
    known = text.to_dict()
    settings = {name: _SIZES[name] for name, value in known.items() if name in _SIZES and value}
    settings |= _OWN.get(kind, {})
    types = {name: list(dict.fromkeys(known[name])) for name in _TYPES if known.get(name)}
    types |= {name: settings[name] for name in _TYPES if name in settings}
    if types:  # a layer of each type, twice where there is but one
        number = max(2, *(len(kinds) for kinds in types.values()))
        settings |= {name: (kinds * number)[:number] for name, kinds in types.items()}
        settings |= {name: number for name in _LAYERS if name in settings}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return settings | ids | {"initializer_range": 0.2}
