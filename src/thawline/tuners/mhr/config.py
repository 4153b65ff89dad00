"""`MHRConfig`: the inventory of skills, the routing table, and what is adapted."""

from __future__ import annotations

__all__ = ["MHR", "MHRConfig"]

from dataclasses import dataclass
from typing import ClassVar, Literal

from peft.utils import PeftType

from thawline.errors import ConfigError
from thawline.recipe.adapters import MhrFields, check_choice, check_count, check_number
from thawline.tuners._config import TunerConfig
from thawline.tuners._peft import TunerType

MODES = ("train", "full", "z", "mu")
RESERVED = ("mean", "usage", "fresh", "uniform")
"""Words that `to_lora` and `start_adaptation` accept instead of a task's name."""


class RoutedType(TunerType):
    """MHR's PEFT type, a string "MHR" that also compares equal to `PeftType.POLY`.

    Six forwards of PEFT have an argument `task_ids` and drop it unless the type equals Poly's. Ids given to a
    model that still has those of another batch would then be lost silently; passed on, they reach MHR's hook,
    which uses them or raises. The alternative would be to replace PEFT's own forwards.

    Nothing else depends on it: in PEFT 0.21 the only other comparisons with Poly are two that pass `task_ids`
    on to a step of `generate`. PEFT's tables look a type up by hash, which is that of "MHR"; files contain
    "MHR"; `!=`, by which PEFT refuses adapters of two types in one model, says that it is not Poly.
    tests/tuners/test_mhr_peft.py tests all of this.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is PeftType.POLY or str.__eq__(self, other) is True

    __ne__ = str.__ne__
    __hash__ = str.__hash__


MHR = RoutedType("MHR")


@dataclass(kw_only=True)
class MHRConfig(MhrFields, TunerConfig):
    """An inventory of LoRA skills that tasks share, and how each task mixes them, head by head.

    `n_heads=1` is Poly (Ponti et al. 2022), more is MHR (Caccia et al. 2023). A linear of I inputs and O
    outputs gets S·r·(I + O) numbers of skills and, with its own table, K·H·S of routing. Further fields are
    documented in `MhrFields` and `TunerConfig`.

    Raises: ConfigError: for a value that cannot work, naming it and what would.
    """

    tuner_type: ClassVar[TunerType] = MHR
    why_no_experts: ClassVar[str] = (
        "; MHR does not: it mixes skills by each row's task, and experts get tokens without their rows"
    )
    foreign_fields: ClassVar[dict[str, str]] = {
        "lora_alpha": "use `alpha`; the update is scaled by alpha / r, and alpha=1 is the paper's",
        "lora_dropout": "use `dropout`",
        "init_lora_weights": "use `init_weights`",
        "use_rslora": "use `alpha`; the update is scaled by alpha / r",
        "use_dora": "leave it out: MHR has no magnitude vector",
        "fan_in_fan_out": "leave it out: Conv1D is recognised by its type",
        "n_splits": "use `n_heads`",
        "poly_type": "use `router`",
    }

    n_tasks: int | None = None
    """Rows of the routing table. None: as many as `task_names`, or one."""
    task_names: list[str] | None = None
    """Names of the tasks, in the order of their ids. None: tasks have numbers only."""
    n_heads: int = 1
    """Blocks of features, each with weights of its own, H. It must divide every adapted size."""
    bias: Literal["none", "all", "mhr_only"] = "none"
    """Biases trained as well: of no layer, of every layer, or of the adapted layers. All tasks share them."""
    mode: Literal["train", "full", "z", "mu"] = "train"
    """Written by `start_adaptation`: what has been adapted to, and so what trains. In z only the routing
    table, in mu one averaged adapter without routing."""
    uniform_mix: float = 0.0
    """Share of the uniform average in the learned weights, 0 to 1; written by `set_uniform_mix`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.task_names, str):
            raise ConfigError(f"task_names={self.task_names!r}: expected a list, [{self.task_names!r}].")
        if self.task_names is not None:
            self.task_names = list(self.task_names)
        if self.n_tasks is None:
            self.n_tasks = len(self.task_names) if self.task_names else 1
        self.check()
        for name in ("n_tasks", "n_heads"):
            check_count(name, getattr(self, name))
        check_number("uniform_mix", self.uniform_mix, lambda x: 0 <= x <= 1, "a fraction from 0 to 1")
        check_choice("mode", self.mode, MODES)
        check_choice("bias", self.bias, ("none", "all", "mhr_only"))
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
                f"n_tasks={self.n_tasks} but {len(names)} task_names. Give one of them, or one name per task."
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
                f" n_tasks={self.n_tasks}. Make them equal."
            )
