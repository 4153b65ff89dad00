"""From pre-trained tasks to new ones: what moves, what stays, and what the averaged adapter is."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from tests.support.mhr import config, logits, routed, tokens
from tests.support.models import tiny_llama
from thawline import ConfigError, RoutingError, add_tasks, set_task_ids, start_adaptation
from thawline.tuners.mhr import parameter_groups, set_uniform_mix, split_heads, uniform_annealing
from thawline.tuners.mhr.layer import find_layers
from thawline.tuners.mhr.routing import LearnedRouter

GRANULARITIES = ["linear", "layer", "block", "coder", "network"]


def trained(model: nn.Module) -> set[str]:
    return {
        name.split(".default")[0].rsplit(".", 1)[-1]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def step(model: nn.Module, x, lr: float = 0.05) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model(input_ids=x, labels=x).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


# Configuration.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"n_heads": 2.0}, r"n_heads=2.0"),
        ({"n_skills": True}, "n_skills=True"),
        ({"alpha": -1}, "alpha=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"temperature": 0}, "temperature=0"),
        ({"router": "learnt"}, "Did you mean 'learned'"),
        ({"granularity": "tensor"}, "Available: block, coder, layer, linear, network"),
        ({"noise": "gumbel"}, "Unknown noise='gumbel'"),
        ({"a_init": "kaiming"}, "Unknown a_init"),
        ({"n_tasks": 2, "task_names": ["a", "b", "c"]}, "n_tasks=2 but 3 task_names"),
        ({"n_tasks": None, "task_names": ["a", "b", "a"]}, r"repeats \['a'\]"),
        ({"n_tasks": None, "task_names": ["a", "mean"]}, r"\['mean'\]"),
        ({"n_tasks": None, "task_names": "translate"}, r"expected a list, \['translate'\]"),
        ({"n_tasks": None, "task_names": ["a", 2, ""]}, r"task_names has \[2, ''\]: expected names"),
        ({"dropout": "0.1"}, "dropout='0.1'"),
        ({"routing_init": None}, "routing_init=None"),
        ({"uniform_mix": True}, "uniform_mix=True"),
        ({"router": "private"}, "n_skills=5 and n_tasks=3"),
        ({"router": "random", "noise": "task"}, "needs router='learned'"),
        ({"heads_pattern": {"q_proj": 4}, "granularity": "block"}, "needs granularity='linear'"),
        ({"n_splits": 2}, "use `n_heads`"),
        ({"lora_alpha": 2}, "use `alpha`"),
    ],
)
def test_settings_that_cannot_work_say_what_would(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_heads_that_do_not_divide_list_the_divisors_all_modules_share_and_leave_the_model_alone() -> None:
    base = tiny_llama()  # sizes 24, 12 and 36
    with pytest.raises(
        ConfigError, match=r"n_heads=5 does not divide in_features=24 of .*1, 2, 3, 4, 6, 12 heads"
    ):
        get_peft_model(base, config(n_heads=5))
    assert not any(True for _ in find_layers(base))
    assert get_peft_model(base, config(n_heads=12))


def test_layers_that_are_no_linears_raise() -> None:
    with pytest.raises(ConfigError, match=r"'model.embed_tokens' is a Embedding"):
        get_peft_model(tiny_llama(), config(target_modules=["embed_tokens"]))


def test_patterns_give_modules_their_own_rank_scale_and_heads() -> None:
    model = routed(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}, heads_pattern={"down_proj": 12})
    layers = {name.rsplit(".", 1)[-1]: layer for name, layer in find_layers(model)}
    assert (layers["q_proj"].r["default"], layers["q_proj"].scaling["default"]) == (2, 2.5)
    assert (layers["k_proj"].r["default"], layers["k_proj"].scaling["default"]) == (3, 2.0)
    assert layers["down_proj"].routers["default"].n_heads == 12
    assert layers["q_proj"].routers["default"].n_heads == 2


def test_targets_default_to_those_of_lora() -> None:
    model = routed(target_modules=None)
    assert {name.rsplit(".", 1)[-1] for name, _ in find_layers(model)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(("granularity", "tables"), list(zip(GRANULARITIES, [14, 4, 2, 1, 1], strict=True)))
def test_granularity_says_who_shares_a_table(granularity: str, tables: int) -> None:
    model = routed(granularity=granularity)
    names = [name for name, _ in model.named_parameters() if name.endswith("logits")]
    assert len(names) == tables
    assert len({id(layer.routers["default"]) for _, layer in find_layers(model)}) == tables
    assert sum("mhr_router" in key for key in model.state_dict()) == tables


# Counts, on the meta device.


@pytest.mark.parametrize(
    ("changes", "skills", "routing", "adapted"),
    [
        ({"n_heads": 64}, 17_694_720, 8_404_992, {"full": 17_915_904, "z": 221_184, "mu": 2_211_840}),
        ({"n_heads": 1}, 17_694_720, 131_328, {"full": 17_698_176, "z": 3_456, "mu": 2_211_840}),
        ({"n_heads": 64, "granularity": "network"}, 17_694_720, 38 * 512, {"z": 512}),
    ],
    ids=["mhr", "poly", "one table"],
)
def test_parameter_counts_of_t5_xl(changes: dict, skills: int, routing: int, adapted: dict) -> None:
    """r=1, S=8 and 38 tasks on all 432 linears: the counts that follow from the paper's setting."""
    from transformers import T5Config, T5ForConditionalGeneration

    def counts() -> dict[bool, int]:
        found = {True: 0, False: 0}
        for name, p in model.named_parameters():
            if p.requires_grad:
                found["mhr_router" in name] += p.numel()
        return found

    sizes = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
    fields = {"r": 1, "n_skills": 8, "n_tasks": 38, **changes}
    targets = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    with torch.device("meta"):
        base = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu"))
        model = get_peft_model(base, config(**fields, target_modules=targets))
        assert counts() == {False: skills, True: routing}
        for mode, total in adapted.items():  # mu last: it drops the skills
            start_adaptation(model, mode, 1)
            assert sum(counts().values()) == total


