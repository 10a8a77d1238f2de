"""Text encoders of Hugging Face: masked language models and classifiers."""

from __future__ import annotations

from functools import partial
from typing import Any

from families.base import (
    CLASSES,
    Case,
    class_loss,
    families_of,
    hf,
    labelled,
    masked_loss,
    text_batches,
    tokens,
)
from families.decoders import COMMON

family = families_of(__name__)

UNNAMED = ("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")
SMALL = {**COMMON, "type_vocab_size": 2}


def masked_lm(name: str, **settings: Any) -> Case:
    """Return a masked language model of a configuration class."""
    config = getattr(hf, f"{name}Config")(**{**SMALL, **settings})
    return Case(hf.AutoModelForMaskedLM.from_config(config), masked_loss, text_batches())


def classifier(name: str, **settings: Any) -> Case:
    """Return a sequence classifier of a configuration class."""
    without = settings.pop("without", ())
    common = {key: value for key, value in SMALL.items() if key not in without}
    config = getattr(hf, f"{name}Config")(**{**common, "num_labels": CLASSES, **settings})
    model = hf.AutoModelForSequenceClassification.from_config(config)
    return Case(model, class_loss, labelled(text_batches()))


MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-mlm": ("Bert", {}),
    "roberta-mlm": ("Roberta", {}),
    "xlm-roberta-mlm": ("XLMRoberta", {}),
    "albert-mlm": ("Albert", {"embedding_size": 12}),
    "distilbert-mlm": ("DistilBert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    "electra-mlm": ("Electra", {"embedding_size": 12}),
    "deberta-v2-mlm": ("DebertaV2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 4}),
    "mpnet-mlm": ("MPNet", {}),
    "modernbert-mlm": ("ModernBert", {"global_attn_every_n_layers": 2, "local_attention": 4}),
    "esm-mlm": ("Esm", {"mask_token_id": 4, "position_embedding_type": "rotary"}),
    "longformer-mlm": ("Longformer", {"attention_window": [4, 4]}),
    "big-bird-mlm": ("BigBird", {"attention_type": "original_full"}),
    "mobilebert-mlm": ("MobileBert", {"embedding_size": 12, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    "fnet-mlm": ("FNet", {}),
    "squeezebert-mlm": ("SqueezeBert", {"embedding_size": 16}),
    "roformer-mlm": ("RoFormer", {"embedding_size": 12}),
    "convbert-mlm": ("ConvBert", {"embedding_size": 12, "head_ratio": 1, "conv_kernel_size": 3}),
    "nystromformer-mlm": ("Nystromformer", {"num_landmarks": 64, "segment_means_seq_len": 64}),
}  # fmt: skip
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {}),
    "albert": ("Albert", {"embedding_size": 12}),
    "distilbert": ("DistilBert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    "electra": ("Electra", {"embedding_size": 12}),
    "deberta": ("Deberta", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta-v2": ("DebertaV2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}),
    "deberta-v3": ("DebertaV2", {"relative_attention": True, "share_att_key": True, "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}),
    "mpnet": ("MPNet", {}),
    "xlnet": ("XLNet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24,
        "without": ["max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"]}),
    "funnel": ("Funnel", {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24,
        "num_decoder_layers": 1, "without": ["num_hidden_layers", "hidden_size", "num_attention_heads",
        "intermediate_size"]}),
    "longformer": ("Longformer", {"attention_window": [4, 4]}),
    "modernbert": ("ModernBert", {"global_attn_every_n_layers": 2, "local_attention": 4}),
    "esm": ("Esm", {"mask_token_id": 4, "position_embedding_type": "absolute", "token_dropout": True}),
    "gpt2-classifier": ("GPT2", {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama-classifier": ("Llama", {}),
    "xlm": ("XLM", {"emb_dim": 16, "n_layers": 2, "n_heads": 2}),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", {}),
    "megatron-bert": ("MegatronBert", {}),
    "ernie": ("Ernie", {}),
}  # fmt: skip
for _name, (_config, _settings) in MASKED.items():
    family(_name, partial(masked_lm, _config, **_settings))
for _name, (_config, _settings) in CLASSIFIERS.items():
    family(_name, partial(classifier, _config, **_settings))


@family("big-bird-sparse")
def big_bird_sparse() -> Case:
    """Sequences long enough for blocks of attention."""
    config = hf.BigBirdConfig(
        **{**SMALL, "max_position_embeddings": 128, "attention_type": "block_sparse", "block_size": 4},
        num_random_blocks=1,
        num_labels=CLASSES,
    )  # fmt: skip
    model = hf.BigBirdForSequenceClassification(config)
    shapes = ((3, 64), (2, 60), (1, 64))
    return Case(model, class_loss, labelled([tokens(b, t) for b, t in shapes]))


@family("canine")
def canine() -> Case:
    """Characters, hashed into several embedding tables."""
    config = hf.CanineConfig(
        **{**SMALL, "num_labels": CLASSES, "num_hash_functions": 4, "num_hash_buckets": 16, "downsampling_rate": 2,
           "upsampling_kernel_size": 2, "local_transformer_stride": 4, "max_position_embeddings": 64}
    )  # fmt: skip
    return Case(hf.CanineForSequenceClassification(config), class_loss, labelled(text_batches(high=500)))


@family("bert-token-types")
def bert_token_types() -> Case:
    """Pairs of texts, with token types and a pooler."""
    case = classifier("Bert")
    for batch in case.batches:
        ids = batch["input_ids"]
        batch["token_type_ids"] = (ids.cumsum(1) > 60).long()
    return case


@family("bert-token-classifier")
def bert_token_classifier() -> Case:
    """A label for each token."""
    config = hf.BertConfig(**SMALL, num_labels=31)
    return Case(hf.BertForTokenClassification(config), masked_loss, text_batches())


@family("bert-bitfit")
def bert_bitfit() -> Case:
    """Only biases and the classifier are trained."""
    case = classifier("Bert")
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    return case


@family("bert-partly-frozen")
def bert_partly_frozen() -> Case:
    """Embeddings and the first block are frozen."""
    case = classifier("Bert")
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(not name.startswith(("bert.embeddings", "bert.encoder.layer.0")))
    return case
