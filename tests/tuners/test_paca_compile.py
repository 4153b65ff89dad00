"""Compiled whole: no graph break, no recompilation, the losses of eager, no copy of a weight in the graph."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support.models import VOCAB, tiny_llama
from tests.support.paca import IN, B, Net, loss_of, same, trainable, weights, wrap


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


class Graphs:
    """A backend that runs eagerly what AOTAutograd traced, and keeps it."""

    def __init__(self) -> None:
        self.traced: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph, inputs):
        self.traced.append(graph)
        return graph.forward


def steps(model, run, n: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02, fused=True)
    losses = []
    for step in range(n):
        loss = loss_of(run, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_compiled_training_is_eager_training_in_one_graph():
    base = tiny_llama(num_hidden_layers=1, use_cache=False)
    before = weights(base)
    eager = wrap(tiny_llama(num_hidden_layers=1, use_cache=False), alpha=6)
    expected = steps(eager, eager, 6)

    model, graphs = wrap(base, alpha=6), Graphs()
    counter = CompileCounterWithBackend(graphs.backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled.config = model.config
    losses = steps(model, compiled)
    assert counter.frame_count == 1

    # A checkpoint holds the original weights, and what was compiled goes on with the changed ones.
    state = {
        k.replace("base_layer.", ""): v
        for k, v in model.base_model.model.state_dict().items()
        if "paca" not in k
    }
    assert same(state, before)
    with torch.no_grad():
        after = loss_of(compiled, 4).item()
    assert [*losses, after] == pytest.approx(expected[:5], rel=1e-6)  # bit-equal with torch 2.13
    assert same(weights(model.unload()), before)

    # No operation makes a tensor of the shape of an adapted weight, other than views of it.
    shapes = {tuple(w.shape) for n, w in before.items() if "layers" in n and w.dim() == 2}
    for graph in graphs.traced:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if (
                node.op == "call_function"
                and isinstance(value, torch.Tensor)
                and tuple(value.shape) in shapes
            ):
                assert node.target in VIEWS, node.format_node()
    assert VOCAB not in {s for shape in shapes for s in shape}


VIEWS = {
    torch.ops.aten.t.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.detach.default,
}


def test_adapters_switched_off_and_on_after_compiling():
    base, x = Net(), torch.randn(B, IN)
    expected = base(x)
    model = wrap(base, init_weights=False)
    compiled = torch.compile(model, backend="aot_eager")
    adapted = compiled(x)
    assert torch.equal(adapted, model(x))
    with model.disable_adapter():
        assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), adapted)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(twin(x), adapted) for twin in twins)
    assert all(torch.equal(twin.unload()(x), expected) for twin in twins)
    assert torch.equal(compiled(x), adapted)
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items() if "delta" in k}, strict=False)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), adapted)


def test_a_compiled_optimiser_step_is_noticed():
    model = wrap(Net())
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02, foreach=True)
    step = torch.compile(optimizer.step, backend="eager")
    before = loss_of(model)
    before.backward()
    step()
    assert loss_of(model).item() < before.item()
