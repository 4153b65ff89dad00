"""Settings of a detector's export."""

from __future__ import annotations

__all__ = ["FORMATS", "Format", "Settings"]

from dataclasses import dataclass
from typing import Literal, get_args

from thawline.errors import ConfigError
from thawline.exporters.certificate import BUDGETS
from thawline.exporters.forms import Sampling
from thawline.recipe.checks import at_least, one_of

Format = Literal["onnx", "openvino", "tensorrt", "pt2", "executorch"]
FORMATS = {"onnx": ".onnx", "openvino": ".xml", "tensorrt": ".engine", "pt2": ".pt2", "executorch": ".pte"}
"""Format → suffix of its file."""
OPSETS = {17: 8, 18: 8, 19: 9}
"""Opset → version of the file's format, the oldest that knows it."""
INT8_FORMATS = ("onnx", "openvino")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an export: format, batch, precision and error budget."""

    format: Format = "onnx"
    batch: int | None = None
    """Fixed number of images in a call; None: any."""
    opset: int = 17
    """Opset of the ONNX graph: 17, 18 or 19."""
    sampling: Sampling = "grid_sample"
    """`gather`: without GridSample, for runtimes that lack it."""
    half: bool = False
    """Weights and arithmetic in float16, inputs and outputs in float32."""
    int8: bool = False
    """Convolutions and products in 8-bit integers, calibrated and accepted on labelled images."""
    ap_budget: float = 0.5
    """Largest loss of AP in int8, of 100 points."""
    single_input: bool = False
    """Without `orig_target_sizes`; boxes are in 0–1."""
    budget: float | None = None
    """Largest box error in pixels; None: 0.5, 4 in half precision, any in int8."""

    def __post_init__(self) -> None:
        one_of("format", self.format, list(FORMATS))
        one_of("sampling", self.sampling, get_args(Sampling))
        if self.opset == 20:
            raise ConfigError(
                "`opset=20`: TensorRT computes its GridSample wrongly (TensorRT issue 4646). Use 17, 18, 19."
            )
        if self.opset not in OPSETS:
            raise ConfigError(f"`opset={self.opset}`: expected 17, 18 or 19.")
        if self.int8 and (self.half or self.format not in INT8_FORMATS):
            raise ConfigError("`int8` is for onnx and openvino, without `half`.")
        if self.format == "executorch" and (self.half or self.sampling != "gather" or self.batch is None):
            raise ConfigError(
                "`format=executorch` has no GridSample and a fixed batch: "
                "give `sampling=gather` and `batch`, without `half`."
            )
        at_least("ap_budget", self.ap_budget, 0)
        if self.batch is not None:
            at_least("batch", self.batch, 1)
        if self.budget is not None and not self.budget >= 0:
            raise ConfigError(f"`budget={self.budget}`: expected pixels, 0 or more.")

    @property
    def precision(self) -> str:
        """Precision of the file."""
        return "int8" if self.int8 else "fp16" if self.half else "fp32"

    def limit(self, precision: str) -> float:
        """Largest box error in a precision, pixels."""
        return BUDGETS[precision] if self.budget is None else self.budget
