"""Tuners: the dataclass of every tuner's fields, and `TUNERS`, which holds the choices.

Where fields mirror PEFT's, tests/test_recipe.py holds them to it.
"""

from __future__ import annotations

__all__ = [
    "PEFT_METHODS",
    "TUNERS",
    "Adapter",
    "Frozen",
    "Full",
    "Lora",
    "Mhr",
    "Paca",
    "PeftMethod",
    "TunerSettings",
]

from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any, ClassVar, Literal

from thawline.errors import ConfigError
from thawline.recipe.adapters import AdapterFields, MhrFields, PacaFields
from thawline.recipe.checks import at_least, fraction, one_of


@dataclass(frozen=True, kw_only=True)
class Full:
    """No tuner: every weight of the base trains."""

    usual_lr: ClassVar[float] = 2e-5
    method: Literal["none"] = "none"
    """none: full fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The base stays as it is: a language model is only evaluated, a detector trains all but its backbone."""

    usual_lr: ClassVar[float] = 0.0
    method: Literal["frozen"] = "frozen"
    """frozen: the base as it is."""


@dataclass(kw_only=True)
class Adapter(AdapterFields):
    """Fields that every adapter of a recipe has; the names are PEFT's."""

    target_modules: str | list[str] | None = "all-linear"
    """Modules to adapt: "all-linear" (all but the head), name endings, or one regular expression.
    None: PEFT's own mapping for the architecture."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out of `target_modules`."""
    start_from: str | None = None
    """A run, or the folder of an adapter, of the same method to continue from. None: a new one."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field once: frozen, which `AdapterFields` rules out for the dataclass decorator."""
        if name in vars(self):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)


@dataclass(kw_only=True)
class Paca(PacaFields, Adapter):
    """Partial connections: some input columns of each weight, trained in place (Woo et al., ICLR 2025)."""

    usual_lr: ClassVar[float] = 3e-4
    method: Literal["paca"] = "paca"
    """paca."""

    def __post_init__(self) -> None:
        self.check("tuner.")


@dataclass(kw_only=True)
class Lora(Adapter):
    """Low-rank updates by PEFT: LoRA, or DoRA, which learns magnitudes apart from directions."""

    usual_lr: ClassVar[float] = 2e-4
    method: Literal["lora", "dora"] = "lora"
    """lora, or dora (LoRA on the direction of each weight, with a learned magnitude)."""
    r: int = 8
    """Rank of the update."""
    alpha: float | None = None
    """The update is scaled by alpha / r. None: 2 r."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Any other field of `peft.LoraConfig`, by its name there (`{use_rslora: true}`)."""

    def __post_init__(self) -> None:
        at_least("tuner.r", self.r, 1)
        fraction("tuner.dropout", self.dropout)


@dataclass(kw_only=True)
class Mhr(MhrFields, Adapter):
    """Skills that tasks share, mixed for each task by its own weights (Caccia et al., NeurIPS 2023)."""

    usual_lr: ClassVar[float] = 1e-3
    method: Literal["mhr", "poly"] = "mhr"
    """mhr, or poly (Ponti et al., 2023): one head mixes whole skills."""
    n_heads: int | None = None
    """Blocks of features with weights of their own; must divide every adapted size. None: 4; 1 for poly."""
    adapt: Literal["none", "full", "z", "mu"] = "none"
    """How to adapt the adapter of `start_from` to the tasks of `data`: all of it, their routing alone (z), or
    the average of the skills (mu). none: continue training on the tasks it has."""
    new_rows: str = "fresh"
    """Initial routing of new tasks when adapting: fresh (near zero, the average of the skills), uniform, mean
    (of the trained rows), or the name of a trained task."""
    routing_lr: float = 0.1
    """Peak learning rate of the routing; `training.lr` is that of the skills."""
    routing_weight_decay: float = 0.0
    """Weight decay of the routing, towards the average; `training.weight_decay` is that of the skills."""
    anneal: float = 0.0
    """Fraction of the steps, at the end, over which the routing moves to the average of skills, in [0, 1]."""

    def __post_init__(self) -> None:
        self.check("tuner.")
        if self.n_heads is not None:
            at_least("tuner.n_heads", self.n_heads, 1)
        one_of("tuner.adapt", self.adapt, ("none", "full", "z", "mu"))
        if self.method == "poly" and self.heads != 1:
            raise ConfigError(f"`tuner: poly` has one head, got n_heads={self.heads}. Use `tuner: mhr`.")
        if self.adapt != "none" and self.start_from is None:
            raise ConfigError(
                f"`tuner.adapt: {self.adapt}` needs a trained adapter: give its run as `tuner.start_from`."
            )
        if not 0 <= self.anneal <= 1:
            raise ConfigError(f"`tuner.anneal` must be in [0, 1], got {self.anneal!r}.")
        for name in ("routing_lr", "routing_weight_decay"):
            at_least(f"tuner.{name}", getattr(self, name), 0)

    @property
    def heads(self) -> int:
        """`n_heads`, or the default of the method."""
        return self.n_heads or (1 if self.method == "poly" else 4)


@dataclass(frozen=True, kw_only=True)
class PeftMethod:
    """Another method of PEFT, by the fields of its own config (`tuner.args`)."""

    usual_lr: ClassVar[float] = 1e-3
    method: str = "ia3"
    """PEFT's name of the method, in lower case."""
    args: dict[str, Any] = field(default_factory=dict)
    """The fields of the method's PEFT config, by their names there."""
    start_from: str | None = None
    """A run, or the folder of an adapter, of the same method to go on from. None: a fresh one."""


PEFT_METHODS = (
    "adalora", "adamss", "adaption_prompt", "beft", "boft", "c3a", "cartridge", "cpt", "deft", "delora",
    "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3", "lily", "ln_tuning", "loha", "lokr",
    "miss", "multitask_prompt_tuning", "oft", "osf", "p_tuning", "peanut", "prefix_tuning",
    "prompt_tuning", "psoft", "pvera", "randlora", "road", "shadow", "shira", "supertuning", "tinylora",
    "trainable_tokens", "unilora", "vblora", "vera", "waveft", "xlora",
)  # fmt: skip

TunerSettings = Paca | Mhr | Lora | Full | Frozen | PeftMethod
TUNERS: dict[str, type] = {
    "paca": Paca,
    "mhr": Mhr,
    "poly": Mhr,
    "lora": Lora,
    "dora": Lora,
    "none": Full,
    "frozen": Frozen,
    **dict.fromkeys(PEFT_METHODS, PeftMethod),
}
"""What may move: `tuner.method` → the dataclass of its fields."""
