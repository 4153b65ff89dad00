"""Where an ONNX model parts from torch: the first nodes whose results differ although their inputs agree.

Each value of the translated model belongs to a node of the program it was translated from, so both can be
read out and compared one by one, in the order of computation.
"""

from __future__ import annotations

__all__ = ["Parting", "first_partings"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from thawline.exporters.sessions import open_onnx

SHOWN = 5
"""Number of nodes that are named."""


@dataclass(frozen=True, kw_only=True)
class Parting:
    """A node whose result differs from torch's."""

    node: str
    """Module and operation."""
    value: str
    """Name of its result in the ONNX model."""
    error: float
    """Largest difference, relative to the largest value."""


def first_partings(
    model: onnx.ModelProto,
    names: Mapping[str, str],
    program: ExportedProgram,
    inputs: Mapping[str, np.ndarray],
    tolerance: float,
) -> list[Parting]:
    """Return the first nodes that part from torch; none if every named value agrees.

    Args:
        names: node of the program → value of the model, as `to_onnx` gives them.
        inputs: a batch as large as the program was traced with.
        tolerance: largest relative difference that counts as equal.
    """
    expected = _torch_values(program, inputs)
    produced = {output: node for node in model.graph.node for output in node.output}
    names = {own: value for own, value in names.items() if value in produced and own in expected}
    known = {output.name for output in model.graph.output}
    inner = [value for value in names.values() if value not in known]
    found = open_onnx(model.SerializeToString(), also=inner)(dict(inputs))
    errors = {value: _error(expected[own], found[value]) for own, value in names.items()}
    compared, partings = set(errors), []
    for value, error in errors.items():
        sources = _sources(produced[value], produced, compared)
        if error > tolerance and not any(errors[source] > tolerance for source in sources):
            partings.append(Parting(node=produced[value].name, value=value, error=error))
    return partings[:SHOWN]


def _torch_values(program: ExportedProgram, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found = super().run_node(n)
            if isinstance(found, Tensor):
                values[n.name] = found.numpy().copy()
            return found

    with torch.inference_mode():
        Recorder(program.module()).run(*(torch.from_numpy(value) for value in inputs.values()))
    return values


def _sources(node: onnx.NodeProto, produced: Mapping[str, onnx.NodeProto], compared: set[str]) -> set[str]:
    """Return the nearest compared values that a node is computed from."""
    found, waiting = set(), list(node.input)
    while waiting:
        name = waiting.pop()
        if name in compared:
            found.add(name)
        elif name in produced:
            waiting.extend(produced[name].input)
    return found


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return float("inf")
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    if not np.isfinite(found).all():
        return 0.0 if np.array_equal(expected, found, equal_nan=True) else float("inf")
    return float(np.abs(expected - found).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-6))
