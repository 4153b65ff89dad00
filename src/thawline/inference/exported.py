"""Detectors that `thawline export` wrote, run by onnxruntime or OpenVINO.

Images are resized as in training, by Pillow's bilinear filter, which is antialiased and rounds to bytes:
OpenCV's LINEAR and AREA would move nearly every box.
"""

from __future__ import annotations

__all__ = ["SUFFIXES", "ExportedNetwork", "check_number_of_classes", "exported_file", "is_exported"]

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from thawline.errors import CheckpointError, ThawlineError, requires_extra
from thawline.inference.frames import Found
from thawline.sessions import open_session

SUFFIXES = {".onnx": "onnx", ".xml": "openvino"}
"""Suffix of an exported file → its format."""
WEIGHTS = {".safetensors", ".pth", ".pt"}


class ExportedNetwork:
    """Network of an exported file, on the CPU.

    Args:
        path: the file, or a folder that holds one itself or in `exports/`.
        threads: of the runtime. None: its default.
    Raises: CheckpointError: there is none, or it cannot be opened, or was not written by `thawline export`.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        file = exported_file(path) or exported_file(Path(path) / "exports")
        if file is None:
            raise CheckpointError(
                f"'{path}' holds no exported detector (.onnx or .xml). Export one with `thawline export`, or "
                "load weights with Detector.from_pretrained."
            )
        if not file.is_file():
            raise CheckpointError(f"No exported detector '{file}'.")
        try:
            self._session = open_session(file, SUFFIXES[file.suffix], threads)
        except ThawlineError:
            raise
        except Exception as error:  # each runtime raises errors of its own
            raise CheckpointError(f"'{file}' cannot be opened: {' '.join(str(error).split())}") from error
        about = self._session.metadata
        if not about.keys() >= {"class_names", "image_size"}:
            raise CheckpointError(f"'{file}' was not written by `thawline export`: it has no class names.")
        self.class_names: tuple[str, ...] = tuple(json.loads(about["class_names"]))
        self.size: tuple[int, int] = tuple(json.loads(about["image_size"]))

    def __call__(self, images: Sequence[np.ndarray]) -> list[Found]:
        """Detect in images, each (H, W, 3) uint8, RGB."""
        n = self._session.batch or len(images)
        return [one for first in range(0, len(images), n) for one in self._run(images[first : first + n])]

    def _run(self, images: Sequence[np.ndarray]) -> list[Found]:
        """Detect in as many images as the file takes, or fewer."""
        sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
        pixels = np.divide(_resize(images, self.size), 255, dtype=np.float32)
        missing = (self._session.batch or len(images)) - len(images)  # a file for a fixed number of images
        inputs = {"images": pixels, "orig_target_sizes": sizes}
        found = self._session({name: _pad(values, missing) for name, values in inputs.items()})
        if self._session.takes_images_only:
            found["boxes"] = found["boxes"][: len(images)] * np.tile(sizes, 2)[:, None].astype(np.float32)
        return [
            Found(labels=found["labels"][i], boxes=found["boxes"][i], scores=found["scores"][i])
            for i in range(len(images))
        ]


def is_exported(path: str | Path) -> bool:
    """Return True for an exported file, and for a folder that holds one beside no weights."""
    folder = Path(path)
    has_weights = folder.is_dir() and any(file.suffix in WEIGHTS for file in folder.iterdir())
    return not has_weights and exported_file(path) is not None


def exported_file(path: str | Path) -> Path | None:
    """Return the exported file that a path names, or that a folder holds.

    Raises: CheckpointError: a folder holds several.
    """
    path = Path(path)
    if path.suffix in SUFFIXES:
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else []
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"'{path}' holds several exported detectors: {names}. Give one of them.")
    return found[0] if found else None


def check_number_of_classes(path: str | Path, n: int, class_names: Sequence[str]) -> None:
    """Raise CheckpointError unless there are `n` names."""
    if len(class_names) != n:
        raise CheckpointError(f"'{path}' has {n} classes, but {len(class_names)} `class_names` were given.")


def _resize(images: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Resize images (H, W, 3) to (N, 3, *size), all uint8, in threads."""
    with requires_extra("Detection", "pillow", "detect"):
        from PIL import Image
    height, width = size

    def one(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(one, images))).transpose(0, 3, 1, 2)


def _pad(values: np.ndarray, n: int) -> np.ndarray:
    """Repeat the last entry `n` times more."""
    return np.concatenate([values, np.repeat(values[-1:], n, axis=0)]) if n else values
