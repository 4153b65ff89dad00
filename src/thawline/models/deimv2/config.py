"""Configuration of a detector, one dataclass per part, and overrides by name."""

from __future__ import annotations

__all__ = ["BackboneConfig", "CriterionConfig", "DEIMv2Config", "EncoderConfig", "with_overrides"]

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias

from thawline.errors import ConfigError, did_you_mean
from thawline.models.deimv2.network.decoder import DecoderConfig
from thawline.models.deimv2.network.hgnetv2 import HGNetV2Config
from thawline.models.deimv2.network.hybrid_encoder import HybridEncoderConfig
from thawline.models.deimv2.network.lite_encoder import LiteEncoderConfig
from thawline.models.deimv2.network.sta import AdaptedViTConfig
from thawline.recipe.checks import height_width

BackboneConfig: TypeAlias = HGNetV2Config | AdaptedViTConfig
EncoderConfig: TypeAlias = HybridEncoderConfig | LiteEncoderConfig
ClassLoss: TypeAlias = Literal["mal", "vfl", "focal"]


@dataclass(frozen=True, kw_only=True)
class CriterionConfig:
    """Loss terms, their weights, and when the matching cost changes. Defaults are those of N to X."""

    class_loss: ClassLoss = "mal"
    """Classification term; `mal` as published."""
    gamma: float = 1.5
    """Exponent of the classification term."""
    local: bool = True
    """Add fgl and ddf, the terms on the edges' distributions. Off for Atto, Femto and Pico."""
    union_set: bool = True
    """Box terms of all stages share the union of their matches. Off for Atto, Femto and Pico."""
    matcher_change_epoch: int = 45
    """From this epoch on, counted from 0, queries are matched by score and overlap alone."""
    class_weight: float = 1.0
    """Weight of the classification term."""
    bbox_weight: float = 5.0
    """Weight of the L1 distance of boxes."""
    giou_weight: float = 2.0
    """Weight of 1 - GIoU."""
    fgl_weight: float = 0.15
    """Weight of the fine-grained localisation term."""
    ddf_weight: float = 1.5
    """Weight of the distillation from the last layer."""

    def __post_init__(self) -> None:
        if self.class_loss not in typing.get_args(ClassLoss):
            raise ConfigError(
                f"`class_loss='{self.class_loss}'`: expected one of {', '.join(typing.get_args(ClassLoss))}."
            )
        if self.gamma < 0:
            raise ConfigError(f"`gamma={self.gamma}`: expected 0 or more; published is 1.5.")


@dataclass(frozen=True, kw_only=True)
class DEIMv2Config:
    """Shape of a detector. Parts may be given as plain dictionaries, as read from JSON."""

    variant: str | None = None
    """The published size that this config is, or was derived from."""
    num_classes: int = 80
    class_names: tuple[str, ...] | None = None
    """Names of class 0, 1, …; None: unknown."""
    image_size: tuple[int, int] = (640, 640)
    """Height and width the weights were trained for. The network takes any multiple of its largest stride."""
    image_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Mean subtracted from pixels in 0–1."""
    image_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divisor of pixels after the mean is subtracted."""
    backbone: BackboneConfig
    encoder: EncoderConfig
    decoder: DecoderConfig
    num_denoising: int = 100
    """Number of positive denoising queries per image to aim at in training. 0: no denoising queries."""
    label_noise: float = 0.5
    """Half of this share of the denoising labels is changed."""
    box_noise: float = 1.0
    """Maximum shift of an edge in denoising, in half sizes of the box."""
    max_detections: int = 300
    """Maximum detections per image (highest scores kept)."""
    criterion: CriterionConfig = field(default_factory=CriterionConfig)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for part in fields(self):
            object.__setattr__(
                self, part.name, _decode(hints[part.name], getattr(self, part.name), part.name)
            )
        if self.num_classes < 1:
            raise ConfigError(f"`num_classes={self.num_classes}`: expected 1 or more.")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ConfigError(
                f"{len(self.class_names)} `class_names` for `num_classes={self.num_classes}`: name each."
            )
        if self.num_denoising < 0:
            raise ConfigError(
                f"`num_denoising={self.num_denoising}`: expected 0 (off) or more; published is 100."
            )
        if self.encoder.hidden_dim != self.decoder.hidden_dim:
            raise ConfigError(
                f"`encoder.hidden_dim={self.encoder.hidden_dim}` and `decoder.hidden_dim="
                f"{self.decoder.hidden_dim}` must be equal."
            )
        if isinstance(self.encoder, LiteEncoderConfig) and len(self.backbone.strides) != 1:
            raise ConfigError(
                f"The lite encoder takes one map, the backbone gives strides {self.backbone.strides}. "
                "Choose one output, or the hybrid encoder."
            )
        if len(self.strides) != len(self.decoder.num_points):
            raise ConfigError(
                f"`decoder.num_points={self.decoder.num_points}` must name points for each of the strides "
                f"{self.strides}."
            )
        height_width("image_size", self.image_size, self.strides[-1])

    @property
    def shown_names(self) -> tuple[str, ...]:
        """Class names; "class 0", "class 1", … where the config has none."""
        return self.class_names or tuple(f"class {index}" for index in range(self.num_classes))

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the maps that the decoder reads, fine to coarse."""
        if isinstance(self.encoder, LiteEncoderConfig):
            (stride,) = self.backbone.strides
            return (stride, 2 * stride)
        return self.backbone.strides


def with_overrides(config: DEIMv2Config, overrides: Mapping[str, Any]) -> DEIMv2Config:
    """Return a copy with other values.

    Args:
        overrides: names of fields of the config (`num_classes`), or of any of its parts where only one part
            has that name (`num_queries`, `rope_rescale`), or a part with the values to change in it
            (`decoder={"num_layers": 2}`).
    Raises: ConfigError: no part has such a field, several have it, or nothing reads it.
    """
    values = asdict(config)
    for name, value in _with_classes(config, overrides).items():
        *path, _ = _find(values, name)
        part = reduce(dict.__getitem__, path, values)
        part[name] = _merge(part[name], asdict(value) if _is_part(value) else value)
    changed = DEIMv2Config(**values)
    _check_read(config, changed)
    return changed


def _check_read(before: DEIMv2Config, after: DEIMv2Config) -> None:
    """Refuse another value of a setting that nothing reads, since a part is switched off."""
    criterion = ("fgl_weight", "ddf_weight")
    is_unread = {
        "num_denoising=0": (after.num_denoising == 0, before, after, ("label_noise", "box_noise")),
        "local=False": (not after.criterion.local, before.criterion, after.criterion, criterion),
    }
    for reason, (is_off, old, new, names) in is_unread.items():
        for name in names:
            if is_off and getattr(old, name) != getattr(new, name):
                raise ConfigError(f"`{name}={getattr(new, name)}`: nothing reads it, since `{reason}`.")


def _with_classes(config: DEIMv2Config, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keep `num_classes` and `class_names` consistent: each determines, or invalidates, the other."""
    if not {"num_classes", "class_names"} & set(overrides):
        return overrides
    names = overrides.get("class_names")
    num_classes = overrides.get("num_classes", len(names) if names else config.num_classes)
    if names is None and num_classes == config.num_classes:
        names = config.class_names
    return {**overrides, "num_classes": num_classes, "class_names": names}


