"""Studies resume from the rows that were recorded, whatever a kill left of the last one."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import Rows
from thawline.cli import main

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Job:
    name: str
    seed: int


def double(job: Job) -> dict[str, int]:
    return {"doubled": 2 * job.seed}


@pytest.mark.parametrize(
    ("study", "rows"),
    [
        ("detection_backbone", "detection_backbone"),
        ("detection_real", "detection_real"),
        ("real_tasks", "real_tasks"),
        ("skills", "skills"),
        ("skills_text", "skills-text"),
    ],
)
def test_recorded_rows_are_read_as_finished_jobs(study: str, rows: str, tmp_path: Path) -> None:
    file = shutil.copy(RESULTS / f"{rows}.rows.jsonl", tmp_path / "study.rows.jsonl")
    found = Rows(tmp_path / "study.json", importlib.import_module(study).Job)
    assert len(found.done) == len(Path(file).read_text().splitlines())
    assert all(found.done.values())
    found._keep(*next(iter(found.done.items())))
    first, *_, last = Path(file).read_text().splitlines()
    assert json.loads(last) == json.loads(first)


def test_finished_jobs_are_not_run_again_and_a_torn_row_is(tmp_path: Path) -> None:
    jobs = [Job("a", 1), Job("b", 2), Job("c", 3)]
    Rows(tmp_path / "study.json", Job).run(double, jobs, workers=1)
    file = tmp_path / "study.rows.jsonl"
    text = file.read_text()
    file.write_text(text[:-5])
    rows = Rows(tmp_path / "study.json", Job)
    assert list(rows.done) == jobs[:2]
    rows.run(double, jobs, workers=1, until=0)
    assert list(rows.done) == jobs[:2]
    rows.run(double, jobs, workers=1)
    assert rows.done[jobs[2]] == {"doubled": 6}
    assert file.read_text() == text


@pytest.mark.parametrize("study", ["backbone", "skills", "vision"])
def test_the_command_line_says_where_a_study_is(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", study]) != 0
    assert f"python benchmarks/{study}.py" in capsys.readouterr().err
