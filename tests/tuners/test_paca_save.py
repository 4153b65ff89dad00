"""Saving and loading: the same columns and changes come back, by every door and in another process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from tests.support.models import tiny_llama, transformers_loads_adapters
from tests.support.paca import IN, OUT, B, Net, bits, same, tokens, train, wrap
from thawline import CheckpointError, PacaConfig


def adapter(model, name: str = "default") -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A saved adapter whose columns no default seed draws, and what the model says with it."""
    model = wrap(tiny_llama(), seed=11, rank_pattern={"down_proj": 7}, alpha=6)
    train(model)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    # The reader must take the columns from the file, not draw them again.
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"seed": 0}))
    return folder, logits(model), adapter(model)


def test_a_file_holds_changes_and_columns_and_nothing_of_the_base(trained):
    folder, _, expected = trained
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == 2 * 14
    assert same(saved, expected)
    for key, tensor in saved.items():
        assert key.endswith(("thawline_paca_delta", "thawline_paca_indices"))
        if key.endswith("indices"):
            assert tensor.dtype == torch.int64
            assert torch.equal(tensor, tensor.unique())


@pytest.mark.parametrize(
    "how", [{}, {"low_cpu_mem_usage": True}, {"adapter_name": "renamed"}, {"is_trainable": True}], ids=str
)
def test_loaded_by_peft_the_output_is_bit_equal(trained, how):
    folder, expected, tensors = trained
    torch.manual_seed(99)
    model = PeftModel.from_pretrained(tiny_llama(), folder, **how)
    assert torch.equal(logits(model), expected)
    assert same(adapter(model, how.get("adapter_name", "default")), tensors)
    assert any(p.requires_grad for p in model.parameters()) == bool(how.get("is_trainable"))


def test_loaded_into_a_model_that_runs_already(trained):
    folder, expected, _ = trained
    model = wrap(tiny_llama(), init_weights=False)
    before = logits(model)
    model.load_adapter(folder, "second")
    assert torch.equal(logits(model), before)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


def test_loaded_over_a_model_with_other_columns(trained):
    folder, expected, _ = trained
    model = wrap(tiny_llama(), seed=4, rank_pattern={"down_proj": 7}, alpha=6, init_weights=False)
    logits(model)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert torch.equal(logits(model), expected)


@transformers_loads_adapters
def test_loaded_by_transformers_itself(trained):
    folder, expected, _ = trained
    model = tiny_llama()
    model.load_adapter(folder)
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_llama()))
    model.enable_adapters()
    assert torch.equal(logits(model), expected)


@transformers_loads_adapters
def test_added_trained_saved_and_deleted_by_transformers_itself(tmp_path):
    model = tiny_llama()
    base = logits(model)
    model.add_adapter(PacaConfig(r=4, target_modules="all-linear", seed=11))
    model.train()
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert "import thawline.tuners" in (tmp_path / "README.md").read_text()
    fresh = tiny_llama()
    fresh.load_adapter(tmp_path)
    assert torch.equal(logits(fresh), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), base)


def test_a_fresh_process_needs_only_the_one_import(trained, tmp_path):
    folder, expected, _ = trained
    base = tiny_llama()
    base.save_pretrained(tmp_path)
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import thawline.tuners
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.manual_seed(123); torch.set_num_threads(1)
base = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {str(folder)!r}).eval()
with torch.no_grad():
    logits = model(torch.tensor({tokens().tolist()})).logits
assert torch.equal(logits, torch.load({str(tmp_path / "expected.pt")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_configuration_survives_json(tmp_path):
    config = PacaConfig(
        r=3, alpha=6, target_modules=["b", "a"], exclude_modules=["c"], rank_pattern={"a": 2},
        alpha_pattern={"b": 1.5}, bias="paca_only", selection="explicit", indices={"a": [1, 2], "b": [0, 4,
        5]}, modules_to_save=["head"], task_type="CAUSAL_LM", seed=9,
    )  # fmt: skip
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "THAWLINE_PACA"
    for read in (PacaConfig, PeftConfig):
        again = read.from_pretrained(str(tmp_path))
        assert isinstance(again, PacaConfig)
        assert again.peft_type.value == "THAWLINE_PACA"
        assert again.to_dict() == config.to_dict()


def test_the_model_card_says_the_import_once_and_keeps_what_was_there(tmp_path):
    model = wrap(Net())
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert card.read_text().count("import thawline.tuners") == 1
    assert "library_name: peft" in card.read_text()
    card.write_text(card.read_text() + "\nMy own words.\n")
    model.save_pretrained(tmp_path)
    assert card.read_text().count("import thawline.tuners") == 1
    assert "My own words." in card.read_text()


def test_the_folder_of_a_named_adapter_says_the_import_too(tmp_path):
    model = wrap(Net())
    model.add_adapter("second", PacaConfig(r=2, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    assert "import thawline.tuners" in (tmp_path / "second" / "README.md").read_text()


def test_biases_and_whole_modules_come_back(tmp_path):
    base = Net()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model, x = wrap(base, bias="all", modules_to_save=["head"]), torch.randn(B, IN)
    train(model)
    model.save_pretrained(tmp_path)
    fresh = Net()
    fresh.load_state_dict(state)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([0, 1, 2, 99], "column 99 of 'first', which has 12 input features"),
        ([0, 1, 1, 2], "indices of 'first' repeat"),
    ],
)
def test_columns_that_only_a_foreign_or_damaged_file_names_are_refused(columns, message):
    model = wrap(Net())
    state = adapter(model)
    state["base_model.model.first.thawline_paca_indices"] = torch.tensor(columns)
    with pytest.raises(CheckpointError, match=message):
        set_peft_model_state_dict(model, state)


def test_columns_of_another_base_are_refused_before_the_first_is_loaded(tmp_path):
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(OUT, 9, bias=False)

    wrap(Net(), init_weights=False).save_pretrained(tmp_path)
    base = Wide()
    before = [parameter.clone() for parameter in base.parameters()]
    with pytest.raises(CheckpointError, match=r"'second.*delta.default' is \(7, 4\), expected \(9, 4\)"):
        PeftModel.from_pretrained(base, tmp_path)
    after = [p for name, p in base.named_parameters() if "delta" not in name]
    assert all(map(torch.equal, before, after))  # those of 'first' are not in its weight either


def test_unsorted_columns_from_elsewhere_keep_their_order():
    x = torch.randn(B, IN)
    model = wrap(Net(), init_weights=False).eval()
    expected, state = model(x), adapter(model)
    for part in ("first", "second"):
        for kind, axis in (("indices", 0), ("delta", 1)):
            key = f"base_model.model.{part}.thawline_paca_{kind}"
            state[key] = state[key].flip(axis)
    set_peft_model_state_dict(model, state)
    torch.testing.assert_close(model(x), expected)


def test_injected_with_a_state_dict(trained):
    folder, expected, _ = trained
    state = load_file(folder / "adapter_model.safetensors")
    plain = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    model = inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), tiny_llama(), state_dict=plain)
    set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model), expected)


def test_bits_survive_a_round_trip(trained):
    folder, _, tensors = trained
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(bits(saved[k]), bits(t)) for k, t in tensors.items())
