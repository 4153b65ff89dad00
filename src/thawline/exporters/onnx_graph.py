"""From torch's exported program to an ONNX model, one short rule per operation.

Our own instead of `torch.onnx`, as tried with torch 2.13, onnxscript 0.7, onnx 1.23 on size Atto:

- asked for opset 17 it writes 18 and goes on, since onnx has no converter of Pad back to 17;
- on top of `torch.export`, which both need, it takes four times as long again; this, a tenth of a second;
- its graph has as many nodes (531 to 544), so it is no faster to run;
- its values lose their relation to the program's nodes. Here it is kept, so that a runtime's values can be
  compared with torch's one by one.

What depends on no input is computed here; a shape is a constant in which -1 stands for the batch.
"""

from __future__ import annotations

__all__ = ["Translated", "to_onnx"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx
from torch.export import ExportedProgram

from thawline.errors import ConfigError
from thawline.exporters.settings import OPSETS

BATCH = "N"
"""Name of the batch dimension."""
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


@dataclass(frozen=True)
class Translated:
    """An ONNX model, and which of its values are values of the program."""

    model: onnx.ModelProto
    names: Mapping[str, str]
    """Name of a node of the program → name of the value in the model, in the order of computation."""


def to_onnx(
    program: ExportedProgram, outputs: Sequence[str], opset: int, metadata: Mapping[str, str]
) -> Translated:
    """Translate.

    Args:
        program: of a module whose inputs are its only state that changes.
        outputs: names of the program's outputs, in order.
        opset: 17, 18 or 19.
        metadata: names and values to store in the file.
    Raises: ConfigError: an operation has no rule here.
    """
    graph = _Graph(program, opset)
    graph.translate()
    model = graph.finish(outputs)
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    names = {name: value for name, value in graph.names.items() if value in graph.used}
    return Translated(model, names)


class Name(str):
    """Name of a value of the model; a plain string is an argument of torch's."""


class _Graph:
    """Nodes so far, and the value of each node of the program: a name, several, or a constant tensor."""

    def __init__(self, program: ExportedProgram, opset: int) -> None:
        self.program, self.opset = program, opset
        self.values: dict[fx.Node, Any] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Tensor] = {}
        self.constant_names: dict[tuple[Any, ...], str] = {}
        self.names: dict[str, str] = {}
        self.used: set[str] = set()
        self.node: fx.Node

    def translate(self) -> None:
        signature = self.program.graph_signature
        state = {**self.program.state_dict, **self.program.constants}
        kept = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        kept |= signature.inputs_to_lifted_tensor_constants
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                is_state = node.name in kept
                self.values[node] = state[kept[node.name]].detach() if is_state else Name(node.name)
            elif (
                node.op == "call_function"
                and node.target is not torch.ops.aten._assert_tensor_metadata.default
            ):
                value = self._call(node)
                self.values[node] = value
                if _operation(node).endswith("_"):  # in place: its first argument changed too
                    self.values[node.args[0]] = value
                if isinstance(value, Name):
                    self.names[node.name] = value

    def finish(self, outputs: Sequence[str]) -> onnx.ModelProto:
        (end,) = (node for node in self.program.graph.nodes if node.op == "output")
        results = [self.values[node] for node in end.args[0]]
        nodes = [
            helper.make_node("Identity", [a], [b], name=b) for a, b in zip(results, outputs, strict=True)
        ]
        self.used = set(results)
        for node in reversed(self.nodes):
            if self.used & set(node.output):
                self.used |= set(node.input)
                nodes.insert(0, node)
        inputs = [
            n for n in self.program.graph.nodes if n.op == "placeholder" and isinstance(self.values[n], Name)
        ]
        graph = helper.make_graph(
            nodes,
            "thawline",
            [_info(node.name, node) for node in inputs],
            [_info(name, node) for name, node in zip(outputs, end.args[0], strict=True)],
            [numpy_helper.from_array(_array(t), n) for n, t in self.constants.items() if n in self.used],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=OPSETS[self.opset])

    def emit(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Append an ONNX node; returns the name of its output, or a list of several."""
        path = _module_path(self.node)
        count = len(self.nodes)
        names = [Name(f"{self.node.name}.{count}.{i}") for i in range(outputs)]
        wired = ["" if value is None else self.name_of(value) for value in inputs]
        self.nodes.append(helper.make_node(op, wired, names, name=f"{path}/{op}.{count}", **attributes))
        return names if outputs > 1 else names[0]

    def name_of(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """Return the name of a value; constants become initializers, equal small ones the same."""
        if isinstance(value, Name):
            return value
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=dtype or self.dtype)
        key = (
            value.dtype,
            tuple(value.shape),
            tuple(value.flatten().tolist()) if value.numel() < 9 else id(value),
        )
        if key not in self.constant_names:
            name = f"constant.{len(self.constants)}"
            self.constant_names[key], self.constants[name] = name, value
        return self.constant_names[key]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the node's result, or of its first input where that is no tensor."""
        found = self.node.meta["val"]
        found = found if isinstance(found, Tensor) else self.node.args[0].meta["val"]
        return found.dtype

    def shape(self, node: fx.Node | None = None) -> list[int]:
        """Shape of a node's result, -1 for the batch or a multiple of it."""
        sides = (node or self.node).meta["val"].shape
        return [side if isinstance(side, int) else -1 for side in sides]

    def reduce(self, op: str, x: str, dims: Sequence[int], keepdim: bool) -> str:
        """Append a reduction: its axes are an input since opset 18."""
        if self.opset < 18 and op != "ReduceSum":
            return self.emit(op, x, axes=list(dims), keepdims=int(keepdim))
        return self.emit(op, x, torch.tensor(list(dims)), keepdims=int(keepdim))

    def _call(self, node: fx.Node) -> Any:
        args, keywords = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        if not _holds_name((args, keywords)):
            return node.target(*args, **keywords)
        if _operation(node) == "getitem":
            return args[0][args[1]]
        rule = RULES.get(_operation(node).removesuffix("_"))
        if rule is None:
            raise ConfigError(f"'{node.target}' has no ONNX form here: {_module_path(node)}.")
        return rule(self, *args, **keywords)


def _operation(node: fx.Node) -> str:
    """Return torch's name of an operation, without its overload."""
    return node.target.__name__.partition(".")[0]


def _holds_name(value: Any) -> bool:
    if isinstance(value, Name):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_name, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds_name, value))


