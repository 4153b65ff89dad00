"""Plans side by side, and the settings that fit a device and a time."""

from __future__ import annotations

__all__ = ["METHODS", "compare", "fit", "largest", "plan_within", "read_seconds", "variants"]

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

from thawline.errors import ConfigError
from thawline.planning.plan import Plan, Planner, read_bytes
from thawline.recipe import RunConfig

METHODS: dict[str, tuple[dict[str, Any], frozenset[str]]] = {
    "full": ({"method": "none"}, frozenset()),
    "LoRA": ({"method": "lora", "r": 8}, frozenset()),
    "LoRA bf16": ({"method": "lora", "r": 8}, frozenset({"half_adapter"})),
    "PaCA": ({"method": "paca", "r": 16}, frozenset()),
    "PaCA + lean": ({"method": "paca", "r": 16}, frozenset({"lean"})),
    "QPaCA": ({"method": "paca", "r": 16}, frozenset({"quantised"})),
    "QLoRA": ({"method": "lora", "r": 8}, frozenset({"quantised"})),
    "MHR": ({"method": "mhr", "r": 8}, frozenset()),
}
"""Name → tuner, and what else differs. LoRA has PEFT's defaults, float32 adapters among them; the ranks train
about as many parameters. QLoRA and QPaCA have bfloat16 arithmetic over weights of four bits."""
NOT_OF_DETECTORS = ("MHR", "QLoRA", "QPaCA", "LoRA bf16", "PaCA + lean")
LENGTH_STEP = 64
"""Granularity of the longest sequence, tokens."""
LARGEST = 1 << 26
"""Upper limit of the search."""


def variants(
    config: RunConfig, methods: Mapping[str, tuple[dict[str, Any], Collection[str]]] = METHODS
) -> Iterator[tuple[str, RunConfig, Collection[str]]]:
    """Yield the name, the recipe and what else differs of those methods that fit the objective."""
    targets = getattr(config.tuner, "target_modules", "all-linear")
    for name, (tuner, differing) in methods.items():
        if config.objective.kind == "detection" and name in NOT_OF_DETECTORS:
            continue
        fields = tuner if tuner["method"] == "none" else {**tuner, "target_modules": targets}
        mapping = config.to_mapping() | {"tuner": fields, "lean": config.lean or "lean" in differing}
        if tuner["method"] == "none":
            mapping["domain"] = None  # which leaves the base as it is
        yield name, RunConfig.from_mapping(mapping), differing


def compare(config: RunConfig, **options: Any) -> dict[str, Plan]:
    """Return the plan of every method of `METHODS` in place of the recipe's tuner; options of `Planner`."""
    planners = _planners(config, options)
    return {name: planner.plan(quantised=quantised) for name, planner, quantised in planners}


def fit(config: RunConfig, n_bytes: int | str, **options: Any) -> dict[str, dict[str, int]]:
    """Return the largest batch at the recipe's length, and the longest sequence at a batch of one.

    Returns: per method of `METHODS`, `batch` and, for text, `length`; 0 where not even the smallest fits.
    """
    limit, found = read_bytes(n_bytes), {}
    for name, planner, quantised in _planners(config, options):
        total = partial(_total, planner, quantised)
        found[name] = {"batch": largest(total, limit)}
        if config.objective.kind == "text":
            found[name]["length"] = largest(partial(total, 1), limit, LENGTH_STEP)
    return found


def _planners(config: RunConfig, options: Mapping[str, Any]) -> Iterator[tuple[str, Planner, bool]]:
    """Yield the name of each method, its planner, and whether its layers are quantised."""
    known: dict[str, Planner] = {}
    for name, one, differing in variants(config, METHODS):
        plain = name.removeprefix("Q")  # takes the same step, over larger weights
        if plain not in known:
            known[plain] = Planner(one, half_adapter="half_adapter" in differing, **options)
        yield name, known[plain], "quantised" in differing


def _total(planner: Planner, quantised: bool, rows: int, length: int | None = None) -> int:
    return planner.bytes(rows, length, accumulation=1, quantised=quantised)["total"]


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
    for changes in _candidates(config):
        try:
            planner = Planner(RunConfig.from_mapping(changes), **options)
        except ConfigError as error:
            wrong = error  # such as more columns than a layer has
            continue
        for batch in (n for n in range(rows, 0, -1) if rows % n == 0):
            plan = planner.plan(batch, accumulation=rows // batch)
            least = min(least, plan.bytes["total"])
            if plan.bytes["total"] > limit:
                continue
            if seconds is not None and plan.seconds is None:
                raise ConfigError(
                    f"'{config.data.path}' cannot be read, so the number of steps is unknown: set "
                    "`training.max_steps`, or leave out the time."
                )
            fastest = min(fastest, plan.seconds or 0)
            if seconds is None or fastest <= seconds:
                whole = config.objective.kind == "detection"  # there `batch_size` counts a step's images
                changes["training"] |= {
                    "batch_size": rows if whole else batch,
                    "gradient_accumulation": rows // batch,
                }
                return RunConfig.from_mapping(changes), plan
            break  # a smaller batch is no faster
    if least == math.inf and wrong is not None:
        raise wrong
    short = f"the shortest run takes {fastest:,.0f} s" if fastest < math.inf else "none fits the memory"
    raise ConfigError(
        f"No setting fits {limit:,} bytes{'' if seconds is None else f' and {seconds:,.0f} s'}: the smallest "
        f"needs {least:,.0f} bytes, {short}. Take fewer rows or epochs, a shorter `data.max_length`, or a "
        "smaller base."
    )


def largest(total: Callable[[int], float], limit: int, step: int = 1) -> int:
    """Return the largest multiple of `step` whose total is within `limit`; 0: not even one.

    A total grows ever faster: each operation's bytes do so evenly, and the largest sum of them counts. So a
    line through two sizes that fit leads too far, or right to the end, and one to a size beyond not too far.
    """
    low, at_low = step, total(step)
    if at_low > limit:
        return 0
    high, probe = math.inf, 8 * step
    while probe > low:
        at_probe = total(probe)
        slope = max((at_probe - at_low) / (probe - low), 1e-9)
        if at_probe > limit:
            high = probe
            ahead = max(step, (limit - at_low) / slope // step * step)
        else:
            low, at_low = probe, at_probe
            ahead = (limit - at_low) / slope // step * step
        # Small sizes may cost nothing more than the gradients do: no leap from a flat start.
        probe = int(min(low + ahead, 16 * low, high - step, LARGEST))
    return low


def read_seconds(time: str) -> float:
    """Return a time written as 90s, 30m, 2h or 1.5d in seconds. Raises: ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", time.lower())
    if found is None:
        raise ConfigError(f"'{time}' is no time. Write it as 90s, 30m, 2h or 1.5d.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _candidates(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Yield recipes by other methods, best first."""
    recipe = config.to_mapping()
    paca = {"method": "paca", "target_modules": getattr(config.tuner, "target_modules", "all-linear")}
    yield recipe | {"tuner": {"method": "none"}}
    yield recipe | {"tuner": {**paca, "r": 64}}
    yield recipe | {"tuner": {**paca, "r": 16}}
    yield recipe | {"tuner": {**paca, "r": 16}, "lean": True}
    if config.objective.kind != "detection":
        training = recipe["training"] | {"gradient_checkpointing": True}
        yield recipe | {"tuner": {**paca, "r": 16}, "lean": True, "training": training}
