"""`PacaModel`: finds the target layers and wraps them, as PEFT expects of a tuner."""

from __future__ import annotations

__all__ = ["PacaModel", "rank_of", "scale_of"]

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from thawline.errors import ConfigError, did_you_mean
from thawline.tuners._config import pattern_value
from thawline.tuners._tuner import Tuner, row_names
from thawline.tuners.experts import ExpertsLinear, join_experts, split_experts
from thawline.tuners.paca.config import PACA, PacaConfig
from thawline.tuners.paca.layer import ASKED_FOR, LAYERS, PacaLayer, layer_class, shape_of
from thawline.tuners.paca.origin import OriginalColumns, difference, sketch
from thawline.tuners.paca.quantised import check_rewritable, dequantise_model, is_dequantisable, is_quantised
from thawline.tuners.paca.selection import choose_columns
from thawline.tuners.paca.weights import find_obstacles, warn_of_twins
from thawline.tuners.targets import is_left_out

logger = logging.getLogger(__name__)


SAME = 0.004
"""Largest relative difference of columns that are taken for equal: rounding to bfloat16 is half of it."""


class PacaModel(Tuner):
    """Tuner that `get_peft_model(model, PacaConfig(...))` builds."""

    prefix = PACA.prefix
    tuner_layer_cls = PacaLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_columns)
        self.register_load_state_dict_post_hook(_compare_bases)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._found: Collection[str] = ()
        split_experts(model, partial(is_left_out, peft_config))
        try:
            super()._prepare_model(peft_config, model)
        finally:
            join_experts(model, keep=self._found)

    @classmethod
    def check_targets(cls, config: Any, model: nn.Module, found: dict[str, nn.Module]) -> None:
        """Check that `found` are layers of a kind that has columns, and that `config.mode` suits them."""
        fresh = cls._fresh(found)
        obstacles = find_obstacles(model, fresh)
        if config.mode != "resident":
            obstacles = {
                name: why for name, why in obstacles.items() if isinstance(fresh[name], ExpertsLinear)
            }
        if obstacles:
            name, reason = next(iter(obstacles.items()))
            raise ConfigError(
                f"'{name}' cannot be adapted with mode='{config.mode}'. {reason} "
                f"{'Set mode=auto, or a' if config.mode == 'resident' else 'A'}dd it to exclude_modules."
            )

    @classmethod
    def _fresh(cls, found: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Return the modules without PaCA layers yet. Raises: ConfigError: for a kind without columns."""
        fresh = {name: module for name, module in found.items() if not isinstance(module, PacaLayer)}
        for name, module in fresh.items():
            if layer_class(module) is None:
                kinds = ", ".join(kind.__name__ for kind in LAYERS)
                raise ConfigError(
                    f"'{name}' is a {type(module).__name__}; PaCA adapts {kinds}. Change target_modules, or "
                    "add it to exclude_modules. A router is small: train it whole, with modules_to_save."
                )
        return fresh

    def _note_targets(self, peft_config: Any, model: nn.Module, found: dict[str, nn.Module]) -> None:
        fresh = self._fresh(found)
        self._found = set(found)
        self._obstacles = find_obstacles(model, fresh)
        self._original = self._open_original(peft_config, model, found)
        if peft_config.mode != "additive":
            written = {name: layer for name, layer in fresh.items() if name not in self._obstacles}
            warn_of_twins(model, {n: layer for n, layer in written.items() if not is_dequantisable(layer)})
        if peft_config.mode == "auto" and self._obstacles:
            name, reason = next(iter(self._obstacles.items()))
            logger.warning(
                "%d of %d adapted layers add their columns beside the weight (mode 'additive'), the first: "
                "'%s'. %s", len(self._obstacles), len(found), name, reason,
            )  # fmt: skip

    def _open_original(
        self, config: PacaConfig, model: nn.Module, found: dict[str, nn.Module]
    ) -> OriginalColumns | None:
        """Return the checkpoint that columns of quantised layers start from, checked for all of them.

        Raises: ConfigError: if no layer of `found`, or one that cannot be read, is quantised.
            CheckpointError: for a checkpoint of another model.
        """
        if config.columns_from is None or all(parameter.is_meta for parameter in model.parameters()):
            return None
        quantised = {
            name: module
            for name, module in found.items()
            if (module.is_quantised if isinstance(module, PacaLayer) else is_dequantisable(module))
        }
        if self._obstacles:
            name, reason = next(iter(self._obstacles.items()))
            raise ConfigError(f"`columns_from`: the columns of '{name}' cannot be read. {reason}")
        if not quantised:
            if config.is_saved:  # the base has the original columns itself
                return None
            raise ConfigError(
                "`columns_from` is set, but no adapted layer is quantised: the base has its original "
                "columns. Leave it out."
            )
        config.columns_from = str(Path(config.columns_from).resolve())
        original = OriginalColumns(config.columns_from)
        for name, module in quantised.items():
            original.check(name, module.shape if isinstance(module, PacaLayer) else shape_of(module))
        return original

    def _create_and_replace(
        self,
        peft_config: PacaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PacaLayer):
            add_adapter(target, adapter_name, peft_config, current_key, self._original)
            return
        additive = self._obstacles.get(current_key, ASKED_FOR if peft_config.mode == "additive" else None)
        make = layer_class(target)
        assert make is not None  # checked before the first was replaced
        layer = make(target, current_key, additive)
        layer._active_adapter = [adapter_name]
        add_adapter(layer, adapter_name, peft_config, current_key, self._original)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self.model.modules():
            if isinstance(layer, PacaLayer) and not layer.is_quantised:
                layer.check_mergeable()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge, once every layer is known to allow it."""
        for layer in self.model.modules():
            if isinstance(layer, PacaLayer):
                layer.check_mergeable()
        super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        """Unload; a merge of a quantised model gives a plain one in bfloat16."""
        is_dequantised = merge and is_quantised(self.model)
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        join_experts(model)
        return dequantise_model(model) if is_dequantised else model

    @torch.no_grad()
    def merge_and_requantise(self, batch: Mapping[str, Any]) -> nn.Module:
        """Merge the active adapters, quantise changed weights again as they were, and return the base model.

        A changed column moves the scale of its neighbours: log, as a warning, the largest change of a logit
        on a calibration batch that the rounding causes. `merge_and_unload` rounds nothing but to bfloat16.

        Raises: ConfigError: if no layer is quantised, or one not by bitsandbytes; nothing is changed then.
        """
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, PacaLayer) and m.is_quantised}
        if not layers:
            raise ConfigError("merge_and_requantise: no adapted layer is quantised. Use merge_and_unload.")
        for layer in layers.values():
            check_rewritable(layer.base_layer, layer.name)
        training = self.training
        before = first_tensor(self.eval()(**batch))
        for layer in layers.values():
            layer.quantise_again()
        change = (first_tensor(self(**batch)) - before).abs().max().item()
        logger.warning(
            "Quantising %d merged layers again changes a logit by up to %.3g; logits are up to %.3g.",
            len(layers), change, before.abs().max().item(),
        )  # fmt: skip
        for name, layer in layers.items():
            self.model.set_submodule(name, layer.base_layer)
        return super()._unload_and_optionally_merge(merge=True).train(training)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Run each row of a batch with the adapter of its name, "__base__" for none.

        Raises: ConfigError: for an unknown name, in training, with merged adapters, or biases, which are not
            kept per row.
        """
        adapter_names = row_names(adapter_names)
        if not adapter_names or {*adapter_names} == {*self.active_adapters} == {adapter_names[0]}:
            yield
            return
        self._check_rows(adapter_names)
        layers = [module for module in self.model.modules() if isinstance(module, PacaLayer)]
        with ExitStack() as hooks:
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    hook = partial(_with_names, list(adapter_names))
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for layer in layers:
                hooks.callback(layer.use_for_rows, None)
                layer.use_for_rows(adapter_names)
            yield

    def _check_rows(self, adapter_names: Sequence[str]) -> None:
        if unknown := set(adapter_names) - self.peft_config.keys() - {"__base__"}:
            raise ConfigError(
                f"adapter_names: the model has no adapter {min(unknown)!r}. "
                f"{did_you_mean(min(unknown), [*self.peft_config, '__base__'])}"
            )
        biased = [name for name, config in self.peft_config.items() if config.bias != "none"]
        merged = any(layer.merged for layer in self.model.modules() if isinstance(layer, PacaLayer))
        for obstacle, advice in (
            (self.training and "the model is in training mode", "Call model.eval()."),
            (merged and "adapters are merged", "Unmerge them first."),
            (biased and f"adapter {biased[0]!r} trains biases", "Run the rows of each adapter apart."),
        ):
            if obstacle:
                raise ConfigError(f"adapter_names gives each row its adapter, but {obstacle}. {advice}")

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, PacaLayer) or isinstance(child, PacaLayer):
            # PEFT would move the adapter to its weight, which may be offloaded.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)


def first_tensor(output: Any) -> Tensor:
    """Return the logits of a model's output, or its first tensor."""
    found = getattr(output, "logits", output)
    first: Tensor = found if isinstance(found, Tensor) else found[0]
    return first


