"""A small base detector and domains of it, as training would leave them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from thawline.domains.attach import attach_domain, is_class_layer
from thawline.domains.domain import Domain, base_digest, save_domain
from thawline.models.deimv2 import DEIMv2
from thawline.recipe import Frozen, Lora, Paca, TunerSettings

FEW = Paca(r=2, target_modules=r".*(aggregation\.\d\.conv|out_proj|bbox_head.*layers\.0)")
"""PaCA on few layers of every part: attaching to all takes a second."""
NAMES = {"cards": ("ace", "king"), "plates": ("plate",), "pcb": ("short", "open", "spur")}


def make_base(variant: str = "atto", size: int = 64, seed: int = 0) -> DEIMv2:
    """Return a detector with random weights and random, plausible statistics of its norms."""
    torch.manual_seed(seed)
    model = DEIMv2.from_variant(
        variant, class_names=("disc", "square"), image_size=(size, size), num_queries=9
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def make_domain(
    base: DEIMv2, folder: Path, name: str, tuner: TunerSettings | None = None, threshold: float = 0.0
) -> Path:
    """Write a domain whose adapter and heads are random numbers, and return its folder."""
    tuner = FEW if tuner is None else tuner
    torch.manual_seed(sum(map(ord, name)))
    config = base.config
    model = DEIMv2.from_variant(
        config.variant, class_names=NAMES[name], image_size=config.image_size, num_queries=9
    )
    shared = {key: value for key, value in base.state_dict().items() if not is_class_layer(key)}
    model.load_state_dict(shared, strict=False)
    attach_domain(model.eval(), tuner)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and not is_class_layer(key):
                parameter.normal_(std=0.05)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    about = Domain(
        name=name, class_names=NAMES[name], threshold=threshold, base=base_digest(base), base_label="base",
        image_size=config.image_size, tuner=tuner.method, parameters=trained,
    )  # fmt: skip
    save_domain(model, about, folder)
    return folder


TUNERS: dict[str, TunerSettings] = {
    "paca": Paca(r=2),
    "lora": Lora(r=2, target_modules=FEW.target_modules),
    "frozen": Frozen(),
}
