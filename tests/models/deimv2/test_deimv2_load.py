"""Reading a detector from other people's files, and refusing what does not fit."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from thawline.coco import COCO_NAMES
from thawline.errors import CheckpointError, ConfigError
from thawline.models.deimv2 import DEIMv2
from thawline.models.deimv2.checkpoints import read as load
from thawline.models.deimv2.checkpoints.names import StateDict, read_backbone
from thawline.models.deimv2.checkpoints.read import load_backbone
from thawline.models.deimv2.checkpoints.write import save_as
from thawline.models.deimv2.network.vit import VisionTransformer, ViTConfig

LOGGER = "thawline.models.deimv2.checkpoints.read"


def shuffled(model: DEIMv2) -> DEIMv2:
    """No two tensors alike, and statistics away from their first values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.endswith(("up", "reg_scale", "num_points_scale")):
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if name.endswith("running_var") else noise / 10)
    return model.eval()


@pytest.fixture(scope="module")
def atto() -> DEIMv2:
    torch.manual_seed(3)
    return shuffled(DEIMv2.from_variant("atto"))


@pytest.fixture(scope="module")
def authors_state(atto: DEIMv2) -> StateDict:
    """State dict as the authors' training code saves it: tables for one image size, and two tensors twice."""
    state = {name: tensor.clone() for name, tensor in atto.state_dict().items()}
    state["decoder.anchors"] = torch.full((1, 500, 4), torch.inf)
    state["decoder.valid_mask"] = torch.ones(1, 500, 1, dtype=torch.bool)
    state["decoder.up"] = state["decoder.decoder.up"]
    state["decoder.reg_scale"] = state["decoder.decoder.reg_scale"].long()
    return state


def assert_same(model: DEIMv2, other: DEIMv2) -> None:
    assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_the_average_of_the_weights_comes_before_the_weights(
    atto: DEIMv2, authors_state: StateDict, tmp_path: Path
) -> None:
    ema = {"module": {f"module.{name}": tensor for name, tensor in authors_state.items()}, "updates": 7}
    weights = {name: torch.zeros_like(tensor) for name, tensor in authors_state.items()}
    path = saved({"model": weights, "ema": ema, "last_epoch": 3}, tmp_path / "x.pth")
    model = DEIMv2.from_pretrained(path)
    assert_same(model, atto)
    assert not model.training
    assert model.config.variant == "atto"
    assert model.config.class_names == COCO_NAMES
    plain = DEIMv2.from_pretrained(saved({"model": authors_state}, tmp_path / "y.pth"))
    assert_same(plain, atto)


def test_dates_and_numpy_scalars_beside_the_weights_are_harmless(
    atto: DEIMv2, authors_state: StateDict, tmp_path: Path
) -> None:
    extras = {"date": datetime.datetime(2025, 9, 26), "best": np.float64(0.5), "took": datetime.timedelta(1)}
    path = saved({"model": authors_state, **extras}, tmp_path / "x.pth")
    assert_same(DEIMv2.from_pretrained(path), atto)


