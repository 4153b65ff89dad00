"""MHR on 1 × 1 convolutions: MHR's linear on the channels of every pixel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.support.mhr import config
from thawline import set_task_ids, to_lora
from thawline.errors import ConfigError, RoutingError
from thawline.tuners.mhr.conv import MHRConv2d
from thawline.tuners.mhr.layer import find_layers

B, I, O, H, W = 3, 8, 12, 2, 5  # noqa: E741
IDS = [2, 0, 2]


def adapted(base: nn.Module, **changes: object) -> PeftModel:
    """One layer in fp64 with three tasks, the skills of which depend on the shapes alone."""
    model = nn.Sequential(base).double()
    torch.manual_seed(1)
    fields = {"target_modules": ["0"], "r": 2, "n_skills": 3, "n_heads": 4, **changes}
    return get_peft_model(model, config(**fields)).double().eval()


def conv(stride: int = 1, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(I, O, 1, stride=stride, bias=bias)


def image(memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    x = torch.randn(B, I, H, W, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.to(memory_format=memory_format)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_equals_the_linear_on_the_flattened_map(
    stride: int, bias: bool, memory_format: torch.memory_format
) -> None:
    of_maps = adapted(conv(stride, bias))
    linear = nn.Linear(I, O, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(conv(stride, bias).weight.flatten(1))
        if bias:
            linear.bias.copy_(conv(stride, bias).bias)
    of_rows = adapted(linear)
    x = image(memory_format)
    rows = x[:, :, ::stride, ::stride].flatten(2).mT
    for training in (False, True):  # mixtures kept, and mixed with gradients
        found = []
        for model, inputs in ((of_maps, x), (of_rows, rows)):
            model.train(training)
            set_task_ids(model, IDS)
            inputs = inputs.clone().requires_grad_(training)
            y = model(inputs)
            if training:
                y.square().sum().backward()
            found.append((y, [p.grad for p in model.parameters() if p.requires_grad]))
        torch.testing.assert_close(found[0][0].flatten(2).mT, found[1][0])
        for mine, theirs in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_gradients_are_those_of_finite_differences() -> None:
    model = adapted(conv()).train()
    x = image().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 3

    def forward(x: Tensor, *_: Tensor) -> Tensor:
        set_task_ids(model, IDS)
        return model(x)

    assert torch.autograd.gradcheck(forward, (x, *parameters))


def test_merging_one_task_changes_nothing_but_the_weight() -> None:
    model, x = adapted(conv()), image()
    before = model.base_model.model[0].base_layer.weight.clone()
    set_task_ids(model, 1)
    with torch.no_grad():
        expected, plain = model(x), model.base_model.model[0].base_layer(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
        torch.testing.assert_close(model.base_model.model[0].base_layer.weight, before)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), plain)
        merged = model.merge_and_unload()
        assert type(merged[0]) is nn.Conv2d
        torch.testing.assert_close(merged(x), expected)
    assert not torch.equal(expected, plain)


def test_a_task_is_exactly_a_lora_of_pefts_own(tmp_path: Path) -> None:
    model, x = adapted(conv(stride=2)), image()
    to_lora(model, tmp_path, task=2)
    lora = PeftModel.from_pretrained(nn.Sequential(conv(stride=2)).double(), tmp_path).double()
    assert isinstance(lora.peft_config["default"], LoraConfig)
    set_task_ids(model, 2)
    with torch.no_grad():
        torch.testing.assert_close(lora(x), model(x), atol=1e-6, rtol=1e-6)  # LoRA files are float32


def test_saved_and_loaded_as_a_linear_is(tmp_path: Path) -> None:
    model, x = adapted(conv()), image()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(conv()).double(), tmp_path).double().eval()
    for one in (model, loaded):
        set_task_ids(one, IDS)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    assert isinstance(next(layer for _, layer in find_layers(loaded)), MHRConv2d)


def test_images_of_a_batch_go_by_their_tasks() -> None:
    model, x = adapted(conv()), image()
    with pytest.raises(RoutingError, match="No task ids"):
        model(x)
    set_task_ids(model, [0, 1])
    with pytest.raises(RoutingError, match="2 task ids for 3 rows"):
        model(x)


@pytest.mark.parametrize(
    ("base", "what"),
    [
        (nn.Conv2d(I, O, 3, padding=1), "Conv2d of 3 × 3"),
        (nn.Conv2d(I, O, 1, groups=4), "groups=4"),
        (nn.Conv2d(I, O, 1, padding=1), r"padding=\(1, 1\)"),
        (nn.Conv1d(I, O, 1), "a Conv1d"),
    ],
)
def test_other_convolutions_are_refused_by_name(base: nn.Module, what: str) -> None:
    with pytest.raises(ConfigError, match=f"'0' is .*{what}.*1 × 1 convolutions"):
        adapted(base)


def test_heads_divide_the_channels() -> None:
    with pytest.raises(ConfigError, match="n_heads=3 does not divide in_features=8"):
        adapted(conv(), n_heads=3)