# More tasks.


@pytest.mark.parametrize("router", ["learned", "private", "random", "uniform"])
@pytest.mark.parametrize("granularity", ["linear", "network"])
def test_added_tasks_leave_the_old_ones_bit_identical(router: str, granularity: str) -> None:
    model = routed(router=router, granularity=granularity, n_skills=3)
    x = tokens()
    set_task_ids(model, [0, 1, 2])
    before = logits(model, x)
    add_tasks(model, ["new", "newer"])
    with pytest.raises(RoutingError, match="No task ids") if router != "uniform" else torch.no_grad():
        model(input_ids=x)
    set_task_ids(model, [0, 1, 2])
    assert torch.equal(logits(model, x), before)
    set_task_ids(model, ["new", "task_1", "newer"])
    logits(model, x)
    set_task_ids(model, [3, 1, 4])
    after = logits(model, x)
    assert torch.equal(after[1], before[1])
    assert model.peft_config["default"].n_tasks == 5
    assert all(p.requires_grad for name, p in model.named_parameters() if "mhr_" in name)


def test_new_rows_start_fresh_uniform_at_the_mean_or_as_a_copy() -> None:
    model = routed()
    layer = next(layer for _, layer in find_layers(model))
    old = layer.routers["default"].logits.detach().clone()
    for start_from in ("fresh", "uniform", "mean", 1):
        add_tasks(model, 1, start_from=start_from)
    new = layer.routers["default"].logits.detach()[3:]
    assert torch.equal(layer.routers["default"].logits[:3], old)
    assert new[0].abs().max() > 0
    assert not new[1].any()
    torch.testing.assert_close(new[2], torch.cat([old, new[:2]]).mean(0))
    assert torch.equal(new[3], old[1])


