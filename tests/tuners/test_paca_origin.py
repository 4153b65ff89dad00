"""Columns that start from the original checkpoint, and bases told apart by their columns."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

import thawline
from tests.support.paca import trainable
from tests.support.quantised import Hqq
from thawline import CheckpointError, ConfigError, PacaConfig
from thawline.tuners.paca.origin import difference, sketch
from thawline.tuners.paca.quantised import dequantise

IN, OUT = 128, 64
LOG = "thawline.tuners.paca.model"


@pytest.fixture
def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN)).bfloat16().float()


@pytest.fixture
def origin(plain, tmp_path) -> Path:
    """The plain network's checkpoint in 16 bits, in two files."""
    folder = tmp_path / "origin"
    folder.mkdir()
    files = {}
    for name, tensor in plain.bfloat16().state_dict().items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
        files[name] = f"{name}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    plain.float()
    return folder


def quantised(plain: nn.Sequential) -> nn.Sequential:
    plain = copy.deepcopy(plain)
    return nn.Sequential(Hqq(plain[0]), plain[1], Hqq(plain[2]))


def adapt(base: nn.Module, **fields) -> PeftModel:
    return get_peft_model(base, PacaConfig(r=8, target_modules=["0", "2"], **fields))


def layers(model: PeftModel) -> list[nn.Module]:
    return [model.base_model.model[0], model.base_model.model[2]]


def expected(plain: nn.Sequential, model: PeftModel) -> nn.Sequential:
    """The quantised network, dense, with the original values in the adapted columns."""
    dense = copy.deepcopy(plain)
    for linear, layer in zip((dense[0], dense[2]), layers(model), strict=True):
        index, weight = layer.thawline_paca_indices["default"], dequantise(layer.base_layer).clone()
        weight[:, index] = linear.weight.data[:, index]
        linear.weight.data = weight
    return dense


def test_columns_start_from_the_original_checkpoint(plain, origin):
    model, x = adapt(quantised(plain), columns_from=str(origin)), torch.randn(4, IN)
    dense = expected(plain, model)
    torch.testing.assert_close(model(x), dense(x))
    with model.disable_adapter():
        assert torch.equal(model(x), quantised(plain)(x))
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged[0].weight, dense[0].weight.bfloat16())
    thawline.to_lora(model, origin / "lora")


def test_lora_of_such_columns_is_equal_on_the_quantised_base(plain, origin, tmp_path):
    model, x = adapt(quantised(plain), columns_from=str(origin), init_weights=False), torch.randn(4, IN)
    thawline.to_lora(model, tmp_path / "lora")
    dense = nn.Sequential(*(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN)))
    for linear, layer in zip((dense[0], dense[2]), layers(model), strict=True):
        linear.weight.data = dequantise(layer.base_layer)
        linear.bias.data = layer.base_layer.bias.data
    lora = PeftModel.from_pretrained(dense, tmp_path / "lora")
    torch.testing.assert_close(lora(x), model(x), rtol=0, atol=1e-5)


def test_rows_of_a_batch_and_shared_columns_start_there_too(plain, origin):
    model, x = (
        adapt(quantised(plain), columns_from=str(origin), init_weights=False).eval(),
        torch.randn(4, IN),
    )
    alone = model(x)
    model.add_adapter("b", PacaConfig(r=8, target_modules=["0", "2"], columns_from=str(origin)))
    rows = model(x, adapter_names=["default", "default", "b", "__base__"])
    torch.testing.assert_close(rows[:2], alone[:2])
    torch.testing.assert_close(rows[3:], quantised(plain)(x)[3:])
    model.base_model.set_adapter(["default", "b"])  # the same columns: they start from the original once
    torch.testing.assert_close(model(x), alone)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload().float()(x), alone, rtol=0, atol=2e-2)


def test_a_saved_change_is_relative_to_the_original(plain, origin, tmp_path, caplog):
    model, x = adapt(quantised(plain), columns_from=str(origin), selection="weight_norm"), torch.randn(4, IN)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    model(x).square().mean().backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["columns_from"] == str(origin)
    assert {len(numbers) for numbers in saved["base_columns"].values()} == {5}
    with caplog.at_level(logging.WARNING, LOG):
        again = PeftModel.from_pretrained(quantised(plain), tmp_path / "adapter")
        assert torch.equal(again(x), model(x))
        on_original = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    assert not caplog.records  # the original base has these columns itself
    change = layers(model)[0]
    index = change.thawline_paca_indices["default"]
    expected = plain[0].weight[:, index] + change.thawline_paca_delta["default"]
    on_original(x)
    assert torch.equal(layers(on_original)[0].base_layer.weight[:, index], expected)


