"""Quantisation to 8-bit integers: convolutions and products, with scales from training images.

A quantised model is accepted by its AP on labelled images. As long as it loses too much, the nodes that add
most to the error of the inner values go back to full precision, twice as many each time.

Weights get 7 of 8 bits: processors without VNNI add pairs of products in 16 bits, which overflow otherwise.
"""

from __future__ import annotations

__all__ = ["to_int8"]

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thawline.errors import requires_extra
from thawline.exporters.job import Job
from thawline.sessions import Session

if TYPE_CHECKING:
    from onnx import ModelProto

    from thawline.exporters.bisect import InnerErrors
    from thawline.exporters.onnx_graph import Translated

QUANTIZED = ("Conv", "MatMul")
FIRST = 4
"""Number of nodes that go back to full precision first."""
MEANINGFUL_AP = 0.05
"""AP of the model below which losing little of it says nothing."""


def to_int8(
    job: Job, translated: Translated, opener: Callable[[ModelProto], Callable[..., Session]]
) -> ModelProto:
    """Quantise a model within the budget of AP.

    Args:
        opener: returns what opens a model in the runtime that it is for.
    """
    report, calibration = job.report, job.samples.calibration
    assert calibration is not None
    order: list[str] = []
    n_nodes = sum(node.op_type in QUANTIZED for node in translated.model.graph.node)
    while True:
        model = quantize(translated.model, _batches(job, calibration), report.kept_fp32)
        if job.judge(opener(model), "int8", translated.names[job.queries]):
            break
        order = order or _most_sensitive_first(job.inner_errors(model, translated))
        n_kept = max(FIRST, 2 * len(report.kept_fp32))
        if n_kept >= n_nodes:
            break
        report.kept_fp32 = order[:n_kept]
    if report.ap["torch"] < MEANINGFUL_AP:
        report.notes.append(
            "The model detects next to nothing of these images: AP cannot show what int8 costs."
        )
    return model


def quantize(
    model: ModelProto, batches: Iterator[dict[str, np.ndarray]], excluded: Sequence[str] = ()
) -> ModelProto:
    """Quantise convolutions and products of a model, except the nodes that are named.

    Args:
        batches: inputs to calibrate with.
    """
    with requires_extra("Exporting to int8", "onnx and onnxruntime", "export"):
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as folder:
        source, path = (Path(folder) / name for name in ("fp32.onnx", "int8.onnx"))
        source.write_bytes(model.SerializeToString())
        quantize_static(
            source, path, Reader(), op_types_to_quantize=list(QUANTIZED), nodes_to_exclude=list(excluded),
            per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
        return type(model).FromString(path.read_bytes())


def _batches(job: Job, images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    n = job.settings.batch or 1
    for start in range(0, len(images), n):
        index = np.arange(start, start + n).clip(max=len(images) - 1)
        sizes = {} if job.settings.single_input else {"orig_target_sizes": np.full((n, 2), 640)}
        yield {"images": images[index], **sizes}


def _most_sensitive_first(inner: InnerErrors) -> list[str]:
    """Return the names of quantised nodes by how much more error their results have than their inputs."""
    added = {
        node.name: error - inner.before(value)
        for value, error in inner.errors.items()
        for node in inner.computing(value)
        if node.op_type in QUANTIZED
    }
    return sorted(added, key=added.__getitem__, reverse=True)
