"""Vision transformers of S to X: ViT-Tiny and Tiny+, distilled by DEIMv2's authors, and DINOv3 S and S+.

One class for both families; they differ in what `ViTConfig` names. Parameter names are those of the published
files: Meta's DINOv3 and the authors' distilled weights.

Source: Siméoni et al., DINOv3, arXiv 2508.10104; Heo et al., rotary position embedding for vision
transformers, ECCV 2024. Differs from the code of both: the rotation's table is made once for a map size, not
in every block.
"""

from __future__ import annotations

__all__ = [
    "Attention",
    "Block",
    "LayerScale",
    "MaskedBiasLinear",
    "PatchEmbed",
    "RotaryEmbedding",
    "SwiGLU",
    "ViTConfig",
    "VisionTransformer",
]

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.errors import ConfigError
from thawline.ops.cache import TensorCache
from thawline.ops.rotary import Table, rotated_heads
from thawline.ops.wide import WideBuffers

ROPE_BASE = 100.0


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of a vision transformer."""

    family: Literal["vit_tiny", "dinov3"]
    dim: int
    num_heads: int
    depth: int = 12
    patch_size: int = 16
    hidden_dim: int
    """Width of the feed-forward block."""
    ffn: Literal["mlp", "swiglu"] = "mlp"
    out_blocks: tuple[int, ...]
    """Blocks whose output is taken, ascending."""
    n_storage_tokens: int = 0
    """Number of register tokens."""
    norm_eps: float = 1e-6
    layer_scale: float | None = None
    """Initial value of a learnable scale on each residual branch; None: no such scale."""
    mask_key_bias: bool = False
    """Multiply the bias of keys by a buffer of zeros, as DINOv3 was trained."""
    final_norm: bool = False
    """Apply one shared norm to every output."""
    rope_rescale: float | None = None
    """In training, stretch the rotary coordinates by a random factor in [1/x, x], drawn by every block for
    itself, as the authors' code does. None: never."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 4:
            raise ConfigError(
                f"`num_heads={self.num_heads}` cuts `dim={self.dim}` into heads of "
                f"{self.dim / self.num_heads:g}; rotary embedding needs a multiple of 4."
            )
        taken = list(self.out_blocks)
        if not taken or taken != sorted(set(taken) & set(range(self.depth))):
            raise ConfigError(
                f"`out_blocks={self.out_blocks}`: expected some of the {self.depth} blocks, 0 … "
                f"{self.depth - 1}, in ascending order."
            )
        if self.rope_rescale is not None and self.rope_rescale < 1:
            raise ConfigError(
                f"`rope_rescale={self.rope_rescale}`: expected a factor of at least 1, or None: never."
            )


class VisionTransformer(nn.Module):
    """Vision transformer from an image to the patch tokens of `config.out_blocks`, as maps."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.n_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.zeros(1, config.n_storage_tokens, dim))
        if config.family == "dinov3":
            # Read in pretraining only; kept because the published files hold it.
            self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(dim, config.patch_size)
        self.rope_embed = RotaryEmbedding(dim // config.num_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.final_norm:
            self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self._init_weights()

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised, to maps (B, C, H / 16, W / 16), one per entry of `out_blocks`."""
        patches = self.patch_embed(pixel_values)
        size = (patches.shape[-2], patches.shape[-1])
        prefix = self.prefix().expand(patches.shape[0], -1, -1)
        n_prefix = prefix.shape[1]
        x = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)

        maps = []
        for index, block in enumerate(self.blocks):
            stretch = self.config.rope_rescale if self.training else None
            x = block(x, self.rope_embed(size, x.dtype, n_prefix, stretch))
            if index in self.config.out_blocks:
                taken = self.norm(x) if self.config.final_norm else x
                maps.append(taken[:, n_prefix:].transpose(1, 2).unflatten(-1, size))
            if index == max(self.config.out_blocks):
                break
        return maps

    def prefix(self) -> Tensor:
        """Return class and storage tokens, (1, n, C)."""
        tokens = [self.cls_token]
        if self.config.family == "dinov3":
            # Zero, but it gives the mask token a gradient, which data-parallel training waits for.
            tokens = [self.cls_token + 0 * self.mask_token]
        if self.config.n_storage_tokens:
            tokens.append(self.storage_tokens)
        return torch.cat(tokens, dim=1)

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("_tokens") or name == "cls_token":
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """Convolution from an image to a map of patches."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, H / patch, W / patch)."""
        return self.proj(x)


