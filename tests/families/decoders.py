"""Decoders of Hugging Face, as causal language models."""

from __future__ import annotations

from functools import partial
from typing import Any

from families.base import VOCABULARY, Case, causal_loss, families_of, hf, text_batches

family = families_of(__name__)

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def causal_lm(name: str, plain: bool = False, **settings: Any) -> Case:
    """Return a causal language model of a configuration class; ``plain`` ones take no common settings."""
    ends = {key: COMMON[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    config = getattr(hf, f"{name}Config")(**{**(ends if plain else COMMON), **settings})
    config._attn_implementation = settings.get("attn_implementation", "eager")
    return Case(hf.AutoModelForCausalLM.from_config(config), causal_loss, text_batches())


DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"plain": True, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "gpt2-sdpa": ("GPT2", {"plain": True, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "attn_implementation": "sdpa"}),
    "gpt-neo": ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2,
        "window_size": 3}),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt-j": ("GPTJ", {"plain": True, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
    "gpt-bigcode": ("GPTBigCode", {"plain": True, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "codegen": ("CodeGen", {"plain": True, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4,
        "rotary_dim": 2}),
    "opt": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt-projected": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 8}),
    "bloom": ("Bloom", {"plain": True, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("Llama", {}),
    "llama-tied-sdpa": ("Llama", {"tie_word_embeddings": True, "attention_bias": True,
        "attn_implementation": "sdpa"}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", {"num_key_value_heads": 2}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "falcon": ("Falcon", {"plain": True, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "falcon-alibi": ("Falcon", {"plain": True, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mpt": ("Mpt", {"plain": True, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}),
    "stablelm": ("StableLm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "starcoder2": ("Starcoder2", {}),
    "persimmon": ("Persimmon", {"num_key_value_heads": 2}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {"use_qk_norm": True}),
    "glm": ("Glm", {"partial_rotary_factor": 0.5}),
    "granite": ("Granite", {}),
    "nemotron": ("Nemotron", {}),
    "smollm3": ("SmolLM3", {}),
    "bert-decoder": ("Bert", {"is_decoder": True}),
    "roberta-decoder": ("Roberta", {"is_decoder": True}),
    "electra-decoder": ("Electra", {"is_decoder": True, "embedding_size": 12}),
    "biogpt": ("BioGpt", {}),
    "ctrl": ("CTRL", {"plain": True, "n_positions": 32, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2}),
    "openai-gpt": ("OpenAIGPT", {"plain": True, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}),
}  # fmt: skip
for _name, (_config, _settings) in DECODERS.items():
    family(_name, partial(causal_lm, _config, **_settings))
