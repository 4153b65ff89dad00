"""Detection demo: a detector learns circles, squares and triangles from random weights in two minutes."""

from __future__ import annotations

__all__ = ["run"]

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thawline.data.detection.dataset import load_detection
from thawline.data.detection.drawing import Panel, panel_grid, save_image
from thawline.data.detection.images import read_image
from thawline.demo.toy_images import CLASSES, write_shapes
from thawline.inference.detector import Detector
from thawline.metrics.detection import DetectionMetrics
from thawline.recipe import RunConfig
from thawline.report.run_report import DETECTION_METRICS, build_report
from thawline.run import RunResult
from thawline.run import run as run_recipe

logger = logging.getLogger(__name__)

SIZE = 128
"""Side of the network's input: a sixth of Atto's pixels."""
BATCH = 8
"""In the same minute and a half, batches of 16 (12 epochs) reach half the AP: 0.09 instead of 0.21."""
N_TRAIN, N_VAL = 256, 64
SHOWN = 4


def run(folder: Path, *, epochs: int = 10) -> str:
    """Draw a dataset in `folder`, train Atto on it, evaluate, and draw its detections.

    Returns: the scores, the paths of the images and the report, and the commands to try next.
    """
    logger.info("1/3  A dataset: %d images to train on, %d held out", N_TRAIN, N_VAL)
    data = write_shapes(folder / "set", N_TRAIN, N_VAL)

    logger.info("2/3  DEIMv2 Atto, half a million weights, all random")
    recipe = {
        "name": "atto",
        "folder": str(folder),
        "objective": "detection",
        "base": {"variant": "atto", "size": SIZE},
        "tuner": "none",
        "data": str(data),
        "training": {
            "epochs": epochs,
            "batch_size": BATCH,
            "eval_every": "end",
            "save_every": "end",
            "workers": 0,
        },
    }
    # One thread is best for the other parts' tiny models, but takes half as long again here.
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, min(2, _processors())))
    try:
        result = _train(recipe)
    finally:
        torch.set_num_threads(threads)

    logger.info("3/3  Its detections")
    metrics = DetectionMetrics.from_dict(
        json.loads((result.folder / DETECTION_METRICS).read_text(encoding="utf-8"))
    )
    picture = _draw(result.folder, data, metrics.threshold)
    report = build_report(result.folder)
    return (
        f"{_table(metrics)}\n\n"
        f"{result.steps} steps in {result.seconds:.0f} s at {SIZE} × {SIZE}, from random weights: enough to\n"
        "see that it learns, far from what a longer run reaches (72 epochs are usual). precision and\n"
        f"recall are at score {metrics.threshold:.2f}, where their F1 over all boxes is best.\n\n"
        f"Pictures: {picture}\n"
        f"Report:   {report}\n\n"
        "Next:\n"
        f"  thawline predict {result.folder} --source {data}/images --out {folder}/found\n"
        f"  thawline eval {result.folder}\n"
        f"  thawline train --config {result.folder}/config.yaml --name longer --training.epochs 72"
    )


def _train(recipe: Mapping[str, Any]) -> RunResult:
    """Train by a recipe. Raises: KeyboardInterrupt: it was stopped, and so is the demo."""
    result = run_recipe(RunConfig.from_mapping(recipe))
    if result.status == "interrupted":
        raise KeyboardInterrupt
    return result


def _processors() -> int:
    """Count the CPUs that this process may use: a second thread on the same CPU only takes time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _draw(run_folder: Path, data: Path, threshold: float) -> Path:
    """Draw the detections of the first held-out images."""
    records = load_detection(data).records("val")[:SHOWN]
    images = [read_image(record.path) for record in records]
    detector = Detector.from_pretrained(run_folder / "model", threshold=threshold)
    found = detector([record.path for record in records])
    panels = [
        Panel(
            image=image,
            boxes_xyxy=np.asarray(one.xyxy),
            labels=np.asarray(one.class_id),
            scores=np.asarray(one.confidence),
            caption=record.path.name,
        )
        for record, image, one in zip(records, images, found, strict=True)
    ]
    return save_image(run_folder / "pictures" / "found.png", panel_grid(panels, CLASSES, columns=2))


def _table(metrics: DetectionMetrics) -> str:
    lines = [f"{'class':10}{'boxes':>7}{'AP':>7}{'AP50':>7}{'precision':>11}{'recall':>8}"]
    lines += [
        f"{one.name:10}{one.n_boxes:7d}{one.AP:7.2f}{one.AP50:7.2f}{one.precision:11.2f}{one.recall:8.2f}"
        for one in metrics.classes
    ]
    overall = metrics.statistics
    lines.append(
        f"{'all':10}{metrics.n_boxes:7d}{overall['AP']:7.2f}{overall['AP50']:7.2f}"
        f"{metrics.precision:11.2f}{metrics.recall:8.2f}"
    )
    return "\n".join(lines)
