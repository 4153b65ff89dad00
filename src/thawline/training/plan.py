"""The plan of a run: what is about to happen, as plain values and in a few lines for a person."""

from __future__ import annotations

__all__ = ["build_plan", "n_base_parameters", "n_parameters"]

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from thawline.recipe import RunConfig
from thawline.training.objective import Objective
from thawline.training.trainer import Trainer

SAMPLE_ENDS = 60
"""Characters shown of a sample's beginning, and of its end."""


def build_plan(objective: Objective, trainer: Trainer) -> dict[str, Any]:
    """Return what plan.json holds: the overview, model, rows, steps, parameter groups, the first batch.

    `overview` is the plan in words: at most twelve texts by label, of which the trainer gives up to four.
    """
    trainable, total = n_parameters(trainer.model)
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    plan: dict[str, Any] = {
        "model": type(base).__name__,
        "parameters": total,
        "base_parameters": n_base_parameters(trainer.model),
        "trainable_parameters": trainable,
        "device": str(trainer.args.device),
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "rows": {"train": len(objective.train_rows), "held_out": len(objective.held_out_rows)},
        "rows_sha256": _digest(objective.row_facts()),
    }
    steps: dict[str, str] = {}
    if trainable:
        plan |= trainer.plan()
        steps = trainer.overview(plan)
        steps["steps"] += f"; {plan['precision']} on {plan['device']}"
    return {"overview": _overview(objective.config, plan, steps, objective.preview()), **plan}


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def n_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the trainable parameters, and all of them."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def n_base_parameters(model: nn.Module) -> int:
    """Count the parameters of the base alone, without those that a tuner has added."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    added: set[int] = set()
    for module in base.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            holder = getattr(module, name)
            added |= {id(p) for p in (holder.parameters() if isinstance(holder, nn.Module) else [holder])}
    return sum(p.numel() for p in base.parameters() if id(p) not in added)


def _overview(
    config: RunConfig, plan: Mapping[str, Any], steps: Mapping[str, str], sample: str
) -> dict[str, str]:
    trainable, rows, training = plan["trainable_parameters"], plan["rows"], config.training
    paths = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    overview = {
        "run": str(config.run_folder),
        "base": f"{config.base.label}: {plan['model']}, {plan['base_parameters']:,} parameters",
        "tuner": f"{config.tuner.method}: {trainable:,} trainable ({trainable / plan['parameters']:.2%})",
        "objective": config.objective.kind + _domains(plan.get("domains", {})),
        "data": f"{', '.join(paths)}: {rows['train']:,} for training, {rows['held_out']:,} held out",
        **steps,
        "evaluation": _every(training.eval_every) if rows["held_out"] else "none: nothing is held out",
    }
    if trainable:
        best = f", best {training.best_metric} wins" if training.best_metric else ""
        kept = f"the newest {training.keep_checkpoints} kept{best}"
        overview["checkpoints"] = f"{_every(training.save_every)}; {kept}"
        sample = " ".join(sample.split())
        if len(sample) > 2 * SAMPLE_ENDS:
            sample = f"{sample[:SAMPLE_ENDS]} … {sample[-SAMPLE_ENDS:]}"
        overview["sample"] = f"{sample}  (⟦learned⟧)"
    return overview


def _domains(sizes: Mapping[str, int]) -> str:
    """Return what each domain will add to its base, given its bytes."""
    return "".join(f"; domain '{name}', {size / 1000:,.0f} kB" for name, size in sizes.items())


def _every(every: int | str) -> str:
    texts = {"epoch": "every epoch", "end": "at the end"}
    return f"every {every} steps" if isinstance(every, int) else texts[every]
