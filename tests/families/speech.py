"""Speech and audio models of Hugging Face, and its models of time series."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from families.base import CLASSES, VOCABULARY, Case, class_loss, families_of, hf, images, token_loss, tokens

family = families_of(__name__)

WAVES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": [8, 8],
    "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "num_labels": CLASSES, "classifier_proj_size": 12, "mask_time_prob": 0.0,
    "vocab_size": VOCABULARY, "num_codevectors_per_group": 4, "num_codevector_groups": 1, "codevector_dim": 8,
    "proj_codevector_dim": 8,
}  # fmt: skip


def waves(model: str, config: str, key: str = "input_values", shape: tuple[int, ...] = (200,), **settings: Any) -> Case:
    """Return a classifier of raw audio."""
    made = getattr(hf, f"{config}Config")(**{**WAVES, **settings})
    return Case(getattr(hf, model)(made), class_loss, images(key, *shape))


AUDIO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2", {}),
    "wav2vec2-stable-norm": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2",
        {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True, "use_weighted_layer_sum": True},
    ),
    "hubert": ("HubertForSequenceClassification", "Hubert", {}),
    "wavlm": ("WavLMForSequenceClassification", "WavLM", {"num_buckets": 8}),
    "unispeech-sat": ("UniSpeechSatForSequenceClassification", "UniSpeechSat", {}),
    "sew": ("SEWForSequenceClassification", "SEW", {"squeeze_factor": 2}),
    "sew-d": ("SEWDForSequenceClassification", "SEWD", {"squeeze_factor": 2, "position_buckets": 4}),
    "data2vec-audio": ("Data2VecAudioForSequenceClassification", "Data2VecAudio", {"conv_pos_kernel_size": 3}),
    "wav2vec2-conformer": (
        "Wav2Vec2ConformerForSequenceClassification",
        "Wav2Vec2Conformer",
        {"conv_depthwise_kernel_size": 3},
    ),
    "wav2vec2-bert": (
        "Wav2Vec2BertForSequenceClassification",
        "Wav2Vec2Bert",
        {
            "key": "input_features",
            "shape": (9, 12),
            "feature_projection_input_dim": 12,
            "conv_depthwise_kernel_size": 3,
            "left_max_position_embeddings": 4,
            "right_max_position_embeddings": 2,
        },
    ),
    "ast": (
        "ASTForAudioClassification",
        "AST",
        {
            "shape": (24, 16),
            "max_length": 24,
            "num_mel_bins": 16,
            "patch_size": 8,
            "time_stride": 8,
            "frequency_stride": 8,
        },
    ),
}
for _name, (_model, _config, _settings) in AUDIO.items():
    family(_name, partial(waves, _model, _config, **_settings))


def caption_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of each transcription, its tokens moved by one as the decoder's input."""
    target = batch["labels"]
    given = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1].clamp(min=1)], 1)
    return token_loss(model(input_features=batch["input_features"], decoder_input_ids=given).logits, target)


@family("whisper")
def whisper() -> Case:
    """Audio to text."""
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=24, max_source_positions=10,
        max_target_positions=16, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    batches = []
    for number, (b, t) in enumerate(((3, 6), (5, 5), (1, 4))):
        generator = torch.Generator().manual_seed(number)
        features = torch.randn(b, 8, 20, generator=generator)
        batches.append({"input_features": features, "labels": tokens(b, t)["labels"]})
    return Case(hf.WhisperForConditionalGeneration(config), caption_loss, batches)


def ctc_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the connectionist temporal classification loss of each sample."""
    logits = model(input_values=batch["input_values"]).logits.log_softmax(-1).transpose(0, 1)
    lengths = [torch.full((logits.shape[1],), length) for length in (len(logits), batch["labels"].shape[1])]
    return nn.functional.ctc_loss(logits, batch["labels"], *lengths, reduction="none")


@family("wav2vec2-ctc")
def wav2vec2_ctc() -> Case:
    """The loss that speech recognisers are trained with."""
    batches = []
    for batch in images("input_values", 200):
        generator = torch.Generator().manual_seed(len(batches))
        b = len(batch["input_values"])
        labels = torch.randint(1, VOCABULARY, (b, 4), generator=generator)
        batches.append({"input_values": batch["input_values"], "labels": labels})
    return Case(hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAVES)), ctc_loss, batches)


def series_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the squared error of each sample's forecast."""
    found = model(past_values=batch["past_values"]).prediction_outputs
    return (found - batch["labels"]).square().flatten(1).mean(1)


def series_batches() -> list[dict[str, Tensor]]:
    """Return series of 16 steps and 3 channels, and the 4 steps after them."""
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(b, t, 3, generator=generator) for name, t in (("past_values", 16), ("labels", 4))}
        for b in (3, 4, 1)
    ]


@family("patch-tst")
def patch_tst() -> Case:
    """A forecast from patches of every channel."""
    config = hf.PatchTSTConfig(
        num_input_channels=3, context_length=16, prediction_length=4, patch_length=4, patch_stride=4, d_model=8,
        num_attention_heads=2, num_hidden_layers=2, ffn_dim=12, loss="mse",
    )  # fmt: skip
    return Case(hf.PatchTSTForPrediction(config), series_loss, series_batches())


@family("patch-ts-mixer")
def patch_ts_mixer() -> Case:
    """Mixing over time, channels and features."""
    config = hf.PatchTSMixerConfig(
        num_input_channels=3, context_length=16, prediction_length=4, patch_length=4, patch_stride=4, d_model=8,
        num_layers=2, mode="mix_channel", loss="mse",
    )  # fmt: skip
    return Case(hf.PatchTSMixerForPrediction(config), series_loss, series_batches())
