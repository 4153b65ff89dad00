"""Weights that are not in memory are refused where an adapter meets them; weights of two models are said."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from torch import nn

from tests.support.models import tiny_llama
from thawline.errors import ConfigError
from thawline.tuners import MHRConfig, PacaConfig

CPU = torch.device("cpu")
IDS = torch.arange(12).reshape(2, 6) + 3
CONFIGS = {
    "paca": lambda: PacaConfig(r=4, target_modules="all-linear", init_weights=False),
    "mhr": lambda: MHRConfig(r=4, target_modules="all-linear", init_weights=False),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> Callable[[], PacaConfig | MHRConfig]:
    return CONFIGS[request.param]


@pytest.mark.parametrize("config", ["mhr"], indirect=True)
def test_an_offloaded_base_is_refused_at_attach_naming_the_layer(config, tmp_path) -> None:
    for base in (cpu_offload(tiny_llama(), CPU), disk_offload(tiny_llama(), tmp_path, CPU)):
        with pytest.raises(ConfigError, match=r"'model.layers.0.self_attn.q_proj' is offloaded .meta"):
            get_peft_model(base, config())


@pytest.mark.parametrize("config", ["mhr"], indirect=True)
def test_an_offloaded_base_is_refused_at_load(config, tmp_path) -> None:
    get_peft_model(tiny_llama(), config()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'model.layers.0.self_attn.q_proj' is offloaded"):
        PeftModel.from_pretrained(cpu_offload(tiny_llama(), CPU), tmp_path)


@pytest.mark.parametrize("runs_first", [False, True])
def test_a_model_offloaded_with_its_adapter_does_not_run_as_its_base(config, runs_first) -> None:
    model = get_peft_model(tiny_llama(), config()).eval()
    if runs_first:
        model(input_ids=IDS)
    cpu_offload(model, CPU)
    with torch.no_grad(), pytest.raises(ConfigError, match=r"q_proj' is offloaded"):
        model(input_ids=IDS)


def test_only_the_adapted_layers_must_be_in_memory(config) -> None:
    base = tiny_llama()
    cpu_offload(base.model.layers[0].mlp, CPU)
    fields = {"target_modules": ["q_proj"], "r": 4, "init_weights": False}
    model = get_peft_model(base, type(config())(**fields)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_that_is_all_on_meta_can_be_counted(config) -> None:
    with torch.device("meta"):
        base = tiny_llama()
    assert get_peft_model(base, config()).get_nb_trainable_parameters()[0] > 0


def twin_by_load(model: nn.Module) -> nn.Module:
    twin = tiny_llama()
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin


def twin_by_layer(model: nn.Module) -> nn.Module:
    twin = nn.Linear(24, 24, bias=False)
    twin.weight = model.model.layers[1].self_attn.q_proj.weight
    return twin


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


@pytest.mark.parametrize(
    ("share", "kind"), [(twin_by_load, "Linear"), (twin_by_layer, "Linear"), (state, "Tensor")]
)
def test_a_live_twin_that_shares_weights_is_said(caplog, share, kind) -> None:
    model = tiny_llama()
    twin = share(model)
    without_address = torch.eye(3).to_sparse()  # alive too
    with caplog.at_level(logging.WARNING):
        get_peft_model(model, CONFIGS["paca"]())
    (said,) = caplog.messages
    assert f"are also held outside the model ({kind})" in said
    assert "copy.deepcopy" in said
    del twin, without_address
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        get_peft_model(tiny_llama(), CONFIGS["paca"]())
    assert not caplog.messages
