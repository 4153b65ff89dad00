"""Plans in words: lines for one, tables for several."""

from __future__ import annotations

__all__ = ["comparison_table", "fit_table", "plan_lines", "readable", "short_plan"]

from collections.abc import Mapping

from thawline.planning.plan import Plan
from thawline.tables import aligned, labelled

COLUMNS = ("weights", "gradients", "optimizer", "saved", "loss", "total")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plan_lines(plan: Plan) -> list[str]:
    """Return a plan as lines: the batch, parameters, bytes by part, time, assumptions."""
    parts = {name: readable(size) for name, size in plan.bytes.items() if size}
    steps = "" if plan.steps is None else f"; {plan.steps:,} steps, {duration(plan.seconds or 0)}"
    rows = {
        "device": plan.device,
        "batch": plan.shape,
        "parameters": f"{plan.parameters:,}, of which {plan.trained:,} train",
        **parts,
        "time": f"{duration(plan.seconds_per_step)} a step{steps}",
    }
    return [*labelled(rows.items()).splitlines(), *(f"assumed: {text}" for text in plan.assumptions)]


def short_plan(parts: Mapping[str, int], available: int) -> str:
    """Return a plan's total in a few words, beside the bytes that are available."""
    total, free, saved = map(readable, (parts["total"], available, parts["saved"]))
    return f"{total} at most of {free} available; {saved} saved for backward"


def comparison_table(plans: Mapping[str, Plan]) -> str:
    """Return one row per method."""
    rows = [["method", "trained", *COLUMNS, "s/step"]]
    for name, plan in plans.items():
        weights = plan.bytes["weights"] + plan.bytes["quantised"]
        cells = [readable(weights if part == "weights" else plan.bytes[part]) for part in COLUMNS]
        rows.append([name, f"{plan.trained:,}", *cells, f"{plan.seconds_per_step:.3g}"])
    return aligned(rows)


def fit_table(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """Return the largest batch and the longest sequence of every method."""
    head = {"batch": "largest batch", "length": "longest sequence at batch 1"}
    columns = list(next(iter(sizes.values())))
    rows = [[name, *(f"{row[column]:,}" for column in columns)] for name, row in sizes.items()]
    return aligned([["method", *(head[column] for column in columns)], *rows])


def readable(n_bytes: int) -> str:
    """Return bytes with a binary prefix."""
    power = min((abs(n_bytes).bit_length() - 1) // 10, 4) if n_bytes else 0
    size = n_bytes / 1024**power
    return f"{size:.0f} {UNITS[power]}" if abs(size) >= 100 else f"{size:.3g} {UNITS[power]}"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"
