"""State-space and recurrent models of Hugging Face, and their hybrids with attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from families.base import Case, families_of, token_loss
from families.decoders import causal_lm

family = families_of(__name__)

MAMBA = {"state_size": 4, "n_groups": 1, "num_heads": 4, "head_dim": 8, "chunk_size": 4}
HYBRID = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"plain": True, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "mamba2": ("Mamba2", {"plain": True, "hidden_size": 16, "num_hidden_layers": 2, **MAMBA}),
    "falcon-mamba": ("FalconMamba", {"plain": True, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "recurrent-gemma": ("RecurrentGemma", {"lru_width": 16, "attention_window_size": 4, "block_types": ["recurrent",
        "attention"]}),
    "jamba": ("Jamba", {**HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False,
        "mamba_dt_rank": 4}),
    "bamba": ("Bamba", {**HYBRID, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4,
        "attn_layer_indices": [1]}),
    "zamba2": ("Zamba2", {**HYBRID, "num_hidden_layers": 3, "num_key_value_heads": 2, "n_mamba_heads": 4,
        "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 4, "use_mamba_kernels": False,
        "layers_block_type": ["mamba", "hybrid", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4}),
    "falcon-h1": ("FalconH1", {**HYBRID, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_n_groups": 1, "mamba_chunk_size": 4}),
    "granite-hybrid": ("GraniteMoeHybrid", {**HYBRID, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
        "mamba_chunk_size": 4, "num_local_experts": 4, "shared_intermediate_size": 12, "layer_types": ["mamba",
        "attention"]}),
    "qwen3-next": ("Qwen3Next", {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "layer_types": ["linear_attention",
        "full_attention"]}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "nemotron-h": ("NemotronH", {"hybrid_override_pattern": "M*", "mamba_num_heads": 4,
        "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4, "chunk_size": 4}),
}  # fmt: skip
for _name, (_config, _settings) in RECURRENT.items():
    family(_name, partial(causal_lm, _config, **_settings))


def without_state(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of each sequence's next tokens; RWKV's states are changed in place."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return token_loss(logits[:, :-1], batch["labels"][:, 1:])


@family("rwkv")
def rwkv() -> Case:
    """Without its states, which autograd cannot follow."""
    case = causal_lm("Rwkv", plain=True, hidden_size=16, num_hidden_layers=2, context_length=32)
    return replace(case, loss=without_state)
