"""transformers' port of DEIMv2 with our weights: the reference of the detector's benches."""

from __future__ import annotations

__all__ = ["build_port"]

import transformers
from torch import nn

from thawline.errors import ConfigError
from thawline.models.deimv2.checkpoints.names import to_transformers
from thawline.models.deimv2.checkpoints.write import port_settings
from thawline.models.deimv2.model import DEIMv2


def build_port(detector: DEIMv2) -> nn.Module:
    """Build a `Deimv2ForObjectDetection` of the same shape and weights, with trainable norms, on the CPU.

    Raises: ConfigError: if the port lacks a weight, or transformers lacks the port.
    """
    if not hasattr(transformers, "Deimv2ForObjectDetection"):
        raise ConfigError(f"transformers {transformers.__version__} has no DEIMv2 to compare with: 5.23 has.")
    from transformers import Deimv2Config, Deimv2ForObjectDetection

    state = to_transformers(detector.state_dict())
    has_key_bias = any(name.endswith("attention.k_proj.bias") for name in state)
    settings = port_settings(detector.config, has_key_bias=has_key_bias)
    port: nn.Module = Deimv2ForObjectDetection(Deimv2Config(**settings))
    found = port.load_state_dict(state, strict=False)
    if found.unexpected_keys:
        raise ConfigError(f"transformers' port lacks {found.unexpected_keys[:3]}.")
    return port
