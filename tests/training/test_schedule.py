"""The published schedule is held to the authors' own logs; the derived one to the rules it states."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from thawline.data.detection.collate import Collate
from thawline.errors import ConfigError
from thawline.models.deimv2.published import PUBLISHED
from thawline.training.detection.schedule import (
    derive_schedule,
    flat_cosine,
    published_schedule,
)

VARIANTS = list(PUBLISHED)
COCO_IMAGES = 118_287


@pytest.mark.parametrize(("run", "variant"), [("dinov3_s", "s"), ("hgnetv2_pico", "pico")])
def test_published_rates_equal_the_authors_logs_at_every_logged_step(
    shared: Path, run: str, variant: str
) -> None:
    logs = json.loads((shared / "fixtures/deimv2/published_runs.json").read_text())[run]
    schedule = published_schedule(variant, logs["iters_per_epoch"])
    assert len(logs["lr_trace"]) > 800
    for epoch, iteration, logged, _ in logs["lr_trace"]:
        step = epoch * logs["iters_per_epoch"] + iteration
        # They log after setting the rate of the step that follows, with six decimals.
        assert schedule.lr_at(step + 1)[0] == pytest.approx(logged, abs=0.5001e-6)
    assert schedule.base_lrs == logs["initial_lr"]


@pytest.mark.parametrize(("run", "variant"), [("dinov3_s", "s"), ("hgnetv2_pico", "pico")])
def test_published_windows_equal_the_authors_logs(shared: Path, run: str, variant: str) -> None:
    logs = json.loads((shared / "fixtures/deimv2/published_runs.json").read_text())[run]
    schedule = published_schedule(variant, logs["iters_per_epoch"])
    windows, notes = schedule.windows, " ".join(logs["notes"])
    per_epoch = schedule.steps_per_epoch
    *_, total, warmup, flat, final = logs["scheduler_line"].split()
    assert int(total) == schedule.n_steps
    assert int(warmup) == schedule.settings.warmup_steps
    assert int(flat) == windows["flat"].stop * per_epoch == windows["cosine"].start * per_epoch
    assert int(final) == (schedule.epochs - windows["final"].start) * per_epoch
    assert f"at epoch {windows['overlap_matcher'].start}" in notes
    assert f"Epochs: [{windows['strong'].start}, {windows['mosaic'].stop}, {windows['strong'].stop}]" in notes
    assert f"Training until {windows['stage_1'].stop} epochs" in notes
    assert f"Mosaic with Prob.@{schedule.settings.mosaic_prob}" in notes
    if variant == "s":
        assert f"Using MixUp with Prob@0.5 in {list(windows['mixup'])} epochs" in notes


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_rates_follow_the_stated_formula(variant: str) -> None:
    per_epoch = 924 if variant in ("atto", "femto", "pico") else 3696
    schedule = published_schedule(variant, per_epoch)
    full, warmup = schedule.base_lrs, schedule.settings.warmup_steps
    assert schedule.lr_at(0) == [lr / 500 for lr in full]
    assert schedule.lr_at(1) == [0.0] * 4
    assert schedule.lr_at(1 + warmup // 2) == pytest.approx([lr / 4 for lr in full])
    assert schedule.lr_at(1 + warmup) == full
    last = schedule.lr_at(schedule.n_steps - 1)
    if variant == "n":
        assert last == full
        assert schedule.windows["cosine"] == (160, 160)
    else:
        assert last == [lr / 2 for lr in full]
        flat, final = (schedule.windows[name].start * per_epoch for name in ("cosine", "final"))
        assert schedule.lr_at(1 + flat) == full
        assert schedule.lr_at(1 + (flat + final) // 2) == pytest.approx([lr * 0.75 for lr in full])


def test_flat_cosine_is_continuous_and_never_rises_after_warm_up() -> None:
    values = [flat_cosine(t, warmup=7, flat=30, final=90, gamma=0.3) for t in range(120)]
    assert values[0] == 0
    assert values[7:31] == [1.0] * 24
    assert values[90:] == [0.3] * 30
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[7:]))
    assert max(abs(a - b) for a, b in itertools.pairwise(values[7:])) < 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_derived_at_the_published_length_is_the_published_recipe(variant: str) -> None:
    published = PUBLISHED[variant]
    schedule = derive_schedule(published.epochs, variant=variant, n_images=COCO_IMAGES, start="backbone")
    derived = schedule.settings
    same = ["epochs", "stop_epoch", "no_aug_epochs", "lr", "backbone_lr", "strong_epochs", "mosaic_epochs"]
    same += ["batch_size", "warmup_steps", "mixup_epochs", "copyblend_epochs", "mosaic_prob", "size"]
    same += ["matcher_change_epoch"]
    assert {key: getattr(derived, key) for key in same} == {key: getattr(published, key) for key in same}
    assert derived.ema_decay == pytest.approx(published.ema_decay)
    assert derived.ema_warmup_steps == published.ema_warmup_steps
    assert derived.lr_gamma == 0.5
    assert derived.flat_epoch == (78 if variant == "n" else published.flat_epoch)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 37, 1000])
def test_derived_windows_lie_in_the_run_and_leave_its_end_clean(variant: str, epochs: int) -> None:
    schedule = derive_schedule(epochs, variant=variant, n_images=300)
    for name, (start, stop) in schedule.windows.items():
        assert 0 <= start <= stop <= epochs, name
    assert [schedule.windows[phase].start for phase in ("flat", "cosine", "final")] == sorted(
        schedule.windows[phase].start for phase in ("flat", "cosine", "final")
    )
    if epochs > 1:
        assert not schedule.windows["strong"].covers(epochs - 1)
        assert schedule.windows["final"].covers(epochs - 1)
    rates = [schedule.lr_at(step)[-1] for step in range(schedule.n_steps)]
    assert min(rates) > 0
    assert max(rates) <= schedule.settings.lr


@pytest.mark.parametrize(
    ("n_images", "batch_size"), [(COCO_IMAGES, 32), (511, 16), (255, 8), (100, 4), (18, 4), (3, 3), (1, 1)]
)
def test_derived_batch_leaves_sixteen_steps_an_epoch_where_it_can(n_images: int, batch_size: int) -> None:
    assert derive_schedule(200, variant="s", n_images=n_images).settings.batch_size == batch_size


@pytest.mark.parametrize(("epochs", "batch_size"), [(60, 16), (59, 16), (30, 8), (13, 4), (1, 4)])
def test_derived_batch_leaves_a_thousand_steps_a_run_where_it_can(epochs: int, batch_size: int) -> None:
    schedule = derive_schedule(epochs, variant="atto", n_images=292)
    assert schedule.settings.batch_size == batch_size
    assert schedule.n_steps >= 1000 or batch_size == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_short_run_from_random_weights_has_a_high_rate_and_flips_alone(variant: str) -> None:
    schedule = derive_schedule(10, variant=variant, n_images=160)
    settings, published = schedule.settings, PUBLISHED[variant]
    share = math.sqrt(4 / published.batch_size)
    assert settings.lr == settings.backbone_lr == pytest.approx(published.lr * min(1, 4 * share))
    for name in ("strong", "mosaic", "mixup", "copyblend", "overlap_matcher"):
        start, stop = schedule.windows[name]
        assert start == stop, name
    assert "1,600 images" in schedule.reasons["rates"]
    assert "100% of the strong ones left out" in schedule.reasons["epochs"]


def test_a_longer_run_goes_over_to_the_published_recipe_step_by_step() -> None:
    schedules = [derive_schedule(epochs, variant="atto", n_images=160) for epochs in range(8, 120)]
    rates = [s.settings.lr / math.sqrt(s.settings.batch_size) for s in schedules]
    strong, late = (
        [stop - start for s in schedules for start, stop in [s.windows[name]]]
        for name in ("strong", "overlap_matcher")
    )
    assert max(rates) / min(rates) == pytest.approx(4)
    assert rates == sorted(rates, reverse=True)
    assert all(abs(a - b) <= 3 for epochs in (strong, late) for a, b in itertools.pairwise(epochs))
    assert (strong[0], late[0]) == (0, 0)
    assert (strong[-1], late[-1]) == (94, 12)  # of 119: 0.79 and 0.1 of the run
    assert {s.windows["strong"].stop for s in schedules if s.epochs <= 30} == {0}
    # A long run, by its epochs or by what it sees, is none of it.
    lr = PUBLISHED["atto"].lr
    for long in (schedules[-1], derive_schedule(60, variant="atto", n_images=20),
                 derive_schedule(16, variant="atto", n_images=1000)):  # fmt: skip
        assert long.settings.lr == lr * math.sqrt(long.settings.batch_size / 128)


def test_a_short_run_from_a_detector_is_as_free_as_one_from_random_weights() -> None:
    published = PUBLISHED["atto"]
    short = derive_schedule(10, variant="atto", n_images=160, start="detector")
    assert short.settings.lr == derive_schedule(10, variant="atto", n_images=160).settings.lr
    assert short.settings.backbone_lr == pytest.approx(
        short.settings.lr * published.backbone_lr / published.lr
    )
    assert short.windows["strong"] == (0, 0)
    assert "a short run" in short.reasons["rates"]
    assert "pretrained" not in short.reasons["rates"]
    long = derive_schedule(60, variant="atto", n_images=160, start="detector")
    share = math.sqrt(long.settings.batch_size / 128) / 4
    assert (long.settings.lr, long.settings.backbone_lr) == (
        published.lr * share,
        published.backbone_lr * share,
    )
    assert long.windows["strong"][1] > 0
    assert "what is pretrained × 0.25" in long.reasons["rates"]


def test_derived_rates_follow_the_root_of_the_batch_and_spare_what_is_pretrained() -> None:
    def rates(start: str, n_images: int, batch: int) -> tuple[float, float]:
        schedule = derive_schedule(2000, variant="s", n_images=n_images, batch_size=batch, start=start)  # type: ignore[arg-type]
        return schedule.settings.lr, schedule.settings.backbone_lr

    lr, backbone = PUBLISHED["s"].lr, PUBLISHED["s"].backbone_lr
    assert rates("backbone", 5000, 32) == (lr, backbone)
    assert rates("backbone", 5000, 8) == pytest.approx((lr / 2, backbone / 2))
    assert rates("backbone", 1250, 32) == pytest.approx((lr, backbone / 2))
    assert rates("detector", 1250, 32) == pytest.approx((lr / 2, backbone / 2))
    assert rates("detector", 8, 32) == pytest.approx((lr / 4, backbone / 4))
    assert rates("scratch", 8, 32) == (lr, lr)


@pytest.mark.parametrize("variant", ["atto", "n", "s"])
def test_a_domain_trains_at_four_times_the_published_rate_whatever_the_batch(variant: str) -> None:
    published = published_schedule(variant, 1).settings.lr
    for batch_size, n_images in ((None, 96), (4, 96), (64, 5000)):
        derived = derive_schedule(
            8, variant=variant, n_images=n_images, batch_size=batch_size, start="domain"
        )
        assert derived.settings.lr == derived.settings.backbone_lr == 4 * published
        assert "an adapter" in derived.reasons["rates"]
    scratch = derive_schedule(8, variant=variant, n_images=96).settings
    assert (
        derive_schedule(8, variant=variant, n_images=96, start="domain").settings.strong_epochs
        == scratch.strong_epochs
    )


def test_derived_warm_up_and_average_are_at_most_a_twentieth_of_a_short_run() -> None:
    schedule = derive_schedule(50, variant="pico", n_images=205)
    assert (schedule.settings.batch_size, schedule.n_steps) == (8, 1250)
    assert schedule.settings.warmup_steps == math.ceil(1250 / 20)
    assert 1 / (1 - schedule.settings.ema_decay) == pytest.approx(1250 / 20)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_augmentation_follows_the_windows(variant: str) -> None:
    schedule = published_schedule(variant, 10)
    settings = schedule.settings
    (a, b), (_, c) = settings.mosaic_epochs, settings.strong_epochs
    strong = [settings.strong_epochs.covers(epoch) for epoch in (a - 1, a, b - 1, b, c - 1, c)]
    assert strong == [False, True, True, True, True, False]
    assert [settings.mosaic_epochs.covers(epoch) for epoch in (a - 1, a, b - 1, b)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert settings.tile_size == (settings.size // 2,) * 2
    assert settings.published
    sizes = Collate(settings).sizes
    if variant in ("atto", "femto", "pico"):
        assert settings.mixup_epochs == settings.copyblend_epochs == (0, 0)
        assert sizes == ()
    elif variant != "n":
        assert settings.mixup_epochs == (a, b)
        assert settings.copyblend_epochs == (a, c)
        assert settings.multi_scale_epochs == (0, settings.stop_epoch)
        assert {min(sizes), max(sizes)} == {(480, 480), (800, 800)}


def test_another_input_size_carries_everything_that_is_measured_in_it() -> None:
    settings = derive_schedule(20, variant="s", n_images=64, size=320).settings
    assert settings.size == 320
    assert settings.tile_size == (160, 160)
    assert set(Collate(settings).sizes) == {(side, side) for side in range(224, 401, 32)}
    assert not settings.published


def test_schedule_describes_itself_in_plain_values() -> None:
    text = json.dumps(derive_schedule(72, variant="n", n_images=255).describe())
    assert '"mosaic": [2, 35]' in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: published_schedule("xs", 10), "Unknown variant 'xs'.*Did you mean"),
        (lambda: published_schedule("s", 0), "steps_per_epoch=0"),
        (lambda: derive_schedule(0, variant="s", n_images=5), "epochs=0"),
        (lambda: derive_schedule(3, variant="s", n_images=0), "n_images=0"),
        (lambda: derive_schedule(3, variant="s", n_images=5, batch_size=-1), "batch_size=-1"),
        (lambda: derive_schedule(3, variant="s", n_images=5, size=300), "size=300.*multiples of 32"),
    ],
)
def test_impossible_schedules_are_refused(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_small_boxes_are_learned_unless_few() -> None:
    def limit(sides: list[float], **changes: int) -> int:
        schedule = derive_schedule(20, variant="atto", n_images=64, box_sides=np.array(sides), **changes)
        return schedule.settings.min_box_size

    # Pixels of Atto's 320; published 12.
    assert limit([0.5] * 100) == 12
    assert limit([0.01] * 4 + [0.5] * 96) == 12
    assert limit([6.5 / 320] * 80 + [0.5] * 20) == 6
    assert limit([6.5 / 320] * 80 + [0.5] * 20, size=640) == 12
    assert limit([0.001] * 100) == 1
    assert limit([]) == derive_schedule(20, variant="atto", n_images=64).settings.min_box_size == 12
