"""The report of a run, made of the files in its folder; sections whose files are missing are left out.

result.json, plan.json            score, time, base, tuner, data      → headline
result.json                       metrics over all rows and by part   → Result
metrics.jsonl                     every logged value                  → Training, More curves
detection_metrics*.json           `DetectionMetrics.to_dict()`        → Detection
predictions.jsonl                 rows of text with their predictions → Predictions
pictures/                         gallery of images, training images  → Images
align/*.png                       output of `thawline align`          → Routing and alignment
plan.json, config.yaml, env.json  schedule, recipe, versions          → Plan, Recipe, Environment
"""

from __future__ import annotations

__all__ = ["ALIGN", "DETECTION_METRICS", "PICTURES", "build_report"]

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from thawline.errors import CheckpointError, DataError
from thawline.files import read_json, read_jsonl
from thawline.metrics.detection import RECALLS, DetectionMetrics
from thawline.report.gallery import GALLERY
from thawline.report.page import (
    MIME,
    Bar,
    Bars,
    Chart,
    Gallery,
    Headline,
    Line,
    Matrix,
    Part,
    Picture,
    Section,
    Table,
    Text,
    write_page,
)
from thawline.tables import evaluation_rows, evenly_spaced

DETECTION_METRICS = "detection_metrics.json"
PICTURES = "pictures"
ALIGN = "align"

NOT_CURVES = ("step", "epoch", "seconds")
SCORES = ("AP", "choice_accuracy", "accuracy", "exact_match", "rouge_l")
"""Metrics in which a run is summed up: the first one it has."""
HEADLINE = ("base", "tuner", "data", "steps")
"""Rows of the plan's overview that the headline repeats."""
MOST_BARS = 40
"""Of more tasks or classes, the first and the last ones are shown."""
N_SAMPLES = 12
"""Predictions shown, half of them wrong ones where there are some."""
LONGEST_SAMPLE = 300
"""Characters of a text that are shown."""
PR_CLASSES = 12
"""Classes that get a precision-recall curve: the most frequent ones."""
MATRIX_CLASSES = 24
"""Number of classes above which the most frequent confusions are listed instead of a matrix."""
TOP_CONFUSIONS = 30
CLASS_COLUMNS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100", "precision", "recall", "f1",
)  # fmt: skip


def build_report(folder: str | Path) -> Path:
    """Write report.html into a run's folder.

    Returns: its path.
    Raises: DataError, CheckpointError: if the folder holds none of a run's files, or one of them is damaged.
        MissingExtraError: without jinja2 or matplotlib.
    """
    folder = Path(folder)
    try:
        training, more_curves = _curves(folder)
        sections = [*_result(folder), *training, *_detection(folder), *_predictions(folder)]
        sections += [*_images(folder), *_exports(folder), *more_curves, *_settings(folder)]
        headline = _headline(folder)
    except CheckpointError:
        raise  # names the file already
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"A file in '{folder}' is damaged: {type(error).__name__}: {error}.") from error
    if not sections:
        raise DataError(
            f"'{folder}' holds nothing to report: expected metrics.jsonl, result.json or other run files."
        )
    return write_page(folder / "report.html", folder.resolve().name, sections, headline=headline)


def _headline(folder: Path) -> Headline | None:
    result, plan = read_json(folder / "result.json"), read_json(folder / "plan.json")
    metrics = result.get("metrics") or read_json(folder / DETECTION_METRICS).get("statistics") or {}
    overview = plan.get("overview", {})
    name = next((name for name in (*SCORES, "loss") if _is_finite(metrics.get(name))), None)
    if name is None and not overview:
        return None
    status = result.get("status", "not finished")
    seconds = f", {timedelta(seconds=round(result['seconds']))} of training" if result.get("seconds") else ""
    ending = [("End", result["ending"])] if result.get("ending") else []
    return Headline(
        score="–" if name is None else f"{metrics[name]:.3f}",
        label="not evaluated yet" if name is None else f"{name} on the held-out rows",
        facts=[(key.capitalize(), overview[key]) for key in HEADLINE if key in overview]
        + [("Status", status + seconds), *ending],
    )


def _result(folder: Path) -> Iterator[Section]:
    result = read_json(folder / "result.json")
    if not result:
        return
    metrics, by_part, start = result.get("metrics", {}), result.get("parts") or {}, result.get("start")
    parts: list[Part] = list(_part_bars(metrics, by_part, start))
    parts.append(Table(header=("metric", "value"), rows=list(metrics.items())))
    is_shown_by_class = (folder / DETECTION_METRICS).is_file() and not start
    if (len(by_part) > 1 or start) and not is_shown_by_class:
        header, *rows = evaluation_rows(metrics, by_part, start)
        parts.append(Table(header=header, rows=rows))
    yield Section(title="Result", parts=parts)


