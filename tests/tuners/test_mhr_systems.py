"""MHR inside the machinery: what it costs, and that compiling, trainers and processes change no number."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from tests.support.mhr import config, logits, one_linear, routed, tokens
from tests.support.models import VOCAB, tiny_gpt2, tiny_llama, tiny_t5
from thawline import ConfigError, RoutingError, route_by_batch, set_task_ids, start_adaptation, to_lora
from thawline.tuners.mhr import MHRLinear, parameter_groups
from thawline.tuners.mhr.adapt import find_adapter
from thawline.tuners.mhr.layer import find_layers


def test_an_adapter_put_on_an_evaluating_model_evaluates() -> None:
    model, x = get_peft_model(tiny_llama().eval(), config(noise="example")), tokens()  # no .eval() of its own
    set_task_ids(model, [0, 1, 2])
    assert torch.equal(logits(model, x), logits(model, x))
    kept = find_adapter(model)[0].forward.mixtures
    assert {layer for layer, _ in kept} == {layer for _, layer in find_layers(model)}


# Kept mixtures.


def test_a_kept_mixture_is_forgotten_when_anything_it_came_from_changes() -> None:
    model, x = routed(), tokens()
    layer = next(layer for _, layer in find_layers(model))
    set_task_ids(model, 1)
    last = logits(model, x)

    def changed() -> bool:
        nonlocal last
        before, last = last, logits(model, x)
        return not torch.equal(last, before)

    assert not changed()
    set_task_ids(model, 2)
    assert changed()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1, fused=True)
    model(input_ids=x, labels=x).loss.backward()
    assert not changed()
    optimiser.step()
    assert changed()
    with torch.no_grad():
        layer.mhr_A["default"].mul_(2)
    assert changed()
    model.load_state_dict(
        {k: v + 1 for k, v in model.state_dict().items() if "logits" in k or "mhr_B" in k}, strict=False
    )
    assert changed()
    layer.mhr_A["default"].data = layer.mhr_A["default"].data * 2
    assert changed()
    model.train().eval()
    assert not changed()
    layer.mhr_A["default"].data.mul_(2)  # leaves no trace, as averages of weights and DeepSpeed write
    model.eval()
    assert changed()


def test_layers_mix_once_and_not_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    mix = MHRLinear.mix

    def counted(layer: MHRLinear, *args: Any) -> Any:
        asked.append(layer.name)
        return mix(layer, *args)

    monkeypatch.setattr(MHRLinear, "mix", counted)
    model, x = routed(), tokens()
    n_layers = len(list(find_layers(model)))
    for ids in ([0, 1, 2], 1):
        model.generate(input_ids=x, task_ids=ids, max_new_tokens=4, do_sample=False, num_beams=2)
        assert len(asked) == n_layers
        asked.clear()
    start_adaptation(model, "mu", ["new"])  # needs no ids
    logits(model, x)
    logits(model, x)
    assert len(asked) == n_layers


@pytest.mark.parametrize(
    "what",
    [
        "skills",
        "logits",
        "scale",
        "mix",
        "hook",
        "base",
        "adapter",
        "disabled",
        "merged",
        "trained",
        "double",
    ],
)
def test_an_evaluating_model_sees_what_changed_since_its_last_forward(what: str) -> None:
    x = tokens()
    model = routed()
    set_task_ids(model, 1)
    before = logits(model, x)
    layer = next(layer for _, layer in find_layers(model))
    base = layer.get_base_layer()
    undo: list[Any] = []
    if what == "skills":
        layer.mhr_A["default"] = nn.Parameter(layer.mhr_A["default"].detach() + 1)
    elif what == "logits":
        layer.routers["default"].logits.data = layer.routers["default"].logits.data.flip(-1)
    elif what == "scale":
        layer.scale_layer(3)
    elif what == "mix":
        layer.routers["default"].uniform_mix = 0.9
    elif what == "hook":
        base.register_forward_hook(lambda module, args, output: output + 1)
    elif what == "base":
        base.weight = nn.Parameter(base.weight.detach() + 1, requires_grad=False)
    elif what == "adapter":
        model.add_adapter("other", config(n_skills=2, init_weights=False))
        model.set_adapter("other")
        set_task_ids(model, 1)
    elif what == "disabled":
        undo.append(model.disable_adapter())
        undo[0].__enter__()
    elif what == "merged":
        model.merge_adapter()
        base.weight.data += 1
    elif what == "trained":
        model.train()
        model(input_ids=x, labels=x).loss.backward()
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1, fused=True).step()
        model.eval()
    else:
        model.double()
    after = logits(model, x)
    assert not torch.equal(after.float(), before)
    # With gradients, mixtures are made anew.
    torch.testing.assert_close(after, model(input_ids=x).logits.detach())


def test_training_right_after_evaluating_uses_no_kept_mixture() -> None:
    x, gradients = tokens(), []
    for evaluates in (False, True):
        model = routed()
        set_task_ids(model, [0, 1, 2])
        if evaluates:
            logits(model, x)
        model.train()
        model(input_ids=x, labels=x).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert any(gradient.any() for gradient in gradients[0])


def test_a_model_is_copied_after_a_training_forward() -> None:
    model, x = routed().train(), tokens()
    set_task_ids(model, [0, 1, 2])
    out = model(input_ids=x).logits
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(input_ids=x).logits, out)
    out.sum().backward()


def test_mixing_together_equals_mixing_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = tokens(5), [2, 0, 0, 1, 2]

    def run_once(noise: str, granularity: str) -> tuple[Tensor, dict[str, Tensor]]:
        model = routed(noise=noise, granularity=granularity, temperature=0.4, uniform_mix=0.1).train()
        set_task_ids(model, ids)
        torch.manual_seed(6)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    for noise, granularity in (
        ("none", "linear"),
        ("task", "block"),
        ("example", "network"),
        ("none", "network"),
    ):
        loss, gradients = run_once(noise, granularity)
        with monkeypatch.context() as patch:
            patch.setattr("thawline.tuners.mhr.prepare.MIXED_TOGETHER_BYTES", 0)
            same_loss, same_gradients = run_once(noise, granularity)
        torch.testing.assert_close(same_loss, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(same_gradients[name], gradient, msg=name)


@pytest.mark.parametrize("what", ["skills", "logits", "scale", "dtype", "adapter", "hook", "trainable base"])
def test_mixing_together_sees_what_was_replaced_since_the_last_forward(what: str) -> None:
    x = tokens()
    model = routed().train()
    set_task_ids(model, [0, 1, 2])
    model(input_ids=x, labels=x).loss.backward()
    layer = next(layer for _, layer in find_layers(model))
    base = layer.get_base_layer()
    if what == "skills":
        layer.mhr_A["default"] = nn.Parameter(layer.mhr_A["default"].detach() + 1)
    elif what == "logits":
        layer.routers["default"].logits = nn.Parameter(layer.routers["default"].logits.detach().flip(-1))
    elif what == "scale":
        layer.scale_layer(3)
    elif what == "dtype":
        model.get_base_model().model.layers[0].double()
        model.get_base_model().model.layers[0].float()
    elif what == "adapter":
        model.add_adapter("other", config(n_skills=2))
        model.set_adapter("other")
        set_task_ids(model, [0, 1, 2])
    elif what == "hook":
        base.register_forward_hook(lambda module, args, output: output + 1)
    else:
        base.weight.requires_grad_()
    out = model(input_ids=x).logits
    torch.testing.assert_close(out, logits(model.eval(), x), atol=1e-5, rtol=1e-4)
    out.sum().backward()
    assert what != "trainable base" or base.weight.grad.any()


def test_two_forwards_before_one_backward_keep_their_own_ids() -> None:
    model = routed().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, expected = [], []
    for ids, seed in (([2, 0, 1], 2), ([1, 1, 0], 4)):
        set_task_ids(model, ids)
        loss = model(input_ids=tokens(seed=seed), labels=tokens()).loss
        losses.append(loss)
        expected.append(torch.autograd.grad(loss, parameters, retain_graph=True))
    for got, one, other in zip(torch.autograd.grad(sum(losses), parameters), *expected, strict=True):
        torch.testing.assert_close(got, one + other)


def test_a_model_that_was_pickled_whole_goes_on_as_it_was(tmp_path: Path) -> None:
    model, x = route_by_batch(routed(granularity="block", task_type="CAUSAL_LM")).train(), tokens()
    model(input_ids=x, labels=x, task_ids=[0, 1, 2]).loss.backward()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert len({id(layer.routers["default"]) for _, layer in find_layers(again)}) == 2
    assert again.peft_config["default"].peft_type == "MHR"
    losses = [one(input_ids=x, labels=x, task_ids=[2, 0, 0]).loss for one in (model, again)]
    losses[1].backward()
    torch.testing.assert_close(*losses)
    set_task_ids(again, 1)
    with pytest.raises(RoutingError):  # the other's are its own
        model(input_ids=x)


def test_what_inference_mode_left_is_trained_on() -> None:
    for n_tasks, ids in ((3, [0, 1, 2]), (1, None)):
        model, x = routed(n_tasks=n_tasks), tokens()
        with torch.inference_mode():
            set_task_ids(model, ids)
            kept = model(input_ids=x).logits
        torch.testing.assert_close(model(input_ids=x).logits, kept.clone())
        for training in (False, True):
            model.train(training)(input_ids=x, labels=x).loss.backward()
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(x).requires_grad_()
        model.eval()(inputs_embeds=embedded).logits.sum().backward()
        assert embedded.grad.any()


def test_a_layer_called_by_itself_trains_too() -> None:
    model = routed().train()
    set_task_ids(model, [0, 1, 2])
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    block = model.get_base_model().model.layers[0].mlp
    for _ in range(2):
        block(torch.randn(3, 4, 24)).sum().backward()


# Precision.


def test_autocast_and_low_precision_bases_stay_close_to_fp32() -> None:
    x = tokens()
    reference = routed().train()
    set_task_ids(reference, [0, 1, 2])
    loss = reference(input_ids=x, labels=x).loss
    loss.backward()
    for kind in ("autocast", "bf16 base"):
        model = routed(tiny_llama().to(torch.bfloat16) if kind == "bf16 base" else None).train()
        set_task_ids(model, [0, 1, 2])
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            other = model(input_ids=x, labels=x).loss
        other.backward()
        assert other.item() == pytest.approx(loss.item(), rel=0.02)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            if p.requires_grad:
                assert p.dtype is torch.float32
                assert torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.98, name
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            model.eval()(input_ids=x)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapters_in_the_bases_dtype_have_their_routing_in_it_too(
    low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    base, x = lambda: tiny_llama().to(torch.bfloat16), tokens()
    model = get_peft_model(base(), config(), autocast_adapter_dtype=False)
    how = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low_cpu_mem_usage}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True, **how)
    for one in (model, loaded):
        for _, layer in find_layers(one):
            assert layer.mhr_A["default"].dtype is torch.bfloat16
            assert layer.routers["default"].logits.dtype is torch.bfloat16
            assert layer.routers["default"](torch.tensor([0])).dtype is torch.float32
        set_task_ids(one, [0, 1, 2])
    assert torch.equal(logits(loaded, x), logits(model, x))
    loaded.train()(input_ids=x, labels=x).loss.backward()
    assert all(
        p.grad.dtype is p.dtype and p.grad.isfinite().all() for p in loaded.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_turned_to_sixteen_bits_whole_still_weighs_its_skills_in_fp32(dtype: torch.dtype) -> None:
    model, x = routed(noise="example").to(dtype).train(), tokens()
    set_task_ids(model, [0, 1, 2])
    layer = next(layer for _, layer in find_layers(model))
    assert layer.routers["default"](torch.tensor([0])).dtype is torch.float32
    model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert logits(model.eval(), x).dtype is dtype


def test_one_task_in_bf16_is_its_merged_weights_within_rounding() -> None:
    x = tokens()
    model = routed(tiny_llama().to(torch.bfloat16))
    set_task_ids(model, 1)
    expected = logits(model, x)
    torch.testing.assert_close(logits(model.merge_and_unload(), x), expected, atol=0.06, rtol=0.06)


def test_dropout_acts_on_the_skills_alone_and_only_in_training() -> None:
    model, plain = routed(dropout=0.5), routed()
    x = tokens()
    for one in (model, plain):
        set_task_ids(one, [0, 1, 2])
    assert torch.equal(logits(model, x), logits(plain, x))
    assert not torch.allclose(logits(model.train(), x), logits(plain, x))
    linear, flat = one_linear(dropout=0.5)
    set_task_ids(linear, 0)
    mean = torch.stack([linear(flat[:1, :2]) for _ in range(400)]).float().mean(0)
    torch.testing.assert_close(mean, linear.eval()(flat[:1, :2]).float(), atol=0.5, rtol=0.2)


# Bases that are more than a frozen linear.


def test_conv1d_written_in_place_trains_as_one_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for written in (True, False):
        if not written:
            monkeypatch.setattr(MHRLinear, "frozen_base", lambda layer: None)
        model, x = routed(tiny_gpt2(), target_modules=["c_attn", "c_fc", "c_proj"]).train(), tokens(4)
        set_task_ids(model, [0, 2, 0, 1])
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", ["hook", "trainable", "replaced forward"])
def test_a_base_that_is_more_than_a_linear_is_called_as_it_is(how: str) -> None:
    model = routed(nn.Sequential(nn.Linear(8, 12)), target_modules=["0"])
    layer = next(layer for _, layer in find_layers(model))
    set_task_ids(model, [0, 1, 2])
    x = torch.randn(3, 5, 8)
    expected = model(x)
    base = layer.base_layer
    if how == "hook":
        base.register_forward_hook(lambda module, args, output: output + 1)
    elif how == "trainable":
        base.weight.requires_grad_()
    else:
        base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) + 1
    out = model(x)
    torch.testing.assert_close(out, expected if how == "trainable" else expected + 1)
    out.sum().backward()
    if how == "trainable":
        torch.testing.assert_close(base.weight.grad, x.sum((0, 1)).expand(12, 8))


class Int8Linear(nn.Module):
    """Layer as quantisation libraries make it: no nn.Linear, integer weight, dequantised in forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def dense(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(), self.bias)


