"""The scale of an adapter as PEFT and its users change it: `set_scale`, `scale_layer`, `unscale_layer`."""

from __future__ import annotations

__all__ = ["ScaledLayer"]

from collections.abc import Callable, Iterable


class ScaledLayer:
    """Mixin of a tuner's layer.

    Attributes:
        scaling: current scale per adapter.     base_scaling: alpha / r per adapter.
    """

    scaling: dict[str, float]
    base_scaling: dict[str, float]
    active_adapters: list[str]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale the adapter by `scale` times its own alpha / r."""
        self._rescale([adapter], lambda name: scale * self.base_scaling[name])

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by `scale`."""
        self._rescale(self.active_adapters, lambda name: self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by `scale`, or with None reset it to alpha / r."""
        if scale is None:
            self._rescale(self.active_adapters, self.base_scaling.__getitem__)
        else:
            self._rescale(self.active_adapters, lambda name: self.scaling[name] / scale)

    def _rescale(self, adapter_names: Iterable[str], scale_of: Callable[[str], float]) -> None:
        for name in adapter_names:
            if name in self.scaling:
                self.scaling[name] = scale_of(name)
