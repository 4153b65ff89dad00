"""Parameter groups: the published patterns, and the clean rule by what a parameter is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thawline.errors import ConfigError
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.published import PUBLISHED
from thawline.training.detection.groups import build_groups
from thawline.training.detection.schedule import derive_schedule, published_schedule


class Tiny(nn.Module):
    """The kinds of names a detector has: `vit` decides whether its backbone holds one."""

    def __init__(self, vit: bool) -> None:
        super().__init__()
        inner = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "norm1" if vit else "bn": nn.LayerNorm(4)})
        inner.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 4)))
        parts = {"dinov3": inner, "sta": nn.Conv2d(3, 4, 1)} if vit else {"stem": inner}
        self.backbone = nn.ModuleDict(parts)
        self.encoder = nn.ModuleDict({"norm": nn.BatchNorm2d(4), "fc": nn.Linear(4, 5)})
        self.decoder = nn.ModuleDict({"fc": nn.Linear(5, 6)})
        self.decoder.register_parameter("up", nn.Parameter(torch.zeros(1), requires_grad=False))


def names(model: nn.Module, variant: str, *, published: bool) -> list[set[str]]:
    derived = derive_schedule(9, variant=variant, n_images=64).settings
    settings = PUBLISHED[variant] if published else derived
    return [set(group.parameters) for group in build_groups(model, settings)]


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("atto", [115, 0, 69]),
        ("femto", [115, 0, 111]),
        ("pico", [149, 0, 111]),
        ("n", [186, 0, 132]),
        ("s", [50, 97, 194]),
        ("m", [50, 97, 226]),
        ("l", [76, 99, 226]),
        ("x", [88, 111, 290]),
    ],
)
def test_published_groups_are_as_large_as_the_authors(variant: str, sizes: list[int]) -> None:
    with torch.device("meta"):
        model = DEIMv2.from_variant(variant)
    groups = build_groups(model, PUBLISHED[variant])
    assert [len(group.parameters) for group in groups[:3]] == sizes
    assert sum(len(group.parameters) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_published_patterns_repeat_the_slip_that_decays_the_backbones_norms() -> None:
    backbone, empty, undecayed, rest = names(Tiny(vit=False), "pico", published=True)
    assert backbone == {f"backbone.stem.{n}" for n in (
        "conv.weight", "conv.bias", "bn.weight", "bn.bias", "cls_token")}  # fmt: skip
    assert empty == set()
    assert undecayed == {"encoder.norm.weight", "encoder.norm.bias", "encoder.fc.bias", "decoder.fc.bias"}
    assert rest == {"encoder.fc.weight", "decoder.fc.weight"}


def test_published_pattern_of_atto_decays_biases() -> None:
    _, _, undecayed, rest = names(Tiny(vit=False), "atto", published=True)
    assert undecayed == {"encoder.norm.weight", "encoder.norm.bias"}
    assert "decoder.fc.bias" in rest


def test_published_patterns_of_the_vit_sizes_single_out_the_vit() -> None:
    backbone, undecayed_backbone, undecayed, rest = names(Tiny(vit=True), "s", published=True)
    assert backbone == {"backbone.dinov3.conv.weight", "backbone.dinov3.cls_token"}
    assert undecayed_backbone == {f"backbone.dinov3.{n}" for n in ("conv.bias", "norm1.weight", "norm1.bias")}
    assert "backbone.sta.bias" in undecayed
    assert "backbone.sta.weight" in rest


@pytest.mark.parametrize("vit", [False, True])
def test_clean_groups_decay_matrices_and_nothing_else(vit: bool) -> None:
    model = Tiny(vit)
    inside = "backbone.dinov3." if vit else "backbone."
    backbone, undecayed_backbone, undecayed, rest = names(model, "s", published=False)
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert all(shapes[name] > 1 for name in backbone | rest)
    assert all(shapes[name] == 1 or "token" in name for name in undecayed_backbone | undecayed)
    assert {name for name in shapes if name.startswith(inside)} == backbone | undecayed_backbone


def test_rows_of_added_classes_are_embeddings_too() -> None:
    model = Tiny(vit=False)
    model.decoder.denoising_class_embed = nn.Module()
    model.decoder.denoising_class_embed.weight_1 = nn.Parameter(torch.zeros(2, 3))
    _, _, undecayed, rest = names(model, "s", published=False)
    assert "decoder.denoising_class_embed.weight_1" in undecayed - rest


@pytest.mark.parametrize("published", [False, True])
def test_groups_hold_every_trainable_parameter_once_and_no_frozen_one(published: bool) -> None:
    model = Tiny(vit=True)
    model.encoder.fc.requires_grad_(False)
    groups = names(model, "x", published=published)
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert set().union(*groups) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_tuners_parameters_train_at_the_full_rate_inside_the_backbone() -> None:
    settings = derive_schedule(9, variant="s", n_images=64, start="backbone").settings
    groups = build_groups(Tiny(vit=True), settings, fast=["backbone.dinov3.conv.weight"])
    assert "backbone.dinov3.conv.weight" in groups[3].parameters
    assert groups[3].lr == settings.lr > groups[0].lr


@pytest.mark.parametrize("published", [False, True])
def test_groups_come_in_the_order_of_the_schedules_rates(published: bool) -> None:
    schedule = published_schedule("l", 7)
    settings = schedule.settings if published else derive_schedule(9, variant="l", n_images=64).settings
    groups = build_groups(Tiny(vit=True), settings)
    if published:
        assert [group.lr for group in groups] == schedule.base_lrs
    assert [group.weight_decay for group in groups] == [settings.weight_decay, 0, 0, settings.weight_decay]
    torch.optim.AdamW([group.for_optimizer() for group in groups])


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="every one has requires_grad=False"):
        build_groups(Tiny(vit=True).requires_grad_(False), PUBLISHED["s"])
