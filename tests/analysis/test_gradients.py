"""Alignment of gradients, held to closed forms and to brute force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

import thawline
from tests.support.mhr import routed, tokens
from tests.support.small_net import TASKS, I, O, batches, mhr, mse, net
from thawline import ConfigError, PacaConfig, RoutingError
from thawline.analysis.gradients import Agreement, gradient_alignment
from thawline.tuners.mhr import parameter_groups


def brute_force(model: nn.Module, gradients_of: Callable[[int], list[Tensor]], n: int = TASKS) -> Tensor:
    """Cosines of whole, flattened gradients, task by task."""
    model.eval()
    rows = torch.stack([torch.cat([g.flatten() for g in gradients_of(task)]) for task in range(n)]).double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    return unit @ unit.T


def skill_gradients(model: nn.Module, data: dict[int, tuple[Tensor, Tensor]]):
    def of(task: int) -> list[Tensor]:
        if any("mhr" in name for name, _ in model.named_parameters()):
            thawline.set_task_ids(model, task)
        shared = [p for name, p in model.named_parameters() if p.requires_grad and "router" not in name]
        return list(torch.autograd.grad(mse(model, data[task]), shared))

    return of


# Closed forms.


def test_of_a_linear_model_is_the_product_of_error_and_input_cosines():
    # One row each: the gradient is 2/O · e xᵀ, so <g_i, g_j> ∝ <e_i, e_j> <x_i, x_j>.
    torch.manual_seed(0)
    layer = nn.Linear(I, O, bias=False)
    data = {task: (x[:1], y[:1]) for task, (x, y) in batches().items()}
    x = torch.cat([x for x, _ in data.values()])
    error = layer(x).detach() - torch.cat([y for _, y in data.values()])
    expected = torch.cosine_similarity(error[:, None], error[None], dim=-1) * torch.cosine_similarity(
        x[:, None], x[None], dim=-1
    )
    found = gradient_alignment(layer, data, mse)
    assert_close(found.skill.cosines, expected.double(), rtol=1e-5, atol=1e-6)
    assert found.skill.mean_cosine == pytest.approx((expected.sum().item() - TASKS) / (TASKS * (TASKS - 1)))


def test_tasks_that_cancel_reach_the_floor_and_orthogonal_ones_stand_above_it():
    # Three unit vectors 120° apart sum to nothing.
    angle = torch.tensor([0.0, 2 * torch.pi / 3, 4 * torch.pi / 3])
    rows = torch.stack([angle.cos(), angle.sin()], 1).double()
    cancelling = Agreement.of(rows @ rows.T)
    assert cancelling.mean_cosine == pytest.approx(-1 / 2)
    assert cancelling.coherence == pytest.approx(0, abs=1e-7)
    orthogonal = Agreement.of(torch.diag(torch.tensor([1.0, 4.0, 9.0])).double())
    assert orthogonal.mean_cosine == 0
    assert orthogonal.coherence == pytest.approx(1 / 3)
    assert orthogonal.norms.tolist() == [1, 2, 3]


def test_a_gradient_of_no_length_agrees_with_none():
    found = Agreement.of(torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    assert found.cosines.tolist() == [[0, 0], [0, 1]]


def test_coherence_is_the_squared_length_of_the_mean_direction():
    model, data = mhr(), batches()
    gradients = skill_gradients(model.eval(), data)
    rows = torch.stack([torch.cat([g.flatten() for g in gradients(t)]) for t in range(TASKS)])
    direction = (rows / rows.norm(dim=1, keepdim=True)).mean(0)
    found = gradient_alignment(model, data, mse).skill
    assert found.coherence == pytest.approx(direction.square().sum().item(), rel=1e-4)
    assert found.coherence == pytest.approx((1 + (TASKS - 1) * found.mean_cosine) / TASKS)


# Brute force.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_heads": 1},
        {"router": "random"},
        {"router": "private", "n_skills": TASKS},
        {"router": "uniform"},
        {"granularity": "network"},
        {"rank_pattern": {"second": 1}},
    ],
    ids=str,
)
def test_skill_space_equals_whole_gradients_of_the_skills(changes):
    model, data = mhr(**changes), batches()
    expected = brute_force(model, skill_gradients(model, data))
    assert_close(gradient_alignment(model, data, mse).skill.cosines, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"n_heads": 1}, {"router": "random"}, {"router": "uniform"}], ids=str
)
def test_effective_space_equals_gradients_of_each_tasks_own_lora(changes):
    model, data = mhr(**changes), batches()

    def gradients(task: int) -> list[Tensor]:
        factors = {}
        x, y = data[task]
        for name in ("first", "second"):
            layer = model.get_submodule(f"base_model.model.{name}")
            weights = layer.weights_of("default", task)
            for part, skills in (("A", layer.mhr_A["default"]), ("B", layer.mhr_B["default"])):
                mixed = (
                    skills.mean(0)
                    if weights is None
                    else torch.cat(
                        [
                            torch.einsum("s,sdr->dr", w, block)
                            for w, block in zip(weights, skills.chunk(len(weights), 1), strict=True)
                        ]
                    )
                )
                factors[name, part] = mixed.detach().requires_grad_()
        hidden = x
        for name in ("first", "second"):
            base = model.get_submodule(f"base_model.model.{name}").base_layer
            hidden = base(hidden) + 3 / 2 * hidden @ factors[name, "A"] @ factors[name, "B"].T
            hidden = hidden.relu() if name == "first" else hidden
        return list(torch.autograd.grad((hidden - y).square().mean(), list(factors.values())))

    expected = brute_force(model, gradients)
    found = gradient_alignment(model, data, mse)
    assert_close(found.effective.cosines, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "paca", "full"])
def test_without_routing_both_spaces_are_the_gradients_of_what_trains(kind):
    config = {
        "lora": LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False),
        "paca": PacaConfig(r=3, target_modules=["first", "second"], init_weights=False),
        "full": None,
    }[kind]
    model = net() if config is None else get_peft_model(net(), config)
    data = batches()
    found = gradient_alignment(model, data, mse)
    assert_close(found.skill.cosines, brute_force(model, skill_gradients(model, data)), rtol=1e-4, atol=1e-6)
    assert_close(found.effective.cosines, found.skill.cosines)


def test_of_paca_are_the_chosen_columns_of_the_dense_gradient():
    data = batches()
    model = get_peft_model(nn.Sequential(nn.Linear(I, O, bias=False)), PacaConfig(r=3, target_modules=["0"]))
    index = model.base_model.model[0].thawline_paca_indices["default"]
    dense = nn.Linear(I, O, bias=False)
    dense.weight.data.copy_(model.base_model.model[0].base_layer.weight)

    def columns(task: int) -> list[Tensor]:
        return [torch.autograd.grad(mse(dense, data[task]), dense.weight)[0][:, index]]

    found = gradient_alignment(model, data, mse)
    assert_close(found.skill.cosines, brute_force(dense, columns), rtol=1e-4, atol=1e-6)


def test_private_adapters_are_orthogonal_in_skill_space_alone():
    model = mhr(router="private", n_skills=TASKS)
    found = gradient_alignment(model, batches(), mse)
    assert found.skill.mean_cosine == 0
    assert found.effective.mean_cosine != 0


def test_a_language_model_and_its_own_loss():
    model = routed()
    data = {task: {"input_ids": (ids := tokens(seed=task)), "labels": ids} for task in range(3)}
    found = gradient_alignment(model, data)
    rows = []
    for task, batch in data.items():
        thawline.set_task_ids(model, task)
        shared = [p for n, p in model.named_parameters() if p.requires_grad and "router" not in n]
        grads = torch.autograd.grad(model(**batch).loss, shared)
        rows.append(torch.cat([g.flatten() for g in grads]))
    expected = torch.cosine_similarity(torch.stack(rows)[:, None], torch.stack(rows)[None], dim=-1)
    assert_close(found.skill.cosines, expected.double(), rtol=1e-4, atol=1e-5)


# How it is computed does not matter.


def test_groups_of_parameters_give_what_all_at_once_gives():
    model, data = mhr(), batches()
    whole = gradient_alignment(model, data, mse)
    parted = gradient_alignment(model, data, mse, keep_bytes=1)
    assert_close(parted.skill.cosines, whole.skill.cosines, rtol=1e-5, atol=1e-7)
    assert_close(parted.effective.norms, whole.effective.norms, rtol=1e-5, atol=1e-7)


def test_a_list_of_batches_is_their_average():
    model, data = mhr(), batches()
    parts = {task: [(x[:2], y[:2]), (x[2:4], y[2:4])] for task, (x, y) in data.items()}
    joined = {task: (x[:4], y[:4]) for task, (x, y) in data.items()}
    a, b = (gradient_alignment(model, d, mse).skill for d in (parts, joined))
    assert_close(a.cosines, b.cosines, rtol=1e-5, atol=1e-6)
    assert_close(a.norms, b.norms, rtol=1e-5, atol=1e-6)


def test_tasks_go_by_name_too():
    model = mhr(task_names=["red", "green", "blue"], n_tasks=None)
    data = batches()
    named = dict(zip(["red", "green", "blue"], data.values(), strict=True))
    assert_close(
        gradient_alignment(model, named, mse).skill.cosines,
        gradient_alignment(model, data, mse).skill.cosines,
    )


def test_nothing_of_the_model_changes():
    model = mhr(noise="task", dropout=0.5).train()
    model.base_model.model.drop.eval()
    thawline.set_task_ids(model, [0, 1, 2, 2, 0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = batches()
    random = torch.get_rng_state()
    gradient_alignment(model, data, mse)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not model.base_model.model.drop.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    x, _ = data[0]
    model(x)  # five ids for five rows: still the ones set above
    with pytest.raises(RoutingError, match="5 task ids for 3 rows"):
        model(x[:3])


def test_noise_and_dropout_are_off():
    model = mhr(noise="task", dropout=0.5).train()
    first, second = (gradient_alignment(model, batches(), mse).skill.cosines for _ in range(2))
    assert torch.equal(first, second)


# What cannot be measured is refused.


def test_frozen_skills_one_task_and_unknown_tasks_are_refused():
    model = mhr()
    with pytest.raises(ConfigError, match="batches of 1"):
        gradient_alignment(model, batches(1), mse)
    with pytest.raises(RoutingError, match="Task id 3"):
        gradient_alignment(model, batches(4), mse)
    thawline.start_adaptation(model, "z", tasks=TASKS)
    with pytest.raises(ConfigError, match="No parameter that tasks share is trainable"):
        gradient_alignment(model, batches(), mse)


def test_peft_poly_is_refused_with_the_way_in():
    model = get_peft_model(net(), PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["first"]))
    with pytest.raises(ConfigError, match="thawline.from_poly"):
        gradient_alignment(model, batches(), mse)


def test_routing_parameters_do_not_count():
    # However long their gradients are.
    model, data = mhr(), batches()
    before = gradient_alignment(model, data, mse).skill.norms
    routing = parameter_groups(model, 1e-3)[1]["params"]
    for one in routing:
        one.requires_grad_(False)
    assert_close(gradient_alignment(model, data, mse).skill.norms, before)
