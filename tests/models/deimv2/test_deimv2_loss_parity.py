"""The loss of the authors' train-mode batch: every term, and how long its gradient is.

Their numbers come from a float32 network and carry its noise: the gradient of bilinear sampling jumps where a
point crosses from one cell to the next, so the gradients of small tensors differ by percents from those of
float64, theirs as well as ours. The small networks run in float64 here, the large ones in float32 for time.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thawline.models.deimv2 import Criterion, DEIMv2, DetectionOutput, Target

PLAIN, DENOISING = {"num_denoising": 0}, {"num_denoising": 100, "label_noise": 0, "box_noise": 0}


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def train_mode(
    official: ModuleType, size: str, dtype: torch.dtype, settings: dict[str, Any]
) -> tuple[DEIMv2, DetectionOutput, list[Target]]:
    rescale = {"rope_rescale": None} if size in "lx" else {}
    model = DEIMv2.from_variant(size, **settings, **rescale).train()
    model.load_state_dict(official.state_dict(size))
    images, targets = official.train_batch(size)
    return model, model(images.to(dtype), targets), targets


def check_terms(terms: dict[str, Tensor], expected: dict[str, Any]) -> None:
    assert list(terms) == list(expected["losses"])
    losses = {name: term.item() for name, term in terms.items()}
    assert_close(losses, expected["losses"], rtol=1e-4, atol=0)
    assert sum(losses.values()) == pytest.approx(expected["total"], rel=2e-6)


def gradient_norms(loss: Tensor, model: DEIMv2) -> dict[str, float]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trainable, retain_graph=True, materialize_grads=True)
    by_name = dict(
        zip([n for n, p in zip(names, parameters, strict=True) if p.requires_grad], gradients, strict=True)
    )
    return {name: gradient.norm().item() for name, gradient in by_name.items()}


def length(norms: dict[str, float]) -> float:
    return torch.tensor(list(norms.values())).norm().item()


@pytest.mark.parametrize(
    ("size", "dtype"),
    [("pico", torch.float64), ("n", torch.float64), ("s", torch.float32)],
    indirect=["dtype"],
    ids=["pico", "n", "s"],
)
def test_terms_and_gradients_are_the_authors(official: ModuleType, size: str, dtype: torch.dtype) -> None:
    model, output, targets = train_mode(official, size, dtype, PLAIN)
    criterion, expected = Criterion(model.config), official.meta(size)["train"]
    check_terms(criterion(output, targets, epoch=0), expected["0"])
    terms = criterion(output, targets, epoch=1000)
    check_terms(terms, expected["1000"])

    norms = gradient_norms(sum(terms.values()), model)
    whole = expected["1000"]["grad_norm_total"]
    assert length(norms) == pytest.approx(whole, rel=1e-4)
    large = {name: norm for name, norm in expected["1000"]["grad_norms"].items() if norm > 1e-3 * whole}
    off = sorted(abs(norms[name] / norm - 1) for name, norm in large.items())
    assert off[len(off) // 2] < 2e-4
    assert off[-1] < 0.1


@pytest.mark.parametrize(
    ("size", "dtype"),
    [("pico", torch.float64), ("n", torch.float64), ("s", torch.float32)],
    indirect=["dtype"],
    ids=["pico", "n", "s"],
)
def test_terms_with_denoising_are_the_authors(official: ModuleType, size: str, dtype: torch.dtype) -> None:
    with torch.set_grad_enabled(size == "pico"):
        model, output, targets = train_mode(official, size, dtype, DENOISING)
        criterion, expected = Criterion(model.config), official.meta(size)["train_denoising"]
        check_terms(criterion(output, targets, epoch=1000), expected["1000"])
        terms = criterion(output, targets, epoch=0)
        check_terms(terms, expected["0"])
    if size == "pico":
        for kind, norm in expected["0"]["grad_norm_by_term"].items():
            loss = sum(term for name, term in terms.items() if f"_{kind}" in name)
            assert length(gradient_norms(loss, model)) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32], indirect=True, ids=["l"])
def test_terms_of_l_are_the_authors(official: ModuleType, dtype: torch.dtype) -> None:
    with torch.no_grad():
        model, output, targets = train_mode(official, "l", dtype, PLAIN)
        for epoch in (0, 1000):
            terms = Criterion(model.config)(output, targets, epoch=epoch)
            check_terms(terms, official.meta("l")["train"][str(epoch)])