def test_a_text_run_is_no_detector(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter of another model, and no detector"):
        DEIMv2.from_pretrained(tmp_path)


def test_objects_that_could_run_code_are_refused(authors_state: StateDict, tmp_path: Path) -> None:
    path = saved({"model": authors_state, "args": Path("/")}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        DEIMv2.from_pretrained(path)


@pytest.mark.parametrize(
    "data", [b"<html>404 not found</html>", b"version https://git-lfs.github.com/spec/v1"]
)
def test_a_file_that_holds_no_weights_shows_its_beginning(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"holds no weights: it begins with b'{data[:10].decode()}"):
        DEIMv2.from_pretrained(tmp_path / "x.pth")


def test_shared_tensors_that_safetensors_keeps_once_are_filled(
    atto: DEIMv2, authors_state: StateDict, tmp_path: Path
) -> None:
    dropped = (
        "decoder.dec_bbox_head.0.",
        "decoder.dec_bbox_head.2.",
        "decoder.decoder.up",
        "decoder.reg_scale",
    )
    kept = {name: t.contiguous() for name, t in authors_state.items() if not name.startswith(dropped)}
    save_file({name: t.clone() for name, t in kept.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"HGNetv2": {"name": "Atto"}, "DEIMTransformer": {"activation": "relu"}}'
    )
    assert_same(DEIMv2.from_pretrained(tmp_path), atto)


def test_own_folder_keeps_everything(atto: DEIMv2, tmp_path: Path) -> None:
    model = DEIMv2.from_variant("atto", class_names=("cat", "dog"), image_size=(96, 160), num_queries=7)
    model.save_pretrained(tmp_path)
    again = DEIMv2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.config.num_classes == 2
    assert_same(again, model)


@pytest.mark.parametrize("overrides", [{"num_classes": 3}, {"class_names": ("a", "b", "c")}])
def test_another_number_of_classes_replaces_exactly_the_class_layers(
    atto: DEIMv2, tmp_path: Path, caplog: pytest.LogCaptureFixture, overrides: dict[str, object]
) -> None:
    path = saved(atto.state_dict(), tmp_path / "x.pth")
    with caplog.at_level(logging.WARNING, LOGGER):
        model = DEIMv2.from_pretrained(path, **overrides)
    assert "80 classes, this model has 3" in caplog.text
    own = model.state_dict()
    replaced = {name for name, t in atto.state_dict().items() if t.shape != own[name].shape}
    heads = [f"dec_score_head.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    heads += ["enc_score_head.weight", "enc_score_head.bias", "denoising_class_embed.weight"]
    assert replaced == {f"decoder.{head}" for head in heads}
    assert all(torch.equal(t, own[name]) for name, t in atto.state_dict().items() if name not in replaced)
    assert model.config.class_names == overrides.get("class_names")
    assert model(torch.rand(1, 3, 64, 64)).logits.shape[-1] == 3


def test_the_same_number_of_classes_keeps_the_layers_and_takes_the_names(
    atto: DEIMv2, tmp_path: Path
) -> None:
    names = tuple(f"thing {i}" for i in range(80))
    model = DEIMv2.from_pretrained(saved(atto.state_dict(), tmp_path / "x.pth"), class_names=names)
    assert_same(model, atto)
    assert model.config.class_names == names


def test_what_does_not_fit_is_listed_by_kind(atto: DEIMv2, tmp_path: Path) -> None:
    state = dict(atto.state_dict())
    del state["encoder.fpn_block.cv1.conv.weight"]
    state["decoder.extra"] = torch.zeros(1)
    state["decoder.query_pos_head.layers.0.weight"] = torch.zeros(3, 5)
    with pytest.raises(CheckpointError) as error:
        DEIMv2.from_pretrained(saved(state, tmp_path / "x.pth"))
    text = str(error.value)
    assert "1 missing (encoder.fpn_block.cv1.conv.weight)" in text
    assert "1 unexpected (decoder.extra)" in text
    assert "1 of another shape (decoder.query_pos_head.layers.0.weight: (3, 5) instead of (64, 4))" in text


def test_weights_that_are_not_numbers_are_refused(atto: DEIMv2, tmp_path: Path) -> None:
    state = dict(atto.state_dict())
    state["decoder.pre_bbox_head.layers.0.bias"] = torch.full((64,), torch.nan)
    with pytest.raises(CheckpointError, match=r"1 not finite \(decoder.pre_bbox_head.layers.0.bias\)"):
        DEIMv2.from_pretrained(saved(state, tmp_path / "x.pth"))


def test_the_wrong_size_is_named(atto: DEIMv2, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a 'atto', not a 'pico'"):
        DEIMv2.from_pretrained(saved(atto.state_dict(), tmp_path / "x.pth"), variant="pico")


def test_a_run_folder_gives_what_the_run_ended_with_else_its_best(tmp_path: Path) -> None:
    atto = DEIMv2.from_variant("atto")
    (tmp_path / "config.yaml").write_text("objective: detection\n")
    for part, value in (("last", 1.0), ("best", 2.0), ("model", 3.0)):
        with torch.no_grad():
            atto.decoder.enc_score_head.bias.fill_(value)
        atto.save_pretrained(tmp_path / part)
        found = DEIMv2.from_pretrained(tmp_path).decoder.enc_score_head.bias
        assert found.unique().tolist() == [value]


def test_unreadable_places_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(CheckpointError, match="cannot be read"):
        DEIMv2.from_pretrained(tmp_path / "cut.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        DEIMv2.from_pretrained(tmp_path / "cut.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"No weights in .* model.safetensors or pytorch_model.bin"):
        DEIMv2.from_pretrained(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="No file, folder or hub repository 'best.pth'"):
        DEIMv2.from_pretrained("best.pth")
    with pytest.raises(
        CheckpointError, match="neither a DEIMv2 nor a backbone of one, but 1 tensors: fc.weight"
    ):
        DEIMv2.from_pretrained(saved({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth"))
    with pytest.raises(CheckpointError, match="no state dict"):
        DEIMv2.from_pretrained(saved({"epoch": 3}, tmp_path / "epoch.pth"))

    def offline(repository: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError(f"{repository} {allow_patterns}")

    monkeypatch.setattr(load, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="Cannot fetch 'Intellindust/DEIMv2_DINOv3_S_COCO'"):
        DEIMv2.from_pretrained("s")


def test_unknown_settings_are_refused_while_loading(atto: DEIMv2, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_querys"):
        DEIMv2.from_pretrained(saved(atto.state_dict(), tmp_path / "x.pth"), num_querys=3)


def test_a_model_built_in_float64_keeps_float64_weights(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = DEIMv2.from_variant("atto")
        again = DEIMv2.from_pretrained(saved(model.state_dict(), tmp_path / "x.pth"))
        assert again.decoder.enc_score_head.weight.dtype == torch.float64
        assert_same(again, model)
    finally:
        torch.set_default_dtype(torch.float32)


# Backbones alone

HEADS, DEPTH, DIM = 2, 2, 32


def small_vit(ffn: str = "mlp") -> VisionTransformer:
    config = ViTConfig(
        family="dinov3", dim=DIM, num_heads=HEADS, depth=DEPTH, hidden_dim=48, ffn=ffn, out_blocks=(0, 1),
        n_storage_tokens=4, norm_eps=1e-5, layer_scale=1e-5, mask_key_bias=True, final_norm=True,
    )  # fmt: skip
    return VisionTransformer(config).eval()


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_dinov3_of_transformers_gives_the_same_features(ffn: str) -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    theirs = DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=DIM, intermediate_size=48, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
            num_register_tokens=4, use_gated_mlp=ffn == "swiglu",
            hidden_act="gelu" if ffn == "mlp" else "silu",
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    ours = small_vit(ffn)
    read = read_backbone(theirs.state_dict(), ours.state_dict())
    missing = ours.load_state_dict(read, strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= {"rope_embed.periods"}
    image = torch.rand(2, 3, 48, 32)
    with torch.no_grad():
        last = theirs(image).last_hidden_state[:, 5:].transpose(1, 2).unflatten(-1, (3, 2))
        assert_close(ours(image)[-1], last, rtol=1e-4, atol=1e-4)
    older = {name.replace("model.layer.", "layer."): t for name, t in theirs.state_dict().items()}
    assert_close(read_backbone(older, ours.state_dict()), read)


@pytest.mark.parametrize("has_bias", [False, True])
def test_dinov3_in_the_names_of_timm(has_bias: bool) -> None:
    ours = small_vit("swiglu")
    meta = ours.state_dict()
    renamed: StateDict = {}
    for name, tensor in meta.items():
        if name.endswith(("periods", "bias_mask", "mask_token", "qkv.bias")):
            continue
        name = name.replace("storage_tokens", "reg_token")
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        name = name.replace("mlp.w1", "mlp.fc1_g").replace("mlp.w2", "mlp.fc1_x").replace("mlp.w3", "mlp.fc2")
        renamed[name] = torch.randn_like(tensor)
    if has_bias:
        for block in range(DEPTH):
            renamed |= {f"blocks.{block}.attn.{part}_bias": torch.full((DIM,), 2.0) for part in "qv"}
    read = read_backbone(renamed, meta)
    result = ours.load_state_dict(read, strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) <= {"rope_embed.periods"}
    assert_close(read["blocks.1.mlp.w2.weight"], renamed["blocks.1.mlp.fc1_x.weight"])
    bias = torch.tensor([2.0 if has_bias else 0.0, 0.0, 2.0 if has_bias else 0.0]).repeat_interleave(DIM)
    assert_close(read["blocks.0.attn.qkv.bias"], bias)
    assert_close(read["mask_token"], torch.zeros(1, DIM))


def test_a_backbone_alone_fills_the_backbone_and_says_what_is_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    donor = DEIMv2.from_variant("s")
    path = saved(donor.backbone.vit.state_dict(), tmp_path / "vitt_distill.pt")
    with pytest.raises(CheckpointError, match="does not say which size"):
        DEIMv2.from_pretrained(path)
    with caplog.at_level(logging.WARNING, LOGGER):
        model = DEIMv2.from_pretrained(path, "s", num_classes=3)
    assert "encoder and decoder have random weights" in caplog.text
    assert_close(model.backbone.vit.state_dict(), donor.backbone.vit.state_dict())
    with pytest.raises(CheckpointError, match="of another shape"):
        DEIMv2.from_pretrained(path, "m")


def test_the_backbone_of_a_detector_can_be_taken(atto: DEIMv2, tmp_path: Path) -> None:
    path = saved(atto.state_dict(), tmp_path / "x.pth")
    model = DEIMv2.from_variant("atto", num_classes=2)
    load_backbone(model, path)
    assert_close(model.backbone.state_dict(), atto.backbone.state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        load_backbone(DEIMv2.from_variant("femto"), path)


def test_a_pruned_hgnetv2_takes_what_it_shares_and_says_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    b0 = DEIMv2.from_variant("n").backbone
    state: dict[str, Tensor] = b0.state_dict() | {
        "fc.weight": torch.zeros(10, 3),
        "last_conv.weight": torch.zeros(2),
    }
    path = saved(state, tmp_path / "PPHGNetV2_B0_stage1.pth")
    with caplog.at_level(logging.WARNING, LOGGER):
        model = DEIMv2.from_pretrained(path, "atto")
    own = model.backbone.state_dict()
    assert_close(own["stem.stem1.conv.weight"], state["stem.stem1.conv.weight"])
    assert "these are re-initialised: stages.2.blocks.0.layers.0.conv2.conv.weight" in caplog.text
    caplog.clear()
    pico = DEIMv2.from_pretrained(path, "pico").backbone.state_dict()
    assert "re-initialised" not in caplog.text
    assert all(torch.equal(tensor, state[name]) for name, tensor in pico.items())
    with pytest.raises(CheckpointError, match="not an HGNetv2 B0"):
        load_backbone(DEIMv2.from_variant("atto"), saved({"stem.stem1.conv.weight": torch.zeros(1)}, path))


def test_nothing_is_overwritten(atto: DEIMv2, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists"):
        save_as(atto, tmp_path, "transformers")
    with pytest.raises(ConfigError, match="Did you mean 'transformers'"):
        save_as(atto, tmp_path / "x", "transformer")


def with_classes(path: Path, names: tuple[str, ...] | None, num_classes: int = 4) -> DEIMv2:
    """A saved detector whose head's row i, of every layer, is i + 1."""
    model = DEIMv2.from_variant("atto", class_names=names, num_classes=num_classes)
    with torch.no_grad():
        for name, tensor in class_layers(model).items():
            tensor.copy_(torch.arange(1.0, len(tensor) + 1).view(-1, *[1] * (tensor.dim() - 1)))
            if name.startswith("denoising"):
                tensor[-1] = 0
    model.save_pretrained(path)
    return model


def class_layers(model: DEIMv2) -> dict[str, torch.Tensor]:
    decoder = model.decoder
    layers = {"enc": decoder.enc_score_head, "denoising": decoder.denoising_class_embed}
    layers |= {f"dec{i}": head for i, head in enumerate(decoder.dec_score_head)}
    return {f"{key}.{name}": p for key, layer in layers.items() for name, p in layer.named_parameters()}


OLD = ("cat", "dog", "cow", "hen")


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        (("hen", "cow", "dog", "cat"), [4, 3, 2, 1], "4 moved (hen, cow, dog, cat)."),
        (("cat", "hen", "cow", "dog"), [1, 4, 3, 2], "2 moved (hen, dog); 2 in place (cat, cow)."),
        (("cow", "cat"), [3, 1], "2 moved (cow, cat); 2 left out (dog, hen)."),
        (("cat", "fox", "dog", "cow", "hen"), [1, None, 2, 3, 4], "1 new, re-initialised (fox)"),
        (("cat", "fox", "cow", "hen"), [1, None, 3, 4], "1 new, re-initialised (fox); 1 left out (dog)."),
        (("fox", "dog"), [None, 2], "1 in place (dog); 1 new, re-initialised (fox); 3 left out"),
    ],
)
def test_rows_of_the_heads_go_by_class_name(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    names: tuple[str, ...],
    rows: list[int | None],
    said: str,
) -> None:
    before = with_classes(tmp_path / "own", OLD)
    path = tmp_path / "own"
    if names == ("cow", "cat"):
        path = tmp_path / "port"
        save_as(before, path, "transformers")
    with caplog.at_level(logging.WARNING, LOGGER):
        model = DEIMv2.from_pretrained(path, class_names=names)
    (line,) = caplog.messages
    assert said in line
    assert model.config.class_names == names
    assert model.config.num_classes == len(names)
    for name, tensor in class_layers(model).items():
        assert len(tensor) == len(names) + name.startswith("denoising"), name
        for row, value in zip(tensor, rows, strict=False):
            is_old = torch.isin(row, torch.arange(1.0, 6))
            assert (row == value).all() if value else not is_old.any(), name
        if name.startswith("denoising"):
            assert (tensor[-1] == 0).all()
    others = {
        k: v for k, v in before.state_dict().items() if "score_head" not in k and "class_embed" not in k
    }
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("names", [OLD, ("a", "b", "c", "d"), None])
def test_rows_stay_in_order_without_a_name_in_common(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...] | None
) -> None:
    before = with_classes(tmp_path, OLD)
    model = DEIMv2.from_pretrained(tmp_path, **({} if names is None else {"class_names": names}))
    assert_same(model, before)
    assert [message.endswith("its rows become theirs, in order.") for message in caplog.messages] == (
        [True] if names == ("a", "b", "c", "d") else []
    )
