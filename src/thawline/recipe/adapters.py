"""Fields that PaCA and MHR have in a recipe and in the config that PEFT reads, declared and checked once.

A recipe's `Paca` and `PacaConfig` inherit `PacaFields`; `Mhr` and `MHRConfig` inherit `MhrFields`. An
attribute docstring is the command line's help as well as the config's documentation. PEFT changes its configs
after they are built, so these dataclasses are not frozen, and Python lets no frozen dataclass inherit from
one that is not. The recipe's classes refuse changes by `Adapter.__setattr__` instead.

Left to each side is what differs: `target_modules` and `exclude_modules`, which PEFT keeps as sets, and
`n_heads`, whose default in a recipe depends on the method.
"""

from __future__ import annotations

__all__ = ["AdapterFields", "MhrFields", "PacaFields", "check_choice", "check_count", "check_number"]

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from thawline.errors import ConfigError, did_you_mean


@dataclass(kw_only=True)
class AdapterFields:
    """Fields of every adapter, by PEFT's names."""

    layers_to_transform: list[int] | int | None = None
    """Indices of the blocks to adapt. None: all."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter. `thawline train` adds a classifier's new head."""


@dataclass(kw_only=True)
class _CommonFields(AdapterFields):
    r: int
    alpha: float | None = None
    rank_pattern: dict[str, int] | None = None
    """r for modules whose name matches a regular expression, e.g. {"mlp.down_proj": 64}."""
    alpha_pattern: dict[str, float] | None = None
    """alpha for modules whose name matches a regular expression."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of blocks that `layers_to_transform` counts in, e.g. "layers". None: any list."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose embeddings are trained as well, as PEFT's trainable tokens."""

    def check(self, prefix: str = "") -> None:
        """Check every value that can be judged without the model.

        Args:
            prefix: of the fields' names in messages, e.g. "tuner.".
        Raises: ConfigError: naming a field, its value and what would work.
        """
        for name, r in {"r": self.r, **_entries("rank_pattern", self.rank_pattern)}.items():
            check_count(prefix + name, r)
        for name, alpha in {"alpha": self.alpha, **_entries("alpha_pattern", self.alpha_pattern)}.items():
            if alpha is not None:
                check_number(prefix + name, alpha, lambda x: x > 0, "a number above 0, or None for r")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError(
                f"`{prefix}layers_pattern` is set but `layers_to_transform` is not. Set which blocks to "
                "adapt."
            )
        # Of the declaring class alone: a subclass's other bases may have annotations that do not resolve.
        declaring = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)
        for name, hint in get_type_hints(declaring).items():
            if get_origin(hint) is Literal:
                check_choice(prefix + name, getattr(self, name), get_args(hint))


@dataclass(kw_only=True)
class PacaFields(_CommonFields):
    """Fields of PaCA: how many input columns of each layer are trained, and which."""

    r: int = 16
    """Columns (input features) trained per layer, at most the layer's inputs. 16 costs about the parameters
    of LoRA's r = 8."""
    alpha: float | None = None
    """The change of a column is scaled by alpha / r. None: each layer's own r, so the scale is 1 and the
    learning rate is that of full fine-tuning. With Adam a scale s acts like s times the learning rate, with
    SGD like s² times."""
    mode: Literal["auto", "resident", "additive"] = "auto"
    """Place of the changed columns: `resident` inside the weight, at no cost; `additive` beside it, which
    leaves the weight alone: for weights that are tied, offloaded, or not to be written. `auto` decides for
    each layer and says why."""
    columns_from: str | None = None
    """Folder of the checkpoint in 16 bits that a quantised base was made from: the changed columns start from
    its values, without quantisation error. None: from the quantised ones."""
    selection: Literal["random", "adjacent", "weight_norm", "activation", "gradient", "explicit"] = "random"
    """How the columns are chosen. `random`: each at random. `adjacent`: neighbours, starting at a random
    place. `weight_norm`: by their L2 norm. `activation`, `gradient`: by those of a few batches (`thawline
    train` runs them; in Python call `thawline.select_columns`). `explicit`: listed in `indices`."""
    indices: dict[str, list[int]] | None = None
    """Columns by module name or a regular expression for it, for `selection: explicit`."""
    bias: Literal["none", "all", "paca_only"] = "none"
    """Biases trained as well: of no layer, of every layer, or of the adapted layers."""
    seed: int = 0
    """Seed of `selection: random` and `adjacent`. Each layer mixes its name in: the same columns on every
    machine."""

    def check(self, prefix: str = "") -> None:
        """Check numbers and choices, and that `selection` and `indices` agree."""
        super().check(prefix)
        if self.indices is not None and self.selection in ("random", "adjacent", "weight_norm"):
            raise ConfigError(
                f"`{prefix}indices` is set, but selection={self.selection!r} chooses its own columns. Set "
                "selection='explicit'."
            )
        if self.indices is None and self.selection == "explicit":
            raise ConfigError(
                f"selection='explicit' needs `{prefix}indices`, e.g. indices={{'q_proj': [0, 5, 9]}} with "
                "r=3."
            )


