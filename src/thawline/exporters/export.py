"""Exports of a detector: written, compared with torch, and kept only if they give the same detections.

onnx        translated by `onnx_graph.py`, opset 17 to 19
openvino    the ONNX graph converted by OpenVINO
pt2         torch's exported program
tensorrt    an engine, where TensorRT and a GPU are; elsewhere the ONNX file and the command that builds one
"""

from __future__ import annotations

__all__ = ["FORMATS", "ExportReport", "Format", "Samples", "Settings", "export_detector", "read_samples"]

import json
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

import thawline
from thawline.data.detection.geometry import resize
from thawline.data.detection.images import read_image
from thawline.data.detection.records import ImageRecord
from thawline.errors import BudgetError, ConfigError, requires_extra
from thawline.exporters.bisect import Parting, first_partings
from thawline.exporters.certificate import (
    BUDGETS,
    SCORE_BUDGETS,
    Detections,
    Reference,
    Row,
    average_precision,
    compare,
    detect,
    generated_images,
)
from thawline.exporters.forms import Sampling, build_graph
from thawline.exporters.onnx_graph import OPSETS, Translated, to_onnx
from thawline.files import write_json
from thawline.models.deimv2.model import DEIMv2
from thawline.recipe.checks import at_least, one_of
from thawline.sessions import OUTPUTS, Session, open_onnx, open_session
from thawline.tables import aligned

logger = logging.getLogger(__name__)

Format = Literal["onnx", "openvino", "tensorrt", "pt2"]
FORMATS = {"onnx": ".onnx", "openvino": ".xml", "tensorrt": ".engine", "pt2": ".pt2"}
"""Format → suffix of its file."""
TRACED, TRIED = 2, (1, 3)
"""Batch size that a dynamic graph is traced with, and those it is judged with."""
CONTROL_FLOW = {"If", "Loop", "Scan"}
N_IMAGES, N_LABELLED = 6, 100
"""Images that are compared box by box, and those that AP is measured on."""
ROUNDS = 6
"""Attempts in half precision, each with more nodes left in full."""
TOLERANCE = {"fp32": 5e-3, "fp16": 0.02}
"""Precision → relative difference from which a node is said to part from torch."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an export: format, batch, precision and error budget."""

    format: Format = "onnx"
    batch: int | None = None
    """Fixed number of images in a call; None: any."""
    opset: int = 17
    """Opset of the ONNX graph: 17, 18 or 19."""
    sampling: Sampling = "grid_sample"
    """`gather`: without GridSample, for runtimes that lack it."""
    half: bool = False
    """Weights and arithmetic in float16, inputs and outputs in float32."""
    single_input: bool = False
    """Without `orig_target_sizes`; boxes are in 0–1."""
    budget: float | None = None
    """Largest box error in pixels; None: 0.5, and 4 in half precision."""

    def __post_init__(self) -> None:
        one_of("format", self.format, list(FORMATS))
        one_of("sampling", self.sampling, get_args(Sampling))
        if self.opset == 20:
            raise ConfigError(
                "`opset=20`: TensorRT computes its GridSample wrongly (TensorRT issue 4646). Use 17, 18, 19."
            )
        if self.opset not in OPSETS:
            raise ConfigError(f"`opset={self.opset}`: expected 17, 18 or 19.")
        if self.batch is not None:
            at_least("batch", self.batch, 1)
        if self.budget is not None and not self.budget >= 0:
            raise ConfigError(f"`budget={self.budget}`: expected pixels, 0 or more.")

    @property
    def precision(self) -> str:
        """Precision of the file."""
        return "fp16" if self.half else "fp32"

    def limit(self, precision: str) -> float:
        """Largest box error in a precision, pixels."""
        return BUDGETS[precision] if self.budget is None else self.budget


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