class Block(nn.Module):
    """Pre-norm attention and feed-forward block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(dim, config.num_heads, mask_key_bias=config.mask_key_bias)
        self.ls1 = _layer_scale(config)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = FFN[config.ffn](dim, config.hidden_dim)
        self.ls2 = _layer_scale(config)

    def forward(self, x: Tensor, table: Table) -> Tensor:
        """(B, T, C) to the same."""
        x = x + self.ls1(self.attn(self.norm1(x), table))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head attention with rotary position embedding."""

    def __init__(self, dim: int, num_heads: int, *, mask_key_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = MaskedBiasLinear(dim, 3 * dim) if mask_key_bias else nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Table) -> Tensor:
        """(B, T, C) to the same."""
        query, key, value = rotated_heads(self.qkv(x), table, self.num_heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MaskedBiasLinear(nn.Linear):
    """Linear layer to queries, keys and values whose bias is multiplied by a buffer.

    The buffer is one for queries and values and zero for keys. (The authors' constructor leaves it NaN, so
    their L and X give NaN until a checkpoint fills it.) A state dict without it means this default.
    """

    bias_mask: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        mask = torch.ones(3, out_features // 3)
        mask[1] = 0
        self.register_buffer("bias_mask", mask.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return F.linear(x, self.weight, self.bias * self.bias_mask)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}bias_mask", self.bias_mask)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        x = self.fc1(x)
        return self.fc2(F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x))


class SwiGLU(nn.Module):
    """w3(silu(w1(x)) · w2(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        gate = self.w1(x)
        gate = F.silu(gate, inplace=not torch.is_grad_enabled())
        return self.w3(gate * self.w2(x))


FFN: dict[str, type[MLP | SwiGLU]] = {"mlp": MLP, "swiglu": SwiGLU}


class LayerScale(nn.Module):
    """A learnable factor for each channel."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return x * self.gamma


class RotaryEmbedding(WideBuffers):
    """Rotary angles of each patch centre, row and column each scaled to -1 … 1 over its own length."""

    periods: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        n = head_dim // 4
        exponents = torch.arange(n, dtype=torch.float32) / n
        # The published files hold the periods, so that they, not this formula, decide the last bit.
        self.register_buffer("periods", (ROPE_BASE**exponents).to(torch.get_default_dtype()))
        self._tables = TensorCache()

    def forward(
        self, size: tuple[int, int], dtype: torch.dtype, n_prefix: int, rescale: float | None = None
    ) -> Table:
        """Return the table of a map.

        Args:
            size: (H, W) in patches.        n_prefix: tokens before the patches, which are not rotated.
            rescale: x: stretch the coordinates by a random factor in [1/x, x]. Such a table is not kept.
        """
        if rescale is not None:
            factor = torch.empty((), device=self.periods.device).uniform_(-1, 1) * math.log(rescale)
            return self._table(size, dtype, n_prefix, factor.exp())
        key = (*size, dtype, n_prefix, self.periods.dtype, self.periods.device)
        return self._tables.get(key, lambda: self._table(size, dtype, n_prefix))

    def _table(
        self, size: tuple[int, int], dtype: torch.dtype, n_prefix: int, stretch: Tensor | None = None
    ) -> Table:
        angles = self.angles(size, n_prefix, stretch).tile(2)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def angles(self, size: tuple[int, int], n_prefix: int, stretch: Tensor | None = None) -> Tensor:
        """Return the angle of each pair of channels, (T, head_dim / 2)."""
        # Coordinates in float32 also in a float64 model, as the authors' are; the periods widen the angles.
        rows, columns = (
            (torch.arange(n, device=self.periods.device, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in size
        )
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        if stretch is not None:
            place = place * stretch
        angles = (2 * math.pi * place[:, :, None] / self.periods).flatten(1)
        # A prefix token turns by no angle: cosine 1, sine 0 give it back bit for bit.
        return F.pad(angles, (0, 0, n_prefix, 0))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._tables.clear()


def _layer_scale(config: ViTConfig) -> nn.Module:
    return nn.Identity() if config.layer_scale is None else LayerScale(config.dim, config.layer_scale)
