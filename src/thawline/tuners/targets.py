"""Modules and weights that an adapter's config names: each pattern is adapted or refused by name.

PEFT leaves out silently what a pattern does not reach. Here an entry that matches nothing is an error that
says what would match. So is one that means fused weights which the tuner does not reach: in transformers 5
experts (Mixtral, Qwen-MoE and their like) are parameters of three dimensions, without a module for each
layer. "all-linear", which names nothing, says what it leaves out.
"""

from __future__ import annotations

__all__ = [
    "check_attached",
    "check_fused",
    "check_patterns",
    "check_trained",
    "find_routers",
    "find_targets",
    "is_all_linear",
    "is_left_out",
    "join_patterns",
    "warn_of_the_rest",
]

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import Tensor, nn

from thawline.errors import ConfigError, did_you_mean
from thawline.tuners.experts import ExpertsLinear, SplitExperts, can_split

logger = logging.getLogger(__name__)

EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
"""Names of an expert's layers in models that do not fuse them, and in adapters of such models."""
PARTS = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "up_proj": ("w1",), "down_proj": ("w2",)}
"""Weight of fused experts → the layers that it has taken in."""
ADDED_BY_PEFT = ("classifier", "score", "qa_outputs")
"""Heads that PEFT writes into `modules_to_save` by itself, whether or not a model has them."""
ROUTERS = ("Router", "GroupedLinear")
"""Ends of the class names of transformers' linear layers that return something else than x Wᵀ."""
OTHER_OUTPUT = "does not return a product alone, but chooses experts or groups"
PATTERNS = ("rank_pattern", "alpha_pattern", "heads_pattern", "indices")
"""Fields of a config by whose keys an adapted module gets a value of its own."""


def is_all_linear(targets: Any) -> bool:
    """Return whether `target_modules` is PEFT's word for every linear layer."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def find_targets(config: Any, model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that `config` adapts, by name; in it, "all-linear" becomes their names.

    "all-linear" leaves out what `why_unfit` tells.
    """
    every = is_all_linear(config.target_modules)
    _maybe_include_all_linear_layers(config, model)
    modules = dict(modules_of(model))
    if every:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        others = {name for name, m in modules.items() if _is_other_linear(m) and m is not head}
        config.target_modules |= others
        config.target_modules -= {
            name for name in config.target_modules if name in modules and why_unfit(model, name)
        }
    found = {
        name: module for name, module in modules.items() if name and check_target_module_exists(config, name)
    }
    experts = {name: module for name, module in found.items() if isinstance(module, SplitExperts)}
    if experts:  # named as a whole
        for name, module in experts.items():
            found |= {f"{name}.{leaf}": layer for leaf, layer in module.products().items()}
        config.target_modules = found.keys() - experts.keys()
    return found


def _is_other_linear(module: nn.Module) -> bool:
    """Return whether a module that PEFT takes for no linear layer is one: experts; HQQ's, GPTQ's or AWQ's."""
    if isinstance(module, nn.Linear | BaseTunerLayer | ExpertsLinear):
        return isinstance(module, ExpertsLinear)
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes) and not any(module.children())


def find_routers(model: nn.Module) -> list[str]:
    """Return the names of linear layers that choose experts, or otherwise return more than a product."""
    return [
        name
        for name, module in modules_of(model)
        if isinstance(module, nn.Linear) and type(module).__name__.endswith(ROUTERS)
    ]


def why_unfit(model: nn.Module, name: str) -> str | None:
    """Return why the module called `name` takes no adapter; None: it does."""
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "belongs to nn.MultiheadAttention, which uses the weight without calling the layer"
    if name in find_routers(model):
        return OTHER_OUTPUT
    return None


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by name, without those inside adapters' layers."""
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
        yield name, module


def check_attached(tuner: BaseTuner, asked: Any, config: Any) -> None:
    """Check an adapter of PEFT's own, once attached: all of `asked` is adapted, or refused by name.

    Args:
        asked: a copy of its config, from before PEFT turned the names of fused experts into parameters.
        config: the config as PEFT left it.
    Raises: ConfigError: as `check_patterns` and `check_fused`.
    """
    model, targets = tuner.model, getattr(asked, "target_modules", None)
    if is_all_linear(targets):
        warn_of_the_rest(asked, model)
    elif targets is not None:
        check_fused(asked, model)
    if getattr(config, "target_parameters", None) and isinstance(targets, set | list):
        targets = {entry for entry in targets if entry.rpartition(".")[2] not in ("gate", *EXPERT_LAYERS)}
    for name in tuner.targeted_module_names:
        layer = model.get_submodule(name)
        if type(getattr(layer, "base_layer", layer)).__name__.endswith(ROUTERS):
            raise ConfigError(f"'{name}' {OTHER_OUTPUT}. Add it to exclude_modules.")
    check_patterns(asked, model, targets, [*tuner.targeted_module_names, *tuner.targeted_parameter_names])


