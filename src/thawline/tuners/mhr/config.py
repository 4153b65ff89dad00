"""`MHRConfig`: the inventory of skills, the routing table, and what is adapted."""

from __future__ import annotations

__all__ = ["MHR", "MHRConfig"]

from dataclasses import dataclass
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType

from thawline.errors import ConfigError, did_you_mean
from thawline.tuners._card import add_import_line
from thawline.tuners._peft import TunerType
from thawline.tuners.mhr.routing import ROUTERS

GRANULARITIES = ("linear", "layer", "block", "coder", "network")
NOISES = ("none", "example", "task")
A_INITS = ("lora", "mttl", "peft")
MODES = ("train", "full", "z", "mu")
RESERVED = ("mean", "usage", "fresh", "uniform")
"""What `to_lora` and `start_adaptation` take in the place of a task's name."""

# What a user of LoRA or of PEFT's Poly may bring along, and what to write instead.
FOREIGN_FIELDS = {
    "lora_alpha": "use `alpha`; the update is scaled by alpha / r, and alpha=1 is the paper's",
    "lora_dropout": "use `dropout`",
    "init_lora_weights": "use `init_weights`",
    "n_splits": "use `n_heads`",
    "poly_type": "use `router`",
}


class RoutedType(TunerType):
    """MHR's PEFT type. It answers yes to `== PeftType.POLY`, and to nothing else that "MHR" would not.

    Six forwards of PEFT name `task_ids` among their arguments and drop it unless the type, asked in just
    this way, is Poly. Ids given to a model that still holds those of another batch would then be lost without
    a word; passed on, they reach MHR's hook, which uses them or raises. The way around it would be to replace
    PEFT's own forwards.

    Nothing else hangs on the answer: in PEFT 0.21 the only other places that ask for Poly are two that pass
    `task_ids` on to a step of `generate`. Its tables look a type up by hash, which is that of "MHR"; files
    hold "MHR"; `!=`, by which PEFT refuses adapters of two kinds in one model, says that it is not Poly.
    tests/tuners/test_mhr_peft.py holds all of this.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is PeftType.POLY or str.__eq__(self, other) is True

    __ne__ = str.__ne__
    __hash__ = str.__hash__


MHR = RoutedType("MHR")


@dataclass(kw_only=True)
class MHRConfig(PeftConfig):
    """An inventory of LoRA skills that tasks share, and how each task mixes them, head by head.

    `n_heads=1` is Poly (Ponti et al. 2022), more is MHR (Caccia et al. 2023). A linear of I inputs and O
    outputs gets S·r·(I + O) numbers of skills and, with its own table, K·H·S of routing.

    Raises: ConfigError: for a value that cannot work, naming it and what would.
    """

    r: int = 8
    """Rank of every skill, and so of every task's update."""

    alpha: float | None = None
    """The update is scaled by alpha / r. None: each module's own r, so scale 1. The authors train with 1."""

    n_tasks: int | None = None
    """Rows of the routing table. None: as many as `task_names`, or one."""

    task_names: list[str] | None = None
    """Names of the tasks, in the order of their ids. None: tasks go by number."""

    n_skills: int = 8
    """Skills in the inventory, S."""

    n_heads: int = 1
    """Blocks of features, each with weights of its own, H. It must divide every adapted size."""

    heads_pattern: dict[str, int] | None = None
    """n_heads for modules whose name matches a regular expression, e.g. {"mlp": 16}.
    Needs granularity linear."""

    target_modules: list[str] | set[str] | str | None = None
    """Names, a regular expression, or "all-linear". None: PEFT's own choice for LoRA on this architecture."""

    exclude_modules: list[str] | set[str] | str | None = None
    """Names or a regular expression of modules to leave alone although `target_modules` matches them."""

    layers_to_transform: list[int] | int | None = None
    """Adapt only the blocks with these numbers. None: all."""

    layers_pattern: list[str] | str | None = None
    """Name of the list of blocks that `layers_to_transform` counts in, e.g. "layers".
    None: found by itself."""

    rank_pattern: dict[str, int] | None = None
    """r for modules whose name matches a regular expression, e.g. {"mlp.down_proj": 4}."""

    alpha_pattern: dict[str, float] | None = None
    """alpha for modules whose name matches a regular expression."""

    modules_to_save: list[str] | None = None
    """Modules to train and save whole, e.g. a new classification head. All tasks share them."""

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens of the embedding to train besides, as PEFT's trainable tokens."""

    bias: Literal["none"] = "none"
    """Biases are not trained: tasks would share them."""

    router: Literal["learned", "uniform", "private", "random"] = "learned"
    """How tasks get their weights. `private` is one skill per task; `uniform` and `random` are
    the controls."""

    granularity: Literal["linear", "layer", "block", "coder", "network"] = "linear"
    """Who shares a routing table: nobody, the linears of a sub-layer (those with the same parent module), of
    a transformer block, of the encoder or decoder, or all."""

    routing_init: float = 1e-3
    """Fresh logits are uniform in ± this, so that a new task starts from the average of the skills."""

    noise: Literal["none", "example", "task"] = "none"
    """Logistic noise on the logits in training (a Gumbel-sigmoid): none, one draw per example, or per task of
    the batch. It makes routes more discrete, not more accurate; the authors switch it off for T0."""

    temperature: float = 1.0
    """Of the noise: near 0 the sampled weights are all or nothing."""

    dropout: float = 0.0
    """Chance of dropping an input of the skills in training. Above 0 it costs a copy of the input."""

    a_init: Literal["lora", "mttl", "peft"] = "lora"
    """Bound of the uniform A: lora 1/√I, the authors' (mttl) 1/√(3 I), PEFT's Poly's √(H / I).
    B starts at 0."""

    init_weights: bool = True
    """True: B starts at 0 and the model as its base. False: B is random too, for tests."""

    mode: Literal["train", "full", "z", "mu"] = "train"
    """Written by `start_adaptation`: what has been adapted to, and so what trains. In z only the routing
    table, in mu one averaged adapter without routing."""

    uniform_mix: float = 0.0
    """Share of the uniform average in the learned weights, 0 to 1; written by `set_uniform_mix`."""

    def __new__(cls, *args: Any, **fields: Any) -> MHRConfig:  # noqa: D102
        for name in fields:
            if name in FOREIGN_FIELDS:
                raise ConfigError(f"`{name}` is not a field of MHRConfig: {FOREIGN_FIELDS[name]}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MHR
        # PEFT compares target names as sets.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        self.heads_pattern = dict(self.heads_pattern or {})
        if isinstance(self.task_names, str):
            raise ConfigError(f"task_names={self.task_names!r}: expected a list, [{self.task_names!r}].")
        if self.task_names is not None:
            self.task_names = list(self.task_names)
        if self.n_tasks is None:
            self.n_tasks = len(self.task_names) if self.task_names else 1
        self._check()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and the import line into the folder's model card."""
        super().save_pretrained(save_directory, **kwargs)
        add_import_line(save_directory)

    def _check(self) -> None:
        counts = {"r": self.r, "n_tasks": self.n_tasks, "n_skills": self.n_skills, "n_heads": self.n_heads}
        counts |= {f"rank_pattern[{key!r}]": r for key, r in (self.rank_pattern or {}).items()}
        counts |= {f"heads_pattern[{key!r}]": n for key, n in (self.heads_pattern or {}).items()}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: expected a whole number, at least 1.")
        scales: dict[str, float] = {
            "alpha": self.alpha if self.alpha is not None else 1.0,
            "temperature": self.temperature,
        }
        scales |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in (self.alpha_pattern or {}).items()}
        for name, scale in scales.items():
            if not _is_number(scale) or not scale > 0:
                raise ConfigError(f"{name}={scale!r}: expected a number above 0.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r}: expected a share from 0 to below 1.")
        if not _is_number(self.uniform_mix) or not 0 <= self.uniform_mix <= 1:
            raise ConfigError(f"uniform_mix={self.uniform_mix!r}: expected a share from 0 to 1.")
        if not _is_number(self.routing_init) or not self.routing_init >= 0:
            raise ConfigError(f"routing_init={self.routing_init!r}: expected a number of at least 0.")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"Unknown {name}={value!r}. {did_you_mean(str(value), known)}")
        self._check_tasks()

    def _check_tasks(self) -> None:
        names = self.task_names
        odd = [name for name in names or () if not isinstance(name, str) or not name]
        if odd:
            raise ConfigError(
                f"task_names has {odd}: expected names, or n_tasks for tasks that go by number."
            )
        if names is not None and len(names) != self.n_tasks:
            raise ConfigError(
                f"n_tasks={self.n_tasks} but {len(names)} task_names. Give one of them, or as many names as"
                " tasks."
            )
        if names is not None and len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ConfigError(f"task_names repeats {twice}: every task needs a name of its own.")
        taken = sorted(set(names or ()) & set(RESERVED))
        if taken:
            raise ConfigError(
                f"task_names has {taken}, which to_lora and start_adaptation read otherwise. Rename."
            )
        if self.router == "private" and self.n_skills != self.n_tasks:
            raise ConfigError(
                f"router='private' is one skill per task, but n_skills={self.n_skills} and"
                f" n_tasks={self.n_tasks}."
                " Make them equal."
            )
        if self.noise != "none" and self.router != "learned":
            raise ConfigError(
                f"noise={self.noise!r} needs router='learned': a fixed table has no logits to disturb."
            )
        if self.heads_pattern and self.granularity != "linear":
            raise ConfigError(
                f"heads_pattern needs granularity='linear', not {self.granularity!r}: who shares a table"
                " shares heads."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


CHOICES: dict[str, tuple[str, ...]] = {
    "router": tuple(ROUTERS),
    "granularity": GRANULARITIES,
    "noise": NOISES,
    "a_init": A_INITS,
    "mode": MODES,
    "bias": ("none",),
}
