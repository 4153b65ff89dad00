"""The certificate passes equal files, and catches every fault that exporters and runtimes are known for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, numpy_helper

from tests.exporters.conftest import build_detector
from thawline.exporters.certificate import compare, generated_images
from thawline.exporters.job import Job, Samples
from thawline.exporters.onnx_graph import Translated
from thawline.exporters.settings import Settings
from thawline.sessions import Session, open_onnx


@pytest.fixture(scope="module")
def job() -> Job:
    model = build_detector("hgnet")
    return Job(model, Settings(), Samples(*generated_images(3, (64, 64)), "generated"), Path("m.onnx"))


@pytest.fixture(scope="module")
def translated(job: Job) -> Translated:
    return job.translate()


def nodes(model: ModelProto, op: str, where: str = "") -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == op and where in node.name]


def set_attribute(node: NodeProto, **values: object) -> None:
    kept = [a for a in node.attribute if a.name not in values]
    del node.attribute[:]
    node.attribute.extend(
        [*kept, *(onnx.helper.make_attribute(name, value) for name, value in values.items())]
    )


def change_input(
    model: ModelProto, node: NodeProto, index: int, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Give a node its own changed copy of a constant."""
    (value,) = (v for v in model.graph.initializer if v.name == node.input[index])
    name = f"changed.{node.name}.{index}"
    changed = np.ascontiguousarray(change(numpy_helper.to_array(value).copy()))
    model.graph.initializer.append(numpy_helper.from_array(changed, name))
    node.input[index] = name


def module_of(name: str) -> str:
    return name.partition("/")[0]


def swap_inputs(node: NodeProto) -> None:
    node.input[0], node.input[1] = node.input[1], node.input[0]


def shift_grid(model: ModelProto) -> None:
    """Half a cell of the finer map: what a runtime does that confuses centres with corners."""
    change_input(model, nodes(model, "Sub", "layers.0.cross_attn")[0], 1, lambda one: one + 1 / 8)


def flip_classes(model: ModelProto) -> None:
    product, add = nodes(model, "MatMul", "score_head")[-1], nodes(model, "Add", "score_head")[-1]
    change_input(model, product, 1, lambda w: w[:, ::-1])
    change_input(model, add, 1, lambda b: b[::-1])


def round_off(weight: np.ndarray) -> np.ndarray:
    step = weight.std() / 2
    return (weight / step).round() * step


def drop_sigmoid(model: ModelProto) -> None:
    (last,) = (n for n in nodes(model, "Sigmoid") if n.name.startswith("graph/"))
    last.op_type = "Identity"


def repeat_first_image(model: ModelProto) -> None:
    """A batch that the exporter has taken for one: every image gets the detections of the first."""
    stem = nodes(model, "Conv")[0]
    first = onnx.helper.make_node("Slice", [stem.input[0], "zero", "one", "zero"], ["first"], name="first")
    copies = onnx.helper.make_node("Sub", [stem.input[0], stem.input[0]], ["nothing"], name="nothing")
    repeated = onnx.helper.make_node("Add", ["nothing", "first"], ["repeated"], name="repeated")
    for name, number in (("zero", 0), ("one", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([number]), name))
    stem.input[0] = "repeated"
    for node in (repeated, copies, first):
        model.graph.node.insert(0, node)


FAULTS: dict[str, Callable[[ModelProto], object]] = {
    "align_corners flipped": lambda m: set_attribute(nodes(m, "GridSample")[0], align_corners=1),
    "padding by border": lambda m: [set_attribute(n, padding_mode="border") for n in nodes(m, "GridSample")],
    "nearest sampling": lambda m: set_attribute(nodes(m, "GridSample")[0], mode="nearest"),
    "half-pixel shift": shift_grid,
    "x and y swapped": lambda m: swap_inputs(nodes(m, "Concat", "layers.0.cross_attn")[0]),
    "bias of a convolution dropped": lambda m: change_input(m, nodes(m, "Conv", "enc")[0], 2, np.zeros_like),
    "bias of a linear dropped": lambda m: change_input(m, nodes(m, "Add", "bbox_head")[-1], 1, np.zeros_like),
    "kernel flipped": lambda m: change_input(m, nodes(m, "Conv")[0], 1, lambda w: w[:, :, ::-1]),
    "channels of the image as BGR": lambda m: change_input(m, nodes(m, "Conv")[0], 1, lambda w: w[:, ::-1]),
    "smallest instead of largest queries": lambda m: set_attribute(nodes(m, "TopK")[0], largest=0),
    "smallest instead of largest scores": lambda m: set_attribute(nodes(m, "TopK", "graph/")[0], largest=0),
    "classes permuted": flip_classes,
    "no sigmoid": drop_sigmoid,
    "softmax over the wrong axis": lambda m: set_attribute(nodes(m, "Softmax", "self_attn")[0], axis=-2),
    "overflow": lambda m: change_input(m, nodes(m, "Conv", "encoder")[2], 1, lambda w: w * np.float32(1e38)),
    "activation limit moved": lambda m: change_input(m, nodes(m, "Clip", "backbone")[0], 1, lambda v: v - 1),
    "upsampling off by one": lambda m: set_attribute(
        nodes(m, "Resize")[0], coordinate_transformation_mode="align_corners"
    ),
    "convolution padded on the wrong side": lambda m: set_attribute(nodes(m, "Conv")[0], pads=[0, 0, 2, 2]),
    "one batch for all": repeat_first_image,
    "weights in few bits": lambda m: change_input(m, nodes(m, "MatMul", "enc_bbox_head")[0], 1, round_off),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_caught_and_located(fault: str, job: Job, translated: Translated) -> None:
    model = ModelProto.FromString(translated.model.SerializeToString())
    FAULTS[fault](model)
    before = {node.name: node.SerializeToString() for node in translated.model.graph.node}
    touched = {
        module_of(node.name) for node in model.graph.node if node.SerializeToString() != before.get(node.name)
    }
    job.certify(model, translated)
    assert not job.report.passed
    partings = job.report.first_partings
    assert not partings or touched & {module_of(parting.node) for parting in partings}, partings


def test_equal_file_passes_and_parts_nowhere(job: Job, translated: Translated) -> None:
    job.certify(translated.model, translated)
    assert job.report.passed
    assert max(row.box_error_px for row in job.report.rows) < 0.05


def test_detections_with_equal_scores_may_come_in_any_order(job: Job, translated: Translated) -> None:
    session = open_onnx(translated.model.SerializeToString())

    def backwards(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value[:, ::-1].copy() for name, value in session(inputs).items()}

    own = open_onnx(translated.model.SerializeToString(), also=[translated.names[job.queries]])
    choices = Session(own.inputs, lambda given: {"queries": own.call(given)[translated.names[job.queries]]})
    row = compare(Session(session.inputs, backwards), lambda: choices, job.reference, 3, "fp32", 0.5)
    assert row.box_error_px < 0.05
    assert row.agreement == 1
