"""Mixtures of experts of Hugging Face."""

from __future__ import annotations

from functools import partial
from typing import Any

from families.base import Case, families_of, hf
from families.decoders import causal_lm
from families.seq2seq import T5, pair_batches, pair_loss

family = families_of(__name__)

MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}),
    "qwen3-moe-many-experts": ("Qwen3Moe", {"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 4}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": ("DeepseekV2", {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1}),
    "deepseek-v3": ("DeepseekV3", {"head_dim": 4, "num_key_value_heads": 2, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    "phi-moe": ("Phimoe", {"num_local_experts": 4}),
    "granite-moe": ("GraniteMoe", {"num_local_experts": 4}),
    "dbrx": ("Dbrx", {"plain": True, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10000.0}}),
    "glm4-moe": ("Glm4Moe", {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "ernie-moe": ("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
    "jetmoe": ("JetMoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": ("Llama4Text", {"intermediate_size_mlp": 24, "num_local_experts": 4, "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16}),
    "minimax": ("MiniMax", {"num_local_experts": 4, "block_size": 4, "layer_types": ["linear_attention",
        "full_attention"]}),
}  # fmt: skip
for _name, (_config, _settings) in MOE.items():
    family(_name, partial(causal_lm, _config, **_settings))


@family("switch-transformer")
def switch() -> Case:
    """Experts have a capacity, and drop the tokens beyond it."""
    settings = {
        **T5,
        "num_experts": 4,
        "expert_capacity": 64,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    }
    config = hf.SwitchTransformersConfig(**settings)
    return Case(hf.SwitchTransformersForConditionalGeneration(config), pair_loss, pair_batches())
