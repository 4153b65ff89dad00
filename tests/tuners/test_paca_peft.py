"""PaCA through PEFT's doors: wrapping, switching, merging, unloading, several adapters."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.support.models import VOCAB, tiny_llama
from tests.support.paca import IN, B, Net, bits, loss_of, same, tokens, train, trainable, weights, wrap
from thawline import ConfigError, PacaConfig
from thawline.tuners.paca import PacaLayer, PacaLinear


@pytest.fixture
def x():
    return torch.randn(B, IN)


@pytest.fixture
def base():
    return Net()


def adapted_modules(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, PacaLayer)}


# Which modules.


def test_all_linear_takes_every_linear_but_the_head():
    names = adapted_modules(wrap(tiny_llama()))
    assert len(names) == 14
    assert "lm_head" not in names


def test_no_targets_means_pefts_choice_for_lora():
    lora = get_peft_model(tiny_llama(), LoraConfig())
    expected = {
        n.removesuffix(".base_layer")
        for n, m in lora.base_model.model.named_modules()
        if n.endswith("base_layer")
    }
    assert adapted_modules(wrap(tiny_llama(), target_modules=None)) == expected


def test_no_targets_for_an_unknown_architecture_says_what_to_do(base):
    with pytest.raises(ConfigError, match=r"model type 'custom'.*all-linear"):
        wrap(base, target_modules=None)


def test_targets_as_pattern_exclusion_and_block_numbers():
    assert adapted_modules(wrap(tiny_llama(), target_modules=r".*\.1\.mlp\.up_proj")) == {
        "model.layers.1.mlp.up_proj"
    }
    names = adapted_modules(wrap(tiny_llama(), exclude_modules=["q_proj", "v_proj"]))
    assert not any(n.endswith(("q_proj", "v_proj")) for n in names)
    names = adapted_modules(
        wrap(tiny_llama(), target_modules=["o_proj"], layers_to_transform=[1], layers_pattern="layers")
    )
    assert names == {"model.layers.1.self_attn.o_proj"}


def test_rank_and_alpha_patterns():
    model = wrap(
        tiny_llama(),
        rank_pattern={"mlp.down_proj": 6, "layers.0.self_attn.q_proj": 2},
        alpha_pattern={"o_proj": 8},
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PacaLayer)}
    for name, layer in layers.items():
        r = 6 if name.endswith("down_proj") else 2 if name.endswith("layers.0.self_attn.q_proj") else 4
        assert layer.r["default"] == r
        assert layer.thawline_paca_delta["default"].shape == (layer.base_layer.out_features, r)
        assert layer.scaling["default"] == (2.0 if name.endswith("o_proj") else 1.0)


def test_modules_to_save_train_and_are_saved_whole(base, tmp_path):
    before = weights(base)
    model = wrap(base, modules_to_save=["head"])
    train(model)
    model.save_pretrained(tmp_path)
    assert not torch.equal(
        model.base_model.model.head.modules_to_save["default"].weight, before["head.weight"]
    )
    with model.disable_adapter():
        x = torch.randn(B, IN)
        fresh = Net()
        fresh.load_state_dict(before)
        assert torch.equal(model(x), fresh(x))


def test_an_encoder_decoder_with_shared_embeddings_can_be_adapted():
    config = T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=VOCAB, decoder_start_token_id=0
    )
    model = get_peft_model(T5ForConditionalGeneration(config), PacaConfig(r=4))
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trainable(model))


# The cycle of one adapter's life.


def test_disabled_the_output_and_every_weight_are_the_bases_bit_for_bit(base, x):
    before, expected = weights(base), base(x)
    model = wrap(base)
    train(model)
    adapted = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
        inside = {n: p for n, p in model.named_parameters() if "paca" not in n}
        assert all(
            torch.equal(bits(p), bits(before[n.removeprefix("base_model.model.").replace("base_layer.", "")]))
            for n, p in inside.items()
        )
    assert torch.equal(model(x), adapted)


def test_merge_is_a_change_of_flag(base, x):
    model = wrap(base)
    train(model)
    adapted, inside = model(x), weights(model.base_model.model.first.base_layer)
    for _ in range(2):
        model.merge_adapter()
        assert model.base_model.model.first.merged
        assert torch.equal(model(x), adapted)
        assert torch.equal(model.base_model.model.first.base_layer.weight, adapted_weight(model))
        model.unmerge_adapter()
        assert torch.equal(model(x), adapted)
    model(x).sum().backward()
    assert all(p.grad is not None for p in trainable(model))
    assert inside.keys() == {"weight", "bias"}


def adapted_weight(model: nn.Module) -> torch.Tensor:
    layer = model.base_model.model.first
    return layer._state.resident.original(layer.base_layer.weight) + layer.get_delta_weight("default")


def test_merged_columns_show_in_the_state_dict_where_rollouts_read_them(base, x):
    model = wrap(base)
    train(model)
    key = "base_model.model.first.base_layer.weight"
    plain = model.state_dict()[key].clone()
    model.merge_adapter()
    merged = model.state_dict()[key].clone()
    model.unmerge_adapter()
    assert not torch.equal(plain, merged)
    assert torch.equal(model.state_dict()[key], plain)


def test_a_merged_model_stays_merged_when_it_is_copied_or_pickled(base, x):
    model = wrap(base, init_weights=False)
    model.merge_adapter()
    merged = weights(model)
    assert same(weights(copy.deepcopy(model)), merged)
    assert same(weights(model), merged)
    assert same(weights(pickle.loads(pickle.dumps(model))), merged)
    assert same(weights(model), merged)
    pickle.dumps(model)
    unloaded = weights(model.merge_and_unload())
    for name in ("first", "second"):
        expected = merged[f"base_model.model.{name}.base_layer.weight"]
        assert torch.equal(unloaded[f"{name}.weight"], expected)


def test_merge_and_unload_gives_the_adapted_output_without_layers_of_ours(base, x):
    model = wrap(base)
    train(model)
    adapted = model(x)
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), adapted)
    assert not adapted_modules(merged)
    assert {type(m) for m in merged.children()} == {nn.Linear}


def test_merging_while_disabled_merges_the_adapters_all_the_same(base, x):
    model = wrap(base, init_weights=False)
    adapted = model(x)
    with model.disable_adapter():
        merged = model.merge_and_unload()
    assert torch.equal(merged(x), adapted)


def test_unload_gives_back_every_bit_and_the_base_can_be_wrapped_again(base, x):
    before = weights(base)
    model = wrap(base)
    train(model)
    plain = model.unload()
    assert same(weights(plain), before)
    again = wrap(plain)
    train(again)
    assert same(weights(again.unload()), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_nan_and_leaves_the_model_as_it_was(base, x, value):
    model = wrap(base, init_weights=False).eval()
    expected = model(x)
    delta = model.base_model.model.first.thawline_paca_delta["default"]
    with torch.no_grad():
        good = delta[0, 0].item()
        delta[0, 0] = value
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default .*'first'"
    ):
        model.merge_adapter(safe_merge=True)
    assert not model.base_model.model.first.merged
    with torch.no_grad():
        delta[0, 0] = good
    assert torch.equal(model(x), expected)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(x), expected)


def test_disabling_a_merged_model_gives_the_base(base, x):
    expected = base(x)
    model = wrap(base, init_weights=False)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)


def test_state_dict_of_the_base_never_holds_a_changed_column(base, tmp_path):
    llama = tiny_llama()
    before = weights(llama)
    model = wrap(llama)
    train(model)
    inside = model.base_model.model.state_dict()
    assert same({k.replace("base_layer.", ""): v for k, v in inside.items() if "paca" not in k}, before)
    train(model)
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.state_dict()
    model.unload().save_pretrained(tmp_path)
    assert same(weights(type(llama).from_pretrained(tmp_path)), before)


def test_a_deep_copy_has_its_own_columns_and_the_original_keeps_its(base, x):
    before = weights(base)
    model = wrap(base)
    train(model)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    train(twin)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    assert same(weights(model.unload()), before)
    assert same(weights(twin.unload()), before)


def test_a_pickled_model_is_the_same_and_holds_the_original_weights(base, x):
    before = weights(base)
    model = wrap(base)
    train(model)
    expected = model(x)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    train(twin)
    assert same(weights(twin.unload()), before)


def test_moving_the_model_keeps_its_output_and_its_original(base, x):
    before = weights(base)
    model = wrap(base)
    train(model)
    expected = model(x)
    model.double()
    assert torch.allclose(model(x.double()), expected.double(), atol=1e-5)
    model.float().share_memory()
    assert torch.equal(model(x), expected)
    assert same(weights(model.unload()), before)


# Several adapters.


def two_adapters(base: nn.Module):
    """Adapters of other columns, some in common, both away from zero."""
    torch.manual_seed(7)
    model = wrap(base, r=6, init_weights=False, seed=1)
    model.add_adapter(
        "second", PacaConfig(r=5, target_modules=["first", "second"], init_weights=False, seed=2, alpha=10)
    )
    first = model.base_model.model.first.thawline_paca_indices
    assert set(first["default"].tolist()) & set(first["second"].tolist())
    return model


def by_hand(model: nn.Module, base: Net, names: list[str]) -> Net:
    """The base with the changes of `names` added."""
    result = Net()
    result.load_state_dict(base)
    for part in ("first", "second"):
        layer = getattr(model.base_model.model, part)
        for name in names:
            getattr(result, part).weight.data += layer.get_delta_weight(name)
    return result


def test_overlapping_adapters_switch_add_up_and_leave_in_any_order(base, x):
    before = weights(base)
    model = two_adapters(base)
    for active in (
        ["default"],
        ["second"],
        ["default", "second"],
        ["second", "default"],
        ["second"],
        ["default"],
    ):
        model.base_model.set_adapter(active)
        torch.testing.assert_close(model(x), by_hand(model, before, active)(x))
        with model.disable_adapter():
            assert torch.equal(model(x), by_hand(model, before, [])(x))
        with torch.no_grad():
            torch.testing.assert_close(model(x), by_hand(model, before, active)(x))
    assert same(weights(model.unload()), before)


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]])
@pytest.mark.parametrize("gone", ["default", "second"])
def test_deleting_an_adapter_takes_only_its_columns_out(base, x, active, gone):
    before = weights(base)
    model = two_adapters(base)
    model.base_model.set_adapter(active)
    model(x)
    rest = "second" if gone == "default" else "default"
    expected = by_hand(model, before, [rest])(x)
    with pytest.warns(UserWarning, match="deleted") if active == [gone] else nullcontext():
        model.delete_adapter(gone)
    torch.testing.assert_close(model(x), expected)
    assert list(model.peft_config) == [rest]
    assert same(weights(model.unload()), before)


def test_two_active_adapters_both_get_the_dense_gradient(base, x):
    before = weights(base)
    model = two_adapters(base)
    model.base_model.set_adapter(["default", "second"])
    model(x).square().sum().backward()
    reference = by_hand(model, before, ["default", "second"])
    reference(x).square().sum().backward()
    for part in ("first", "second"):
        layer, dense = getattr(model.base_model.model, part), getattr(reference, part).weight.grad
        for name in ("default", "second"):
            expected = layer.scaling[name] * dense[:, layer.thawline_paca_indices[name]]
            torch.testing.assert_close(layer.thawline_paca_delta[name].grad, expected)


def test_the_inactive_adapter_does_not_move(base):
    model = two_adapters(base)
    still = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("second")}
    train(model)
    assert all(torch.equal(p, still[n]) for n, p in model.named_parameters() if n in still)


def test_merging_one_of_two_adapters(base, x):
    before = weights(base)
    model = two_adapters(base)
    model.merge_adapter(["second"])
    torch.testing.assert_close(model(x), by_hand(model, before, ["second"])(x))
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), by_hand(model, before, ["default", "second"])(x))
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), by_hand(model, before, ["default"])(x))


# Into a bare model.


def test_injected_without_a_peft_model(base, x):
    expected = base(x)
    model = inject_adapter_in_model(PacaConfig(r=3, target_modules=["first"]), base)
    assert torch.equal(model(x), expected)
    assert isinstance(model.first, PacaLinear)
    train(model)
    assert not torch.equal(model(x), expected)


# What cannot be adapted.


def test_an_unsupported_layer_is_named_with_the_supported_ones():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(
        ConfigError, match=r"'embed' is a Embedding; PaCA adapts Linear, Conv1D, Conv2d.*exclude_modules"
    ):
        get_peft_model(model, PacaConfig(r=1, target_modules=["embed", "head"]))


def test_more_columns_than_inputs_is_refused_with_what_would_work(base):
    with pytest.raises(ConfigError, match=r"r=11 .* 10 input features of 'second'.*r <= 10.*rank_pattern"):
        wrap(base, r=11)


def test_tied_weights_are_refused_with_their_partner():
    llama = tiny_llama()
    llama.lm_head.weight = llama.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=r"'lm_head' cannot.*tied to \['model.embed_tokens'\].*exclude"):
        wrap(llama, target_modules=["lm_head"], mode="resident")


def test_a_module_under_two_names_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    with pytest.raises(ConfigError, match=r"'a' cannot be .*tied to \['b'\]"):
        get_peft_model(model, PacaConfig(r=2, target_modules=["a"], mode="resident"))


def test_attention_that_never_calls_its_output_layer_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(ConfigError, match=r"'0.out_proj' belongs to nn.MultiheadAttention"):
        get_peft_model(model, PacaConfig(r=2, target_modules=["out_proj"]))


def test_a_weight_that_another_model_has_adapted_is_refused(base):
    first = wrap(base)
    other = Net()
    other.first.weight = first.base_model.model.first.base_layer.weight
    with pytest.raises(ConfigError, match=r"'first' already holds the columns of another PaCA layer"):
        wrap(other)
    first.unload()
    wrap(other)


def test_quantised_weights_are_refused_with_their_dtype():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'0' is Parameter of torch.uint8: quantised"):
        get_peft_model(model, PacaConfig(r=2, target_modules=["0"]))


def test_a_layer_with_lora_on_it_is_refused(base):
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["first"])).base_model.model
    with pytest.raises(ConfigError, match=r"'first' already has an adapter of another method"):
        get_peft_model(model, PacaConfig(r=2, target_modules=["first"]))


def test_offloaded_weights_are_refused(base, x):
    model = wrap(base)
    layer = model.base_model.model.first
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to("meta"), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'first' is offloaded"):
        model(x)


def test_loss_falls_on_a_small_llama():
    model = wrap(tiny_llama())
    before = loss_of(model).item()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < before - 0.1
