"""One export of a detector: its program, what it is compared with, and the report so far."""

from __future__ import annotations

__all__ = ["Job", "Samples"]

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

import thawline
from thawline.data.detection.records import ImageRecord
from thawline.errors import requires_extra
from thawline.exporters.certificate import (
    SCORE_BUDGETS,
    Detections,
    Reference,
    average_precision,
    compare,
    detect,
)
from thawline.exporters.forms import build_graph
from thawline.exporters.report import ExportReport
from thawline.exporters.settings import Settings
from thawline.files import to_json
from thawline.models.deimv2.model import DEIMv2
from thawline.sessions import OUTPUTS, Session, open_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

    from thawline.exporters.bisect import InnerErrors
    from thawline.exporters.onnx_graph import Translated

TRACED, TRIED = 2, (1, 3)
"""Batch size that a dynamic graph is traced with, and those it is judged with."""
TOLERANCE = {"fp32": 5e-3, "fp16": 0.02}
"""Precision → relative difference from which a node is said to part from torch."""


@dataclass(frozen=True)
class Samples:
    """Images to compare the exported file with torch on."""

    images: np.ndarray
    """(N, 3, H, W), float32 in 0–1."""
    sizes: np.ndarray
    """(N, 2), int64, width and height of the originals."""
    source: str
    records: Sequence[ImageRecord] = ()
    """Their annotations."""
    calibration: np.ndarray | None = None
    """Training images (M, 3, H, W), for int8."""


class Job:
    """One export: the program, the reference, and the report so far."""

    def __init__(self, model: DEIMv2, settings: Settings, samples: Samples, path: Path) -> None:
        self.settings, self.config, self.model, self.samples = settings, model.config, model, samples
        self.reference = Reference(model, samples.images, samples.sizes)
        self.program = _trace(model, settings)
        topk = next(node for node in self.program.graph.nodes if node.target is torch.ops.aten.topk.default)
        self.queries = next(node.name for node in topk.users if node.args[1] == 1)
        """The node of the program that holds the chosen queries."""
        limit = settings.limit(settings.precision)
        self.report = ExportReport(
            path=path, format=settings.format, precision=settings.precision, images=samples.source,
            budget_px=None if math.isinf(limit) else limit, metadata=_metadata(model, settings),
        )  # fmt: skip

    def translate(self) -> Translated:
        """Return the ONNX model in full precision."""
        with requires_extra("Exporting to ONNX", "onnx and onnxruntime", "export"):
            from thawline.exporters.onnx_graph import to_onnx
        found = to_onnx(self.program, OUTPUTS, self.settings.opset, self.report.metadata)
        self.report.opset, self.report.nodes = self.settings.opset, len(found.model.graph.node)
        return found

    def judge(self, session: Callable[..., Session], precision: str, queries: str) -> bool:
        """Add a row to the report for every batch size; returns whether all are within the budget.

        Args:
            session: opens the file, and returns inner values too.
            queries: name of the inner value that holds the chosen queries.
        """
        report, limit = self.report, self.settings.limit(precision)

        @cache
        def choices() -> Session:
            opened = session(also=[queries])
            return Session(opened.inputs, lambda given: {"queries": opened.call(given)[queries]})

        batches, plain = (self.settings.batch,) if self.settings.batch else TRIED, session()
        rows = [compare(plain, choices, self.reference, batch, precision, limit) for batch in batches]
        report.rows = [row for row in report.rows if row.precision != precision] + rows
        report.passed = all(
            row.box_error_px <= limit and row.score_error <= SCORE_BUDGETS[precision] for row in rows
        )
        if self.samples.records and precision == self.settings.precision:
            own = self._torch_ap
            ap = self._average_precision(detect(plain, self.reference.inputs, self.settings.batch or 1))
            report.ap = {"torch": own, "file": ap, "difference": ap - own}
            is_lost = precision == "int8" and 100 * (own - ap) > self.settings.ap_budget
            report.passed = report.passed and not is_lost
        return report.passed

    @cached_property
    def _torch_ap(self) -> float:
        indices = range(len(self.samples.records))
        return self._average_precision(self.reference.detect(index)[0] for index in indices)

    def _average_precision(self, detections: Iterable[Detections]) -> float:
        return average_precision(detections, self.samples.records, self.config.shown_names)

    def certify(self, model: ModelProto, translated: Translated) -> InnerErrors:
        """Judge an ONNX model in full precision by its detections and by all its inner values."""
        self.judge(partial(open_onnx, model.SerializeToString()), "fp32", translated.names[self.queries])
        inner = self.inner_errors(model, translated)
        self.report.first_partings = inner.first_partings(TOLERANCE["fp32"])
        self.report.passed = self.report.passed and not self.report.first_partings
        return inner

    def inner_errors(self, model: ModelProto, translated: Translated) -> InnerErrors:
        """Compare all inner values of an ONNX model with torch's, on one image or a fixed batch."""
        from thawline.exporters.bisect import inner_errors

        n = self.settings.batch or 1
        inputs = {name: values[np.arange(n) % len(values)] for name, values in self.reference.inputs.items()}
        if self.settings.single_input:
            del inputs["orig_target_sizes"]
        return inner_errors(model, translated.names, self.program, inputs, self.queries)


def _trace(model: DEIMv2, settings: Settings) -> ExportedProgram:
    n = settings.batch or TRACED
    inputs: dict[str, Any] = {"images": torch.rand(n, 3, *model.config.image_size)}
    if not settings.single_input:
        inputs["orig_target_sizes"] = torch.full((n, 2), 640)
    shapes = None if settings.batch else {name: {0: Dim("N", min=1, max=2**15)} for name in inputs}
    graph = build_graph(model, settings.sampling, settings.single_input)
    if settings.format == "executorch":  # its XNNPACK part takes no weights that are channels-last
        graph = graph.to(memory_format=torch.contiguous_format)
    return torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=shapes)


def _metadata(model: DEIMv2, settings: Settings) -> dict[str, str]:
    config = model.config
    values = {
        "class_names": config.shown_names,
        "image_size": config.image_size,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
        "variant": config.variant,
        "precision": settings.precision,
        "sampling": settings.sampling,
        "input": "RGB in 0-1; mean and std are applied inside",
        "boxes": "xyxy in 0-1" if settings.single_input else "xyxy in pixels of orig_target_sizes",
        "licence": "DINOv3 License" if config.backbone.kind == "adapted_vit" else "Apache-2.0",
        "thawline_version": thawline.__version__,
    }
    return {name: value if isinstance(value, str) else to_json(value) for name, value in values.items()}
