"""Arguments, resumable rows and results files that the studies share."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from thawline.files import to_json

Job = TypeVar("Job")


def study_parser(doc: str | None, out: str, *, workers: int | None = None) -> argparse.ArgumentParser:
    """Options of a study of many runs: --shared, --out and --workers.

    Args:
        doc: the study's docstring, whose first line describes it.
        out: name of its results file in benchmarks/results.
        workers: default number of processes. None: one per CPU.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="Folder of models/ and data/.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / out, help="Results as JSON.")
    parser.add_argument("--workers", type=int, default=workers or os.cpu_count(), help="Processes.")
    return parser


def study_results(script: str, **found: Any) -> dict[str, Any]:
    """Results with the command that repeats them and the machine they come from."""
    from thawline.measure import machine_stamp

    return {"command": f"python benchmarks/{Path(script).name}", "machine": machine_stamp(), **found}


class Rows(Generic[Job]):
    """Outcomes by job, each appended to a file as its job finishes, so that a stopped study resumes.

    Args:
        out: the results file, beside which the rows go, as <out>.rows.jsonl. None: nothing is written.
        job: dataclass of the jobs. A row of the file holds its fields, then the outcome's; a class with
            `to_row` and `from_row` (which takes its own values out of a row) decides itself.
    """

    def __init__(self, out: Path | None, job: type[Job]) -> None:
        self.file = None if out is None else out.with_suffix(".rows.jsonl")
        self.done: dict[Job, dict[str, Any]] = {}
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill cut the last row off
            self.file.write_text(whole, encoding="utf-8")
        for line in whole.splitlines():
            row = json.loads(line)
            found = job.from_row(row) if hasattr(job, "from_row") else _take_fields(job, row)
            self.done[found] = row

    def run(
        self,
        call: Callable[[Job], dict[str, Any]],
        jobs: Sequence[Job],
        *,
        workers: int | None,
        jobs_per_process: int | None = None,
        context: BaseContext | None = None,
        until: float | None = None,
    ) -> None:
        """Run the jobs that are not done yet in several processes.

        Args:
            call: a job to its outcome; must be picklable.
            jobs_per_process: jobs after which a process is replaced. None: never.
            context: how processes start. None: the platform's default.
            until: value of `time.monotonic` after which no job starts.
        """
        todo = [job for job in jobs if job not in self.done]
        at_once = (workers or 1) if until is not None else max(len(todo), 1)
        bar = tqdm(total=len(todo), unit="run", disable=not todo)
        limit = {} if jobs_per_process is None else {"max_tasks_per_child": jobs_per_process}
        with ProcessPoolExecutor(workers, context, **limit) as pool, bar:
            for start in range(0, len(todo), at_once):
                if until is not None and time.monotonic() > until:
                    return
                futures = {pool.submit(call, job): job for job in todo[start : start + at_once]}
                for future in as_completed(futures):
                    self._keep(futures[future], future.result())
                    bar.update()

    def _keep(self, job: Job, outcome: dict[str, Any]) -> None:
        self.done[job] = outcome
        if self.file is not None:
            row = job.to_row() if hasattr(job, "to_row") else asdict(job)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(to_json({**row, **outcome}) + "\n")


def _take_fields(job: type[Job], row: dict[str, Any]) -> Job:
    return job(**{field.name: row.pop(field.name) for field in fields(job)})
