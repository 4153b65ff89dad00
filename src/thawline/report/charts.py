"""Line charts as SVG that lies inside an HTML page and takes its colours of text and grid from it.

Drawn by matplotlib. Text stays text, so that the page's font and its light or dark scheme apply; ids get a
prefix, so that several charts can stand in one page.
"""

from __future__ import annotations

__all__ = ["COLOURS", "LEGEND_LINES", "draw_lines"]

import io
import re
from collections.abc import Sequence
from typing import Any

from thawline.errors import MissingExtraError

COLOURS = (
    "#3b82f6", "#f08a24", "#22a06b", "#e5484d", "#8e5bd9", "#14a3b8", "#d6549b", "#a0785a",
    "#84a51b", "#6b7f99", "#c9a100", "#5b5bd6",
)  # fmt: skip
"""Colours of the first line, the second, …: legible on white and on near-black."""
TEXT, GRID = "#0a0b0c", "#0d0e0f"
"""Stand-ins that become the page's colour of text."""
LEGEND_LINES = 12
"""Charts with more lines have no legend."""
LEGEND_WIDTH = 66
"""Characters that fit side by side above a chart; a line's sample takes the space of six."""
FEW_POINTS = 30
"""Lines of at most this many points show the points."""
SIZE = (5.2, 3.3)
"""Inches; the page scales it to the space there is."""


def draw_lines(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    prefix: str,
    x_label: str = "step",
    y_range: tuple[float, float] | None = None,
) -> str:
    """Draw lines over a common axis.

    Args:
        lines: (name, x, y) each.
        prefix: makes the ids of this chart unique within the page.
        x_label: name of the common axis.
        y_range: limits of the vertical axis. None: by the values.
    Returns: an `<svg>` element.
    Raises: MissingExtraError: without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("The report", "matplotlib", "report") from error
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for (name, x, y), colour in zip(lines, _cycle(len(lines)), strict=True):
            marker = "." if len(x) <= FEW_POINTS else None
            axes.plot(x, y, label=_plain(name), color=colour, linewidth=1.6, marker=marker, markersize=5)
        axes.set_xlabel(_plain(x_label), fontsize=9, color=TEXT)
        axes.tick_params(labelsize=9, colors=TEXT, length=0)
        axes.grid(color=GRID, alpha=0.14, linewidth=0.8)
        axes.spines[:].set_visible(False)
        if y_range is not None:
            axes.set_ylim(*y_range)
        if 1 < len(lines) <= LEGEND_LINES:
            columns = max(LEGEND_WIDTH // (max(len(name) for name, _, _ in lines) + 6), 1)
            figure.legend(
                loc="outside upper center",
                ncols=min(columns, len(lines)),
                fontsize=8.5,
                frameon=False,
                labelcolor=TEXT,
            )
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        return _inline(figure, prefix)


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _plain(name: str) -> str:
    """Escape the dollars that matplotlib would take for mathematics."""
    return name.replace("$", r"\$")


def _inline(figure: Any, prefix: str) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # HTML knows SVG's namespaces; the addresses that name them are no links but look like ones.
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", svg, count=3).replace("xlink:href", "href")
    svg = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace(TEXT, "currentColor").replace(GRID, "currentColor")