def test_a_quantised_base_trains_as_the_dense_one_with_its_weights_and_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 12)
    quantised = Int8Linear(linear)
    linear.weight.data = quantised.dense()
    x, ids = torch.randn(3, 5, 8), [0, 2, 1]
    found = []
    for base in (quantised, linear):
        model = routed(nn.Sequential(copy.deepcopy(base)), target_modules=["0"]).train()
        set_task_ids(model, ids)
        out = model(x)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
        to_lora(model, tmp_path, task=2)
        lora = PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(linear)), tmp_path)
        torch.testing.assert_close(lora(x)[1], out[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_quantised_weight_is_merged_as_peft_knows_how_or_not_at_all() -> None:
    class Int8Backend(QuantizationBackend):
        supports_merge = True

        def get_base_weight(self, base_layer: Int8Linear) -> Tensor:
            return base_layer.dense()

        def set_base_weight(self, peft_layer, weight_data: Tensor) -> None:
            base = peft_layer.get_base_layer()
            base.scale = weight_data.abs().amax(1, keepdim=True) / 127
            base.weight.data = (weight_data / base.scale).round().to(torch.int8)

    model = routed(nn.Sequential(Int8Linear(nn.Linear(8, 12))), target_modules=["0"])
    layer = next(layer for _, layer in find_layers(model))
    x = torch.randn(3, 5, 8)
    set_task_ids(model, 1)
    expected, before = model(x), layer.base_layer.weight.clone()
    with pytest.raises(
        ConfigError, match="'0' is a Int8Linear, whose quantised weight cannot be merged into"
    ):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    with pytest.raises(ConfigError, match=r"Write the task as a LoRA with thawline.to_lora"):
        model.merge_adapter()
    layer.quantization_backend = Int8Backend()
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=0.1, rtol=0.1)
    assert not torch.allclose(layer.base_layer(x), nn.functional.linear(x, before * layer.base_layer.scale))
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, atol=0.1, rtol=0.1)


