"""Every tuner a recipe can name attaches, trains what it should, and refuses what it cannot do."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from thawline.errors import CheckpointError, ConfigError
from thawline.recipe import PEFT_METHODS, TUNERS, Frozen, Full, Lora, Mhr, Paca, PeftMethod
from thawline.training.plan import n_base_parameters, n_parameters
from thawline.tuners.build import attach_tuner
from thawline.tuners.paca.config import PacaConfig


@pytest.fixture
def model(tiny_llama: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def test_none_trains_everything_and_frozen_nothing(model: nn.Module) -> None:
    _, total = n_parameters(model)
    assert n_parameters(attach_tuner(model, Full())) == (total, total)
    assert n_parameters(attach_tuner(model, Frozen())) == (0, total)


def test_paca_trains_columns_by_its_own_fields(model: nn.Module) -> None:
    tuned = attach_tuner(model, Paca(r=3, target_modules=["down_proj"], rank_pattern={"0.mlp.down_proj": 5}))
    assert isinstance(tuned.peft_config["default"], PacaConfig)
    # down_proj is 24 → 16.
    assert n_parameters(tuned)[0] == 16 * (5 + 3)


def test_lora_is_pefts_own_by_its_fields(model: nn.Module) -> None:
    tuned = attach_tuner(model, Lora(r=3, dropout=0.1, target_modules=["q_proj"], args={"use_rslora": True}))
    config = tuned.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 6, 0.1, True)
    assert config.task_type == "CAUSAL_LM"
    # q_proj is 16 → 16 in each of two layers.
    assert n_parameters(tuned)[0] == 2 * 3 * (16 + 16)


def test_dora_learns_magnitudes_besides(model: nn.Module) -> None:
    tuned = attach_tuner(model, Lora(method="dora", r=2, target_modules=["q_proj"]))
    assert n_parameters(tuned)[0] == 2 * (2 * (16 + 16) + 16)


def test_any_peft_method_is_reached_by_its_own_fields(model: nn.Module) -> None:
    args = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    tuned = attach_tuner(model, PeftMethod(method="ia3", args=args))
    assert isinstance(tuned.peft_config["default"], peft.IA3Config)
    assert n_parameters(tuned)[0] == 2 * (8 + 24)


def test_the_named_peft_methods_are_all_that_peft_has() -> None:
    configs = peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
    known = {name.lower() for name, config in configs if not config.__module__.startswith("thawline.")}
    # poly is ours: MHR with one head.
    assert set(PEFT_METHODS) == known - {"lora", "poly"}
    assert set(PEFT_METHODS) < set(TUNERS)


def test_a_module_that_is_no_transformer_takes_an_adapter_too() -> None:
    tuned = attach_tuner(
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), Lora(r=2, target_modules=["0"])
    )
    assert n_parameters(tuned)[0] == 2 * (5 + 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            Lora(args={"use_rslor": True}),
            "Unknown key 'tuner.args.use_rslor' of LoraConfig.*Did you mean 'use_rslora'",
        ),
        (Lora(args={"lora_alpha": 3}), "'tuner.args.lora_alpha' has a field of its own"),
        (Lora(target_modules=["no_such"]), "PEFT cannot attach 'lora' to LlamaForCausalLM: .*no_such"),
        (PeftMethod(method="lorra"), "PEFT .* has no method 'lorra'.*Did you mean 'lora'"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(model: nn.Module, settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach_tuner(model, settings)


@pytest.mark.parametrize(
    "settings",
    [
        Full(), Frozen(), Paca(r=3), Lora(r=3), Lora(method="dora", r=2), Mhr(r=2, n_skills=3),
        Lora(r=2, modules_to_save=["embed_tokens"]),
        PeftMethod(method="ia3"), PeftMethod(method="vera", args={"r": 4}), PeftMethod(method="oft"),
        PeftMethod(method="prompt_tuning", args={"num_virtual_tokens": 3}),
        PeftMethod(method="prefix_tuning", args={"num_virtual_tokens": 3}),
    ],
    ids=lambda settings: settings.method,
)  # fmt: skip
def test_a_bases_parameters_are_counted_without_the_tuners(tiny_llama: Path, settings) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    _, total = n_parameters(model)
    tuned = attach_tuner(model, settings, tasks=["a", "b"])
    assert n_base_parameters(tuned) == total


@pytest.mark.parametrize("kind", [Paca, Lora])
def test_a_saved_adapter_is_gone_on_from(model: nn.Module, tiny_llama: Path, tmp_path: Path, kind) -> None:
    tuned = attach_tuner(model, kind(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    folder = str(tmp_path / "adapter")
    tuned.save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    again = attach_tuner(base, kind(r=2, start_from=folder))
    ids = torch.tensor([[1, 9, 17, 33]])
    torch.testing.assert_close(again(ids).logits, tuned(ids).logits, rtol=0, atol=0)
    assert n_parameters(again) == n_parameters(tuned)
    with pytest.raises(
        CheckpointError, match="holds an adapter of type .*, which `tuner.method: ia3` does not read"
    ):
        attach_tuner(base, PeftMethod(method="ia3", start_from=folder))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        attach_tuner(base, kind(start_from=str(tmp_path)))


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_a_learned_prompt_generates_what_its_forwards_give(model: nn.Module, method: str) -> None:
    args = {"num_virtual_tokens": 3} | ({"encoder_hidden_size": 8} if method == "p_tuning" else {})
    tuned = attach_tuner(model, PeftMethod(method=method, args=args)).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    ids = torch.tensor([[5, 70, 71], [90, 91, 92]])
    written = tuned.generate(
        input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for _ in range(6):
        ids = torch.cat([ids, tuned(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == ids.tolist()
