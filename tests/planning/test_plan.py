"""Plans against what the real training step keeps, allocates and holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import nn

import thawline
from tests.support.detection_runs import TINY, write_painted_coco
from tests.support.plans import CONFIGS, LENGTH, ROWS, base, recipe
from tests.support.text import save_tiny_bert
from thawline.cli import main
from thawline.errors import ConfigError
from thawline.measure import saved_bytes
from thawline.models.deimv2 import DEIMv2
from thawline.planning import search
from thawline.planning.blueprint import draw_blueprint
from thawline.planning.depth import find_stacks
from thawline.planning.plan import Planner, read_bytes
from thawline.planning.search import largest, plan_within, read_seconds
from thawline.planning.simulate import simulate_step
from thawline.recipe import RunConfig
from thawline.training.objective import build_objective
from thawline.training.trainer import smoothed_loss
from thawline.tuners.build import attach_tuner

METHODS = {
    "full": {"tuner": {"method": "none"}},
    "lora": {"tuner": {"method": "lora", "r": 4}},
    "paca": {"tuner": {"method": "paca", "r": 8}},
    "paca_lean": {"tuner": {"method": "paca", "r": 8}, "lean": True},
}


def real_model(values: dict) -> nn.Module:
    config = RunConfig.from_mapping(values)
    base = transformers.AutoConfig.from_pretrained(config.base.model)
    model = getattr(transformers, base.architectures[0])._from_config(
        base, dtype=getattr(torch, config.base.dtype)
    )
    if config.lean:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            thawline.apply_lean(model)
    return attach_tuner(model, config.tuner).train()


def step(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 97, (ROWS, LENGTH))
    is_classifier = "Classification" in str(model.config.architectures)
    labels = torch.zeros(ROWS, dtype=torch.long) if is_classifier else ids.clone()
    return model(input_ids=ids, labels=labels).loss


@pytest.mark.filterwarnings("ignore:apply_lean")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_saved_bytes_are_those_of_the_hooks(tmp_path: Path, architecture: str, method: str) -> None:
    for dtype, n_blocks in (("float32", 2), ("bfloat16", 1)):
        values = recipe(base(tmp_path, architecture, n_blocks), **METHODS[method])
        values["base"]["dtype"] = dtype
        plan = thawline.plan(values)
        model = real_model(values)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        saved = saved_bytes(lambda model=model: step(model), [*model.parameters(), *model.buffers()])
        assert plan.bytes["saved"] == pytest.approx(saved, rel=0.01), dtype
        assert plan.parameters == sum(p.numel() for p in model.parameters())
        assert plan.trained == sum(p.numel() for p in trained)
        assert plan.bytes["weights"] == sum(p.nbytes for p in model.parameters())
        assert plan.bytes["gradients"] == sum(p.nbytes for p in trained)
        assert plan.bytes["optimizer"] == sum(value.nbytes for value in states)
        assert sum(plan.bytes.values()) == 2 * plan.bytes["total"]


@pytest.mark.parametrize(
    ("architecture", "fields", "tuner"),
    [
        ("LlamaForCausalLM", {}, "none"),
        ("LlamaForCausalLM", {"gradient_checkpointing": True}, "paca"),
        ("LlamaForCausalLM", {"gradient_accumulation": 2}, "mhr"),
        ("Gemma3ForCausalLM", {}, "paca"),
        ("T5ForConditionalGeneration", {}, "lora"),
    ],
)
def test_a_deep_model_costs_what_a_few_of_its_blocks_say(
    tmp_path: Path, architecture: str, fields: dict, tuner: str
) -> None:
    n_blocks = 12 if "Gemma" in architecture else 7
    kinds = (
        {"layer_types": ["sliding_attention", "full_attention"] * (n_blocks // 2)} if n_blocks == 12 else {}
    )
    folder = base(tmp_path, architecture, n_blocks, **kinds)
    values = recipe(folder, tuner=tuner, training={"batch_size": ROWS, **fields})
    blueprint = draw_blueprint(RunConfig.from_mapping(values))
    stacks = find_stacks(blueprint.model.get_base_model() if tuner != "none" else blueprint.model)
    assert [stack.n_periods for stack in stacks] == {"T": [6, 6], "G": [6]}.get(architecture[0], [7])
    few, whole = (
        simulate_step(
            blueprint.model, blueprint.make_batch(ROWS, LENGTH)[0], blueprint.loss, whole=is_whole,
            keep_gradients=blueprint.accumulation > 1,
        )
        for is_whole in (False, True)
    )  # fmt: skip
    exact = ("saved", "flops", "moved", "n_ops")
    assert {key: getattr(few, key) for key in exact} == {key: getattr(whole, key) for key in exact}
    assert few.peak == pytest.approx(whole.peak, rel=1e-3)


def test_mixed_precision_checkpointing_and_accumulation_count(tmp_path: Path) -> None:
    model = base(tmp_path)
    plain = thawline.plan(recipe(model, tuner="none"))
    mixed = thawline.plan(recipe(model, tuner="none"), **{"training.precision": "bf16"})
    autocast = real_model(recipe(model, tuner="none"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        saved = saved_bytes(lambda: step(autocast), [*autocast.parameters(), *autocast.buffers()])
    assert mixed.bytes["saved"] == saved != plain.bytes["saved"]
    again = thawline.plan(recipe(model, tuner="none"), **{"training.gradient_checkpointing": True})
    assert again.bytes["saved"] < 0.6 * plain.bytes["saved"]
    assert again.bytes["total"] < plain.bytes["total"]
    twice = thawline.plan(recipe(model, tuner="none"), **{"training.gradient_accumulation": 2})
    assert twice.bytes["total"] > plain.bytes["total"]
    assert twice.seconds_per_step > 1.5 * plain.seconds_per_step


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_label_smoothing_counts(tmp_path: Path, architecture: str) -> None:
    values = recipe(base(tmp_path, architecture, 1), tuner="none")
    plan = thawline.plan(values, **{"training.args": {"label_smoothing_factor": 0.1}})
    model = real_model(values)
    ids = torch.randint(3, 97, (ROWS, LENGTH))
    saved = saved_bytes(
        lambda: smoothed_loss(
            model, {"input_ids": ids, "labels": ids}, 0.1, shifted=architecture == "LlamaForCausalLM"
        ),
        [*model.parameters(), *model.buffers(), ids],
    )
    assert plan.bytes["saved"] == pytest.approx(saved, rel=0.01)


def test_peak_is_what_a_step_allocates(tmp_path: Path) -> None:
    values = recipe(base(tmp_path), tuner="none")
    plan = thawline.plan(values)
    model, live, peak = real_model(values), 0, 0
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step(model).backward()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    static = plan.bytes["weights"] + plan.bytes["buffers"] + plan.bytes["optimizer"] + plan.bytes["overhead"]
    assert plan.bytes["total"] - static == pytest.approx(peak, rel=0.1)


STEP = """
import re, sys
from pathlib import Path
import torch, yaml
from transformers import AutoConfig, LlamaForCausalLM
from thawline.recipe import RunConfig
from thawline.training.trainer import smoothed_loss
from thawline.tuners.build import attach_tuner
from thawline.training.trainer import Trainer

