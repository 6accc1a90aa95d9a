"""A tiny configuration of any family, by shrinking what its configuration class has."""

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

NUM_LAYERS = 4
_HIDDEN = 32
_HEADS = 4

# Attribute -> small value; applied where a configuration has the attribute with a number in it.
_SMALL: dict[str, object] = {
    # vocabulary
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "type_vocab_size": 2,
    # width
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "dim",
            "emb_dim",
            "embedding_size",
            "word_embed_proj_dim",
        ),
        _HIDDEN,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "d_ff",
            "d_inner",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "ffn_hidden_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "dim_ff",
            "intermediate_size_mlp",
        ),
        48,
    ),
    # depth
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_blocks",
        ),
        NUM_LAYERS,
    ),
    # heads
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        _HEADS,
    ),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "d_head": 8,
    "rotary_dim": 4,
    "attention_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # images
    "image_size": 16,
    "patch_size": 4,
    "image_token_id": 60,
    "image_token_index": 60,
    "video_token_id": 61,
    "video_token_index": 61,
    "mm_tokens_per_image": 4,
    "depth": NUM_LAYERS,
    "embed_dim": _HIDDEN,
    "out_hidden_size": _HIDDEN,
    "projection_dim": _HIDDEN,
    "fullatt_block_indexes": [1],
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],  # added after the first three layers of the text model
    # length
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "sliding_window": 3,
    # state space
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "time_step_rank": 4,
    "lru_width": _HIDDEN,
    "attention_window_size": 3,
}

_EVEN_IF_NONE = frozenset({"pad_token_id", "bos_token_id", "eos_token_id", "head_dim"}) | {
    "decoder_start_token_id",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
}

# What a family's rules ask for beside that.
_FAMILY: dict[str, dict[str, object]] = {
    "bailing_hybrid": {"layer_group_size": 2, "linear_head_dim": 8, "linear_num_heads": 4}
    | {"num_experts_per_token": 2, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64, "patch_in_forward": False},
    "blt_local_encoder": {"hidden_size_global": _HIDDEN},
    "blt_local_decoder": {"hidden_size_global": _HIDDEN},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 4, "prompt_type": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "attn_pdrop": 0.0, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # Layers that look up experts by token id belong to the bottom.
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "o_groups": 2}
    | {"o_lora_rank": 8, "index_n_heads": 4, "index_head_dim": 8, "index_topk": 4},
    # As in the published models.
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    | {"max_relative_positions": 8},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "conv_kernel_size": 3,
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_vision_encoder": {"adapter_in_dim": _HIDDEN, "adapter_out_dim": _HIDDEN}
    | {"pyramid_num_routed": [-1, -1, 4, 4], "adapter_merge_size": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": _HIDDEN, "adapter_out_dim": _HIDDEN},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 48}
    | {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    | {"activation_sparsity_pattern": None},
    # As in the larger models; per-layer embeddings of the token ids are a variant below.
    "gemma4_text": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64}
    | {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 3},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hy_v4": {"indexer_types": ["full", "full", "shared", "full"]}
    | {"index_n_heads": 4, "index_head_dim": 8, "index_topk": 4},
    "dots3_note_text": {
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), _HEADS),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 16),
        **dict.fromkeys(("swa_head_dim", "swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
        "shared_experts_intermediate_size": 48,
        "index_n_heads": 4,
        "index_head_dim": 8,
        "index_topk": 4,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4}
    | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 4,
        "ple_embed_dim": 8,
        "ngram_vocab_size_base": 64,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 62, "vision_end_token_id": 63},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 62, "vision_end_token_id": 63},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [3, 3],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": 3,
        "lsh_attn_chunk_length": 3,
        "num_buckets": 2,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 8,
        "shape_vocab_size": 64,
    },
    # Halving the hidden states between layers is a trick for half precision.
    "rwkv": {"rescale_every": 0, "attention_hidden_size": _HIDDEN, "context_length": 64},
    # Its widths are rounded up to multiples of 64.
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0} | {"chunk_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_key_value_heads": 4},
    "zamba2": {
        # The hybrid layers share one block, so they cannot be on two machines.
        "layers_block_type": ["hybrid", "linear_attention", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "adapter_rank": 4,
        "num_query_groups": 4,
        "kv_channels": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

# Where the tiny configuration is not of the kind that the family's own default is.
NOTES = {
    "deepseek_v4": "the layers that look up experts by token id in the bottom",
    "gemma4": "without per-layer embeddings of the token ids, as in the larger models",
    "gemma4_text": "without per-layer embeddings of the token ids, as in the larger models",
    "hy_v4": "no layer shares another's index across a cut",
    "rwkv": "rescale_every = 0",
    "zamba2": "the hybrid layers, which share weights, outside the trunk",
}

_DROPOUT_WORDS = ("dropout", "pdrop", "drop_rate", "layerdrop", "drop_path")


def tiny_config(family: str, num_layers: int = NUM_LAYERS) -> PreTrainedConfig:
    """A tiny configuration of ``family``, without dropout."""
    config_class = CONFIG_MAPPING[family]
    config = config_class(**_shrunk(config_class(), _FAMILY.get(family, {})))
    for part in (config, config.get_text_config(decoder=True)):
        _without_dropout(part)
    if config.is_encoder_decoder and not hasattr(config, "decoder_start_token_id"):
        config.decoder_start_token_id = 1
    return config


def _shrunk(default: PreTrainedConfig, changes: dict[str, object]) -> dict[str, object]:
    """Arguments that make the class of ``default`` tiny."""
    reverse = dict(default.attribute_map)
    settings: dict[str, object] = {}
    for name, value in _SMALL.items():
        own = reverse.get(name, name)
        if own in vars(default) and (vars(default)[own] is not None or name in _EVEN_IF_NONE):
            several = isinstance(vars(default)[own], (list, tuple)) and not isinstance(value, list)
            settings[own] = [value] * len(vars(default)[own]) if several else value
    if "kv_lora_rank" in settings:  # latent attention has no groups of heads
        settings["num_key_value_heads"] = _HEADS
    for name in getattr(default, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            settings[name] = {
                **_axes(part),
                **_shrunk(part, _FAMILY.get(part.model_type, {})),
                "model_type": part.model_type,
            }
    return settings | changes


def _axes(part: PreTrainedConfig) -> dict[str, object]:
    """Rotary positions of a text model in several axes, for those that have them."""
    rope = getattr(part, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_type" not in rope:
        return {}
    half = int(8 * rope.get("partial_rotary_factor", 1.0)) // 2
    quarter = half // 4 or half // 2
    sections = [half - 2 * quarter, quarter, quarter]
    return {"rope_parameters": {**rope, "mrope_section": sections}}


def _without_dropout(config: PreTrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and any(word in name for word in _DROPOUT_WORDS):
            setattr(config, name, 0.0)
