"""Saving and loading are exact, bit by bit: every state, on a fresh base, in a new process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.mhr import config, logits, routed, tokens
from tests.support.models import tiny_gpt2, tiny_llama, tiny_t5, transformers_loads_adapters
from thawline import (
    CheckpointError,
    ConfigError,
    RoutingError,
    add_tasks,
    from_poly,
    load_routing,
    route_by_batch,
    save_routing,
    set_task_ids,
    start_adaptation,
    to_lora,
)
from thawline.tuners.mhr import from_loras, from_mttl, set_uniform_mix, split_heads
from thawline.tuners.mhr.layer import find_layers

STATES: dict[str, Callable[[nn.Module], None]] = {
    "as trained": lambda model: None,
    "tasks added": lambda model: add_tasks(model, ["d", "e"]),
    "full": lambda model: start_adaptation(model, "full", ["d", "e"]),
    "z": lambda model: start_adaptation(model, "z", ["d", "e"]),
    "mu": lambda model: start_adaptation(model, "mu", ["d"]),
    "z, then tasks added": lambda model: (start_adaptation(model, "z", ["d"]), add_tasks(model, ["e"])),
    "heads split": lambda model: split_heads(model, 6),
    "annealed": lambda model: set_uniform_mix(model, 0.3),
}


@pytest.mark.parametrize("granularity", ["linear", "block"])
@pytest.mark.parametrize("state", STATES)
def test_every_state_loads_bit_equal_on_a_fresh_base(state: str, granularity: str, tmp_path: Path) -> None:
    model = routed(n_tasks=None, task_names=["a", "b", "c"], granularity=granularity)
    STATES[state](model)
    names = model.peft_config["default"].task_names
    ids = [names[-1], names[0], names[-1]]
    set_task_ids(model, ids)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    for how in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, **how)
        set_task_ids(loaded, ids)
        assert torch.equal(logits(loaded, tokens()), expected), how
    if state == "mu":
        set_task_ids(loaded, None)
        assert torch.equal(logits(loaded, tokens()), expected)
    trainable = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    saved = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == saved


@pytest.mark.parametrize("router", ["uniform", "private", "random"])
def test_every_router_loads_bit_equal(router: str, tmp_path: Path) -> None:
    model = routed(router=router, n_skills=3)
    set_task_ids(model, [2, 0, 1])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    set_task_ids(loaded, [2, 0, 1])
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_a_new_process_loads_every_state_bit_equal_once_it_has_imported_the_tuners(tmp_path: Path) -> None:
    states = {}
    for number, change in enumerate(STATES.values()):
        model = routed(n_tasks=None, task_names=["a", "b", "c"])
        change(model)
        names = model.peft_config["default"].task_names
        ids = [names[-1], names[0], names[-1]]
        set_task_ids(model, ids)
        model.save_pretrained(tmp_path / str(number))
        states[str(number)] = model.peft_config["default"].mode, ids, logits(model, tokens())
    torch.save(states, tmp_path / "states.pt")
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
import torch; torch.set_num_threads(1)
from peft import PeftConfig, PeftModel
try:
    PeftConfig.from_pretrained({str(tmp_path / "0")!r})
    raise SystemExit("loaded without the class that could")
except KeyError as error:  # PEFT's way to say that it does not know a method
    assert "MHR" in str(error)
import thawline.tuners
from tests.support.mhr import tokens, logits
from tests.support.models import tiny_llama
for folder, (mode, ids, expected) in torch.load({str(tmp_path / "states.pt")!r}).items():
    model = PeftModel.from_pretrained(tiny_llama(), {str(tmp_path)!r} + "/" + folder)
    if mode != "mu":
        thawline.set_task_ids(model, ids)
    assert torch.equal(logits(model, tokens()), expected), mode
    for adapt in ("full", "z", "mu") if mode != "mu" else ("full", "mu"):
        thawline.start_adaptation(model, mode=adapt, tasks=["f"])
        model(input_ids=tokens(), labels=tokens()).loss.backward()
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)


def test_a_shared_table_is_saved_once(tmp_path: Path) -> None:
    model = routed(granularity="network")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("mhr_router" in key for key in saved) == 1
    assert "import thawline.tuners" in (tmp_path / "README.md").read_text()


# As PEFT's users expect of any tuner.


def test_several_adapters_each_with_its_own_table() -> None:
    model = routed()
    set_task_ids(model, [0, 1, 2])
    first = logits(model, tokens())
    model.add_adapter("second", config(n_tasks=5, n_skills=4, n_heads=4))
    assert torch.equal(logits(model, tokens()), first)
    model.set_adapter("second")
    set_task_ids(model, [4, 1, 3])
    second = logits(model, tokens())
    assert not torch.allclose(second, first)
    model.set_adapter("default")
    with pytest.raises(RoutingError, match="Task id 4 is not in the routing table"):
        logits(model, tokens())
    set_task_ids(model, [0, 1, 2])
    assert torch.equal(logits(model, tokens()), first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, tokens())
    model.delete_adapter("second")
    assert torch.equal(logits(model, tokens()), first)
    assert not torch.allclose(both, first)


def test_two_active_adapters_add_up_in_training_evaluation_and_merging() -> None:
    model, x = routed(), tokens()
    model.add_adapter("second", config(n_tasks=4, n_skills=2, n_heads=4))
    model.base_model.set_adapter(["default", "second"])
    set_task_ids(model, 1)
    deltas = {
        name: sum(layer.get_delta_weight(adapter) for adapter in ("default", "second"))
        for name, layer in find_layers(model.get_base_model())
    }
    summed = tiny_llama()
    for name, delta in deltas.items():
        summed.get_submodule(name).weight.data += delta
    expected = logits(summed, x)
    for training in (False, True):
        torch.testing.assert_close(logits(model.train(training), x), expected, atol=1e-5, rtol=1e-4)
    model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_of_another_table_is_loaded_beside_the_first(tmp_path: Path) -> None:
    model, other = routed(), routed(seed=9, n_tasks=5, n_skills=2, n_heads=4)
    other.save_pretrained(tmp_path)
    expected = {}
    for one, ids in ((model, [0, 1, 2]), (other, [4, 0, 3])):
        set_task_ids(one, ids)
        expected[tuple(ids)] = logits(one, tokens())
    model.load_adapter(tmp_path, "other")
    for name, ids in (("default", [0, 1, 2]), ("other", [4, 0, 3])):
        model.set_adapter(name)
        set_task_ids(model, ids)
        assert torch.equal(logits(model, tokens()), expected[tuple(ids)])
    with pytest.raises(ConfigError, match="n_heads=5 does not divide"):
        model.add_adapter("bad", config(n_heads=5))
    assert torch.equal(logits(model, tokens()), expected[4, 0, 3])
    model.add_adapter("bad", config(n_heads=4))  # the name is free


@pytest.mark.parametrize(
    ("fields", "adapted"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj", "k_proj"]}, 10),
        ({"target_modules": r".*\.1\..*(q|v)_proj"}, 2),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, 2),
    ],
)
def test_pefts_ways_to_choose_modules_and_tokens(fields: dict, adapted: int, tmp_path: Path) -> None:
    model, x = routed(**fields), tokens()
    assert sum(1 for _ in find_layers(model)) == adapted
    set_task_ids(model, [0, 1, 2])
    model.train()(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    set_task_ids(loaded, [0, 1, 2])
    assert torch.equal(logits(loaded, x), logits(model.eval(), x))


def test_disabled_adapters_are_the_base_and_need_no_ids() -> None:
    model, x = routed(), tokens()
    with model.disable_adapter():
        assert torch.equal(logits(model, x), logits(tiny_llama(), x))
    with pytest.raises(RoutingError):
        logits(model, x)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_one_task_merges_into_the_weights_and_out_again(safe_merge: bool) -> None:
    model, x = routed(), tokens()
    base = [p.clone() for name, p in model.named_parameters() if "base_layer" in name]
    set_task_ids(model, 1)
    expected = logits(model, x)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(RoutingError, match="Task 1 is merged"):
        set_task_ids(model, 2)
    set_task_ids(model, None)
    logits(model, x)
    model.unmerge_adapter()
    for before, (_, after) in zip(
        base, [n for n in model.named_parameters() if "base_layer" in n[0]], strict=True
    ):
        torch.testing.assert_close(after, before)
    set_task_ids(model, 1)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(logits(merged, x), expected, atol=1e-5, rtol=1e-5)
    assert not any(True for _ in find_layers(merged))


@pytest.mark.parametrize("ids", [None, [0, 1, 2]])
def test_merging_without_one_task_raises(ids) -> None:
    model = routed()
    set_task_ids(model, ids)
    with pytest.raises(RoutingError, match=r"set_task_ids\(model, task\) with one id or name"):
        model.merge_adapter()


def test_a_broken_adapter_is_not_merged_safely() -> None:
    model = routed()
    set_task_ids(model, 0)
    next(layer for _, layer in find_layers(model)).mhr_A["default"].data[0, 0, 0] = torch.nan
    with pytest.raises(ConfigError, match="NaNs detected in the merged weights. The adapter default seems"):
        model.merge_adapter(safe_merge=True)


def test_unloading_gives_the_base_back() -> None:
    model, x = routed(), tokens()
    base = route_by_batch(model).unload()
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert torch.equal(logits(base, x), logits(tiny_llama(), x))
    assert type(base) is type(tiny_llama())
    base.generate(input_ids=x, max_new_tokens=2)
    again = routed(base)
    set_task_ids(again, 0)
    logits(again, x)


def test_modules_to_save_are_kept_and_trained_on(tmp_path: Path) -> None:
    model = routed(modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    start_adaptation(loaded, "z", ["new"])
    parts = {
        name.split(".default")[0].rsplit(".", 1)[-1]
        for name, p in loaded.named_parameters()
        if p.requires_grad
    }
    assert parts == {"mhr_router", "modules_to_save"}


def test_scales_multiply_and_come_back() -> None:
    layer = next(layer for _, layer in find_layers(routed()))
    layer.set_scale("default", 3.0)
    assert layer.scaling["default"] == 6.0
    layer.scale_layer(0.5)
    layer.unscale_layer(0.25)
    assert layer.scaling["default"] == 12.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 2.0


@transformers_loads_adapters
def test_transformers_own_adapter_methods_work(tmp_path: Path) -> None:
    model = tiny_llama()
    torch.manual_seed(1)
    model.add_adapter(config(target_modules=["q_proj", "v_proj"]))
    set_task_ids(model, [2, 0, 1])
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    fresh = tiny_llama()
    fresh.load_adapter(str(tmp_path))
    set_task_ids(fresh, [2, 0, 1])
    assert torch.equal(logits(fresh, tokens()), expected)
    assert model.generate(input_ids=tokens(), num_beams=2, max_new_tokens=2).shape[0] == 3
    base = logits(tiny_llama(), tokens())
    model.disable_adapters()
    assert torch.equal(logits(model, tokens()), base)
    model.enable_adapters()
    assert torch.equal(logits(model, tokens()), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model, tokens()), base)
    model.add_adapter(config(target_modules=["q_proj"], n_tasks=2))
    with pytest.raises(RoutingError, match="has 2 rows"):
        model(input_ids=tokens())


# Routing alone.


def test_routing_alone_turns_shared_skills_to_other_tasks(tmp_path: Path) -> None:
    model = routed()
    shared = tmp_path / "shared"
    model.save_pretrained(shared)
    start_adaptation(model, "z", ["d", "e"])
    set_task_ids(model, ["e", "d", "e"])
    expected = logits(model, tokens())
    save_routing(model, tmp_path / "routing")
    fresh = PeftModel.from_pretrained(tiny_llama(), shared)
    load_routing(fresh, tmp_path / "routing")
    set_task_ids(fresh, ["e", "d", "e"])
    assert torch.equal(logits(fresh, tokens()), expected)
    size = (tmp_path / "routing" / "routing.safetensors").stat().st_size
    assert size < (shared / "adapter_model.safetensors").stat().st_size / 10


def test_routing_of_other_skills_warns_and_of_other_shapes_raises(tmp_path: Path) -> None:
    save_routing(routed(), tmp_path)
    with pytest.warns(UserWarning, match="trained with other skills"):
        load_routing(routed(seed=7), tmp_path)
    for changes, message in (
        ({"n_skills": 4}, "n_skills=5, the model n_skills=4"),
        ({"n_heads": 4}, r"of shape \(3, 2, 5\), the model needs \(3, 4, 5\)"),
        ({"granularity": "block"}, "granularity='linear', the model granularity='block'"),
        ({"target_modules": ["q_proj"]}, "tables for other modules"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_routing(routed(**changes), tmp_path)
    with pytest.raises(CheckpointError, match=r"has no routing.safetensors and no routing.json"):
        load_routing(routed(), tmp_path / "nowhere")


def test_broken_routing_files_are_named_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = routed()
    save_routing(model, tmp_path)
    set_task_ids(model, [0, 1, 2])
    before = logits(model, tokens())
    whole = (tmp_path / "routing.json").read_text(), (tmp_path / "routing.safetensors").read_bytes()
    (tmp_path / "routing.json").write_text(whole[0][:40])
    with pytest.raises(CheckpointError, match="broken routing file"):
        load_routing(model, tmp_path)
    (tmp_path / "routing.json").write_text('{"router": "learned"}')
    with pytest.raises(CheckpointError, match=r"lacks \['n_tasks', .*expected a file of save_routing"):
        load_routing(model, tmp_path)
    (tmp_path / "routing.json").write_text(whole[0])
    (tmp_path / "routing.safetensors").write_bytes(whole[1][:100])
    with pytest.raises(CheckpointError, match="broken routing file"):
        load_routing(model, tmp_path)
    assert torch.equal(logits(model, tokens()), before)


# Other formats.


@pytest.mark.parametrize("n_splits", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_poly_adapter_of_peft_is_equal_in_evaluation(kind: str, n_splits: int, tmp_path: Path) -> None:
    base, task_type = (tiny_t5, "SEQ_2_SEQ_LM") if kind == "t5" else (tiny_llama, "CAUSAL_LM")
    torch.manual_seed(3)
    settings = PolyConfig(
        r=3, n_tasks=4, n_skills=5, n_splits=n_splits, init_weights=False, task_type=task_type,
        target_modules=["q", "v", "wo"] if kind == "t5" else ["q_proj", "v_proj", "down_proj"],
    )  # fmt: skip
    poly = get_peft_model(base(), settings).eval()
    for name, p in poly.named_parameters():
        if "module_logits" in name:
            p.data.normal_()
    poly.save_pretrained(tmp_path)
    model = from_poly(base(), tmp_path).eval()
    ids = torch.tensor([3, 0, 1])
    set_task_ids(model, ids)
    inputs = {"input_ids": tokens()} | ({"decoder_input_ids": tokens(3, 4)} if kind == "t5" else {})
    with torch.no_grad():
        expected = poly(**inputs, task_ids=ids).logits
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.peft_config["default"].task_type == task_type


def test_only_poly_is_read_as_poly(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="LORA adapter; expected POLY"):
        from_poly(tiny_llama(), tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere' has no adapter_config.json"):
        from_poly(tiny_llama(), tmp_path / "nowhere")


@pytest.mark.parametrize("form", ["dict", "lightning", "safetensors"])
def test_a_checkpoint_of_the_authors_library_is_read(form: str, tmp_path: Path) -> None:
    H, S, K, r = 4, 5, 3, 2
    state, updates = {}, {}
    for module, size_in, size_out in (("q", 24, 24), ("wo", 36, 24)):
        A = torch.randn(H, S, size_in // H, r)
        B = torch.randn(H, S, r, size_out // H)
        Z = torch.randn(K, H * S)
        where = (
            "encoder.block.0.layer.0.SelfAttention.q"
            if module == "q"
            else "encoder.block.0.layer.1.DenseReluDense.wo"
        )
        state |= {
            f"model.{where}.lora_a": A,
            f"model.{where}.lora_b": B,
            f"model.{where}.selector.module_logits": Z,
        }
        open_ = torch.sigmoid(Z[2].view(H, S))
        weights = open_ / open_.sum(-1, keepdim=True)
        mixed_A = torch.einsum("qs,qsdr->qdr", weights, A).reshape(size_in, r)
        mixed_B = torch.einsum("qs,qsrd->qrd", weights, B).transpose(0, 1).reshape(r, size_out)
        updates[where] = (mixed_A @ mixed_B).T / r
    checkpoint = state
    if form == "lightning":
        checkpoint = tmp_path / "best.ckpt"
        torch.save({"state_dict": state, "epoch": 3}, checkpoint)
    elif form == "safetensors":
        checkpoint = tmp_path / "best.safetensors"
        save_file(state, checkpoint)
    model = from_mttl(tiny_t5(), checkpoint, task_names=["a", "b", "c"])
    set_task_ids(model, "c")
    layers = dict(find_layers(model.get_base_model()))
    assert layers.keys() == updates.keys()
    for name, update in updates.items():
        torch.testing.assert_close(layers[name].get_delta_weight("default"), update)
    with pytest.raises(CheckpointError, match="fine-grained Poly or MHR"):
        from_mttl(tiny_t5(), {"model.encoder.weight": torch.zeros(2)})


def save_lora(folder: Path, r: int, seed: int, base=tiny_llama, **fields) -> nn.Module:
    torch.manual_seed(seed)
    fields = {"target_modules": ["q_proj", "down_proj"], **fields}
    lora = get_peft_model(base(), LoraConfig(r=r, lora_alpha=5, init_lora_weights=False, **fields)).eval()
    lora.save_pretrained(folder)
    return lora


def test_loras_become_the_skills_and_each_alone_is_itself(tmp_path: Path) -> None:
    folders = [tmp_path / str(n) for n in range(3)]
    loras = [
        save_lora(folders[0], 2, 0),
        save_lora(folders[1], 4, 1, use_rslora=True),
        save_lora(folders[2], 3, 2, rank_pattern={"q_proj": 1}),
    ]
    private = from_loras(tiny_llama(), folders, config(router="private", n_skills=3, n_heads=1)).eval()
    for task, lora in enumerate(loras):
        set_task_ids(private, task)
        torch.testing.assert_close(logits(private, tokens()), logits(lora, tokens()), atol=1e-5, rtol=1e-5)
    model = from_loras(tiny_llama(), folders)
    start_adaptation(model, "z", ["new"])
    assert all("mhr_router" in name for name, p in model.named_parameters() if p.requires_grad)


def test_loras_that_cannot_share_an_inventory_raise(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", 2, 0)
    save_lora(tmp_path / "b", 2, 0, target_modules=["q_proj"])
    save_lora(tmp_path / "c", 2, 0, use_dora=True)
    with pytest.raises(CheckpointError, match="adapts other modules than"):
        from_loras(tiny_llama(), [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(CheckpointError, match="holds no plain LoRA"):
        from_loras(tiny_llama(), [tmp_path / "c"])
    for fields, what in (
        ({"modules_to_save": ["lm_head"]}, r"lm_head.weight"),
        ({"lora_bias": True}, r"lora_B.bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"trainable_token_indices": [3]}, "trainable_tokens"),
    ):
        save_lora(tmp_path / "more", 2, 0, **fields)
        with pytest.raises(CheckpointError, match=f"more than LoRA factors of linears.*{what}"):
            from_loras(tiny_llama(), [tmp_path / "more"])
    with pytest.raises(ConfigError, match="at least one LoRA"):
        from_loras(tiny_llama(), [])
    with pytest.raises(CheckpointError, match=r"nowhere' has no adapter_config.json"):
        from_loras(tiny_llama(), [tmp_path / "nowhere"])


def test_conv1d_loras_become_skills(tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "a", 2, 0, base=tiny_gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = from_loras(tiny_gpt2(), [tmp_path / "a"]).eval()
    torch.testing.assert_close(logits(model, tokens()), logits(lora, tokens()), atol=1e-5, rtol=1e-5)


# As a stock LoRA.


@pytest.mark.parametrize("task", [1, "b", "mean", "usage"])
@pytest.mark.parametrize("granularity", ["linear", "network"])
def test_a_task_is_a_stock_lora(task: str | int, granularity: str, tmp_path: Path) -> None:
    model, x = routed(n_tasks=None, task_names=["a", "b", "c"], granularity=granularity), tokens()
    to_lora(model, tmp_path, task=task)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    if task == "mean":
        start_adaptation(model, "mu")
    elif task == "usage":
        for router in {layer.routers["default"] for _, layer in find_layers(model)}:
            mean = router(torch.arange(3)).mean(0).detach()
            router.logits.data.copy_(
                torch.logit(mean * 0.5).expand(3, -1, -1)
            )  # rows whose weights are the mean
        set_task_ids(model, 0)
    else:
        set_task_ids(model, task)
    torch.testing.assert_close(logits(lora, x), logits(model, x), atol=1e-5, rtol=1e-5)


def test_a_compiled_model_is_written_under_the_names_of_its_own_modules(tmp_path: Path) -> None:
    model = routed()
    to_lora(torch.compile(model, backend="eager"), tmp_path, task=1)
    set_task_ids(model, 1)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(lora, tokens()), logits(model, tokens()), atol=1e-5, rtol=1e-5)


def test_one_lora_cannot_say_several_tasks_or_unknown_ones(tmp_path: Path) -> None:
    model = routed()
    with pytest.raises(RoutingError, match="give task=an id, a name, 'mean' or 'usage'"):
        to_lora(model, tmp_path)
    with pytest.raises(RoutingError, match="Task id 3 is not in the routing table"):
        to_lora(model, tmp_path, task=3)
    start_adaptation(model, "mu")
    to_lora(model, tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), tokens()),
        logits(model, tokens()),
        atol=1e-5,
        rtol=1e-5,
    )
