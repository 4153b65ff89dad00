"""Boxes and names on images."""

from __future__ import annotations

import cv2
import numpy as np

from thawline.data.detection.drawing import Panel, class_colours, draw_panel


def test_any_two_classes_are_easy_to_tell_apart_and_their_names_to_read() -> None:
    colours = np.array([colour.as_rgb() for colour in class_colours().colors], np.float32) / 255
    lab = cv2.cvtColor(colours[None], cv2.COLOR_RGB2LAB)[0]
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1)
    assert distance[~np.eye(len(lab), dtype=bool)].min() > 38  # CIELAB; 2 is about what an eye can see
    # White on it has the 3:1 that the Web Content Accessibility Guidelines ask of large letters.
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    assert (1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)).min() >= 3


def test_names_are_left_out_where_they_would_cover_the_image() -> None:
    def drawn(n: int) -> np.ndarray:
        corners = np.stack([np.linspace(5, 80, n), np.full(n, 60)], 1)
        boxes = np.concatenate([corners, corners + 8], 1)
        image = np.full((100, 100, 3), 128, np.uint8)
        return draw_panel(Panel(image=image, boxes_xyxy=boxes, labels=np.zeros(n, int)), ["car"])

    # Above a box stands its name, or nothing.
    assert (drawn(1)[40:58] != 128).any()
    assert (drawn(30)[:58] == 128).all()
