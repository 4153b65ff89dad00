"""Base of `PacaConfig` and `MHRConfig`: what PEFT expects of a config, and fields that only PEFT needs."""

from __future__ import annotations

__all__ = ["TunerConfig", "pattern_value"]

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from thawline.errors import ConfigError
from thawline.tuners._card import add_import_line
from thawline.tuners._peft import TunerType


@dataclass(kw_only=True)
class TunerConfig(PeftConfig):
    """Config of a tuner: its targets, its type, and advice on fields of other methods."""

    tuner_type: ClassVar[TunerType]
    """Type of the tuner."""
    foreign_fields: ClassVar[dict[str, str]] = {}
    """Field of another method → what to write instead."""
    why_no_experts: ClassVar[str] = ""
    """Why the tuner does not adapt experts that are one weight."""

    target_modules: list[str] | set[str] | str | None = None
    """Names, a regular expression, or "all-linear". None: PEFT's own choice for LoRA on this architecture."""
    exclude_modules: list[str] | set[str] | str | None = None
    """Names or a regular expression of modules to leave out although `target_modules` matches them."""
    init_weights: bool = True
    """True: the adapted model starts as its base. False: it starts with random changes, for tests."""

    def __new__(cls, *args: Any, **fields: Any) -> TunerConfig:
        for name in fields:
            if name in cls.foreign_fields or name.startswith("lora_"):
                advice = cls.foreign_fields.get(name, "leave it out")
                raise ConfigError(f"`{name}` is not a field of {cls.__name__}: {advice}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.is_saved = self.peft_version is not None  # read from a file: PEFT fills it in
        super().__post_init__()
        self.peft_type = self.tuner_type
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):  # PEFT compares names as sets
                setattr(self, name, set(value))
            elif isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ConfigError(f"`{name}`: {value!r} is no regular expression: {error}.") from error
        for name in ("rank_pattern", "alpha_pattern", "heads_pattern"):
            if hasattr(self, name):
                setattr(self, name, dict(getattr(self, name) or {}))
        blocks = getattr(self, "layers_to_transform", None)
        if blocks is not None and isinstance(self.target_modules, str) and not self.is_saved:
            raise ConfigError(
                f"`layers_to_transform` needs a list of names, not target_modules={self.target_modules!r}. "
                "List the modules, or write the block numbers into the regular expression."
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and the import line into the folder's model card."""
        super().save_pretrained(save_directory, **kwargs)
        add_import_line(save_directory)


def pattern_value(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the module called `name`, or `default`."""
    return (pattern or {}).get(get_pattern_key(pattern or {}, name), default)
