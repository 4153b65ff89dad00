"""The generated set that the demo learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from thawline.data.detection.dataset import load_detection
from thawline.demo.toy_images import CLASSES, SIDE, draw_shapes, write_shapes


def test_boxes_hold_their_shape_tightly_and_touch_no_other() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        picture, boxes, labels = draw_shapes(rng)
        assert len(boxes) == len(labels) >= 1
        assert boxes.min() >= 0
        assert boxes.max() <= SIDE
        mask = np.zeros((SIDE, SIDE), int)
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
            mask[y0:y1, x0:x1] += 1
            patch = picture[y0:y1, x0:x1].astype(int)
            colour = patch[patch.shape[0] * 2 // 3, patch.shape[1] // 2]
            painted = (np.abs(patch - colour).max(2) == 0).mean()
            expected = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}[CLASSES[label]]
            assert abs(painted - expected) < 0.08
        assert mask.max() == 1


def test_the_written_set_is_a_sound_coco_set_of_all_classes(tmp_path: Path) -> None:
    found = load_detection(write_shapes(tmp_path / "set", 12, 3))
    assert found.class_names == CLASSES
    assert (len(found.records("train")), len(found.records("val"))) == (12, 3)
