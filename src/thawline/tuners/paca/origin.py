"""Columns as they were before a base was quantised, and sketches that tell one base's columns from another's.

Of a quantised base the changed columns can start from the values of the original checkpoint: that removes
their quantisation error, at no cost in a step. They are read column by column; the model is never loaded.

A saved change means something on the columns it started from alone. An adapter's config keeps a sketch of
them: products with a few random vectors, whose mean square difference is that of the columns (Johnson and
Lindenstrauss). So it says how far another base is away, in five numbers per layer.
"""

from __future__ import annotations

__all__ = ["OriginalColumns", "difference", "sketch"]

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thawline.errors import CheckpointError
from thawline.files import read_json

DTYPES = ("BF16", "F16", "F32", "F64")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
N_VECTORS = 4


class OriginalColumns:
    """Reads columns of a checkpoint's weights.

    Args:
        folder: of a checkpoint as transformers saves it: safetensors, in one file or several.
    Raises: CheckpointError: for a folder without such files.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        if (self.folder / INDEX).is_file():
            self._files = {
                key: str(name) for key, name in read_json(self.folder / INDEX)["weight_map"].items()
            }
        elif (self.folder / SINGLE).is_file():
            with self._open(SINGLE) as file:
                self._files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise CheckpointError(
                f"`columns_from`: '{folder}' has neither {SINGLE} nor {INDEX}. Give the folder of the "
                "checkpoint in 16 bits. For a saved adapter: config = PacaConfig.from_pretrained(adapter); "
                "config.columns_from = FOLDER; PeftModel.from_pretrained(base, adapter, config=config)."
            )

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Check that the weight of the layer called `name` is there, in floats, of this shape.

        Raises: CheckpointError: naming the layer.
        """
        key = self._key(name)
        with self._open(self._files[key]) as file:
            found = file.get_slice(key)
            if found.get_dtype() not in DTYPES or found.get_shape() != list(shape):
                raise CheckpointError(
                    f"`columns_from`: '{key}' in '{self.folder}' is {found.get_dtype()} {found.get_shape()}; "
                    f"'{name}' needs floats {list(shape)}: the checkpoint that the base was quantised from."
                )

    def read(self, name: str, index: Tensor) -> Tensor:
        """Return the columns `index` of the weight of the layer called `name`: (O, R), as stored."""
        key = self._key(name)
        with self._open(self._files[key]) as file:
            weight = file.get_slice(key)
            return torch.cat([weight[:, column : column + 1] for column in index.tolist()], dim=1)

    def _key(self, name: str) -> str:
        """Return a weight's name in the checkpoint, which may be of a model around this one, or inside it."""
        wanted = f"{name}.weight"
        near = [key for key in self._files if key.endswith(f".{wanted}") or wanted.endswith(f".{key}")]
        keys = [wanted] if wanted in self._files else near
        if len(keys) != 1:
            raise CheckpointError(
                f"`columns_from`: '{self.folder}' has {len(keys)} weights for '{name}': not the checkpoint "
                "that the base was quantised from, or one with other names or another arrangement."
            )
        return keys[0]

    def _open(self, name: str) -> safe_open:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"`columns_from`: '{self.folder / name}' cannot be read: {error}"
            ) from error


def sketch(columns: Tensor, name: str) -> list[float]:
    """Return the norm of columns, (O, R, ...), and their products with random vectors drawn by `name`."""
    flat = columns.detach().flatten(1).cpu().double()
    draw = np.random.RandomState(zlib.crc32(name.encode()))
    left, right = (torch.from_numpy(draw.choice((-1.0, 1.0), (N_VECTORS, size))) for size in flat.shape)
    products = torch.einsum("ko,or,kr->k", left, flat, right)
    return [float(f"{value:.6g}") for value in (float(flat.norm()), *products.tolist())]


def difference(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> float:
    """Return about how far two bases' columns are apart, relative to their norm, from sketches by layer."""
    pairs = [(np.array(first[name]), np.array(second[name])) for name in first.keys() & second.keys()]
    apart = sum(float(np.mean((a[1:] - b[1:]) ** 2)) for a, b in pairs)
    size = sum(float(max(a[0], b[0]) ** 2) for a, b in pairs)
    return (apart / size) ** 0.5 if size else 0.0
