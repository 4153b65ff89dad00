"""Other layouts: names against transformers' own class, and its numbers with its differences undone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from thawline.errors import CheckpointError, ConfigError
from thawline.models.deimv2 import VARIANTS, DEIMv2
from thawline.models.deimv2.checkpoints.names import from_transformers, to_transformers, transformers_names
from thawline.models.deimv2.checkpoints.write import WRITERS, convert_checkpoint, port_settings, save_as
from thawline.models.deimv2.network.hybrid_encoder import sine_position_embedding

theirs = pytest.importorskip(
    "transformers.models.deimv2.modeling_deimv2", reason="older transformers lack it"
)
Deimv2ForObjectDetection, Deimv2MLP = theirs.Deimv2ForObjectDetection, theirs.Deimv2MLP
Deimv2Config = theirs.Deimv2Config


def shuffled(model: DEIMv2) -> DEIMv2:
    """Weights at which every layer matters, statistics included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or name.endswith(
                ("up", "reg_scale", "num_points_scale", "periods", "bias_mask")
            ):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_((0.05 * noise if name.endswith("bias") else 1 + 0.1 * noise).abs())
    return model.eval()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_names_are_those_of_the_port(variant: str) -> None:
    with torch.device("meta"):
        model = DEIMv2.from_variant(variant, num_classes=3)
        has_key_bias = variant in "sm"
        port = Deimv2ForObjectDetection(
            Deimv2Config(**port_settings(model.config, has_key_bias=has_key_bias))
        )
    names = [part for parts in transformers_names(model.state_dict()).values() for part in parts]
    assert len(set(names)) == len(names)
    theirs = set(port.state_dict())
    assert {name for name in names if name not in theirs} <= {n for n in names if n.endswith("k_proj.bias")}
    left = {name for name in theirs - set(names) if not name.startswith(("class_embed", "bbox_embed"))}
    vit = "model.conv_encoder.backbone."
    tiny = {f"{vit}model.layer.{i}.layer_scale{j}.lambda1" for i in range(12) for j in (1, 2)}
    tiny |= {
        vit + name
        for name in ("norm.weight", "norm.bias", "embeddings.mask_token", "embeddings.register_tokens")
    }
    extra = {f"model.enc_output.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert left == (extra | tiny if variant in "sm" else extra)


class _Once(nn.Module):
    """The first answer, ever after."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.answer: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.answer is None:
            self.answer = self.module(x)
        return self.answer


def undo_differences(port: nn.Module, variant: str) -> None:
    """Make transformers' port compute what DEIMv2 computes: the list of docs/models/detect.md."""
    port.model.enc_output = nn.Identity()
    for module in port.modules():
        if isinstance(module, Deimv2MLP) and isinstance(module.act, nn.ReLU):
            module.act = nn.SiLU()
    port.model.decoder.query_pos_head = _Once(port.model.decoder.query_pos_head)
    if variant in "sm":
        port.model.conv_encoder.backbone.norm = nn.Identity()


@pytest.mark.parametrize("variant", ["atto", "s"])
def test_the_port_gives_the_same_numbers_once_its_differences_are_undone(
    variant: str, tmp_path: Path, assert_same_detections: Callable[..., None]
) -> None:
    model = shuffled(DEIMv2.from_variant(variant, num_classes=3, class_names=("a", "b", "c")))
    save_as(model, tmp_path / "port", "transformers")
    port, info = Deimv2ForObjectDetection.from_pretrained(tmp_path / "port", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert port.config.id2label == {0: "a", 1: "b", 2: "c"}
    port.save_pretrained(tmp_path / "theirs")
    again = DEIMv2.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)

    undo_differences(port.eval().double(), variant)
    model.double()
    image = torch.rand(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = model(image), port(image)
    # Ours has islands of float32, as the authors' network has.
    assert_same_detections(ours, theirs, rtol=0, atol=2e-6)


def test_layers_that_only_the_port_has_and_has_trained_are_refused() -> None:
    model = DEIMv2.from_variant("atto", num_classes=2)
    theirs = to_transformers(model.state_dict())
    assert_close(from_transformers(theirs, model.state_dict()), dict(model.state_dict()))
    theirs["model.enc_output.1.weight"] = torch.full((64,), 1.01)
    with pytest.raises(CheckpointError, match=r"1 tensors, such as 'model.enc_output.1.weight'"):
        from_transformers(theirs, model.state_dict())


@pytest.mark.parametrize("layout", sorted(WRITERS))
def test_every_layout_is_read_back_as_it_was(layout: str, tmp_path: Path) -> None:
    model = shuffled(DEIMv2.from_variant("atto"))
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "there" / ("x.pth" if layout == "authors" else "x")
    assert convert_checkpoint(tmp_path / "source", file, layout) == 0
    again = DEIMv2.from_pretrained(file)
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_authors_find_every_name_of_theirs(shared: Path, tmp_path: Path) -> None:
    for size in ("pico", "n", "s", "l"):
        meta = json.loads((shared / "fixtures" / "deimv2" / f"{size}.json").read_text())
        file = tmp_path / f"{size}.pth"
        save_as(DEIMv2.from_variant(size), file, "authors")
        state = torch.load(file, weights_only=True)["ema"]["module"]
        assert {name: list(tensor.shape) for name, tensor in state.items()} == {
            name: shape for name, shape, _ in meta["state_dict"]
        }


def test_a_shape_the_authors_hub_cannot_say_is_refused(tmp_path: Path) -> None:
    model = DEIMv2.from_variant("atto", variant=None)
    with pytest.raises(ConfigError, match="none of the eight"):
        save_as(model, tmp_path / "x", "authors_hub")


def test_rectangles_are_written_only_where_they_are_read_alike(tmp_path: Path) -> None:
    settings = {"num_classes": 2, "image_size": (64, 96)}
    model = DEIMv2.from_variant("n", position_order="row_column", **settings)
    model.save_pretrained(tmp_path / "wide")
    for layout in ("thawline", "transformers"):
        assert convert_checkpoint(tmp_path / "wide", tmp_path / layout, layout) == 0
    for layout in ("authors", "authors_hub"):
        with pytest.raises(ConfigError, match="64 × 96, was trained with rows and columns"):
            convert_checkpoint(tmp_path / "wide", tmp_path / layout, layout)
    # transformers' own positions are rows and columns for every shape.
    port = theirs.Deimv2SinePositionEmbedding(16)(
        width=5, height=3, device=torch.device("cpu"), dtype=torch.float32
    )
    assert_close(port[0], sine_position_embedding((3, 5), 16, "row_column"), rtol=0, atol=1e-6)
