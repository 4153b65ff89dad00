"""Classes added to a trained domain: the old ones keep every bit, only the new rows train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.detection_runs import DetectionRecipes, write_painted_coco
from tests.support.domains import make_base, make_domain
from thawline import SharedDetector, jobs
from thawline.domains.attach import is_class_layer
from thawline.domains.domain import load_domain, read_domain
from thawline.domains.folder import SharedFolder
from thawline.errors import CheckpointError, ConfigError, DataError
from thawline.models.deimv2 import DEIMv2
from thawline.planning.blueprint import draw_blueprint
from thawline.recipe import RunConfig
from thawline.run import run

OLD, NEW = ("ace", "king"), "joker"


def write_set(root: Path, names: tuple[str, str, str], kept: tuple[str, ...]) -> Path:
    """Painted images whose classes have these names; of others than `kept` no box is annotated."""
    root.mkdir()
    write_painted_coco(root)
    for file in root.glob("*.json"):
        content = json.loads(file.read_text())
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name
        ids = {one["id"] for one in content["categories"] if one["name"] in kept}
        content["categories"] = [one for one in content["categories"] if one["id"] in ids]
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] in ids]
        file.write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop with a domain of two cards, and two sets: one with old and new classes, one with the new one."""
    folder = tmp_path_factory.mktemp("added")
    base = make_base()
    SharedFolder.create(folder / "shop", base).add(make_domain(base, folder / "cards", "cards"))
    write_set(folder / "both", (NEW, *OLD[::-1]), (NEW, *OLD))
    write_set(folder / "only", (NEW, "red", "blue"), (NEW,))
    return folder


def recipe(folder: Path, data: str = "both", weights: str = "shop", **changes: object) -> RunConfig:
    base = {"weights": str(folder / weights), "size": None, "overrides": {"num_denoising": 6}}
    recipes = DetectionRecipes(folder / data, folder / "runs")
    mapping = recipes(f"{Path(data).name}-added", base=base, epochs=1, lr=0.01).to_mapping()
    tuner = {"method": "paca", "r": 2}
    return RunConfig.from_mapping(
        {**mapping, "tuner": tuner, "domain": "cards", "add_classes": [NEW], **changes}
    )


@pytest.fixture(scope="module")
def both(folder: Path) -> Path:
    """A run on images with boxes of old and new classes."""
    return run(recipe(folder)).folder


@pytest.fixture(scope="module", params=["both", "only"])
def extended(request: pytest.FixtureRequest, folder: Path, both: Path) -> Path:
    return both if request.param == "both" else run(recipe(folder, "only")).folder


def test_old_logits_keep_every_bit(extended: Path, folder: Path) -> None:
    base = DEIMv2.from_pretrained(folder / "shop" / "base")
    before, after = load_domain(base, folder / "cards"), load_domain(base, extended / "domains" / "cards")
    about = read_domain(extended / "domains" / "cards")
    assert (about.class_names, about.class_groups, about.tuner) == ((*OLD, NEW), (2, 1), "paca")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for old, new in ((before, after), (before.fuse(), after.fuse())):
            expected, got = old(x), new(x)
            assert torch.equal(got.logits[..., :2], expected.logits)
            assert torch.equal(got.pred_boxes, expected.pred_boxes)
            assert got.logits[..., 2].std() > 0
    for name, tensor in before.state_dict().items():
        rows = after.state_dict()[name]
        is_moved = is_class_layer(name) and "denoising" in name
        assert is_moved or torch.equal(rows[: len(tensor)] if tensor.dim() else rows, tensor), name


def test_only_the_new_rows_of_the_decoder_train(folder: Path) -> None:
    from thawline.training.objective import build_objective

    model = build_objective(recipe(folder, add_classes=NEW), described={}).build_model()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        "decoder.denoising_class_embed.weight_1",
        *(f"decoder.dec_score_head.{i}.{kind}_1" for i in range(3) for kind in ("weight", "bias")),
    }


