"""Tasks trained by two processes: one run, rows shared out, and what one process alone finds."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from tests.support.text import save_tiny_bert, write_tasks
from thawline.analysis.recorder import ALIGNMENT, read_trajectory
from thawline.recipe import RunConfig
from thawline.run import evaluate, run
from thawline.training.objective import build_objective
from thawline.training.text.base import RowObjective
from thawline.training.text.match import MatchObjective
from thawline.training.text.objective import TextObjective

KINDS: dict[str, type[RowObjective]] = {"text": TextObjective, "match": MatchObjective}

SAVED = "model/adapter_model.safetensors"


def a_share_of_a_run(rank: int, mapping: dict[str, Any], port: int) -> None:
    """Trains as one of two processes, and notes the rows of its batches and those it judges."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kind = KINDS[mapping["objective"]]
    collate, judge = kind.collate, kind.judge
    batches: list[list[int]] = []
    judged: list[list[str]] = []

    def noting_batches(self, rows):
        places = {id(row): i for i, row in enumerate(self.train_rows)}
        if all(id(row) in places for row in rows):
            batches.append([places[id(row)] for row in rows])
        return collate(self, rows)

    def noting_judged(self, model, rows, batch_size):
        judged.append([row["example"].where for row in rows])
        return judge(self, model, rows, batch_size)

    kind.collate, kind.judge = noting_batches, noting_judged
    result = run(RunConfig.from_mapping(mapping))
    told = {"steps": result.steps, "metrics": result.metrics, "parts": result.parts, "start": result.start}
    noted = {"told": told, "batches": batches, "judged": judged}
    Path(mapping["folder"], f"{rank}.json").write_text(json.dumps(noted))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_make_one_run_of_tasks(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    tasks, runs = ["first", "last", "least"], tmp_path / "runs"
    for folder in (runs, tmp_path / "tasks"):
        folder.mkdir()
    mapping = {
        "objective": kind,
        "base": str(save_tiny_bert(tmp_path / "bert") if kind == "match" else tiny_llama),
        "data": {
            "path": str(write_tasks(tmp_path / "tasks")), "tasks": tasks, "sampling": "equal",
            "batches": "task" if kind == "match" else "mixed",
        },
        "tuner": {"method": "mhr", "r": 2, "n_skills": 3},
        "training": {
            "epochs": 2, "batch_size": 3, "lr": 1e-2, "log_every": 1, "eval_at_start": True, "align_every": 6,
            "eval_batch_size": 5, "args": {"disable_tqdm": True},
        },
        "folder": str(runs),
        "name": "run",
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(a_share_of_a_run, (mapping, port), nprocs=2, start_method="fork")
    first, second = (json.loads((runs / f"{rank}.json").read_text()) for rank in range(2))
    assert first["told"] == second["told"]
    assert first["told"]["steps"] == 12  # two epochs of 36 rows, six a step
    # Every other batch is one process's, in the order that one process alone would take them.
    config = RunConfig.from_mapping(mapping)
    objective = build_objective(config)
    sampler = objective.train_sampler(3)
    order = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order += list(sampler)
    expected = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert [noted["batches"][-12:] for noted in (first, second)] == [expected[::2], expected[1::2]]
    if kind == "match":
        assert all(len({objective.train_rows[i]["task"] for i in batch}) == 1 for batch in expected)
    # Every evaluation shares the held-out rows out, and each is judged once.
    held_out = [example.where for example in objective.held_out_examples]
    assert len(first["judged"]) == len(second["judged"]) == 3  # at the start, and after each epoch
    for mine, other in zip(first["judged"], second["judged"], strict=True):
        assert (mine, other) == (held_out[::2], held_out[1::2])
    written = (runs / "run" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"] for line in written] == held_out
    # One folder, whose files no process has written a second time.
    assert {path.name for path in runs.iterdir()} == {"run", "0.json", "1.json"}
    lines = [json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 12]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [row["step"] for row in read_trajectory(runs / "run" / ALIGNMENT)] == [6, 12]
    saved = json.loads((runs / "run" / "model" / "adapter_config.json").read_text())
    assert saved["task_names"] == tasks
    # One process alone finds the same on all of the held-out rows.
    found = evaluate(runs / "run")
    assert found.metrics == pytest.approx(first["told"]["metrics"], rel=1e-5)
    assert set(found.parts) == set(first["told"]["parts"]) == set(tasks)
    if kind == "match":  # whose encoder drops units by chance
        return
    # One process with both batches in one takes the same steps.
    training = {**mapping["training"], "batch_size": 6}
    together = run(RunConfig.from_mapping({**mapping, "name": "together", "training": training}))
    assert together.metrics == pytest.approx(found.metrics, rel=1e-3)
    one, two = (
        load_file(runs / name / "model" / "adapter_model.safetensors") for name in ("together", "run")
    )
    for name, tensor in one.items():
        # Adam divides by gradients' size, so rounding of the smallest shows.
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-3)
