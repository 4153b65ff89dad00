"""Find where an ONNX model diverges from torch: first nodes whose results differ though their inputs agree.

Each value of the translated model belongs to a node of the program it was translated from, so both can be
read out and compared one by one, in the order of computation.
"""

from __future__ import annotations

__all__ = ["InnerErrors", "inner_errors"]

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from thawline.exporters.report import Parting
from thawline.sessions import open_onnx

LARGEST = 4_000_000
"""Values of more elements are passed over: the attention of a large size would fill the memory."""
JUMPS = {"Floor"}
"""Operations that turn a rounding error into a whole step; what follows them makes up for it."""
SHOWN = 5
"""Number of nodes that are named."""


@dataclass(frozen=True)
class InnerErrors:
    """Relative errors of a model's inner values, in the order of computation."""

    errors: Mapping[str, float]
    """Name of a value → its largest difference from torch's, relative to the largest value."""
    largest: Mapping[str, float]
    """Name of a value → its largest magnitude in torch."""
    nodes: Mapping[str, onnx.NodeProto]
    """Name of a value → the node that computes it."""

    def before(self, value: str) -> float:
        """Return the largest error among the nearest compared values that this one is computed from."""
        return max((self.errors[source] for source in self._above(value)[0]), default=0.0)

    def computing(self, value: str) -> list[onnx.NodeProto]:
        """Return the nodes between a value and the nearest compared ones that it is computed from."""
        return self._above(value)[1]

    def first_partings(self, tolerance: float) -> list[Parting]:
        """Return the first nodes that part from torch; none if every value is within the tolerance."""
        return [
            Parting(node=self.nodes[value].name, value=value, error=error)
            for value, error in self.errors.items()
            if error > tolerance >= self.before(value) and self.nodes[value].op_type not in JUMPS
        ][:SHOWN]

    def _above(self, value: str) -> tuple[set[str], list[onnx.NodeProto]]:
        sources, nodes, waiting = set(), [self.nodes[value]], list(self.nodes[value].input)
        while waiting:
            name = waiting.pop()
            if name in self.errors:
                sources.add(name)
            elif name in self.nodes:
                nodes.append(self.nodes[name])
                waiting.extend(self.nodes[name].input)
        return sources, nodes


def inner_errors(
    model: onnx.ModelProto,
    names: Mapping[str, str],
    program: ExportedProgram,
    inputs: Mapping[str, np.ndarray],
    queries: str,
) -> InnerErrors:
    """Compare the inner values of a model with torch's.

    Torch goes on with the queries that the model has chosen, and what follows the choice of detections is not
    compared: among equal scores either may choose another one.

    Args:
        names: node of the program → value of the model, as `to_onnx` gives them.
        inputs: a batch of a size that the program takes.
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
    errors: dict[str, float] = {}
    largest: dict[str, float] = {}

    class Comparison(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            is_choice = n.name == queries
            result = torch.from_numpy(found[names[queries]]) if is_choice else super().run_node(n)
            value = names.get(n.name)
            if value in found and isinstance(result, Tensor):
                largest[value] = float(result.abs().max()) if result.numel() else 0.0
                errors[value] = _error(result, largest[value], found.pop(value))
            return result

    with torch.inference_mode():
        Comparison(program.module()).run(*(torch.from_numpy(value) for value in inputs.values()))
    return InnerErrors(errors, largest, produced)


def _n_elements(node: fx.Node, batch: int) -> int:
    value = node.meta.get("val")
    sides = value.shape if isinstance(value, Tensor) else ()
    return math.prod(side if isinstance(side, int) else batch for side in sides)


def _error(expected: Tensor, largest: float, values: np.ndarray) -> float:
    found = torch.from_numpy(values)
    if expected.shape != found.shape:
        return math.inf
    difference = (expected.float() - found.float()).abs_()
    if not difference.isfinite().all():
        return 0.0 if expected.equal(found.to(expected.dtype)) else math.inf
    return float(difference.max()) / max(largest, 1e-6) if found.numel() else 0.0
