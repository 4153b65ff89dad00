"""A detection run that adds a domain to a frozen detector: what it starts from, and what it saves."""

from __future__ import annotations

__all__ = ["DomainRun"]

from collections.abc import Sequence
from typing import Any

from thawline.domains.attach import attach_domain
from thawline.domains.domain import Domain, base_digest
from thawline.errors import ConfigError
from thawline.metrics.detection import DetectionMetrics
from thawline.models.deimv2.checkpoints.read import config_of, read_checkpoint
from thawline.models.deimv2.model import DEIMv2
from thawline.recipe import RunConfig
from thawline.training.evaluation import Evaluation

ONLY_IN_TRAINING = {"num_denoising", "label_noise", "box_noise"}
"""Settings of a network that its detections do not depend on."""
THRESHOLD = 0.4
"""Threshold of a domain that was trained without held-out images."""


class DomainRun:
    """The domain that a run trains.

    Args:
        config: the recipe, with `domain` and `base.weights`.
    Raises: ConfigError: `base.weights` is no detector, or `base.overrides` would change its shape.
    """

    def __init__(self, config: RunConfig) -> None:
        base: Any = config.base  # a DetectionBase with weights, as RunConfig has checked
        self.name, self._config, self._weights = str(config.domain), config, str(base.weights)
        if shaping := sorted(base.overrides.keys() - ONLY_IN_TRAINING):
            raise ConfigError(
                f"`base.overrides` has '{shaping[0]}': a domain takes its base as it is. Only "
                f"{', '.join(sorted(ONLY_IN_TRAINING))} may differ."
            )
        checkpoint = read_checkpoint(self._weights)
        if checkpoint.layout == "backbone":
            raise ConfigError(
                f"`domain` adds to a trained detector, and '{self._weights}' is a backbone alone: train "
                "a detector on it first."
            )
        self.image_size = config_of(checkpoint, base.variant, {}).image_size
        """Height and width that the base takes, and all of its domains."""

    def attach(self, model: DEIMv2) -> DEIMv2:
        """Freeze the detector and attach the adapter, in place. Raises: ConfigError: see `attach_domain`."""
        self.digest = base_digest(model)
        return attach_domain(model, self._config.tuner)

    def about(self, model: DEIMv2, class_names: Sequence[str], evaluation: Evaluation | None) -> Domain:
        """Return what domain.json says of the domain as it stands, after its latest evaluation."""
        metrics: DetectionMetrics | None = None
        if evaluation is not None and evaluation.detections is not None:
            metrics = evaluation.detections[2]
        return Domain(
            name=self.name,
            class_names=tuple(class_names),
            threshold=THRESHOLD if metrics is None else round(float(metrics.threshold), 3),
            base=self.digest,
            base_label=self._weights,
            image_size=self.image_size,
            tuner=self._config.tuner.method,
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            metrics={} if evaluation is None else evaluation.metrics,
            recipe=self._config.to_mapping(),
        )