def test_taken_names_and_unknown_starts_raise_before_anything_changes() -> None:
    model = routed(n_tasks=None, task_names=["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"repeats \['b'\]"):
        add_tasks(model, ["b"])
    with pytest.raises(ConfigError, match=r"task_names has \[4\]"):
        add_tasks(model, [4])
    with pytest.raises(RoutingError, match="Unknown task 'z'"):
        add_tasks(model, ["d"], start_from="z")
    for nothing in ([], 0, -1):
        with pytest.raises(ConfigError, match="expected the names of the new tasks, or their number"):
            add_tasks(model, nothing)
    assert model.peft_config["default"].task_names == ["a", "b", "c"]
    assert next(layer for _, layer in find_layers(model)).routers["default"].logits.shape[0] == 3


def test_the_config_a_user_made_is_not_changed_behind_their_back() -> None:
    mine = config()
    model = get_peft_model(tiny_llama(), mine)
    add_tasks(model, ["new"])
    start_adaptation(model, "z", ["newer"])
    assert (mine.n_tasks, mine.mode) == (3, "train")


# Adaptation.


def test_full_trains_skills_and_rows_z_rows_alone_mu_one_adapter() -> None:
    expected = {"full": {"mhr_A", "mhr_B", "mhr_router"}, "z": {"mhr_router"}, "mu": {"mhr_A", "mhr_B"}}
    for mode, parts in expected.items():
        model = routed()
        start_adaptation(model, mode, ["new"])
        assert trained(model) == parts
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        layers = [layer for _, layer in find_layers(model)]
        skill = sum(3 * (layer.in_features + layer.out_features) for layer in layers)
        assert count == {"full": 5 * skill + 10 * len(layers), "z": 10 * len(layers), "mu": skill}[mode]


def test_new_rows_start_near_the_average_of_the_skills_and_ids_at_zero() -> None:
    model, averaged = routed(routing_init=1e-3), routed(routing_init=1e-3)
    start_adaptation(model, "full", ["first", "second"])
    start_adaptation(averaged, "mu")
    x = tokens()
    set_task_ids(model, ["first", 1, "second"])
    torch.testing.assert_close(logits(model, x), logits(averaged, x), atol=1e-2, rtol=1e-2)
    with pytest.raises(RoutingError, match="rows 0 to 1"):
        set_task_ids(model, 2)


def test_z_changes_no_bit_of_a_skill_and_frozen_gradients_stay_none() -> None:
    model = routed()
    start_adaptation(model, "z", ["new"])
    skills = {
        name: p.detach().clone() for name, p in model.named_parameters() if "mhr_A" in name or "mhr_B" in name
    }
    rows = {name: p.detach().clone() for name, p in model.named_parameters() if "logits" in name}
    set_task_ids(model, "new")
    for _ in range(3):
        step(model, tokens())
    for name, p in model.named_parameters():
        if name in skills:
            assert torch.equal(p, skills[name])
            assert p.grad is None
        elif name in rows:
            assert not torch.equal(p, rows[name])
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in skills)


def test_z_stays_z_through_pefts_switches() -> None:
    model = routed()
    start_adaptation(model, "z", ["new"])
    model.set_adapter("default")
    assert trained(model) == {"mhr_router"}
    with model.disable_adapter():
        pass
    assert trained(model) == {"mhr_router"}


def test_mu_trains_the_average_as_adam_trains_all_skills_behind_uniform_weights() -> None:
    x = tokens()
    collapsed, uncollapsed = routed(), routed(router="uniform")
    uncollapsed.load_state_dict(
        {k: v for k, v in collapsed.state_dict().items() if "logits" not in k}, strict=False
    )
    start_adaptation(collapsed, "mu", ["new"])
    torch.testing.assert_close(logits(collapsed, x), logits(uncollapsed, x))
    before = logits(collapsed, x)
    optimisers = [
        torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-2, eps=1e-16)
        for m in (collapsed, uncollapsed)
    ]
    for _ in range(5):
        for model, optimiser in zip((collapsed, uncollapsed), optimisers, strict=True):
            model(input_ids=x, labels=x).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert (logits(collapsed, x) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(collapsed, x), logits(uncollapsed, x), atol=5e-4, rtol=5e-4)


def test_mu_is_the_average_of_the_factors_not_of_their_products() -> None:
    model = routed()
    layer = next(layer for _, layer in find_layers(model))
    A, B = layer.mhr_A["default"].detach(), layer.mhr_B["default"].detach()
    start_adaptation(model, "mu")
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * B.mean(0) @ A.mean(0).T)


