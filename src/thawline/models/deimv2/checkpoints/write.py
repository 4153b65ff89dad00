"""Write a detector in one of several layouts and verify it by reading it back.

    thawline        a folder with `config.json` and `model.safetensors`
    authors         one `.pth` for the authors' training code
    authors_hub     a folder like their hub repositories
    transformers    a folder for `Deimv2ForObjectDetection.from_pretrained`

The authors' code computes the same numbers from its layouts; transformers' port computes others
(docs/models/detect.md says where and why).
"""

from __future__ import annotations

__all__ = ["WRITERS", "convert_checkpoint", "port_settings", "save_as"]

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from thawline.errors import CheckpointError, ConfigError, did_you_mean
from thawline.files import atomic_file, atomic_folder, write_json
from thawline.models.deimv2.checkpoints.names import StateDict, to_transformers
from thawline.models.deimv2.config import DEIMv2Config
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.network.anchors import make_anchors
from thawline.models.deimv2.network.hgnetv2 import HGNetV2Config
from thawline.models.deimv2.network.hybrid_encoder import HybridEncoderConfig
from thawline.models.deimv2.network.lite_encoder import LiteEncoderConfig
from thawline.models.deimv2.network.sta import AdaptedViTConfig

TOLERANCE = 1e-5
"""Maximum difference of logits after reading back; rounding alone stays below 1e-6."""


def convert_checkpoint(
    source: str | Path, destination: str | Path, layout: str, variant: str | None = None
) -> float:
    """Read a detector, write it in another layout, read it back and compare the logits.

    Args:
        source: anything `DEIMv2.from_pretrained` reads.
        destination: a folder, or for `authors` a file; it must not exist.
        layout: one of WRITERS.
        variant: the size, for sources that do not determine it.
    Returns: the largest difference of a logit on one random image.
    Raises: CheckpointError: unreadable source, existing destination, or different logits.
    """
    model = DEIMv2.from_pretrained(source, variant)
    save_as(model, destination, layout)
    # Not in files of others; where the shape matters, `save_as` knows what they compute.
    order = getattr(model.config.encoder, "position_order", None)
    again = DEIMv2.from_pretrained(
        destination, model.config.variant, **({} if order is None else {"position_order": order})
    )
    generator = torch.Generator().manual_seed(0)
    stride = model.config.strides[-1]
    height, width = (min(side, 10 * stride) for side in model.config.image_size)
    image = torch.rand(1, 3, height, width, generator=generator)
    with torch.inference_mode():
        difference = (model(image).logits - again(image).logits).abs().max().item()
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"'{destination}' was written, but its logits differ from those of '{source}' by "
            f"{difference:.1e}: do not use it."
        )
    return difference


def save_as(model: DEIMv2, destination: str | Path, layout: str) -> None:
    """Write a detector, in its training form, in one of the layouts.

    Raises: ConfigError: unknown layout, or one that cannot express this model's shape.
        CheckpointError: the destination exists.
    """
    if layout not in WRITERS:
        raise ConfigError(f"Unknown layout '{layout}'. {did_you_mean(layout, WRITERS)}")
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(f"'{destination}' exists. Choose another path, or remove it first.")
    (height, width), order = model.config.image_size, getattr(model.config.encoder, "position_order", "")
    if layout.startswith("authors") and height != width and order == "row_column":
        raise ConfigError(
            f"The authors' code scrambles the positions of a rectangle, and this one, {height} × {width}, "
            "was trained with rows and columns. Use the layout thawline or transformers."
        )
    WRITERS[layout](model, destination)


def _save_authors(model: DEIMv2, file: Path) -> None:
    state = _authors_state(model)
    with atomic_file(file) as temporary:
        torch.save({"last_epoch": -1, "model": state, "ema": {"module": state, "updates": 0}}, temporary)


def _save_authors_hub(model: DEIMv2, folder: Path) -> None:
    _write_folder(folder, _authors_state(model), {"config.json": _authors_settings(model.config)})


def _save_transformers(model: DEIMv2, folder: Path) -> None:
    config, state = model.config, to_transformers(model.state_dict())
    has_key_bias = any(name.endswith("attention.k_proj.bias") for name in state)
    settings = port_settings(config, has_key_bias=has_key_bias)
    processor = {
        "image_processor_type": "RTDetrImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size[0], "width": config.image_size[1]},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": any(config.image_mean),
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "do_pad": False,
    }
    _write_folder(folder, state, {"config.json": settings, "preprocessor_config.json": processor})


