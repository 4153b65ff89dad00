"""One run: which sections there are, what may stand in each, and what is said of a key that may not."""

from __future__ import annotations

__all__ = [
    "LEADING_FIELD",
    "OBJECTIVES",
    "RunConfig",
    "check_mapping",
    "expand_sections",
    "known_keys",
    "nearest_key",
    "section_types",
    "usual_method",
]

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from thawline.errors import ConfigError, did_you_mean
from thawline.recipe.detection import DetectionBase, DetectionData, DetectionSettings, DetectionTraining
from thawline.recipe.text import MatchSettings, TextBase, TextData, TextSettings
from thawline.recipe.training import TRAINING_ARGUMENTS, Training
from thawline.recipe.tuners import TUNERS, Full, Paca, TunerSettings

OBJECTIVES: dict[str, dict[str, type]] = {
    "text": {"objective": TextSettings, "base": TextBase, "data": TextData},
    "match": {"objective": MatchSettings, "base": TextBase, "data": TextData},
    "detection": {
        "objective": DetectionSettings,
        "base": DetectionBase,
        "data": DetectionData,
        "training": DetectionTraining,
    },
}
"""What may be asked: `objective.kind` → the dataclasses of the sections that depend on it."""

LEADING_FIELD = {"objective": "kind", "base": "model", "tuner": "method", "data": "path"}
"""A section given as a single value gives this field."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: base × tuner × objective, on data, trained somehow."""

    objective: TextSettings | MatchSettings | DetectionSettings = field(default_factory=TextSettings)
    base: TextBase | DetectionBase = field(default_factory=TextBase)
    tuner: TunerSettings = field(default_factory=Paca)
    data: TextData | DetectionData = field(default_factory=TextData)
    training: Training | DetectionTraining = field(default_factory=Training)
    name: str | None = None
    """Name of the run's folder. None: made of base, tuner and data."""
    folder: str = "runs"
    """Where run folders are made."""
    seed: int = 0
    """Seeds the adapter's start, the order of the data and dropout."""
    lean: bool = False
    """Swap norms and gated MLPs for versions that keep less for backward (`thawline.apply_lean`)."""

    def __post_init__(self) -> None:
        for section, wanted in section_types(self.objective.kind, self.tuner.method).items():
            if not isinstance(getattr(self, section), wanted):
                got = type(getattr(self, section)).__name__
                raise ConfigError(f"`{section}` must be a {wanted.__name__} in this recipe, got a {got}.")
        if isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"`seed` must be a whole number from 0 to 2^32 - 1, got {self.seed!r}.")
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise ConfigError(
                f"`name` must be a plain folder name, got {self.name!r}. `folder` says where it lies."
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "the recipe") -> RunConfig:
        """Build a config from nested plain values, as a YAML file holds them.

        Raises: ConfigError: naming an unknown key and its nearest known one, or a value that cannot work.
        """
        values = check_mapping(mapping, source)
        types = _types_of(values)
        sections = {name: types[name](**section) for name, section in values.items() if name in types}
        return cls(**{**values, **sections})

    def to_mapping(self) -> dict[str, Any]:
        """Nested plain values, ready for YAML or JSON; `from_mapping` reads them back."""
        return dataclasses.asdict(self)

    @property
    def run_name(self) -> str:
        """`name`, or one made of base, tuner and data."""
        if self.name is not None:
            return self.name
        paths = [self.data.path] if isinstance(self.data.path, str) else self.data.path
        adapt = getattr(self.tuner, "adapt", "none")
        tuner = self.tuner.method if adapt == "none" else f"{self.tuner.method}-{adapt}"
        parts = [Path(self.base.label).name, tuner, Path(paths[0]).stem]
        return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)

    @property
    def run_folder(self) -> Path:
        """Folder of this run."""
        return Path(self.folder) / self.run_name


def section_types(objective: str, method: str) -> dict[str, type]:
    """The dataclass of each section of a recipe. Raises: ConfigError: for an unknown choice."""
    if objective not in OBJECTIVES:
        raise ConfigError(f"Unknown objective '{objective}'. {did_you_mean(objective, OBJECTIVES)}")
    if method not in TUNERS:
        raise ConfigError(f"Unknown tuner '{method}'. {did_you_mean(method, TUNERS)}")
    return {"training": Training, **OBJECTIVES[objective], "tuner": TUNERS[method]}


def usual_method(objective: str) -> str:
    """The tuner of a recipe that names none: a detector's backbone trains with the rest."""
    return Full.method if objective == "detection" else Paca.method


def check_mapping(mapping: Mapping[str, Any], source: str = "the recipe") -> dict[str, Any]:
    """A recipe's nested values with its sections written out. Raises: ConfigError: naming an unknown key."""
    values = expand_sections(mapping, source)
    types = _types_of(values)
    known = set(known_keys(types))
    for section, value in values.items():
        for key in [f"{section}.{name}" for name in value] if section in types else [section]:
            if key not in known:
                raise ConfigError(f"Unknown key '{key}' in {source}. {nearest_key(key, types)}")
    return values


def expand_sections(mapping: Mapping[str, Any], source: str = "the recipe") -> dict[str, Any]:
    """Write out sections given as their leading field alone (`tuner: lora`)."""
    values = dict(mapping)
    for section in (*LEADING_FIELD, "training"):
        value = values.get(section, {})
        if section in LEADING_FIELD and isinstance(value, (str, list)):
            value = {LEADING_FIELD[section]: value}
        if not isinstance(value, dict):
            raise ConfigError(f"`{section}` in {source} must hold keys and values, got {value!r}.")
        values[section] = dict(value)
    return values


def nearest_key(key: str, types: Mapping[str, type], more: Sequence[str] = ()) -> str:
    """The end of an "unknown key" message: the nearest known key, or ours for another library's name."""
    known = [*known_keys(types), *more]
    section, _, name = key.partition(".")
    if section == "training" and name in TRAINING_ARGUMENTS:
        return f"Here it is called 'training.{TRAINING_ARGUMENTS[name]}'."
    # The same last name in another section is nearer than a similar spelling.
    same = [other for other in known if other.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    close = same or get_close_matches(key, known, n=1)
    if close:
        return f"Did you mean '{close[0]}'?"
    inside = {other.partition(".")[2] for other in known if other.startswith(f"{section}.")}
    if inside:
        return f"'{section}' has: {', '.join(sorted(inside))}."
    return f"Known: {', '.join(sorted({other.partition('.')[0] for other in known}))}."


def known_keys(types: Mapping[str, type]) -> Iterator[str]:
    """Every dotted key a recipe with these sections may have."""
    for config_field in dataclasses.fields(RunConfig):
        if config_field.name in types:
            yield from (
                f"{config_field.name}.{inner.name}" for inner in dataclasses.fields(types[config_field.name])
            )
        else:
            yield config_field.name


def _types_of(values: Mapping[str, Any]) -> dict[str, type]:
    objective = values["objective"].get("kind", TextSettings.kind)
    return section_types(objective, values["tuner"].get("method", usual_method(objective)))
