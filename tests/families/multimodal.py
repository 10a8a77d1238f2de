"""Models of images and texts, of Hugging Face."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from families.base import CLASSES, Case, class_loss, families_of, feature_loss, hf, images, labelled, token_loss, tokens
from families.encoders import SMALL

family = families_of(__name__)

PICTURE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
           "image_size": 16, "patch_size": 8, "projection_dim": 12}  # fmt: skip
TEXT = {**SMALL, "projection_dim": 12}
END = 30


def pairs(**extra: Tensor) -> list[dict[str, Tensor]]:
    """Return texts with an image and a class each."""
    found = []
    for b, t in ((3, 7), (5, 5), (1, 6)):
        generator = torch.Generator().manual_seed(b)
        words = {name: value for name, value in tokens(b, t, high=END).items() if name != "labels"}
        words["input_ids"][torch.arange(b), words["attention_mask"].sum(1) - 1] = END  # where CLIP looks
        found.append({**words, "pixel_values": torch.randn(b, 3, 16, 16, generator=generator), **extra})
    return labelled(found)


def likeness_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return minus the likeness of each text and its own image, which mixes no samples."""
    found = model(**{name: value for name, value in batch.items() if name != "labels"})
    return -F.logsigmoid((found.text_embeds * found.image_embeds).sum(1) * 4)


def contrast_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the contrastive loss of each text among the batch's images: it mixes samples."""
    scores = model(**{name: value for name, value in batch.items() if name != "labels"}).logits_per_text
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")


def two_towers(name: str, **text: Any) -> Case:
    """Return a model of a text encoder and an image encoder."""
    config = getattr(hf, f"{name}Config")(
        text_config={**TEXT, "eos_token_id": END, **text}, vision_config=PICTURE, projection_dim=12
    )
    return Case(getattr(hf, f"{name}Model")(config), likeness_loss, pairs())


@family("clip")
def clip() -> Case:
    """Each text and its own image."""
    return two_towers("CLIP")


@family("clip-contrastive")
def clip_contrastive() -> Case:
    """The loss that CLIP was trained with: a sample's depends on the others, so it must be refused."""
    case = two_towers("CLIP")
    case.loss = contrast_loss
    return case


@family("siglip")
def siglip() -> Case:
    """With attention pooling by torch's MultiheadAttention."""
    return two_towers("Siglip")


@family("alt-clip")
def alt_clip() -> Case:
    """With RoBERTa as its text encoder."""
    return two_towers("AltCLIP", project_dim=16)


@family("clip-vision")
def clip_vision() -> Case:
    """The image tower alone, with a classifier."""
    config = hf.CLIPConfig(vision_config=PICTURE, text_config=TEXT, num_labels=CLASSES, projection_dim=12)
    return Case(hf.CLIPForImageClassification(config), class_loss, images("pixel_values", 3, 16, 16))


@family("clip-text")
def clip_text() -> Case:
    """The text tower alone."""
    model = hf.CLIPTextModel(hf.CLIPTextConfig(**{**TEXT, "eos_token_id": 2}))
    shapes = ((3, 7), (5, 5), (1, 6))
    return Case(model, feature_loss, [{k: v for k, v in tokens(*s).items() if k != "labels"} for s in shapes])


@family("vilt")
def vilt() -> Case:
    """Text and patches in one encoder; it chooses patches at random places unless it keeps all."""
    config = hf.ViltConfig(
        **{**SMALL, **PICTURE, "num_labels": CLASSES, "max_image_length": -1, "modality_type_vocab_size": 2}
    )
    return Case(hf.ViltForQuestionAnswering(config), class_loss, pairs())


@family("flava-text")
def flava_text() -> Case:
    """The text tower of FLAVA."""
    model = hf.FlavaTextModel(hf.FlavaTextConfig(**SMALL))
    return Case(
        model, feature_loss, [{k: v for k, v in tokens(b, t).items() if k != "labels"} for b, t in ((3, 7), (5, 5))]
    )


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of each image's description."""
    found = model(
        pixel_values=batch["pixel_values"], input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    logits = found.logits[:, -batch["input_ids"].shape[1] :]
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    return token_loss(logits[:, :-1], labels[:, 1:])


@family("blip")
def blip() -> Case:
    """Descriptions of images."""
    config = hf.BlipConfig(
        text_config={**SMALL, "encoder_hidden_size": 16, "is_decoder": True, "sep_token_id": 2, "bos_token_id": 0},
        vision_config=PICTURE,
        projection_dim=12,
    )
    return Case(hf.BlipForConditionalGeneration(config), answer_loss, pairs())


@family("git")
def git() -> Case:
    """A decoder that attends to an image's patches."""
    config = hf.GitConfig(vision_config=PICTURE, **SMALL)
    return Case(hf.GitForCausalLM(config), answer_loss, pairs())


@family("layoutlm")
def layoutlm() -> Case:
    """Words with their boxes on a page."""
    config = hf.LayoutLMConfig(**SMALL, num_labels=CLASSES, max_2d_position_embeddings=16)
    batches = []
    for b, t in ((3, 7), (5, 5), (1, 6)):
        words = tokens(b, t)
        generator = torch.Generator().manual_seed(t)
        corners = torch.randint(0, 8, (b, t, 2), generator=generator)
        words["bbox"] = torch.cat([corners, corners + torch.randint(0, 8, (b, t, 2), generator=generator)], 2)
        batches.append(words)
    return Case(hf.LayoutLMForSequenceClassification(config), class_loss, labelled(batches))


@family("visual-bert")
def visual_bert() -> Case:
    """Text with the features of regions."""
    config = hf.VisualBertConfig(**SMALL, visual_embedding_dim=6, num_labels=CLASSES)
    batches = []
    for b, t in ((3, 7), (5, 5), (1, 6)):
        generator = torch.Generator().manual_seed(t)
        seen = {"visual_embeds": torch.randn(b, 4, 6, generator=generator)}
        batches.append({**{k: v for k, v in tokens(b, t).items() if k != "labels"}, **seen})
    return Case(hf.VisualBertForQuestionAnswering(config), class_loss, labelled(batches))


@family("perceiver")
def perceiver() -> Case:
    """Learned latents that attend to a text."""
    config = hf.PerceiverConfig(
        vocab_size=31, num_latents=4, d_latents=16, d_model=12, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=2, num_cross_attention_heads=2, max_position_embeddings=32, num_labels=CLASSES,
    )  # fmt: skip
    batches = []
    for batch in labelled([tokens(b, t) for b, t in ((3, 7), (4, 4), (1, 6))]):
        batches.append(
            {"inputs": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        )
    return Case(hf.PerceiverForSequenceClassification(config), class_loss, batches)
