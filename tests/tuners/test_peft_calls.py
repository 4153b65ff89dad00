"""Calls of PEFT that both tuners honour or refuse, as its own common tests make them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.support.models import tiny_llama
from thawline import to_lora
from thawline.errors import CheckpointError, ConfigError
from thawline.tuners import MHRConfig, PacaConfig

IDS = torch.arange(12).reshape(2, 6) + 3
CONFIGS = {"paca": PacaConfig, "mhr": MHRConfig}


@pytest.fixture(params=CONFIGS)
def make(request) -> Callable[..., PacaConfig | MHRConfig]:
    def build(**fields):
        fields = {
            "r": 2,
            "target_modules": ["q_proj"],
            "task_type": "CAUSAL_LM",
            "init_weights": False,
        } | fields
        return CONFIGS[request.param](**fields)

    return build


def logits(model: torch.nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


@pytest.mark.parametrize("make", ["mhr"], indirect=True)
@pytest.mark.parametrize("names", [["a", "b"], ["b", "b"], ["a", "__base__"], ["__base__", "__base__"]])
def test_adapters_by_row_are_refused_unless_all_rows_use_the_active_one(make, names) -> None:
    model = get_peft_model(tiny_llama(), make(), "a").eval()
    model.add_adapter("b", make())
    assert torch.equal(logits(model, adapter_names=["a", "a"]), logits(model))
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ConfigError, match="one set of adapters for all rows"):
        model(input_ids=IDS, adapter_names=["a", "b"])
    model.set_adapter("a")
    with pytest.raises(ConfigError, match=r"adapter_names=.* set_adapter\(name\).*disable_adapter"):
        model(input_ids=IDS, adapter_names=names)
    with pytest.raises(ConfigError, match="one set of adapters for all rows"):
        model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=1)
    assert model.generate(input_ids=IDS, adapter_names=["a", "a"], max_new_tokens=1).shape == (2, 7)


@pytest.mark.parametrize("names", [[None, "a"], ["a", None], "ab", ["c", "a"]])
def test_names_that_are_no_adapters_are_refused(make, names) -> None:
    model = get_peft_model(tiny_llama(), make(), "a").eval()
    with pytest.raises(ConfigError, match="adapter_names"):
        model(input_ids=IDS, adapter_names=names)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 64}, r"q_proj\..*' is \(.*32.*\), expected \(.*64.*\)"),
        ({"num_hidden_layers": 1}, r"has weights of 'model.layers.1.self_attn.q_proj', which this model"),
    ],
    ids=lambda other: next(iter(other), None) if isinstance(other, dict) else None,
)
def test_an_adapter_of_another_base_is_refused_in_one_line(make, other, message, tmp_path) -> None:
    get_peft_model(tiny_llama(hidden_size=32), make()).save_pretrained(str(tmp_path))
    for load in (
        lambda base: PeftModel.from_pretrained(base, str(tmp_path)),
        lambda base: get_peft_model(base, make()).load_adapter(str(tmp_path), "second"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            load(tiny_llama(**{"hidden_size": 32} | other))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"exclude_modules": [r"q_proj"]}, {"modules_to_save": ["q_proj"]}])
def test_targets_that_another_field_takes_away_name_it(make, fields) -> None:
    with pytest.raises(ConfigError, match=f"that `{next(iter(fields))}` leaves"):
        get_peft_model(tiny_llama(), make(**fields))


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_are_merged_saved_and_exported(make, tied, tmp_path) -> None:
    def base():
        return tiny_llama(tie_word_embeddings=tied)

    model = get_peft_model(base(), make(trainable_token_indices=[4, 5])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_()
    expected = logits(model)
    model.save_pretrained(tmp_path / "own")
    to_lora(model, tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path / "own")), expected)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path / "lora")), expected)
    merged = model.merge_and_unload()
    assert not any("token_adapter" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), expected)


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_are_in_fp32_or_where_asked_in_the_bases_dtype(make, autocast, tmp_path) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model = get_peft_model(tiny_llama().bfloat16(), make(), autocast_adapter_dtype=autocast)
    model.add_adapter("b", make(), autocast_adapter_dtype=autocast)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama().bfloat16(), tmp_path, autocast_adapter_dtype=autocast, is_trainable=True
    )
    for one in (model, loaded):
        assert {p.dtype for name, p in one.named_parameters() if one.prefix in name} == {dtype}
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    loaded.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.dtype is dtype for p in loaded.parameters() if p.requires_grad)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0.02, atol=0.02)


def test_layers_tell_their_sizes_as_pefts_do(make) -> None:
    model = get_peft_model(tiny_llama(), make(target_modules=["k_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    assert (layer.in_features, layer.out_features) == (24, 12)
    conv = get_peft_model(nn.Sequential(nn.Conv2d(6, 9, 3, groups=3)), PacaConfig(r=1, target_modules=["0"]))
    assert (conv.base_model.model[0].in_features, conv.base_model.model[0].out_features) == (6, 9)


def test_merging_one_adapter_leaves_nothing_of_another_in_layers_it_does_not_adapt(make) -> None:
    model = get_peft_model(tiny_llama(), make(), "a").eval()
    model.add_adapter("b", make(target_modules=["v_proj"]))
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("a")
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["b"])), expected)


@pytest.mark.parametrize("bias", ["all", "own"])
def test_biases_train_are_saved_and_merged(make, bias, tmp_path) -> None:
    def base():
        return tiny_llama(attention_bias=True)

    config = make(bias=bias if bias == "all" else {"MHR": "mhr_only"}.get(make().peft_type, "paca_only"))
    model = get_peft_model(base(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    moved = {name for name, p in model.named_parameters() if name.endswith("bias") and p.grad is not None}
    assert {name.split(".")[-3 if "base_layer" in name else -2] for name in moved} == (
        {"q_proj"} if bias == "own" else {"q_proj", "k_proj", "v_proj", "o_proj"}
    )
    optimizer.step()
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path)), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def test_fsdp1_is_named_as_what_it_is(one_process) -> None:
    model = wrapped(get_peft_model(tiny_llama(), PacaConfig(r=2, target_modules=["q_proj"])))
    with pytest.raises(ConfigError, match=r"flattened or partitioned \(FSDP1 or ZeRO-3\).*mode='additive'"):
        model(input_ids=IDS)


def test_columns_beside_the_weight_train_under_fsdp1_as_accelerate_announces_it(
    one_process, monkeypatch, caplog
) -> None:
    def losses(model: nn.Module) -> list[float]:
        optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
        for _ in range(3):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    config = PacaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)
    expected = losses(get_peft_model(tiny_llama(), config))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model = wrapped(get_peft_model(tiny_llama(), config))
    assert "FSDP1 will partition its weight" in caplog.text
    assert losses(model) == pytest.approx(expected, rel=1e-5)  # another order of sums
    plain = get_peft_model(tiny_llama(), config)
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    torch.testing.assert_close(logits(plain), logits(model))
    caplog.clear()
    with monkeypatch.context() as patch:  # given in Python, which sets no variable
        plugin = SimpleNamespace(fsdp_version=2)
        patch.setattr(AcceleratorState, "_shared_state", {"fsdp_plugin": plugin})
        get_peft_model(tiny_llama(), config)
    monkeypatch.setenv("FSDP_VERSION", "2")
    get_peft_model(tiny_llama(), config)
    assert not caplog.text
