"""`PacaConfig`: what to adapt, how many columns, and which."""

from __future__ import annotations

__all__ = ["PACA", "PacaConfig"]

from dataclasses import dataclass
from typing import Any, Literal

from peft.config import PeftConfig

from thawline.errors import ConfigError, did_you_mean
from thawline.tuners._card import add_import_line
from thawline.tuners._peft import TunerType
from thawline.tuners.paca.selection import SELECTIONS

# Not "PACA": PEFT 0.22 has a tuner of that name, prefix paca_, with a checkpoint layout of its own.
PACA = TunerType("THAWLINE_PACA")

# What a LoRA user may bring along, and what to write instead.
LORA_FIELDS = {
    "lora_alpha": "use `alpha` (default: r, and then the learning rate is that of full fine-tuning)",
    "lora_dropout": "leave it out: PaCA has no dropout, the layer's one matrix multiplication stays whole",
    "lora_bias": "use `bias`",
    "init_lora_weights": "use `init_weights`: columns start at the pretrained values",
    "use_rslora": "use `alpha`: the change of a column is scaled by alpha / r",
    "use_dora": "leave it out: PaCA has no magnitude vector",
    "fan_in_fan_out": "leave it out: Conv1D is recognised by its type",
}


@dataclass(kw_only=True)
class PacaConfig(PeftConfig):
    """Adapt `r` input columns of each targeted layer (Woo et al., PaCA, ICLR 2025).

    Takes the place of `LoraConfig(r=…, lora_alpha=…)`. A layer of O outputs trains r·O numbers, where LoRA
    trains r·(I + O): for equal parameters take about twice LoRA's r.

    Raises: ConfigError: for a value that cannot work, naming it and what would.
    """

    r: int = 16
    """Columns (input features) trained per layer, 1 to the layer's inputs. 16 costs what LoRA's r=8 costs."""

    alpha: float | None = None
    """The change of a column is scaled by alpha / r. None: each layer's own r, so scale 1 and the learning
    rate is that of full fine-tuning. With Adam a scale s acts like s times the learning rate, with SGD like
    s² times."""

    target_modules: list[str] | set[str] | str | None = None
    """Names, a regular expression, or "all-linear". None: PEFT's own choice for LoRA on this architecture."""

    exclude_modules: list[str] | set[str] | str | None = None
    """Names or a regular expression of modules to leave alone although `target_modules` matches them."""

    layers_to_transform: list[int] | int | None = None
    """Adapt only the blocks with these numbers. None: all."""

    layers_pattern: list[str] | str | None = None
    """Name of the list of blocks that `layers_to_transform` counts in, e.g. "layers". None: any list."""

    rank_pattern: dict[str, int] | None = None
    """r for modules whose name matches a regular expression, e.g. {"mlp.down_proj": 64}."""

    alpha_pattern: dict[str, float] | None = None
    """alpha for modules whose name matches a regular expression."""

    bias: Literal["none", "all", "paca_only"] = "none"
    """Biases to train besides: of no layer, of every layer, or of the adapted layers."""

    modules_to_save: list[str] | None = None
    """Modules to train and save whole, e.g. a new classification head."""

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens of the embedding to train besides, as PEFT's trainable tokens."""

    selection: Literal["random", "weight_norm", "activation", "gradient", "explicit"] = "random"
    """How the columns are chosen. `activation` and `gradient` look at data: let `thawline.select_columns`
    fill `indices`. `explicit` takes `indices` as given."""

    indices: dict[str, list[int]] | None = None
    """The columns themselves, by module name or a regular expression for it; for every adapted module."""

    seed: int = 0
    """Seed of `random`; each layer mixes its name in. The same on every machine and version."""

    init_weights: bool = True
    """True: columns start at the pretrained values. False: away from them, for tests."""

    def __new__(cls, *args: Any, **fields: Any) -> PacaConfig:  # noqa: D102
        refuse_lora_fields(fields)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PACA
        # PEFT compares target names as sets and reads older "<prefix>only" spellings of bias.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        if self.bias == "paca_only":
            self.bias = BIAS_ONLY  # type: ignore[assignment]
        self._check()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and the import line into the folder's model card."""
        super().save_pretrained(save_directory, **kwargs)
        add_import_line(save_directory)

    def _check(self) -> None:
        for name, r in [("r", self.r), *_entries("rank_pattern", self.rank_pattern)]:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ConfigError(f"{name}={r!r}: expected a whole number of columns, at least 1.")
        for name, alpha in [("alpha", self.alpha), *_entries("alpha_pattern", self.alpha_pattern)]:
            if alpha is not None and not (isinstance(alpha, int | float) and alpha > 0):
                raise ConfigError(f"{name}={alpha!r}: expected a number above 0, or None for r.")
        if self.bias not in ("none", "all", BIAS_ONLY):
            raise ConfigError(
                f"Unknown bias={self.bias!r}. {did_you_mean(str(self.bias), ('none', 'all', 'paca_only'))}"
            )
        if self.selection not in SELECTIONS:
            raise ConfigError(
                f"Unknown selection={self.selection!r}. {did_you_mean(str(self.selection), SELECTIONS)}"
            )
        if self.indices is not None and self.selection in ("random", "weight_norm"):
            raise ConfigError(
                f"`indices` are given but selection={self.selection!r} chooses its own. "
                "Set selection='explicit'."
            )
        if self.indices is None and self.selection == "explicit":
            raise ConfigError(
                "selection='explicit' needs `indices`, e.g. indices={'q_proj': [0, 5, 9]} with r=3."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError(
                "`layers_pattern` is set but `layers_to_transform` is not: say which blocks to adapt."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                f"`layers_to_transform` needs a list of names, not target_modules={self.target_modules!r}: "
                "list them, or write the block numbers into the regular expression."
            )


BIAS_ONLY = f"{PACA.prefix}only"


def refuse_lora_fields(fields: dict[str, Any]) -> None:
    """Raise for a field of LoRA, naming PaCA's counterpart.

    Raises: ConfigError.
    """
    for name in fields:
        if name in LORA_FIELDS or name.startswith("lora_"):
            advice = LORA_FIELDS.get(name, "leave it out: PaCA has no counterpart")
            raise ConfigError(f"`{name}` is a field of LoRA. In PacaConfig {advice}.")


def _entries(field: str, pattern: dict[str, Any] | None) -> list[tuple[str, Any]]:
    return [(f"{field}[{key!r}]", value) for key, value in (pattern or {}).items()]
