"""`PacaConfig`: which layers to adapt, how many columns of each, and which."""

from __future__ import annotations

__all__ = ["PACA", "PacaConfig"]

from dataclasses import dataclass, field
from typing import ClassVar

from thawline.recipe.adapters import PacaFields
from thawline.tuners._config import TunerConfig
from thawline.tuners._peft import TunerType

# Not "PACA": PEFT 0.22 has a tuner of that name, prefix paca_, with a different checkpoint layout.
PACA = TunerType("THAWLINE_PACA")
BIAS_ONLY = f"{PACA.prefix}only"


@dataclass(kw_only=True)
class PacaConfig(PacaFields, TunerConfig):
    """Adapt `r` input columns of each targeted layer (Woo et al., PaCA, ICLR 2025).

    Use it in place of `LoraConfig(r=…, lora_alpha=…)`. A layer of O outputs trains r·O numbers, where LoRA
    trains r·(I + O): for equal parameters take about twice LoRA's r. Fields are documented in `PacaFields`
    and `TunerConfig`.

    Raises: ConfigError: for a value that cannot work, naming it and what would.
    """

    tuner_type: ClassVar[TunerType] = PACA
    foreign_fields: ClassVar[dict[str, str]] = {
        "lora_alpha": "use `alpha` (default: r, and then the learning rate is that of full fine-tuning)",
        "lora_dropout": "leave it out: PaCA has no dropout",
        "lora_bias": "use `bias`",
        "init_lora_weights": "use `init_weights`: columns start at the pretrained values",
        "use_rslora": "use `alpha`: the change of a column is scaled by alpha / r",
        "use_dora": "leave it out: PaCA has no magnitude vector",
        "fan_in_fan_out": "leave it out: Conv1D is recognised by its type",
    }

    base_columns: dict[str, list[float]] = field(default_factory=dict)
    """A sketch of the columns that each layer started from. Filled in, and compared on loading."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias == BIAS_ONLY:
            self.bias = "paca_only"
        self.check()
        if self.bias == "paca_only":
            self.bias = BIAS_ONLY  # type: ignore[assignment]  # as PEFT spells it: prefix and "only"