torch.set_num_threads(1)
config = RunConfig.from_mapping(yaml.safe_load(sys.argv[1]))
model = LlamaForCausalLM(AutoConfig.from_pretrained(config.base.model))
model = attach_tuner(model, config.tuner).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
ids = torch.randint(3, 97, (config.training.batch_size, config.data.max_length))
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_resident_memory_of_a_step_is_within_a_fifth(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408}
    values = recipe(base(tmp_path, n_blocks=2, **sizes), tuner="none", training={"batch_size": 12})
    values["data"]["max_length"] = 128
    parts = thawline.plan(values).bytes
    total = parts["total"]
    assert total > 1.7 * parts["overhead"]  # which is an assumption
    command = [sys.executable, "-c", STEP, yaml.safe_dump(values)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert total == pytest.approx(1024 * int(found.stdout), rel=0.2)


def test_devices_divide_what_they_share(tmp_path: Path) -> None:
    values = recipe(base(tmp_path), tuner="none")
    alone = thawline.plan(values)
    for sharding, divided in {"zero1": {"optimizer"}, "fsdp2": {"optimizer", "gradients", "weights"}}.items():
        four = thawline.plan(values, devices=4, sharding=sharding)
        for part in ("optimizer", "gradients", "weights", "saved"):
            assert four.bytes[part] == alone.bytes[part] // (4 if part in divided else 1), (sharding, part)
    with pytest.raises(ConfigError, match="Unknown sharding 'zero4'"):
        thawline.plan(values, sharding="zero4")


def test_a_device_that_is_not_there_is_estimated(tmp_path: Path) -> None:
    plan = thawline.plan(recipe(base(tmp_path, "GPT2LMHeadModel", 1)), device="h100")
    assert "estimated" in plan.device
    assert any("40%" in text for text in plan.assumptions)
    with pytest.raises(ConfigError, match="`tuner: frozen` trains nothing"):
        thawline.plan(recipe(base(tmp_path), tuner="frozen"))
    with pytest.raises(ConfigError, match="Unknown device 'h10'"):
        thawline.plan(recipe(base(tmp_path)), device="h10")


def test_rows_that_are_there_give_steps_tasks_and_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"input": "a", "output": "xyz"[i % 3], "task": f"t{i % 2}"} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = recipe(base(tmp_path), tuner="mhr", data={"path": str(file), "max_length": LENGTH})
    plan = thawline.plan(values)
    assert plan.steps == 15  # 10 rows, 2 a step, 3 epochs
    one_task = thawline.plan(recipe(base(tmp_path), tuner="mhr"))
    assert plan.trained > one_task.trained
    values = recipe(base(tmp_path, "BertForSequenceClassification"), tuner="none", data=str(file))
    values["base"]["head"] = "classifier"
    two = thawline.plan(recipe(base(tmp_path, "BertForSequenceClassification"), tuner="none"))
    assert thawline.plan(values).parameters == two.parameters + 32 + 1


