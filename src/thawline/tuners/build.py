"""Attach what trains to what is frozen: one call for every tuner a recipe can name."""

from __future__ import annotations

__all__ = ["attach_tuner", "routed_tasks"]

import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from thawline.errors import CheckpointError, ConfigError, ThawlineError, did_you_mean
from thawline.files import DAMAGED, read_json
from thawline.recipe import Frozen, Full, Lora, Mhr, Paca, PeftMethod, TunerSettings
from thawline.recipe.checks import check_args
from thawline.tuners._config import TunerConfig
from thawline.tuners._steps import expect_gradients
from thawline.tuners._tuner import Tuner
from thawline.tuners.mhr.adapt import find_adapter, start_adaptation
from thawline.tuners.mhr.config import MHR
from thawline.tuners.mhr.convert import from_poly
from thawline.tuners.mhr.layer import find_layers
from thawline.tuners.mhr.task_ids import route_by_batch
from thawline.tuners.paca.calibrate import select_columns
from thawline.tuners.paca.config import PACA, PacaConfig
from thawline.tuners.targets import check_attached, check_trained, find_routers, is_all_linear, join_patterns

logger = logging.getLogger(__name__)

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Files of an adapter's weights, as PEFT names them."""
LONGEST_REASON = 300
"""Characters of another library's message that are shown."""
HEADS = ("classifier", "score")
"""Ends of the names of modules that PEFT trains whole in a classifier; DistilBERT has a `pre_classifier`."""
SAVED_TYPES = {"dora": "lora", "paca": PACA.lower(), "mhr": MHR.lower(), "poly": MHR.lower()}
"""Method of a recipe → PEFT's type in adapter_config.json, where the two differ."""


def attach_tuner(
    model: nn.Module,
    settings: TunerSettings,
    *,
    tasks: Sequence[str] = (),
    saved: bool = False,
    batches: Callable[[], Iterable[Any]] | None = None,
) -> nn.Module:
    """Freeze `model` and make trainable what `settings` say. MHR then takes `task_ids` out of the batch.

    Args:
        model: any module; changed in place.
        settings: a tuner's section of a recipe.
        tasks: names of the tasks that MHR routes; none: one task without ids.
        saved: the adapter in `start_from` was saved by a run of these settings, so it has adapted already;
            it adapts again only if `adapt` differs.
        batches: returns batches for PaCA's `activation` and `gradient` selections.

    Returns: `model` itself for `none` and `frozen`, else a `PeftModel` around it.
    Raises: ConfigError: for fields the method does not have, or that do not fit the model.
        CheckpointError: if `start_from` holds no adapter of this method, or one that does not fit the model.
    """
    if isinstance(settings, (Full, Frozen)):
        return model.requires_grad_(isinstance(settings, Full))
    if settings.start_from is None:
        tuned = _new_adapter(model, settings, tasks, batches)
    else:
        tuned = _load_adapter(model, settings, settings.start_from, saved)
    expect_gradients(tuned.get_base_model())
    if tuned.active_peft_config.is_prompt_learning:
        _keep_prompt_in_generate(tuned)
    if isinstance(settings, Mhr):
        if settings.start_from is not None:
            _adapt(tuned, settings, tasks, saved)
        route_by_batch(tuned)
    return tuned


def routed_tasks(model: nn.Module) -> list[str] | None:
    """Return the names of the tasks in a model's routing table, numbers where it has none; None: no ids."""
    if next(find_layers(model), None) is None:
        return None
    shared, name = find_adapter(model)
    config = shared.configs[name]
    if config.router == "uniform" or (config.n_tasks == 1 and config.task_names is None):
        return None
    return config.task_names or [str(number) for number in range(config.n_tasks or 1)]


