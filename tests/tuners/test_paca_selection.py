"""Choice of columns: stable seeds, scores against slow loops, and refused input."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import thawline
from tests.support.models import tiny_llama
from tests.support.paca import IN, B, Net, T, loss_of, tokens, weights, wrap
from thawline import ConfigError, DataError, PacaConfig
from thawline.tuners.paca.selection import SELECTIONS, choose_columns


def columns(model: nn.Module) -> dict[str, list[int]]:
    return {
        n.removeprefix("base_model.model."): m.thawline_paca_indices["default"].tolist()
        for n, m in model.named_modules()
        if hasattr(m, "thawline_paca_indices")
    }


def test_random_columns_are_these_for_ever():
    # Written down from the first version: a checkpoint's config, without its file, must mean the same
    # columns.
    weight = torch.empty(3, 64)
    assert SELECTIONS["random"](weight, 5, "model.layers.0.mlp.up_proj", 0).tolist() == [8, 13, 32, 38, 62]
    assert SELECTIONS["random"](weight, 5, "model.layers.0.mlp.up_proj", 7).tolist() == [7, 32, 38, 41, 49]


def test_random_columns_depend_on_seed_and_name_and_nothing_else():
    torch.manual_seed(1)
    first = columns(wrap(tiny_llama()))
    torch.manual_seed(2)
    assert columns(wrap(tiny_llama())) == first
    assert columns(wrap(tiny_llama().bfloat16())) == first
    assert columns(wrap(tiny_llama(), seed=1)) != first
    assert len({tuple(c) for n, c in first.items() if not n.endswith("down_proj")}) > 6
    assert all(c == sorted(set(c)) and len(c) == 4 for c in first.values())


def test_adjacent_columns_are_one_block_and_these_for_ever():
    adjacent, weight = SELECTIONS["adjacent"], torch.empty(3, 64)
    assert adjacent(weight, 5, "model.layers.0.mlp.up_proj", 0).tolist() == [45, 46, 47, 48, 49]
    assert adjacent(weight, 5, "model.layers.0.mlp.up_proj", 7).tolist() == [15, 16, 17, 18, 19]
    firsts = {adjacent(weight, 5, str(name), 0)[0].item() for name in range(500)}
    assert firsts == set(range(0, 60, 5))  # every block that fits
    for r in (1, 64):
        chosen = adjacent(weight, r, "layer", 0)
        assert torch.equal(chosen, torch.arange(chosen[0], chosen[0] + r))


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(9, 5), lambda: Conv1D(5, 9), lambda: nn.Conv2d(9, 5, 2)],
    ids=["Linear", "Conv1D", "Conv2d"],
)
def test_weight_norm_takes_the_columns_of_largest_norm(make):
    layer = make()
    norms = [
        (layer.weight[j] if isinstance(layer, Conv1D) else layer.weight[:, j]).norm().item() for j in range(9)
    ]
    best = sorted(sorted(range(9), key=lambda j: -norms[j])[:3])
    model = get_peft_model(
        nn.Sequential(layer), PacaConfig(r=3, target_modules=["0"], selection="weight_norm")
    )
    assert columns(model) == {"0": best}


def test_explicit_columns_by_name_or_pattern():
    model = wrap(
        tiny_llama(), selection="explicit", indices={r".*layers\.0\..*": [9, 0, 4, 2], ".*": [1, 3, 5, 7]}
    )
    for name, chosen in columns(model).items():
        assert chosen == ([0, 2, 4, 9] if ".0." in name else [1, 3, 5, 7])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1, 1, 2], r"indices of 'layer' repeat \[1\]"),
        ([0, 1, 2, 8], r"indices \[8\] of 'layer' are outside its input features, 0 to 7"),
        ([-1, 1, 2, 3], r"indices \[-1\] of 'layer'"),
        ([0, 1], r"r=4 but 2 indices for 'layer'. Set r=2"),
    ],
)
def test_bad_indices_are_named(indices, message):
    with pytest.raises(ConfigError, match=message):
        choose_columns(torch.empty(3, 8), 4, "layer", "explicit", 0, indices)


def test_a_module_without_indices_is_named():
    with pytest.raises(ConfigError, match="no columns for 'second'"):
        wrap(Net(), selection="explicit", indices={"first": [0, 1, 2, 3]})


@pytest.mark.parametrize("selection", ["activation", "gradient"])
def test_data_driven_selection_without_data_says_how(selection):
    with pytest.raises(ConfigError, match=r"'first'.*thawline.select_columns\(model, config, batches\)"):
        wrap(Net(), selection=selection)


def test_weight_norm_of_weights_that_are_not_there_is_refused():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ConfigError, match="'first', which are not loaded"):
        wrap(model, selection="weight_norm")


# Calibration.


def config_for(selection: str, **fields) -> PacaConfig:
    return PacaConfig(**({"r": 3, "target_modules": ["first", "second"], "selection": selection} | fields))


def best(scores: torch.Tensor, r: int = 3) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j].item(), j))[:r])


def test_activation_takes_the_inputs_of_most_energy():
    model, batches = Net(), [torch.randn(B, T, IN) * torch.rand(IN) for _ in range(3)]
    config = thawline.select_columns(model, config_for("activation"), batches)
    first = sum(x.square().sum((0, 1)) for x in batches)
    second = sum(torch.tanh(model.first(x)).square().sum((0, 1)) for x in batches)
    assert config.indices == {"first": best(first), "second": best(second)}
    assert columns(wrap(model, r=3, selection="activation", indices=config.indices)) == config.indices


def test_gradient_takes_the_columns_of_steepest_descent():
    model, batches = Net(), [torch.randn(B, T, IN) for _ in range(3)]
    config = thawline.select_columns(
        model, config_for("gradient"), batches, loss_fn=lambda output, batch: output.square().mean()
    )
    scores = {"first": 0.0, "second": 0.0}
    for x in batches:
        model.zero_grad()
        model(x).square().mean().backward()
        for name in scores:
            scores[name] = scores[name] + getattr(model, name).weight.grad.square().sum(0)
    assert config.indices == {name: best(score) for name, score in scores.items()}


@pytest.mark.parametrize("selection", ["activation", "gradient"])
@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6)],
    ids=["plain", "grouped", "depthwise"],
)
def test_calibration_of_convolutions(selection, conv):
    x = torch.randn(2, 6, 7, 7) * torch.tensor([1.0, 9, 1, 5, 1, 1]).view(6, 1, 1)
    model = nn.Sequential(conv)
    config = thawline.select_columns(
        model,
        PacaConfig(r=1, target_modules=["0"], selection=selection),
        [x],
        loss_fn=lambda y, _: y.square().mean(),
    )
    local = 3 if conv.groups == 2 else 6
    if selection == "activation":
        energy = x.square().sum((0, 2, 3)).view(-1, local).sum(0)
        assert config.indices == {"0": best(energy, 1)}
    get_peft_model(model, config)(x)


@pytest.mark.parametrize("selection", ["activation", "gradient"])
def test_calibration_leaves_the_model_as_it_was(selection):
    model = tiny_llama(attention_dropout=0.5).train()
    model.lm_head.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(24)
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    ids = tokens()
    config = PacaConfig(r=4, target_modules="all-linear", selection=selection)
    chosen = thawline.select_columns(model, config, [{"input_ids": ids, "labels": ids}] * 2)
    assert chosen is not config
    assert config.indices is None
    assert len(chosen.indices) == 14
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training
    assert torch.equal(model.model.norm.weight.grad, torch.ones(24))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "model.norm.weight")
    assert not any(m._forward_pre_hooks for m in model.modules())
    loss_of(get_peft_model(model, chosen)).backward()


def test_calibration_says_what_is_missing():
    model, x = Net(), torch.randn(B, IN)
    with pytest.raises(ConfigError, match="selection='random' needs no data"):
        thawline.select_columns(model, config_for("random"), [x])
    with pytest.raises(DataError, match="`batches` is empty"):
        thawline.select_columns(model, config_for("activation"), [])
    with pytest.raises(ConfigError, match="needs a loss"):
        thawline.select_columns(model, config_for("gradient"), [x])
    with pytest.raises(ConfigError, match=r"r=11 is more than the 10 input features of 'second'"):
        thawline.select_columns(model, config_for("activation", r=11), [x])
    model.unused = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="No batch reached 'unused'"):
        thawline.select_columns(model, config_for("activation", target_modules=["unused"]), [x])
    with pytest.raises(ConfigError, match="before get_peft_model"):
        thawline.select_columns(wrap(model), config_for("activation"), [x])
