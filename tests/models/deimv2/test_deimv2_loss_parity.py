"""Loss terms and gradient norms on the authors' train-mode batch.

Their numbers come from a float32 network, so they carry the rounding of the processor and the kernels that
computed them. A float32 network of ours meets them to 1e-4 only where every sum runs in the same order:
oneDNN's AVX2 convolutions alone move `loss_fgl` of N by 1.6e-4 and the gradient of Pico by 2.1e-4, and
switching oneDNN off brings both back to 3e-5. Our network therefore runs in float64, which no processor moves
(9e-7 and less between AVX2 and SSE kernels), and what is left is the rounding of their numbers, measured as:

    loss terms                   2.4e-5
    sum of all terms             2.3e-7
    whole gradient               2.3e-5
    gradient of one kind         1.1e-4
    gradient of one parameter    median 1.1e-4, 90 % within 8.6e-4, 99 % within 1.3e-2, all within 3.0e-2

The last is so wide because the gradient of bilinear sampling jumps where a point crosses from one cell to the
next: one rounding of the image moves some of these norms by percents.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thawline.models.deimv2 import Criterion, DEIMv2, DetectionOutput, Target

PLAIN, DENOISING = {"num_denoising": 0}, {"num_denoising": 100, "label_noise": 0, "box_noise": 0}
KINDS = {"mal": "_mal", "bbox": "_bbox", "giou": "_giou", "fgl": "_fgl", "ddf": "_ddf"}
PARAMETER_BOUNDS = {0.5: 2e-4, 0.9: 2e-3, 0.99: 3e-2, 1: 6e-2}
"""Largest relative distance of a parameter's gradient norm, by quantile of the parameters: twice what was
measured."""


def train_mode(
    official: ModuleType, size: str, settings: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[DEIMv2, DetectionOutput, list[Target]]:
    rescale = {"rope_rescale": None} if size in "lx" else {}
    model = DEIMv2.from_variant(size, **settings, **rescale).train()
    model.load_state_dict(official.state_dict(size))  # rounded to float32, as theirs were
    images, targets = official.train_batch(size)
    model = model.to(dtype)
    return model, model(images.to(dtype), targets), targets


def check_terms(terms: dict[str, Tensor], expected: dict[str, Any]) -> None:
    assert list(terms) == list(expected["losses"])
    losses = {name: term.item() for name, term in terms.items()}
    assert_close(losses, expected["losses"], rtol=1e-4, atol=0)
    assert sum(losses.values()) == pytest.approx(expected["total"], rel=1e-6)


def gradient_norms(loss: Tensor, model: DEIMv2) -> dict[str, float]:
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, trainable.values(), retain_graph=True, materialize_grads=True)
    return {name: gradient.norm().item() for name, gradient in zip(trainable, gradients, strict=True)}


def length(norms: dict[str, float]) -> float:
    return torch.tensor(list(norms.values())).norm().item()


def check_norms_by_term(terms: dict[str, Tensor], model: DEIMv2, expected: dict[str, Any]) -> None:
    for kind, norm in expected["grad_norm_by_term"].items():
        loss = sum(term for name, term in terms.items() if KINDS[kind] in name)
        assert length(gradient_norms(loss, model)) == pytest.approx(norm, rel=3e-4)


def check_norms_by_parameter(ours: dict[str, float], theirs: dict[str, float], whole: float) -> None:
    zero = 1e-6 * whole  # the gradient of a bias before a norm is rounding alone
    assert all(ours[name] <= 2 * zero for name, norm in theirs.items() if norm <= zero)
    distances = [abs(ours[name] / norm - 1) for name, norm in theirs.items() if norm > zero]
    for quantile, bound in PARAMETER_BOUNDS.items():
        assert np.quantile(distances, quantile) <= bound, quantile


@pytest.mark.parametrize("size", ["pico", "n", "s", "l"])
def test_terms_and_gradients_are_the_authors(official: ModuleType, size: str) -> None:
    expected = official.meta(size)["train"]
    model, output, targets = train_mode(official, size, PLAIN)
    criterion = Criterion(model.config)
    for epoch in ("0", "1000"):
        terms = criterion(output, targets, epoch=int(epoch))
        check_terms(terms, expected[epoch])
        if size == "pico":
            check_norms_by_term(terms, model, expected[epoch])
    norms, whole = gradient_norms(sum(terms.values()), model), expected["1000"]["grad_norm_total"]
    assert length(norms) == pytest.approx(whole, rel=1e-4)
    check_norms_by_parameter(norms, expected["1000"]["grad_norms"], whole)


@pytest.mark.parametrize("size", ["pico", "n", "s"])
def test_terms_and_gradients_with_denoising_are_the_authors(official: ModuleType, size: str) -> None:
    """And in float32 to ten times the largest distance of any processor and kernel tried, 2e-4."""
    expected = official.meta(size)["train_denoising"]
    with torch.set_grad_enabled(size != "s"):
        model, output, targets = train_mode(official, size, DENOISING)
        for epoch in ("1000", "0"):
            terms = Criterion(model.config)(output, targets, epoch=int(epoch))
            check_terms(terms, expected[epoch])
    if size == "s":
        return
    check_norms_by_term(terms, model, expected["0"])
    whole = length(gradient_norms(sum(terms.values()), model))
    assert whole == pytest.approx(expected["0"]["grad_norm_total"], rel=1e-4)

    model, output, targets = train_mode(official, size, DENOISING, torch.float32)
    rounded = Criterion(model.config)(output, targets, epoch=0)
    assert_close({name: term.double() for name, term in rounded.items()}, terms, rtol=2e-3, atol=0)
    assert length(gradient_norms(sum(rounded.values()), model)) == pytest.approx(whole, rel=2e-3)
