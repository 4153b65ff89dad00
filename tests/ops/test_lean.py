"""Lean norms and gated MLPs against the modules of transformers they stand in for."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from thawline.measure import count_ops, saved_bytes
from thawline.ops.lean import apply_lean, lean_geglu, lean_rms_norm, lean_swiglu, undo_lean

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
V, B, T = 29, 2, 5
IDS = torch.arange(B * T).view(B, T) * 7 % V


def build(family: str = "llama", n_layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    config, model = FAMILIES[family]
    tiny = config(
        vocab_size=V, hidden_size=12, intermediate_size=20, num_hidden_layers=n_layers, num_attention_heads=3,
        num_key_value_heads=1, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    built = model(tiny).to(dtype)
    for name, parameter in built.named_parameters():
        if "norm" in name:  # away from all ones, or all zeros, where a lost weight would not show
            nn.init.uniform_(parameter, 0.3, 1.7)
    return built


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every parameter that has one."""
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_keep_their_bits_and_gradients_their_values(family, dtype):
    stock = build(family, dtype=dtype)
    lean = apply_lean(copy.deepcopy(stock))
    n_norms = sum(name.endswith("norm") for name, _ in stock.named_modules())
    assert sum("Lean" in type(m).__name__ for m in lean.modules()) == n_norms + 2

    (expected, expected_grads), (got, grads) = step(stock), step(lean)
    assert torch.equal(got, expected)
    assert grads.keys() == expected_grads.keys()
    # bfloat16 has 8 bits, and the stock backward rounds to them more often than the lean one.
    tolerance = {"rtol": 2e-4, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    for name in grads:
        assert grads[name].dtype == expected_grads[name].dtype
        assert_close(grads[name], expected_grads[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm_gradients_equal_the_closed_form_in_double(unit_offset):
    x, weight, grad = (torch.randn(2, 3, 8), torch.randn(8), torch.randn(2, 3, 8))
    x.requires_grad_(), weight.requires_grad_()
    lean_rms_norm(x, weight, 1e-5, unit_offset=unit_offset).backward(grad)

    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
    scale = w64 + 1 if unit_offset else w64
    (x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale).backward(grad.double())
    assert_close(x.grad, x64.grad.float(), rtol=1e-5, atol=1e-6)
    assert_close(weight.grad, w64.grad.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("lean", "stock"),
    [
        (lean_swiglu, lambda g, u: F.silu(g) * u),
        (lean_geglu, lambda g, u: F.gelu(g, approximate="tanh") * u),
        (lambda g, u: lean_geglu(g, u, approximate="none"), lambda g, u: F.gelu(g) * u),
    ],
    ids=["swiglu", "geglu_tanh", "geglu"],
)
def test_gated_unit_passes_gradcheck_and_equals_autograd_to_the_bit(lean, stock):
    gate, up = (torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lean, (gate, up))
    expected = torch.autograd.grad(stock(gate, up).sum(), (gate, up))
    got = torch.autograd.grad(lean(gate, up).sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    loss = lean_rms_norm(x, weight, 1e-5).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_gradients_survive_gradient_checkpointing(reentrant):
    lean = apply_lean(build())
    _, expected = step(lean)
    lean.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    lean.enable_input_require_grads()
    _, got = step(lean)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_autocast_gives_the_stock_bits():
    stock = build()
    lean = apply_lean(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16):
        (expected, expected_grads), (got, grads) = step(stock), step(lean)
    assert torch.equal(got, expected)
    for name in grads:
        assert_close(grads[name], expected_grads[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_compiles_as_one_graph_with_equal_loss_and_gradients(family):
    lean = apply_lean(build(family, n_layers=1))
    expected, expected_grads = step(lean)
    torch._dynamo.reset()
    compiled = torch.compile(lean, fullgraph=True, backend="aot_eager")
    lean.zero_grad()
    out = compiled(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    assert_close(out.logits, expected)
    for name, parameter in lean.named_parameters():
        assert_close(parameter.grad, expected_grads[name], rtol=1e-4, atol=1e-6)


def test_ddp_sees_the_gradients_of_a_lean_model(tmp_path):
    lean = apply_lean(build())
    _, expected = step(lean)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        lean.zero_grad()
        _, got = step(nn.parallel.DistributedDataParallel(lean))
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(got[f"module.{name}"], expected[name]) for name in expected)


def test_a_tuner_inside_the_mlp_is_called_not_bypassed():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False
    )
    stock = peft.get_peft_model(build(), config)
    wrapped_then_lean = apply_lean(copy.deepcopy(stock))
    expected, expected_grads = step(stock)
    got, grads = step(wrapped_then_lean)
    assert torch.equal(got, expected)
    assert len(grads) == 2 * 3 * 2
    for name in grads:
        assert_close(grads[name], expected_grads[name], rtol=2e-4, atol=2e-6)

    lean_then_wrapped = peft.get_peft_model(apply_lean(build()), config)
    lean_then_wrapped.load_state_dict(stock.state_dict())
    assert torch.equal(step(lean_then_wrapped)[0], expected)


def kept(model: nn.Module) -> int:
    return saved_bytes(lambda: model(input_ids=IDS, labels=IDS, use_cache=False).loss, model.parameters())


def test_beside_a_frozen_model_half_the_norms_and_a_third_of_the_mlp_is_kept():
    stock = build(dtype=torch.bfloat16).requires_grad_(False)
    stock.enable_input_require_grads()
    lean = apply_lean(copy.deepcopy(stock))
    n_layers, hidden, inner, bf16 = 2, 12, 20, 2
    n_norms = 2 * n_layers + 1
    # float32 x (4 bytes a value) becomes bfloat16 x (2); gate, act(gate), up become gate, up.
    assert kept(stock) - kept(lean) == B * T * bf16 * (n_norms * hidden + n_layers * inner)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_trained_norm_weight_costs_no_second_copy(unit_offset):
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    assert saved_bytes(lambda: lean_rms_norm(x, weight, 1e-5, unit_offset=unit_offset), [weight]) == 4 * (
        3 * 8 + 3
    )


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_no_operation_is_added_and_fewer_run_backward(family):
    stock = build(family).requires_grad_(False)
    stock.enable_input_require_grads()
    lean = apply_lean(copy.deepcopy(stock))
    counts = []
    for model in (stock, lean):
        forward, out = count_ops(lambda model=model: model(input_ids=IDS, labels=IDS, use_cache=False))
        counts.append((forward, count_ops(out.loss.backward)[0]))
    assert counts[1][0] == counts[0][0]
    assert counts[1][1] < counts[0][1]


def test_names_files_and_outputs_are_those_of_the_stock_model_and_undo_restores_it(tmp_path):
    stock = build()
    lean = copy.deepcopy(stock)
    assert apply_lean(lean) is lean
    assert apply_lean(lean) is lean, "twice is once"
    assert list(lean.state_dict()) == list(stock.state_dict())
    assert isinstance(lean.model.norm, type(stock.model.norm))
    stock.save_pretrained(tmp_path / "stock")
    lean.save_pretrained(tmp_path / "lean")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "lean" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()

    for twin in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert type(twin.model.norm) is type(lean.model.norm)
        assert torch.equal(step(twin)[0], step(stock)[0])
        undo_lean(twin)
        assert [type(m) for m in twin.modules()] == [type(m) for m in stock.modules()]
        assert vars(twin.model.norm).keys() == vars(stock.model.norm).keys()
        assert all(
            torch.equal(a, b) for a, b in zip(step(twin)[1].values(), step(stock)[1].values(), strict=True)
        )


def test_a_forward_hook_still_fires():
    lean = apply_lean(build())
    seen = []
    lean.model.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    step(lean)
    assert seen == [(B, T, 12)]


def test_unknown_blocks_are_left_alone_and_named():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=12, n_layer=1, n_head=3))
    before = [type(m) for m in gpt2.modules()]
    with pytest.warns(UserWarning, match="GPT2LMHeadModel.*GPT2MLP"):
        assert apply_lean(gpt2) is gpt2
    assert [type(m) for m in gpt2.modules()] == before


class ShiftedRMSNorm(nn.Module):
    """Has a norm's parts and name, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)) + 1e-3


class GatedRMSNorm(nn.Module):
    """Computes the known form, but takes a second tensor that the lean one would not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        out = lean_rms_norm(x, self.weight, self.eps)
        return out if gate is None else out * gate


@pytest.mark.parametrize("norm", [ShiftedRMSNorm, GatedRMSNorm])
def test_a_look_alike_is_recognised_by_what_it_computes(norm):
    model = nn.Sequential(norm())
    with pytest.warns(UserWarning, match=norm.__name__):
        apply_lean(model)
    assert type(model[0]) is norm


def test_a_replaced_forward_on_the_instance_is_respected():
    model = build(n_layers=1)
    model.model.norm.forward = lambda x: x
    with pytest.warns(UserWarning, match="LlamaRMSNorm.*replaced on the instance"):
        apply_lean(model)
    assert "Lean" not in type(model.model.norm).__name__
    assert "Lean" in type(model.model.layers[0].mlp).__name__


def test_a_known_architecture_is_swapped_without_a_word_and_without_touching_the_random_state():
    model = build()
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lean(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_without_weights_yet_are_recognised():
    with torch.device("meta"):
        model = apply_lean(build())
    assert "Lean" in type(model.model.norm).__name__
