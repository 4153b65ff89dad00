"""Sections of plain data → one HTML file without scripts that loads nothing, for screens of any size.

A section is a heading and parts: `Table`, `Chart`, `Bars`, `Matrix`, `Gallery`, `Text`. Charts are inline
SVG; images lie inside the page, so that it can be mailed or kept for years.
"""

from __future__ import annotations

__all__ = [
    "MIME", "Bar", "Bars", "Chart", "Gallery", "Headline", "Line", "Matrix", "Part", "Picture", "Section",
    "Table", "Text", "write_page",
]  # fmt: skip

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from thawline.errors import MissingExtraError
from thawline.files import write_text
from thawline.report.charts import draw_lines

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The first thing to read: one score, and facts about the run."""

    score: str
    label: str
    facts: Sequence[tuple[str, str]]
    """(name, value) each."""


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
class Bar:
    """One value, and perhaps an earlier one to compare it with."""

    name: str
    value: float
    earlier: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Values by name, as horizontal bars in the order given."""

    title: str
    bars: Sequence[Bar]
    full: float | None = None
    """Value of a full bar. None: the largest one."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Counts by two names; cells are coloured by their share of the row."""

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
class Gallery:
    """Images in as many columns as there is space for."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Preformatted text."""

    text: str


Part = Table | Chart | Bars | Matrix | Gallery | Picture | Text


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]
    note: str = ""
    is_folded: bool = False
    """Shown as its heading alone until it is clicked."""


def write_page(
    path: Path, title: str, sections: Sequence[Section], *, headline: Headline | None = None
) -> Path:
    """Write the page atomically.

    Returns: `path`.
    Raises: MissingExtraError: without jinja2 or matplotlib.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("The report", "jinja2", "report") from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    environment.tests["number"] = _is_number
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    rendered = [
        (section, [_rendered(part, f"c{i}-{j}") for j, part in enumerate(section.parts)])
        for i, section in enumerate(sections)
    ]
    write_text(path, template.render(title=title, headline=headline, sections=rendered))
    return path


def _rendered(part: Part, prefix: str) -> dict[str, Any]:
    """Return a part's values for the template, with its `kind`."""
    values: dict[str, Any] = {"kind": type(part).__name__.lower(), **vars(part)}
    if isinstance(part, Chart):
        lines = [(line.name, line.x, line.y) for line in part.lines]
        values["svg"] = draw_lines(lines, prefix=prefix, x_label=part.x_label, y_range=part.y_range)
    elif isinstance(part, Bars):
        full = part.full or max((bar.value for bar in part.bars), default=1.0) or 1.0
        values["bars"] = [
            {
                "bar": bar,
                "share": _share(bar.value, full),
                "earlier": None if bar.earlier is None else _share(bar.earlier, full),
            }
            for bar in part.bars
        ]
    elif isinstance(part, Matrix):
        values["cells"] = [
            (name, [(count, count / (sum(row) or 1)) for count in row])
            for name, row in zip(part.rows, part.counts, strict=True)
        ]
    elif isinstance(part, Gallery):
        values["pictures"] = [_embedded(picture) for picture in part.pictures]
    elif isinstance(part, Picture):
        values |= _embedded(part)
    return values


def _embedded(picture: Picture) -> dict[str, str]:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    source = f"data:{MIME[picture.path.suffix.lower()]};base64,{data}"
    return {"source": source, "caption": picture.caption or picture.path.stem}


def _share(value: float, full: float) -> str:
    return f"{100 * min(max(value / full, 0.0), 1.0):.2f}%"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
