"""Properties that every detector of a shape has, whatever its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.testing import assert_close

from thawline.errors import ConfigError
from thawline.models.deimv2 import Criterion, DEIMv2, DEIMv2Config, Target
from thawline.models.deimv2.network.anchors import make_anchors

Build = Callable[..., DEIMv2]
KINDS = ["lite", "hgnet", "tiny", "dino"]


def shake(model: DEIMv2) -> DEIMv2:
    """Give heads and norms values, so that nothing is zero or one by accident."""
    for name, tensor in model.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.7, 1.3)
        elif tensor.is_floating_point() and not name.endswith(("periods", "bias_mask", "up", "reg_scale")):
            tensor.add_(torch.randn_like(tensor), alpha=0.05)
    return model


def targets(*counts: int, num_classes: int = 4) -> list[Target]:
    return [
        Target(labels=torch.randint(num_classes, (n,)), boxes=torch.rand(n, 4) * 0.4 + 0.2) for n in counts
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_alone_equals_the_image_in_a_batch(kind: str, build: Build) -> None:
    model = shake(build(kind)).double()
    images = torch.rand(3, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
    assert_close(together.logits[1:2], alone.logits)
    assert_close(together.pred_boxes[1:2], alone.pred_boxes)


@pytest.mark.parametrize("kind", KINDS)
def test_training_outputs_hold_every_layer_and_its_denoising(kind: str, build: Build) -> None:
    model = shake(build(kind)).train()
    training = model(torch.rand(2, 3, 64, 96), targets(2, 1)).training
    layers, queries = model.config.decoder.num_layers, model.config.decoder.num_queries
    classes, bins = model.config.num_classes, model.config.decoder.reg_max + 1
    assert training.layers.logits.shape == (layers, 2, queries, classes)
    assert training.layers.corner_logits.shape == (layers, 2, queries, 4 * bins)
    assert training.pre.boxes.shape == training.encoder.boxes.shape == (2, queries, 4)
    n_denoising = 2 * 2 * (6 // 2)  # positives and negatives, boxes of the fullest image, groups
    assert training.denoising.layers.boxes.shape == (layers, 2, n_denoising, 4)
    assert training.denoising.reference_boxes.shape == (2, n_denoising, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_queries_leave_the_others_as_they_are(kind: str, build: Build) -> None:
    model = shake(build(kind, rope_rescale=None) if kind == "dino" else build(kind)).double().train()
    plain = copy.deepcopy(model)
    plain.config = DEIMv2Config(**{**vars(model.config), "num_denoising": 0})
    images, boxes = torch.rand(2, 3, 64, 64, dtype=torch.float64), targets(2, 1)
    with_denoising, without = model(images, boxes).training, plain(images, boxes).training
    assert without.denoising is None
    assert_close(with_denoising.layers.logits, without.layers.logits)
    assert_close(with_denoising.layers.boxes, without.layers.boxes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_gets_a_gradient(kind: str, build: Build) -> None:
    model = shake(build(kind)).train()
    boxes = targets(2, 1)
    sum(Criterion(model.config)(model(torch.rand(2, 3, 64, 64), boxes), boxes).values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_eval_with_targets_gives_what_the_losses_need_but_no_denoising(build: Build) -> None:
    model = shake(build("hgnet"))
    images, boxes = torch.rand(2, 3, 64, 64), targets(2, 1)
    output = model(images, boxes)
    assert output.training.denoising is None
    assert_close(output.logits, model(images).logits)
    assert_close(output.logits, output.training.layers.logits[-1])


def test_the_answering_layer_may_come_before_the_last(build: Build) -> None:
    model = shake(build("dino", eval_layer=1, rope_rescale=None))
    images = torch.rand(1, 3, 64, 64)
    answer, training = model(images), model(images, targets(1)).training
    assert_close(answer.logits, training.layers.logits[1])
    assert_close(answer.pred_boxes, training.layers.boxes[1])


@pytest.mark.parametrize("classes", [1, 2, 400])
def test_any_number_of_classes_trains_and_detects(classes: int, build: Build) -> None:
    model = build("lite", num_classes=classes).train()
    boxes = targets(3, 0, num_classes=classes)
    losses = Criterion(model.config)(model(torch.rand(2, 3, 64, 64), boxes), boxes)
    assert sum(losses.values()).isfinite()
    output = model.eval()(torch.rand(2, 3, 64, 64))
    detected = model.postprocess(output, [(48, 64), (50, 60)])
    assert len(detected[1]["scores"]) == min(300, 7 * classes)


def test_an_image_with_fewer_tokens_than_queries_uses_all_tokens(build: Build) -> None:
    model = build("lite", num_queries=50).train()
    boxes = targets(2)
    output = model(torch.rand(1, 3, 64, 32), boxes)
    assert output.logits.shape[1] == 4 * 2 + 2 * 1
    assert sum(Criterion(model.config)(output, boxes).values()).isfinite()


@pytest.mark.parametrize("shape", [(1, 3, 64, 65), (1, 3, 48, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_an_image_that_does_not_fit_the_strides_is_refused(shape: tuple[int, ...], build: Build) -> None:
    with pytest.raises(ConfigError, match=r"multiples of 32|must be \(B, 3, H, W\), got"):
        build("lite")(torch.rand(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_finite_float32_outputs_and_losses(
    kind: str, dtype: torch.dtype, build: Build
) -> None:
    model = shake(build(kind)).train()
    boxes = targets(2, 1)
    with torch.autocast("cpu", dtype):
        output = model(torch.rand(2, 3, 64, 64), boxes)
        losses = Criterion(model.config)(output, boxes)
    for tensor in (output.logits, output.pred_boxes, output.training.layers.corner_logits, *losses.values()):
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


def test_nothing_is_computed_twice_for_one_shape(build: Build) -> None:
    model = build("dino")
    caches = [model.backbone.vit.rope_embed._tables, model.decoder._anchors]
    with torch.inference_mode():
        for size in [(64, 64), (64, 96), (64, 64)]:
            model(torch.rand(1, 3, *size))
    assert [len(cache) for cache in caches] == [2, 2]
    model.train()
    boxes = targets(1)
    sum(Criterion(model.config)(model(torch.rand(1, 3, 64, 64), boxes), boxes).values()).backward()


def test_weights_in_the_authors_layout_load_strictly(build: Build) -> None:
    source, target = shake(build("lite")), build("lite")
    state = source.state_dict()
    authors = state | {
        "decoder.up": state["decoder.decoder.up"],
        "decoder.reg_scale": torch.tensor([4]),  # an integer where the recipe wrote one
        "decoder.anchors": torch.zeros(1, 20, 4),
        "decoder.valid_mask": torch.ones(1, 20, 1, dtype=torch.bool),
    }
    thinned = {
        key: value
        for key, value in authors.items()
        if key not in ("decoder.decoder.up", "decoder.decoder.reg_scale")
    }
    for layout in (authors, thinned):
        before = dict(layout)
        assert not any(target.load_state_dict(layout, strict=True))
        assert layout.keys() == before.keys()
        for key, value in target.state_dict().items():
            assert_close(value, state[key])


def test_a_missing_or_unknown_key_is_named(build: Build) -> None:
    model = build("lite")
    state = model.state_dict()
    state["decoder.enc_score_head.weigth"] = state.pop("decoder.enc_score_head.weight")
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing.*enc_score_head.weight.*Unexpected.*enc_score_head.weigth"
    ):
        model.load_state_dict(state)


def test_safetensors_keeps_shared_tensors_once(build: Build, tmp_path) -> None:
    source, target = shake(build("lite")), build("lite")
    save_model(source, str(tmp_path / "model.safetensors"))
    assert load_model(target, tmp_path / "model.safetensors") == (set(), [])
    assert_close(target.state_dict(), source.state_dict())


def test_a_saved_folder_gives_the_model_back(build: Build, tmp_path) -> None:
    source = shake(build("dino"))
    source.save_pretrained(tmp_path)
    loaded = DEIMv2.from_pretrained(tmp_path)
    assert loaded.config == source.config
    assert_close(loaded.state_dict(), source.state_dict())


def test_anchors_near_a_border_are_masked() -> None:
    logits, valid = make_anchors([(80, 80), (40, 40), (20, 20)])
    assert logits.shape == (8400, 4)
    assert int((valid == 0).sum()) == 316  # the border ring of the finest level
    assert (logits.isinf().any(-1) == (valid[:, 0] == 0)).all()
    assert make_anchors([(40, 40), (20, 20)])[1].all()
    row, column = 3, 5
    wanted = torch.tensor([5.5 / 80, 3.5 / 80, 0.05, 0.05])
    assert_close(logits[row * 80 + column].sigmoid(), wanted)


def test_masked_tokens_score_the_bias_and_become_the_whole_image(build: Build) -> None:
    model = shake(build("dino", num_queries=10_000))
    decoder = model.decoder
    # 128 / 1280 tokens: the outer ring of the finest level lies within the margin.
    maps = [torch.randn(1, 16, 80, 4), torch.randn(1, 16, 40, 2), torch.randn(1, 16, 20, 1)]
    content, reference, encoder = decoder._select_queries(maps)
    masked = reference.isinf().any(-1)
    n_masked = int((make_anchors([(80, 4), (40, 2), (20, 1)])[1] == 0).sum())
    assert int(masked.sum()) == n_masked > 0
    assert_close(encoder.logits[masked], decoder.enc_score_head.bias.expand(n_masked, -1))
    assert_close(encoder.boxes[masked], torch.ones(n_masked, 4))
    assert (content[masked] == 0).all()
    output = decoder(maps)
    assert output.logits.isfinite().all()
    assert output.pred_boxes.isfinite().all()


def test_query_content_is_the_chosen_memory_without_gradient(build: Build) -> None:
    decoder = shake(build("lite")).decoder
    maps = [torch.randn(2, 16, 4, 6, requires_grad=True), torch.randn(2, 16, 2, 3, requires_grad=True)]
    content, reference, encoder = decoder._select_queries(maps)
    memory = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
    scores = decoder.enc_score_head(memory).amax(-1)
    best = scores.topk(7, dim=1).indices
    assert_close(content, memory.gather(1, best[..., None].expand(-1, -1, 16)).detach())
    assert not content.requires_grad
    assert not reference.requires_grad
    assert encoder.logits.requires_grad


def test_detections_follow_their_queries(build: Build) -> None:
    decoder = shake(build("hgnet")).decoder.double()
    maps = [torch.randn(1, 16, 4, 6, dtype=torch.float64), torch.randn(1, 16, 2, 3, dtype=torch.float64)]
    content, reference, _ = decoder._select_queries(maps)
    order = torch.randperm(content.shape[1])
    straight = decoder._refine(content, reference, maps)
    mixed = decoder._refine(content[:, order], reference[:, order], maps)
    assert_close(mixed.logits[-1], straight.logits[-1][:, order])
    assert_close(mixed.boxes[-1], straight.boxes[-1][:, order])


def test_untrained_heads_leave_their_reference(build: Build) -> None:
    decoder = build("lite").decoder.double()
    maps = [torch.randn(1, 16, 4, 6, dtype=torch.float64), torch.randn(1, 16, 2, 3, dtype=torch.float64)]
    _, reference, _ = decoder._select_queries(maps)
    boxes = decoder(maps).pred_boxes
    assert_close(boxes, reference.sigmoid(), rtol=0, atol=1e-6)


def test_position_orders_agree_on_squares_only(build: Build) -> None:
    def logits(order: str, image: Tensor) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return shake(build("tiny", position_order=order)).double()(image).logits

    square, wide = (torch.rand(1, 3, *size, dtype=torch.float64) for size in [(64, 64), (64, 96)])
    assert_close(logits("as_trained", square), logits("row_column", square))
    assert (logits("as_trained", wide) - logits("row_column", wide)).abs().max() > 1e-6
