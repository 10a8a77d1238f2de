"""Adapters of PEFT: what people train instead of a model."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from families.base import Case, families_of, peft
from families.decoders import causal_lm
from families.encoders import classifier
from families.vision import TRANSFORMER, image_model

family = families_of(__name__)

LINEAR = ["q_proj", "v_proj", "down_proj"]


def adapted(base: Case, config: Any) -> Case:
    """Return a case whose model is adapted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its libraries about each other
        base.model = peft.get_peft_model(base.model, config)
    return base


def adapter(name: str, **settings: Any) -> Case:
    """Return a Llama with adapters of a configuration class."""
    config = getattr(peft, f"{name}Config")(**{"task_type": "CAUSAL_LM", **settings})
    return adapted(causal_lm("Llama"), config)


LORA = {"r": 2, "target_modules": LINEAR}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("Lora", LORA),
    "lora-bias": ("Lora", {**LORA, "bias": "lora_only"}),
    "lora-rslora-alpha": ("Lora", {**LORA, "use_rslora": True, "lora_alpha": 7}),
    "dora": ("Lora", {**LORA, "use_dora": True}),
    "lora-embedding": ("Lora", {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora-embedding-and-head": ("Lora", {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "lora-modules-to-save": ("Lora", {**LORA, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "lora-trainable-tokens": ("Lora", {**LORA, "trainable_token_indices": {"embed_tokens": [3, 4, 7]}}),
    "adalora": ("AdaLora", {"init_r": 2, "target_r": 2, "target_modules": LINEAR, "total_step": 10, "tinit": 1,
        "tfinal": 1}),
    "ia3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": ("Vera", {"r": 4, "target_modules": ["q_proj"]}),
    "loha": ("LoHa", {"r": 2, "target_modules": LINEAR}),
    "lokr": ("LoKr", {"r": 2, "target_modules": LINEAR}),
    "boft": ("BOFT", {"boft_block_size": 4, "target_modules": ["q_proj"]}),
    "oft": ("OFT", {"oft_block_size": 4, "r": 0, "target_modules": ["q_proj"]}),
    "hra": ("HRA", {"r": 2, "target_modules": LINEAR}),
    "ln-tuning": ("LNTuning", {}),
    "prompt-tuning": ("PromptTuning", {"num_virtual_tokens": 3}),
    "prompt-tuning-as-many": ("PromptTuning", {"num_virtual_tokens": 5}),
    "prefix-tuning": ("PrefixTuning", {"num_virtual_tokens": 3}),
    "prefix-projection": ("PrefixTuning", {"num_virtual_tokens": 3, "prefix_projection": True,
        "encoder_hidden_size": 8}),
    "p-tuning": ("PromptEncoder", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "trainable-tokens": ("TrainableTokens", {"token_indices": [3, 4, 7], "target_modules": ["embed_tokens"]}),
}  # fmt: skip
for _name, (_config, _settings) in ADAPTERS.items():
    family(_name, partial(adapter, _config, **_settings))


@family("lora-classifier")
def lora_classifier() -> Case:
    """A classifier whose head is trained beside the adapters."""
    case = classifier("Roberta")
    return adapted(case, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))


@family("lora-vit-conv")
def lora_vit_conv() -> Case:
    """Adapters of a convolution, and of linear layers, in an image model."""
    case = image_model("ViT", **TRANSFORMER)
    return adapted(case, peft.LoraConfig(r=2, target_modules=["projection", "q_proj"], modules_to_save=["classifier"]))


@family("lora-gpt2")
def lora_gpt2() -> Case:
    """Adapters of layers whose weight is stored transposed."""
    case = causal_lm("GPT2", plain=True, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return adapted(case, config)


@family("lora-experts")
def lora_experts() -> Case:
    """Adapters of attention and router in a mixture of experts."""
    case = causal_lm("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    return adapted(case, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))


@family("lora-expert-parameters")
def lora_expert_parameters() -> Case:
    """Adapters of the experts' weights themselves, which are parameters without layers."""
    case = causal_lm("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names, task_type="CAUSAL_LM")
    return adapted(case, config)
