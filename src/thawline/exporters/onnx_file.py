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

    from thawline.exporters.bisect import InnerErrors
    from thawline.exporters.onnx_graph import Translated

LARGEST = 65504 / 4
"""Magnitude from which values stay in full precision: other images may have larger ones than those tried."""
ROUNDS = 6
"""Attempts in half precision, each with more nodes left in full."""


def write_onnx(job: Job, path: Path) -> list[Path]:
    """Write and judge an ONNX file."""
    translated = job.translate()
    model = translated.model
    inner = job.certify(model, translated)
    if job.report.passed and job.settings.half:
        job.report.kept_fp32 = _too_large(model, inner)
        model = _to_half(job, translated)
    elif job.report.passed and job.settings.int8:
        model = to_int8(job, translated, lambda found: partial(open_onnx, found.SerializeToString()))
    path.write_bytes(model.SerializeToString())
    return [path]


def _too_large(model: ModelProto, inner: InnerErrors) -> list[str]:
    """Return the nodes that compute or read values which float16 may not hold."""
    large = [value for value, magnitude in inner.largest.items() if magnitude > LARGEST]
    nodes = {node.name for value in large for node in inner.computing(value)}
    return [node.name for node in model.graph.node if node.name in nodes or set(large) & set(node.input)]


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
        _connect(model)
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


def _connect(model: ModelProto) -> None:
    """Connect nodes in full precision directly, without the converter's casts to float16 and back."""
    made = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            back = made.get(name)
            forth = made.get(back.input[0]) if back is not None and back.op_type == "Cast" else None
            if forth is not None and forth.op_type == "Cast":
                node.input[index] = forth.input[0]
    alive, waiting = set(), [output.name for output in model.graph.output]
    while waiting:
        node = made.get(waiting.pop())
        if node is not None and node.name not in alive:
            alive.add(node.name)
            waiting.extend(node.input)
    for node in list(model.graph.node):
        if node.name not in alive:
            model.graph.node.remove(node)
