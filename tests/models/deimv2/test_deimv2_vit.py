"""Rotary embedding, and DINOv3 against transformers' own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from thawline.models.deimv2.network.vit import Attention, RotaryEmbedding, VisionTransformer, ViTConfig
from thawline.ops.rotary import rotate

CONFIG = ViTConfig(
    family="dinov3",
    dim=16,
    num_heads=2,
    depth=3,
    hidden_dim=24,
    out_blocks=(1, 2),
    n_storage_tokens=3,
    norm_eps=1e-5,
    layer_scale=0.5,
    mask_key_bias=True,
    final_norm=True,
)


def table(size: tuple[int, int], n_prefix: int = 2):
    return RotaryEmbedding(8)(size, torch.float32, n_prefix)


def test_rotation_keeps_prefix_tokens_and_lengths() -> None:
    x = torch.randn(2, 3, 2 + 4 * 6, 8)
    turned = rotate(x, table((4, 6)))
    assert torch.equal(turned[:, :, :2], x[:, :, :2])
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert (turned[:, :, 2:] - x[:, :, 2:]).abs().max() > 0.1


def test_heads_rotated_in_one_pass_give_the_values_and_gradients_of_the_plain_form() -> None:
    attention = Attention(24, 3, mask_key_bias=False).double()
    cos, sin = (half.double() for half in table((3, 5)))
    x = torch.randn(2, 17, 24, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 17, 24, dtype=torch.float64)
    qkv = attention.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    query, key = rotate(qkv[0], (cos, sin)), rotate(qkv[1], (cos, sin))
    mixed = (query @ key.mT / 8**0.5).softmax(-1) @ qkv[2]
    expected = attention.proj(mixed.transpose(1, 2).flatten(2))
    assert_close(attention(x, (cos, sin)), expected)
    weights = [x, *attention.parameters()]
    ours = torch.autograd.grad(attention(x, (cos, sin)), weights, grad)
    assert_close(ours, torch.autograd.grad(expected, weights, grad))
    with torch.no_grad():  # the plain form
        assert_close(attention(x, (cos, sin)), expected)


def test_rotated_products_depend_on_the_distance_of_places_alone() -> None:
    query, key = torch.randn(8), torch.randn(8)
    cos, sin = table((5, 5), n_prefix=0)
    product = rotate(query.expand(25, 8), (cos, sin)) @ rotate(key.expand(25, 8), (cos, sin)).T
    grid = product.view(5, 5, 5, 5)
    assert_close(grid[0, 0, 1, 2], grid[2, 1, 3, 3])
    assert_close(grid[4, 4, 3, 1], grid[3, 3, 2, 0])


def test_each_axis_is_scaled_by_its_own_length() -> None:
    _, sin = table((3, 6), n_prefix=0)
    sin = sin.view(3, 6, 8)
    # Rows at ±2/3 and 0, columns at ±1/6, ±1/2, ±5/6; the periods are 1 and 10.
    assert_close(sin[2, :, 0], torch.full((6,), 2 * torch.pi * 2 / 3).sin())
    assert_close(sin[0, 3, 2:4], (2 * torch.pi / 6 / torch.tensor([1.0, 10.0])).sin())


def test_training_stretches_the_rotation_anew_in_every_block() -> None:
    vit = VisionTransformer(replace(CONFIG, rope_rescale=2.0))
    tables = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda _, args: tables.append(args[1]))
    vit.train()(torch.rand(1, 3, 32, 48))
    vit.eval()(torch.rand(1, 3, 32, 48))
    drawn, kept = tables[:3], tables[3:]
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert kept[0][0] is kept[1][0] is kept[2][0]


def test_a_key_bias_counts_for_nothing_where_it_is_masked() -> None:
    vit, image = VisionTransformer(CONFIG).eval(), torch.rand(1, 3, 32, 32)
    before = vit(image)[-1]
    nn.init.normal_(vit.blocks[0].attn.qkv.bias[16:32].data)
    assert_close(vit(image)[-1], before)
    state = {key: value for key, value in vit.state_dict().items() if "bias_mask" not in key}
    assert not any(vit.load_state_dict(state))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_dinov3_equals_transformers(ffn: str) -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    ours = VisionTransformer(replace(CONFIG, ffn=ffn)).eval()
    for name, parameter in ours.named_parameters():
        nn.init.normal_(parameter.data, std=0.3, mean=float(name.endswith(("norm.weight", "gamma"))))
    nn.init.zeros_(ours.mask_token)
    theirs = DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=3,
            intermediate_size=24,
            num_register_tokens=3,
            use_gated_mlp=ffn == "swiglu",
            hidden_act="silu" if ffn == "swiglu" else "gelu",
            key_bias=False,
            mlp_bias=True,
        )
    ).eval()
    state = _as_transformers(ours)
    if "model.layer.0.norm1.weight" not in theirs.state_dict():  # as older versions have it
        state = {name.removeprefix("model."): value for name, value in state.items()}
    assert not any(theirs.load_state_dict(state, strict=True))
    image = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        hidden = theirs(image, output_hidden_states=True).hidden_states
        for block, level in zip((1, 2), ours(image), strict=True):
            wanted = theirs.norm(hidden[block + 1])[:, 4:].transpose(1, 2).unflatten(-1, (2, 3))
            assert_close(level, wanted, rtol=0, atol=1e-5)


def _as_transformers(vit: VisionTransformer) -> dict[str, torch.Tensor]:
    """Meta's names to transformers', with queries, keys and values apart."""
    plain = {
        "storage_tokens": "embeddings.register_tokens",
        "cls_token": "embeddings.cls_token",
        "patch_embed.proj": "embeddings.patch_embeddings",
        "attn.proj": "attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.up_proj",
        "mlp.w3": "mlp.down_proj",
        "blocks.": "model.layer.",
    }
    out = {"embeddings.mask_token": vit.mask_token.data[:, None]}
    for key, value in vit.state_dict().items():
        if key == "mask_token" or "rope" in key or "bias_mask" in key:
            continue
        name = key
        for ours, theirs in plain.items():
            name = name.replace(ours, theirs)
        if "attn.qkv" in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                if not (part == "k" and key.endswith("bias")):
                    out[name.replace("attn.qkv", f"attention.{part}_proj")] = third
        else:
            out[name] = value
    return out