def test_a_detector_is_planned_as_its_weights_say(tmp_path: Path) -> None:
    data, weights = str(write_painted_coco(tmp_path)), tmp_path / "base"
    DEIMv2.from_variant("atto", class_names=("red", "green"), **TINY).save_pretrained(weights)
    values = {"base": {"variant": "atto", "size": 64, "weights": str(weights)}, "data": data}
    values |= {"objective": "detection", "training": {"batch_size": 2}}
    for tuner in ("none", "paca"):
        model = build_objective(RunConfig.from_mapping(values | {"tuner": tuner})).build_model()
        plan = thawline.plan(values | {"tuner": tuner})
        assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_match_is_planned_from_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input": "ab", "output": "a", "choices": ["a", "b"]}\n' * 4)
    model = save_tiny_bert(tmp_path)
    plan = thawline.plan(recipe(str(model), objective="match", data=str(file)))
    assert "2 choices" in plan.shape
    assert plan.bytes["saved"] > 0


def test_a_model_that_reads_values_ends_in_one_line(tmp_path: Path) -> None:
    values = recipe(base(tmp_path, "MixtralForCausalLM"), tuner="none")
    file = Path(values["base"]["model"]) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"experts_implementation": "eager"}))
    with pytest.raises(ConfigError, match="No plan for .*Mixtral.*training.max_steps: 1"):
        thawline.plan(values)


def test_search_finds_the_largest_multiple() -> None:
    assert largest(lambda n: 10 + 3 * n, 100) == 30
    assert largest(lambda n: n * n, 10_000, step=8) == 96
    assert largest(lambda n: max(50, n * n - 40), 100) == 11
    assert largest(lambda n: 200, 100) == 0
    assert read_bytes("24GB") == 24 * 10**9
    assert read_bytes("1.5 GiB") == 3 << 29
    assert read_seconds("1.5h") == 5400
    for wrong, read in (("24 apples", read_bytes), ("soon", read_seconds)):
        with pytest.raises(ConfigError, match=wrong):
            read(wrong)


