"""Plans side by side, and the settings that fit a device and a time."""

from __future__ import annotations

__all__ = ["METHODS", "compare", "fit", "largest", "plan_within", "read_seconds", "variants"]

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from thawline.errors import ConfigError
from thawline.planning.plan import Plan, plan_run, read_bytes
from thawline.recipe import RunConfig

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"method": "none"}, {}),
    "LoRA": ({"method": "lora", "r": 8}, {}),
    "LoRA bf16": ({"method": "lora", "r": 8}, {"half_adapter": True}),
    "DoRA": ({"method": "dora", "r": 8}, {}),
    "PaCA": ({"method": "paca", "r": 16}, {}),
    "PaCA + lean": ({"method": "paca", "r": 16}, {"lean": True}),
    "QLoRA": ({"method": "lora", "r": 8}, {"quantised": True}),
    "QPaCA": ({"method": "paca", "r": 16}, {"quantised": True}),
    "MHR": ({"method": "mhr", "r": 8}, {}),
}
"""Name → tuner, and what else differs. LoRA has PEFT's defaults, float32 adapters among them; the ranks train
about as many parameters. QLoRA and QPaCA have bfloat16 arithmetic over weights of four bits."""
NOT_OF_DETECTORS = ("MHR", "QLoRA", "QPaCA", "LoRA bf16")
LENGTH_STEP = 64
"""Granularity of the longest sequence, tokens."""
LARGEST = 1 << 26
"""Upper limit of the search."""


def variants(
    config: RunConfig, methods: Collection[str] = tuple(METHODS)
) -> Iterator[tuple[str, RunConfig, dict[str, Any]]]:
    """Yield the name, the recipe and the options of `plan_run` of those methods that fit the objective."""
    targets = getattr(config.tuner, "target_modules", "all-linear")
    for name, (tuner, options) in METHODS.items():
        if name not in methods or (config.objective.kind == "detection" and name in NOT_OF_DETECTORS):
            continue
        fields = tuner if tuner["method"] == "none" else {**tuner, "target_modules": targets}
        mapping = config.to_mapping() | {"tuner": fields, "lean": config.lean or "lean" in options}
        yield (
            name,
            RunConfig.from_mapping(mapping),
            {key: value for key, value in options.items() if key != "lean"},
        )


def compare(config: RunConfig, **options: Any) -> dict[str, Plan]:
    """Return the plan of every method of `METHODS` in place of the recipe's tuner."""
    return {name: plan_run(one, **options, **own) for name, one, own in variants(config)}


def fit(
    config: RunConfig, n_bytes: int | str, methods: Collection[str] = tuple(METHODS), **options: Any
) -> dict[str, dict[str, int]]:
    """Return the largest batch at the recipe's length, and the longest sequence at a batch of one.

    Returns: per method, `batch` and, for text, `length`; 0 where not even the smallest fits.
    """
    limit, found = read_bytes(n_bytes), {}
    for name, one, own in variants(config, methods):

        def total(batch: int, length: int | None, one: RunConfig = one, own: Any = own) -> float:
            training = dataclasses.replace(one.training, batch_size=batch, gradient_accumulation=1)
            resized = dataclasses.replace(one, training=training)
            return plan_run(resized, length=length, **options, **own).bytes["total"]

        row = {"batch": largest(lambda batch: total(batch, None), limit)}
        if one.objective.kind == "text":
            row["length"] = largest(lambda length: total(1, length), limit, LENGTH_STEP)
        found[name] = row
    return found


def plan_within(
    config: RunConfig, n_bytes: int | str, seconds: float | None, **options: Any
) -> tuple[RunConfig, Plan]:
    """Choose method, rank, batch, accumulation and checkpointing; rows per optimiser step stay the recipe's.

    In this order the first that fits wins, each with the largest batch that does: full fine-tuning; PaCA
    with 64, then 16 columns; lean blocks; gradient checkpointing.

    Args:
        seconds: of the whole run. None: any time.
    Raises: ConfigError: if nothing fits, with the smallest memory and the shortest time found, or if the
        number of steps is unknown.
    """
    limit, training = read_bytes(n_bytes), config.training
    rows = (training.batch_size or 32) * training.gradient_accumulation
    least, fastest, wrong = math.inf, math.inf, None
    for tuner, extra in _candidates(config):
        batch = rows
        while batch:
            fields = {"batch_size": batch, "gradient_accumulation": rows // batch}
            if config.objective.kind == "detection":
                fields["batch_size"] = rows
            mapping = config.to_mapping()
            mapping["training"] |= fields | extra.get("training", {})
            chosen = RunConfig.from_mapping(
                mapping | {"tuner": tuner, "lean": extra.get("lean", config.lean)}
            )
            try:
                plan = plan_run(chosen, **options)
            except ConfigError as error:
                wrong = error  # such as more columns than a layer has
                break
            least = min(least, plan.bytes["total"])
            if plan.bytes["total"] <= limit:
                if seconds is not None and plan.seconds is None:
                    raise ConfigError(
                        f"'{config.data.path}' cannot be read, so the number of steps is unknown: set "
                        "`training.max_steps`, or leave out the time."
                    )
                fastest = min(fastest, plan.seconds or 0)
                if seconds is None or fastest <= seconds:
                    return chosen, plan
                break  # a smaller batch is no faster
            batch = next((n for n in range(batch // 2, 0, -1) if rows % n == 0), 0)
    if least == math.inf and wrong is not None:
        raise wrong
    short = f"the shortest run takes {fastest:,.0f} s" if fastest < math.inf else "none fits the memory"
    raise ConfigError(
        f"No setting fits {limit:,} bytes{'' if seconds is None else f' and {seconds:,.0f} s'}: the smallest "
        f"needs {least:,.0f} bytes, {short}. Take fewer rows or epochs, a shorter `data.max_length`, or a "
        "smaller base."
    )


def largest(total: Callable[[int], float], limit: int, step: int = 1) -> int:
    """Return the largest multiple of `step` whose total is within `limit`, by secants; 0: not even one."""
    low, at_low, high = step, total(step), math.inf
    if at_low > limit:
        return 0
    probe = 2 * step
    while low < probe < min(high, LARGEST):
        at_probe = total(probe)
        slope = max((at_probe - at_low) / (probe - low), 1e-9)
        if at_probe > limit:
            high = probe
        else:
            low, at_low = probe, at_probe
        # Small batches may cost nothing more than the gradients do: no leap from a flat start.
        probe = int(min(low + (limit - at_low) / slope // step * step, 8 * low, high - step))
    return low


def read_seconds(time: str) -> float:
    """Return a time written as 90s, 30m, 2h or 1.5d in seconds. Raises: ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", time.lower())
    if found is None:
        raise ConfigError(f"'{time}' is no time. Write it as 90s, 30m, 2h or 1.5d.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _candidates(config: RunConfig) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield tuners, best first, with what else changes."""
    targets = getattr(config.tuner, "target_modules", "all-linear")
    yield {"method": "none"}, {}
    paca = {"method": "paca", "target_modules": targets}
    yield {**paca, "r": 64}, {}
    yield {**paca, "r": 16}, {}
    yield {**paca, "r": 16}, {"lean": True}
    if config.objective.kind != "detection":
        yield {**paca, "r": 16}, {"lean": True, "training": {"gradient_checkpointing": True}}