def test_four_bit_bases_train_and_merge() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(nn.Linear(64, 96).state_dict())
    model = routed(nn.Sequential(base.to("cpu")), target_modules=["0"], alpha=30).train()
    layer = next(layer for _, layer in find_layers(model))
    x = torch.randn(3, 5, 64, requires_grad=True)
    set_task_ids(model, 1)
    out = model(x)
    torch.testing.assert_close(out, base(x) + x @ layer.get_delta_weight("default").T)
    out.sum().backward()
    assert x.grad.any()
    assert layer.mhr_A["default"].grad.any()
    distance = (out - base(x)).abs().mean()
    model.merge_adapter()
    assert (model(x) - out).abs().mean() < distance / 4  # as near as four bits come


class Stored(Tensor):
    """A weight that only a linear can use, as libraries of quantised weights make them within nn.Linear."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (Tensor.matmul, Tensor.__matmul__, Tensor.t, torch.bmm):
            raise NotImplementedError(function)
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.as_subclass(Tensor), *bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_weight_of_a_class_of_its_own_is_left_to_its_linear() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 12)
    stored = copy.deepcopy(linear)
    stored.weight = nn.Parameter(stored.weight.detach().as_subclass(Stored), requires_grad=False)
    x, found = torch.randn(3, 5, 8), []
    for base in (linear, stored):
        model = routed(nn.Sequential(base), target_modules=["0"]).train()
        set_task_ids(model, [0, 2, 1])
        inputs = x.clone().requires_grad_()
        out = model(inputs)
        out.square().sum().backward()
        found.append([out, inputs.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)
    set_task_ids(model, 1)
    with pytest.raises(ConfigError, match="whose quantised weight cannot be merged into"):
        model.merge_adapter()


# Compilation.


def test_compiles_without_graph_breaks_and_again_only_for_another_layout() -> None:
    eager = routed(nn.Sequential(nn.Linear(8, 12)), target_modules=["0"], n_tasks=4)
    x = torch.randn(4, 5, 8)
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    model = torch.compile(eager, backend=count, fullgraph=True)
    parameters = [p for p in eager.parameters() if p.requires_grad]
    for ids in ([2, 0, 1, 3], [1, 0, 3, 2], [1, 1, 0, 0]):
        set_task_ids(eager, ids)
        expected = eager(x)
        gradients = torch.autograd.grad(expected.square().sum(), parameters)
        set_task_ids(model, ids)
        out = model(x)
        torch.testing.assert_close(out, expected)
        for got, wanted in zip(torch.autograd.grad(out.square().sum(), parameters), gradients, strict=True):
            torch.testing.assert_close(got, wanted)
    assert graphs == 2  # two layouts; other ids of a layout need no new graph


def test_a_compiled_llama_equals_the_eager_one() -> None:
    eager = routed(tiny_llama(num_hidden_layers=1), target_modules=["q_proj"]).train()
    set_task_ids(eager, [0, 1, 2])
    expected = eager(input_ids=tokens()).logits
    model = torch.compile(eager, backend="eager", fullgraph=True)
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected)


@pytest.mark.parametrize("read_before_compiling", [False, True])
def test_a_compiled_model_reads_ids_from_the_batch(read_before_compiling: bool) -> None:
    eager = routed(nn.Sequential(nn.Linear(8, 12)), target_modules=["0"])
    x = torch.randn(3, 5, 8)
    set_task_ids(eager, [2, 0, 1])
    expected = eager(x)
    set_task_ids(eager, None)
    if read_before_compiling:
        route_by_batch(eager)
    model = route_by_batch(torch.compile(eager, backend="eager", fullgraph=True))
    torch.testing.assert_close(model(x, task_ids=torch.tensor([2, 0, 1])), expected)
    with pytest.raises(RoutingError, match="No task ids"):
        model(x)
    with pytest.raises(RoutingError, match="not in the routing table"):
        model(x, task_ids=torch.tensor([2, 0, 7]))


# Trainers.


def test_a_plain_trainer_trains_it_from_the_column_of_the_batch(tmp_path: Path) -> None:
    model = routed(task_type="CAUSAL_LM", init_weights=True, routing_init=1e-3)
    route_by_batch(model)
    rows = [
        {"input_ids": row, "labels": row, "task_ids": torch.tensor(n % 3)} for n, row in enumerate(tokens(12))
    ]
    arguments = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=0.02, remove_unused_columns=False,
        gradient_checkpointing=True, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, seed=0,
    )  # fmt: skip
    optimiser = torch.optim.AdamW(parameter_groups(model, lr=0.02, routing_lr=0.1, weight_decay=0.1))
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimiser, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert any(p.any() for name, p in model.named_parameters() if "mhr_B" in name)
    skills, routing = trainer.optimizer.param_groups
    assert routing["initial_lr"] == 5 * skills["initial_lr"]
    assert (skills["weight_decay"], routing["weight_decay"]) == (0.1, 0.0)


def test_a_seq2seq_trainer_generates_for_the_tasks_of_its_batches(tmp_path: Path) -> None:
    model = route_by_batch(routed(tiny_t5(), task_type="SEQ_2_SEQ_LM"))
    rows = [
        {"input_ids": x, "labels": x[:4], "task_ids": torch.tensor(n % 3)} for n, x in enumerate(tokens(4))
    ]
    arguments = Seq2SeqTrainingArguments(
        tmp_path, predict_with_generate=True, per_device_eval_batch_size=2, remove_unused_columns=False,
        generation_max_length=5, generation_num_beams=2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    written = Seq2SeqTrainer(model, arguments).predict(rows).predictions
    for row, tokens_written in zip(rows, written, strict=True):
        set_task_ids(model, row["task_ids"])
        alone = model.generate(input_ids=row["input_ids"][None], max_length=5, num_beams=2)[0].tolist()
        assert tokens_written.tolist()[: len(alone)] == alone


def test_trl_sft_trainer_takes_the_config_as_peft_config(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"input_ids": tokens(6).tolist(), "task_ids": [0, 1, 2, 0, 1, 2]})

    def trainer(n_tasks: int) -> SFTTrainer:
        settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05, "report_to": []}
        return SFTTrainer(
            model=tiny_llama(),
            args=SFTConfig(str(tmp_path), **settings, use_cpu=True, bf16=False, save_strategy="no"),
            train_dataset=rows,
            processing_class=tokenizer(),
            peft_config=config(n_tasks=n_tasks, noise="example"),
        )

    trainer(1).train()
    of_three = trainer(3)
    with pytest.raises(RoutingError, match="No task ids"):
        of_three.train()
    route_by_batch(of_three.model)
    with pytest.raises(RoutingError, match=r"No task ids came with the batch.*a data collator that keeps it"):
        of_three.train()
    collate, of_three.args.remove_unused_columns = of_three.data_collator, False
    of_three.data_collator = lambda rows: collate(rows) | {"task_ids": [row["task_ids"] for row in rows]}
    of_three.train()
    of_three.save_model(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for model in (loaded, of_three.model.eval()):
        set_task_ids(model, [0, 1, 2])
    assert torch.equal(logits(loaded, tokens()), logits(of_three.model, tokens()))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(VOCAB)}
    made = Tokenizer(WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )
