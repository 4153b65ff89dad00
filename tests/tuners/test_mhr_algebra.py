"""MHR's algebra: what its special cases are, and that nothing but the routes decides."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.support.mhr import config, logits, routed, tokens
from tests.support.models import tiny_gpt2
from thawline import set_task_ids
from thawline.tuners.mhr import MHRLinear
from thawline.tuners.mhr.layer import find_layers
from thawline.tuners.mhr.routing import ROUTERS, LearnedRouter, logistic_noise, skill_weights

I, O = 8, 12  # noqa: E741


def one_layer(seed: int = 0, base: nn.Module | None = None, **changes) -> tuple[nn.Module, MHRLinear]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(I, O) if base is None else base).double()
    fields = {"target_modules": ["0"], "r": 2, "n_skills": 3, "n_heads": 4, "n_tasks": 3, **changes}
    wrapped = get_peft_model(model, config(**fields)).double().eval()
    return wrapped, next(layer for _, layer in find_layers(wrapped))


def triple_loop_update(layer: MHRLinear, task: int) -> Tensor:
    """ΔW (O, I) from the logits, the skills and the scale, block by block and rank by rank."""
    router: LearnedRouter = layer.routers["default"]
    A, B, Z = layer.mhr_A["default"], layer.mhr_B["default"], router.logits[task]
    h, n_skills = Z.shape
    delta = torch.zeros(layer.out_features, layer.in_features, dtype=A.dtype)
    share = [[torch.sigmoid(Z[q, s]) / torch.sigmoid(Z[q]).sum() for s in range(n_skills)] for q in range(h)]
    for o in range(layer.out_features):
        for i in range(layer.in_features):
            q_out, q_in = o * h // layer.out_features, i * h // layer.in_features
            b = sum(share[q_out][s] * B[s, o] for s in range(n_skills))
            a = sum(share[q_in][s] * A[s, i] for s in range(n_skills))
            delta[o, i] = layer.scaling["default"] * (a @ b)
    return delta


def test_output_is_the_base_plus_the_update_of_a_triple_loop() -> None:
    model, layer = one_layer()
    x = torch.randn(3, 5, I, dtype=torch.float64)
    set_task_ids(model, [2, 0, 1])
    expected = [
        layer.base_layer(x[n]) + x[n] @ triple_loop_update(layer, t).T for n, t in enumerate([2, 0, 1])
    ]
    torch.testing.assert_close(model(x), torch.stack(expected))


def test_one_head_is_poly_in_pefts_own_words() -> None:
    from peft import PolyConfig
    from peft.tuners.poly.layer import Linear as PolyLinear

    model, layer = one_layer(n_heads=1, alpha=1.0)
    poly = (
        PolyLinear(layer.base_layer, "p", PolyConfig(r=2, n_tasks=3, n_skills=3, n_splits=1)).double().eval()
    )
    poly.poly_lora_A["p"].data = layer.mhr_A["default"].data[None]
    poly.poly_lora_B["p"].data = layer.mhr_B["default"].data.mT[None]
    poly.poly_router["p"].module_logits.data = layer.routers["default"].logits.data.flatten(1)
    x = torch.randn(3, 5, I, dtype=torch.float64)
    set_task_ids(model, [1, 2, 0])
    torch.testing.assert_close(model(x), poly(x, task_ids=torch.tensor([1, 2, 0])))


@pytest.mark.parametrize("noise", ["none", "example", "task"])
def test_one_skill_is_lora_for_any_logits_heads_and_noise(noise: str) -> None:
    model, layer = one_layer(n_skills=1, noise=noise)
    model.train()
    x = torch.randn(3, 5, I, dtype=torch.float64)
    set_task_ids(model, [0, 1, 2])
    A, B = layer.mhr_A["default"][0], layer.mhr_B["default"][0]
    expected = layer.base_layer(x) + layer.scaling["default"] * x @ A @ B.T
    torch.testing.assert_close(model(x), expected)


def test_the_same_logits_in_every_head_are_poly() -> None:
    many, layer = one_layer(seed=3, n_heads=4)
    one, poly = one_layer(seed=3, n_heads=1)
    poly.load_state_dict({k: v for k, v in layer.state_dict().items() if "logits" not in k}, strict=False)
    Z = torch.randn(3, 1, 3)
    poly.routers["default"].logits.data = Z
    layer.routers["default"].logits.data = Z.repeat(1, 4, 1)
    x = torch.randn(3, 5, I, dtype=torch.float64)
    for model in (many, one):
        set_task_ids(model, [0, 1, 2])
    torch.testing.assert_close(many(x), one(x))


@pytest.mark.parametrize("router", ["private", "learned"])
def test_private_skills_or_one_hot_logits_are_one_lora_per_task(router: str) -> None:
    model, layer = one_layer(router=router)
    if router == "learned":
        logits_KHS = layer.routers["default"].logits
        logits_KHS.data = (80 * torch.eye(3)[:, None] - 40).expand_as(logits_KHS).to(logits_KHS)
    x = torch.randn(3, 5, I, dtype=torch.float64)
    set_task_ids(model, [2, 0, 1])
    for n, task in enumerate([2, 0, 1]):
        A, B = layer.mhr_A["default"][task], layer.mhr_B["default"][task]
        expected = layer.base_layer(x[n]) + layer.scaling["default"] * x[n] @ A @ B.T
        torch.testing.assert_close(model(x)[n], expected)


def test_equal_logits_are_the_uniform_average() -> None:
    learned, layer = one_layer(seed=5)
    uniform, average = one_layer(seed=5, router="uniform")
    average.load_state_dict({k: v for k, v in layer.state_dict().items() if "logits" not in k}, strict=False)
    layer.routers["default"].logits.data.fill_(-1.7)
    x = torch.randn(3, 5, I, dtype=torch.float64)
    set_task_ids(learned, [0, 1, 2])
    torch.testing.assert_close(learned(x), uniform(x))


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_sum_to_one_within_each_head(name: str) -> None:
    K, H, S = 5, 2, 5
    router = ROUTERS[name](K, H, S, 3.0)
    weights = router(torch.tensor([4, 0, 2]))
    if weights is not None:
        assert weights.shape == (3, H, S)
        assert weights.dtype is torch.float32
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, H))


def test_skills_and_their_logits_can_be_permuted_together() -> None:
    model, layer = one_layer()
    x = torch.randn(3, 5, I, dtype=torch.float64)
    set_task_ids(model, [0, 1, 2])
    before = model(x)
    order = torch.tensor([2, 0, 1])
    layer.mhr_A["default"].data = layer.mhr_A["default"].data[order]
    layer.mhr_B["default"].data = layer.mhr_B["default"].data[order]
    layer.routers["default"].logits.data = layer.routers["default"].logits.data[..., order]
    torch.testing.assert_close(model(x), before)


def test_tasks_and_their_ids_can_be_permuted_together() -> None:
    model, layer = one_layer()
    x = torch.randn(3, 5, I, dtype=torch.float64)
    set_task_ids(model, [0, 1, 2])
    before = model(x)
    layer.routers["default"].logits.data = layer.routers["default"].logits.data[[2, 0, 1]]
    set_task_ids(model, [1, 2, 0])
    torch.testing.assert_close(model(x), before)


def test_both_factors_use_the_weights_of_their_own_head() -> None:
    model, layer = one_layer()
    set_task_ids(model, 0)
    weights = layer.routers["default"](torch.tensor([0]))[0].double()
    h = weights.shape[0]
    A = torch.einsum("qs,sqfr->qfr", weights, layer.mhr_A["default"].unflatten(1, (h, -1))).flatten(0, 1)
    B = torch.einsum("qs,sqfr->qfr", weights, layer.mhr_B["default"].unflatten(1, (h, -1))).flatten(0, 1)
    torch.testing.assert_close(layer.get_delta_weight("default"), layer.scaling["default"] * B @ A.T)


def test_conv1d_of_gpt2_is_adapted_like_a_linear() -> None:
    model = routed(tiny_gpt2(), target_modules=["c_attn", "c_fc"])
    x = tokens(2)
    set_task_ids(model, [1, 1])
    expected = logits(model, x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, x), expected, atol=1e-5, rtol=1e-5)


# Initialisation and gradients.


def test_starts_as_its_base_and_only_b_moves_first() -> None:
    model, layer = one_layer(init_weights=True)
    x = torch.randn(3, 5, I, dtype=torch.float64)
    set_task_ids(model, [0, 1, 2])
    out = model(x)
    assert torch.equal(out, layer.base_layer(x))
    out.square().sum().backward()
    assert not layer.mhr_A["default"].grad.any()
    assert not layer.routers["default"].logits.grad.any()
    assert layer.mhr_B["default"].grad.abs().min() > 0


def test_rows_of_absent_tasks_get_no_gradient() -> None:
    model, layer = one_layer()
    set_task_ids(model, [2, 2, 0])
    model(torch.randn(3, 5, I, dtype=torch.float64)).square().sum().backward()
    gradient = layer.routers["default"].logits.grad
    assert not gradient[1].any()
    assert gradient[0].any()
    assert gradient[2].any()


def test_gradients_of_the_logits_are_those_of_the_closed_form() -> None:
    Z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 4, dtype=torch.float64)
    weights = skill_weights(Z)
    (weights * upstream).sum().backward()
    open_ = torch.sigmoid(Z.detach())
    alpha = open_ / open_.sum(-1, keepdim=True)
    d_open = (upstream - (alpha * upstream).sum(-1, keepdim=True)) / open_.sum(-1, keepdim=True)
    torch.testing.assert_close(Z.grad, d_open * open_ * (1 - open_))


@pytest.mark.parametrize("a_init", ["lora", "mttl", "peft"])
def test_a_is_uniform_within_the_bound_of_its_source(a_init: str) -> None:
    _, layer = one_layer(base=nn.Linear(400, 8), a_init=a_init, n_heads=4, init_weights=True)
    A = layer.mhr_A["default"].detach()
    bound = {"lora": 400**-0.5, "mttl": 1200**-0.5, "peft": 100**-0.5}[a_init]
    assert bound * 0.98 < A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not layer.mhr_B["default"].any()


def test_gradcheck_through_routing_and_skills() -> None:
    model, layer = one_layer()
    set_task_ids(model, [2, 0, 2])
    A, B, Z = layer.mhr_A["default"], layer.mhr_B["default"], layer.routers["default"].logits
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: model(x), (x, A, B, Z), fast_mode=True)


# Noise.


def test_noise_is_logistic_and_opens_an_undecided_skill_half_of_the_time() -> None:
    noise = logistic_noise(200_000)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(noise.quantile(quantiles), quantiles.logit(), atol=0.03, rtol=0.0)
    assert torch.sigmoid(noise).mean() == pytest.approx(0.5, abs=0.003)


def test_temperature_divides_the_noisy_logits_and_opens_skills_all_or_not_at_all() -> None:
    Z, noise = torch.randn(4, 3, 5), logistic_noise(4, 3, 5)
    noise[..., 0] = 9  # one skill at least is open
    open_ = torch.sigmoid((Z + noise) / 0.5)
    torch.testing.assert_close(skill_weights(Z, noise, 0.5), open_ / open_.sum(-1, keepdim=True))
    switched = ((Z + noise) > 0).float()
    torch.testing.assert_close(skill_weights(Z, noise, 1e-6), switched / switched.sum(-1, keepdim=True))
    torch.testing.assert_close(skill_weights(Z, None, 0.5), skill_weights(Z))  # of the noise alone


def test_evaluation_is_deterministic_and_equals_training_without_noise() -> None:
    model = routed()
    x = tokens()
    set_task_ids(model, [0, 1, 2])
    first = logits(model.eval(), x)
    assert torch.equal(first, logits(model, x))
    torch.testing.assert_close(logits(model.train(), x), first)


def test_noise_is_drawn_once_per_task_or_once_per_example_and_never_in_evaluation() -> None:
    x = tokens(1).repeat(4, 1)
    for noise, distinct in (("task", 2), ("example", 4)):
        model = routed(noise=noise)
        set_task_ids(model, [0, 1, 0, 1])
        out = logits(model.train(), x)
        assert len(torch.unique(out.round(decimals=4), dim=0)) == distinct
        assert not torch.equal(out, logits(model, x))
        set_task_ids(model, 0)
        assert len(torch.unique(logits(model, x).round(decimals=4), dim=0)) == distinct - (noise == "task")
        torch.testing.assert_close(logits(model.eval(), x), logits(model, x[:1]).repeat(4, 1, 1))


@pytest.mark.parametrize("z", [30.0, -30.0])
def test_extreme_logits_stay_finite_and_keep_a_gradient(z: float) -> None:
    Z = torch.full((1, 2, 3), z) + torch.tensor([0.0, 0.1, -0.1])
    Z.requires_grad_()
    weights = skill_weights(Z)
    (weights * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert weights.isfinite().all()
    assert Z.grad.isfinite().all()
    assert Z.grad.abs().min() > 0


@pytest.mark.parametrize("z", [30.0, -30.0])
@pytest.mark.parametrize("noise", ["none", "example"])
def test_a_bf16_model_routes_in_fp32_whatever_the_logits(noise: str, z: float) -> None:
    model = routed(noise=noise).to(torch.bfloat16).train()
    for _, layer in find_layers(model):
        layer.routers["default"].logits.data.fill_(z)
    set_task_ids(model, [0, 1, 2])
    assert layer.routers["default"](torch.tensor([0])).dtype is torch.float32
    model(input_ids=tokens()).logits.float().square().sum().backward()
    for _, layer in find_layers(model):
        gradient = layer.routers["default"].logits.grad
        assert gradient.isfinite().all()
        assert gradient.any()  # sigmoid'(±30) is 1e-13: small, and not lost to a clamp


def test_lora_config_equivalent_gives_the_same_output_and_gradients() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(I, O))
    mhr = get_peft_model(base, config(target_modules=["0"], n_tasks=1, n_skills=1, n_heads=1, r=2))
    layer = next(layer for _, layer in find_layers(mhr))
    torch.manual_seed(0)
    lora = get_peft_model(nn.Sequential(nn.Linear(I, O)), LoraConfig(target_modules=["0"], r=2, lora_alpha=6))
    inner = lora.base_model.model[0]
    inner.lora_A["default"].weight.data = layer.mhr_A["default"].data[0].T.clone()
    inner.lora_B["default"].weight.data = layer.mhr_B["default"].data[0].clone()
    x = torch.randn(4, I)
    torch.testing.assert_close(mhr(x), lora(x))
    mhr(x).square().sum().backward()
    lora(x).square().sum().backward()
    torch.testing.assert_close(layer.mhr_A["default"].grad[0].T, inner.lora_A["default"].weight.grad)
    torch.testing.assert_close(layer.mhr_B["default"].grad[0], inner.lora_B["default"].weight.grad)
