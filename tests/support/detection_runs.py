"""Short detection runs on a few painted images, and comparison of what they leave."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import cv2
import torch

from tests.support.painted import Painted
from thawline.models.deimv2.variants import get_variant
from thawline.recipe import RunConfig

NAMES = ("red", "green", "blue")


# Atto with little to do: the run is what is tested. Fewer layers are sooner built, saved and read too.
TINY = {
    "num_queries": 12,
    "num_denoising": 6,
    "backbone": {
        "stages": [{**asdict(stage), "n_layers": 1} for stage in get_variant("atto").config.backbone.stages]
    },
    "encoder": {"n_blocks": 1},
    "decoder": {"num_layers": 2, "ffn_dim": 32},
}


TINY_VIT = {
    "num_queries": 12,
    "num_denoising": 6,
    "backbone": {
        "vit": {"dim": 32, "num_heads": 2, "depth": 3, "hidden_dim": 48, "out_blocks": [0, 1, 2]},
        "detail_channels": 4,
        "out_channels_each": 32,
    },
    "encoder": {"hidden_dim": 32, "ffn_dim": 32, "n_blocks": 1},
    "decoder": {"hidden_dim": 32, "num_layers": 2, "ffn_dim": 32},
}


def write_painted_coco(root: Path) -> Path:
    """Six images to learn from and two to judge by, as COCO JSON."""
    images = Painted(8, scale=0.5)
    for split, chosen in (("train", range(6)), ("val", range(6, 8))):
        content: dict = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)]
        for i in chosen:
            image, boxes, labels = images.pictures[i]
            cv2.imwrite(str(root / f"{i}.png"), image[..., ::-1])
            size = {"width": image.shape[1], "height": image.shape[0]}
            content["images"].append({"id": i, "file_name": f"{i}.png", **size})
            for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
                x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
                entry = {"image_id": i, "category_id": 10 * (label + 1), "bbox": [x, y, w, h], "area": w * h}
                content["annotations"].append({"id": len(content["annotations"]), "iscrowd": 0, **entry})
        (root / f"instances_{split}.json").write_text(json.dumps(content))
    return root


class DetectionRecipes:
    """Recipes of 3 epochs, 3 steps each, on one dataset and in one folder, with strong augmentation."""

    def __init__(self, data: Path, runs: Path) -> None:
        self.data, self.runs = data, runs

    def __call__(
        self,
        name: str = "run",
        *,
        variant: str = "atto",
        base: object = None,
        tuner: object = "none",
        objective: object = None,
        **training: object,
    ) -> RunConfig:
        network = TINY_VIT if variant == "s" else TINY
        steps = {"epochs": 3, "batch_size": 2, "log_every": 1}
        return RunConfig.from_mapping(
            {
                "objective": {"kind": "detection", "strong_augmentation": True, **(objective or {})},
                "name": name,
                "folder": str(self.runs),
                "base": {"variant": variant, "size": 64, "overrides": network, **(base or {})},
                "tuner": tuner,
                "data": str(self.data),
                "training": {**steps, **training},
            }
        )


def state_of(checkpoint: Path) -> dict:
    """Everything a checkpoint holds that a run goes on from."""
    files = ("pytorch_model.bin", "average.pt", "optimizer.pt", "scheduler.pt")
    state = {name: torch.load(checkpoint / name, weights_only=True) for name in files}
    return state | {"scores": json.loads((checkpoint / "scores.json").read_text())}


def forget_after(copy: Path, step: int) -> None:
    """Make of a finished run's copy one that ended after `step`."""
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "model")
    for later in copy.glob("checkpoint-*"):
        if int(later.name.split("-")[1]) > step:
            shutil.rmtree(later)
    config = copy / "config.yaml"
    lines = config.read_text().splitlines()
    config.write_text(
        "\n".join(f"name: {copy.name}" if line.startswith("name: ") else line for line in lines)
    )


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