def _with_names(
    adapter_names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": adapter_names}


def _check_columns(model: PacaModel, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
    """Check columns that are about to be loaded, before the first is. Raises: CheckpointError."""
    for path, layer in model.named_modules():
        if isinstance(layer, PacaLayer):
            layer.check_columns(state_dict, f"{prefix}{path}.")


def _compare_bases(model: PacaModel, incompatible_keys: Any) -> None:
    """Warn of loaded adapters whose columns started from others than those of this base."""
    layers = {name: layer for name, layer in model.model.named_modules() if isinstance(layer, PacaLayer)}
    for adapter_name, config in model.peft_config.items():
        if not (getattr(config, "is_saved", False) and config.base_columns):
            continue
        here = {
            name: sketch(columns, name)
            for name, layer in layers.items()
            if name in config.base_columns and adapter_name in layer.r
            if (columns := layer.start_columns(adapter_name)) is not None
        }
        if (apart := difference(config.base_columns, here)) > SAME:
            logger.warning(
                "Adapter '%s' was trained on other columns than this base has: they differ by about %.2g %% "
                "of their norm%s. A base that is quantised otherwise differs by up to a tenth; more is "
                "another model.", adapter_name, 100 * apart,
                "" if config.columns_from is None else f"; they were those of '{config.columns_from}'",
            )  # fmt: skip
        config.base_columns |= here


def add_adapter(
    layer: PacaLayer,
    adapter_name: str,
    config: PacaConfig,
    name: str,
    original: OriginalColumns | None = None,
) -> None:
    """Choose columns as `config` says for the layer called `name`, and add the adapter.

    Args:
        original: the checkpoint that columns of a quantised layer start from. None: its own.
    """
    r = rank_of(config, name)
    index = choose_columns(layer.columns(), r, name, config.selection, config.seed, indices_of(config, name))
    read = None if original is None or not layer.is_quantised else partial(original.read, name)
    layer.update_layer(
        adapter_name, index, scale_of(config, name), config.init_weights, config.inference_mode, read
    )
    if not config.is_saved and (columns := layer.start_columns(adapter_name)) is not None:
        config.base_columns[name] = sketch(columns, name)


def rank_of(config: PacaConfig, name: str) -> int:
    """Return r of the layer called `name`."""
    return pattern_value(config.rank_pattern, name, config.r)


def scale_of(config: PacaConfig, name: str) -> float:
    """Return the factor of the columns' change of the layer called `name`."""
    alpha = pattern_value(config.alpha_pattern, name, config.alpha)
    return 1.0 if alpha is None else alpha / rank_of(config, name)


def indices_of(config: PacaConfig, name: str) -> list[int] | None:
    """Return the explicit columns of the layer called `name`, or None if the selection chooses.

    Raises: ConfigError: if there are indices, but none for this layer.
    """
    columns = pattern_value(config.indices, name, None)
    if columns is None and config.indices is not None:
        raise ConfigError(
            f"`indices` has no columns for '{name}', which target_modules matches. Add them, or exclude the "
            "module."
        )
    return columns
