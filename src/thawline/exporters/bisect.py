"""Find where an ONNX model diverges from torch: first nodes whose results differ though their inputs agree.

Each value of the translated model belongs to a node of the program it was translated from, so both can be
read out and compared one by one, in the order of computation.
"""

from __future__ import annotations

__all__ = ["Parting", "first_partings"]

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from thawline.sessions import open_onnx

LARGEST = 4_000_000
"""Values of more elements are passed over: the attention of a large size would fill the memory."""
JUMPS = {"Floor"}
"""Operations that turn a rounding error into a whole step; what follows them makes up for it."""
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
    queries: str,
) -> list[Parting]:
    """Return the first nodes that part from torch; none if every named value agrees.

    Torch goes on with the queries that the model has chosen, and what follows the choice of detections is not
    compared: among equal scores either may choose another one.

    Args:
        names: node of the program → value of the model, as `to_onnx` gives them.
        inputs: a batch as large as the program was traced with.
        tolerance: largest relative difference that counts as equal.
        queries: the node of the program that holds the chosen queries.
    """
    produced = {output: node for node in model.graph.node for output in node.output}
    nodes = list(program.graph.nodes)
    last = max(i for i, node in enumerate(nodes) if node.target is torch.ops.aten.topk.default)
    small = {node.name for node in nodes[:last] if _n_elements(node, len(inputs["images"])) <= LARGEST}
    names = {own: value for own, value in names.items() if value in produced and own in small}
    known = {output.name for output in model.graph.output}
    inner = [value for value in names.values() if value not in known]
    found = open_onnx(model.SerializeToString(), also=inner)(dict(inputs))
    expected = _torch_values(program, inputs, {queries: found[names[queries]]}, names)
    names = {own: value for own, value in names.items() if own in expected}
    errors = {value: _error(expected[own], found[value]) for own, value in names.items()}
    compared, partings = set(errors), []
    for value, error in errors.items():
        sources = _sources(produced[value], produced, compared)
        if produced[value].op_type in JUMPS:
            continue
        if error > tolerance and not any(errors[source] > tolerance for source in sources):
            partings.append(Parting(node=produced[value].name, value=value, error=error))
    return partings[:SHOWN]


def _torch_values(
    program: ExportedProgram,
    inputs: Mapping[str, np.ndarray],
    given: Mapping[str, np.ndarray],
    wanted: Container[str],
) -> dict[str, np.ndarray]:
    """Return the results of nodes; those of `given` are taken from there."""
    values: dict[str, np.ndarray] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found = torch.from_numpy(given[n.name]) if n.name in given else super().run_node(n)
            if n.name in wanted and isinstance(found, Tensor):
                values[n.name] = found.numpy().copy()
            return found

    with torch.inference_mode():
        Recorder(program.module()).run(*(torch.from_numpy(value) for value in inputs.values()))
    return values


def _n_elements(node: fx.Node, batch: int) -> int:
    value = node.meta.get("val")
    sides = value.shape if isinstance(value, Tensor) else ()
    return math.prod(side if isinstance(side, int) else batch for side in sides)


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