def _keep_prompt_in_generate(model: Any) -> None:
    """Let PEFT find the cache when a learned prompt generates; transformers 5.24 gives it another name.

    Otherwise PEFT 0.21 takes every token for the first one: it puts the prompt in again, or loses the prefix.
    """
    prepare = getattr(model, "base_model_prepare_inputs_for_generation", None)
    if prepare is None:
        return

    def with_old_name(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    model.base_model_prepare_inputs_for_generation = with_old_name


def _new_adapter(
    model: nn.Module,
    settings: Paca | Mhr | Lora | PeftMethod,
    tasks: Sequence[str],
    batches: Callable[[], Iterable[Any]] | None,
) -> nn.Module:
    config = _peft_config(settings, _task_type(model), tasks)
    check_trained(config, model)
    asked = copy.deepcopy(config)  # PEFT turns names into other names
    if is_all_linear(getattr(config, "target_modules", None)):
        in_full = _trained_in_full(model) if config.task_type == "SEQ_CLS" else []
        unfit = [] if isinstance(config, TunerConfig) else find_routers(model)  # ours see to it themselves
        config.exclude_modules = join_patterns(config.exclude_modules, [*in_full, *unfit])
    if batches is not None and isinstance(config, PacaConfig) and _looks_at_data(config):
        config = dataclasses.replace(select_columns(model, config, batches()), selection="explicit")
    try:
        tuned = peft.get_peft_model(model, config)
    except ConfigError:
        raise
    except Exception as error:  # every method of PEFT has errors of its own for a model that it does not suit
        raise ConfigError(
            f"PEFT cannot attach '{settings.method}' to {type(model).__name__}: {_reason(error, config)}"
        ) from error
    if isinstance(tuned.base_model, BaseTuner) and not isinstance(tuned.base_model, Tuner):
        check_attached(tuned.base_model, asked, config)
    return tuned


def _reason(error: Exception, config: peft.PeftConfig) -> str:
    """Return why an adapter cannot be attached, with what to do where PEFT stumbles over a None."""
    reason = " ".join(str(error).split())
    if isinstance(config, peft.PromptLearningConfig) and config.task_type is None:
        return "it puts learned tokens before the input of a language model or classifier."
    if "meta tensor" in reason:
        return "it computes with the weights, which are not loaded."
    if "NoneType" not in reason:
        return reason
    example = ", such as num_virtual_tokens" if hasattr(config, "num_virtual_tokens") else ""
    return f"{reason}. Set the fields of {type(config).__name__} that it needs in `tuner.args`{example}."


def _trained_in_full(model: nn.Module) -> list[str]:
    """Return layers of a classifier besides its head that PEFT trains whole, going by the ends of names."""
    found = (name.rpartition(".")[2] for name, _ in model.named_modules())
    return sorted({name for name in found if name.endswith(HEADS) and name not in HEADS})


def _looks_at_data(config: PacaConfig) -> bool:
    return config.indices is None and config.selection in ("activation", "gradient")


def _adapt(model: nn.Module, settings: Mhr, tasks: Sequence[str], saved: bool) -> None:
    """Turn a loaded MHR adapter to `tasks`, if `adapt` asks for it."""
    shared, name = find_adapter(model)
    config = shared.configs[name]
    if settings.adapt == "none" or (saved and settings.adapt == config.mode):
        return
    known = set() if saved else set(tasks) & set(config.task_names or ())
    if known:
        logger.warning(
            "Already trained: %s. The metrics that such a task starts from are not zero-shot.",
            ", ".join(sorted(known)),
        )
    start_adaptation(model, mode=settings.adapt, tasks=list(tasks) or 1, start_from=settings.new_rows)


def _peft_config(
    settings: Paca | Mhr | Lora | PeftMethod, task_type: str | None, tasks: Sequence[str]
) -> peft.PeftConfig:
    known = {name.lower(): config for name, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    config_class = known.get(SAVED_TYPES.get(settings.method, settings.method))
    if config_class is None:
        raise ConfigError(
            f"PEFT {peft.__version__} has no method '{settings.method}'. "
            f"{did_you_mean(settings.method, known)}"
        )
    names = {field.name for field in dataclasses.fields(config_class)} - {"method"}
    fields = {name: value for name, value in vars(settings).items() if name in names}
    fields |= {"task_type": task_type, **OTHER_FIELDS[type(settings)](settings, tasks)}
    args = getattr(settings, "args", {})
    check_args("tuner", args, config_class, fields)
    try:
        return config_class(**fields, **args)
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{config_class.__name__}: {error}") from error


def _lora_fields(settings: Lora, tasks: Sequence[str]) -> dict[str, Any]:
    return {
        "lora_alpha": 2 * settings.r if settings.alpha is None else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_dora": settings.method == "dora",
    }


def _mhr_fields(settings: Mhr, tasks: Sequence[str]) -> dict[str, Any]:
    # A single task is routed too, where it has a name: its skills are mixed by a row that learns.
    fields: dict[str, Any] = {"task_names": list(tasks) or None, "n_heads": settings.heads}
    if settings.router == "private":
        fields["n_skills"] = max(len(tasks), 1)
    return fields


OTHER_FIELDS: dict[type, Callable[[Any, Sequence[str]], dict[str, Any]]] = {
    Paca: lambda settings, tasks: {},
    Mhr: _mhr_fields,
    Lora: _lora_fields,
    PeftMethod: lambda settings, tasks: {},
}
"""Settings of an adapter → fields of its PEFT config that differ from the settings of the same name."""


def _task_type(model: nn.Module) -> str | None:
    """Return PEFT's task type for a transformers model, which decides about the forwards around it."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _load_adapter(
    model: nn.Module, settings: Paca | Mhr | Lora | PeftMethod, start_from: str, saved: bool
) -> nn.Module:
    method = settings.method
    in_run = Path(start_from) / "model"
    folder = str(in_run) if (in_run / "adapter_config.json").is_file() else start_from
    if not (Path(folder) / "adapter_config.json").is_file():
        raise CheckpointError(f"`tuner.start_from`: '{folder}' holds no adapter (no adapter_config.json).")
    read_json(Path(folder) / "adapter_config.json")  # says that it is damaged, if it is
    config = _read_config(folder)
    found = config.peft_type.value.lower()
    if found == "poly" and method in ("poly", "mhr"):
        logger.info("'%s' is of PEFT's Poly: read by thawline.from_poly; its tasks go by number.", folder)
        return from_poly(model, folder)
    if found != SAVED_TYPES.get(method, method):
        ours = found.removeprefix("thawline_")
        advice = "PEFT's own, which it loads itself" if ours == method else f"set `tuner.method: {ours}`"
        raise CheckpointError(
            f"`tuner.start_from`: '{folder}' holds an adapter of type {found.upper()}, which "
            f"`tuner.method: {method}` does not read: {advice}."
        )
    if not any((Path(folder) / name).is_file() for name in WEIGHTS):
        raise CheckpointError(f"`tuner.start_from`: '{folder}' holds no weights (no {WEIGHTS[0]}).")
    if isinstance(settings, Paca) and settings.columns_from is not None:
        config.columns_from = settings.columns_from  # the checkpoint may have moved
    # PEFT refuses to go on training a learned prompt; using one is fine.
    is_trainable = not (saved and config.is_prompt_learning)
    name, unfit = type(model).__name__, f"`tuner.start_from`: the adapter in '{folder}' does not fit "
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # told below, as an error
            tuned = peft.PeftModel.from_pretrained(model, folder, is_trainable=is_trainable, config=config)
            if config.is_prompt_learning:
                return tuned
            # Again, for its answer.
            found_keys = tuned.load_adapter(folder, "default", is_trainable=is_trainable)
    except CheckpointError as error:
        raise CheckpointError(f"{unfit}{name}: {error}") from error
    except ThawlineError:
        raise
    except DAMAGED as error:
        raise CheckpointError(f"`tuner.start_from`: the adapter in '{folder}' is damaged: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{unfit}{name}: {' '.join(str(error).split())[:LONGEST_REASON]}") from error
    # A layer that the model lists under several names is saved under one.
    own = {name for name, _ in (*tuned.named_parameters(), *tuned.named_buffers())}
    lacking = [key for key in found_keys.missing_keys if key in own]
    lacking = lacking if isinstance(config, (peft.LoraConfig, TunerConfig)) else []
    for keys, what in ((found_keys.unexpected_keys, "has no"), (lacking, "finds in it no")):
        if keys:
            raise CheckpointError(f"{unfit}{name}, which {what} '{keys[0]}' and {len(keys) - 1} more.")
    return tuned


def _read_config(folder: str) -> peft.PeftConfig:
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if config.peft_type is None:
            raise KeyError("peft_type")
        return config
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"`tuner.start_from`: PEFT {peft.__version__} cannot read the adapter in '{folder}': {error!r}."
        ) from error
