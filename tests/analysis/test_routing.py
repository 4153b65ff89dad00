"""Routing statistics, held to their definitions, and read alike from models and from every kind of file."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

import thawline
from tests.support.small_net import TASKS, mhr, net
from thawline import CheckpointError, RoutingError
from thawline.analysis.routing import RoutingTable, read_routing, routing_statistics, task_similarity


def table(*logits: torch.Tensor) -> RoutingTable:
    p = {f"part{i}": one.double().sigmoid() for i, one in enumerate(logits)}
    weights = {part: one / one.sum(-1, keepdim=True) for part, one in p.items()}
    return RoutingTable(tuple(map(str, range(len(logits[0])))), p, weights)


ON, OFF = 40.0, -40.0


def test_a_fresh_table_is_undecided_and_uses_all_skills_alike():
    found = routing_statistics(table(torch.zeros(3, 2, 5)))
    assert found["discreteness"] == pytest.approx(1)
    assert found["usage"] == pytest.approx(1)
    assert_close(task_similarity(table(torch.zeros(3, 2, 5)))[0], torch.ones(3, 3).double())


def test_switched_rows_are_discrete_and_count_the_skills_that_are_on():
    # Task 0 uses skills 0 and 1, task 1 skill 1: three of eight switches are on.
    found = routing_statistics(table(torch.tensor([[[ON, ON, OFF, OFF]], [[OFF, ON, OFF, OFF]]])))
    assert found["discreteness"] == pytest.approx(0, abs=1e-12)
    assert found["sparsity"] == pytest.approx(3 / 8)
    share = torch.tensor([1 / 3, 2 / 3]).double()
    assert found["usage"] == pytest.approx(-(share * share.log()).sum().item() / math.log(4))


def test_statistics_are_means_over_parts_and_usage_over_heads():
    one = torch.tensor([[[ON, OFF], [ON, OFF]], [[ON, OFF], [OFF, ON]]])  # head 0: one skill, head 1: both
    found = routing_statistics(table(one, torch.zeros(2, 1, 2)))
    assert found["modules"]["part0"]["usage"] == pytest.approx(0.5)
    assert found["usage"] == pytest.approx((0.5 + 1) / 2)
    assert found["discreteness"] == pytest.approx(0.5)


def test_binary_entropy_equals_torchs():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5).double()
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().mean() / math.log(2)
    assert routing_statistics(table(logits))["discreteness"] == pytest.approx(entropy.item())


def test_similarity_is_the_cosine_of_rows_averaged_over_parts():
    torch.manual_seed(0)
    found = table(torch.randn(3, 2, 5), torch.randn(3, 4, 5))
    mean, parts = task_similarity(found)
    expected = [
        torch.cosine_similarity(w.flatten(1)[:, None], w.flatten(1)[None], dim=-1)
        for w in found.weights.values()
    ]
    assert_close(parts["part1"], expected[1])
    assert_close(mean, (expected[0] + expected[1]) / 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"granularity": "network"},
        {"router": "random"},
        {"uniform_mix": 0.3},
        {"task_names": ["a", "b", "c"], "n_tasks": None},
    ],
    ids=str,
)
def test_model_adapter_folder_and_routing_folder_read_alike(changes, tmp_path):
    model = mhr(**changes)
    if "uniform_mix" in changes:
        thawline.tuners.mhr.set_uniform_mix(model, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    thawline.save_routing(model, tmp_path / "routing")
    of_model = read_routing(model)
    layer = model.get_submodule("base_model.model.second")
    part = next(iter(of_model.weights)) if "granularity" in changes else "second"
    for task, row in enumerate(of_model.weights[part]):
        assert_close(row, layer.weights_of("default", task).detach().double(), rtol=1e-5, atol=1e-6)
    assert of_model.tasks == (("a", "b", "c") if "task_names" in changes else ("0", "1", "2"))
    for source in ("adapter", "routing"):
        found = read_routing(tmp_path / source)
        assert found.tasks == of_model.tasks
        for kind in ("weights", "probabilities"):
            ours, theirs = getattr(of_model, kind), getattr(found, kind)
            # A network's one table is saved in the first layer that uses it.
            assert len(ours) == len(theirs)
            assert all(torch.equal(*pair) for pair in zip(ours.values(), theirs.values(), strict=True))


def test_private_routes_are_discrete(tmp_path):
    model = mhr(router="private", n_skills=TASKS)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        found = read_routing(source)
        assert routing_statistics(found)["sparsity"] == pytest.approx(1 / TASKS)
        assert_close(task_similarity(found)[0], torch.eye(TASKS).double())


def test_what_routes_nothing_is_refused(tmp_path):
    model = mhr()
    thawline.start_adaptation(model, "mu", tasks=2)
    model.save_pretrained(tmp_path / "mu")
    for source in (model, tmp_path / "mu"):
        with pytest.raises(RoutingError, match="routes no tasks"):
            read_routing(source)
    get_peft_model(net(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(RoutingError, match="is a LORA adapter"):
        read_routing(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="holds no routing: expected adapter_config.json"):
        read_routing(tmp_path)
