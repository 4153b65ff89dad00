"""Training a domain: the base stays bit for bit, and what the run saves is small, whole and usable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.support.detection_runs import NAMES, DetectionRecipes, forget_after, write_painted_coco
from tests.support.domains import make_base
from thawline import SharedDetector, jobs
from thawline.cli import main
from thawline.domains.attach import is_class_layer
from thawline.domains.domain import base_digest, load_domain, read_domain
from thawline.errors import CheckpointError, ConfigError
from thawline.inference import Detector
from thawline.models.deimv2 import DEIMv2
from thawline.recipe import RunConfig
from thawline.run import run

TUNERS = {"paca": {"method": "paca", "r": 2}, "lora": {"method": "lora", "r": 2}, "frozen": "frozen"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a painted set, and runs."""
    folder = tmp_path_factory.mktemp("domains")
    make_base().save_pretrained(folder / "base")
    (folder / "set").mkdir()
    write_painted_coco(folder / "set")
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> DEIMv2:
    return DEIMv2.from_pretrained(folder / "base")


def recipe(folder: Path, name: str, tuner: object = "frozen", **training: object) -> RunConfig:
    recipes = DetectionRecipes(folder / "set", folder / "runs")
    base = {"weights": str(folder / "base"), "size": None, "overrides": {"num_denoising": 6}}
    mapping = recipes(name, base=base, tuner=tuner, **training).to_mapping()
    return RunConfig.from_mapping({**mapping, "domain": "shapes"})


@pytest.fixture(scope="module", params=TUNERS)
def trained(request: pytest.FixtureRequest, folder: Path) -> Path:
    return run(recipe(folder, request.param, TUNERS[request.param], lr=0.01)).folder


def test_a_run_leaves_the_base_as_it_is_and_saves_the_domain_apart(trained: Path, base: DEIMv2) -> None:
    about = read_domain(trained / "domains" / "shapes")
    assert (about.name, about.class_names, about.image_size) == ("shapes", NAMES, (64, 64))
    assert about.base == base_digest(base)
    assert about.parameters < 0.06 * sum(p.numel() for p in base.parameters())
    merged = DEIMv2.from_pretrained(trained / "model")
    start, end = base.state_dict(), merged.state_dict()
    norms = [name for name in start if "running_" in name]
    assert norms
    assert all(torch.equal(start[name], end[name]) for name in norms)
    changed = [name for name in start if not is_class_layer(name) and not torch.equal(start[name], end[name])]
    assert bool(changed) == (about.tuner != "frozen")
    assert all(start[name].dim() > 1 for name in changed)
    alone = load_domain(base, trained / "domains" / "shapes")
    for name, tensor in alone.state_dict().items():
        assert_close(tensor, end[name], atol=1e-6, rtol=0, msg=name)
    stored = sum(file.stat().st_size for file in (trained / "domains" / "shapes").iterdir())
    assert stored < 0.25 * sum(p.nbytes for p in base.parameters())


