"""Small detectors whose every weight matters, exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models.deimv2.conftest import SHAPES
from thawline.exporters.certificate import generated_images
from thawline.models.deimv2.config import with_overrides
from thawline.models.deimv2.model import DEIMv2


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


@pytest.fixture(scope="session")
def lite() -> DEIMv2:
    return build_detector("lite")
