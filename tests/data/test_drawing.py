"""Boxes and names on pictures."""

from __future__ import annotations

import cv2
import numpy as np

from thawline.data.drawing import class_colours


def test_any_two_classes_are_easy_to_tell_apart_and_their_names_to_read() -> None:
    colours = np.array([colour.as_rgb() for colour in class_colours().colors], np.float32) / 255
    lab = cv2.cvtColor(colours[None], cv2.COLOR_RGB2LAB)[0]
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1)
    assert distance[~np.eye(len(lab), dtype=bool)].min() > 38  # CIELAB; 2 is about what an eye can see
    # White on it has the 3:1 that the Web Content Accessibility Guidelines ask of large letters.
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    assert (1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)).min() >= 3
