"""The chunked loss equals the plain one, keeps no logits, and takes the place of a model's own."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import thawline
from tests.support.text import byte_tokenizer, save_tiny_t5
from thawline.errors import ConfigError
from thawline.measure import saved_bytes
from thawline.ops import linear_cross_entropy as module
from thawline.ops.lean_head import LeanHeadModel
from thawline.ops.linear_cross_entropy import linear_cross_entropy
from thawline.planning.simulate import simulate_step
from thawline.recipe import RunConfig
from thawline.run import run

N, H, V = 150, 6, 11
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)),
    "tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=0.5)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(
            **SIZES, num_attention_heads=4, num_key_value_heads=2, logit_scale=0.3, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=1, n_head=4, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=97, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"scale": 0.5, "softcap": 2.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_the_plain_ones(options: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    labels = torch.randint(0, V, (N,))
    labels[::3] = -100
    ours = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    plain = [t.detach().clone().requires_grad_() for t in ours]
    loss = linear_cross_entropy(*ours[:2], labels, ours[2], **options)
    logits = F.linear(*plain).float() * options.get("scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    expected = F.cross_entropy(logits, labels, label_smoothing=options.get("label_smoothing", 0.0))
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    rel = 1e-4 if dtype == torch.float32 else 2e-2  # bfloat16 rounds at other places
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine.grad - theirs.grad).norm() <= rel * theirs.grad.norm()


def test_gradients_of_a_kept_graph_add_up() -> None:
    torch.manual_seed(0)
    leaves = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    loss = linear_cross_entropy(*leaves, torch.arange(N) % V)
    (0.5 * loss).backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves]
    loss.backward()
    for x, first in zip(leaves, once, strict=True):
        torch.testing.assert_close(x.grad, 3 * first)


@pytest.mark.parametrize("slab", [3, 8192])
def test_mixed_precision_sums_a_float32_head_in_float32(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    monkeypatch.setattr(module, "SLAB", slab)
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(16 * N, H), torch.randn(V, H), torch.arange(16 * N) % V
    gradients = []
    for is_mixed in (False, True):
        weight = weight.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
            linear_cross_entropy(hidden, weight, labels).backward()
        gradients.append(weight.grad)
    assert gradients[1].dtype == torch.float32
    assert (gradients[1] - gradients[0]).norm() <= 4e-3 * gradients[0].norm()  # inputs are rounded


def test_sums_over_chunks_in_bfloat16_lose_little() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, H).bfloat16(), torch.randn(V, H).bfloat16().requires_grad_()
    labels = torch.arange(len(hidden)) % 7 % V
    (ours,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), weight)
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.t(), labels).backward()
    assert (ours - exact.grad).norm() <= 0.01 * exact.grad.norm()  # 0.003 with a single rounding


def test_gradient_by_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 2)
    torch.manual_seed(0)
    hidden, labels = torch.randn(7, 3, requires_grad=True), torch.tensor([0, 1, 2, 3, -100, 1, 0])
    weight = torch.randn(4, 3)
    loss = linear_cross_entropy(hidden, weight, labels, softcap=1.5)
    loss.backward()
    for i, j in ((0, 0), (3, 2), (4, 1)):
        moved = hidden.detach().clone()
        moved[i, j] += 1e-2
        up = linear_cross_entropy(moved, weight, labels, softcap=1.5)
        moved[i, j] -= 2e-2
        down = linear_cross_entropy(moved, weight, labels, softcap=1.5)
        assert hidden.grad[i, j].item() == pytest.approx((up - down).item() / 2e-2, abs=1e-3)


def test_a_frozen_head_gets_no_gradient_and_no_buffer() -> None:
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    labels = torch.randint(0, V, (N,))
    kept = saved_bytes(lambda: linear_cross_entropy(hidden, weight, labels), [hidden, weight])
    assert kept <= hidden.nbytes + 64
    assert linear_cross_entropy(hidden, weight, torch.full((N,), -100), divisor=1.0).item() == 0


class Plain(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(super().forward(hidden).float(), torch.zeros(len(hidden), dtype=torch.long))


class Chunked(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, self.weight, torch.zeros(len(hidden), dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_peak_at_128k_words_and_8k_tokens_is_the_gradients_and_little_more(
    dtype: torch.dtype, trained: bool
) -> None:
    def peak(kind: type[nn.Linear]) -> tuple[int, int]:
        with torch.device("meta"):
            head = kind(1024, 128_000, bias=False, dtype=dtype).requires_grad_(trained)
            hidden = torch.zeros(8192, 1024, dtype=dtype)
        cost = simulate_step(head, hidden, lambda model, x: model(x.requires_grad_()))
        return cost.peak, head.weight.nbytes if trained else 0

    (ours, gradient), (plain, _) = peak(Chunked), peak(Plain)
    assert ours <= 0.15 * plain
    assert ours - gradient <= 0.03 * plain


def test_time_is_that_of_the_plain_loss() -> None:
    """A bound for loaded machines, against gross slowdowns."""
    torch.manual_seed(0)
    heads = {kind: kind(256, 8000, bias=False).requires_grad_(False) for kind in (Plain, Chunked)}
    hidden = torch.randn(1024, 256)

    def seconds(kind: type[nn.Linear]) -> float:
        start = time.process_time()
        heads[kind](hidden.requires_grad_()).backward()
        return time.process_time() - start

    pairs = [(seconds(Chunked), seconds(Plain)) for _ in range(7)]
    ours, plain = map(min, zip(*pairs, strict=True))
    assert ours <= 1.6 * plain


@pytest.mark.filterwarnings("ignore:apply_lean")
@pytest.mark.parametrize("name", MODELS)
def test_lean_models_have_the_loss_and_gradients_of_their_own_forward(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    ids = torch.randint(3, 97, (2, 80))
    labels = ids.clone()
    labels[:, :20] = -100

    def run() -> tuple[torch.Tensor, dict]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    signature, loss, grads = inspect.signature(model.forward), *run()
    thawline.apply_lean(model, loss=True)
    assert isinstance(model, LeanHeadModel)
    assert inspect.signature(model.forward) == signature
    output = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(output.logits, model.eval()(input_ids=ids, labels=labels).logits.detach())
    model.train()
    lean_loss, lean_grads = run()
    torch.testing.assert_close(lean_loss, loss)
    for key, grad in grads.items():
        torch.testing.assert_close(lean_grads[key], grad, rtol=1e-3, atol=1e-5, msg=key)
    assert model.eval()(input_ids=ids, labels=labels).logits.shape == (2, 80, 97)
    pickle.loads(pickle.dumps(model))
    assert isinstance(copy.deepcopy(model), LeanHeadModel)
    assert not isinstance(thawline.undo_lean(model), LeanHeadModel)


def test_a_head_with_an_adapter_and_a_model_of_another_loss_run_as_they_are() -> None:
    from thawline.tuners.build import attach_tuner

    model = thawline.apply_lean(MODELS["llama"](), loss=True)
    config = thawline.RunConfig.from_mapping(
        {"base": "m", "data": "d", "tuner": {"method": "lora", "target_modules": ["lm_head"]}}
    )
    tuned = attach_tuner(model, config.tuner).train()
    ids = torch.randint(3, 97, (1, 150))
    assert tuned(input_ids=ids, labels=ids).logits.shape == (1, 150, 97)


def smoothed_run(folder: Path, name: str, **sections: object) -> float:
    """Train a step on long answers with label smoothing; return its loss."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": "ab", "output": "a" * 40}) + "\n" for _ in range(4)))
    args = {"label_smoothing_factor": 0.2, **sections.pop("args", {})}
    training = {"max_steps": 1, "log_every": 1, "batch_size": 4, "args": args}
    values = {"data": str(rows), "folder": str(folder), "name": name, "training": training, **sections}
    lines = (run(RunConfig.from_mapping(values)).folder / "metrics.jsonl").read_text().splitlines()
    return next(json.loads(line)["loss"] for line in lines if '"loss"' in line)


