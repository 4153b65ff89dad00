"""Column sync: another copy of the base gets the trained columns and equals the merged model bit for bit."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import thawline
from tests.support.models import VOCAB, tiny_llama
from tests.support.paca import Net, same, train, weights, wrap
from thawline import ConfigError, PacaConfig

N_UPDATES = 1000


def merged(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a merged copy."""
    return weights(copy.deepcopy(model).merge_and_unload())


def sent(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pack as another process receives it."""
    return load(save(packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_receiver_equals_the_merged_model(dtype):
    model, receiver = wrap(tiny_llama().to(dtype)), tiny_llama().to(dtype)
    train(model)
    thawline.apply_columns(receiver, sent(thawline.pack_columns(model)))
    assert same(weights(receiver), merged(model))


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3, groups=2), nn.Conv2d(16, 32, 3, groups=16), nn.Flatten()
    )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=16))


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (conv_net, {"target_modules": ["0", "1", "2"], "r": 3}),
        (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    ],
)
def test_weights_that_are_stored_otherwise(make, fields):
    model, receiver = wrap(make(), init_weights=False, **fields), make()
    thawline.apply_columns(receiver, thawline.pack_columns(model))
    assert same(weights(receiver), merged(model))


def test_a_state_dict_and_another_dtype_receive_too():
    model = wrap(tiny_llama())
    train(model)
    state = {name: tensor.bfloat16() for name, tensor in tiny_llama().state_dict().items()}
    thawline.apply_columns(state, thawline.pack_columns(model))
    assert same(state, {name: tensor.bfloat16() for name, tensor in merged(model).items()})


def test_since_sends_what_changed_and_what_was_given_back():
    receiver = Net()
    model = wrap(copy.deepcopy(receiver), init_weights=False)
    model.add_adapter(
        "other", PacaConfig(r=3, target_modules=["first", "second"], init_weights=False, seed=1)
    )
    base, pack = weights(receiver), thawline.pack_columns(model)
    thawline.apply_columns(receiver, pack)
    assert same(weights(receiver), merged(model))
    assert all(key.endswith(".kept") for key in thawline.pack_columns(model, since=pack)), "nothing changed"

    with torch.no_grad():
        model.base_model.model.first.thawline_paca_delta["default"][:, 1] += 1
    pack = thawline.pack_columns(model, since=pack)
    assert len(pack["first.weight.columns"]) == 1
    assert "second.weight.columns" not in pack
    thawline.apply_columns(receiver, sent(pack))
    assert same(weights(receiver), merged(model))

    model.set_adapter("other")  # gives back columns that only the first pack held
    pack = thawline.pack_columns(model, since=sent(pack))
    thawline.apply_columns(receiver, pack)
    assert same(weights(receiver), merged(model))
    with model.disable_adapter():
        thawline.apply_columns(receiver, thawline.pack_columns(model, since=pack))
        assert same(weights(receiver), base)


class Fused(nn.Module):
    """An attention and an MLP as inference engines store them."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        self.qkv_proj = nn.Linear(1, 1, bias=False)
        self.qkv_proj.weight = nn.Parameter(torch.cat(parts).detach())
        self.gate_up_proj = nn.Linear(1, 1, bias=False)
        self.gate_up_proj.weight = nn.Parameter(
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        )


@pytest.mark.parametrize(
    "targets", [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["k_proj", "up_proj"]]
)
def test_fused_layers_are_found_by_name(targets):
    base = tiny_llama()
    block = base.model.layers[0]
    fused = Fused(block.self_attn, block.mlp)
    assert block.self_attn.q_proj.out_features > block.self_attn.k_proj.out_features
    model = wrap(base, target_modules=targets, layers_to_transform=[0], init_weights=False)
    packed = thawline.pack_columns(model)
    thawline.apply_columns(
        fused, {key.split("layers.0.")[1].split(".", 1)[1]: t for key, t in packed.items()}
    )
    plain = model.merge_and_unload().model.layers[0]
    assert same(weights(fused), weights(Fused(plain.self_attn, plain.mlp)))


def test_what_does_not_fit_is_refused_and_nothing_written():
    model = wrap(tiny_llama(), init_weights=False)
    packed = thawline.pack_columns(model)
    with pytest.raises(ConfigError, match="no PaCA layers"):
        thawline.pack_columns(tiny_llama())
    with pytest.raises(ConfigError, match="no PaCA layers"):
        thawline.pack_columns(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ConfigError, match="has PaCA layers itself"):
        thawline.apply_columns(model, packed)
    with pytest.raises(ConfigError, match=r"modules_to_save=\['lm_head'\].*more than columns"):
        thawline.pack_columns(wrap(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match="`since` has 'other.weight'"):
        thawline.pack_columns(model, since={"other.weight.kept": torch.tensor([1])})
    receiver = tiny_llama()
    before = weights(receiver)
    name = list(packed)[-1].removesuffix(".values")
    for odd, message in (
        (
            {f"{name}x.columns": packed[f"{name}.columns"], f"{name}x.values": packed[f"{name}.values"]},
            "no weight",
        ),
        ({f"{name}.values": packed[f"{name}.values"][1:]}, "another model"),
        ({f"{name}.columns": packed[f"{name}.columns"] + 10_000}, "another model"),
        ({"lm_head.weight": torch.zeros(2)}, "not from pack_columns"),
    ):
        with pytest.raises(ConfigError, match=message):
            thawline.apply_columns(receiver, packed | odd)
    quantised = {name: tensor.to(torch.int8) for name, tensor in receiver.state_dict().items()}
    with pytest.raises(ConfigError, match="int8.*shares scales"):
        thawline.apply_columns(quantised, packed)
    assert same(weights(receiver), before)


def digest(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(save({name: tensor.contiguous() for name, tensor in state.items()})).hexdigest()


def receive(pipe: Any) -> None:
    torch.set_num_threads(1)
    receiver = Net().bfloat16()
    receiver.load_state_dict(load(pipe.recv_bytes()))
    digests = []
    for _ in range(N_UPDATES):
        thawline.apply_columns(receiver, load(pipe.recv_bytes()))
        digests.append(digest(receiver.state_dict()))
    pipe.send(digests)


def test_another_process_stays_equal_over_a_thousand_updates():
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=receive, args=(there,), daemon=True)
    process.start()
    base = Net().bfloat16()
    here.send_bytes(save(base.state_dict()))
    model = wrap(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    pack: dict[str, Tensor] = {}
    expected = []
    for step in range(N_UPDATES):
        model(
            torch.randn(2, 12, generator=torch.Generator().manual_seed(step)).bfloat16()
        ).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pack = thawline.pack_columns(model, since=pack)
        here.send_bytes(save(pack))
        model.merge_adapter()
        state = {
            name.replace("base_layer.", ""): t for name, t in model.base_model.model.state_dict().items()
        }
        expected.append(digest({name: t for name, t in state.items() if "thawline" not in name}))
        model.unmerge_adapter()
    assert here.recv() == expected
    assert len(set(expected)) == N_UPDATES
    process.join(timeout=60)


def test_bytes_of_an_update_at_the_proportions_of_the_8b():
    """r = 16 in every linear layer of Llama-3-8B: below one per cent of the model."""
    hidden, mlp, kv, n_layers, vocab = 4096, 14336, 1024, 32, 128256
    outputs = [hidden, kv, kv, hidden, mlp, mlp, hidden]
    inputs = [hidden] * 6 + [mlp]
    sizes = sum(o * i for o, i in zip(outputs, inputs, strict=True)) * n_layers + 2 * vocab * hidden
    update = n_layers * sum(16 * o * 2 + 16 * 8 for o in outputs)
    assert update < 0.01 * 2 * sizes
    scale = 64  # the same layers at a sixty-fourth of the width, measured
    layer = nn.ModuleDict(
        {
            str(n): nn.Linear(i // scale, o // scale, False)
            for n, (i, o) in enumerate(zip(inputs, outputs, strict=True))
        }
    )
    packed = thawline.pack_columns(wrap(layer.bfloat16(), r=16, target_modules=[str(n) for n in range(7)]))
    assert sum(t.nbytes for t in packed.values()) == sum(16 * (o // scale) * 2 + 16 * 8 for o in outputs)
