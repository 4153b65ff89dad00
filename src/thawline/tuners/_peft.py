"""Registration with PEFT; the only file that touches its registries.

PEFT looks a tuner up by its type in three dicts of `peft.mapping`. Its own `register_peft_method` fills them
only for members of its `PeftType` enum, and there is no plug-in discovery. So this file writes the dicts,
with a string that also has `.value` and `.name`, because PEFT and transformers ask an enum member for those.
Tested with the oldest and the newest supported peft, and with a `PeftType` that has its own PACA (PEFT 0.22).
"""

from __future__ import annotations

__all__ = ["TunerType", "is_registered", "register_tuner", "set_tuner"]

from peft.config import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner


class TunerType(str):
    """A PEFT type that behaves like a member of PEFT's enum. Saved to JSON as plain text."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """Plain string, as the value of an enum member."""
        return str.__str__(self)

    @property
    def name(self) -> str:
        """Plain string, as the name of an enum member."""
        return str.__str__(self)

    @property
    def prefix(self) -> str:
        """Prefix of the names of adapter parameters; transformers derives it in the same way."""
        return f"{self.lower()}_"

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # PEFT's status report splits at the dot


def register_tuner(tuner_type: TunerType, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register a tuner for `get_peft_model`, `PeftModel.from_pretrained` and transformers' `load_adapter`.

    Registering the same classes again has no effect.

    Raises: ValueError: if another tuner has the name, or model_cls.prefix is not `tuner_type.prefix`. A
        programmer's mistake, not a user's.
    """
    if model_cls.prefix != tuner_type.prefix:
        raise ValueError(
            f"{model_cls.__name__}.prefix is {model_cls.prefix!r}, expected {tuner_type.prefix!r}."
        )
    taken = PEFT_TYPE_TO_TUNER_MAPPING.get(tuner_type, model_cls)
    if taken is not model_cls:
        raise ValueError(f"PEFT already knows {tuner_type.value!r} as {taken.__name__}.")
    PEFT_TYPE_TO_CONFIG_MAPPING[tuner_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[tuner_type] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[tuner_type] = tuner_type.prefix


def is_registered(tuner_type: TunerType) -> bool:
    """Return whether PEFT knows a tuner of this type, its own or ours."""
    return tuner_type in PEFT_TYPE_TO_TUNER_MAPPING


def set_tuner(tuner_type: TunerType, model_cls: type[BaseTuner]) -> None:
    """Let `model_cls` build the adapters of a type that PEFT knows."""
    PEFT_TYPE_TO_TUNER_MAPPING[tuner_type] = model_cls
