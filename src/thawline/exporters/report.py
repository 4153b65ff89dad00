"""Certificate of an exported file: how far it equals the model in torch."""

from __future__ import annotations

__all__ = ["ExportReport", "Parting", "over_budget"]

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from thawline.exporters.certificate import SCORE_BUDGETS, Row
from thawline.tables import aligned


@dataclass(frozen=True, kw_only=True)
class Parting:
    """A node whose result differs from torch's."""

    node: str
    """Module and operation."""
    value: str
    """Name of its result in the ONNX model."""
    error: float
    """Largest difference, relative to the largest value."""


@dataclass(kw_only=True)
class ExportReport:
    """Certificate of an exported file."""

    path: Path
    format: str
    precision: str
    budget_px: float | None
    """None: of any size, as in int8."""
    rows: list[Row] = field(default_factory=list)
    passed: bool = True
    bytes: int = 0
    """Size of the file, and of those that belong to it."""
    images: str = ""
    """Source of the images that were compared."""
    opset: int | None = None
    nodes: int | None = None
    kept_fp32: list[str] = field(default_factory=list)
    """Nodes that stay in full precision in a file of lower precision."""
    first_partings: list[Parting] = field(default_factory=list)
    """First nodes that part from torch. Full precision allows none: what a model without training detects may
    hardly depend on them."""
    ap: dict[str, float] = field(default_factory=dict)
    """AP in torch, in the file, and their difference, on labelled images."""
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Path of the report; one of a refused file leaves that of an older file, which stays, alone."""
        is_older_kept = not self.passed and self.path.exists()
        return self.path.with_name(f"{self.path.name}{'.refused' * is_older_kept}.report.json")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "path": str(self.path)}

    def lines(self) -> list[str]:
        """Return the report as text: a table with a row per precision and batch size, and what is to know."""
        names = [entry.name for entry in fields(Row)]
        cells = [[_cell(getattr(row, name)) for name in names] for row in self.rows]
        table = aligned([names, *cells]).splitlines()
        values = ", ".join(f"{key} {value:.4f}" for key, value in self.ap.items())
        notes = [f"AP on {self.images}: {values}", *self.notes] if self.ap else self.notes
        if self.kept_fp32:
            notes = [*notes, f"In full precision: {len(self.kept_fp32)} nodes, listed in the report."]
        title = f"{self.path}: {self.format}, {self.precision}, {self.bytes / 2**20:.1f} MiB"
        return [title, *table, *notes]


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def over_budget(report: ExportReport) -> str:
    """Return the message for a file that differs from torch by more than the budget."""
    precision = report.rows[-1].precision
    rows = [row for row in report.rows if row.precision == precision]
    box, score = (max(getattr(row, name) for row in rows) for name in ("box_error_px", "score_error"))
    if precision == "int8":
        found = f"int8 changes AP by {100 * report.ap['difference']:.2f} points, more than the budget allows"
    else:
        found = (
            f"{precision} boxes differ from torch's by up to {box:.3g} pixels and scores by {score:.2g}, or "
            f"its inner values do; the budget is {report.budget_px:g} pixels and {SCORE_BUDGETS[precision]:g}"
        )
    named = ", ".join(f"{parting.node} ({parting.error:.1e})" for parting in report.first_partings)
    partings = f" First nodes that part from torch: {named}." if named else ""
    kept = "; the older file stays" if report.path.exists() else ""
    return f"{found}; no file was kept{kept}.{partings} Details: '{report.file}'."
