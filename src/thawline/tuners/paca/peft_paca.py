"""PEFT's own PaCA (from PEFT 0.22 on): its files, read and written, and its config on our layers.

| | PEFT | here |
|---|---|---|
| change of the columns, (O, R) | `paca_delta` | `thawline_paca_delta` |
| column indices, (R,), sorted | `paca_indices` | `thawline_paca_indices` |
| scale | `paca_alpha` / r | `alpha` / r |
| seed | `random_seed` | `seed` |

Layout and fields are those of PEFT's public release; its class is neither needed nor imported. Where PEFT has
no PaCA, importing `thawline.tuners` lets `PeftModel.from_pretrained` load such a folder. Where it has one,
that one stays in charge until `use_for_peft_paca()` is called.
"""

from __future__ import annotations

__all__ = [
    "PEFT_PACA",
    "PeftPacaConfig",
    "PeftPacaModel",
    "from_peft_paca",
    "to_peft_paca",
    "use_for_peft_paca",
]

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from thawline.errors import CheckpointError, ConfigError
from thawline.files import read_json
from thawline.tuners._names import PREFIX, plain_name, unwrapped
from thawline.tuners._peft import TunerType, set_tuner
from thawline.tuners.paca.config import PacaConfig
from thawline.tuners.paca.layer import PacaLayer
from thawline.tuners.paca.model import PacaModel
from thawline.tuners.to_lora import adapter_named, namesakes, other_tensors

PEFT_PACA = TunerType("PACA")
CONFIG = "adapter_config.json"
SHARED = (
    "r", "target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "init_weights",
    "task_type", "base_model_name_or_path", "revision", "inference_mode",
)  # fmt: skip


@dataclass(kw_only=True)
class PeftPacaConfig(PeftConfig):
    """PEFT's `PacaConfig`, for a PEFT that has none: read from its folders, trained by our layers.

    New adapters are better made with `thawline.PacaConfig`, which has more fields.
    """

    r: int = 8
    """Columns trained per layer."""
    paca_alpha: float = 8
    """The change of a column is scaled by paca_alpha / r."""
    target_modules: list[str] | str | None = None
    """Names, a regular expression, or "all-linear"."""
    exclude_modules: list[str] | str | None = None
    """Names or a regular expression of modules to leave out."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the blocks to adapt."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of blocks."""
    modules_to_save: list[str] | None = None
    """Modules trained in full."""
    random_seed: int | None = None
    """Seed of the choice of columns."""
    init_weights: bool = True
    """True: the adapted model starts as its base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_PACA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class PeftPacaModel(PacaModel):
    """Our layers under PEFT's config and in PEFT's files."""

    prefix = PEFT_PACA.prefix

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        ours = as_ours(peft_config)
        super()._prepare_model(ours, model)
        peft_config.target_modules = ours.target_modules

    def _create_and_replace(self, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        super()._create_and_replace(as_ours(peft_config), *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        plain: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return plain.replace(f".{PacaModel.prefix}", f".{cls.prefix}")


def as_ours(config: Any) -> PacaConfig:
    """Return PEFT's `PacaConfig` as ours: equal, but a new adapter draws other columns from its seed."""
    fields = {name: getattr(config, name) for name in SHARED}
    if fields["layers_to_transform"] is not None:
        fields["layers_pattern"] = config.layers_pattern
    return PacaConfig(**fields, alpha=config.paca_alpha, seed=config.random_seed or 0)


def use_for_peft_paca() -> None:
    """Let PEFT's own `PacaConfig` build our layers from now on, in this process.

    Adapters that exist keep theirs. Saved folders keep PEFT's layout.
    """
    set_tuner(PEFT_PACA, PeftPacaModel)


def from_peft_paca(base_model: nn.Module, directory: str | Path) -> PeftModel:
    """Load an adapter of PEFT's own PaCA onto `base_model`: exactly equal.

    Args:
        directory: a folder that PEFT's `save_pretrained` wrote. The model's other adapters, which PEFT writes
            into a subfolder each, get the subfolder's name. A Trainer's `checkpoint-*` are left out.
    Returns: the model with `thawline.PacaConfig` adapters, the folder's own one ("default") active.
    Raises: CheckpointError: for a folder without such an adapter, or one that is damaged or does not fit the
        base: naming the layer. The base is unchanged then.
    """
    root = Path(directory)
    folders = {"default": root} if (root / CONFIG).is_file() else {}
    inner = [config.parent for config in sorted(root.glob(f"*/{CONFIG}"))]
    folders |= {folder.name: folder for folder in inner if not folder.name.startswith("checkpoint-")}
    if not folders:
        raise CheckpointError(f"'{root}' has no {CONFIG}: expected the folder of an adapter.")
    configs = {name: as_ours(_read_config(folder)) for name, folder in folders.items()}
    weights = {name: load_peft_weights(str(folder), device="cpu") for name, folder in folders.items()}
    for name, folder in folders.items():
        _check_fits(weights[name], configs[name], base_model, folder)
    first, *others = folders
    model = get_peft_model(base_model, configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    for name in folders:
        ours = {key.replace(".paca_", f".{PacaModel.prefix}"): t for key, t in weights[name].items()}
        set_peft_model_state_dict(model, ours, adapter_name=name)
    model.set_adapter(first)
    return model


def to_peft_paca(model: nn.Module, save_directory: str | Path, *, adapter_name: str | None = None) -> None:
    """Write an adapter as PEFT's own PaCA saves it: exactly equal, for PEFT 0.22 and newer without thawline.

    Args:
        model: a `PeftModel`, or any model with injected adapters; may be wrapped by DDP or torch.compile.
        save_directory: folder for adapter_config.json and adapter_model.safetensors; created if missing.
        adapter_name: None: every adapter, as PEFT saves them: "default" into the folder itself, each other
            one into a subfolder of its name.
    Raises: ConfigError: for what that layout cannot say, naming the layer or the field; nothing is written.
    """
    model = unwrapped(model)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    names = list(configs) if adapter_name is None else [adapter_named(model, adapter_name)]
    root = Path(save_directory)
    is_alone = adapter_name is not None
    written = {
        root if is_alone or name == "default" else root / name: _as_peft(model, name) for name in names
    }
    for folder, (config, tensors) in written.items():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))