def read_samples(records: Sequence[ImageRecord], model: DEIMv2) -> Samples:
    """Read annotated images, resized as for an evaluation, to compare on.

    Args:
        records: of a dataset with the model's classes.
    """
    height, width = model.config.image_size
    records = list(records)[:: max(1, len(records) // N_LABELLED)][:N_LABELLED]
    pixels = [resize(read_image(record.path), width, height) for record in records]
    images = np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / 255
    sizes = np.array([(record.width, record.height) for record in records])
    return Samples(images, sizes, f"{len(records)} held-out images", records)


@dataclass(kw_only=True)
class ExportReport:
    """Certificate of an exported file."""

    path: Path
    format: str
    precision: str
    budget_px: float
    rows: list[Row] = field(default_factory=list)
    passed: bool = True
    images: str = ""
    """Source of the images that were compared."""
    opset: int | None = None
    nodes: int | None = None
    kept_fp32: list[str] = field(default_factory=list)
    """Nodes that stay in full precision in a half-precision file."""
    first_partings: list[Parting] = field(default_factory=list)
    """First nodes that part from torch. Full precision allows none: what a model without training detects may
    hardly depend on them."""
    ap: dict[str, float] = field(default_factory=dict)
    """AP in torch, in the file, and their difference, on labelled images."""
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Path of the report."""
        return self.path.with_name(f"{self.path.name}.report.json")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "path": str(self.path)}

    def lines(self) -> list[str]:
        """Return the report as text: a table with a row per precision and batch size, and what is to know."""
        names = [entry.name for entry in fields(Row)]
        cells = [[_cell(getattr(row, name)) for name in names] for row in self.rows]
        table = aligned([names, *cells]).splitlines()
        ap = (
            [f"AP on {self.images}: " + ", ".join(f"{k} {v:.4f}" for k, v in self.ap.items())]
            if self.ap
            else []
        )
        size = f", {self.path.stat().st_size / 2**20:.1f} MiB" if self.path.is_file() else ""
        return [f"{self.path}: {self.format}, {self.precision}{size}", *table, *ap, *self.notes]


def export_detector(
    model: DEIMv2, out: str | Path, settings: Settings | None = None, samples: Samples | None = None
) -> ExportReport:
    """Write a detector in another format, with a report of how far it equals the model in torch.

    Args:
        model: a detector, not fused; it is left in float32 and eval mode.
        out: file to write, or a folder for `model` and the format's suffix.
        samples: images of the size that the model takes. None: generated ones.
    Returns: the report, also written beside the file, as PATH.report.json.
    Raises: BudgetError: the file's detections differ from torch's by more than the budget. The report is
        written, the file is not. MissingExtraError: a library of the format is not installed.
    """
    settings = settings or Settings()
    path = _path(Path(out), settings.format)
    if model.is_fused:
        raise ConfigError("Export the model itself, not its fused form: fusing is part of the export.")
    model = model.float().eval()
    if samples is None:
        images, sizes = generated_images(N_IMAGES, model.config.image_size)
        samples = Samples(images, sizes, "generated")
    job = _Job(model, settings, samples, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = WRITERS[settings.format](job, Path(folder) / path.name)
        report = job.report
        write_json(report.file, report.to_dict())
        if not report.passed:
            for file in written:
                (path.parent / file.name).unlink(missing_ok=True)  # an older file would look like this one's
            raise BudgetError(_over_budget(report))
        for file in written:
            file.replace(path.parent / file.name)
    return report


class _Job:
    """One export: the program, the reference, and the report so far."""

    def __init__(self, model: DEIMv2, settings: Settings, samples: Samples, path: Path) -> None:
        self.settings, self.config, self.model, self.samples = settings, model.config, model, samples
        self.reference = Reference(model, samples.images[:N_IMAGES], samples.sizes[:N_IMAGES])
        self.program = _trace(model, settings)
        topk = next(node for node in self.program.graph.nodes if node.target is torch.ops.aten.topk.default)
        self.queries = next(node.name for node in topk.users if node.args[1] == 1)
        """The node of the program that holds the chosen queries."""
        self.report = ExportReport(
            path=path, format=settings.format, precision=settings.precision, images=samples.source,
            budget_px=settings.limit(settings.precision), metadata=_metadata(model, settings),
        )  # fmt: skip

    def translate(self) -> Translated:
        """Return the ONNX model in full precision."""
        found = to_onnx(self.program, OUTPUTS, self.settings.opset, self.report.metadata)
        self.report.opset, self.report.nodes = self.settings.opset, len(found.model.graph.node)
        return found

    def judge(self, session: Callable[..., Session], precision: str, queries: str) -> bool:
        """Add a row to the report for every batch size; returns whether all are within the budget.

        Args:
            session: opens the file, and returns inner values too.
            queries: name of the inner value that holds the chosen queries.
        """
        limit, settings = self.settings.limit(precision), self.settings
        plain, opened = session(), session(also=[queries])
        choices = Session(opened.inputs, lambda given: {"queries": opened.call(given)[queries]})
        rows = [
            compare(plain, choices, self.reference, batch, precision, limit)
            for batch in ((settings.batch,) if settings.batch else TRIED)
        ]
        self.report.rows = [row for row in self.report.rows if row.precision != precision] + rows
        if self.samples.records:
            own, inputs = self._torch_ap, self._labelled.inputs
            ap = self._average_precision(detect(plain, inputs, settings.batch or 1))
            self.report.ap = {"torch": own, "file": ap, "difference": ap - own}
        self.report.passed = all(
            row.box_error_px <= limit and row.score_error <= SCORE_BUDGETS[precision] for row in rows
        )
        return self.report.passed

    @cached_property
    def _labelled(self) -> Reference:
        return Reference(self.model, self.samples.images, self.samples.sizes)

    @cached_property
    def _torch_ap(self) -> float:
        indices = range(len(self.samples.records))
        return self._average_precision(self._labelled.detect(index, None)[0] for index in indices)

    def _average_precision(self, detections: Iterable[Detections]) -> float:
        return average_precision(detections, self.samples.records, self.config.shown_names)

    def certify(self, model: Any, translated: Translated) -> bool:
        """Judge an ONNX model in full precision by its detections and by all its inner values."""
        self.judge(partial(open_onnx, model.SerializeToString()), "fp32", translated.names[self.queries])
        self.report.first_partings = self.part(model, translated, "fp32")
        self.report.passed = self.report.passed and not self.report.first_partings
        return self.report.passed

    def part(self, model: Any, translated: Translated, precision: str) -> list[Parting]:
        """Name the first nodes at which a model parts from torch."""
        n = self.settings.batch or TRACED
        inputs = {name: values[np.arange(n) % len(values)] for name, values in self.reference.inputs.items()}
        if self.settings.single_input:
            del inputs["orig_target_sizes"]
        return first_partings(
            model, translated.names, self.program, inputs, TOLERANCE[precision], self.queries
        )


def _write_onnx(job: _Job, path: Path) -> list[Path]:
    with requires_extra("Exporting to ONNX", "onnx and onnxruntime", "export"):
        import onnx
    translated = job.translate()
    model = translated.model
    if job.certify(model, translated) and job.settings.half:
        model = _to_half(job, translated)
    onnx.save(model, str(path))
    return [path]


def _to_half(job: _Job, translated: Translated) -> Any:
    """Convert to float16; where that exceeds the budget, leave the nodes that part from torch in float32."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    report = job.report
    for _ in range(ROUNDS):
        source = type(translated.model)()
        source.CopyFrom(translated.model)
        model = convert_float_to_float16(
            source, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "GridSample", "Resize"],
            node_block_list=report.kept_fp32,
        )  # fmt: skip
        if job.judge(partial(open_onnx, model.SerializeToString()), "fp16", translated.names[job.queries]):
            return model
        report.first_partings = job.part(model, translated, "fp16")
        own = {output: node.name for node in translated.model.graph.node for output in node.output}
        nodes = [own.get(parting.value, parting.node) for parting in report.first_partings]
        parted = [node for node in nodes if node not in report.kept_fp32]
        if not parted:
            break
        report.kept_fp32 += parted
    return model


def _write_openvino(job: _Job, path: Path) -> list[Path]:
    with requires_extra("Exporting to OpenVINO", "openvino", "export"):
        import openvino
    onnx_file = path.with_suffix(".onnx")
    translated = job.translate()
    onnx_file.write_bytes(translated.model.SerializeToString())
    converted = openvino.convert_model(str(onnx_file))
    onnx_file.unlink()
    for name, value in job.report.metadata.items():
        converted.set_rt_info(value, ["thawline", name])
    openvino.save_model(converted, str(path), compress_to_fp16=job.settings.half)
    job.judge(partial(open_session, path, "openvino"), job.settings.precision, translated.names[job.queries])
    return [path, path.with_suffix(".bin")]


def _write_tensorrt(job: _Job, path: Path) -> list[Path]:
    """Write the ONNX file, and let TensorRT's own tool build the engine where it is installed."""
    files = _write_onnx(job, path.with_suffix(".onnx"))
    report, (height, width) = job.report, job.config.image_size
    words = ["trtexec", f"--onnx={files[0].name}", f"--saveEngine={path.name}"]
    if job.settings.batch is None:
        for kind, n in (("min", 1), ("opt", 1), ("max", 8)):
            sizes = "" if job.settings.single_input else f",orig_target_sizes:{n}x2"
            words.append(f"--{kind}Shapes=images:{n}x3x{height}x{width}{sizes}")
    words += ["--fp16"] if job.settings.half else []
    report.notes += [f"Trap: {trap}" for trap in tensorrt_traps(files[0].read_bytes())]
    if not report.passed or shutil.which("trtexec") is None:
        report.path = report.path.with_suffix(".onnx")
        report.notes.append(f"TensorRT is not installed here. Where it is: {' '.join(words)}")
        return files
    built = subprocess.run(words, cwd=path.parent, capture_output=True, text=True)
    if built.returncode:
        raise ConfigError(
            f"trtexec failed: {built.stderr.strip().splitlines()[-1:]}. Command: {' '.join(words)}"
        )
    report.notes.append("The certificate is of the ONNX file that the engine was built from.")
    return [*files, path]


def tensorrt_traps(content: bytes) -> list[str]:
    """Return what TensorRT is known to refuse or to compute wrongly in an ONNX model."""
    import onnx

    model = onnx.ModelProto.FromString(content)
    (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
    ops = {node.op_type for node in model.graph.node}
    inner = {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim[1:]}
    traps = {
        "GridSample of opset 20 samples wrongly (TensorRT issue 4646)": opset >= 20 and "GridSample" in ops,
        f"control flow is slow: {', '.join(sorted(ops & CONTROL_FLOW))}": bool(ops & CONTROL_FLOW),
        "only the batch may be dynamic": inner != {""},
        "another domain than ONNX's own": any(node.domain for node in model.graph.node),
    }
    return [trap for trap, is_there in traps.items() if is_there]


def _write_pt2(job: _Job, path: Path) -> list[Path]:
    if job.settings.half:
        raise ConfigError("`half` is not available for pt2: load the program and call `.half()` on a GPU.")
    torch.export.save(job.program, path, extra_files=job.report.metadata)
    job.judge(partial(open_session, path, "pt2"), "fp32", job.queries)
    return [path]


WRITERS: dict[str, Callable[[_Job, Path], list[Path]]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
    "tensorrt": _write_tensorrt,
}


def _trace(model: DEIMv2, settings: Settings) -> ExportedProgram:
    n = settings.batch or TRACED
    inputs: dict[str, Any] = {"images": torch.rand(n, 3, *model.config.image_size)}
    if not settings.single_input:
        inputs["orig_target_sizes"] = torch.full((n, 2), 640)
    shapes = None if settings.batch else {name: {0: Dim("N", min=1, max=2**15)} for name in inputs}
    graph = build_graph(model, settings.sampling, settings.single_input)
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
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _path(out: Path, format: str) -> Path:
    suffix = FORMATS[format]
    if out.suffix == suffix:
        return out
    if out.suffix and not out.is_dir():
        raise ConfigError(
            f"`out`: '{out}' is not a name for {format}: expected one that ends in {suffix}, or a folder."
        )
    return out / f"model{suffix}"


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _over_budget(report: ExportReport) -> str:
    row = max(report.rows, key=lambda row: row.box_error_px)
    named = ", ".join(f"{parting.node} ({parting.error:.1e})" for parting in report.first_partings)
    return (
        f"{row.precision} boxes differ from torch's by up to {row.box_error_px:.3g} pixels and scores by "
        f"{max(row.score_error for row in report.rows):.2g}, or its inner values do; the budget is "
        f"{report.budget_px:g} pixels and {SCORE_BUDGETS[row.precision]:g}; no file was kept. "
        + (f"First nodes that part from torch: {named}. " if named else "")
        + f"Details: '{report.file}'."
    )
