"""Cost of an MHR layer, counted: operations, waits for the device, and bytes kept for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.mhr import one_linear
from thawline import set_task_ids

VIEWS = {
    "view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "as_strided",
    "detach", "alias", "split", "unbind", "_unsafe_view", "_reshape_alias", "unflatten", "split_with_sizes",
}  # fmt: skip


SYNCS = {"_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select", "is_nonzero", "item"}


class Ops(TorchDispatchMode):
    """Names of the operators that run, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "ids", [list(range(8)), [0, 1, 0, 2, 0, 1, 0, 2], [3] * 8], ids=["all", "some", "one"]
)
@pytest.mark.parametrize("noise", ["none", "example"])
def test_a_training_forward_is_few_operators_and_never_waits_for_the_device(
    ids: list[int], noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = one_linear(noise=noise)
    set_task_ids(model, ids)
    for method in ("tolist", "cpu", "item", "numpy", "__bool__", "__int__", "unique"):
        monkeypatch.setattr(Tensor, method, lambda *_: pytest.fail("the host waits for the device"))
    with Ops() as ops:
        model(x)
    assert not SYNCS & set(ops.names)
    assert len(ops.names) <= 14, ops.names
    if noise == "none":
        assert len(ops.names) <= (13 if len(set(ids)) == 3 else 11), (
            ops.names
        )  # rows shared by some: two look-ups


def test_little_is_kept_for_backward_and_no_copy_of_the_input() -> None:
    model, x = one_linear(1024, 256)
    set_task_ids(model, list(range(8)))
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert sum(kept.values()) <= 0.35 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_mixes_nothing_twice(dtype: torch.dtype) -> None:
    model, x = one_linear()
    model = model.to(dtype).eval()
    set_task_ids(model, 3)
    x = x.detach().to(dtype)[:, :1]
    with torch.no_grad():
        model(x)
        with Ops() as ops:
            model(x)
    assert len(ops.names) == 3, ops.names  # the base, x A, and its product with B added in place
