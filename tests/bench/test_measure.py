"""The measuring instruments against things whose cost is known."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from torch import nn

from thawline.measure import (
    Sample,
    count_ops,
    live_bytes,
    machine_stamp,
    median_ratio,
    paired_rounds,
    saved_bytes,
)


def test_a_product_keeps_both_factors_and_a_view_or_a_parameter_keeps_nothing_new():
    x, y = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    assert saved_bytes(lambda: (x * y).sum()) == 2 * 3 * 5 * 4
    assert saved_bytes(lambda: (x * x[:, :]).sum()) == 3 * 5 * 4
    assert saved_bytes(lambda: (x * y).sum(), [x]) == 3 * 5 * 4
    assert saved_bytes(lambda: (x + y).sum()) == 0


def test_a_kept_view_counts_as_the_whole_storage_it_holds():
    big = torch.randn(7, 11)
    w = torch.randn(11, requires_grad=True)
    assert saved_bytes(lambda: (big[0] * w).sum(), [w]) == 7 * 11 * 4


def test_measuring_what_is_saved_leaves_nothing_behind():
    x = torch.randn(1000, requires_grad=True)
    before = live_bytes()
    saved_bytes(lambda: x.exp().softmax(0).rsqrt().sum())  # each keeps its own output
    assert live_bytes() == before


def test_live_bytes_sees_what_no_module_owns():
    before = live_bytes()
    model, stash = nn.Linear(4, 3), {"hidden": [torch.zeros(100)]}
    assert live_bytes() - before == 4 * (4 * 3 + 3 + 100)
    del model, stash
    assert live_bytes() == before


def test_tensors_without_memory_are_not_counted():
    # A compiled model leaves such tensors behind in the process.
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = live_bytes()
    with FakeTensorMode():
        fake = torch.zeros(10, 10)
    meta = torch.zeros(10, device="meta")
    assert live_bytes() == before
    assert fake.shape[0] == meta.shape[0]


def test_operations_are_counted_without_views():
    x = torch.randn(4, 6, requires_grad=True)
    n, out = count_ops(lambda: (x.t().reshape(3, 8)[1:] * 2 + 1).sum())
    assert n == 4  # clone of the reshape, mul, add, sum
    linear = nn.Linear(6, 3)
    assert count_ops(lambda: linear(x.view(2, 2, 6)))[0] == 1
    assert count_ops(out.backward)[0] > 0


def test_rounds_rotate_and_pair():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = paired_rounds(steps, rounds=4, steps_per_round=2, warmup=1)
    assert calls[:3] == list("abc")
    rounds = [calls[3 + 6 * i : 9 + 6 * i : 2] for i in range(4)]
    assert rounds == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert {name: len(found) for name, found in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(sample.wall >= 0 and sample.cpu >= 0 for sample in samples["a"])


def test_the_ratio_is_taken_within_a_round_so_a_slow_spell_cancels():
    spell = [1.0, 10.0, 1.0]
    ours = [Sample(wall=0, cpu=1.2 * s) for s in spell]
    theirs = [Sample(wall=0, cpu=s) for s in spell]
    assert median_ratio(ours, theirs, "cpu") == pytest.approx(1.2)


def test_the_machine_stamp_names_the_machine_s_kind_and_not_the_machine():
    stamp = machine_stamp()
    assert {"processor", "threads", "python", "torch", "transformers", "peft", "thawline"} <= stamp.keys()
    text = json.dumps(stamp)
    assert socket.gethostname() not in text
    assert "/home" not in text
    assert "/work" not in text
