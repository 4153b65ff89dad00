"""Rows of a benchmark that goes on where it was stopped: one JSON object a finished job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

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


def run_jobs(
    call: Callable[[Job], dict[str, Any]],
    jobs: Sequence[Job],
    done: dict[Job, dict[str, Any]],
    rows_file: Path,
    *,
    workers: int | None,
    jobs_per_process: int | None = None,
) -> None:
    """Do what is not in `done` yet, in several processes, and append a row for each to file and `done`.

    Args:
        call: a job to its outcome; must be picklable.
        workers: processes.
        jobs_per_process: jobs after which a process is replaced; None: never.
    """
    todo = [job for job in jobs if job not in done]
    with ProcessPoolExecutor(workers, max_tasks_per_child=jobs_per_process) as pool, rows_file.open("a") as f:
        futures = {pool.submit(call, job): job for job in todo}
        for future in tqdm(as_completed(futures), total=len(todo), unit="run"):
            job, outcome = futures[future], future.result()
            done[job] = outcome
            f.write(json.dumps({**dataclasses.asdict(job), **outcome}) + "\n")  # type: ignore[call-overload]
            f.flush()