def _is_part(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _merge(current: Any, value: Any) -> Any:
    """Update the named values of a part; another kind of part, or a single value, replaces it."""
    if not isinstance(current, dict) or not isinstance(value, Mapping):
        return value
    if value.get("kind", current.get("kind")) != current.get("kind"):
        return value
    return current | {key: _merge(current.get(key), inner) for key, inner in value.items()}


def _find(values: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return the path of a setting: at the top, or in the only part that has it."""
    paths = _paths(values)
    owners = [path for path in paths if path[-1] == name]
    if not owners:
        shape = "of an own shape" if values["variant"] is None else f"'{values['variant']}'"
        hint = did_you_mean(name, {path[-1] for path in paths})
        raise ConfigError(f"DEIMv2 {shape} has no setting '{name}'. {hint}")
    shortest = min(owners, key=len)
    if len(owners) > 1 and len(shortest) > 1:
        places = ", ".join(".".join(path[:-1]) for path in owners)
        raise ConfigError(
            f"'{name}' is a setting of {places}. Name the part: `{shortest[0]}={{'{name}': …}}`."
        )
    return shortest


def _paths(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all settings of a config and its parts."""
    paths = []
    for name, value in values.items():
        paths.append((*prefix, name))
        if isinstance(value, dict):
            paths += _paths(value, (*prefix, name))
    return paths


def _decode(hint: Any, value: Any, name: str) -> Any:
    """Convert a value read from JSON to its field's type: dictionaries become parts, lists tuples."""
    if isinstance(value, Mapping):
        part = _part(hint, value, name)
        hints = typing.get_type_hints(part)
        for key in value:
            if key not in hints:
                raise ConfigError(f"`{name}` has no setting '{key}'. {did_you_mean(key, hints)}")
        return part(**{key: _decode(hints[key], inner, f"{name}.{key}") for key, inner in value.items()})
    if isinstance(value, list | tuple):
        inner = next((arg for choice in _choices(hint) for arg in typing.get_args(choice)), Any)
        value = tuple(_decode(inner, item, name) for item in value)
    if not _fits(hint, value):
        expected = " or ".join(_spelled(choice) for choice in _choices(hint))
        raise ConfigError(f"`{name}={value!r}`: expected {expected}.")
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Return True if a value has its field's type. An int is also a float; a bool is not a number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(choice, value) for choice in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(inner) == len(value) and all(map(_fits, inner, value))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _spelled(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    return str(hint) if typing.get_args(hint) else hint.__name__


def _part(hint: Any, value: Mapping[str, Any], name: str) -> Any:
    """Return the class that a dictionary describes: the only choice, or the one its `kind` names."""
    parts: list[Any] = [choice for choice in _choices(hint) if is_dataclass(choice)]
    if len(parts) == 1:
        return parts[0]
    by_kind = {part.kind: part for part in parts}
    if value.get("kind") not in by_kind:
        known = " or ".join(f"'{kind}'" for kind in by_kind)
        raise ConfigError(f"`{name}.kind={value.get('kind')!r}`: expected {known}.")
    return by_kind[value["kind"]]


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
