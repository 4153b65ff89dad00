"""Several datasets in one detection run: one trunk, class heads of each, a domain each; new ones from MHR."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.detection_runs import NAMES, assert_same, forget_after, state_of, write_painted_coco
from tests.support.domains import make_base
from thawline import SharedDetector, jobs
from thawline.analysis.gradients import gradient_alignment
from thawline.domains.attach import is_class_layer
from thawline.domains.domain import base_digest, load_domain, read_domain
from thawline.errors import CheckpointError, ConfigError, DataError, RoutingError
from thawline.models.deimv2 import DEIMv2
from thawline.planning.blueprint import draw_blueprint
from thawline.planning.plan import Planner
from thawline.recipe import RunConfig
from thawline.report.run_report import build_report
from thawline.run import measure_alignment, run
from thawline.training.detection.detectors import Detectors
from thawline.training.objective import build_objective
from thawline.tuners.mhr.layer import linear_sizes

SETS = {"discs": NAMES, "plates": ("green", "blue")}
MHR = {"method": "mhr", "r": 2, "n_skills": 3, "target_modules": r".*(aggregation\.\d\.conv|out_proj)"}
TUNERS: dict[str, Any] = {
    "none": "none",
    "paca": {"method": "paca", "r": 2, "target_modules": r".*out_proj"},
    "mhr": MHR,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two sets of different classes and a third one, and runs."""
    folder = tmp_path_factory.mktemp("several")
    make_base().save_pretrained(folder / "base")
    for name in (*SETS, "new"):
        (folder / name).mkdir()
        write_painted_coco(folder / name)
    for file in (folder / "plates").glob("*.json"):  # without red, the first class
        content = json.loads(file.read_text())
        for part, key in (("categories", "id"), ("annotations", "category_id")):
            content[part] = [one for one in content[part] if one[key] != 10]
        file.write_text(json.dumps(content))
    return folder


