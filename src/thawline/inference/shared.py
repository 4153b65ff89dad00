"""Detector of several domains: `SharedDetector.from_pretrained("shop")("photo.jpg", domain="pcb")`.

The frozen base is in memory once, a domain adds a few columns and its class heads. What a domain answers does
not depend on the others: adding, removing or calling them changes no bit of it.
"""

from __future__ import annotations

__all__ = ["ALL", "SharedDetector"]

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thawline.domains.changes import Changes
from thawline.domains.domain import Domain, base_digest, load_domain, read_domain
from thawline.domains.folder import SharedFolder, find_domain
from thawline.errors import CheckpointError, ConfigError, did_you_mean
from thawline.inference.classes import class_ids
from thawline.inference.detector import Detector, Prediction, empty_detections, load_frame, with_reason
from thawline.inference.frames import Found
from thawline.inference.shared_network import Job, SharedNetwork
from thawline.inference.sources import is_single, open_source
from thawline.inference.videos import is_video

if TYPE_CHECKING:
    import supervision

logger = logging.getLogger(__name__)

ALL = "all"
"""The word for every domain."""


@dataclass(frozen=True, eq=False)
class _Member:
    """A domain that is in use: its words, its changes, and the detector that runs it."""

    about: Domain
    changes: Changes
    detector: Detector


class SharedDetector:
    """Detector of several domains on one frozen base.

    Threads may share it: calls wait for one another, and see a domain whole or not at all. A domain that is
    removed or replaced while it is in use finishes the images that it was asked for.

    Args:
        folder: a shared folder (`base/` and `domains/<name>/`).
        device: None: a GPU if there is one.
    Attributes:
        broken: domains of the folder that cannot be used, and why; asking for one raises it.
    Raises: CheckpointError: no shared folder, or its base cannot be read.
    """

    def __init__(self, folder: str | Path, device: str | torch.device | None = None) -> None:
        self.folder = SharedFolder(folder)
        base = self.folder.base()
        self._digest = base_digest(base)
        self._network = SharedNetwork(base, device)
        self._members: Mapping[str, _Member] = {}
        self.broken: dict[str, str] = {}
        for name, _ in self.folder.domains():
            try:
                self._members = {**self._members, name: self._load(base, self.folder.folder(name), name)}
            except CheckpointError as error:
                logger.warning("The domain '%s' is left out: %s", name, error)
                self.broken[name] = str(error)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device | None = None
    ) -> SharedDetector:
        """Load a shared folder; the arguments are those of the class."""
        return cls(folder, device)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that can be asked for."""
        return tuple(self._members)

    def about(self, name: str) -> Domain:
        """Return what a domain says of itself: classes, threshold, results. Raises: ConfigError."""
        return self._member(name).about

    def nbytes(self, name: str) -> int:
        """Return the memory that a domain takes beside the base, bytes. Raises: ConfigError."""
        return self._member(name).changes.nbytes

    def add(self, name: str, folder: str | Path) -> None:
        """Take a domain into use, or replace one of this name, while others answer.

        The shared folder stays as it is; `thawline domains add` changes it.

        Args:
            folder: of a domain, or of a run that trained one.
        Raises: CheckpointError: the domain is damaged, or of another base; those in use stay.
        """
        if name == ALL:
            raise ConfigError(f"'{ALL}' means every domain. Give another name.")
        member = self._load(self.folder.base(), find_domain(folder), name)
        self._members = {**self._members, name: member}  # a new mapping: calls under way keep theirs
        self.broken.pop(name, None)

    def remove(self, name: str) -> None:
        """Take a domain out of use. Raises: ConfigError: there is none of this name."""
        if name not in self.broken:
            self._member(name)
        self._members = {key: member for key, member in self._members.items() if key != name}
        self.broken.pop(name, None)

    def __call__(self, source: Any, domain: str | Sequence[str] | None = None, **options: Any) -> Any:
        """Detect.

        Args:
            source: as for `Detector`.
            domain: name of a domain; "all" for every one; or a name for each of a list of images, which are
                detected in together. None: the only one.
            options: of `Detector.stream`; `threshold` None: each domain's own.
        Returns: as `Detector`, with the domain's name in `data["domain"]`; `class_id` counts in the domain's
            own classes.
        Raises: ConfigError: unknown domain. CheckpointError: the domain is broken.
        """
        if domain is not None and not isinstance(domain, str):
            return self._detect_mixed(source, domain, options)
        detector, tag = self._detector(domain, options)
        found = detector(source, **options)
        if is_single(source):
            return tag(found)
        return [tag(one) for one in found] if isinstance(found, list) else map(tag, found)

    def stream(self, source: Any, domain: str | None = None, **options: Any) -> Iterator[Prediction]:
        """Yield predictions image by image; see `__call__` and `Detector.stream`."""
        detector, tag = self._detector(domain, options)
        predictions = detector.stream(source, **options)
        return (Prediction(one.name, one.image, tag(one.detections), one.error) for one in predictions)

    def _load(self, base: Any, folder: Path, name: str) -> _Member:
        about = replace(read_domain(folder), name=name)
        changes = self._network.changes_of(load_domain(base, folder, self._digest))
        network = _DomainNetwork(self._network, changes, about.class_names)
        return _Member(about, changes, Detector(network, threshold=about.threshold))

    def _member(self, name: str | None) -> _Member:
        members = self._members
        if name is None:
            if len(members) != 1:
                raise ConfigError(f"Which domain? Give `domain`: {', '.join([*members, ALL])}.")
            (name,) = members
        if name in self.broken:
            raise CheckpointError(f"The domain '{name}' cannot be used: {self.broken[name]}")
        if name not in members:
            raise ConfigError(f"No domain '{name}'. {did_you_mean(name, [*members, ALL])}")
        return members[name]

    def _detector(self, domain: str | None, options: dict[str, Any]) -> tuple[Detector, Tag]:
        """Return the detector of one domain or of all, and what names its detections; adapts the options."""
        if domain == ALL:
            if not self._members:
                raise ConfigError(f"'{self.folder.path}' has no domain to ask.")
            return self._several(dict(self._members), None, options)
        member = self._member(domain)
        name = member.about.name

        def tag(found: supervision.Detections) -> supervision.Detections:
            found.data["domain"] = np.full(len(found), name)
            return found

        return member.detector, tag

    def _several(
        self, members: Mapping[str, _Member], names: Sequence[str] | None, options: dict[str, Any]
    ) -> tuple[Detector, Tag]:
        """Return a detector of several domains, whose classes are theirs, one after the other."""
        owners = [name for name, member in members.items() for _ in member.about.class_names]
        firsts = {name: owners.index(name) for name in members}
        if (classes := options.get("classes")) is not None:
            options["classes"] = _ids_in_all(classes, members, firsts)
        network = _SeveralNetwork(self._network, members, names, options.get("threshold"))

        def tag(found: supervision.Detections) -> supervision.Detections:
            ids = [int(number) for number in found.class_id]
            found.data["domain"] = np.array([owners[number] for number in ids], dtype=str)
            found.class_id = np.array([number - firsts[owners[number]] for number in ids], dtype=int)
            return found

        return Detector(network, threshold=0.0), tag

    def _detect_mixed(self, source: Any, names: Sequence[str], options: dict[str, Any]) -> list[Any]:
        """Detect in several images together, each by its own domain."""
        frames = [] if is_single(source) or is_video(source) else list(open_source(source).frames)
        if len(frames) != len(names):
            given = f"{len(frames)} images" if frames else "no list of images"
            raise ConfigError(f"`domain` names {len(names)} domains for {given}. Give one for each image.")
        members = {name: self._member(name) for name in dict.fromkeys(names)}
        loaded = [load_frame(frame) for frame in frames]
        images = [image for image, _ in loaded if image is not None]
        readable = [name for name, (image, _) in zip(names, loaded, strict=True) if image is not None]
        detector, tag = self._several(members, readable, options)
        options["batch_size"] = max(1, len(images))
        found = iter(detector(images, **options) if images else ())
        answers = []
        for frame, (image, error) in zip(frames, loaded, strict=True):
            answer = Prediction(frame.name, None, empty_detections(), error) if image is None else next(found)
            answers.append(tag(with_reason(answer) if isinstance(answer, Prediction) else answer))
        return answers


Tag = Callable[[Any], Any]
"""Writes the domain of each of an image's detections into `data["domain"]`."""


