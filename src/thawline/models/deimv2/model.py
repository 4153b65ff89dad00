"""DEIMv2 object detector: backbone, encoder, decoder.

Huang et al., Real-Time Object Detection Meets DINOv3, arXiv 2509.20787 (2025). The network computes the same
numbers as the authors' code, including quirks that the published weights were trained with; each quirk is
named where it occurs. Parameters have the authors' names, so their checkpoints load without renaming.
"""

__all__ = ["DEIMv2"]

# No postponed annotations here: the hub mixin reads the type of `config` from the constructor's signature.
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from thawline.errors import ConfigError
from thawline.models.deimv2.checkpoints.read import config_of, load_weights, read_checkpoint
from thawline.models.deimv2.config import DEIMv2Config, with_overrides
from thawline.models.deimv2.fused.decoder import FusedDecoder
from thawline.models.deimv2.fused.forms import fuse
from thawline.models.deimv2.loss.denoising import build_denoising_queries
from thawline.models.deimv2.loss.targets import Target, pack_targets
from thawline.models.deimv2.network.decoder import Decoder
from thawline.models.deimv2.network.hgnetv2 import HGNetV2, HGNetV2Config
from thawline.models.deimv2.network.hybrid_encoder import HybridEncoder
from thawline.models.deimv2.network.lite_encoder import LiteEncoder, LiteEncoderConfig
from thawline.models.deimv2.network.sta import AdaptedViT
from thawline.models.deimv2.outputs import DetectionOutput
from thawline.models.deimv2.postprocess import Detected, postprocess
from thawline.models.deimv2.variants import get_variant
from thawline.recipe.checks import height_width


class DEIMv2(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="thawline",
    paper_url="https://arxiv.org/abs/2509.20787",
    pipeline_tag="object-detection",
):
    """DEIMv2 object detector.

    Args:
        config: shape of the network; `DEIMv2.from_variant` builds the published ones.
    """

    def __init__(self, config: DEIMv2Config) -> None:
        super().__init__()
        self.config = config
        backbone, encoder = config.backbone, config.encoder
        self.backbone: nn.Module = (
            HGNetV2(backbone) if isinstance(backbone, HGNetV2Config) else AdaptedViT(backbone)
        )
        self.encoder: nn.Module = (
            LiteEncoder(encoder, backbone.out_channels)
            if isinstance(encoder, LiteEncoderConfig)
            else HybridEncoder(encoder, backbone.out_channels)
        )
        self.decoder: nn.Module = Decoder(config.decoder, config.num_classes)

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> Self:
        """Build one of the published sizes with random weights.

        Args:
            name: atto, femto, pico, n, s, m, l or x.
            overrides: settings to change: `num_classes`, `num_denoising`, `num_queries`, `rope_rescale`,
                or a whole part, `decoder={"num_layers": 2}`.
        Raises: ConfigError: no such size, or no such setting.
        """
        return cls(with_overrides(get_variant(name).config, overrides))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, variant: str | None = None, **overrides: Any
    ) -> "DEIMv2":
        """Load a detector from a file, a folder or a hub repository, in eval mode.

        Reads what `save_pretrained` writes, the authors' `.pth` and hub folders, transformers' `deimv2`, and
        pretrained backbones alone. Weights are cast to torch's default dtype.

        Args:
            path: a file, a folder, a run folder, a size for its published weights, or a hub id.
            variant: the size, for files of a backbone alone, which do not determine it.
            overrides: settings to change, as in `from_variant`. With other `class_names` the heads' rows go
                by name, and classes that the checkpoint lacks are new; another number of classes without
                a name in common re-initialises the layers sized by it, and nothing else.
        Raises: CheckpointError: unreadable, or missing, unexpected or misshapen tensors, all listed.
        """
        checkpoint = read_checkpoint(path)
        model = cls(config_of(checkpoint, variant, overrides)).eval()
        load_weights(model, checkpoint)
        return model

    def fuse(self) -> Self:
        """Return a copy for inference that gives the same detections with fewer, leaner layers.

        Norms and learnable scales are folded into convolutions and linears; decoder layers, heads and
        embeddings that only training reads are removed. Load weights first: a fused model has other
        parameters and cannot train.
        """
        if self.is_fused:
            return self
        with torch.inference_mode(False), torch.no_grad():
            fused = fuse(deepcopy(self).eval())
        return fused.requires_grad_(False)

    def forward(self, pixel_values: Tensor, targets: Sequence[Target] | None = None) -> DetectionOutput:
        """Detect; in train mode, and whenever targets are given, also return what the losses need.

        Args:
            pixel_values: (B, 3, H, W), normalised as `config.image_mean` and `image_std` say; H and W are
                multiples of the largest stride, 32. Converted to the dtype of the weights.
            targets: labels and boxes of each image. In train mode they also make denoising queries.
        Raises: ConfigError: the image size does not fit the strides.
        """
        self._check_size(pixel_values)
        pixel_values = pixel_values.to(self.decoder.enc_score_head.weight.dtype)
        if not self.training and targets is None:
            return self.decoder(self.encoder(self.backbone(pixel_values)))
        if self.is_fused:
            raise ConfigError("A fused model only detects. Train the model that `fuse()` was called on.")
        denoising = None
        if targets is not None and self.training and self.config.num_denoising:
            denoising = build_denoising_queries(
                pack_targets(targets, self.config.num_classes, pixel_values.device),
                num_classes=self.config.num_classes,
                num_queries=self._num_queries(pixel_values),
                num_denoising=self.config.num_denoising,
                label_noise=self.config.label_noise,
                box_noise=self.config.box_noise,
            )
        return self.decoder(self.encoder(self.backbone(pixel_values)), denoising, for_training=True)

    def postprocess(
        self, output: DetectionOutput, sizes: Sequence[tuple[int, int]] | Tensor
    ) -> list[Detected]:
        """Return the best detections of each image, in its pixels.

        Args:
            sizes: (height, width) of each original image.
        Returns: for each image `scores` (K,), `labels` (K,) and `boxes` (K, 4; xyxy), best first.
        """
        return postprocess(output.logits, output.pred_boxes, sizes, self.config.max_detections)

    @property
    def is_fused(self) -> bool:
        """True for a model returned by `fuse()`."""
        return isinstance(self.decoder, FusedDecoder)

    def _num_queries(self, pixel_values: Tensor) -> int:
        """Return the number of queries: a small image may have fewer tokens than `num_queries`."""
        height, width = pixel_values.shape[-2:]
        n_tokens = sum((height // stride) * (width // stride) for stride in self.config.strides)
        return min(self.config.decoder.num_queries, n_tokens)

    def _check_size(self, pixel_values: Tensor) -> None:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ConfigError(f"`pixel_values` must be (B, 3, H, W), got {tuple(pixel_values.shape)}.")
        height, width = pixel_values.shape[-2:]
        stride = self.config.strides[-1]
        if height % stride or width % stride:
            height_width("pixel_values", [height, width], stride)