def _as_peft(model: nn.Module, name: str) -> tuple[PeftPacaConfig, dict[str, Tensor]]:
    config = model.peft_config[name]
    layers = {
        plain_name(path): layer
        for path, layer in model.named_modules()
        if isinstance(layer, PacaLayer) and name in layer.r
    }
    if not layers:
        raise ConfigError(f"Adapter {name!r} is of type {config.peft_type.value}; to_peft_paca writes PaCA.")
    r = next(iter(layers.values())).r[name]
    scale = next(iter(layers.values())).scaling[name]
    tensors = {}
    for path, layer in layers.items():
        if type(layer.base_layer) is not nn.Linear:
            raise ConfigError(
                f"'{path}' is a {type(layer.base_layer).__name__}; PEFT's PaCA has Linear alone."
            )
        if (layer.r[name], layer.scaling[name]) != (r, scale):
            raise ConfigError(
                f"'{path}' has r={layer.r[name]} and scale {layer.scaling[name]:g}, others r={r} and "
                f"{scale:g}. PEFT's PaCA has no rank_pattern or alpha_pattern. Use thawline.to_lora."
            )
        delta, index = layer.thawline_paca_delta[name], layer.thawline_paca_indices[name]
        tensors[f"{PREFIX}{path}.paca_delta"] = delta.detach().cpu().clone()
        tensors[f"{PREFIX}{path}.paca_indices"] = index.cpu().clone()
    for field in ("bias", "trainable_token_indices"):
        value = getattr(config, field, None)
        if value and value != "none":
            raise ConfigError(f"Adapter {name!r} has {field}={value!r}, which PEFT's PaCA has not.")
    tensors |= {key: tensor.detach().cpu().clone() for key, tensor in other_tensors(model, name).items()}
    theirs = PeftPacaConfig(
        r=r,
        paca_alpha=scale * r,
        target_modules=sorted(layers),
        # PEFT adapts every module whose name ends in a target's, also those that we did not adapt.
        exclude_modules=namesakes(model, set(layers)) or None,
        modules_to_save=config.modules_to_save,
        random_seed=getattr(config, "seed", 0),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    return theirs, tensors


def _read_config(folder: Path) -> PeftPacaConfig:
    fields = read_json(folder / CONFIG)
    if fields.get("peft_type") != PEFT_PACA:
        raise CheckpointError(f"'{folder}' holds a {fields.get('peft_type')} adapter; expected PACA.")
    known = PeftPacaConfig.__dataclass_fields__
    if odd := [name for name, value in fields.items() if name not in known and value]:
        raise CheckpointError(
            f"'{folder}': {CONFIG} has {odd[0]}={fields[odd[0]]!r}, which is not known here."
        )
    return PeftPacaConfig(**{name: value for name, value in fields.items() if name in known})


def _check_fits(weights: Mapping[str, Tensor], config: PacaConfig, base: nn.Module, folder: Path) -> None:
    """Check every tensor of a folder against the base, before the base is changed.

    Raises: CheckpointError: naming the layer and the reason.
    """
    kinds = (".paca_delta", ".paca_indices")
    found = {
        key.removeprefix(PREFIX).removesuffix(kind) for kind in kinds for key in weights if key.endswith(kind)
    }
    saved = tuple(f"{name}." for name in config.modules_to_save or ())
    for key in weights:
        if not (key.endswith(kinds) or any(part in key for part in saved)):
            raise CheckpointError(f"'{folder}' has '{key}', neither columns nor of modules_to_save: damaged.")
    targets = PacaModel.checked_targets(config, base)
    if odd := sorted(found ^ targets.keys()):
        has = "has no columns for" if odd[0] in targets else "has columns for"
        raise CheckpointError(
            f"'{folder}' {has} '{odd[0]}', unlike its target_modules on {type(base).__name__}: damaged, or "
            "made for another base model."
        )
    for path in sorted(found):
        delta, index = (weights.get(f"{PREFIX}{path}{kind}") for kind in kinds)
        if delta is None or index is None:
            raise CheckpointError(f"'{folder}' lacks {kinds[delta is not None][1:]} of '{path}': damaged.")
        module = targets[path]
        if type(module) is not nn.Linear:
            raise CheckpointError(f"'{path}' is a {type(module).__name__}; PEFT's PaCA has Linear alone.")
        shapes = ((module.out_features, config.r), (config.r,))
        if (delta.shape, index.shape) != shapes:
            raise CheckpointError(
                f"'{folder}': '{path}' has columns {tuple(delta.shape)} and indices {tuple(index.shape)}, "
                f"expected {shapes[0]} and {shapes[1]}: another r, or another base model."
            )
        if not (torch.diff(index) > 0).all() or index[0] < 0 or index[-1] >= module.in_features:
            raise CheckpointError(
                f"'{folder}': the indices of '{path}' are not sorted, repeat, or leave 0 to "
                f"{module.in_features - 1}: {index.tolist()}."
            )
