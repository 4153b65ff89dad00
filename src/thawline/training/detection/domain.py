"""Domains that a detection run makes: what they start from, and what is saved of them.

| run | frozen | a domain is |
|---|---|---|
| `domain`, or several datasets with an adapter | the detector of `base.weights` | adapter and class heads |
| several datasets with `tuner: none` | nothing: the detector that they share is the base | class heads |
"""

from __future__ import annotations

__all__ = ["DomainRun", "ExtendedDomainRun", "domain_bytes", "save_domains"]

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from thawline.domains import BASE, DOMAINS, is_shared
from thawline.domains.attach import attach_domain, is_class_layer, merged_detector
from thawline.domains.classes import extend_classes
from thawline.domains.domain import Domain, base_digest, load_domain, read_domain, save_domain
from thawline.domains.folder import SharedFolder, domain_folders, load_base, named_domain
from thawline.errors import CheckpointError, ConfigError
from thawline.metrics.detection import DetectionMetrics
from thawline.models.deimv2.checkpoints.read import config_of, read_checkpoint
from thawline.models.deimv2.config import with_overrides
from thawline.models.deimv2.model import DEIMv2
from thawline.recipe import Mhr, RunConfig
from thawline.training.detection.detectors import Detectors
from thawline.training.evaluation import Evaluation
from thawline.tuners.adapters import save_adapter
from thawline.tuners.mhr.layer import find_layers

logger = logging.getLogger(__name__)

ONLY_IN_TRAINING = {"num_denoising", "label_noise", "box_noise"}
"""Settings of a network that its detections do not depend on."""
THRESHOLD = 0.4
"""Threshold of a domain that was trained without held-out images."""


class DomainRun:
    """The frozen detector that a run adds domains to.

    Args:
        config: the recipe, with `base.weights`, and `domain` or several datasets.
    Raises: ConfigError: `base.weights` is no detector, or `base.overrides` would change its shape.
    """

    class_names: tuple[str, ...] = ()
    """Classes that the domain will have, where the data does not decide."""

    def __init__(self, config: RunConfig) -> None:
        base: Any = config.base  # a DetectionBase with weights, as RunConfig has checked
        self.names = tuple(config.datasets) or (str(config.domain),)
        self.weights, self._variant, self._config = str(base.weights), base.variant, config
        what = "A domain" if config.domain else "An adapter on several datasets"
        _check_overrides(base.overrides, what)
        checkpoint = read_checkpoint(self.weights)
        if checkpoint.layout == "backbone":
            raise ConfigError(
                f"{what} adds to a trained detector, and '{self.weights}' is a backbone alone: train "
                "a detector on it first."
            )
        self.image_size = config_of(checkpoint, base.variant, {}).image_size
        """Height and width that the base takes, and all of its domains."""

    @cached_property
    def base(self) -> DEIMv2:
        """The frozen detector as it was before."""
        return DEIMv2.from_pretrained(self.weights, self._variant)

    def new_detector(self, overrides: Mapping[str, Any]) -> DEIMv2:
        """Load the frozen detector with new class layers, as `overrides` describe them."""
        return DEIMv2.from_pretrained(self.weights, self._variant, **overrides)

    def attach(self, model: DEIMv2) -> DEIMv2:
        """Freeze the detector and attach the adapter, in place.

        Raises: ConfigError: see `attach_domain`. CheckpointError: `tuner.start_from` is of another base.
        """
        self.digest = base_digest(model)
        tuner = self._config.tuner
        if start := getattr(tuner, "start_from", None):
            self._check_same_base(start)
        n_layers = sum(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in model.modules())
        attach_domain(model, tuner, self.names)
        if isinstance(tuner, Mhr):
            logger.info(
                "MHR adapts %d of the detector's %d linear layers and convolutions. Others are class heads, "
                "which are trained, larger than 1 × 1, grouped, or of sizes that `tuner.n_heads` does not "
                "divide.",
                sum(1 for _ in find_layers(model)), n_layers,
            )  # fmt: skip
        return model

    def _check_same_base(self, start_from: str) -> None:
        for folder in domain_folders(start_from):
            about = read_domain(folder)
            if about.base != self.digest:
                raise CheckpointError(
                    f"`tuner.start_from`: '{start_from}' belongs to the base {about.base[:12]} "
                    f"('{about.base_label}'), not to {self.digest[:12]} ('{self.weights}'). Give its own as "
                    "`base.weights`."
                )


