"""Exported files as functions of arrays, in the runtime that each is made for."""

from __future__ import annotations

__all__ = ["OUTPUTS", "Session", "open_onnx", "open_session"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thawline.errors import ConfigError, requires_extra

OUTPUTS = ("labels", "boxes", "scores")
"""Outputs of every exported file, in order."""


@dataclass(frozen=True)
class Session:
    """A loaded file: from inputs by name to outputs by name."""

    inputs: Sequence[str]
    """Inputs that it takes; others are ignored."""
    call: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    batch: int | None = None
    """Number of images in a call; None: any."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Class names, image size, …, as the export wrote them."""

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once."""
        return self.call({name: inputs[name] for name in self.inputs})

    @property
    def takes_images_only(self) -> bool:
        """True for a file without `orig_target_sizes`: its boxes are in 0–1."""
        return "orig_target_sizes" not in self.inputs


def open_session(path: Path, format: str, threads: int | None = None, also: Sequence[str] = ()) -> Session:
    """Load an exported file.

    Args:
        format: of the file: onnx, openvino, pt2 or executorch.
        threads: of the runtime. None: its default.
        also: inner values to return too, by name; not of executorch.
    Raises: MissingExtraError: the runtime is not installed.
    """
    if format == "executorch":
        return _open_executorch(path)
    if format == "onnx":
        return open_onnx(path, threads, also)
    return _open_openvino(path, threads, also) if format == "openvino" else _open_pt2(path, also)


def open_onnx(
    model: Path | bytes,
    threads: int | None = None,
    also: Sequence[str] = (),
    provider: str = "CPUExecutionProvider",
) -> Session:
    """Open an ONNX model, a file or its bytes, in onnxruntime, on the CPU or by another provider.

    Raises: ConfigError: the installed onnxruntime lacks the provider.
    """
    with requires_extra("Running ONNX", "onnx and onnxruntime", "export"):
        import onnxruntime

        if also:
            import onnx
    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(f"onnxruntime has no {provider} here: install onnxruntime-gpu in its place.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads else "0")
    content = model if isinstance(model, bytes) else model.read_bytes()
    if also:
        opened = onnx.ModelProto.FromString(content)
        opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in also)
        content = opened.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=[provider])
    inputs, outputs = (
        [value.name for value in values] for values in (session.get_inputs(), session.get_outputs())
    )
    n = session.get_inputs()[0].shape[0]
    return Session(
        inputs,
        lambda given: dict(zip(outputs, session.run(outputs, given), strict=True)),
        n if isinstance(n, int) else None,
        session.get_modelmeta().custom_metadata_map,
    )


def _open_openvino(path: Path, threads: int | None, also: Sequence[str]) -> Session:
    with requires_extra("Running OpenVINO", "openvino", "export"):
        import openvino
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    model = core.read_model(str(path))
    for name in also:
        model.add_outputs(name)
    compiled = core.compile_model(model, "CPU", settings)
    names = {output: next(iter({*OUTPUTS, *also} & output.get_names())) for output in compiled.outputs}
    inputs = [value.get_any_name() for value in compiled.inputs]
    n = compiled.inputs[0].partial_shape[0]
    about = model.get_rt_info("thawline").value if model.has_rt_info("thawline") else {}
    return Session(
        inputs,
        lambda given: {names[key]: np.array(value) for key, value in compiled(given).items()},
        n.get_length() if n.is_static else None,
        dict(about),
    )


def _open_pt2(path: Path, also: Sequence[str]) -> Session:
    import torch
    from torch import Tensor, fx

    program = torch.export.load(path)
    network = program.module()
    kept: dict[str, np.ndarray] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found = super().run_node(n)
            if n.name in also and isinstance(found, Tensor):
                kept[n.name] = found.numpy().copy()
            return found

    def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = [torch.from_numpy(value) for value in given.values()]
        with torch.inference_mode():
            found = Recorder(network).run(*values) if also else network(*values)
        return {name: value.numpy() for name, value in zip(OUTPUTS, found, strict=True)} | kept

    return Session(program.graph_signature.user_inputs, run)


def _open_executorch(path: Path) -> Session:
    with requires_extra("Running ExecuTorch", "executorch", "executorch"):
        from executorch.runtime import Runtime
    import torch

    method = Runtime.get().load_program(str(path)).load_method("forward")
    inputs = ("images", "orig_target_sizes")[: method.metadata.num_inputs()]

    def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = method.execute([torch.from_numpy(value) for value in given.values()])
        return {name: value.numpy() for name, value in zip(OUTPUTS, found, strict=True)}

    return Session(inputs, run)
