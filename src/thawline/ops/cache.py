"""Cache of a few tensors that depend on shapes alone."""

from __future__ import annotations

__all__ = ["TensorCache"]

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class TensorCache:
    """Cache of the last `size` results, by key; put shape, dtype and device into the key.

    Tensors are built outside inference mode, so that one built in evaluation also serves training. Under
    torch.compile nothing is cached: the tensors are part of the graph. Copies and pickles are empty.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the cached `build()` of this key, or build it now."""
        if torch.compiler.is_compiling():
            return build()
        value = self._kept.pop(key, None)
        if value is None:
            with torch.inference_mode(False), torch.no_grad():
                value = build()
        self._kept[key] = value
        if len(self._kept) > self.size:
            del self._kept[next(iter(self._kept))]
        return value

    @property
    def last_key(self) -> Any:
        """Key that was asked for last."""
        return next(reversed(self._kept))

    def clear(self) -> None:
        """Empty the cache, if what the tensors were built from has changed."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorCache:
        return TensorCache(self.size)

    def __reduce__(self) -> tuple[type[TensorCache], tuple[int]]:
        return TensorCache, (self.size,)
