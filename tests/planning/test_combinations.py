"""Every base, tuner and objective ends in a plan or in one clear line; detectors beside the hooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import thawline
from tests.support.plans import base, recipe
from tests.support.text import byte_tokenizer, save_tiny_bert
from thawline.errors import ThawlineError
from thawline.measure import saved_bytes
from thawline.models.deimv2.model import DEIMv2
from thawline.ops.lean import apply_lean
from thawline.planning.plan import Planner
from thawline.planning.search import plan_within
from thawline.planning.simulate import simulate_step
from thawline.recipe import RunConfig
from thawline.recipe.tuners import PEFT_METHODS, TUNERS
from thawline.training.detection.backbone import tune_backbone
from thawline.training.detection.learner import HostTargets, Learner
from thawline.training.objective import build_objective

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
OWN = [name for name in TUNERS if name not in PEFT_METHODS]
PLANNED_PEFT = {
    "beft", "boft", "deft", "delora", "glora", "gralora", "hira", "hra", "ia3", "lily", "ln_tuning", "oft",
    "osf", "peanut", "pvera", "randlora", "shadow", "supertuning", "tinylora", "unilora", "vera",
}  # fmt: skip
"""Those that a base of 32 features can have without further settings."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = ({"input": f"a{i}", "output": "a", "choices": ["a", "b"], "task": f"t{i % 2}"} for i in range(4))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def outcomes(values: dict, methods: list[str], **options: object) -> dict[str, str]:
    """Plan with each tuner; return why there is no plan, or "" where there is."""
    found = {}
    for method in methods:
        try:
            plan = Planner(RunConfig.from_mapping({**values, "tuner": {"method": method}}), **options).plan()
            assert plan.trained > 0 and plan.bytes["saved"] > 0, method
            found[method] = ""
        except ThawlineError as error:
            found[method] = str(error)
            assert "\n" not in found[method] and len(found[method]) > 30, method
    return found


def detector(variant: str = "atto", **sections: object) -> dict:
    values = {"objective": "detection", "base": {"variant": variant, "size": 64}, "data": "elsewhere"}
    return {**values, "training": {"batch_size": 2}, **sections}


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration", "BertForSequenceClassification"]
)
def test_tuners_of_texts(tmp_path: Path, rows: Path, architecture: str) -> None:
    methods = list(TUNERS) if architecture.startswith("Llama") else OWN
    values = recipe(base(tmp_path, architecture, 1), data={"path": str(rows), "max_length": 12})
    found = outcomes(values, methods)
    planned = {method for method, wrong in found.items() if not wrong}
    assert planned & {*OWN} == {*OWN} - {"frozen"}
    assert "trains nothing" in found["frozen"]
    if len(methods) > len(OWN):
        assert planned >= PLANNED_PEFT
        assert "num_virtual_tokens" in found["prompt_tuning"]


def test_tuners_of_matching(tmp_path: Path, rows: Path) -> None:
    values = recipe(str(save_tiny_bert(tmp_path)), objective="match", data=str(rows))
    found = outcomes(values, ["paca", "mhr", "lora", "none"])
    assert not any(found.values()), found
    objective = build_objective(RunConfig.from_mapping({**values, "tuner": "none"}))
    for method in (*PEFT_METHODS, "frozen"):
        objective.config = RunConfig.from_mapping({**values, "tuner": {"method": method}})
        found[method] = outcomes(values, [method], objective=objective)[method]
    assert {method for method, wrong in found.items() if not wrong} >= {"ia3", "vera", "oft"}
    assert "learned tokens" in found["prefix_tuning"]


