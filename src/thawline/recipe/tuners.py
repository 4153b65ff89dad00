"""What moves: the dataclass of every tuner's fields, and `TUNERS`, which holds the choices.

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

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from thawline.errors import ConfigError
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


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What every adapter has in common; the names are PEFT's."""

    target_modules: str | list[str] | None = "all-linear"
    """Modules to adapt: "all-linear" (all but the head), name endings, or one regular expression.
    None: PEFT's own mapping for the architecture."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out of `target_modules`."""
    layers_to_transform: int | list[int] | None = None
    """Layer indices to adapt. None: all."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and saved beside the adapter. A classifier's new head is added by itself."""
    start_from: str | None = None
    """A run, or the folder of an adapter, of the same method to go on from. None: a fresh one."""


@dataclass(frozen=True, kw_only=True)
class Paca(Adapter):
    """Partial connections: some input columns of each weight, trained in place (Woo et al., ICLR 2025)."""

    usual_lr: ClassVar[float] = 3e-4
    method: Literal["paca"] = "paca"
    """paca."""
    r: int = 16
    """Columns trained in each layer. 16 costs about the parameters of LoRA's r = 8."""
    alpha: float | None = None
    """The change of a column is scaled by alpha / r. None: r, so `training.lr` is full fine-tuning's."""
    selection: Literal["random", "weight_norm", "activation", "gradient", "explicit"] = "random"
    """How columns are chosen: by chance, by their norm, by what a few batches say, or by `indices`."""
    indices: dict[str, list[int]] | None = None
    """Columns by module name or a regular expression for it, for `selection: explicit`."""
    rank_pattern: dict[str, int] | None = None
    """r for modules whose name matches a regular expression."""
    alpha_pattern: dict[str, float] | None = None
    """alpha for modules whose name matches a regular expression."""
    layers_pattern: str | list[str] | None = None
    """Name of the list of blocks that `layers_to_transform` counts in. None: found by itself."""
    bias: Literal["none", "all", "paca_only"] = "none"
    """Biases to train besides."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens of the embedding to train besides."""
    seed: int = 0
    """Seed of `selection: random`."""

    def __post_init__(self) -> None:
        at_least("tuner.r", self.r, 1)


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class Mhr(Adapter):
    """Skills that tasks share, mixed for each task by its own weights (Caccia et al., NeurIPS 2023)."""

    usual_lr: ClassVar[float] = 1e-3
    method: Literal["mhr", "poly"] = "mhr"
    """mhr, or poly (Ponti et al., 2023): whole skills are mixed, by one head."""
    adapt: Literal["none", "full", "z", "mu"] = "none"
    """How to turn the adapter of `start_from` to the tasks of `data`: all of it, their routing alone (z), or
    the average of the skills (mu). none: train on, on the tasks it has."""
    new_rows: str = "fresh"
    """Where the routing of new tasks starts when adapting: fresh (near zero, the average of the skills),
    uniform, mean (of the trained rows), or the name of a trained task."""
    routing_lr: float = 0.1
    """Peak learning rate of the routing; `training.lr` is that of the skills."""
    routing_weight_decay: float = 0.0
    """Weight decay of the routing, towards the average; `training.weight_decay` is that of the skills."""
    anneal: float = 0.0
    """Share of the steps, at the end, over which the routing moves to the average of skills, in [0, 1]."""
    r: int = 8
    """Rank of every skill, and so of every task's update."""
    alpha: float | None = None
    """The update is scaled by alpha / r. None: r. The authors train with 1."""
    n_skills: int = 8
    """Skills in the inventory. With `router: private` as many as tasks, whatever stands here."""
    n_heads: int | None = None
    """Blocks of features with weights of their own; must divide every adapted size. None: 4; 1 for poly."""
    heads_pattern: dict[str, int] | None = None
    """n_heads for modules whose name matches a regular expression."""
    router: Literal["learned", "uniform", "private", "random"] = "learned"
    """How tasks get their weights. private is one skill a task; uniform and random are the controls."""
    granularity: Literal["linear", "layer", "block", "coder", "network"] = "linear"
    """Who shares a routing table: nobody, a sub-layer, a block, encoder or decoder, or all."""
    routing_init: float = 1e-3
    """Fresh logits are uniform in ± this."""
    noise: Literal["none", "example", "task"] = "none"
    """Noise on the logits in training, per example or per task of the batch: more discrete routes."""
    temperature: float = 1.0
    """Of the noise: near 0 the sampled weights are all or nothing."""
    dropout: float = 0.0
    """Chance of dropping an input of the skills in training, in [0, 1)."""
    a_init: Literal["lora", "mttl", "peft"] = "lora"
    """Bound of the uniform A: LoRA's, the authors' or that of PEFT's Poly. B starts at 0."""
    rank_pattern: dict[str, int] | None = None
    """r for modules whose name matches a regular expression."""
    alpha_pattern: dict[str, float] | None = None
    """alpha for modules whose name matches a regular expression."""
    layers_pattern: str | list[str] | None = None
    """Name of the list of blocks that `layers_to_transform` counts in. None: found by itself."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens of the embedding to train besides."""

    def __post_init__(self) -> None:
        for name in ("r", "n_skills"):
            at_least(f"tuner.{name}", getattr(self, name), 1)
        if self.n_heads is not None:
            at_least("tuner.n_heads", self.n_heads, 1)
        one_of("tuner.adapt", self.adapt, ("none", "full", "z", "mu"))
        if self.method == "poly" and self.heads != 1:
            raise ConfigError(f"`tuner: poly` has one head, got n_heads={self.heads}. Use `tuner: mhr`.")
        if self.adapt != "none" and self.start_from is None:
            raise ConfigError(
                f"`tuner.adapt: {self.adapt}` needs a trained adapter: give its run as `tuner.start_from`."
            )
        fraction("tuner.dropout", self.dropout)
        if not 0 <= self.anneal <= 1:
            raise ConfigError(f"`tuner.anneal` must be in [0, 1], got {self.anneal!r}.")
        for name in ("routing_lr", "routing_weight_decay"):
            at_least(f"tuner.{name}", getattr(self, name), 0)

    @property
    def heads(self) -> int:
        """`n_heads`, or the method's own."""
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
