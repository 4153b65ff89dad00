"""The report of a run, made of what lies in its folder; what is not there is left out.

result.json             last evaluation                       → Result
metrics.jsonl           every logged value                    → Curves
detection_metrics.json  `DetectionMetrics.to_dict()`          → Detection
pictures/*.png, *.jpg   samples, worst images, …              → Pictures
align/*.png             what `thawline align` drew            → Routing and alignment
plan.json               steps, schedule, parameter groups     → Plan
config.yaml             the recipe                            → Recipe
env.json                machine and versions, by start        → Environment
"""

from __future__ import annotations

__all__ = ["ALIGN", "DETECTION_METRICS", "PICTURES", "build_report"]

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thawline.errors import DataError
from thawline.metrics.detection import RECALLS, DetectionMetrics
from thawline.report.page import MIME, Chart, Line, Matrix, Part, Picture, Section, Table, Text, write_page
from thawline.tables import evaluation_rows

DETECTION_METRICS = "detection_metrics.json"
PICTURES = "pictures"
ALIGN = "align"

NOT_CURVES = ("step", "epoch", "seconds")
WORST = 12
PR_CLASSES = 12
"""Classes with a precision-recall curve of their own, the most frequent ones."""


def build_report(folder: str | Path) -> Path:
    """Write report.html into a run's folder. Returns: its path.

    Raises: DataError: if there is nothing of a run in the folder, or a file in it is damaged.
        MissingExtraError: without jinja2 or matplotlib.
    """
    folder = Path(folder)
    makers = (_result, _curves, _detection, _pictures, _plan, _recipe, _environment)
    try:
        sections = [section for maker in makers for section in maker(folder)]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"A file in '{folder}' is damaged: {type(error).__name__}: {error}.") from error
    if not sections:
        raise DataError(
            f"'{folder}' holds nothing to report: expected metrics.jsonl, result.json or other files."
        )
    return write_page(folder / "report.html", folder.resolve().name, sections)


def _result(folder: Path) -> Iterator[Section]:
    result = _read(folder / "result.json")
    if result is None:
        return
    parts: list[Part] = [Table(header=("metric", "value"), rows=list(result.get("metrics", {}).items()))]
    by_part, start = result.get("parts") or {}, result.get("start")
    if len(by_part) > 1 or start:
        header, *rows = evaluation_rows(result["metrics"], by_part, start)
        parts.append(Table(header=header, rows=rows))
    told = [f"{key} {result[key]}" for key in ("status", "steps", "seconds") if key in result]
    yield Section(title="Result", parts=parts, note=", ".join(told))


def _curves(folder: Path) -> Iterator[Section]:
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    # What follows the last line break was cut off as the run was killed.
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]
    lines: dict[str, Line] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key not in NOT_CURVES):
        points = [(row["step"], row[key]) for row in rows if _is_finite(row.get(key))]
        if points:
            lines[key] = Line(name=key, x=[x for x, _ in points], y=[y for _, y in points])
    if lines:
        yield Section(title="Curves", parts=[_chart(names, lines) for names in _chart_groups(lines)])


def _chart(names: Sequence[str], lines: Mapping[str, Line]) -> Chart:
    return Chart(title=" and ".join(names[:3]), lines=[lines[name] for name in names])


def _chart_groups(lines: Mapping[str, Line]) -> list[list[str]]:
    """A chart per value; the training and evaluation of one value share theirs."""
    groups: dict[str, list[str]] = {}
    for name in lines:
        groups.setdefault(name.removeprefix("eval_"), []).append(name)
    return list(groups.values())


def _detection(folder: Path) -> Iterator[Section]:
    values = _read(folder / DETECTION_METRICS)
    if values is None:
        return
    metrics = DetectionMetrics.from_dict(values)
    names = [entry.name for entry in metrics.classes]
    columns = (
        "AP",
        "AP50",
        "AP75",
        "AP_small",
        "AP_medium",
        "AP_large",
        "AR100",
        "precision",
        "recall",
        "f1",
    )
    parts: list[Part] = [
        Table(header=list(metrics.statistics), rows=[list(metrics.statistics.values())]),
        Table(
            header=("class", "boxes", *columns),
            rows=[
                [entry.name, entry.n_boxes, *(getattr(entry, key) for key in columns)]
                for entry in metrics.classes
            ],
            caption=f"precision, recall and f1 at score {metrics.threshold:.3f}, where F1 over all is best",
        ),
    ]
    frequent = sorted(metrics.classes, key=lambda entry: -entry.n_boxes)[:PR_CLASSES]
    curves = [
        Line(name=entry.name, x=RECALLS, y=entry.precision_at_recall)
        for entry in frequent
        if not any(map(math.isnan, entry.precision_at_recall))
    ]
    if curves:
        title = "precision over recall, IoU 0.5"
        parts.append(Chart(title=title, lines=curves, x_label="recall", y_range=(0, 1.02)))
    parts += [
        Matrix(
            title=f"confusion at score {metrics.threshold:.2f}",
            rows=[*names, "nothing"],
            columns=[*names, "nothing"],
            counts=metrics.confusion,
            row_label="true",
            column_label="predicted",
        ),
        Table(
            header=("image", "hits", "confused", "false", "missed", "f1"),
            rows=[
                [str(one.index), one.n_hits, one.n_confused, one.n_false, one.n_missed, one.f1]
                for one in metrics.images[:WORST]
            ],
            caption="worst images, by their place in the held-out split",
        ),
    ]
    note = f"{metrics.n_images} images, {metrics.n_boxes} boxes"
    yield Section(title="Detection", parts=parts, note=note)


def _pictures(folder: Path) -> Iterator[Section]:
    for name, title in ((PICTURES, "Pictures"), (ALIGN, "Routing and alignment")):
        files = sorted(path for path in (folder / name).glob("*") if path.suffix.lower() in MIME)
        if files:
            yield Section(title=title, parts=[Picture(path=path) for path in files])


def _plan(folder: Path) -> Iterator[Section]:
    plan = _read(folder / "plan.json")
    if plan is not None:
        yield Section(title="Plan", parts=[Table(header=("", ""), rows=list(_flat(plan)))])


def _recipe(folder: Path) -> Iterator[Section]:
    file = folder / "config.yaml"
    if file.is_file():
        yield Section(title="Recipe", parts=[Text(text=file.read_text(encoding="utf-8"))])


def _environment(folder: Path) -> Iterator[Section]:
    starts = _read(folder / "env.json")
    if starts:
        note = f"started {len(starts)} times; this is the last" if len(starts) > 1 else ""
        yield Section(
            title="Environment", parts=[Table(header=("", ""), rows=list(_flat(starts[-1])))], note=note
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, object]]:
    """Nested values as rows of a dotted name and a value; lists of plain values stay in one row."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{i}")
    elif isinstance(value, list):
        yield name, " ".join(map(str, value))
    else:
        yield name, value


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
