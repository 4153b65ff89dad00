"""PaCA on a CUDA device: what a processor cannot show."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import thawline
from thawline.bench.cases import CASES
from thawline.bench.tuners import measure_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(96, 80), nn.Linear(80, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


def wrapped(dtype: torch.dtype) -> peft.PeftModel:
    torch.manual_seed(0)
    config = thawline.PacaConfig(r=8, target_modules=["first", "last"])
    return peft.get_peft_model(Net().to("cuda", dtype), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_the_dense_one_on_the_chosen_columns(dtype: torch.dtype) -> None:
    model = wrapped(dtype)
    dense = Net().to("cuda", dtype)
    dense.load_state_dict(base_weights(model))
    x = torch.randn(4, 7, 96, device="cuda", dtype=dtype)
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    for name in ("first", "last"):
        layer = model.base_model.model.get_submodule(name)
        index = layer.thawline_paca_indices["default"]
        expected = dense.get_submodule(name).weight.grad[:, index].float()
        # bf16 keeps 8 bits: each product is rounded once on either side.
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        scale = expected.abs().max().item()
        assert_close(
            layer.thawline_paca_delta["default"].grad, expected, rtol=tolerance, atol=tolerance * scale
        )


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_every_step_is_in_the_next_forward(options: dict[str, bool]) -> None:
    model = wrapped(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    x = torch.randn(4, 96, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        before = model(x)
        before.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(model(x), before)
    adapted = model(x)
    assert torch.equal(model.merge_and_unload()(x), adapted)


def test_a_compiled_step_equals_an_eager_one() -> None:
    losses = {}
    for compiled in (False, True):
        model = wrapped(torch.float32)
        call = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        generator = torch.Generator("cuda").manual_seed(0)
        losses[compiled] = []
        for _ in range(4):
            loss = call(torch.randn(8, 96, device="cuda", generator=generator)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(loss.item())
    assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=1e-5, atol=0)


def test_a_step_peaks_below_one_of_lora() -> None:
    record = measure_case(
        CASES["reference"], device=torch.device("cuda"), rounds=0, methods=("floor", "lora", "paca")
    )
    peak = {name: row["memory"]["peak_of_step"] for name, row in record["variants"].items()}
    assert peak["paca"] < peak["lora"]


def base_weights(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    base = model.base_model.model
    return {
        f"{name}.{kind}": getattr(base.get_submodule(name).base_layer, kind).detach().clone()
        for name in ("first", "last")
        for kind in ("weight", "bias")
    }
