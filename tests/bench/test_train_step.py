"""The bench of a detector's training step, and how often a step waits for the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from thawline.bench.host_reads import HostReads
from thawline.bench.train_step import OurStep, generated_batch, main
from thawline.models.deimv2.model import DEIMv2


def test_every_way_of_reading_a_device_value_is_counted() -> None:
    weight, on_host = torch.ones(3, requires_grad=True), torch.arange(3.0)

    def call() -> None:
        values = (weight * 2).detach()
        if values.sum() > 0:
            values.tolist()
        values[values > 1], values.nonzero(), values.cpu().numpy(), float(values[0])
        on_host.tolist(), on_host[on_host > 0]

    found = HostReads.of(call, [weight])
    assert {place.split(": ")[1]: n for place, n in found.by_place.items()} == {
        "bool": 1, "tolist": 1, "getitem": 1, "nonzero": 1, "cpu": 1, "float": 1,
    }  # fmt: skip
    assert all(place.startswith("test_train_step.py:call") for place in found.by_place)


def test_code_that_may_read_on_a_processor_is_followed_as_on_a_device() -> None:
    weight = torch.ones(())
    assert HostReads.of(lambda: weight.item() if weight.is_cpu else None, [weight]).total == 0


@pytest.mark.parametrize("variant", ["atto", "n"])
def test_a_step_waits_for_the_device_at_most_twice(variant: str) -> None:
    """The costs of the matcher are copied to the host, once for all stages; nothing else is asked."""
    detector = DEIMv2.from_variant(variant)
    pixels, targets = generated_batch(2, 96)
    step = OurStep(detector, pixels, targets, variant)
    found = HostReads.of(step, [*detector.parameters(), *detector.buffers(), pixels])
    assert found.by_place == {"matcher.py:match_queries: cpu": 1}


@pytest.mark.skipif(not hasattr(transformers, "Deimv2Config"), reason="this transformers has no DEIMv2")
def test_bench_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train-step.json"
    arguments = [
        "--variants",
        "atto",
        "--size",
        "160",
        "--batch_size",
        "1",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    assert main([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    row = json.loads(out.read_text())["variants"]["atto"]
    assert row["of_transformers"] > 0
    assert f"{row['of_transformers']:.3f}" in capsys.readouterr().out
    assert sum(row["host_reads"]["transformers"].values()) > 2


def test_generated_batch_has_about_eight_boxes_an_image_inside_of_it() -> None:
    pixels, targets = generated_batch(4, 64)
    assert pixels.dtype == torch.uint8
    assert [len(target["labels"]) for target in targets] == [8, 7, 10, 5]
    boxes: Tensor = torch.cat([target["boxes"] for target in targets])
    assert ((boxes > 0) & (boxes < 1)).all()
