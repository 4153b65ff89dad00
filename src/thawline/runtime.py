"""Detection without torch: exported detectors on numpy, OpenCV, and onnxruntime or OpenVINO.

    from thawline.runtime import Detector
    detections = Detector("model.onnx")("photo.jpg")

`Detector` is the class that `thawline.Detector` names, too; importing it from here or there loads neither
torch nor transformers. `pip install thawline-runtime` installs what this module needs, without torch.
"""

from __future__ import annotations

__all__ = ["Detector", "Prediction"]

from thawline.inference.detector import Detector, Prediction