def test_private_skills_adapt_from_their_average() -> None:
    model, averaged = (routed(router="private", n_skills=3) for _ in range(2))
    start_adaptation(model, "full", ["new", "newer"])
    start_adaptation(averaged, "mu")
    set_task_ids(model, [0, 1, 0])
    torch.testing.assert_close(logits(model, tokens()), logits(averaged, tokens()))


@pytest.mark.parametrize(
    ("router", "mode", "message"),
    [
        ("uniform", "z", "router='uniform' has none that learns"),
        ("random", "z", "has none that learns"),
        ("learned", "zz", "Did you mean 'z'"),
    ],
)
def test_adaptations_that_cannot_work_raise(router: str, mode: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start_adaptation(routed(router=router), mode, ["new"])


def test_a_merged_model_is_not_adapted() -> None:
    model = routed()
    set_task_ids(model, 0)
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\) first"):
        start_adaptation(model, "full", ["new"])


def test_adaptation_can_follow_adaptation() -> None:
    model = routed()
    start_adaptation(model, "z", ["a"])
    add_tasks(model, ["b"])
    start_adaptation(model, "full", ["c"])
    assert trained(model) == {"mhr_A", "mhr_B", "mhr_router"}
    start_adaptation(model, "mu", ["d"])
    start_adaptation(model, "full", ["e"])
    assert trained(model) == {"mhr_A", "mhr_B"}


# Heads.


@pytest.mark.parametrize("granularity", ["linear", "block"])
def test_splitting_heads_loses_nothing(granularity: str) -> None:
    model = routed(granularity=granularity)
    x = tokens()
    set_task_ids(model, [0, 1, 2])
    before = logits(model, x)
    split_heads(model, 12)
    torch.testing.assert_close(logits(model, x), before)
    assert model.peft_config["default"].n_heads == 12
    assert all(layer.routers["default"].logits.shape == (3, 12, 5) for _, layer in find_layers(model))


@pytest.mark.parametrize("n_heads", [3, 24])
def test_heads_that_do_not_fit_raise(n_heads: int) -> None:
    with pytest.raises(ConfigError, match=rf"n_heads={n_heads} .*Use one of \[2, 4, 6, 12\]"):
        split_heads(routed(), n_heads)


# Uniform routing, by and by.


def test_annealing_ends_at_the_average_and_can_be_undone() -> None:
    model, averaged = routed(), routed()
    start_adaptation(averaged, "mu")
    x = tokens()
    set_task_ids(model, [0, 1, 2])
    learned = logits(model, x)
    uniform_annealing(model, 0.0)
    assert torch.equal(logits(model, x), learned)
    uniform_annealing(model, 1.0)
    torch.testing.assert_close(logits(model, x), logits(averaged, x))
    set_uniform_mix(model, 0.0)
    assert torch.equal(logits(model, x), learned)


def test_annealing_follows_a_quarter_cosine() -> None:
    router = LearnedRouter(2, 3, 4, 2.0)
    rows = torch.tensor([1])
    learned = router(rows)
    router.uniform_mix = 1 - math.cos(math.pi / 2 * 0.4)
    a = math.cos(math.pi / 2 * 0.4)
    torch.testing.assert_close(router(rows), a * learned + (1 - a) / 4)


# Optimisation.


def test_routing_has_its_own_rate_and_no_decay() -> None:
    model = routed()
    skills, routing = parameter_groups(model, lr=1e-3, weight_decay=0.01)
    assert (skills["lr"], skills["weight_decay"]) == (1e-3, 0.01)
    assert (routing["lr"], routing["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("mhr_router" in names[id(p)] for p in routing["params"])
    assert not any("mhr_router" in names[id(p)] for p in skills["params"])
    assert len(skills["params"]) + len(routing["params"]) == sum(p.requires_grad for p in model.parameters())
    start_adaptation(model, "mu")
    assert len(parameter_groups(model, lr=1e-3)) == 1


def test_adaptation_starts_from_a_loaded_model(tmp_path) -> None:
    routed().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not trained(model)
    start_adaptation(model, "z", ["new"])
    assert trained(model) == {"mhr_router"}
    set_task_ids(model, "new")
    before = logits(model, tokens())
    step(model, tokens())
    assert not torch.allclose(logits(model, tokens()), before)
