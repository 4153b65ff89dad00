"""MHR on a CUDA device: what a processor cannot show."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import thawline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = [2, 0, 1, 1]


class Net(nn.Module):
    use_reentrant: bool | None = None  # None: no checkpoint

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(96, 80), nn.Linear(80, 64)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.last(self.first(x).relu())
        return self.last(checkpoint(self.first, x, use_reentrant=self.use_reentrant).relu())


def routed(dtype: torch.dtype, device: str = "cuda", **changes) -> peft.PeftModel:
    """B random, so that tasks differ; the same numbers on every device."""
    torch.manual_seed(0)
    settings = {"r": 4, "n_tasks": 3, "n_skills": 5, "n_heads": 8, "routing_init": 2.0, "init_weights": False}
    config = thawline.MHRConfig(**{**settings, "target_modules": ["first", "last"], **changes})
    return peft.get_peft_model(Net(), config).to(device=device, dtype=dtype).train()


def inputs(device: str = "cuda", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(4, 7, 96, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype).requires_grad_()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).float().square().sum().backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_the_processor(dtype: torch.dtype) -> None:
    found = {}
    for device in ("cuda", "cpu"):
        model = routed(dtype, device=device)
        thawline.set_task_ids(model, IDS)
        found[device] = gradients(model, inputs(device, dtype))
    assert found["cuda"].keys() == found["cpu"].keys()
    for name, expected in found["cpu"].items():
        # bf16 keeps 8 bits: each product is rounded once on either side.
        tolerance = 5e-2 if dtype is torch.bfloat16 else 1e-3
        scale = expected.abs().max().item()
        assert_close(found["cuda"][name], expected, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("noise", ["none", "example", "task"])
def test_no_step_waits_for_the_device_where_ids_lie_on_the_host(noise: str) -> None:
    model, x = thawline.route_by_batch(routed(torch.float32, noise=noise)), inputs()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ids in (IDS, torch.tensor([0, 1, 2, 0]), [1, 1, 1, 1]):
            model(x, task_ids=ids).square().sum().backward()
        with torch.no_grad():
            model.eval()(x, task_ids=IDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_keeps_noise_and_gradients(use_reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = routed(torch.float32, noise="example")
        model.get_base_model().use_reentrant = use_reentrant if checkpointed else None
        thawline.set_task_ids(model, IDS)
        torch.manual_seed(5)
        found.append(gradients(model, inputs()))
    for name, expected in found[0].items():
        assert_close(found[1][name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item(), msg=name)


def test_a_compiled_step_equals_an_eager_one() -> None:
    found = []
    for compiled in (False, True):
        model = routed(torch.float32)
        thawline.set_task_ids(model, IDS)
        found.append(gradients(torch.compile(model, fullgraph=True) if compiled else model, inputs()))
    for (name, expected), got in zip(found[0].items(), found[1].values(), strict=True):
        assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item(), msg=name)


def test_kept_mixtures_follow_a_fused_optimiser() -> None:
    model, x = routed(torch.float32), inputs()
    thawline.set_task_ids(model, IDS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    model.eval()
    before = model(x)
    before.square().sum().backward()
    optimizer.step()
    after = model(x)
    assert not torch.equal(after, before)
    assert_close(model.train()(x), after, rtol=1e-4, atol=1e-4)