def check_patterns(config: Any, model: nn.Module, targets: Any, adapted: Collection[str]) -> None:
    """Check that every name and pattern of `config` says something about `model`.

    Args:
        targets: `target_modules` as it was written, before "all-linear" became names. None: not to check.
        adapted: names of the modules, and weights, that are adapted.
    Raises: ConfigError: naming an entry that has no effect, and what would.
    """
    names = [name for name, _ in modules_of(model) if name]
    for entry in sorted(targets) if isinstance(targets, (list, tuple, set)) else ():
        named = [name for name in names if _ends(name, entry)]
        if not named:
            raise ConfigError(f"`target_modules` has '{entry}': {_no_module(config, entry, model, names)}")
        if not any(name in adapted or is_left_out(config, name) for name in named):
            raise ConfigError(
                f"`target_modules` has '{entry}', of which `layers_to_transform` leaves nothing."
            )
    blocks = getattr(config, "layers_to_transform", None)
    for block in [blocks] if isinstance(blocks, int) else blocks or ():
        if not any(re.search(rf"(^|\.){block}\.", name) for name in adapted):
            raise ConfigError(f"`layers_to_transform` has {block}, but no adapted module is in such a block.")
    for field in PATTERNS:
        for pattern in getattr(config, field, None) or {}:
            if not any(_matches(field, pattern, name) for name in adapted):
                raise ConfigError(
                    f"`{field}` has '{pattern}', which is no adapted module. "
                    f"{did_you_mean(pattern, _endings(adapted))}"
                )
    excluded = getattr(config, "exclude_modules", None) or ()
    for entry in sorted(excluded) if not isinstance(excluded, str) else (excluded,):
        probe = {entry} if not isinstance(excluded, str) else entry
        if not any(_is_excluded(probe, name) for name in [*names, *fused_weights(model)]):
            raise ConfigError(
                f"`exclude_modules` has '{entry}', which is no module of {type(model).__name__}. "
                f"{did_you_mean(entry, _endings(names))}"
            )


def check_trained(config: Any, model: nn.Module) -> None:
    """Check the modules and tokens that `config` trains besides its targets.

    Raises: ConfigError: for a module that `model` does not have, or a token outside of its table.
    """
    modules = dict(modules_of(model))
    for entry in set(getattr(config, "modules_to_save", None) or ()) - set(ADDED_BY_PEFT):
        if not any(name.endswith(entry) for name in modules):
            raise ConfigError(f"`modules_to_save` has '{entry}': {_no_module(config, entry, model, modules)}")
    tokens = getattr(config, "trainable_token_indices", None) or {}
    for entry, indices in tokens.items() if isinstance(tokens, dict) else [("", tokens)]:
        tables = [module for name, module in modules.items() if entry and _ends(name, entry)]
        if not entry and hasattr(model, "get_input_embeddings"):
            tables = [model.get_input_embeddings()]
        if entry and not tables:
            raise ConfigError(
                f"`trainable_token_indices` has '{entry}': {_no_module(config, entry, model, modules)}"
            )
        for table in tables:
            n = len(table.weight)
            odd = [index for index in indices if not 0 <= index < n]
            if odd:
                raise ConfigError(
                    f"`trainable_token_indices` has {odd[0]}, but the table has tokens 0 to {n - 1}. Enlarge "
                    "it with model.resize_token_embeddings before the adapter is attached."
                )