def test_fit_gives_paca_longer_sequences_than_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "METHODS", {name: search.METHODS[name] for name in ("LoRA", "PaCA", "QPaCA")})
    config = RunConfig.from_mapping(recipe(base(tmp_path, n_blocks=1)))
    sizes = search.fit(config, 504 << 20)
    assert sizes["QPaCA"]["length"] >= sizes["PaCA"]["length"] > sizes["LoRA"]["length"] > 0
    planner = Planner(
        RunConfig.from_mapping(recipe(base(tmp_path, n_blocks=1), tuner={"method": "paca", "r": 16}))
    )
    for part, size, step in (
        ("length", (1, sizes["PaCA"]["length"]), (0, 64)),
        ("batch", (sizes["PaCA"]["batch"], LENGTH), (1, 0)),
    ):
        assert planner.bytes(*size)["total"] <= 504 << 20, part
        assert planner.bytes(size[0] + step[0], size[1] + step[1])["total"] > 504 << 20, part


def test_within_keeps_the_rows_of_a_step(tmp_path: Path) -> None:
    values = recipe(base(tmp_path), training={"batch_size": 8, "max_steps": 10})
    values["data"]["max_length"] = 64
    config = RunConfig.from_mapping(values)
    full = thawline.plan(values, tuner="none").bytes["total"]
    chosen, plan = plan_within(config, full - 1_000_000, 3600)
    assert plan.fits(full - 1_000_000)
    assert chosen.training.batch_size * chosen.training.gradient_accumulation == 8
    with pytest.raises(ConfigError, match="No setting fits"):
        plan_within(config, full, 1e-9)


@pytest.mark.parametrize("kind", ["match", "detection"])
def test_training_says_what_it_needs_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input": "ab", "output": "a", "choices": ["a", "b"]}\n' * 4)
    if kind == "detection":
        base = {"variant": "atto", "size": 64, "overrides": TINY}
        values = {"base": base, "tuner": "none", "data": str(write_painted_coco(tmp_path))}
    else:
        values = recipe(str(save_tiny_bert(tmp_path)), data=str(file))
    values |= {"objective": kind, "training": {"batch_size": 2, "max_steps": 1}}
    monkeypatch.setattr("thawline.run.available_bytes", lambda device: 1000)
    folder = thawline.train(values, dry_run=True, folder=str(tmp_path / "runs")).folder
    found = json.loads((folder / "plan.json").read_text())
    assert found["memory"]["total"] > 0
    assert "of 1000 B available" in found["overview"]["memory"]
    assert "will probably not fit" in caplog.text


def test_command_prints_the_keys_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(base(tmp_path))))
    assert main(["plan", "--config", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"parameters", "trained", "bytes", "seconds_per_step"} <= found.keys()
    parts = {"weights", "gradients", "optimizer", "tuner", "saved", "loss", "total"}
    assert parts <= found["bytes"].keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # planned models that live side by side are of no concern
        assert main(["plan", "--config", str(file), "--compare"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("full", "LoRA bf16", "PaCA + lean", "QPaCA", "MHR"))
    out = tmp_path / "chosen.yaml"
    words = ["--fit", "1GB", "--within", "2h", "--out", str(out), "--training.max_steps", "3"]
    assert main(["plan", "--config", str(file), *words]) == 0
    assert RunConfig.from_mapping(yaml.safe_load(out.read_text())).tuner.method == "none"
    assert main(["plan", "--config", str(file), "--within", "2h"]) == 2


def test_planning_leaves_the_state_of_a_launched_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = PartialState, AcceleratorState
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for kind in kinds:
        monkeypatch.setattr(kind, "_shared_state", {"distributed_type": DistributedType.DEEPSPEED})
    thawline.plan(recipe(base(tmp_path), tuner="lora"))
    assert [kind._shared_state for kind in kinds] == [{"distributed_type": DistributedType.DEEPSPEED}] * 2
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
