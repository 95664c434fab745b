"""Tiny mixture-of-experts models of transformers, with random weights: every way in which it keeps experts."""

from __future__ import annotations

import torch
import transformers
from peft_tiny_models import VOCABULARY

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_DBRX = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY}

#: Family -> what its configuration needs beside the sizes.
MOE = {
    "Qwen2Moe": {**_ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {**_ROUTED, "num_experts": 4, "head_dim": 8},
    "Mixtral": {"num_local_experts": 4, "head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "DeepseekV3": {
        **_ROUTED,
        **_MLA,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Llama4": {"intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 4},
    "Phimoe": {"num_local_experts": 4},
    "JetMoe": {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 4},
    "MiniMax": {"num_local_experts": 4, "head_dim": 8},
    "Glm4Moe": {**_ROUTED, "n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_intermediate_size": 24, "moe_k": 2},
    "Lfm2Moe": {**_ROUTED, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "AriaText": {"moe_num_experts": 4, "moe_num_shared_experts": 1},
    "DeepseekV4": {
        **_ROUTED,
        "n_routed_experts": 4,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "o_groups": 2,
        "head_dim": 16,
    },
    "LongcatFlash": {
        **_MLA,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "num_layers": 1,
        "head_dim": 8,
    },
    "Jamba": {
        "num_experts": 4,
        "mamba_dt_rank": 8,
        "mamba_d_state": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "Dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
}


def tiny_moe(family: str):
    """The family's model for causal language modelling."""
    config = getattr(transformers, {"Llama4": "Llama4TextConfig"}.get(family, f"{family}Config"))
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(
        config(**{**(_DBRX if family == "Dbrx" else _SIZES), **MOE[family]})
    )