def test_a_run_of_a_domain_is_evaluated_and_used_as_any_other(trained: Path, folder: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert jobs.evaluate(trained).metrics["AP"] == pytest.approx(result["metrics"]["AP"], abs=1e-9)
    assert Detector.from_pretrained(trained, device="cpu").class_names == NAMES
    shop = folder / f"shop-{trained.name}"
    assert jobs.add_domain(shop, trained) == ["shapes"]
    found = jobs.evaluate_domains(shop)["shapes"]
    assert found.metrics["AP"] == pytest.approx(result["metrics"]["AP"], abs=1e-9)
    image = np.zeros((64, 64, 3), np.uint8)
    assert set(SharedDetector.from_pretrained(shop)(image, threshold=0.0).data["domain"]) == {"shapes"}


def test_a_resumed_domain_ends_as_if_it_had_never_stopped(folder: Path) -> None:
    whole = run(recipe(folder, "whole", TUNERS["paca"], save_every=3, keep_checkpoints=9)).folder
    resumed = whole.with_name("resumed")
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "domains")
    forget_after(resumed, 6)
    run(recipe(folder, "resumed", TUNERS["paca"], save_every=3, keep_checkpoints=9), resume=True)
    for file in ("adapter_model.safetensors", "heads.safetensors"):
        ends = [(one / "domains" / "shapes" / file).read_bytes() for one in (whole, resumed)]
        assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain": "a/b"}, "plain folder name"),
        ({"domain": "all"}, "other than 'all'"),
        ({"base.weights": None}, "give it as `base.weights`"),
        ({"tuner": "none"}, "leaves the base as it is"),
        ({"tuner": {"method": "ia3"}}, "cannot make a domain"),
        ({"base.size": 96}, "share its size"),
        ({"base.overrides": {"num_queries": 5}}, "takes its base as it is"),
        ({"objective.kind": "text", "base.weights": None}, ""),
    ],
)
def test_recipes_that_cannot_make_a_domain_are_refused(folder: Path, changes: dict, message: str) -> None:
    mapping = recipe(folder, "refused").to_mapping()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            mapping[section] = {**mapping[section], name: value}
        else:
            mapping[section] = value
    with pytest.raises(ConfigError, match=message):
        run(RunConfig.from_mapping(mapping), dry_run=True)
    assert not (folder / "runs" / "refused" / "config.yaml").exists()


def test_a_backbone_is_no_base(folder: Path, tmp_path: Path) -> None:
    torch.save(make_base().backbone.state_dict(), tmp_path / "backbone.pth")
    mapping = recipe(folder, "backbone").to_mapping()
    mapping["base"]["weights"] = str(tmp_path / "backbone.pth")
    with pytest.raises((ConfigError, CheckpointError), match="backbone"):
        run(RunConfig.from_mapping(mapping), dry_run=True)


def test_the_commands_manage_a_shared_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domain, shop = run(recipe(folder, "commands", epochs=1)).folder, str(tmp_path / "shop")
    assert main(["domains", "add", shop, str(domain)]) == 0
    assert main(["domains", "add", shop, str(domain), "--name", "other"]) == 0
    assert main(["domains", "rename", shop, "other", "third"]) == 0
    assert main(["domains", shop]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["shapes", "third"]
    assert main(["eval", shop]) == 0
    assert "shapes" in capsys.readouterr().out
    out = tmp_path / "out"
    image = str(folder / "set" / "6.png")
    words = ["--domain", "all", "--threshold", "0", "--source", image, "--out", str(out), "--json"]
    assert main(["predict", shop, *words]) == 0
    rows = json.loads((out / "predictions.json").read_text())
    assert {row["domain"] for row in rows} == {"shapes", "third"}
    assert main(["domains", "remove", shop, "third"]) == 0
    for words, message in {
        ("add", shop, str(domain)): "already has a domain 'shapes'",
        ("remove", shop, "shape"): "Did you mean 'shapes'",
        ("remove", shop): "Usage: thawline domains remove FOLDER NAME",
        (str(folder / "set"),): "is no shared folder",
        ("add", str(folder / "set"), str(domain)): "holds other files",
        ("add", shop, str(folder / "set")): "holds no domain",
    }.items():
        assert main(["domains", *words]) != 0
        assert message in capsys.readouterr().err


def test_a_domain_of_another_base_is_refused_naming_both(folder: Path, tmp_path: Path) -> None:
    domain = run(recipe(folder, "foreign", epochs=1)).folder
    make_base(seed=1).save_pretrained(tmp_path / "other")
    digests = [base_digest(make_base(seed=seed))[:12] for seed in (0, 1)]
    with pytest.raises(CheckpointError, match=f"{digests[0]}.*not to.*{digests[1]}"):
        jobs.add_domain(tmp_path / "shop", domain, base=tmp_path / "other")
    assert not any((tmp_path / "shop" / "domains").glob("*"))
