"""`RunConfig`: one run, its sections, and how recipes, options and keyword arguments become one."""

from __future__ import annotations

__all__ = ["LEADING_FIELD", "OBJECTIVES", "RunConfig", "build_config", "dotted_values", "section_types"]

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from thawline.errors import ConfigError, did_you_mean
from thawline.recipe.checks import domain_name
from thawline.recipe.detection import DetectionBase, DetectionData, DetectionSettings, DetectionTraining
from thawline.recipe.text import MatchSettings, TextBase, TextData, TextSettings
from thawline.recipe.training import TRAINING_ARGUMENTS, Training
from thawline.recipe.tuners import TUNERS, Full, Mhr, Paca, TunerSettings
from thawline.recipe.values import convert, field_types

logger = logging.getLogger(__name__)

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
"""`objective.kind` → the dataclasses of the sections that depend on it."""

LEADING_FIELD = {"objective": "kind", "base": "model", "tuner": "method", "data": "path"}
"""The field that a section given as a single value sets."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: base × tuner × objective, its data, and how it is trained."""

    objective: TextSettings | MatchSettings | DetectionSettings = field(default_factory=TextSettings)
    base: TextBase | DetectionBase = field(default_factory=TextBase)
    tuner: TunerSettings = field(default_factory=Paca)
    data: TextData | DetectionData = field(default_factory=TextData)
    training: Training | DetectionTraining = field(default_factory=Training)
    name: str | None = None
    """Name of the run's folder. None: made of base, tuner and data."""
    folder: str = "runs"
    """Folder that holds the run folders."""
    seed: int = 0
    """Seed of the adapter's initialisation, the order of the data, and dropout."""
    domain: str | None = None
    """Name of the domain that a detection run adds to the frozen detector of `base.weights`: an adapter and
    class heads, saved apart from it (docs/domains.md). None: the run trains a detector of its own."""
    add_classes: str | list[str] = field(default_factory=list)
    """Class, or classes, to add to the trained domain `domain`, which the shared folder or run `base.weights`
    holds. Its adapter and its old classes stay bit for bit; `tuner` is not used (docs/domains.md)."""
    lean: bool = False
    """Swap norms and gated MLPs for versions that keep less for backward (`thawline.apply_lean`), and compute
    a language model's training loss without holding all logits."""

    def __post_init__(self) -> None:
        for section, wanted in section_types(self.objective.kind, self.tuner.method).items():
            if not isinstance(getattr(self, section), wanted):
                got = type(getattr(self, section)).__name__
                raise ConfigError(f"`{section}` must be a {wanted.__name__} in this recipe, got a {got}.")
        if isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"`seed` must be a whole number from 0 to 2^32 - 1, got {self.seed!r}.")
        if self.domain is not None:
            self._check_domain(self.domain)
        added = self.added_classes
        if added and (self.domain is None or len(set(added)) < len(added) or "" in added):
            raise ConfigError(
                "`add_classes` takes names of new classes, each once, for the domain that `domain` names; "
                f"got {list(added)} for {self.domain!r}."
            )
        if self.datasets:
            self._check_datasets()
        elif isinstance(self.data, DetectionData) and isinstance(self.tuner, Mhr) and self.domain is None:
            raise ConfigError(
                f"`tuner: {self.tuner.method}` mixes skills for each of several datasets, and a detector has "
                "one here: give `data.path` a list, or a `domain` to adapt to. Else use lora or paca."
            )
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise ConfigError(
                f"`name` must be a plain folder name, got {self.name!r}. `folder` is the place for a path."
            )

    def _check_domain(self, name: str) -> None:
        if not isinstance(self.base, DetectionBase):
            raise ConfigError(
                "`domain` is for detectors. A text run's adapter is saved apart from its base anyway."
            )
        domain_name(name)
        if self.base.weights is None:
            raise ConfigError("`domain` adds to a trained detector: give it as `base.weights`.")
        if isinstance(self.tuner, Full):
            raise ConfigError(
                "`domain` leaves the base as it is, and `tuner: none` would train it. Use paca, lora, dora "
                "or mhr, or frozen for class heads alone."
            )

    def _check_datasets(self) -> None:
        base: Any = self.base
        objective: Any = self.objective
        if self.domain is not None:
            raise ConfigError(
                f"`domain: {self.domain}` is of one dataset. Of the several in `data.path` each is a domain, "
                "by the name of its folder: leave `domain` out."
            )
        if base.weights is None and not isinstance(self.tuner, Full):
            raise ConfigError(
                f"`tuner: {self.tuner.method}` on several datasets adds to a trained detector, which stays "
                "frozen: give it as `base.weights`, or use `tuner: none` to train all of it."
            )
        if objective.preset == "published":
            raise ConfigError("`objective.preset: published` is for one dataset. Use `derived`.")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "the recipe") -> RunConfig:
        """Build a config from nested plain values, as a YAML file holds them.

        Raises: ConfigError: for an unknown key, with the nearest known one, or a value that cannot work.
        """
        return build_config([(source, mapping)])

    def to_mapping(self) -> dict[str, Any]:
        """Return nested plain values, ready for YAML or JSON; `from_mapping` reads them back."""
        return dataclasses.asdict(self)

    @property
    def run_name(self) -> str:
        """`name`, or one made of base, tuner and data."""
        if self.name is not None:
            return self.name
        paths = [self.data.path] if isinstance(self.data.path, str) else self.data.path
        adapt = getattr(self.tuner, "adapt", "none")
        tuner = self.tuner.method if adapt == "none" else f"{self.tuner.method}-{adapt}"
        data = "_".join(self.datasets) or Path(paths[0]).stem
        parts = [Path(self.base.label).name, tuner, self.domain or data]
        return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)

    @property
    def added_classes(self) -> tuple[str, ...]:
        """`add_classes`, one or several."""
        names = self.add_classes
        return (names,) if isinstance(names, str) else tuple(names)

    @property
    def datasets(self) -> dict[str, str]:
        """Path of each dataset of a detection run by its name; none for a run of one."""
        found = self.data.datasets if isinstance(self.data, DetectionData) else {}
        return found if len(found) > 1 else {}

    @property
    def keeps_base(self) -> bool:
        """True for a detection run that leaves `base.weights` frozen and adds one domain or several to it."""
        return self.domain is not None or (bool(self.datasets) and not isinstance(self.tuner, Full))

    @property
    def run_folder(self) -> Path:
        """Folder of this run."""
        return Path(self.folder) / self.run_name