def recipe(folder: Path, name: str, tuner: Any = "frozen", **changes: Any) -> RunConfig:
    mapping: dict[str, Any] = {
        "objective": {"kind": "detection", "strong_augmentation": True},
        "base": {"variant": "atto", "weights": str(folder / "base"), "overrides": {"num_denoising": 6}},
        "tuner": tuner,
        "data": [str(folder / one) for one in SETS],
        "training": {"epochs": 2, "batch_size": 2, "log_every": 1, "lr": 0.01},
        "name": name,
        "folder": str(folder / "runs"),
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            given = mapping[section] if isinstance(mapping[section], dict) else {"path": mapping[section]}
            mapping[section] = {**given, field: value}
        else:
            mapping[section] = value
    return RunConfig.from_mapping(mapping)


@pytest.fixture(scope="module")
def base(folder: Path) -> DEIMv2:
    return DEIMv2.from_pretrained(folder / "base")


@pytest.fixture(scope="module", params=TUNERS)
def trained(request: pytest.FixtureRequest, folder: Path) -> Path:
    return run(recipe(folder, request.param, TUNERS[request.param], training__epochs=1)).folder


@pytest.fixture(scope="module")
def skills(folder: Path) -> Path:
    """A run of MHR on both sets, with checkpoints of every epoch."""
    return run(recipe(folder, "skills", MHR, training__keep_checkpoints=9, training__align_every=6)).folder


def test_each_dataset_becomes_a_domain_of_one_base(trained: Path, base: DEIMv2) -> None:
    kept = DEIMv2.from_pretrained(trained / "model" / "base")
    is_whole = trained.name == "none"
    assert (base_digest(kept) == base_digest(base)) is not is_whole
    weights = {}
    for name, classes in SETS.items():
        about = read_domain(trained / "domains" / name)
        assert (about.name, about.class_names) == (name, classes)
        assert about.base == base_digest(kept)
        assert about.tuner == ("frozen" if is_whole else trained.name)
        weights[name] = load_domain(kept, trained / "domains" / name).state_dict()
        stored = sum(f.stat().st_size for f in (trained / "domains" / name).glob("*.safetensors"))
        # An index of PaCA's columns has eight bytes; names and shapes take the rest.
        assert abs(stored - 4 * about.parameters) < 0.5 * stored
    trunk = [name for name in weights["discs"] if not is_class_layer(name)]
    changed = [name for name in trunk if not torch.equal(weights["discs"][name], base.state_dict()[name])]
    own = [name for name in trunk if not torch.equal(*(weights[one][name] for one in SETS))]
    assert changed
    assert bool(own) == (trained.name == "mhr")  # the others share all but the class layers
    assert set(own) <= set(changed)


def test_every_dataset_is_scored_and_the_mean_decides(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    scores = [result["parts"][name]["AP"] for name in SETS]
    assert result["metrics"]["AP"] == pytest.approx(np.mean(scores))
    assert [result["metrics"][f"{name}/AP"] for name in SETS] == scores
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert max(row["eval_AP"] for row in rows if "eval_AP" in row) <= result["metrics"]["AP"] + 1e-9
    assert {f"eval_{name}/AP" for name in SETS} <= {key for row in rows for key in row}
    for name in SETS:
        assert (trained / "pictures" / f"worst-{name}.png").is_file()
        assert (trained / f"detection_metrics-{name}.json").is_file()
    predictions = (trained / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["dataset"] for line in predictions] == ["discs"] * 2 + ["plates"] * 2


def test_the_run_is_used_by_domain_as_a_shared_folder(trained: Path, folder: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    shop = folder / f"shop-{trained.name}"
    assert jobs.add_domain(shop, trained) == list(SETS)
    found = jobs.evaluate_domains(shop)
    for name in SETS:
        assert found[name].metrics["AP"] == pytest.approx(result["parts"][name]["AP"], abs=1e-6)
    assert jobs.evaluate(trained).metrics["AP"] == pytest.approx(result["metrics"]["AP"], abs=1e-6)
    if trained.name == "none":
        (measured,) = measure_alignment(trained)
        assert (measured["step"], measured["n_tasks"]) == (result["steps"], 2)
    shared = SharedDetector.from_pretrained(trained, device="cpu")
    assert shared.domains == tuple(SETS)
    found = shared(np.zeros((64, 64, 3), np.uint8), domain="plates", threshold=0.0)
    assert set(found.data["class_name"]) <= set(SETS["plates"])


def test_members_share_all_but_their_class_layers(folder: Path) -> None:
    objective = build_objective(recipe(folder, "unused", MHR), described={})
    model = objective.build_model()
    assert isinstance(model, Detectors)
    first, second = (model.member(number) for number in range(2))
    for name, parameter in first.named_parameters():
        assert (dict(second.named_parameters())[name] is parameter) is not is_class_layer(name)
    pixels = torch.rand(2, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        for number, name in enumerate(SETS):
            member = model.member(number)
            found = member(pixels).logits
            assert found.shape[-1] == len(SETS[name])
            member.backbone.train()  # its norms stay as they are
            torch.testing.assert_close(model.member(number)(pixels).logits, found)


def test_a_resumed_run_ends_as_if_it_had_never_stopped(skills: Path, folder: Path) -> None:
    resumed = skills.with_name("resumed")
    shutil.copytree(skills, resumed)
    shutil.rmtree(resumed / "domains")
    n_steps = json.loads((skills / "result.json").read_text())["steps"]
    forget_after(resumed, n_steps // 2)
    config = recipe(folder, "resumed", MHR, training__keep_checkpoints=9, training__align_every=6)
    run(config, resume=True)
    assert_same(*(state_of(one / f"checkpoint-{n_steps}") for one in (skills, resumed)))
    for file in ("adapter_model.safetensors", "heads.safetensors"):
        assert len({(one / "domains" / "plates" / file).read_bytes() for one in (skills, resumed)}) == 1


@pytest.mark.parametrize("adapt", ["z", "mu", "full"])
def test_a_new_dataset_starts_from_the_skills(skills: Path, folder: Path, base: DEIMv2, adapt: str) -> None:
    tuner = {"method": "mhr", "start_from": str(skills), "adapt": adapt}
    changes = {"data": str(folder / "new"), "domain": "new", "training__epochs": 1}
    config = recipe(folder, f"new-{adapt}", tuner, **changes)
    done = run(config)
    about = read_domain(done.folder / "domains" / "new")
    adapter = json.loads((done.folder / "domains" / "new" / "adapter_config.json").read_text())
    assert (about.tuner, adapter["peft_type"], adapter["r"]) == ("mhr", "LORA", 2)
    groups = json.loads((done.folder / "plan.json").read_text())["parameter_groups"]
    routing = next(group["parameters"] for group in groups if group["name"] == "routing")
    n_layers = len(adapter["target_modules"])
    assert routing == (0 if adapt == "mu" else n_layers * 3 * 4)
    of_adapter, of_heads = (
        sum(tensor.numel() for tensor in load_file(done.folder / "domains" / "new" / file).values())
        for file in ("adapter_model.safetensors", "heads.safetensors")
    )
    assert about.parameters == of_adapter + of_heads
    assert json.loads((done.folder / "plan.json").read_text())["domains"] == {"new": 4 * about.parameters}
    assert done.trainable == routing + {"z": 0, "mu": 1, "full": 3}[adapt] * of_adapter + of_heads
    merged = DEIMv2.from_pretrained(done.folder / "model").state_dict()
    alone = load_domain(base, done.folder / "domains" / "new").state_dict()
    for name, tensor in alone.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
    assert jobs.evaluate(done.folder).metrics["AP"] == pytest.approx(done.metrics["AP"], abs=1e-9)


def test_routes_are_shown_and_the_plan_counts_batches(skills: Path) -> None:
    found = jobs.align(skills)
    assert found["routing"]["tasks"] == list(SETS)
    assert [row["step"] for row in found["alignment"]["skills"]["steps"]] == [6, 12]
    page = build_report(skills).read_text()
    assert all(f"Detection: {name}" in page for name in SETS)
    plan = json.loads((skills / "plan.json").read_text())
    assert plan["batches"] == {"discs": 3, "plates": 3}
    assert plan["steps"] == 12


def test_alignment_is_the_cosine_of_the_gradients_that_datasets_share(folder: Path) -> None:
    config = recipe(folder, "unused", "none", training__batch_size=6)
    objective = build_objective(config, described={})
    model, batches = objective.build_model(), objective.alignment_batches()
    assert {name: len(found) for name, found in batches.items()} == dict.fromkeys(SETS, 1)
    found = gradient_alignment(model, batches, objective.loss)
    shared = [p for name, p in model.member(0).named_parameters() if not is_class_layer(name)]
    gradients = []
    for (batch,) in batches.values():
        loss = objective.loss(model.eval(), batch)
        parts = torch.autograd.grad(loss, shared, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert found.skill.mean_cosine == pytest.approx(expected.item(), abs=1e-4)
    assert abs(expected) > 0.01


@pytest.mark.parametrize("tuner", ["frozen", {"method": "lora", "r": 2, "target_modules": ".*out_proj"}, MHR])
def test_what_trains_is_the_adapter_and_the_heads_of_each(folder: Path, base: DEIMv2, tuner: Any) -> None:
    config = recipe(folder, "dry", tuner, data__sampling="equal", data__max_images=4)
    found = run(config, dry_run=True)
    plan = json.loads((found.folder / "plan.json").read_text())
    assert plan["batches"] == {"discs": 2, "plates": 2}
    per_class, fixed = 5 * base.config.decoder.hidden_dim + 4, base.config.decoder.hidden_dim
    heads = sum(per_class * len(classes) + fixed for classes in SETS.values())
    targets = "" if tuner == "frozen" else tuner["target_modules"]
    layers = [module for name, module in base.named_modules() if name and re.fullmatch(targets, name)]
    adapter = 2 * sum(sum(linear_sizes(layer)) for layer in layers)
    if tuner is MHR:
        adapter = 3 * adapter + len(layers) * len(SETS) * 3 * 4  # skills; logits of tasks, skills and heads
    assert found.trainable == heads + adapter
    planned = draw_blueprint(config)
    assert sum(p.numel() for p in planned.model.parameters() if p.requires_grad) == found.trainable
    if tuner is MHR:
        assert Planner(config).bytes()["saved"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tuner": {"method": "ia3"}}, ConfigError, "cannot make a domain"),
        ({"base__weights": None, "tuner": "lora"}, ConfigError, "give it as `base.weights`"),
        ({"objective__preset": "published", "tuner": "none"}, ConfigError, "is for one dataset"),
        ({"domain": "x"}, ConfigError, "each is a domain"),
        ({"data__images": "images"}, ConfigError, "`data.images` is for one dataset"),
        ({"data": ["discs", "x/discs"]}, ConfigError, "both called 'discs'"),
        ({"data": ["discs/annotations/a.json", "x/discs/annotations/b.json"]}, ConfigError, "called 'discs'"),
        ({"data": ["discs", "absent"]}, DataError, "absent"),
        ({"data": "discs", "tuner": MHR}, ConfigError, "mixes skills for each of several"),
        ({"data": "discs", "data__sampling": "equal"}, ConfigError, "`data.path` has one"),
        ({"data__format": "voc"}, DataError, "discs"),
        ({"tuner": {**MHR, "target_modules": r".*stem1\.conv"}}, ConfigError, "Conv2d of 3 × 3"),
        ({"tuner": {**MHR, "start_from": "skills"}, "data": "new", "domain": "new"}, RoutingError, "not new"),
        ({"tuner": {**MHR, "start_from": "skills"}, "data": "discs", "domain": "discs"}, RoutingError,
         "routes discs, plates, and a domain is one task.*`tuner.adapt` z, mu or full"),
        ({"tuner": {**MHR, "adapt": "z", "start_from": "skills"}, "base__weights": "other"}, CheckpointError,
         "belongs to the base"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(
    skills: Path, folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(one) for one in value]
        if isinstance(value, dict):
            return {key: str(skills) if key == "start_from" else one for key, one in value.items()}
        return str(folder / value) if value in ("discs", "x/discs", "absent", "new", "other") else value

    if changes.get("base__weights") == "other":
        make_base(seed=1).save_pretrained(folder / "other")
    changes = {key: value if key == "domain" else placed(value) for key, value in changes.items()}
    with pytest.raises(error, match=message):
        run(recipe(folder, "refused", **changes), dry_run=True)
    assert not (folder / "runs" / "refused" / "config.yaml").exists()


def test_an_export_reads_the_one_dataset_of_a_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for sets in (["discs"], ["discs", "plates"]):
        config = recipe(folder, "listed", "none", data=[str(folder / one) for one in sets])
        monkeypatch.setattr("thawline.run.saved_config", lambda model, config=config: config)
        if len(sets) == 1:
            assert all(jobs._images("run", None, ()))
        else:
            with pytest.raises(ConfigError, match="'run' has 2 datasets: give `data`"):
                jobs._images("run", None, ())
