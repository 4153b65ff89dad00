"""PacaConfig: what it takes, and how it says no."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from peft.config import PeftConfig
from peft.utils import PeftType

from thawline import ConfigError, MHRConfig, PacaConfig
from thawline.cli.recipe_help import _docs


def test_the_defaults_cost_what_loras_do_and_learn_like_full_fine_tuning():
    config = PacaConfig()
    assert (config.r, config.alpha, config.bias, config.selection) == (16, None, "none", "random")
    assert config.trainable_token_indices is None
    assert config.modules_to_save is None


@pytest.mark.parametrize("config", [PacaConfig, MHRConfig])
def test_every_field_has_a_docstring(config):
    documented = {
        name
        for cls in config.__mro__
        if dataclasses.is_dataclass(cls) and cls.__module__.startswith("thawline")
        for name, text in _docs(cls).items()
        if text
    }
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    assert {field.name for field in dataclasses.fields(config)} - inherited <= documented


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0: expected a whole number of at least 1"),
        ({"r": 1.5}, "r=1.5"),
        ({"r": True}, "r=True"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1"),
        ({"alpha": 0}, "alpha=0: expected a number above 0"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\]='x'"),
        ({"bias": "lora_only"}, "bias='lora_only'.*Available: all, none, paca_only"),
        ({"selection": "randon"}, "selection='randon'.*Did you mean 'random'"),
        ({"selection": "explicit"}, "needs `indices`"),
        ({"indices": {"q_proj": [0]}}, "selection='random' chooses its own"),
        ({"layers_pattern": "layers"}, "`layers_to_transform` is not"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "target_modules='all-linear'"),
    ],
)
def test_a_value_that_cannot_work_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        PacaConfig(**fields)


@pytest.mark.parametrize(
    ("field", "counterpart"),
    [
        ("lora_alpha", "`alpha`"),
        ("lora_dropout", "no dropout"),
        ("lora_bias", "`bias`"),
        ("init_lora_weights", "`init_weights`"),
        ("use_rslora", "`alpha`"),
        ("use_dora", "no magnitude"),
        ("fan_in_fan_out", "recognised"),
        ("lora_something_new", "leave it out"),
    ],
)
def test_a_field_of_lora_names_its_counterpart(field, counterpart):
    with pytest.raises(ConfigError, match=rf"`{field}` is not a field of PacaConfig.*{counterpart}"):
        PacaConfig(r=8, **{field: 16})


def test_an_unknown_field_is_a_type_error_as_everywhere_in_peft():
    with pytest.raises(TypeError, match="rr"):
        PacaConfig(rr=8)


def test_it_can_be_copied_and_answers_as_an_enum_member():
    config = copy.deepcopy(PacaConfig(target_modules=["a"]))
    assert config.peft_type == "THAWLINE_PACA"
    assert config.peft_type.value == config.peft_type.name == "THAWLINE_PACA"
    assert str(config.peft_type) == "PeftType.THAWLINE_PACA"
    assert config.peft_type not in list(PeftType)
    assert config.target_modules == {"a"}