WRITERS: dict[str, Callable[[DEIMv2, Path], object]] = {
    "thawline": lambda model, folder: model.save_pretrained(folder),
    "authors": _save_authors,
    "authors_hub": _save_authors_hub,
    "transformers": _save_transformers,
}


def _write_folder(folder: Path, state: StateDict, settings: dict[str, dict[str, Any]]) -> None:
    # A tensor under several names is written under each: readers then need no rule for shared ones.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    with atomic_folder(folder) as temporary:
        for name, values in settings.items():
            write_json(temporary / name, values)
        save_file(tensors, temporary / "model.safetensors")


def _authors_state(model: DEIMv2) -> dict[str, Tensor]:
    """Return the state dict with the tensors that their network holds twice and its tables for one size."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name in ("up", "reg_scale"):
        state[f"decoder.{name}"] = state[f"decoder.decoder.{name}"]
    height, width = model.config.image_size
    sizes = [(height // stride, width // stride) for stride in model.config.strides]
    anchors, valid = make_anchors(sizes)
    return state | {"decoder.anchors": anchors[None], "decoder.valid_mask": valid[None].bool()}


_HGNET_NAMES = {"atto": "Atto", "femto": "Femto", "pico": "Pico", "n": "B0"}
_VIT_NAMES = {"s": "vit_tiny", "m": "vit_tinyplus", "l": "dinov3_vits16", "x": "dinov3_vits16plus"}


def _authors_settings(config: DEIMv2Config) -> dict[str, Any]:
    """Return the arguments of their constructors."""
    variant, backbone, encoder, decoder = config.variant, config.backbone, config.encoder, config.decoder
    if variant not in {**_HGNET_NAMES, **_VIT_NAMES}:
        raise ConfigError("The authors' hub layout names backbones by size; this model is none of the eight.")
    dim, strides = encoder.hidden_dim, list(config.strides)
    if isinstance(backbone, HGNetV2Config):
        backbone_key, backbone_settings = (
            "HGNetv2",
            {
                "name": _HGNET_NAMES[variant],
                "return_idx": list(backbone.out_stages),
                "freeze_at": -1,
                "freeze_norm": False,
                "use_lab": True,
                "pretrained": False,
            },
        )
    else:
        backbone_key, backbone_settings = (
            "DINOv3STAs",
            {
                "name": _VIT_NAMES[variant],
                "embed_dim": backbone.vit.dim,
                "num_heads": backbone.vit.num_heads,
                "interaction_indexes": list(backbone.vit.out_blocks),
                "conv_inplane": backbone.detail_channels,
                "hidden_dim": backbone.out_channels_each,
            },
        )
    encoder_key, encoder_settings = (
        "LiteEncoder",
        {
            "in_channels": list(backbone.out_channels),
            "feat_strides": list(backbone.strides),
            "hidden_dim": dim,
            "expansion": encoder.expansion,
            "depth_mult": round(encoder.n_blocks / 3, 2),
            "act": "silu",
        },
    )
    if isinstance(encoder, HybridEncoderConfig):
        encoder_key = "HybridEncoder"
        encoder_settings |= {
            "use_encoder_idx": [len(strides) - 1],
            "num_encoder_layers": 1,
            "nhead": encoder.num_heads,
            "dim_feedforward": encoder.ffn_dim,
            "dropout": 0.0,
            "enc_act": "gelu",
            "version": "dfine" if encoder.trailing_conv else "deim",
            "csp_type": "csp2",
            "fuse_op": "sum",
        }
    decoder_settings = {
        "num_classes": config.num_classes,
        "feat_channels": [dim] * len(strides),
        "feat_strides": strides,
        "hidden_dim": decoder.hidden_dim,
        "num_levels": len(strides),
        "num_layers": decoder.num_layers,
        "eval_idx": decoder.eval_layer,
        "num_queries": decoder.num_queries,
        "num_denoising": config.num_denoising,
        "label_noise_ratio": config.label_noise,
        "box_noise_scale": config.box_noise,
        "reg_max": decoder.reg_max,
        "reg_scale": decoder.reg_scale,
        "layer_scale": 1,
        "num_points": list(decoder.num_points),
        "cross_attn_method": "default",
        "query_select_method": "default",
        # The published files leave these out, and so give their readers ReLU instead of the trained SiLU.
        "activation": "silu",
        "mlp_act": "silu",
        "dim_feedforward": decoder.ffn_dim,
        "use_gateway": decoder.gateway,
        "share_bbox_head": decoder.share_bbox_head,
        "eval_spatial_size": list(config.image_size),
    }
    return {
        backbone_key: backbone_settings,
        encoder_key: encoder_settings,
        "DEIMTransformer": decoder_settings,
        "PostProcessor": {"num_classes": config.num_classes, "num_top_queries": config.max_detections},
    }


def port_settings(config: DEIMv2Config, *, has_key_bias: bool) -> dict[str, Any]:
    """Return the arguments of transformers' `Deimv2Config` that come closest to this network."""
    encoder, decoder, strides = config.encoder, config.decoder, list(config.strides)
    dim, backbone = encoder.hidden_dim, config.backbone
    names = config.class_names or tuple(f"LABEL_{index}" for index in range(config.num_classes))
    settings = {
        "architectures": ["Deimv2ForObjectDetection"],
        "model_type": "deimv2",
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        "freeze_backbone_batch_norms": False,
        "encoder_type": "lite" if isinstance(encoder, LiteEncoderConfig) else "hybrid",
        "encoder_hidden_dim": dim,
        "encoder_in_channels": list(backbone.out_channels),
        "encode_proj_layers": [len(strides) - 1],
        "feat_strides": strides,
        "hidden_expansion": encoder.expansion,
        "depth_mult": encoder.n_blocks / 3,
        "encoder_has_trailing_conv": getattr(encoder, "trailing_conv", True),
        # A size here would switch the position embedding off at inference.
        "eval_size": None,
        "d_model": decoder.hidden_dim,
        "num_queries": decoder.num_queries,
        "decoder_in_channels": [dim] * len(strides),
        "decoder_ffn_dim": decoder.ffn_dim,
        "num_feature_levels": len(strides),
        "decoder_n_points": list(decoder.num_points),
        "decoder_layers": decoder.num_layers,
        "decoder_attention_heads": decoder.num_heads,
        "decoder_activation_function": "silu",
        "use_gateway": decoder.gateway,
        "share_bbox_head": decoder.share_bbox_head,
        "eval_idx": decoder.eval_layer,
        "max_num_bins": decoder.reg_max,
        "reg_scale": decoder.reg_scale,
        "up": decoder.up,
        "num_denoising": config.num_denoising,
        "label_noise_ratio": config.label_noise,
        "box_noise_scale": config.box_noise,
        "focal_loss_gamma": config.criterion.gamma,
    }
    if isinstance(encoder, HybridEncoderConfig):
        settings |= {"encoder_ffn_dim": encoder.ffn_dim, "encoder_attention_heads": encoder.num_heads}
    if isinstance(backbone, AdaptedViTConfig):
        settings["spatial_tuning_adapter_inplanes"] = backbone.detail_channels
        settings["backbone_config"] = _port_vit(backbone, config.image_size, has_key_bias=has_key_bias)
    else:
        settings["backbone_config"] = _port_hgnet(backbone)
    return settings