def test_the_plan_counts_what_trains_and_what_the_domain_has(folder: Path) -> None:
    config = recipe(folder, name="planned", tuner={"method": "mhr", "r": 2, "target_modules": "none such"})
    found = run(config, dry_run=True)
    planned = draw_blueprint(config)
    assert sum(p.numel() for p in planned.model.parameters() if p.requires_grad) == found.trainable
    plan = json.loads((found.folder / "plan.json").read_text())
    before = read_domain(folder / "cards").parameters
    assert plan["domains"] == {"cards": 4 * (before + found.trainable)}


def test_a_shared_detector_asks_both_versions(extended: Path, folder: Path) -> None:
    shop = SharedDetector(folder / "shop", "cpu")
    shop.add("more", extended)
    base = DEIMv2.from_pretrained(folder / "shop" / "base")
    alone = {
        "cards": load_domain(base, folder / "cards").fuse(),
        "more": load_domain(base, extended / "domains" / "cards").fuse(),
    }
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for name in ("more", "cards", "more"):
            shop._network.switch(shop._member(name).changes)
            assert torch.equal(shop._network.model(x).logits, alone[name](x).logits)
        shop._network.switch(None)
        assert torch.equal(shop._network.model(x).logits, base.fuse()(x).logits)


def test_it_is_a_new_version_which_can_be_extended_again(both: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already has a domain 'cards'"):
        jobs.add_domain(folder / "shop", both)
    assert jobs.add_domain(folder / "shop", both, name="cards-2") == ["cards-2"]
    assert jobs.evaluate_domains(folder / "shop", "cards-2")["cards-2"].metrics["AP"] >= 0
    jobs.remove_domain(folder / "shop", "cards-2")
    third = write_set(tmp_path / "third", ("queen", *OLD), ("queen",))
    SharedFolder.create(tmp_path / "next", make_base()).add(both)
    again = recipe(
        folder, name="again", data=str(third), add_classes=["queen"],
        base={"weights": str(tmp_path / "next"), "overrides": {"num_denoising": 6}},
    )  # fmt: skip
    found = run(again).folder / "domains" / "cards"
    assert read_domain(found).class_groups == (2, 1, 1)
    base, x = make_base(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = load_domain(base, both / "domains" / "cards")(x).logits
        assert torch.equal(load_domain(base, found)(x).logits[..., :3], expected)


def test_a_fresh_process_gets_the_same_bits(both: Path, folder: Path) -> None:
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from thawline.domains.domain import load_domain\n"
        "from thawline.models.deimv2 import DEIMv2\n"
        "base = DEIMv2.from_pretrained(sys.argv[1])\n"
        "x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)\n"
        "with torch.no_grad():\n"
        "    a, b = (load_domain(base, one).fuse()(x).logits[..., :2] for one in sys.argv[2:])\n"
        "print(torch.equal(a, b))"
    )
    paths = [folder / "shop" / "base", folder / "cards", both / "domains" / "cards"]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_classes": ["king"]}, "has 'king' already"),
        ({"domain": "card"}, "has no domain 'card'.*Did you mean 'cards'"),
        ({"domain": None}, "for the domain that `domain` names"),
        ({"add_classes": [NEW, NEW]}, "each once"),
        ({"base": {"overrides": {"num_queries": 5}}}, "queries'.*Only box_noise"),
        ({"add_classes": ["queen"]}, "boxes of joker"),
        ({"add_classes": [NEW, "queen"]}, "No training image has a box of 'queen'"),
    ],
)
def test_what_cannot_be_added_is_refused(folder: Path, changes: dict, message: str) -> None:
    if "base" in changes:
        changes = {"base": {**changes["base"], "weights": str(folder / "shop")}}
    with pytest.raises((ConfigError, DataError), match=message):
        run(recipe(folder, name="refused", **changes), dry_run=True)


def test_a_domain_of_another_base_is_not_extended(folder: Path, tmp_path: Path) -> None:
    SharedFolder.create(tmp_path / "shop", make_base(seed=1))
    (tmp_path / "shop" / "domains").mkdir()
    (tmp_path / "shop" / "domains" / "cards").symlink_to(folder / "cards")
    base = {"weights": str(tmp_path / "shop")}
    with pytest.raises(CheckpointError, match="belongs to the base"):
        run(recipe(folder, name="foreign", base=base), dry_run=True)
