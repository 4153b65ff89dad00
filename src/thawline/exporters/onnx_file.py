"""ONNX files in full, half and 8-bit precision."""

from __future__ import annotations

__all__ = ["write_onnx"]

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from thawline.errors import requires_extra
from thawline.exporters.int8 import to_int8
from thawline.exporters.job import TOLERANCE, Job
from thawline.sessions import open_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

    from thawline.exporters.onnx_graph import Translated

ROUNDS = 6
"""Attempts in half precision, each with more nodes left in full."""


def write_onnx(job: Job, path: Path) -> list[Path]:
    """Write and judge an ONNX file."""
    translated = job.translate()
    model = translated.model
    if job.certify(model, translated):
        if job.settings.half:
            model = _to_half(job, translated)
        elif job.settings.int8:
            model = to_int8(job, translated, lambda found: partial(open_onnx, found.SerializeToString()))
    path.write_bytes(model.SerializeToString())
    return [path]


def _to_half(job: Job, translated: Translated) -> ModelProto:
    """Convert to float16; where that exceeds the budget, leave the nodes that part from torch in float32."""
    with requires_extra("Exporting to ONNX", "onnx and onnxruntime", "export"):
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    report = job.report
    own = {output: node.name for node in translated.model.graph.node for output in node.output}
    for _ in range(ROUNDS):
        source = type(translated.model)()
        source.CopyFrom(translated.model)
        model = convert_float_to_float16(
            source, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "GridSample", "Resize"],
            node_block_list=report.kept_fp32,
        )  # fmt: skip
        if job.judge(partial(open_onnx, model.SerializeToString()), "fp16", translated.names[job.queries]):
            report.first_partings = []
            break
        report.first_partings = job.inner_errors(model, translated).first_partings(TOLERANCE["fp16"])
        nodes = [own.get(parting.value, parting.node) for parting in report.first_partings]
        parted = [node for node in nodes if node not in report.kept_fp32]
        if not parted:
            break
        report.kept_fp32 += parted
    return model
