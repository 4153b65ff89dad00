"""Detect in a picture and draw what was found. Offline: random weights stand for pretrained ones."""

import numpy as np
import supervision as sv
import torch

from thawline import DEIMv2, Detector


def draw_scene() -> np.ndarray:
    """Stands for your photograph: (360, 480, 3), RGB, uint8."""
    scene = np.full((360, 480, 3), 235, np.uint8)
    scene[60:200, 40:180] = (200, 60, 50)
    scene[150:330, 260:440] = (50, 90, 190)
    return scene


# With weights: DEIMv2.from_pretrained("folder, .pth, hub id or size").
torch.manual_seed(0)
model = DEIMv2.from_variant("atto", num_classes=2, class_names=("box", "plate")).eval()

# The deployed form: norms and scales inside convolutions, the same detections, about half the time.
deployed = model.fuse()
before, after = (sum(p.numel() for p in network.parameters()) for network in (model, deployed))
print(f"{before:,} parameters, {after:,} once fused")

detector = Detector(deployed)
scene = draw_scene()
detections = detector(scene, threshold=0.0, max_detections=5)
names, scores = detections.data["class_name"], detections.confidence
labels = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
for label, box in zip(labels, detections.xyxy.round().astype(int), strict=True):
    print(label, box.tolist())

picture = sv.BoxAnnotator().annotate(scene.copy(), detections)
picture = sv.LabelAnnotator().annotate(picture, detections, labels=labels)
with sv.ImageSink(target_dir_path="detected") as sink:
    sink.save_image(picture[..., ::-1], "scene.png")  # the sink writes BGR, as OpenCV has it