def test_tuners_of_detectors() -> None:
    found = outcomes(detector(), [method for method in TUNERS if method not in ("lora", "paca", "none")])
    assert {method for method, wrong in found.items() if not wrong} == {"dora", "frozen"}
    assert "a detector has one" in found["mhr"]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_of_the_repository(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parents[2])
    try:
        plan = thawline.plan(file)
    except ThawlineError as error:
        assert "\n" not in str(error)
        assert "detection" not in file.read_text(), error  # a detector needs neither a base nor data
    else:
        assert 0 < plan.trained <= plan.parameters


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_keeps_no_original_columns(tmp_path: Path, quantization: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    values = recipe(base(tmp_path, n_blocks=1, **sizes), tuner={"method": "paca", "r": 8})
    values["base"]["dtype"] = "bfloat16"
    plain = thawline.plan(values).bytes
    values["base"]["quantization"] = quantization
    parts = thawline.plan(values).bytes
    n_indices = 7 * 8  # linear layers of a block, columns of each
    narrow = 2 * 32 * 8 * 2  # key and value with 32 rows are too small to be quantised
    assert parts["tuner"] == 2 * 8 * n_indices + narrow < plain["tuner"]
    assert parts["weights"] + parts["quantised"] < plain["weights"]


@pytest.mark.parametrize(
    ("method", "lean"), [("none", False), ("lora", False), ("paca", False), ("paca", True)]
)
@pytest.mark.parametrize("variant", ["atto", "n", "s"])
def test_saved_bytes_of_a_detector(variant: str, method: str, lean: bool) -> None:
    config = RunConfig.from_mapping(detector(variant, tuner={"method": method}, lean=lean))
    planner = Planner(config)
    torch.manual_seed(0)
    model = DEIMv2.from_variant(variant, image_size=(64, 64))
    if lean:
        apply_lean(model)
    learner = Learner(tune_backbone(model, config.tuner)).train()
    targets = [{"labels": torch.arange(5), "boxes": torch.rand(5, 4) * 0.3 + 0.3} for _ in range(2)]
    pixels = torch.randint(255, (2, 3, 64, 64), dtype=torch.uint8)

    def forward(mixed: bool) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            return torch.stack(list(learner(pixels, HostTargets(targets), epoch=0).values())).sum()

    blueprint = planner.blueprint
    batch, _ = blueprint.make_batch(2, None)
    mixed = simulate_step(blueprint.model, batch, blueprint.loss, autocast=torch.bfloat16)
    plan = planner.plan()
    for planned, is_mixed in ((plan.bytes["saved"], False), (mixed.saved, True)):
        saved = saved_bytes(
            lambda is_mixed=is_mixed: forward(is_mixed), [*learner.parameters(), *learner.buffers()]
        )
        assert planned == pytest.approx(saved, rel=0.05), is_mixed
    assert plan.parameters == sum(p.numel() for p in learner.parameters())
    assert plan.trained == sum(p.numel() for p in learner.parameters() if p.requires_grad)


def test_a_config_in_the_hub_cache_is_enough(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--someone--small" / "snapshots" / "0123456789abcdef"
    (Path(base(tmp_path, n_blocks=1)) / "config.json").rename(tmp_path / "config.json")
    snapshot.mkdir(parents=True)
    (tmp_path / "config.json").rename(snapshot / "config.json")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    file = tmp_path / "recipe.yaml"
    outcomes = []
    for model in ("someone/small", "someone/absent"):
        file.write_text(yaml.safe_dump(recipe(model)))
        outcomes.append(
            subprocess.run(
                [sys.executable, "-m", "thawline", "plan", "--config", str(file), "--json"],
                env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
            )
        )
    there, absent = outcomes
    assert json.loads(there.stdout)["parameters"] > 0, there.stderr
    assert absent.returncode == 2 and absent.stderr.count("\n") == 1, absent.stderr
    assert "someone/absent" in absent.stderr


@pytest.mark.parametrize("share", [1.0, 0.9995])
def test_the_chosen_recipe_trains(tmp_path: Path, rows: Path, share: float) -> None:
    model = Path(base(tmp_path, n_blocks=1, vocab_size=len(byte_tokenizer())))
    byte_tokenizer().save_pretrained(model)
    values = recipe(
        str(model),
        data={"path": str(rows), "max_length": 16},
        training={"batch_size": 4, "max_steps": 2},
        folder=str(tmp_path / "runs"),
    )
    total = thawline.plan(values, tuner="none").bytes["total"]
    chosen, plan = plan_within(RunConfig.from_mapping(values), int(share * total), 3600)
    assert (chosen.tuner.method == "none" and chosen.training.batch_size == 4) == (share == 1.0)
    file = tmp_path / "chosen.yaml"
    file.write_text(yaml.safe_dump(chosen.to_mapping()))
    result = thawline.train(file)
    assert result.steps == 2
    parts = json.loads((result.folder / "plan.json").read_text())["memory"]
    assert parts["weights"] == plan.bytes["weights"]