class _DomainNetwork:
    """The shared network with one domain inside, as a detector's network."""

    def __init__(self, network: SharedNetwork, changes: Changes, class_names: tuple[str, ...]) -> None:
        self._network, self._changes, self.class_names = network, changes, class_names

    def __call__(self, images: Sequence[np.ndarray]) -> list[Found]:
        return self._network.detect(images, [Job(self._changes, range(len(images)))])[0]


class _SeveralNetwork:
    """The shared network with several domains, each on all images or on its own rows of them.

    Args:
        names: the domain of each image, in the one batch that there will be. None: every domain on each.
        threshold: minimum score. None: each domain's own.
    """

    def __init__(
        self,
        network: SharedNetwork,
        members: Mapping[str, _Member],
        names: Sequence[str] | None,
        threshold: float | None,
    ) -> None:
        self._network, self._members = network, members
        self._names, self._threshold = names, threshold
        self.class_names = tuple(name for one in members.values() for name in one.about.class_names)

    def __call__(self, images: Sequence[np.ndarray]) -> list[Found]:
        every = range(len(images))
        rows = {
            name: [row for row in every if self._names is None or self._names[row] == name]
            for name in self._members
        }
        jobs = {name: Job(one.changes, rows[name]) for name, one in self._members.items() if rows[name]}
        answers = dict(zip(jobs, self._network.detect(images, list(jobs.values())), strict=True))
        parts: list[list[Found]] = [[] for _ in images]
        first = 0
        for name, member in self._members.items():
            lowest = member.about.threshold if self._threshold is None else self._threshold
            for row, one in zip(rows[name], answers.get(name, ()), strict=True):
                kept = one["scores"] >= lowest
                parts[row].append(
                    Found(
                        labels=one["labels"][kept] + first,
                        boxes=one["boxes"][kept],
                        scores=one["scores"][kept],
                    )
                )
            first += len(member.about.class_names)
        return [_joined(part) for part in parts]


def _joined(parts: Sequence[Found]) -> Found:
    """Return the detections of several domains in one image, highest score first."""
    whole: Any = {key: np.concatenate([part[key] for part in parts]) for key in ("labels", "boxes", "scores")}
    order = np.argsort(-whole["scores"], kind="stable")
    return Found(labels=whole["labels"][order], boxes=whole["boxes"][order], scores=whole["scores"][order])


def _ids_in_all(classes: Any, members: Mapping[str, _Member], firsts: Mapping[str, int]) -> list[int]:
    """Return the ids of classes as a user names them, in every domain that has them.

    Raises: ConfigError: no domain has one of them.
    """
    ids: list[int] = []
    for one in [classes] if isinstance(classes, str | int) else classes:
        found, reason = [], None
        for name, member in members.items():
            try:
                found += [firsts[name] + number for number in class_ids(one, member.about.class_names)]
            except ConfigError as error:
                reason = error
        if not found and reason is not None:
            raise reason
        ids += found
    return ids
