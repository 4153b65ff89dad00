"""Rows of a benchmark that goes on where it was stopped: one JSON object a finished job."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")


def read_rows(job: type[Job], rows_file: Path) -> dict[Job, dict[str, Any]]:
    """What an earlier call has finished, by job; `job` is the dataclass whose fields a row begins with."""
    done: dict[Job, dict[str, Any]] = {}
    if rows_file.is_file():
        names = [field.name for field in dataclasses.fields(job)]  # type: ignore[arg-type]
        for line in rows_file.read_text().splitlines():
            row = json.loads(line)
            done[job(**{name: row.pop(name) for name in names})] = row
    return done
