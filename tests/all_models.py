"""Every causal language model of the installed transformers, tiny and with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from transformers.models.auto import modeling_auto  # noqa: E402

# Options by name, for whichever config has them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    "q_lora_rank": 32,
    "sliding_window": 16,
    "moe_shared_expert_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "vocab_size_per_layer_input": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 100,
    "is_decoder": True,
    # Large weights: logits that differ, so that a wrong attention changes them.
    "initializer_range": 0.3,
}

# What single models need besides.
_OPTIONS: dict[str, dict[str, Any]] = {
    "axk1": {"n_group": 1, "topk_group": 1},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(
            ("full_attention", "sliding_attention"), {"rope_type": "default", "rope_theta": 1e4}
        )
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"sliding_window": 64},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 32,
    },
    "gemma4_unified_text": {"global_head_dim": 32},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        "attention_chunk_size": 16,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "modernbert-decoder": {"sep_token_id": 2, "cls_token_id": 1},
    "ministral3": {"sliding_window": None},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "moshi": {"sliding_window": 16},
    "phimoe": {"sliding_window": None},
    "qwen4_exp_text": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "starcoder2": {"sliding_window": None},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
}
_ONE_KIND = {"falcon_mamba", "mamba", "mamba2", "recurrent_gemma"}
# Not tried: with vision, audio, or other parts whose sizes are in configs of their own.
TOO_LARGE = {
    *("blt", "emu3", "fuyu", "gemma4_assistant", "gemma4_unified_assistant", "git"),
    *("got_ocr2", "mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody"),
    "phi4_multimodal",
}


def names() -> list[str]:
    """Model types with a causal language model of their own."""
    found = []
    for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        text = getattr(transformers.CONFIG_MAPPING[name], "sub_configs", {}).get("text_config")
        is_inside_another = getattr(text, "model_type", None) in (
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        )
        if not is_inside_another:
            found.append(name)
    return found


def tiny_config(name: str, **more: Any) -> Any:
    """The config of a model type with every size that it knows made small."""
    kind = transformers.CONFIG_MAPPING[name]
    known = _known(kind)
    options = {key: value for key, value in _SIZES.items() if key in known}
    if "kv_lora_rank" in known:  # latent attention has as many KV heads as query heads
        options["num_key_value_heads"] = options["num_attention_heads"]
    if "layer_types" not in known:  # a window would be that of every layer
        options.pop("sliding_window", None)
    return kind(**options | _OPTIONS.get(name, {}) | more)


def tiny_causal_model(name: str, **options: Any) -> Any:
    """The causal language model of a type, tiny, with random weights; options of its config."""
    config = tiny_config(name, **options)
    kinds = getattr(config, "layer_types", None) or [None]
    if set(kinds) <= {"sliding_attention", "linear_attention"} and name not in _ONE_KIND:
        # Two kinds, where the default has the full layers farther apart than there are layers.
        config = tiny_config(name, **options, layer_types=[kinds[0], "full_attention"])
    model_class = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    return model_class(config).eval()


def _known(kind: type) -> set[str]:
    """Names of the options of a config."""
    known = set(inspect.signature(kind).parameters) | set(getattr(kind, "attribute_map", ()))
    for parent in kind.__mro__:
        known |= set(vars(parent).get("__annotations__", {}))
    return known
