"""All that a config names is adapted or refused by name, whichever the tuner; what does not learn is said."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tests.support.models import SIZES, VOCAB, gpt_oss, mixtral, tiny_gpt2, tiny_llama
from thawline.errors import ConfigError
from thawline.recipe import Lora, Mhr, Paca, PeftMethod
from thawline.tuners import MHRConfig, PacaConfig
from thawline.tuners.build import attach_tuner


def qwen_moe() -> nn.Module:
    sizes = {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 28}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **sizes, num_experts=3, num_experts_per_tok=2))


def deepseek() -> nn.Module:
    """One dense block, one of fused experts beside a shared one."""
    config = DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4}, moe_intermediate_size=20, n_routed_experts=4, n_group=2,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=12,
        qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def mamba() -> nn.Module:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config)


def adapted(model: nn.Module) -> list[str]:
    return sorted(model.base_model.targeted_module_names)


def phimoe() -> nn.Module:
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=3))


def llama4() -> nn.Module:
    sizes = {"intermediate_size_mlp": 36, "num_local_experts": 3, "head_dim": 6}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **sizes))


OURS = {"paca": PacaConfig, "mhr": MHRConfig}


@pytest.mark.parametrize(
    ("build", "targets", "names"),
    [
        (
            mixtral,
            ["q_proj", "w1"],
            "has 'w1': no layer, but 'model.layers.0.mlp.experts.gate_up_proj' .3 × 72",
        ),
        (mixtral, r".*experts\.\d+\.w[123]|.*q_proj", "means 'model.layers.0.mlp.experts.gate_up_proj'"),
        (
            mixtral,
            ["gate_up_proj"],
            "'gate_up_proj': no layer, but .*target_parameters: .experts.gate_up_proj",
        ),
        (
            qwen_moe,
            ["gate_proj", "up_proj"],
            "means 'model.layers.0.mlp.experts.gate_up_proj' .3 × 40 × 24. too",
        ),
        (qwen_moe, ["experts"], r"means 'model.layers.0.mlp.experts.*exclude_modules=\['experts'\]"),
        (deepseek, ["down_proj"], "means 'model.layers.1.mlp.experts.gate_up_proj'"),
        (
            gpt_oss,
            ["q_proj", "down_proj"],
            "'down_proj': no layer, but 'model.layers.0.mlp.experts.down_proj'",
        ),
    ],
)
def test_mhr_refuses_fused_experts_by_name_with_what_reaches_them(build, targets, names) -> None:
    model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=names):
        get_peft_model(model, MHRConfig(r=2, target_modules=targets))
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("build", "targets", "names"),
    [
        (mixtral, ["q_proj", "w1"], "'w1': it is a part of 'model.layers.0.mlp.experts.gate_up_proj'"),
        (mixtral, r".*experts\.\d+\.w[123]|.*q_proj", "means a part of 'model.layers.0.mlp.experts.gate_up"),
        (qwen_moe, ["gate_proj", "up_proj"], "means a part of .*experts.gate_up_proj' .3 × 40 × 24. too"),
        (qwen_moe, ["q_proj", "gate_proj", "down_proj"], "Name it whole .'gate_up_proj'., or .* .'experts'"),
        (deepseek, ["q_b_proj", "up_proj"], "means a part of 'model.layers.1.mlp.experts.gate_up_proj'"),
    ],
)
def test_paca_refuses_parts_of_fused_experts(build, targets, names) -> None:
    model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=names):
        get_peft_model(model, PacaConfig(r=2, target_modules=targets))
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("build", [mixtral, qwen_moe, deepseek, gpt_oss])
def test_all_linear_says_which_weights_it_leaves_out(caplog, build) -> None:
    with caplog.at_level(logging.WARNING):
        get_peft_model(build(), MHRConfig(r=2, target_modules="all-linear"))
    (said,) = [message for message in caplog.messages if "all-linear" in message]
    assert re.search(r"% of the weights.*experts.gate_up_proj' \(.*target_parameters.*row's task", said)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for config in OURS.values():
            get_peft_model(build(), config(r=2, target_modules="all-linear", exclude_modules=["experts"]))
            get_peft_model(tiny_llama(), config(r=2, target_modules="all-linear"))
        get_peft_model(build(), PacaConfig(r=2, target_modules="all-linear"))
    assert not caplog.messages


def test_layers_beside_fused_experts_are_adapted_and_load_again(tmp_path) -> None:
    fields = {"target_modules": ["gate_proj", "up_proj"], "exclude_modules": ["experts"], "r": 2}
    model = get_peft_model(qwen_moe(), PacaConfig(**fields))
    assert adapted(model) == sorted(
        f"model.layers.{block}.mlp.shared_expert.{name}"
        for block in (0, 1)
        for name in fields["target_modules"]
    )
    # PEFT shortens long lists of targets to endings, which read as if they meant the experts.
    wide = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES | {"num_hidden_layers": 4}, num_experts=3))
    model = get_peft_model(wide, PacaConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    names = adapted(model)
    assert adapted(type(model).from_pretrained(model.unload(), tmp_path)) == names


def test_lora_reaches_fused_experts_by_name_where_peft_converts_it_and_by_the_advised_setting_elsewhere() -> (
    None
):
    tuned = attach_tuner(mixtral(), Lora(r=2, target_modules=["w1", "w2", "w3", "q_proj"]))
    assert {name.rpartition(".")[2] for name in tuned.base_model.targeted_parameter_names} == {
        "gate_up_proj", "down_proj",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"target_parameters: \[experts.gate_up_proj"):
        attach_tuner(gpt_oss(), Lora(r=2, target_modules=["gate_up_proj", "q_proj"]))
    args = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    tuned = attach_tuner(gpt_oss(), Lora(r=2, target_modules=["q_proj"], args=args))
    assert len(tuned.base_model.targeted_parameter_names) == 4


def test_lora_says_what_all_linear_leaves_out(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        attach_tuner(gpt_oss(), Lora(r=2))
    assert ["target_parameters: [experts.gate_up_proj, experts.down_proj]" in m for m in caplog.messages] == [
        True
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        attach_tuner(mixtral(), Lora(r=2))  # PEFT adapts its experts
        attach_tuner(tiny_gpt2(), Lora(r=2))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Paca(r=2, target_modules=["q_proj", "v_prj"]), "has 'v_prj'.*Did you mean 'v_proj'"),
        (Mhr(r=2, target_modules=["c_attn", "q_proj"]), "`target_modules` has 'c_attn': no module of Llama"),
        (Lora(r=2, target_modules=["q_proj", "query"]), "`target_modules` has 'query': no module of Llama"),
        (PeftMethod(method="miss", args={"r": 2, "target_modules": ["k_proj", "fc"]}), "has 'fc'"),
        (Paca(r=2, rank_pattern={"gate": 4}), "`rank_pattern` has 'gate'.*Did you mean 'gate_proj'"),
        (Mhr(r=2, alpha_pattern={"self_attn": 4}), "`alpha_pattern` has 'self_attn'"),
        (Lora(r=2, args={"rank_pattern": {"layers.7.*": 4}}), "`rank_pattern` has 'layers.7"),
        (Mhr(r=2, heads_pattern={"mlp.fc": 1}), "`heads_pattern` has 'mlp.fc'"),
        (Paca(r=2, alpha_pattern={"q_proj(": 2}), "no regular expression"),
        (
            Paca(r=1, selection="explicit", indices={"q_proj": [0], "k_proj": [1]},
                 target_modules=["q_proj"]),
            "`indices` has 'k_proj'",
        ),
        (Mhr(r=2, exclude_modules=["lm_haed"]), "`exclude_modules` has 'lm_haed'.*Did you mean 'lm_head'"),
        (Lora(r=2, exclude_modules=r".*\.q_prj"), "`exclude_modules` has"),
        (Paca(r=2, target_modules=["q_proj"], layers_to_transform=[0, 5]), "`layers_to_transform` has 5"),
        (
            Mhr(r=2, target_modules=["q_proj", "embed_tokens"], layers_to_transform=[0]),
            "'embed_tokens', of which `layers_to_transform` leaves nothing",
        ),
        (Paca(r=2, target_modules=r"model\.blocks.*"), "is no module of LlamaForCausalLM"),
        (Paca(r=2, target_modules=r".*(q_proj"), "`target_modules`: '.*' is no regular expression: missing"),
        (Mhr(r=2, exclude_modules=r"*q_proj"), "`exclude_modules`: '.*' is no regular expression: nothing"),
        (Lora(r=2, target_modules=r".*(q_proj"), "PEFT cannot attach 'lora'.*unterminated"),
        (Mhr(r=2, target_modules=["q_proj"], exclude_modules=["q_proj"]), "that `exclude_modules` leaves"),
        (Mhr(r=2, target_modules=r".*q_proj", layers_to_transform=[0]), "`layers_to_transform` needs a list"),
        (Mhr(r=2, layers_to_transform=0), "`layers_to_transform` needs a list of names, not .*'all-linear'"),
        (Lora(r=2, modules_to_save=["embed_token"]), "'embed_token'.*Did you mean 'embed_tokens'"),
        (Mhr(r=2, modules_to_save=["lm_head", "pooler"]), "`modules_to_save` has 'pooler'"),
        (Paca(r=2, trainable_token_indices=[5, VOCAB]), f"has {VOCAB}, but the table has tokens 0 to 60"),
        (Lora(r=2, args={"trainable_token_indices": [-1]}), "`trainable_token_indices` has -1"),
        (Mhr(r=2, trainable_token_indices={"wte": [5]}), "`trainable_token_indices` has 'wte': no module"),
    ],
)  # fmt: skip
def test_an_entry_without_effect_is_refused(settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach_tuner(tiny_llama(), settings)


def step(model: nn.Module) -> None:
    ids = torch.arange(12).reshape(2, 6) + 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("settings", [Paca(r=2), Mhr(r=2, n_heads=1), Lora(r=2)], ids=lambda one: one.method)
def test_a_module_whose_weight_is_used_without_calling_it_is_said_once(caplog, settings) -> None:
    fields = {**vars(settings), "target_modules": ["in_proj", "dt_proj"]}
    model = attach_tuner(mamba(), type(settings)(**fields)).train()
    with caplog.at_level(logging.WARNING):
        step(model)
    (said,) = [message for message in caplog.messages if "No gradient" in message]
    assert re.search(r"2 of 4 adapted modules.*'backbone.layers.0.mixer.dt_proj'", said)
    assert "in_proj" not in said


def test_where_every_module_learns_nothing_is_said(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        for settings in (Paca(r=2), Mhr(r=2), Lora(r=2), PeftMethod(method="ia3")):
            step(attach_tuner(tiny_llama(), settings).train())
        # The steps of another model's optimiser say nothing of this one.
        waiting = attach_tuner(tiny_llama(), Paca(r=2))
        step(get_peft_model(tiny_llama(), PacaConfig(r=2, target_modules=["q_proj"])))
    del waiting
    assert not caplog.messages


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0])


@pytest.mark.parametrize("tuner", OURS)
def test_torchs_own_attention_is_left_out_of_all_linear_and_refused_by_name(caplog, tuner) -> None:
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(Attention(), OURS[tuner](r=2, target_modules="all-linear"))
    assert adapted(model) == ["out"]
    assert any("leaves out 'attention'" in message for message in caplog.messages)
    with pytest.raises(ConfigError, match=r"'attention.out_proj' belongs to nn.MultiheadAttention"):
        get_peft_model(Attention(), OURS[tuner](r=2, target_modules=["out_proj"]))


@pytest.mark.parametrize(
    "settings", [Lora(r=2), Paca(r=2), Mhr(r=2, n_skills=2, n_heads=1)], ids=lambda s: s.method
)
@pytest.mark.parametrize("build", [phimoe, llama4])
def test_routers_of_experts_are_left_out_of_all_linear_and_refused_by_name(caplog, settings, build) -> None:
    with caplog.at_level(logging.WARNING):
        model = attach_tuner(build(), settings, tasks=["one"])
    assert "o_proj" in "".join(adapted(model))
    assert "router" not in "".join(adapted(model))
    assert "leaves out 'model.layers.0." in caplog.text
    assert "router' and 1 more: it does not" in caplog.text
    named = dataclasses.replace(settings, target_modules=["q_proj", "router"])
    with pytest.raises(ConfigError, match="router' does not return a product alone"):
        attach_tuner(build(), named, tasks=["one"])