def _module_path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0].replace("L['self'].", "") if stack and stack[-1][0] else "graph"


def _info(name: str, node: fx.Node) -> onnx.ValueInfoProto:
    value = node.meta["val"]
    shape = [side if isinstance(side, int) else BATCH for side in value.shape]
    return helper.make_tensor_value_info(name, TYPES[value.dtype], shape)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().contiguous().numpy())


# Rules: from the arguments of torch's operation to names of values.


def _reshape(g: _Graph, x: str, *_: Any) -> str:
    return g.emit("Reshape", x, torch.tensor(g.shape()))


def _permute(g: _Graph, x: str, dims: Sequence[int]) -> str:
    return g.emit("Transpose", x, perm=list(dims))


def _transpose(g: _Graph, x: str, first: int, second: int) -> str:
    order = list(range(len(g.shape())))
    order[first], order[second] = order[second], order[first]
    return g.emit("Transpose", x, perm=order)


def _split(g: _Graph, x: str, _: Any, dim: int = 0) -> list[str]:
    sizes = [part.shape[dim] for part in g.node.meta["val"]]
    return g.emit("Split", x, torch.tensor(sizes), outputs=len(sizes), axis=dim)


def _slice(g: _Graph, x: str, dim: int, start: int | None = None, end: int | None = None) -> str:
    bounds = [torch.tensor([value]) for value in (start or 0, min(end or 2**31, 2**31), dim)]
    return g.emit("Slice", x, *bounds)


def _stack(g: _Graph, parts: Sequence[str], dim: int = 0) -> str:
    axis = torch.tensor([dim])
    return g.emit("Concat", *(g.emit("Unsqueeze", part, axis) for part in parts), axis=dim)


def _pad(g: _Graph, x: str, pads: Sequence[int], mode: str = "constant", value: float | None = None) -> str:
    pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    pairs = [(0, 0)] * (len(g.shape()) - len(pairs)) + pairs
    return g.emit(
        "Pad", x, torch.tensor([a for a, _ in pairs] + [b for _, b in pairs]), value or 0.0, mode=mode
    )


def _conv(
    g: _Graph, x: str, weight: Tensor, bias: Tensor | None = None, stride: Any = (1, 1),
    padding: Any = (0, 0), dilation: Any = (1, 1), groups: int = 1,
) -> str:  # fmt: skip
    return g.emit(
        "Conv", x, weight, bias, strides=list(stride), pads=[*padding, *padding], dilations=list(dilation),
        group=groups, kernel_shape=list(weight.shape[2:]),
    )  # fmt: skip


