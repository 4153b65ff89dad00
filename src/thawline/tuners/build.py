"""Attach what moves to what is frozen: one call for every tuner a recipe can name."""

from __future__ import annotations

__all__ = ["attach_tuner"]

import dataclasses
from pathlib import Path
from typing import Any

import peft
from torch import nn

from thawline.errors import CheckpointError, ConfigError, did_you_mean
from thawline.recipe import Adapter, Frozen, Full, Lora, Paca, PeftMethod, TunerSettings
from thawline.tuners.paca.config import PACA, PacaConfig

TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
}
"""End of a transformers model's class name → PEFT's task type. Other modules get none."""


def attach_tuner(model: nn.Module, settings: TunerSettings) -> nn.Module:
    """Freeze `model` and make trainable what `settings` say.

    Args:
        model: any module; changed in place.
        settings: a tuner's section of a recipe.

    Returns: `model` itself for `none` and `frozen`, else a `PeftModel` around it.
    Raises: ConfigError: for fields the method does not have, or that do not fit the model.
        CheckpointError: if `start_from` holds no adapter of this method.
    """
    if isinstance(settings, (Full, Frozen)):
        return model.requires_grad_(isinstance(settings, Full))
    if settings.start_from is not None:
        return _load_adapter(model, settings.start_from, settings.method)
    config = _peft_config(settings, _task_type(model))
    try:
        return peft.get_peft_model(model, config)
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"PEFT cannot attach '{settings.method}' to {type(model).__name__}: {error}"
        ) from error


def _peft_config(settings: Paca | Lora | PeftMethod, task_type: str | None) -> peft.PeftConfig:
    if isinstance(settings, PeftMethod):
        return _build(_config_class(settings.method), {"task_type": task_type}, settings.args)
    if isinstance(settings, Paca):
        fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Paca)}
        del fields["method"], fields["start_from"]
        return _build(PacaConfig, {**fields, "task_type": task_type}, {})
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Adapter)}
    del fields["start_from"]
    fields |= {
        "task_type": task_type,
        "r": settings.r,
        "lora_alpha": 2 * settings.r if settings.alpha is None else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_dora": settings.method == "dora",
    }
    return _build(peft.LoraConfig, fields, settings.args)


def _build(
    config_class: type[peft.PeftConfig], fields: dict[str, Any], args: dict[str, Any]
) -> peft.PeftConfig:
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in args:
        if name not in known:
            raise ConfigError(
                f"Unknown key 'tuner.args.{name}' of {config_class.__name__}. {did_you_mean(name, known)}"
            )
        if name in fields:
            raise ConfigError(
                f"'tuner.args.{name}' has a field of its own in the tuner's section; set it there."
            )
    try:
        return config_class(**fields, **args)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{config_class.__name__}: {error}") from error


def _config_class(method: str) -> type[peft.PeftConfig]:
    known = {name.lower(): config for name, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method not in known:
        raise ConfigError(f"PEFT {peft.__version__} has no method '{method}'. {did_you_mean(method, known)}")
    return known[method]


def _load_adapter(model: nn.Module, folder: str, method: str) -> nn.Module:
    if not (Path(folder) / "adapter_config.json").is_file():
        raise CheckpointError(f"`tuner.start_from`: '{folder}' holds no adapter (no adapter_config.json).")
    saved = peft.PeftConfig.from_pretrained(folder).peft_type.value.lower()
    if saved != {"dora": "lora", "paca": PACA.lower()}.get(method, method):
        raise CheckpointError(f"`tuner.start_from`: '{folder}' is of method '{saved}', not '{method}'.")
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((kind for ending, kind in TASK_TYPES.items() if name.endswith(ending)), None)
