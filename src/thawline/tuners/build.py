"""Attach what moves to what is frozen: one call for every tuner a recipe can name."""

from __future__ import annotations

__all__ = ["attach_tuner", "calibrate_tuner", "routed_tasks"]

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
from torch import nn

from thawline.errors import CheckpointError, ConfigError, ThawlineError, did_you_mean
from thawline.recipe import Adapter, Frozen, Full, Lora, Mhr, Paca, PeftMethod, TunerSettings
from thawline.tuners.mhr.adapt import find_adapter, start_adaptation
from thawline.tuners.mhr.config import MHR, MHRConfig
from thawline.tuners.mhr.model import route_by_batch
from thawline.tuners.paca.calibrate import select_columns
from thawline.tuners.paca.config import PACA, PacaConfig

logger = logging.getLogger(__name__)

TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
}
"""End of a transformers model's class name → PEFT's task type. Other modules get none."""
RECIPE_ONLY = ("method", "start_from", "adapt", "new_rows", "routing_lr", "routing_weight_decay", "anneal")
"""Fields of `Mhr` that are not those of `MHRConfig`: how it is trained."""


def attach_tuner(
    model: nn.Module, settings: TunerSettings, *, tasks: Sequence[str] = (), saved: bool = False
) -> nn.Module:
    """Freeze `model` and make trainable what `settings` say. MHR then takes `task_ids` out of the batch.

    Args:
        model: any module; changed in place.
        settings: a tuner's section of a recipe.
        tasks: names of the tasks that MHR routes; none: one task without ids.
        saved: what `start_from` holds has adapted as it says already; only another `adapt` does again.

    Returns: `model` itself for `none` and `frozen`, else a `PeftModel` around it.
    Raises: ConfigError: for fields the method does not have, or that do not fit the model.
        CheckpointError: if `start_from` holds no adapter of this method, or one that does not fit the model.
    """
    if isinstance(settings, (Full, Frozen)):
        return model.requires_grad_(isinstance(settings, Full))
    if settings.start_from is not None:
        tuned = _load_adapter(model, settings.start_from, settings.method, saved)
        return _adapted(tuned, settings, tasks, saved) if isinstance(settings, Mhr) else tuned
    config = _peft_config(settings, _task_type(model), tasks)
    try:
        tuned = peft.get_peft_model(model, config)
        return route_by_batch(tuned) if isinstance(settings, Mhr) else tuned
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"PEFT cannot attach '{settings.method}' to {type(model).__name__}: {error}"
        ) from error


def calibrate_tuner(model: nn.Module, settings: Paca, batches: Iterable[Any]) -> Paca:
    """PaCA's settings with the columns that `batches` choose written out (see `select_columns`)."""
    config = select_columns(model, _peft_config(settings, _task_type(model), ()), batches)
    return dataclasses.replace(settings, selection="explicit", indices=config.indices)


def routed_tasks(model: nn.Module) -> list[str] | None:
    """Names of the tasks in a model's routing table; None: it needs no ids.

    Raises: CheckpointError: for a table whose tasks go by number, which rows of text cannot be told by.
    """
    shared, name = find_adapter(model)
    config = shared.configs[name]
    if config.router == "uniform" or (config.n_tasks == 1 and config.task_names is None):
        return None
    if config.task_names is None:
        raise CheckpointError(
            f"The adapter's {config.n_tasks} tasks go by number. Give its adapter_config.json `task_names`."
        )
    return config.task_names


def _adapted(model: nn.Module, settings: Mhr, tasks: Sequence[str], saved: bool) -> nn.Module:
    """A loaded MHR turned to `tasks`, where it is to be."""
    shared, name = find_adapter(model)
    mode = shared.configs[name].mode
    if settings.adapt != "none" and not (saved and settings.adapt == mode):
        names: Any = list(tasks) or 1
        if known := sorted(set(tasks) & set(shared.configs[name].task_names or ())) if not saved else []:
            logger.warning(
                "Trained on before: %s. The metrics that such a task starts from are not zero-shot.",
                ", ".join(known),
            )
        start_adaptation(model, mode=settings.adapt, tasks=names, start_from=settings.new_rows)
    return route_by_batch(model)


def _peft_config(
    settings: Paca | Mhr | Lora | PeftMethod, task_type: str | None, tasks: Sequence[str]
) -> peft.PeftConfig:
    if isinstance(settings, PeftMethod):
        return _build(_config_class(settings.method), {"task_type": task_type}, settings.args)
    if isinstance(settings, Paca):
        fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Paca)}
        del fields["method"], fields["start_from"]
        return _build(PacaConfig, {**fields, "task_type": task_type}, {})
    if isinstance(settings, Mhr):
        fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Mhr)}
        for name in RECIPE_ONLY:
            del fields[name]
        # One task is routed too, where it has a name: its skills are mixed by a row that learns.
        fields |= {"task_names": list(tasks) or None, "n_heads": settings.heads, "task_type": task_type}
        if settings.router == "private":
            fields["n_skills"] = max(len(tasks), 1)
        return _build(MHRConfig, fields, {})
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


def _load_adapter(model: nn.Module, start_from: str, method: str, saved: bool) -> nn.Module:
    in_run = Path(start_from) / "model"
    folder = str(in_run) if (in_run / "adapter_config.json").is_file() else start_from
    if not (Path(folder) / "adapter_config.json").is_file():
        raise CheckpointError(f"`tuner.start_from`: '{folder}' holds no adapter (no adapter_config.json).")
    config = peft.PeftConfig.from_pretrained(folder)
    found = config.peft_type.value.lower()
    if found != {"dora": "lora", "paca": PACA.lower(), "mhr": MHR.lower(), "poly": MHR.lower()}.get(
        method, method
    ):
        raise CheckpointError(f"`tuner.start_from`: '{folder}' is of method '{found}', not '{method}'.")
    # PEFT refuses to go on training a learned prompt; using one is fine.
    is_trainable = not (saved and config.is_prompt_learning)
    try:
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except ThawlineError:
        raise
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"`tuner.start_from`: the adapter in '{folder}' does not fit {type(model).__name__}: {error}"
        ) from error


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((kind for ending, kind in TASK_TYPES.items() if name.endswith(ending)), None)