def _linear(g: _Graph, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
    product = g.emit("MatMul", x, weight.T)
    return product if bias is None else g.emit("Add", product, bias)


def _layer_norm(g: _Graph, x: str, _: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5, *__: Any) -> str:
    return g.emit("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps)


def _gelu(g: _Graph, x: str) -> str:
    """Spell the exact form as runtimes recognise it."""
    wave = g.emit("Erf", g.emit("Div", x, math.sqrt(2)))
    return g.emit("Mul", g.emit("Mul", x, g.emit("Add", wave, 1.0)), 0.5)


def _clamp(g: _Graph, x: str, low: float | None = None, high: float | None = None) -> str:
    limits = [None if limit in (None, math.inf, -math.inf) else limit for limit in (low, high)]
    return g.emit("Clip", x, *limits)


def _pool(op: str) -> Callable[..., str]:
    def rule(g: _Graph, x: str, kernel: Any, stride: Any = None, padding: Any = (0, 0), *_: Any) -> str:
        pads = [*padding, *padding]
        extra = {"count_include_pad": 1} if op == "AveragePool" else {}
        return g.emit(op, x, kernel_shape=list(kernel), strides=list(stride or kernel), pads=pads, **extra)

    return rule


def _resize(mode: str) -> Callable[..., str]:
    place = {"nearest": "asymmetric", "linear": "half_pixel"}[mode]

    def rule(g: _Graph, x: str, *_: Any) -> str:
        before, after = g.shape(g.node.args[0]), g.shape()
        scales = torch.tensor([1.0, 1.0, *(b / a for a, b in zip(before[2:], after[2:], strict=True))])
        kind: dict[str, Any] = {"nearest_mode": "floor"} if mode == "nearest" else {}
        return g.emit("Resize", x, None, scales, mode=mode, coordinate_transformation_mode=place, **kind)

    return rule


def _grid_sample(g: _Graph, x: str, grid: str, mode: int, padding: int, align_corners: bool) -> str:
    if (mode, padding) != (0, 0):
        raise ConfigError("Only bilinear sampling with zeros outside is translated.")
    return g.emit(
        "GridSample", x, grid, mode="bilinear", padding_mode="zeros", align_corners=int(align_corners)
    )


def _gather(g: _Graph, x: str, dim: int, index: str) -> str:
    """Whole rows by one index each, instead of an index repeated along the row."""
    expanded = g.node.args[2]
    is_rows = dim == 1 and expanded.target is torch.ops.aten.expand.default
    if not is_rows:
        return g.emit("GatherElements", x, index, axis=dim)
    return g.emit("GatherND", x, g.values[expanded.args[0]], batch_dims=1)


def _mean(g: _Graph, x: str, dims: Sequence[int], keepdim: bool = False) -> str:
    if list(dims) == [2, 3] and keepdim:
        return g.emit("GlobalAveragePool", x)
    return g.reduce("ReduceMean", x, dims, keepdim)


def _plain(op: str) -> Callable[..., str]:
    """Make a rule for an operation on one or two tensors, some of them numbers."""
    return lambda g, *inputs, **_: g.emit(op, *inputs)


RULES: dict[str, Callable[..., Any]] = {
    **{name: _plain(op) for name, op in {
        "abs": "Abs", "add": "Add", "div": "Div", "exp": "Exp", "floor": "Floor", "log": "Log",
        "matmul": "MatMul", "minimum": "Min", "mul": "Mul", "neg": "Neg", "relu": "Relu",
        "sigmoid": "Sigmoid", "sqrt": "Sqrt",
        "sub": "Sub", "where": "Where",
    }.items()},
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten"), _reshape),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "amax": lambda g, x, dims, keepdim=False: g.reduce("ReduceMax", x, dims, keepdim),
    "avg_pool2d": _pool("AveragePool"),
    "cat": lambda g, parts, dim=0: g.emit("Concat", *parts, axis=dim),
    "clamp": _clamp,
    "contiguous": lambda g, x: x,
    "conv2d": _conv,
    "expand": lambda g, x, sizes: g.emit("Expand", x, torch.tensor([1 if s == -1 else s for s in sizes])),
    "gather": _gather,
    "gelu": _gelu,
    "grid_sampler": _grid_sample,
    "index": lambda g, table, index: g.emit("Gather", table, index[0], axis=0),
    "layer_norm": _layer_norm,
    "linear": _linear,
    "max_pool2d": _pool("MaxPool"),
    "mean": _mean,
    "pad": _pad,
    "permute": _permute,
    "rsub": lambda g, x, value: g.emit("Sub", value, x),
    "silu": lambda g, x: g.emit("Mul", x, g.emit("Sigmoid", x)),
    "slice": _slice,
    "softmax": lambda g, x, dim: g.emit("Softmax", x, axis=dim),
    "squeeze": lambda g, x, dim: g.emit("Squeeze", x, torch.tensor([dim])),
    "stack": _stack,
    "sum": lambda g, x, dims, keepdim=False: g.reduce("ReduceSum", x, dims, keepdim),
    "to": lambda g, x, dtype, *_: g.emit("Cast", x, to=TYPES[dtype]),
    "topk": lambda g, x, k, dim=-1: g.emit("TopK", x, torch.tensor([k]), outputs=2, axis=dim),
    "transpose": _transpose,
    "unsqueeze": lambda g, x, dim: g.emit("Unsqueeze", x, torch.tensor([dim])),
    "upsample_bilinear2d": _resize("linear"),
    "upsample_nearest2d": _resize("nearest"),
}  # fmt: skip
"""Name of torch's operation → rule."""
