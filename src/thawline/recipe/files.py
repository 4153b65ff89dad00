"""Recipes as YAML files."""

from __future__ import annotations

__all__ = [
    "load_recipe",
    "read_mapping",
]

import re
from pathlib import Path
from typing import Any

import yaml

from thawline.errors import ConfigError
from thawline.recipe.run import RunConfig


def load_recipe(path: str | Path) -> RunConfig:
    """Read a recipe, or the config.yaml of a run folder.

    Raises: ConfigError: if the file is missing, is not YAML, or says something that cannot work.
    """
    return RunConfig.from_mapping(read_mapping(path), str(path))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The nested plain values of a YAML file. Raises: ConfigError: if it is missing or not a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read recipe '{path}': {error.strerror}.") from error
    try:
        mapping = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"Recipe '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"Recipe '{path}' must hold keys and values, got {type(mapping).__name__}.")
    return mapping


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number; YAML 1.1, and so PyYAML, takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)
