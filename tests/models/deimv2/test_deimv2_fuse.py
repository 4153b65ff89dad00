"""The deployed form: fewer, leaner layers, the same detections."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thawline.models.deimv2.fused.conv import FusedConv
from thawline.models.deimv2.fused.forms import fuse
from thawline.models.deimv2.model import DEIMv2

# Parameters of the authors' deployed graphs, which leave the backbone unfolded.
DEPLOYED = {
    "atto": 494_159,
    "femto": 962_311,
    "pico": 1_514_285,
    "n": 3_571_527,
    "s": 9_707_403,
    "m": 18_106_355,
    "l": 32_178_043,
    "x": 50_260_163,
}


def randomised(name: str) -> DEIMv2:
    """A model whose norms and scales are not at their trivial start."""
    torch.manual_seed(0)
    model = DEIMv2.from_variant(name).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    return model


@pytest.mark.parametrize("name", DEPLOYED)
def test_fused_model_gives_the_same_detections_with_no_more_parameters_than_the_authors(name: str) -> None:
    model = randomised(name).double()
    fused = model.fuse()
    assert sum(p.numel() for p in fused.parameters()) <= DEPLOYED[name]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())  # the original stays
    pixels = torch.rand(2, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        expected, got = model(pixels), fused(pixels)
    # Not to the last digits: parts of the network compute in float32 in either form.
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DEPLOYED)
def test_fused_in_float32_stays_within_a_hundred_thousandth(
    name: str, assert_same_detections: Callable[..., None]
) -> None:
    model = randomised(name)
    # No more tokens than queries: which of two nearly equal tokens is chosen is a matter of rounding.
    pixels = (
        torch.rand(2, 3, 128, 160) if name in ("atto", "femto", "pico", "n") else torch.rand(2, 3, 96, 128)
    )
    with torch.no_grad():
        expected, got = model(pixels), model.fuse()(pixels)
    assert_same_detections(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DEPLOYED)
def test_a_fused_model_keeps_no_tensor_that_inference_does_not_read(name: str) -> None:
    fused = randomised(name).fuse()
    read: set[int] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            read.update(id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        fused(torch.rand(1, 3, 64, 96))
    kept = [*fused.named_parameters(), *fused.named_buffers()]
    assert [name for name, tensor in kept if id(tensor) not in read] == []


def test_a_fused_model_has_nothing_left_to_fuse_or_train() -> None:
    fused = randomised("atto").fuse()
    assert fused.fuse() is fused
    assert not any(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("size", [(64, 96), (128, 32)])
def test_a_stem_in_strips_gives_what_the_whole_gives(size: tuple[int, int]) -> None:
    stem = randomised("pico").backbone.stem
    fused = fuse(copy.deepcopy(stem))
    pixels = torch.rand(2, 3, *size)
    with torch.no_grad():
        for fused.strip_size in (1, 2 * 9 * size[1] // 4, 10**9):  # strips of 8 and 9 rows, and all rows
            torch.testing.assert_close(fused(pixels), stem(pixels), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("channels", "kernel", "groups"), [(6, 3, 1), (16, 3, 16), (12, 1, 1), (6, 1, 2)])
def test_a_convolution_follows_its_weight(channels: int, kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    conv = FusedConv(
        torch.randn(channels, channels // groups, kernel, kernel), torch.randn(channels), groups=groups,
        activation="silu",
    )  # fmt: skip
    for size in (9, 5, 9):
        conv.weight.mul_(1.5)
        x = torch.randn(2, channels, size, size)
        expected = F.silu(F.conv2d(x, conv.weight, conv.bias, groups=groups))
        torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


def test_a_fused_model_serves_several_threads_at_once() -> None:
    fused = randomised("atto").fuse()
    images = [torch.rand(1, 3, 64, 32 * width) for width in (2, 3, 4, 5)]
    with torch.no_grad():
        expected = [fused(image).logits for image in images]

    @torch.no_grad()
    def detect(image: torch.Tensor) -> torch.Tensor:
        return fused(image).logits

    with ThreadPoolExecutor(4) as pool:
        for got, alone in zip(pool.map(detect, images * 5), expected * 5, strict=True):
            torch.testing.assert_close(got, alone, rtol=0, atol=1e-6)


def test_a_fused_model_is_copied_stored_and_loaded(kind_of_model: DEIMv2) -> None:
    fused = kind_of_model.fuse()
    other = copy.deepcopy(fused)
    pixels = torch.rand(3, 3, 64, 96)
    with torch.no_grad():
        expected = fused(pixels).logits
        torch.testing.assert_close(other(pixels).logits, expected, rtol=0, atol=0)
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(pixels).logits.equal(expected)
        other.load_state_dict(fused.state_dict())
        torch.testing.assert_close(other(pixels).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["eager", "fused"])
def test_the_whole_network_is_one_graph(form: str, kind_of_model: DEIMv2) -> None:
    model = kind_of_model.fuse() if form == "fused" else kind_of_model
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        got, expected = compiled(pixels), model(pixels)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["eager", "fused"])
def test_forward_never_waits_for_the_device(form: str, kind_of_model: DEIMv2) -> None:
    model = kind_of_model.fuse() if form == "fused" else kind_of_model
    with torch.no_grad(), NoHostReads():
        model(torch.rand(2, 3, 64, 64))


class NoHostReads(TorchDispatchMode):
    """Fails where the host would have to wait for a value, or for a shape that depends on values."""

    waiting = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.waiting), name
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["lite", "hgnet", "tiny", "dino"])
def kind_of_model(request: pytest.FixtureRequest, build: Callable[..., DEIMv2]) -> DEIMv2:
    torch.manual_seed(0)
    return build(request.param)