def _port_vit(
    backbone: AdaptedViTConfig, image_size: tuple[int, int], *, has_key_bias: bool
) -> dict[str, Any]:
    vit = backbone.vit
    return {
        "model_type": "dinov3_vit",
        "image_size": list(image_size),
        "patch_size": vit.patch_size,
        "hidden_size": vit.dim,
        "intermediate_size": vit.hidden_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "use_gated_mlp": vit.ffn == "swiglu",
        "hidden_act": "silu" if vit.ffn == "swiglu" else "gelu",
        "layer_norm_eps": vit.norm_eps,
        "num_register_tokens": vit.n_storage_tokens,
        "key_bias": has_key_bias,
        "apply_layernorm": vit.final_norm,
        "pos_embed_rescale": vit.rope_rescale,
        "out_indices": [block + 1 for block in vit.out_blocks],
    }


def _port_hgnet(backbone: HGNetV2Config) -> dict[str, Any]:
    stages = backbone.stages
    return {
        "model_type": "hgnet_v2",
        "depths": [stage.n_blocks for stage in stages],
        "hidden_sizes": [stage.out_channels for stage in stages],
        "stem_channels": list(backbone.stem_channels),
        "stage_in_channels": [stage.in_channels for stage in stages],
        "stage_mid_channels": [stage.mid_channels for stage in stages],
        "stage_out_channels": [stage.out_channels for stage in stages],
        "stage_num_blocks": [stage.n_blocks for stage in stages],
        "stage_downsample": [stage.downsample for stage in stages],
        "stage_downsample_strides": [2] * len(stages),
        "stage_light_block": [stage.light for stage in stages],
        "stage_kernel_size": [stage.kernel_size for stage in stages],
        "stage_numb_of_layers": [stage.n_layers for stage in stages],
        "use_learnable_affine_block": True,
        "out_indices": [stage + 1 for stage in backbone.out_stages],
    }
