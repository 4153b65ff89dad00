"""The tap of a convolution, held to autograd on the whole weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thawline.ops.partial_conv import ConvGeometry, conv_columns, tap_channels

CONVS = {
    "plain": {"in_channels": 6, "out_channels": 4, "kernel_size": (3, 2)},
    "strided, dilated": {
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": 3,
        "stride": (2, 1),
        "dilation": (1, 2),
        "padding": 1,
    },
    "pointwise": {"in_channels": 6, "out_channels": 5, "kernel_size": 1},
    "grouped": {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6, "padding": 1},
    "depthwise, two filters a channel": {"in_channels": 6, "out_channels": 12, "kernel_size": 3, "groups": 6},
    "same": {"in_channels": 6, "out_channels": 4, "kernel_size": (4, 3), "padding": "same"},
    "reflect": {
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 1,
        "padding_mode": "reflect",
    },
    "circular": {
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": (2, 1),
        "padding_mode": "circular",
    },
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("batched", [True, False], ids=["4d", "3d"])
def test_gradient_equals_dense_gradient_on_selected_channels(kind, batched):
    conv = nn.Conv2d(**CONVS[kind]).double()
    geometry = ConvGeometry.of(conv)
    x = torch.randn(2, 6, 8, 9, dtype=torch.double, requires_grad=True)
    x = x if batched else x[0]
    index = torch.tensor([0, 2])
    dense_w, dense_x = torch.autograd.grad(conv(x).square().sum(), (conv.weight, x))

    conv.requires_grad_(False)
    expected = conv_columns(dense_w, geometry).index_select(1, index)
    columns = torch.zeros_like(expected, requires_grad=True)
    loss = tap_channels(conv(x), x, columns, index, geometry, scale=2.0).square().sum()
    ours_columns, ours_x = torch.autograd.grad(loss, (columns, x))

    torch.testing.assert_close(ours_columns, 2.0 * expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours_x, dense_x)


def test_only_the_selected_channels_are_kept():
    conv = nn.Conv2d(6, 4, 3, groups=2).requires_grad_(False)
    x, kept = torch.randn(2, 6, 8, 9), []
    y = conv(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tap_channels(
            y, x, torch.zeros(4, 1, 3, 3, requires_grad=True), torch.tensor([2]), ConvGeometry.of(conv)
        )
    assert sum(t.numel() for t in kept if t.is_floating_point()) == 2 * 2 * 8 * 9


def test_columns_of_a_depthwise_weight_are_its_channels_and_share_storage():
    conv = nn.Conv2d(3, 6, 2, groups=3)
    columns = conv_columns(conv.weight, ConvGeometry.of(conv))
    assert columns.shape == (2, 3, 2, 2)
    assert columns.data_ptr() == conv.weight.data_ptr()
    assert torch.equal(columns[1, 2], conv.weight[5, 0])
