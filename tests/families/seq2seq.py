"""Encoder-decoder models of Hugging Face."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from families.base import SHAPES, VOCABULARY, Case, families_of, hf, token_loss, tokens

family = families_of(__name__)

T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
      "relative_attention_num_buckets": 8, "pad_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip


def pair_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of each target, with the target moved by one as the decoder's input."""
    target = batch["target"]
    given = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1].clamp(min=1)], 1)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=given
    ).logits  # fmt: skip
    return token_loss(logits, target)


def pair_batches(extra: int = -1) -> list[dict[str, Tensor]]:
    """Return texts with targets that are ``extra`` tokens longer."""
    found = []
    for b, t in SHAPES:
        target = tokens(b, t + extra, seed=1)["labels"]
        found.append({**{k: v for k, v in tokens(b, t).items() if k != "labels"}, "target": target})
    return found


def translator(name: str, **settings: Any) -> Case:
    """Return an encoder-decoder of a configuration class."""
    config = getattr(hf, f"{name}Config")(**settings)
    model = getattr(hf, f"{name}ForConditionalGeneration", None) or getattr(hf, f"{name}MTModel")
    return Case(model(config), pair_loss, pair_batches())


SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5),
    "t5-gated-untied": ("T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5", T5),
    "umt5": ("UMT5", T5),
    "long-t5": ("LongT5", {**T5, "local_radius": 3, "encoder_attention_type": "local"}),
    "bart": ("Bart", BART),
    "mbart": ("MBart", BART),
    "pegasus": ("Pegasus", BART),
    "marian": ("Marian", BART),
    "blenderbot-small": ("BlenderbotSmall", BART),
    "plbart": ("PLBart", BART),
    "m2m-100": ("M2M100", BART),
    "led": ("LED", {**BART, "attention_window": 4, "max_encoder_position_embeddings": 32,
        "max_decoder_position_embeddings": 32}),
    "prophetnet": ("ProphetNet", {"vocab_size": VOCABULARY, "hidden_size": 16, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 2,
        "num_decoder_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 1,
        "relative_max_distance": 8, "num_buckets": 4}),
}  # fmt: skip
for _name, (_config, _settings) in SEQ2SEQ.items():
    family(_name, partial(translator, _config, **_settings))
