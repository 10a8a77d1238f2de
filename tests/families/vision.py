"""Image and video models of Hugging Face, as classifiers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from families.base import CLASSES, Case, class_loss, families_of, hf, images, twins

family = families_of(__name__)

TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
               "image_size": 32, "patch_size": 8}  # fmt: skip


def image_model(
    name: str,
    *,
    shape: tuple[int, ...] = (3, 32, 32),
    key: str = "pixel_values",
    model: str = "ForImageClassification",
    **settings: Any,
) -> Case:
    """Return a classifier of a configuration class, on images of a shape."""
    config = getattr(hf, f"{name}Config")(**{"num_labels": CLASSES, **settings})
    return Case(getattr(hf, f"{name}{model}")(config), class_loss, images(key, *shape))


LEVIT = {"image_size": 32, "patch_size": 16, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2,
        2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4], "down_ops": [["Subsample", 4, 4, 2, 2, 2], ["Subsample",
        4, 4, 2, 2, 2], [""]]}  # fmt: skip
CVT = {"patch_sizes": [3, 3], "patch_stride": [4, 2], "patch_padding": [1, 1], "embed_dim": [8, 16],
        "num_heads": [1, 2], "depth": [1, 2], "mlp_ratio": [2.0, 2.0], "drop_rate": [0.0, 0.0],
        "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True],
        "attention_drop_rate": [0.0, 0.0], "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3],
        "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1]}  # fmt: skip
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}),
    "resnet-bottleneck": ("ResNet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}),
    "efficientnet": ("EfficientNet", {"image_size": 32, "width_coefficient": 0.2, "depth_coefficient": 0.1,
        "hidden_dim": 256, "num_channels": 3, "dropout_rate": 0.0}),
    "mobilenet-v1": ("MobileNetV1", {"image_size": 32, "depth_multiplier": 0.1, "min_depth": 4}),
    "mobilenet-v2": ("MobileNetV2", {"image_size": 32, "depth_multiplier": 0.1, "min_depth": 4,
        "depth_divisible_by": 4}),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4}),
    "convnext-v2": ("ConvNextV2", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4}),
    "regnet-x": ("RegNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4,
        "layer_type": "x"}),
    "regnet-y": ("RegNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4,
        "layer_type": "y"}),
    "bit": ("Bit", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4}),
    "bit-preactivation-same": ("Bit", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
        "num_groups": 4, "layer_type": "preactivation", "global_padding": "SAME"}),
    "vit": ("ViT", TRANSFORMER),
    "vit-msn": ("ViTMSN", TRANSFORMER),
    "deit": ("DeiT", TRANSFORMER),
    "deit-distilled": ("DeiT", {**TRANSFORMER, "model": "ForImageClassificationWithTeacher"}),
    "swin": ("Swin", {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
        "window_size": 4}),
    "swin-absolute": ("Swin", {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2,
        2], "window_size": 4, "use_absolute_embeddings": True}),
    "swinv2": ("Swinv2", {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
        "window_size": 4}),
    "beit": ("Beit", {**TRANSFORMER, "use_relative_position_bias": True, "use_mean_pooling": True}),
    "beit-shared-positions": ("Beit", {**TRANSFORMER, "use_shared_relative_position_bias": True,
        "use_absolute_position_embeddings": True}),
    "data2vec-vision": ("Data2VecVision", {**TRANSFORMER, "use_relative_position_bias": True}),
    "pvt": ("Pvt", {"image_size": 32, "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "depths": [1, 1],
        "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1,
        2], "mlp_ratios": [2, 2]}),
    "pvt-v2": ("PvtV2", {"image_size": 32, "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "depths": [1, 1],
        "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2]}),
    "segformer": ("Segformer", {"image_size": 32, "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "depths": [1,
        1], "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2]}),
    "poolformer": ("PoolFormer", {"hidden_sizes": [8, 16], "num_encoder_blocks": 2, "depths": [1, 1],
        "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1], "mlp_ratio": 2.0}),
    "dinov2": ("Dinov2", {**TRANSFORMER, "mlp_ratio": 2}),
    "dinov2-swiglu": ("Dinov2", {**TRANSFORMER, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2-registers": ("Dinov2WithRegisters", {**TRANSFORMER, "mlp_ratio": 2, "num_register_tokens": 2}),
    "ijepa": ("IJepa", TRANSFORMER),
    "focalnet": ("FocalNet", {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16],
        "focal_levels": [2, 2], "focal_windows": [3, 3], "use_layerscale": True}),
    "mobilevit": ("MobileViT", {"image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8,
        8, 16], "num_attention_heads": 2, "expand_ratio": 2.0}),
    "mobilevit-v2": ("MobileViTV2", {"image_size": 64, "width_multiplier": 0.1, "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [64, 64, 64], "shape": (3, 64, 64)}),
    "swiftformer": ("SwiftFormer", {"image_size": 32, "embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
        "mlp_ratio": 2}),
    "hgnet-v2": ("HGNetV2", {"embedding_size": 8, "stem_channels": [3, 8, 8], "hidden_sizes": [8, 16], "depths": [1,
        1], "stage_in_channels": [8, 8], "stage_mid_channels": [4, 4], "stage_out_channels": [8, 16],
        "stage_num_blocks": [1, 1], "stage_downsample": [False, True], "stage_light_block": [False, True],
        "stage_kernel_size": [3, 3], "stage_numb_of_layers": [2, 2]}),
    "videomae": ("VideoMAE", {**TRANSFORMER, "num_frames": 4, "tubelet_size": 2, "image_size": 16, "shape": (4, 3,
        16, 16), "model": "ForVideoClassification"}),
    "timesformer": ("Timesformer", {**TRANSFORMER, "num_frames": 4, "image_size": 16, "shape": (4, 3, 16, 16),
        "model": "ForVideoClassification"}),
    "vivit": ("Vivit", {**TRANSFORMER, "num_frames": 4, "tubelet_size": [2, 8, 8], "image_size": 16, "shape": (4, 3,
        16, 16), "model": "ForVideoClassification"}),
    "vjepa2": ("VJEPA2", {**TRANSFORMER, "crop_size": 16, "frames_per_clip": 4, "tubelet_size": 2,
        "num_pooler_layers": 1, "pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
        "key": "pixel_values_videos", "shape": (4, 3, 16, 16), "model": "ForVideoClassification"}),
}  # fmt: skip


@family("levit")
def levit() -> Case:
    """Batch norm of flattened tokens; two samples at least (see ``twins``)."""
    case = image_model("Levit", **LEVIT)
    return replace(case, batches=images(sizes=(3, 5, 2)), cut=twins)


@family("cvt")
def cvt() -> Case:
    """Convolutions before attention; two samples at least (see ``twins``)."""
    case = image_model("Cvt", **CVT)
    return replace(case, batches=images(sizes=(3, 5, 2)), cut=twins)


for _name, (_config, _settings) in VISION.items():
    family(_name, partial(image_model, _config, **_settings))
