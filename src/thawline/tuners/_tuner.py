"""Base of `PacaModel` and `MHRModel`: targets found and checked, and calls of PEFT answered alike."""

from __future__ import annotations

__all__ = ["BROKEN", "OFFLOADED", "Tuner", "check_in_memory", "row_names"]

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from thawline.errors import CheckpointError, ConfigError
from thawline.tuners._config import TunerConfig
from thawline.tuners._steps import expect_gradients
from thawline.tuners.experts import SplitExperts
from thawline.tuners.targets import (
    check_fused,
    check_patterns,
    check_trained,
    find_targets,
    is_all_linear,
    warn_of_the_rest,
    why_unfit,
)

BROKEN = "NaNs detected in the merged weights. The adapter {} seems to be broken: see '{}'."
"""PEFT's words, which users search for; also for infinity."""
OFFLOADED = (
    "'{}' is offloaded (meta device): its weights can be neither adapted nor run with an adapter. Load the"
    " model without CPU or disk offload, e.g. in bfloat16 or on more devices, or exclude the module."
)


class Tuner(BaseTuner):
    """A tuner that checks every target before it replaces the first, so that a failure changes nothing."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_fit)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # `checked_targets` fills in default targets

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        every = is_all_linear(peft_config.target_modules)
        self._note_targets(peft_config, model, self.checked_targets(peft_config, model))
        expect_gradients(model)
        if every:
            warn_of_the_rest(peft_config, model)

    def _note_targets(self, peft_config: Any, model: nn.Module, found: dict[str, nn.Module]) -> None:
        """Do what a tuner has to do once with its targets, before the first is replaced."""

    @classmethod
    def checked_targets(cls, config: Any, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that `config` adapts, by name; in it, targets become names.

        Raises: ConfigError: for a target that cannot be adapted, a pattern that matches nothing, or one that
            means weights which are no layers, or are not in memory.
        """
        targets = config.target_modules
        if targets is None:
            config.target_modules = default_targets(BaseTuner.get_model_config(model))
        found = find_targets(config, model)
        check_trained(config, model)
        check_patterns(config, model, targets, found)
        if not (is_all_linear(targets) or config.is_saved):
            check_fused(config, model, found)
        if not found:
            others = (name for name in ("exclude_modules", "modules_to_save") if getattr(config, name))
            left = next((f" that `{name}` leaves" for name in others), "")
            raise ConfigError(f"`target_modules`: {targets!r} is no module of {type(model).__name__}{left}.")
        for name, module in found.items():
            if isinstance(module, cls.tuner_layer_cls):
                continue
            if isinstance(module, BaseTunerLayer):
                raise ConfigError(f"'{name}' already has an adapter of another method. Unload it first.")
            if reason := why_unfit(model, name):
                raise ConfigError(f"'{name}' {reason}, so no adapter fits it. Add it to exclude_modules.")
        found = {name: module for name, module in found.items() if not isinstance(module, SplitExperts)}
        cls.check_targets(config, model, found)
        return found

    @classmethod
    @abstractmethod
    def check_targets(cls, config: TunerConfig, model: nn.Module, found: dict[str, nn.Module]) -> None:
        """Check what this tuner asks of its targets. Raises: ConfigError: naming one and what would work."""

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # unloaded: new_module has all it needs
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, self.tuner_layer_cls):
                weight = getattr(layer.get_base_layer(), "weight", None)
                if weight is not None and weight.is_floating_point():
                    layer.cast_adapter(adapter_name, weight.dtype)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Accept PEFT's `adapter_names`, an adapter per row, where all rows use the active ones.

        Raises: ConfigError: for other adapters, which would be ignored.
        """
        wanted = set(row_names(adapter_names) or self.active_adapters)
        if wanted != set(self.active_adapters) or (adapter_names and len(wanted) > 1):
            raise ConfigError(
                f"adapter_names={sorted(wanted)}, but the model runs one set of adapters for all rows of a "
                f"batch, now {self.active_adapters}. Call it once for the rows of each adapter, after "
                "set_adapter(name), and for '__base__' inside `with model.disable_adapter():`."
            )
        yield


def _check_fit(tuner: Tuner, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
    """Check that an adapter about to be loaded fits the model, where torch would skip what it lacks.

    Raises: CheckpointError: naming a weight of another shape, or of a layer that is not adapted.
    """
    named = (tuner.named_parameters(remove_duplicate=False), tuner.named_buffers(remove_duplicate=False))
    own, layers = dict(chain(*named)), dict(tuner.named_modules(remove_duplicate=False))
    for key, found in state_dict.items():
        name = key.removeprefix(prefix)
        layer, is_adapter, _ = name.partition(f".{tuner.prefix}")
        if is_adapter and layer not in layers:
            raise CheckpointError(
                f"The adapter has weights of '{layer.removeprefix('model.')}', which this model lacks "
                "or does not adapt: it was made for another base model."
            )
        if is_adapter and name in own and own[name].shape != found.shape:
            raise CheckpointError(
                f"The adapter's '{name.removeprefix('model.')}' is {tuple(found.shape)}, expected "
                f"{tuple(own[name].shape)}: it was made for another base model, or with other settings."
            )


def row_names(adapter_names: Any) -> list[str]:
    """Return PEFT's `adapter_names`, one for each row, as texts; none for None.

    Raises: ConfigError: a single name, which would be read letter by letter.
    """
    if isinstance(adapter_names, str):
        raise ConfigError(f"adapter_names={adapter_names!r}: expected a list with a name for each row.")
    return [str(name) for name in adapter_names or ()]


def check_in_memory(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Check that the weights of `layers` are there to work with; a model that is all on meta has none.

    Raises: ConfigError: naming a weight that accelerate brings in from the processor or a disk when it runs.
    """
    is_partial = not all(parameter.is_meta for parameter in model.parameters())
    for name, layer in layers.items():
        is_meta = any(parameter.is_meta for parameter in layer.parameters())
        if is_meta and (is_partial or hasattr(layer, "_hf_hook")):
            raise ConfigError(OFFLOADED.format(name))


def default_targets(model_config: dict[str, Any]) -> set[str] | str:
    """Return PEFT's choice for LoRA on this architecture.

    Raises: ConfigError: if PEFT has none.
    """
    model_type = model_config.get("model_type")
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if targets is None:
        raise ConfigError(
            f"target_modules=None, and PEFT has no default for model type {model_type!r}. "
            "Set target_modules='all-linear' or a list of module names."
        )
    return targets if isinstance(targets, str) else set(targets)
