"""The gradient tap and the column write, held to autograd on the whole weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thawline.ops.partial_linear import place_of, read_columns, tap_columns, write_columns

B, T, IN, OUT, R = 2, 3, 8, 6, 4
INDEX = torch.tensor([0, 2, 5, 7])


def tapped(x: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return tap_columns(nn.functional.linear(x, weight), x, columns, INDEX, scale)


@pytest.mark.parametrize("shape", [(IN,), (T, IN), (B, T, IN), (B, 5, T, IN)], ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("x_needs_grad", [False, True], ids=["x frozen", "x trained"])
def test_gradient_equals_dense_gradient_on_selected_columns(shape, x_needs_grad):
    x = torch.randn(*shape, dtype=torch.double, requires_grad=x_needs_grad)
    weight = torch.randn(OUT, IN, dtype=torch.double, requires_grad=True)
    dense = torch.autograd.grad(nn.functional.linear(x, weight).square().sum(), [weight] + [x] * x_needs_grad)

    columns = torch.zeros(OUT, R, dtype=torch.double, requires_grad=True)
    loss = tapped(x, weight.detach(), columns, scale=3.0).square().sum()
    ours = torch.autograd.grad(loss, [columns] + [x] * x_needs_grad)

    torch.testing.assert_close(ours[0], 3.0 * dense[0][:, INDEX], rtol=0, atol=1e-13)
    if x_needs_grad:
        assert torch.equal(ours[1], dense[1])


def test_gradient_of_a_transposed_input_and_of_an_expanded_output_gradient():
    x = torch.randn(IN, T, dtype=torch.double).t()
    assert not x.is_contiguous()
    columns = torch.zeros(OUT, R, dtype=torch.double, requires_grad=True)
    tapped(x, torch.randn(OUT, IN, dtype=torch.double), columns).sum().backward()
    torch.testing.assert_close(columns.grad, x[:, INDEX].sum(0).expand(OUT, R))


def test_only_the_selected_inputs_are_kept_and_in_the_dtype_of_the_output():
    x = torch.randn(T, IN)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tap_columns(
            torch.randn(T, OUT, dtype=torch.bfloat16), x, torch.zeros(OUT, R, requires_grad=True), INDEX
        )
    assert [(tuple(t.shape), t.dtype) for t in kept] == [((T, R), torch.bfloat16)]


def test_gradient_has_the_dtype_of_the_columns():
    x, columns = torch.randn(T, IN, dtype=torch.bfloat16), torch.zeros(OUT, R, requires_grad=True)
    tapped(x, torch.randn(OUT, IN, dtype=torch.bfloat16), columns).float().sum().backward()
    assert columns.grad.dtype == torch.float32
    assert columns.grad.is_contiguous()


def test_output_shares_storage_and_may_be_changed_in_place():
    x, columns = torch.randn(T, IN), torch.zeros(OUT, R, requires_grad=True)
    y = nn.functional.linear(x, torch.randn(OUT, IN))
    out = tap_columns(y, x, columns, INDEX)
    assert out.data_ptr() == y.data_ptr()
    torch.relu_(out).sum().backward()
    torch.testing.assert_close(columns.grad, (y > 0).float().t() @ x[:, INDEX])


def test_second_derivatives_are_refused_not_wrong():
    x, columns = torch.randn(T, IN, requires_grad=True), torch.zeros(OUT, R, requires_grad=True)
    loss = tapped(x, torch.randn(OUT, IN), columns).square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives.*create_graph"):
        torch.autograd.grad(loss, columns, create_graph=True)


def test_on_backward_is_called_before_the_linears_own_backward():
    order = []
    x = torch.randn(T, IN, requires_grad=True)
    y = nn.functional.linear(x, torch.randn(OUT, IN))
    y.register_hook(lambda grad: order.append("linear"))
    tap_columns(
        y, x, torch.zeros(OUT, R, requires_grad=True), INDEX, on_backward=lambda: order.append("tap")
    ).sum().backward()
    assert order == ["tap", "linear"]


def test_write_leaves_other_columns_alone():
    weight, columns = torch.randn(OUT, IN), torch.randn(OUT, R)
    before = weight.clone()
    write_columns(weight, INDEX, columns)
    assert torch.equal(weight[:, INDEX], columns)
    others = [i for i in range(IN) if i not in INDEX]
    assert torch.equal(weight[:, others], before[:, others])


def test_write_into_a_transposed_view():
    weight = torch.zeros(IN, OUT)
    write_columns(weight.t(), INDEX, torch.ones(OUT, R))
    assert torch.equal(weight.sum(1), torch.tensor([6.0, 0, 6, 0, 0, 6, 0, 6]))


def test_writing_between_forward_and_backward_does_not_invalidate_the_graph():
    weight, x = torch.randn(OUT, IN), torch.randn(T, IN, requires_grad=True)
    y = nn.functional.linear(x, weight)
    write_columns(weight, INDEX, weight[:, INDEX].clone())
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(T, IN))


@pytest.mark.parametrize(
    ("index", "adjacent"),
    [([3, 4, 5], True), ([5], True), ([2, 9, 4], False), ([4, 3], False), ([0, 2], False)],
)
def test_adjacent_columns_are_read_and_written_as_a_slice(index, adjacent):
    weight, columns = torch.randn(7, 10, 2), torch.randn(7, len(index), 2)
    place, expected = place_of(torch.tensor(index)), weight.clone()
    assert isinstance(place, slice) == adjacent
    assert torch.equal(read_columns(weight, place), weight[:, index])
    assert read_columns(weight, place).data_ptr() != weight.data_ptr()
    expected[:, index] = columns
    write_columns(weight, place, columns)
    assert torch.equal(weight, expected)