def section_types(objective: str, method: str) -> dict[str, type]:
    """Return the dataclass of each section of a recipe. Raises: ConfigError: for an unknown choice."""
    if objective not in OBJECTIVES:
        raise ConfigError(f"Unknown objective '{objective}'. {did_you_mean(objective, OBJECTIVES)}")
    if method not in TUNERS:
        raise ConfigError(f"Unknown tuner '{method}'. {did_you_mean(method, TUNERS)}")
    return {"training": Training, **OBJECTIVES[objective], "tuner": TUNERS[method]}


def build_config(layers: Iterable[tuple[str, Mapping[str, Any]]], options: Sequence[str] = ()) -> RunConfig:
    """Build a config from layers of values; a later layer wins, field by field.

    A layer nests sections (`{"tuner": {"r": 8}}`) or dots them (`{"tuner.r": 8}`); a section may be its
    leading field alone (`{"tuner": "lora"}`). Where a later layer chooses another tuner or objective, the
    fields of earlier layers that it lacks are dropped.

    Args:
        layers: (source, values); the source is named in messages, and empty for the command line.
        options: names of the command's other options, suggested where one is misspelt.
    Raises: ConfigError: for an unknown key, with the nearest known one, or a value that cannot work.
    """
    values: dict[str, Any] = {}
    types = _section_types_of(values)
    for source, layer in layers:
        flat = dotted_values(layer, source)
        types = _section_types_of(values | flat)
        known = _known_types(types)
        for key, value in flat.items():
            # The keys of a field that holds a dict may be dotted too: tuner.args.use_rslora.
            section, _, rest = key.partition(".")
            name, _, inner = rest.partition(".")
            name = f"{section}.{name}" if rest else section
            if name not in known:
                unknown = f"key '{key}' in {source}" if source else f"option '--{key}'"
                raise ConfigError(f"Unknown {unknown}. {_nearest_key(key, [*known, *options])}")
            values[name] = {**(values.get(name) or {}), inner: value} if inner else value
        if dropped := sorted(values.keys() - known.keys()):
            logger.info("Left out, since this tuner or objective has no such field: %s.", ", ".join(dropped))
            values = {key: value for key, value in values.items() if key in known}
    arguments: dict[str, dict[str, Any]] = {section: {} for section in ("", *types)}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        arguments[section][name] = convert(key, value, known[key])
    sections = {section: wanted(**arguments[section]) for section, wanted in types.items()}
    return RunConfig(**arguments[""], **sections)


def dotted_values(layer: Mapping[str, Any], source: str = "the recipe") -> dict[str, Any]:
    """Return nested values by dotted key; a section given as a single value sets its leading field.

    Raises: ConfigError: for a section that holds something else.
    """
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        if key in LEADING_FIELD and isinstance(value, (str, list, Path)):
            flat[f"{key}.{LEADING_FIELD[key]}"] = value
        elif key not in (*LEADING_FIELD, "training"):
            flat[key] = value
        elif isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            raise ConfigError(
                f"`{key}` in {source or 'the options'} must hold keys and values, got {value!r}."
            )
    return flat


def _section_types_of(values: Mapping[str, Any]) -> dict[str, type]:
    objective = values.get("objective.kind", TextSettings.kind)
    # A detector's backbone trains with the rest where no tuner is named; a domain is always an adapter.
    is_whole = objective == DetectionSettings.kind and values.get("domain") is None
    usual = Full.method if is_whole else Paca.method
    return section_types(objective, values.get("tuner.method", usual))


def _known_types(types: Mapping[str, type]) -> dict[str, Any]:
    """Dotted key → type annotation of everything a recipe with these sections may hold."""
    known = {name: wanted for name, wanted in field_types(RunConfig).items() if name not in types}
    for section, wanted in types.items():
        known |= {f"{section}.{name}": inner for name, inner in field_types(wanted).items()}
    return known


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """Return the end of an "unknown key" message: the nearest key, or ours for a name of transformers."""
    section, _, name = key.partition(".")
    if section == "training" and name in TRAINING_ARGUMENTS:
        return f"Here it is called 'training.{TRAINING_ARGUMENTS[name]}'."
    # The same last name in another section is nearer than a similar spelling.
    same = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    if close := same or get_close_matches(key, known, n=1):
        return f"Did you mean '{close[0]}'?"
    if inside := sorted(other.partition(".")[2] for other in known if other.startswith(f"{section}.")):
        return f"'{section}' has: {', '.join(inside)}."
    return f"Known: {', '.join(sorted({other.partition('.')[0] for other in known}))}."
