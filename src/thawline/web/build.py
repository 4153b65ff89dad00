"""A folder of static files that detects in the browser: page, model, and onnxruntime-web.

The runtime is taken from npm when the folder is built, checked against its published digest, and stands in
the folder: the page loads nothing from elsewhere. A stored image and its detections let the page check a
browser's WebGPU before it is used.
"""

from __future__ import annotations

__all__ = ["TARBALL", "find_runtime", "write_site"]

import base64
import hashlib
import json
import os
import tarfile
import urllib.request
from importlib.resources import files
from pathlib import Path

import numpy as np

from thawline.errors import DataError
from thawline.files import atomic_file, write_json
from thawline.sessions import open_onnx

TARBALL = "onnxruntime-web-1.30.0.tgz"
ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/{TARBALL}"
DIGEST = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""SHA-512 of the tarball, as npm publishes it."""
RUNTIME = (
    "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm",
)  # fmt: skip
"""Files of onnxruntime-web that the page loads."""
PAGE = ("index.html", "app.js", "detector.js", "isolate.js")
CHECKED = 20
"""Detections of the stored image that a browser has to find."""


def find_runtime() -> Path:
    """Return the tarball of onnxruntime-web, downloaded once to the user's cache.

    Raises: DataError: it cannot be downloaded, or is not the published one.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thawline"
    tarball = cache / TARBALL
    if not tarball.is_file():
        try:
            with urllib.request.urlopen(ADDRESS, timeout=60) as answer, atomic_file(tarball) as temporary:
                temporary.write_bytes(answer.read())
        except OSError as error:
            raise DataError(
                f"'{ADDRESS}' cannot be downloaded: {error}. Put the file into '{cache}', and try again."
            ) from error
    if base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode() != DIGEST:
        raise DataError(f"'{tarball}' is not the published {TARBALL}. Remove it, and try again.")
    return tarball


def write_site(folder: Path, model: Path, runtime: Path) -> None:
    """Write everything but the model itself, which lies in the folder already.

    Args:
        model: exported with `single_input` and `batch=1`.
        runtime: the tarball of onnxruntime-web.
    """
    for name in PAGE:
        (folder / name).write_bytes(files("thawline.web").joinpath("page", name).read_bytes())
    (folder / "ort").mkdir(exist_ok=True)
    with tarfile.open(runtime) as archive:
        for name in RUNTIME:
            content = archive.extractfile(f"package/dist/{name}")
            assert content is not None
            (folder / "ort" / name).write_bytes(content.read())
    session = open_onnx(model)
    height, width = size = json.loads(session.metadata["image_size"])
    image = _smooth_image(height, width)
    found = session({"images": image[None].astype(np.float32) / 255})
    (folder / "check.bin").write_bytes(image.tobytes())
    rows = zip(*(found[name][0].tolist() for name in ("boxes", "scores", "labels")), strict=True)
    check = [
        {"box": box, "score": score, "label": label, "pixels": [width, height]} for box, score, label in rows
    ]
    names = json.loads(session.metadata["class_names"])
    write_json(folder / "model.json", {"class_names": names, "image_size": size, "check": check[:CHECKED]})


def _smooth_image(height: int, width: int) -> np.ndarray:
    """Return an image (3, height, width) of smooth blobs, uint8."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    image = np.zeros((3, height, width))
    for x, y, radius, *colour in rng.random((12, 6)):
        blob = np.exp(-(((columns - x) ** 2 + (rows - y) ** 2) / (0.02 + 0.05 * radius) ** 2))
        image += blob * np.array(colour)[:, None, None]
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)