def _part_bars(
    metrics: Mapping[str, float],
    by_part: Mapping[str, Mapping[str, float]],
    start: Mapping[str, Any] | None,
) -> Iterator[Bars]:
    """Yield one group of bars per metric that sums up some parts, best part first."""
    if len(by_part) < 2:
        return
    before = (start or {}).get("parts", {})
    left = dict(by_part)
    for name in (*SCORES, "loss"):
        found = {part: values[name] for part, values in left.items() if name in values}
        if not found:
            continue
        left = {part: values for part, values in left.items() if part not in found}
        is_loss = name == "loss"
        ordered = sorted(found, key=lambda part: found[part] if is_loss else -found[part])
        shown = (
            ordered if len(ordered) <= MOST_BARS else ordered[: MOST_BARS // 2] + ordered[-MOST_BARS // 2 :]
        )
        notes = [f"The vertical mark is the value {start.get('name', 'at start')}."] if start else []
        if len(shown) < len(ordered):
            notes.append(f"{len(ordered)} in all; the {MOST_BARS // 2} first and last ones are shown.")
        yield Bars(
            title=f"{name} by {'class' if 'AP' in metrics else 'task'}",
            bars=[
                Bar(name=part, value=found[part], earlier=before.get(part, {}).get(name)) for part in shown
            ],
            full=None if is_loss else 1.0,
            note=" ".join(notes),
        )


def _curves(folder: Path) -> tuple[list[Section], list[Section]]:
    """Return the section of the main curves and the section of all others; either may be missing."""
    left = _lines(folder)
    families = {
        "Loss": {"loss": "training", "eval_loss": "held-out"},
        "Average precision, held-out images": {n: n[5:] for n in left if n.startswith("eval_AP")},
        "Scores, held-out rows": {f"eval_{m}{n}": m + n for n in SCORES[1:] for m in ("", "macro_")},
        "Loss terms": {n: n[5:] for n in left if n.startswith("loss_")},
    }
    main = [
        Chart(title=title, lines=[replace(left.pop(key), name=n) for key, n in names.items() if key in left])
        for title, names in families.items()
    ]
    main = [chart for chart in main if chart.lines]
    others: dict[str, list[Line]] = {}
    for name, line in left.items():
        others.setdefault(name.removeprefix("eval_"), []).append(line)
    more = [Chart(title=name, lines=lines) for name, lines in others.items()]
    return (
        [Section(title="Training", parts=main)] if main else [],
        [Section(title="More curves", parts=more, is_folded=True)] if more else [],
    )


def _lines(folder: Path) -> dict[str, Line]:
    """Return a line for every logged value, by its name, without values that are not finite."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return {}
    rows = read_jsonl(file)
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in NOT_CURVES):
        points = [(row["step"], row[name]) for row in rows if _is_finite(row.get(name))]
        if points:
            found[name] = Line(name=name, x=[x for x, _ in points], y=[y for _, y in points])
    return found


def _detection(folder: Path) -> Iterator[Section]:
    """Yield a section of the detector's metrics, of several datasets one for each."""
    stem = Path(DETECTION_METRICS).stem
    for file in sorted(folder.glob(f"{stem}*.json")):
        name = file.stem.removeprefix(stem).removeprefix("-")
        yield _detection_on(f"Detection: {name}" if name else "Detection", read_json(file))


def _detection_on(title: str, values: Mapping[str, Any]) -> Section:
    metrics = DetectionMetrics.from_dict(values)
    parts: list[Part] = [
        Table(
            header=("class", "boxes", *CLASS_COLUMNS),
            rows=[
                [entry.name, entry.n_boxes, *(getattr(entry, key) for key in CLASS_COLUMNS)]
                for entry in metrics.classes
            ],
            caption=f"Precision, recall and f1 at score {metrics.threshold:.3f}, the best F1 overall",
        )
    ]
    frequent = sorted(metrics.classes, key=lambda entry: -entry.n_boxes)[:PR_CLASSES]
    curves = [
        Line(name=entry.name, x=RECALLS, y=entry.precision_at_recall)
        for entry in frequent
        if not any(map(math.isnan, entry.precision_at_recall))
    ]
    if curves:
        caption = "Precision over recall at IoU 0.5"
        parts.append(Chart(title=caption, lines=curves, x_label="recall", y_range=(0, 1.02)))
    parts.append(_confusion(metrics))
    return Section(
        title=title,
        parts=parts,
        note=f"{metrics.n_images:,} images, {metrics.n_boxes:,} annotated boxes",
    )


def _confusion(metrics: DetectionMetrics) -> Part:
    names = [*(entry.name for entry in metrics.classes), "nothing"]
    if len(metrics.classes) <= MATRIX_CLASSES:
        return Matrix(
            title=f"Confusions at score {metrics.threshold:.2f}",
            rows=names,
            columns=names,
            counts=metrics.confusion,
            row_label="true",
            column_label="detected",
        )
    return Table(
        header=("annotated", "detected", "times"),
        rows=[[names[c.true], names[c.detected], c.count] for c in metrics.confusions[:TOP_CONFUSIONS]],
        caption=f"Most frequent confusions at score {metrics.threshold:.2f}",
    )


def _predictions(folder: Path) -> Iterator[Section]:
    file = folder / "predictions.jsonl"
    if not file.is_file():
        return
    rows = [
        row | {"found": row.get("prediction", row.get("choice"))}
        for row in read_jsonl(file)
        if "answer" in row
    ]
    rows = [row for row in rows if row["found"] is not None]
    if not rows:
        return
    wrong = [row for row in rows if row["found"] != row["answer"]]
    right = [row for row in rows if row["found"] == row["answer"]]
    n_wrong = min(len(wrong), max(N_SAMPLES // 2, N_SAMPLES - len(right)))
    chosen = evenly_spaced(wrong, n_wrong) + evenly_spaced(right, N_SAMPLES - n_wrong)
    keys = [key for key in ("task", "input", "answer", "found") if any(row.get(key) for row in chosen)]
    yield Section(
        title="Predictions",
        parts=[
            Table(
                header=("", *(key if key != "found" else "prediction" for key in keys)),
                rows=[
                    [
                        "✓" if row["found"] == row["answer"] else "✗",
                        *(_shortened(row.get(key)) for key in keys),
                    ]
                    for row in chosen
                ],
            )
        ],
        note=f"{len(right):,} of {len(rows):,} predictions equal the answer exactly; some of each.",
    )


def _images(folder: Path) -> Iterator[Section]:
    galleries = {name: files for name in GALLERY if (files := _files(folder / PICTURES / name))}
    # worst.png shows what the gallery shows, for those who look into the folder.
    single = [file for file in _files(folder / PICTURES) if not galleries or file.stem not in GALLERY]
    parts: list[Part] = [
        Gallery(title=f"{name.capitalize()} images", pictures=[Picture(path=file) for file in files])
        for name, files in galleries.items()
    ]
    parts += [Picture(path=file) for file in single]
    if parts:
        note = (
            "In the galleries, annotations are on the left and detections on the right." if galleries else ""
        )
        yield Section(title="Images", parts=parts, note=note)
    if files := _files(folder / ALIGN):
        yield Section(title="Routing and alignment", parts=[Picture(path=file) for file in files])


def _exports(folder: Path) -> Iterator[Section]:
    """Show the certificates of the run's exported files."""
    reports = [(file, read_json(file)) for file in sorted(folder.glob("exports/*.report.json"))]
    if not reports:
        return
    header = ("precision", "batch", "images", "box_error_px", "score_error", "agreement")
    rows = [
        [Path(report["path"]).name, *(row[key] for key in header)]
        for _, report in reports
        for row in report["rows"]
    ]
    parts: list[Part] = [Table(header=("file", *header), rows=rows)]
    if aps := [(report["path"], report["ap"]) for _, report in reports if report["ap"]]:
        keys = ("torch", "file", "difference")
        rows = [[Path(path).name, *(ap[key] for key in keys)] for path, ap in aps]
        parts.append(Table(header=("AP", *keys), rows=rows))
    refused = [Path(report["path"]).name for _, report in reports if not report["passed"]]
    note = f"Over the budget, not kept: {', '.join(refused)}." if refused else ""
    yield Section(title="Exports, compared with torch", parts=parts, note=note)


def _settings(folder: Path) -> Iterator[Section]:
    if plan := read_json(folder / "plan.json"):
        yield Section(title="Plan", parts=[Table(header=("", ""), rows=list(_flat(plan)))], is_folded=True)
    file = folder / "config.yaml"
    if file.is_file():
        yield Section(
            title="Recipe",
            parts=[Text(text=file.read_text(encoding="utf-8", errors="replace"))],
            is_folded=True,
        )
    if starts := read_json(folder / "env.json"):
        note = f"Started {len(starts)} times; this is the last one." if len(starts) > 1 else ""
        table = Table(header=("", ""), rows=list(_flat(starts[-1])))
        yield Section(title="Environment", parts=[table], note=note, is_folded=True)


def _shortened(text: object) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]}…"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in MIME)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield nested values as a dotted name and a value each; lists of plain values stay whole."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{i}")
    else:
        yield name, " ".join(map(str, value)) if isinstance(value, list) else value


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
