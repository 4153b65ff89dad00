"""Engines for TensorRT, built by its own tool; where that is not installed, the command that builds one."""

from __future__ import annotations

__all__ = ["tensorrt_traps", "write_tensorrt"]

import shutil
import subprocess
from pathlib import Path

from thawline.errors import ConfigError
from thawline.exporters.job import Job
from thawline.exporters.onnx_file import write_onnx

CONTROL_FLOW = {"If", "Loop", "Scan"}


def write_tensorrt(job: Job, path: Path) -> list[Path]:
    """Write the ONNX file, and let TensorRT's own tool build the engine where it is installed."""
    files = write_onnx(job, path.with_suffix(".onnx"))
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
