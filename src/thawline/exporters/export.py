"""Exports of a detector: written, compared with torch, and kept only if they give the same detections.

onnx        translated by `onnx_graph.py`, opset 17 to 19
openvino    the ONNX graph converted by OpenVINO
pt2         torch's exported program
executorch  the same program, lowered to ExecuTorch's XNNPACK kernels
tensorrt    an engine, where TensorRT and a GPU are; elsewhere the ONNX file and the command that builds one
"""

from __future__ import annotations

__all__ = ["ExportReport", "Samples", "Settings", "export_detector", "read_samples"]

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from thawline.data.detection.geometry import resize
from thawline.data.detection.images import read_image
from thawline.data.detection.records import ImageRecord
from thawline.errors import BudgetError, ConfigError, requires_extra
from thawline.exporters.certificate import generated_images
from thawline.exporters.int8 import to_int8
from thawline.exporters.job import Job, Samples
from thawline.exporters.onnx_file import write_onnx
from thawline.exporters.report import ExportReport, over_budget
from thawline.exporters.settings import FORMATS, Settings
from thawline.exporters.tensorrt import write_tensorrt
from thawline.files import write_json
from thawline.models.deimv2.model import DEIMv2
from thawline.sessions import Session, open_session
from thawline.tables import evenly_spaced

if TYPE_CHECKING:
    from onnx import ModelProto

N_GENERATED, N_LABELLED, N_CALIBRATION = 3, 100, 32
"""Images that are generated to compare on, that AP is measured on, and that int8 is calibrated with."""


def read_samples(
    records: Sequence[ImageRecord], model: DEIMv2, calibration: Sequence[ImageRecord] = ()
) -> Samples:
    """Read annotated images, resized as for an evaluation, to compare on.

    Args:
        records: of a dataset with the model's classes.
        calibration: other images of it, for int8.
    """
    records = evenly_spaced(records, N_LABELLED)
    sizes = np.array([(record.width, record.height) for record in records])
    source = f"{len(records)} held-out images"
    calibrating = _read(evenly_spaced(calibration, N_CALIBRATION), model) if calibration else None
    return Samples(_read(records, model), sizes, source, records, calibrating)


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
        written, the file is not; an older file of that name stays, with its report. MissingExtraError: a
        library of the format is not installed.
    """
    settings = settings or Settings()
    path = _path(Path(out), settings.format)
    if model.is_fused:
        raise ConfigError("Export the model itself, not its fused form: fusing is part of the export.")
    model = model.float().eval()
    if samples is None:
        images, sizes = generated_images(N_GENERATED, model.config.image_size)
        samples = Samples(images, sizes, "generated")
    if settings.int8 and (samples.calibration is None or not samples.records):
        raise ConfigError(
            "`int8` needs training images to calibrate with and held-out ones with labels: "
            "export a run, or give `--data DATASET`."
        )
    job = Job(model, settings, samples, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = WRITERS[settings.format](job, Path(folder) / path.name)
        report = job.report
        report.bytes = sum(file.stat().st_size for file in written)
        write_json(report.file, report.to_dict())
        if not report.passed:
            raise BudgetError(over_budget(report))
        for file in written:
            file.replace(path.parent / file.name)
    return report


def _write_openvino(job: Job, path: Path) -> list[Path]:
    with requires_extra("Exporting to OpenVINO", "openvino", "export"):
        import openvino

    def convert(model: ModelProto) -> Callable[..., Session]:
        onnx_file = path.with_suffix(".onnx")
        onnx_file.write_bytes(model.SerializeToString())
        converted = openvino.convert_model(str(onnx_file))
        onnx_file.unlink()
        for name, value in job.report.metadata.items():
            converted.set_rt_info(value, ["thawline", name])
        openvino.save_model(converted, str(path), compress_to_fp16=job.settings.half)
        return partial(open_session, path, "openvino")

    translated = job.translate()
    if job.settings.int8:
        to_int8(job, translated, convert)
    else:
        job.judge(convert(translated.model), job.settings.precision, translated.names[job.queries])
    return [path, path.with_suffix(".bin")]


def _write_pt2(job: Job, path: Path) -> list[Path]:
    if job.settings.half:
        raise ConfigError("`half` is not available for pt2: load the program and call `.half()` on a GPU.")
    torch.export.save(job.program, path, extra_files=job.report.metadata)
    job.judge(partial(open_session, path, "pt2"), "fp32", job.queries)
    return [path]


def _write_executorch(job: Job, path: Path) -> list[Path]:
    with requires_extra("Exporting to ExecuTorch", "executorch", "executorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(job.program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    program = path.with_suffix(
        ".pt2"
    )  # the file keeps no inner values: torch tells which queries were chosen
    torch.export.save(job.program, program)

    def open_file(also: Sequence[str] = ()) -> Session:
        return open_session(program, "pt2", also=also) if also else open_session(path, "executorch")

    job.judge(open_file, "fp32", job.queries)
    return [path]


WRITERS: dict[str, Callable[[Job, Path], list[Path]]] = {
    "onnx": write_onnx,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
    "executorch": _write_executorch,
    "tensorrt": write_tensorrt,
}


def _read(records: Sequence[ImageRecord], model: DEIMv2) -> np.ndarray:
    height, width = model.config.image_size
    pixels = [resize(read_image(record.path), width, height) for record in records]
    return np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / 255


def _path(out: Path, format: str) -> Path:
    suffix = FORMATS[format]
    if out.suffix == suffix:
        return out
    if out.suffix and not out.is_dir():
        raise ConfigError(
            f"`out`: '{out}' is not a name for {format}: expected one that ends in {suffix}, or a folder."
        )
    return out / f"model{suffix}"
