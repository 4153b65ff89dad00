"""Cost of a PaCA step beyond a frozen one: operations, and bytes kept for backward. Counted, not timed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.models import tiny_llama
from tests.support.paca import tokens, trainable, wrap
from thawline.measure import count_ops, saved_bytes

LINEARS = 7  # of one Llama block


class Step:
    """Forward from embeddings that require a gradient, so that a frozen model has a backward too."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(trainable(model), fused=True) if trainable(model) else None

    def forward(self) -> torch.Tensor:
        ids = tokens()
        embedded = self.model.get_input_embeddings()(ids).detach().requires_grad_()
        return self.model(inputs_embeds=embedded, labels=ids).loss

    def operations(self) -> tuple[int, int]:
        forward, loss = count_ops(self.forward)
        backward, _ = count_ops(loss.backward)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return forward, backward


def frozen(dtype: torch.dtype) -> nn.Module:
    return tiny_llama().to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_seven_linears_adds_at_most_7_operations_forward_and_16_backward(dtype):
    floor, paca = Step(frozen(dtype)), Step(wrap(frozen(dtype)))
    for _ in range(3):
        floor_forward, floor_backward = floor.operations()
        forward, backward = paca.operations()
    blocks = 2
    assert forward - floor_forward <= 7 * blocks
    assert backward - floor_backward <= 16 * blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward_is_the_floor_and_the_selected_inputs(dtype):
    model = wrap(frozen(dtype), r=3)
    base = frozen(dtype)
    n_tokens = tokens().numel()
    floor = saved_bytes(Step(base).forward, base.parameters())
    paca = saved_bytes(Step(model).forward, model.parameters())
    assert paca - floor <= 2 * LINEARS * n_tokens * 3 * torch.finfo(dtype).bits // 8


def test_no_whole_input_of_an_adapted_layer_is_kept():
    # down_proj's input, 36 wide, is nobody else's to keep: LoRA keeps it, PaCA must not.
    model, kept = wrap(tiny_llama(), target_modules=["down_proj"]), []
    step = Step(model)
    inputs = []
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )  # held, or its place is used again
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        step.forward()
    assert inputs
    assert not {x.data_ptr() for x in inputs} & set(kept)