@dataclass(kw_only=True)
class MhrFields(_CommonFields):
    """Fields of MHR: the inventory of skills, and how tasks mix them."""

    r: int = 8
    """Rank of every skill, and so of every task's update."""
    alpha: float | None = None
    """The update is scaled by alpha / r. None: each module's own r, so the scale is 1. The authors train with
    alpha = 1."""
    n_skills: int = 8
    """Skills in the inventory. In a recipe with `router: private`, always the number of tasks."""
    heads_pattern: dict[str, int] | None = None
    """n_heads for modules whose name matches a regular expression, e.g. {"mlp": 16}. Needs
    `granularity: linear`."""
    router: Literal["learned", "uniform", "private", "random"] = "learned"
    """How tasks get their weights. `private` is one skill per task; `uniform` and `random` are controls."""
    granularity: Literal["linear", "layer", "block", "coder", "network"] = "linear"
    """Modules that share a routing table: none, the linears of a sub-layer (those with the same parent
    module), of a transformer block, of the encoder or decoder, or all."""
    routing_init: float = 1e-3
    """Fresh logits are uniform in ± this, so that a new task starts from the average of the skills."""
    noise: Literal["none", "example", "task"] = "none"
    """Logistic noise on the logits in training (a Gumbel-sigmoid): none, one draw per example, or one per
    task of the batch. It makes routes more discrete, not more accurate; the authors switch it off for T0."""
    temperature: float = 1.0
    """Temperature of the noise: near 0 the sampled weights are all or nothing."""
    dropout: float = 0.0
    """Probability of dropping an input of the skills in training, in [0, 1). Above 0 it costs a copy of the
    input."""
    a_init: Literal["lora", "mttl", "peft"] = "lora"
    """Bound of the uniform A: 1/√I as LoRA (lora), 1/√(3 I) as the authors (mttl), or √(H / I) as PEFT's
    Poly (peft). B starts at 0."""

    def check(self, prefix: str = "") -> None:
        """Check numbers and choices, and that the kinds of routing go together."""
        super().check(prefix)
        for name, count in {
            "n_skills": self.n_skills,
            **_entries("heads_pattern", self.heads_pattern),
        }.items():
            check_count(prefix + name, count)
        check_number(prefix + "temperature", self.temperature, lambda x: x > 0, "a number above 0")
        check_number(prefix + "dropout", self.dropout, lambda x: 0 <= x < 1, "a fraction from 0 to below 1")
        check_number(prefix + "routing_init", self.routing_init, lambda x: x >= 0, "a number of at least 0")
        if self.noise != "none" and self.router != "learned":
            raise ConfigError(
                f"{prefix}noise={self.noise!r} needs router='learned': fixed tables have no logits."
            )
        if self.heads_pattern and self.granularity != "linear":
            raise ConfigError(
                f"`{prefix}heads_pattern` needs granularity='linear', got {self.granularity!r}: modules that "
                "share a routing table share its heads."
            )


def check_count(name: str, value: Any) -> None:
    """Check a whole number of at least 1. Raises: ConfigError."""
    check_number(name, value, lambda x: isinstance(x, int) and x >= 1, "a whole number of at least 1")


def check_number(name: str, value: Any, accepts: Callable[[float], bool], expected: str) -> None:
    """Check that a value is a number that `accepts` takes. Raises: ConfigError: saying what is `expected`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not accepts(value):
        raise ConfigError(f"{name}={value!r}: expected {expected}.")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Check that a value is one of `choices`. Raises: ConfigError: naming them and the closest."""
    if value not in choices:
        raise ConfigError(f"Unknown {name}={value!r}. {did_you_mean(str(value), choices)}")


def _entries(name: str, pattern: Mapping[str, Any] | None) -> dict[str, Any]:
    return {f"{name}[{key!r}]": value for key, value in (pattern or {}).items()}
