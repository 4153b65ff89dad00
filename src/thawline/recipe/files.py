"""Load recipes: YAML files, mappings and configs, one over the other."""

from __future__ import annotations

__all__ = ["load_recipe", "read_recipe"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from thawline.errors import ConfigError
from thawline.recipe.run import RunConfig, build_config
from thawline.recipe.values import read_yaml


def load_recipe(recipe: RunConfig | Mapping[str, Any] | str | Path, **overrides: Any) -> RunConfig:
    """Load a recipe, or the config.yaml of a run folder, with some values changed.

    Args:
        recipe: a YAML file, nested values, or a config.
        overrides: values by section (`tuner={"r": 8}`) or dotted key (`**{"tuner.r": 8}`).
    Raises: ConfigError: if the file is missing, is not YAML, or holds something that cannot work.
    """
    return build_config([read_recipe(recipe), ("the overrides", overrides)])


def read_recipe(recipe: RunConfig | Mapping[str, Any] | str | Path) -> tuple[str, Mapping[str, Any]]:
    """Return a recipe's source, for messages, and its nested plain values."""
    if isinstance(recipe, RunConfig):
        return "the recipe", recipe.to_mapping()
    if isinstance(recipe, Mapping):
        return "the recipe", recipe
    try:
        mapping = read_yaml(Path(recipe).read_bytes())  # YAML may be UTF-8 or UTF-16
    except OSError as error:
        raise ConfigError(f"Cannot read recipe '{recipe}': {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"Recipe '{recipe}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"Recipe '{recipe}' must hold keys and values, got {type(mapping).__name__}.")
    return str(recipe), mapping
