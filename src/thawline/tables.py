"""Tables as plain text, which rows of many to show, and the rows of an evaluation's table."""

from __future__ import annotations

__all__ = ["AT_START", "ZERO_SHOT", "aligned", "evaluation_rows", "evenly_spaced", "labelled"]

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row")
AT_START, ZERO_SHOT = "at start", "zero-shot"
"""Names of an evaluation before the first step; the second where the tasks are new to the model."""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as lines; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def labelled(rows: Iterable[tuple[str, str]], indent: str = "") -> str:
    """Return label and text of each row as a line, the texts aligned."""
    rows = list(rows)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{indent}{label:{width}}  {text}" for label, text in rows)


def evenly_spaced(rows: Sequence[Row], n: int) -> list[Row]:
    """Return at most `n` rows, evenly spaced and in order."""
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def evaluation_rows(
    metrics: Mapping[str, float],
    parts: Mapping[str, Mapping[str, float]],
    start: Mapping[str, Any] | None = None,
) -> list[list[Any]]:
    """Return a header, a line per part (task, class, dataset), their mean, and the metrics over all rows.

    Args:
        metrics: over all rows; of several detection datasets their mean.
        parts: metrics by part, with the number of rows, or of a dataset's images.
        start: `metrics` and `parts` before the first step, and their `name`; each line gets one.
    """
    part_name, whole = ("class", "classes") if "AP" in metrics else ("task", "tasks")
    if are_datasets := any("images" in part for part in parts.values()):
        part_name, whole = "dataset", "datasets"
    counted = "images" if are_datasets else "rows"
    # A class of objects may lack a metric that others have, e.g. AP_small.
    names = [name for name in metrics if not parts or any(name in part for part in parts.values())]

    def line(title: str, rows: Any, values: Mapping[str, float]) -> list[Any]:
        return [title, rows, *(values.get(name) for name in names)]

    before: Mapping[str, Mapping[str, float]] = (start or {}).get("parts", {})
    found: list[tuple[str, Any, Mapping[str, float], Mapping[str, float]]] = [
        (part, values.get(counted), values, before.get(part, {})) for part, values in parts.items()
    ]
    if len(parts) > 1:
        found.append((f"mean over {whole}", None, _means(parts, names), _means(before, names)))
    if len(parts) > 1 and not are_datasets:
        total = sum(int(part.get("rows", 0)) for part in parts.values())
        found.append(("all rows", total, metrics, (start or {}).get("metrics", {})))
    table = [[part_name, counted, *names]]
    for title, rows, values, earlier in found:
        table.append(line(title, rows, values))
        if start:
            table.append(line(f"  {start.get('name', AT_START)}", None, earlier))
    return table


def _means(parts: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    found = {name: [part[name] for part in parts.values() if name in part] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values}
