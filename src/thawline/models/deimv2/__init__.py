"""DEIMv2: the detector, its eight sizes and its training loss."""

from __future__ import annotations

__all__ = [
    "VARIANTS",
    "Criterion",
    "CriterionConfig",
    "DEIMv2",
    "DEIMv2Config",
    "DetectionOutput",
    "Target",
    "get_variant",
]

from thawline.models.deimv2.config import CriterionConfig, DEIMv2Config
from thawline.models.deimv2.loss.criterion import Criterion
from thawline.models.deimv2.loss.targets import Target
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.outputs import DetectionOutput
from thawline.models.deimv2.variants import VARIANTS, get_variant
