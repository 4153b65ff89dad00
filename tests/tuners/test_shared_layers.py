"""A layer that a model lists under several names: adapted once, saved once, loaded without complaint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from thawline.errors import ConfigError
from thawline.recipe import Paca
from thawline.tuners import PacaConfig
from thawline.tuners.adapters import load_adapter, merge_adapters, save_adapter
from thawline.tuners.build import attach_tuner
from thawline.tuners.paca.layer import PacaLayer
from thawline.tuners.paca.model import PacaModel


class Heads(nn.Module):
    """Two heads that are one, as in DEIMv2's small sizes."""

    def __init__(self) -> None:
        super().__init__()
        head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        self.heads = nn.ModuleList([head, head])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[0](x) + self.heads[1](2 * x)


def adapted(seed: int = 0) -> Heads:
    torch.manual_seed(seed)
    model = Heads()
    attach_tuner(model, Paca(r=2, target_modules=["0.0", "0.2"], mode="resident"))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, PacaLayer):
                layer.thawline_paca_delta["default"].normal_()
    return model


def test_columns_are_written_and_learn_from_every_use(tmp_path: Path) -> None:
    model, x = adapted(), torch.randn(5, 6)
    assert len({id(m) for m in model.modules() if isinstance(m, PacaLayer)}) == 2
    model(x).square().sum().backward()
    delta = model.heads[0][2].thawline_paca_delta["default"]
    hidden = torch.cat([torch.relu(model.heads[0][0](x)), torch.relu(model.heads[0][0](2 * x))])
    index = model.heads[0][2].thawline_paca_indices["default"]
    grad = (2 * model(x)).repeat(2, 1).T @ hidden[:, index]
    assert_close(delta.grad, grad.detach())


def test_it_is_saved_loaded_and_merged(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, x = adapted(), torch.randn(5, 6)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    again = load_adapter(Heads(), tmp_path)
    assert not [one for one in recwarn if "missing adapter keys" in str(one.message)]
    assert_close(again(x), model(x), rtol=0, atol=0)
    merged = merge_adapters(again)
    assert not any(isinstance(module, PacaLayer) for module in merged.modules())
    assert merged.heads[0] is merged.heads[1]
    assert_close(merged(x), model(x), rtol=0, atol=0)


def test_a_layer_in_two_places_itself_is_still_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]  # PEFT would put its layer into one of the two places
    with pytest.raises(ConfigError, match="tied"):
        PacaModel.checked_targets(PacaConfig(r=2, target_modules=["a"], mode="resident"), model)
