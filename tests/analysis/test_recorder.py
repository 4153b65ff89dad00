"""Recording alignment changes no bit of the training, and a resumed one goes on in the same file."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import TrainingArguments

import thawline
from tests.support.mhr import routed, tokens
from tests.support.small_net import TASKS, batches, mhr, mse, net
from thawline import DataError, PacaConfig
from thawline.analysis.recorder import AlignmentRecorder, average, read_trajectory
from thawline.tuners.mhr import parameter_groups


def train(model: nn.Module, record: AlignmentRecorder | None, steps: int = 4) -> dict[str, torch.Tensor]:
    data = batches()
    x, y = (torch.cat(parts) for parts in zip(*data.values(), strict=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    if hasattr(model, "peft_config") and model.peft_config["default"].peft_type.value == "MHR":
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=0.01)
        thawline.set_task_ids(model, [task for task, (rows, _) in data.items() for _ in rows])
    model.train()
    torch.manual_seed(5)
    for step in range(1, steps + 1):
        mse(model, (x, y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if record is not None:
            record(model, step)
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("kind", ["mhr", "paca"])
def test_training_is_the_same_to_the_bit_with_and_without(kind):
    def build() -> nn.Module:
        if kind == "mhr":
            return mhr(noise="example", dropout=0.1)
        torch.manual_seed(3)
        return get_peft_model(net(), PacaConfig(r=3, target_modules=["first", "second"]))

    record = AlignmentRecorder(batches(), mse, every=2)
    torch.manual_seed(4)
    with_it = train(build(), record)
    torch.manual_seed(4)
    without = train(build(), None)
    assert [row["step"] for row in record.rows] == [2, 4]
    assert with_it.keys() == without.keys()
    assert all(torch.equal(value, without[name]) for name, value in with_it.items())


def test_average_is_over_the_trajectory():
    record = AlignmentRecorder(batches(), mse, every=1)
    train(mhr(), record)
    found = average(record.rows)
    assert found["skill"]["coherence"] == pytest.approx(
        sum(row["skill"]["coherence"] for row in record.rows) / 4
    )
    assert record.rows[0]["cosine_if_cancelling"] == -1 / (TASKS - 1)
    with pytest.raises(DataError, match="No alignment was measured"):
        average([])


def test_a_plain_trainer_records_and_a_resumed_one_goes_on(tmp_path: Path):
    data = {task: {"input_ids": (ids := tokens(seed=task)), "labels": ids} for task in range(3)}
    rows = [
        {"input_ids": tokens(1, seed=s)[0], "labels": tokens(1, seed=s)[0], "task_ids": s % 3}
        for s in range(8)
    ]

    def trainer(steps: int) -> transformers.Trainer:
        model = thawline.route_by_batch(routed().train())
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
            remove_unused_columns=False, report_to=[], disable_tqdm=True, use_cpu=True, save_only_model=False,
        )  # fmt: skip
        record = AlignmentRecorder(data, every=1, file=tmp_path / "alignment.jsonl")
        return transformers.Trainer(model, args, train_dataset=rows, callbacks=[record])

    trainer(3).train()
    whole = (tmp_path / "alignment.jsonl").read_text()
    assert [row["step"] for row in read_trajectory(tmp_path / "alignment.jsonl")] == [1, 2, 3]
    with (tmp_path / "alignment.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4})[:5])  # a kill
    trainer(3).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    again = read_trajectory(tmp_path / "alignment.jsonl")
    assert [row["step"] for row in again] == [1, 2, 3]
    assert again[2]["skill"]["coherence"] == pytest.approx(
        json.loads(whole.splitlines()[2])["skill"]["coherence"], rel=1e-3
    )
