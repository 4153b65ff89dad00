"""Every base, tuner and objective ends in a plan or in one clear line; planned bytes of detectors."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml

import thawline
from tests.support.plans import base, recipe
from tests.support.text import byte_tokenizer, save_tiny_bert
from thawline.errors import ThawlineError
from thawline.measure import saved_bytes
from thawline.models.deimv2.model import DEIMv2
from thawline.planning.blueprint import draw_blueprint
from thawline.planning.plan import Planner
from thawline.planning.search import plan_within, variants
from thawline.planning.simulate import simulate_step
from thawline.recipe import RunConfig
from thawline.recipe.tuners import PEFT_METHODS, TUNERS
from thawline.training.detection.backbone import tune_backbone
from thawline.training.detection.learner import HostTargets, Learner

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
            found[method] = "" if plan.trained and plan.bytes["saved"] else "an empty plan"
        except ThawlineError as error:
            found[method] = str(error)
    assert not any("\n" in wrong or 0 < len(wrong) < 30 for wrong in found.values()), found
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
    found |= outcomes(values, ["frozen", "ia3", "vera", "prefix_tuning"])
    assert {method for method, wrong in found.items() if not wrong} == {
        "paca",
        "mhr",
        "lora",
        "none",
        "ia3",
        "vera",
    }
    assert "learned tokens" in found["prefix_tuning"]


def test_tuners_of_detectors() -> None:
    found = outcomes(detector(), [method for method in TUNERS if method not in ("lora", "paca", "none")])
    assert {method for method, wrong in found.items() if not wrong} == {"dora", "frozen"}
    assert "a detector has one here" in found["mhr"]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_of_the_repository(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parents[2])
    is_detection = file.parent.name == "deimv2"
    others: dict = {"data": "elsewhere", "base.variant": "atto"} if is_detection else {}
    if file.stem == "domains":
        others |= {"data": ["elsewhere/a", "elsewhere/b"], "base.weights": "elsewhere"}
    try:
        plan = thawline.plan(file, **others)
    except ThawlineError as error:
        found = str(error)
    else:
        found = "" if 0 < plan.trained <= plan.parameters else "an empty plan"
    assert "\n" not in found
    assert not found or not is_detection  # which needs neither a base nor data


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


class Forward:
    """Stands in for a loss: what it keeps is counted, nothing is propagated back."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.kept, self.loss = loss, self

    def backward(self) -> None:
        pass


@pytest.mark.parametrize("method", ["none", "lora", "paca"])
@pytest.mark.parametrize("variant", ["atto", "n", "s"])
def test_saved_bytes_of_a_detector(variant: str, method: str) -> None:
    config = RunConfig.from_mapping(detector(variant, tuner={"method": method}))
    blueprint = draw_blueprint(config)
    batch, _ = blueprint.make_batch(2, None)
    torch.manual_seed(0)
    learner = Learner(tune_backbone(DEIMv2.from_variant(variant, image_size=(64, 64)), config.tuner)).train()
    for trained in (False, True):
        ours, real = (
            sum(p.numel() for p in model.parameters() if p.requires_grad >= trained)
            for model in (blueprint.model, learner)
        )
        assert ours == real
    own = [*learner.parameters(), *learner.buffers()]
    targets = [{"labels": torch.arange(5), "boxes": torch.rand(5, 4) * 0.3 + 0.3} for _ in range(2)]
    pixels = torch.randint(255, (2, 3, 64, 64), dtype=torch.uint8)

    def forward() -> torch.Tensor:
        return torch.stack(list(learner(pixels, HostTargets(targets), epoch=0).values())).sum()

    for autocast in (None, torch.bfloat16):
        planned = simulate_step(
            blueprint.model, batch, lambda *args: Forward(blueprint.loss(*args)), autocast=autocast
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
            assert planned.saved == pytest.approx(saved_bytes(forward, own), rel=0.05), autocast


@pytest.mark.filterwarnings("ignore:apply_lean")
def test_a_detector_without_lean_blocks_says_so() -> None:
    with pytest.raises(ThawlineError, match="'atto' has nothing that can be lean"):
        thawline.plan(detector(lean=True))
    assert "PaCA + lean" not in {name for name, *_ in variants(RunConfig.from_mapping(detector()))}


def test_a_config_in_the_hub_cache_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tmp_path / "models--someone--small"
    for folder in (entry / "refs", entry / "snapshots" / "0123456789abcdef"):
        folder.mkdir(parents=True)
    (entry / "refs" / "main").write_text("0123456789abcdef")
    config = Path(base(tmp_path, n_blocks=1)) / "config.json"
    config.rename(entry / "snapshots" / "0123456789abcdef" / "config.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert thawline.plan(recipe("someone/small"), tuner="none").parameters == 13_984
    with pytest.raises(ThawlineError, match="someone/absent"):
        thawline.plan(recipe("someone/absent"))


@pytest.mark.parametrize("share", [1.0, 0.9995])
def test_the_chosen_recipe_trains(tmp_path: Path, rows: Path, share: float) -> None:
    model = base(tmp_path, n_blocks=1, vocab_size=len(byte_tokenizer()))
    transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(model)).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    values = recipe(
        model,
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
