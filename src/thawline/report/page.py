"""From sections of plain data to one HTML file: no script, no link, nothing to load from anywhere.

A section is a heading and parts: `Table`, `Chart`, `Matrix`, `Picture`, `Text`. Charts are drawn by
matplotlib as SVG and, like pictures, lie inside the page, so that it can be mailed or kept for years.
"""

from __future__ import annotations

__all__ = ["Chart", "Line", "Matrix", "Part", "Picture", "Section", "Table", "Text", "write_page"]

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from thawline.errors import MissingExtraError

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
CHART_SIZE = (4.6, 3.0)
"""Inches."""
MATRIX_CELLS = 20
"""More classes than this and the numbers in a matrix could not be read: only its colours are drawn."""
LEGEND_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text and numbers under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over a common axis."""

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    y_range: tuple[float, float] | None = None
    """None: by the values."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Counts by two names, coloured by their share of the row."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    counts: Sequence[Sequence[int]]
    row_label: str = ""
    column_label: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image file, copied into the page."""

    path: Path
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text as it is, in the type of code."""

    text: str


Part = Table | Chart | Matrix | Picture | Text


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]
    note: str = ""


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the page, whole or not at all. Returns: its path.

    Raises: MissingExtraError: without jinja2 or matplotlib.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("The report", "jinja2", "report") from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    html = template.render(
        title=title,
        sections=[
            {"title": one.title, "note": one.note, "parts": [_rendered(part) for part in one.parts]}
            for one in sections
        ],
    )
    beside = path.with_name(f".{path.name}")
    beside.write_text(html, encoding="utf-8")
    beside.replace(path)
    return path


def _rendered(part: Part) -> dict[str, Any]:
    """What the template needs of a part."""
    if isinstance(part, Table):
        rows = [
            [{"text": _cell(value), "is_number": _is_number(value)} for value in row] for row in part.rows
        ]
        return {"kind": "table", "header": part.header, "rows": rows, "caption": part.caption}
    if isinstance(part, Text):
        return {"kind": "text", "text": part.text}
    if isinstance(part, Picture):
        source = _data_uri(part.path.read_bytes(), MIME[part.path.suffix.lower()])
        return {"kind": "picture", "source": source, "caption": part.caption or part.path.stem}
    drawn = _draw_chart(part) if isinstance(part, Chart) else _draw_matrix(part)
    return {"kind": "chart", "source": _data_uri(drawn, MIME[".svg"]), "caption": part.title}


def _draw_chart(chart: Chart) -> bytes:
    figure, axes = _figure(CHART_SIZE)
    for line in chart.lines:
        few = len(line.x) <= 30
        axes.plot(
            line.x, line.y, label=_plain(line.name), linewidth=1.4, marker="." if few else None, markersize=4
        )
    axes.set_title(_plain(chart.title), fontsize=10)
    axes.set_xlabel(chart.x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    if 1 < len(chart.lines) <= LEGEND_LINES:
        axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def _draw_matrix(matrix: Matrix) -> bytes:
    side = max(3.4, 0.45 * max(len(matrix.rows), len(matrix.columns)) + 1.6)
    figure, axes = _figure((side, side))
    shares = [[count / (sum(row) or 1) for count in row] for row in matrix.counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(
        range(len(matrix.columns)), [*map(_plain, matrix.columns)], rotation=60, ha="right", fontsize=7
    )
    axes.set_yticks(range(len(matrix.rows)), [*map(_plain, matrix.rows)], fontsize=7)
    axes.set_xlabel(matrix.column_label, fontsize=8)
    axes.set_ylabel(matrix.row_label, fontsize=8)
    axes.set_title(_plain(matrix.title), fontsize=10)
    if len(matrix.rows) <= MATRIX_CELLS:
        for i, row in enumerate(matrix.counts):
            for j, count in enumerate(row):
                ink = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color=ink)
    return _svg(figure)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of its own: pyplot's global state would stay behind in the user's process."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("The report", "matplotlib", "report") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _plain(name: str) -> str:
    """A name as it is: matplotlib would set what stands between dollars as mathematics."""
    return name.replace("$", r"\$")


def _svg(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _data_uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