@pytest.mark.parametrize("base", ["quantised", "another"])
def test_loading_on_another_base_warns_with_the_difference(plain, tmp_path, caplog, base):
    adapt(copy.deepcopy(plain)).save_pretrained(tmp_path)
    other = quantised(plain)
    if base == "another":
        other = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))
    with caplog.at_level(logging.WARNING, LOG):
        model = PeftModel.from_pretrained(other, tmp_path)
    assert "was trained on other columns than this base has: they differ by about" in caplog.text
    said = float(caplog.text.split("about ")[1].split(" %")[0]) / 100
    pairs = [
        (linear.weight, layer.start_columns("default"), layer.thawline_paca_indices["default"])
        for linear, layer in zip((plain[0], plain[2]), layers(model), strict=True)
    ]
    apart = sum((w[:, index] - columns).square().sum() for w, columns, index in pairs)
    size = sum(w[:, index].square().sum() for w, _, index in pairs)
    assert 0.4 < said / (apart / size).sqrt().item() < 2.5, said
    caplog.clear()
    model.save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(model.unload(), tmp_path / "again")
    assert not caplog.records


def test_a_base_in_bfloat16_is_the_same_base(plain, tmp_path, caplog):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))
    adapt(copy.deepcopy(base)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base.bfloat16(), tmp_path)
    assert not caplog.records


def test_a_second_adapter_is_compared_with_the_original_weight(plain):
    model = adapt(copy.deepcopy(plain), init_weights=False)
    model(torch.randn(1, IN))
    columns = layers(model)[0].start_columns("default")
    assert torch.equal(columns, plain[0].weight[:, layers(model)[0].thawline_paca_indices["default"]])


def test_sketches_estimate_differences():
    torch.manual_seed(0)
    first = {f"layer.{i}": torch.randn(40, 8) for i in range(64)}
    second = {name: columns + 0.1 * torch.randn(40, 8) for name, columns in first.items()}
    sketches = [{name: sketch(t, name) for name, t in bases.items()} for bases in (first, second)]
    assert difference(*sketches) == pytest.approx(0.1, rel=0.2)
    assert difference(sketches[0], sketches[0]) == 0


@pytest.mark.parametrize("fault", ["plain base", "no folder", "no weight", "shape", "damaged", "quantised"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_changed(plain, origin, fault):
    base, where = quantised(plain), origin
    error, match = (
        CheckpointError,
        {
            "plain base": "no adapted layer is quantised: the base has its original columns",
            "no folder": "has neither model.safetensors nor",
            "no weight": "has 0 weights for '2'",
            "shape": r"'0.weight' in .* is F32 \[3, 4\]; '0' needs floats \[64, 128\]",
            "damaged": "0.weight.safetensors' cannot be read",
            "quantised": r"is I8 \[64, 128\]",
        }[fault],
    )
    if fault == "plain base":
        base, error = plain, ConfigError
    elif fault == "no folder":
        where = origin / "nowhere"
    elif fault == "no weight":
        (origin / "model.safetensors.index.json").write_text(
            '{"weight_map": {"0.weight": "0.weight.safetensors"}}'
        )
    elif fault == "damaged":
        (origin / "0.weight.safetensors").write_bytes(b"no safetensors")
    else:
        wrong = torch.zeros(3, 4) if fault == "shape" else torch.zeros(OUT, IN, dtype=torch.int8)
        save_file({"0.weight": wrong}, origin / "0.weight.safetensors")
    with pytest.raises(error, match=match):
        adapt(base, columns_from=str(where))
    assert type(base[0]).__name__ in ("Hqq", "Linear")


def test_columns_of_a_weight_that_cannot_be_read_are_refused(origin):
    class ForwardOnly(nn.Module):
        in_features, out_features = IN, OUT

    with pytest.raises(ConfigError, match="columns of '0' cannot be read.*has no weight"):
        adapt(nn.Sequential(ForwardOnly(), nn.Tanh(), Hqq(nn.Linear(OUT, IN))), columns_from=str(origin))
