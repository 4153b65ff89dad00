"""A detector trained by two processes: one run, and the gradients of one process with both batches."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from tests.support.detection_runs import forget_after
from thawline.models.deimv2.model import DEIMv2
from thawline.recipe import RunConfig
from thawline.run import evaluate, run
from thawline.training.detection.learner import HostTargets, Learner

NETWORKS = {
    "atto": {"num_queries": 12, "decoder": {"num_layers": 2, "ffn_dim": 32}},
    "n": {"num_queries": 12, "decoder": {"num_layers": 2, "ffn_dim": 32}},
}


def a_learner(variant: str, *, num_denoising: int) -> Learner:
    """A small detector whose norms do not look at the batch, which is half as large in each process."""
    torch.manual_seed(0)
    detector = DEIMv2.from_variant(variant, num_classes=3, num_denoising=num_denoising, **NETWORKS[variant])
    learner = Learner(detector).train()
    for module in learner.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return learner


def a_batch() -> tuple[Tensor, HostTargets]:
    """Two pictures, the second without boxes."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    boxes = torch.rand(5, 4, generator=generator) * 0.3 + 0.3
    targets = [
        {"labels": torch.tensor([0, 2, 1, 1, 0]), "boxes": boxes},
        {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    ]
    return pixels, HostTargets(targets)


def gradients_of(learner: nn.Module, pixels: Tensor, targets: HostTargets) -> dict[str, Tensor]:
    terms = learner(pixels, targets, epoch=0)
    torch.stack([term for name, term in terms.items() if "ddf" not in name]).sum().backward()
    return {name.removeprefix("module."): p.grad for name, p in learner.named_parameters() if p.requires_grad}


def half_a_step(rank: int, folder: str, variant: str, num_denoising: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    pixels, targets = a_batch()
    learner = DistributedDataParallel(
        a_learner(variant, num_denoising=num_denoising),
        find_unused_parameters=not num_denoising,  # whose embedding then idles
    )
    mine = HostTargets(targets.targets[rank : rank + 1])
    torch.save(gradients_of(learner, pixels[rank : rank + 1], mine), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_one_process_without_boxes_gives_the_gradients_of_both_batches_in_one(tmp_path: Path) -> None:
    start_processes(half_a_step, (str(tmp_path), "atto", 0), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    together = gradients_of(a_learner("atto", num_denoising=0), *a_batch())
    assert list(first) == list(second) == list(together)
    idle = "detector.decoder.denoising_class_embed.weight"
    assert {name for name, gradient in together.items() if gradient is None} == {idle}
    for name, gradient in together.items():
        if name == idle:
            continue
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_every_parameter_gets_a_gradient_in_a_process_without_boxes(tmp_path: Path) -> None:
    """DistributedDataParallel waits for all of them: for denoising's embedding too."""
    start_processes(half_a_step, (str(tmp_path), "n", 6), nprocs=2, start_method="fork")
    found = torch.load(tmp_path / "1.pt")
    assert all(gradient is not None for gradient in found.values())


def a_share_of_a_run(rank: int, mapping: dict, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = run(RunConfig.from_mapping(mapping), resume=Path(mapping["folder"], mapping["name"]).exists())
    Path(mapping["folder"], f"{rank}.json").write_text(json.dumps([result.steps, result.metrics]))
    torch.distributed.destroy_process_group()


def write_set(folder: Path) -> Path:
    """Ten pictures of one coloured box, one of none; the last three are held out."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, numbers in (("train", range(8)), ("val", range(8, 11))):
        images, boxes = [], []
        for i in numbers:
            picture = generator.integers(0, 60, (64, 64, 3), np.uint8)
            x, y, w, h = (int(v) for v in generator.integers([4, 4, 16, 16], [24, 24, 32, 32]))
            if i != 3:
                picture[y : y + h, x : x + w, i % 3] = 255
                boxes.append({"id": i, "image_id": i, "category_id": 1 + i % 3, "bbox": [x, y, w, h]})
                boxes[-1] |= {"area": w * h, "iscrowd": 0}
            cv2.imwrite(str(folder / f"{i}.png"), picture)
            images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(("blue", "green", "red"))]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_two_processes_make_one_run_and_agree_on_what_it_came_to(tmp_path: Path) -> None:
    mapping = {
        "objective": "detection",
        "base": {"variant": "atto", "size": 64, "overrides": {**NETWORKS["atto"], "num_denoising": 6}},
        "tuner": "none",
        "data": str(write_set(tmp_path / "set")),
        "training": {"epochs": 2, "batch_size": 4, "args": {"disable_tqdm": True}},
        "folder": str(tmp_path),
        "name": "run",
    }

    def run_in_two() -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start_processes(a_share_of_a_run, (mapping, port), nprocs=2, start_method="fork")
        first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
        assert first == second
        return first

    first = run_in_two()
    assert first[0] == 4  # two epochs of eight pictures, four a step
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum("eval_AP" in line for line in lines) == 2
    # One process alone finds the same on all of the held-out images.
    assert evaluate(tmp_path / "run").metrics == pytest.approx(first[1])
    # Both go on from the checkpoint before one whose second process's part is cut.
    forget_after(tmp_path / "run", step=4)
    manifest = json.loads((tmp_path / "run" / "checkpoint-4" / "manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= set(manifest)
    (tmp_path / "run" / "checkpoint-4" / "rng_state_1.pth").write_bytes(b"")
    assert run_in_two() == first