def save_llama(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}, **HEADS)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save", [save_llama, save_tiny_t5])
def test_label_smoothing_of_a_run_reaches_the_lean_loss(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    base = str(save(tmp_path / "base"))
    plain, lean = (smoothed_run(tmp_path, f"lean-{lean}", base=base, lean=lean) for lean in (False, True))
    assert plain == pytest.approx(lean, rel=1e-3)


def test_liger_takes_precedence_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, calls = str(save_llama(tmp_path / "base")), []
    with pytest.raises(ConfigError, match="use_liger_kernel.*pip install liger-kernel"):
        smoothed_run(tmp_path, "missing", base=base, lean=True, args={"use_liger_kernel": True})

    def patch(model: nn.Module) -> None:
        def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
            calls.append(self.training)
            return transformers.LlamaForCausalLM.forward(self, *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    kernels = types.ModuleType("liger_kernel.transformers")
    kernels._apply_liger_kernel_to_instance = patch
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", kernels)
    for place in ("transformers.integrations.liger", "thawline.training.arguments"):
        monkeypatch.setattr(f"{place}.is_liger_kernel_available", lambda: True)
    found = smoothed_run(tmp_path, "liger", base=base, lean=True, args={"use_liger_kernel": True})
    assert True in calls
    assert found == pytest.approx(smoothed_run(tmp_path, "plain", base=base), rel=1e-3)
