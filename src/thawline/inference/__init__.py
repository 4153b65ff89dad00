"""Images and videos in, detections out."""

from __future__ import annotations

__all__ = ["Detector", "Prediction"]

from thawline.inference.detector import Detector, Prediction