def fused_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters outside adapters that hold several layers each, by name."""
    return {
        f"{name}.{leaf}".lstrip("."): weight
        for name, module in modules_of(model)
        if not type(module).__module__.startswith("torch.nn.")
        and not isinstance(module, nn.Linear | ExpertsLinear | BaseTunerLayer)
        for leaf, weight in module._parameters.items()
        if weight is not None and not leaf.endswith("bias") and _is_fused(f"{name}.{leaf}", weight)
    }


def check_fused(config: Any, model: nn.Module, found: Collection[str] = ()) -> None:
    """Check that `config` names no fused weights but those `found`.

    Raises: ConfigError: naming one, its shape and what would work.
    """
    for name, weight in fused_weights(model).items():
        if _means(config, name):
            raise ConfigError(
                f"`target_modules` means '{name}' {_shape(weight)} too: several layers in one weight, "
                f"{_reach(config, model, [name])}. Name other modules, or leave it frozen with "
                f"exclude_modules=['{_container(name)}']."
            )
    for name, module in modules_of(model):
        if isinstance(module, ExpertsLinear) and name not in found and _means_part(config, name):
            raise ConfigError(
                f"`target_modules` means a part of '{name}' {_shape(module.weight)} too, one weight of all "
                f"experts. Name it whole ('{name.rpartition('.')[2]}'), or all weights of the experts "
                f"('{_container(name)}'), or leave them frozen with exclude_modules=['{_container(name)}']."
            )


def warn_of_the_rest(config: Any, model: nn.Module) -> None:
    """Warn of layers that "all-linear" does not reach, unless `config` excludes them.

    A model that is all on meta, as a plan builds it, is not going to train.
    """
    if all(parameter.is_meta for parameter in model.parameters()):
        return
    fused = {name: weight for name, weight in fused_weights(model).items() if not is_left_out(config, name)}
    if fused:
        share = sum(weight.numel() for weight in fused.values()) / sum(p.numel() for p in model.parameters())
        name, weight = next(iter(fused.items()))
        logger.warning(
            "'all-linear' leaves %.0f %% of the weights out: '%s' %s%s hold several layers (experts) in one "
            "weight, %s. exclude_modules=['%s'] says that they shall stay frozen.",
            100 * share, name, _shape(weight), _and_more(fused), _reach(config, model, fused),
            _container(name),
        )  # fmt: skip
    attention = [
        name
        for name, module in modules_of(model)
        if isinstance(module, nn.MultiheadAttention)
        and not (isinstance(module.out_proj, BaseTunerLayer) or is_left_out(config, f"{name}.out_proj"))
    ]
    routers = [name for name in find_routers(model) if not is_left_out(config, name)]
    if routers:
        logger.warning("'all-linear' leaves out '%s'%s: it %s.", routers[0], _and_more(routers), OTHER_OUTPUT)
    if attention:
        logger.warning(
            "'all-linear' leaves out '%s'%s: nn.MultiheadAttention uses its weights without calling layers.",
            attention[0], _and_more(attention),
        )  # fmt: skip


def join_patterns(excluded: Any, more: str | list[str]) -> Any:
    """Return an `exclude_modules` that leaves out `more` too: names of modules, or a regular expression."""
    if not isinstance(excluded, str) and not isinstance(more, str):
        return [*(excluded or ()), *more] or None
    sides = (
        one if isinstance(one, str) else rf"(.*\.)?({'|'.join(map(re.escape, one))})"
        for one in (excluded, more)
        if one
    )
    return "|".join(sides)


def _is_fused(name: str, weight: Tensor) -> bool:
    dims = weight.dim()
    return (dims == 3 or (dims == 2 and "expert" in name)) and min(weight.shape) > 1


def _means(config: Any, name: str) -> bool:
    """Return whether targets reach a fused weight, by its own name or that of a layer inside it."""
    container = name.rpartition(".")[0]
    probes = [name, container]
    if "expert" in container:
        probes += [f"{container}{number}.{layer}" for number in ("", ".0") for layer in EXPERT_LAYERS]
    return not is_left_out(config, name) and any(
        check_target_module_exists(config, probe) for probe in probes
    )


def _means_part(config: Any, name: str) -> bool:
    """Return whether targets reach a layer that an expert's weight called `name` has taken in."""
    container, _, leaf = name.rpartition(".")
    probes = [f"{container}{number}.{part}" for number in ("", ".0") for part in PARTS.get(leaf, ())]
    return any(check_target_module_exists(config, probe) for probe in probes)


def is_left_out(config: Any, name: str) -> bool:
    """Return whether a config excludes the module or weight called `name`, or trains it in full."""
    saved = getattr(config, "modules_to_save", None) or ()
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved) or any(
        _is_excluded(getattr(config, "exclude_modules", None) or (), part)
        for part in (name, name.rpartition(".")[0])
    )


def _is_excluded(excluded: Any, name: str) -> bool:
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(_ends(name, entry) for entry in excluded)


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _matches(field: str, pattern: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise ConfigError(f"`{field}` has '{pattern}', which is no regular expression: {error}.") from error


def _no_module(config: Any, entry: str, model: nn.Module, names: Collection[str]) -> str:
    fused = fused_weights(model)
    named = [name for name in fused if _ends(name, entry)]
    if not named and entry.rpartition(".")[2] in EXPERT_LAYERS:
        named = [name for name in fused if "expert" in name]
    if named:
        return (
            f"no layer, but '{named[0]}' {_shape(fused[named[0]])}, several layers in one weight, "
            f"{_reach(config, model, named)}."
        )
    experts = [name for name, module in modules_of(model) if isinstance(module, ExpertsLinear)]
    if experts and entry.rpartition(".")[2] in EXPERT_LAYERS:
        return f"it is a part of '{experts[0]}', one weight of all experts: name that, or 'experts'."
    return f"no module of {type(model).__name__} is called that. {did_you_mean(entry, _endings(names))}"


def _endings(names: Iterable[str]) -> set[str]:
    """Return the last parts of names, without the numbers of lists."""
    return {ending for name in names if (ending := name.rpartition(".")[2]) and not ending.isdigit()}


def _reach(config: Any, model: nn.Module, names: Collection[str]) -> str:
    """Return which methods adapt fused weights, by which setting, and why that of `config` does not."""
    name = next(iter(names))
    endings = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
    lora = f"tuner.args: {{target_parameters: [{', '.join(endings)}]}}"
    if not can_split(model.get_submodule(name.rpartition(".")[0])):
        return f"which only LoRA reaches ({lora})"
    why = getattr(config, "why_no_experts", "")
    return f"which PaCA reaches (target_modules: [{_container(name)}]), and LoRA ({lora}){why}"


def _container(name: str) -> str:
    """Return the last part of the name of the module that a weight belongs to."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _shape(weight: Tensor) -> str:
    return f"({' × '.join(map(str, weight.shape))})"


def _and_more(found: Collection[str]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
