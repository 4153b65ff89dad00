"""The eight sizes and their configs: one contract for all."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from thawline.errors import ConfigError
from thawline.models.deimv2 import VARIANTS, DEIMv2, DEIMv2Config
from thawline.models.deimv2.config import with_overrides

# Counted on the authors' own network in training form.
N_PARAMS = dict(
    zip(
        ["atto", "femto", "pico", "n", "s", "m", "l", "x"],
        [508_985, 983_945, 1_539_539, 3_600_421, 9_779_838, 18_357_750, 32_551_214, 51_211_736],
        strict=True,
    )
)
# Entries of their state dict. Ours lacks four: two tables made for one image size, two second names.
N_ENTRIES = dict(zip(N_PARAMS, [493, 493, 551, 639, 673, 769, 809, 989], strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_size_has_the_authors_parameters_and_entries(name: str) -> None:
    with torch.device("meta"):
        model = DEIMv2.from_variant(name)
    assert sum(p.numel() for p in model.parameters()) == N_PARAMS[name]
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 2
    assert len(model.state_dict()) == N_ENTRIES[name] - 4


@pytest.mark.parametrize("name", VARIANTS)
def test_a_size_with_random_weights_gives_finite_detections(name: str) -> None:
    model = DEIMv2.from_variant(name, num_classes=3).eval()
    with torch.no_grad():
        output = model(torch.rand(1, 3, 64, 96))
    n_tokens = sum(64 // s * (96 // s) for s in model.config.strides)
    n_queries = min(n_tokens, model.config.decoder.num_queries)
    assert output.logits.shape == (1, n_queries, 3)
    assert output.pred_boxes.shape == (1, n_queries, 4)
    assert output.logits.isfinite().all()
    assert output.pred_boxes.isfinite().all()
    assert output.training is None


def test_sizes_are_ordered_and_grow() -> None:
    aps = [variant.reported.coco_ap for variant in VARIANTS.values()]
    assert list(VARIANTS) == list(N_PARAMS)
    assert aps == sorted(aps)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_survives_json(name: str) -> None:
    config = VARIANTS[name].config
    assert DEIMv2Config(**json.loads(json.dumps(asdict(config)))) == config


def test_overrides_reach_the_part_that_has_the_setting() -> None:
    config = with_overrides(
        VARIANTS["x"].config, {"num_classes": 7, "num_queries": 11, "rope_rescale": None, "decoder":
        {"num_layers": 2}}
    )  # fmt: skip
    assert (config.num_classes, config.decoder.num_queries, config.decoder.num_layers) == (7, 11, 2)
    assert config.backbone.vit.rope_rescale is None
    assert VARIANTS["x"].config.decoder.num_layers == 6


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("xs", {}, "Available: atto, femto, l, m, n, pico, s, x. Did you mean 'x'"),
        ("s", {"num_clases": 3}, "no setting 'num_clases'.*Did you mean 'num_classes'"),
        ("n", {"rope_rescale": None}, "'n' has no setting 'rope_rescale'"),
        ("s", {"hidden_dim": 8}, r"'hidden_dim' is a setting of .*encoder, decoder"),
        ("s", {"decoder": {"hiden_dim": 8}}, "no setting 'hiden_dim'.*Did you mean 'hidden_dim'"),
        ("s", {"decoder": {"hidden_dim": 8}}, r"encoder.hidden_dim=192.*decoder.hidden_dim=8"),
        ("s", {"decoder": {"num_points": (4, 2)}}, r"num_points=\(4, 2\).*strides \(8, 16, 32\)"),
        ("s", {"num_classes": 0}, "num_classes=0"),
        ("s", {"num_denoising": -1}, "num_denoising=-1"),
        ("l", {"rope_rescale": 0.5}, "rope_rescale=0.5"),
        ("l", {"out_blocks": (3, 4)}, r"out_blocks=\(3, 4\)"),
        ("l", {"out_blocks": (3, 7, 12)}, r"12 blocks, 0 … 11"),
        ("l", {"out_blocks": (7, 3, 11)}, "ascending"),
        ("n", {"out_stages": (2, 4)}, r"out_stages=\(2, 4\).*4 stages, 0 … 3"),
        ("s", {"num_classes": "3"}, "`num_classes='3'`: expected int"),
        ("s", {"num_classes": True}, "num_classes=True"),
        ("s", {"position_order": "rows"}, "position_order='rows'.*'as_trained' or 'row_column'"),
        ("s", {"rope_rescale": "off"}, "rope_rescale='off'.*float or None"),
        ("s", {"decoder": {"num_points": 4}}, r"num_points=4.*tuple\[int, ...\]"),
        ("s", {"image_size": 640}, r"image_size=640.*tuple\[int, int\]"),
        ("s", {"image_size": (640,)}, r"image_size=\(640,\)"),
        ("s", {"image_size": (100, 96)}, r"image_size=\(100, 96\)`.*multiples of 32"),
        ("s", {"num_layers": 0}, "num_layers=0"),
        ("s", {"eval_layer": 4}, "eval_layer=4"),
        ("s", {"num_heads": 7}, "'num_heads' is a setting of"),
        ("atto", {"backbone": {"out_stages": (1, 2)}}, r"lite encoder takes one map.*\(8, 16\)"),
        ("atto", {"encoder": {"kind": "light"}}, "encoder.kind='light'"),
    ],
)
def test_a_wrong_setting_is_named(name: str, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DEIMv2.from_variant(name, **overrides)


def test_two_models_of_one_process_share_nothing() -> None:
    first = DEIMv2.from_variant("atto", num_queries=5)
    second = DEIMv2.from_variant("atto")
    assert first.config.decoder.num_queries == 5
    assert second.config == VARIANTS["atto"].config
    assert not {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in second.parameters()}
