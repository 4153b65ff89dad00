"""Small detectors whose every weight matters, exported."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.models.deimv2.conftest import SHAPES
from tests.support.exports import equal_networks_share_a_trace
from thawline.data.detection.records import ImageRecord
from thawline.exporters.certificate import Reference, generated_images
from thawline.exporters.job import Samples
from thawline.models.deimv2.config import with_overrides
from thawline.models.deimv2.model import DEIMv2

logging.getLogger("torch.__trace").propagate = False  # thousands of records, which pytest would keep


def build_detector(kind: str = "lite", **overrides: Any) -> DEIMv2:
    """A detector of a kind ("lite", "hgnet", "tiny", "dino") without a weight of zero or a trivial norm."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = DEIMv2(with_overrides(SHAPES[kind], overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "dinov3" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of one batch, so that what is seen decides
        images = torch.from_numpy(generated_images(8, model.config.image_size)[0])
        model.train()(images)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def _shared_traces() -> Iterator[None]:
    with equal_networks_share_a_trace():
        yield


@pytest.fixture(scope="session")
def lite() -> DEIMv2:
    return build_detector("lite")


def label_itself(model: DEIMv2, n: int, n_boxes: int = 5) -> Samples:
    """Generated images labelled with a detector's own best detections: its AP is near 1."""
    images, sizes = generated_images(n, model.config.image_size)
    reference, records = Reference(model, images, sizes), []
    for index, (width, height) in enumerate(sizes.tolist()):
        found, _ = reference.detect(index)
        boxes, labels = found["boxes"][:n_boxes].astype(np.float64), found["labels"][:n_boxes]
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        none = np.zeros(n_boxes, bool)
        records.append(ImageRecord(
            image_id=index, path=Path("generated"), width=width, height=height, boxes_xyxy=boxes,
            labels=labels, iscrowd=none, area=area,
        ))  # fmt: skip
    return Samples(images, sizes, f"{n} generated images", records, calibration=images[:4])