class ExtendedDomainRun(DomainRun):
    """A trained domain that a run adds classes to; `base.weights` is a shared folder or a run that holds it.

    Raises: ConfigError: there is no such domain, or it has one of the classes. CheckpointError: the domain is
        damaged, or of another base.
    """

    def __init__(self, config: RunConfig) -> None:
        base: Any = config.base
        self.names, self.weights, self._config = (str(config.domain),), str(base.weights), config
        self.folder = named_domain(self.weights, self.names[0])
        self.before = read_domain(self.folder)
        if known := [name for name in config.added_classes if name in self.before.class_names]:
            raise ConfigError(
                f"`add_classes`: '{self.folder}' has '{known[0]}' already. Its classes are "
                f"{', '.join(self.before.class_names)}."
            )
        _check_overrides(base.overrides, "A domain")
        self.class_names = (*self.before.class_names, *config.added_classes)
        self.image_size, self.digest = self.before.image_size, self.before.base

    @cached_property
    def base(self) -> DEIMv2:
        """The frozen detector as it was before."""
        return SharedFolder(self.weights).base() if is_shared(self.weights) else load_base(self.folder)

    def new_detector(self, overrides: Mapping[str, Any]) -> DEIMv2:
        """Load the domain's detector with rows for the new classes."""
        names = ("class_loss", "matcher_change_epoch", *ONLY_IN_TRAINING)
        settings = {name: value for name, value in overrides.items() if name in names}
        model = load_domain(self.base, self.folder)
        model.config = with_overrides(model.config, settings)
        return extend_classes(model, self.groups[:-1], self._config.added_classes)

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of classes that the domain was trained with first, and added each time, now included."""
        before = self.before.class_groups or (len(self.before.class_names),)
        return (*before, len(self._config.added_classes))

    def attach(self, model: DEIMv2) -> DEIMv2:
        """Return the detector as it is: `new_detector` has frozen all but the new rows."""
        return model


def save_domains(
    model: nn.Module,
    config: RunConfig,
    run: DomainRun | None,
    evaluations: Mapping[str, Evaluation],
    folder: Path,
) -> None:
    """Write a run's detector: merged and plain for one dataset, a shared folder for several.

    With several, and MHR, the inventory of skills goes beside it, for new domains to start from.

    Args:
        model: a `DEIMv2`, or `Detectors`.
        run: the frozen base, if there is one.
        evaluations: the latest, by name of the dataset; of the only one by an empty name.
        folder: gets the files; may hold others.
    """
    if isinstance(model, DEIMv2):
        merged_detector(model).save_pretrained(folder)
        if run is not None:
            name = run.names[0]
            about, adapter = _about(model, config, name, run.digest, run, evaluations.get("")), None
            if isinstance(run, ExtendedDomainRun):
                about, adapter = _extended(about, run), run.folder
            save_domain(model, about, folder / DOMAINS / name, adapter=adapter)
        return
    assert isinstance(model, Detectors)
    base = merged_detector(model.member(0)) if run is None else run.base
    base.save_pretrained(folder / BASE)
    if isinstance(config.tuner, Mhr):
        save_adapter(model.member(0), folder)
    digest = base_digest(base) if run is None else run.digest
    for number, name in enumerate(model.names):
        member = model.member(number)
        about = _about(member, config, name, digest, run, evaluations.get(name))
        save_domain(member, about, folder / DOMAINS / name, task=name)


def domain_bytes(model: nn.Module, run: DomainRun | None) -> dict[str, int]:
    """Return the bytes, in float32, of each domain that a run makes; none for a run without domains."""
    if isinstance(model, Detectors):
        return {
            name: 4 * _n_parameters(one, run) for name, one in zip(model.names, model.members, strict=True)
        }
    if run is None:
        return {}
    before = run.before.parameters if isinstance(run, ExtendedDomainRun) else 0
    return {run.names[0]: 4 * (before + _n_parameters(model, run))}


def _check_overrides(overrides: Mapping[str, Any], what: str) -> None:
    """Check that no setting would change the shape of the base. Raises: ConfigError: naming one."""
    if shaping := sorted(overrides.keys() - ONLY_IN_TRAINING):
        raise ConfigError(
            f"`base.overrides` has '{shaping[0]}': {what.lower()} takes its base as it is. Only "
            f"{', '.join(sorted(ONLY_IN_TRAINING))} may differ."
        )


def _about(
    model: DEIMv2,
    config: RunConfig,
    name: str,
    digest: str,
    run: DomainRun | None,
    evaluation: Evaluation | None,
) -> Domain:
    """Return what domain.json says of a domain as it stands, after its latest evaluation."""
    metrics: DetectionMetrics | None = None
    if evaluation is not None and evaluation.detections is not None:
        metrics = evaluation.detections[2]
    recipe = _recipe(config, name, run)
    return Domain(
        name=name,
        class_names=model.config.shown_names,
        threshold=THRESHOLD if metrics is None else round(float(metrics.threshold), 3),
        base=digest,
        base_label=str(recipe["base"]["weights"]),
        image_size=model.config.image_size,
        tuner="frozen" if run is None else config.tuner.method,
        parameters=_n_parameters(model, run),
        metrics={} if evaluation is None else evaluation.metrics,
        recipe=recipe,
    )


def _extended(about: Domain, run: ExtendedDomainRun) -> Domain:
    """Return what domain.json says after classes were added: base and adapter are those of before."""
    before = run.before
    recipe = {**about.recipe, "add_classes": [], "base": before.recipe.get("base", about.recipe["base"])}
    return replace(
        about,
        class_groups=run.groups,
        base_label=before.base_label,
        tuner=before.tuner,
        parameters=before.parameters + about.parameters,
        recipe=recipe,
    )


def _n_parameters(model: nn.Module, run: DomainRun | None) -> int:
    """Count what a domain has of its own; of MHR it is a task's mixture, whatever of it was trained."""
    layers = [layer for _, layer in find_layers(model)]
    mixture = sum(sum(one.r.values()) * (one.in_features + one.out_features) for one in layers)
    is_own = is_class_layer if run is None or mixture else lambda key: True
    return mixture + sum(p.numel() for key, p in model.named_parameters() if p.requires_grad and is_own(key))


def _recipe(config: RunConfig, name: str, run: DomainRun | None) -> dict[str, Any]:
    """Return the recipe of one domain: of several datasets it has its own, and of a trained base that."""
    recipe = config.to_mapping()
    if config.datasets:
        drawn = config.data.sampling not in ("each", "repeat")
        sampling = {"sampling": "each"} if drawn else {}
        recipe |= {"domain": name, "data": {**recipe["data"], "path": config.datasets[name], **sampling}}
    if run is None:
        trained: Any = {"weights": str(config.run_folder / "model" / BASE), "size": None, "overrides": {}}
        recipe |= {"tuner": {"method": "frozen"}, "base": {**recipe["base"], **trained}}
    return recipe
