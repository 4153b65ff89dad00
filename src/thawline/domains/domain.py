"""A domain's folder: what one task adds to a frozen detector, without the detector.

domain.json                  the domain's name, classes, threshold, and which base it belongs to
heads.safetensors            the layers that have a row for each class
adapter_config.json, adapter_model.safetensors
                             the adapter, as PEFT saves it; a domain of class heads alone has none
"""

from __future__ import annotations

__all__ = ["Domain", "base_digest", "load_domain", "read_domain", "save_domain"]

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from thawline.domains.attach import is_class_layer
from thawline.domains.classes import group_classes
from thawline.errors import CheckpointError
from thawline.files import DAMAGED, atomic_folder, read_json, write_json
from thawline.models.deimv2.model import DEIMv2
from thawline.tuners.adapters import load_adapter, merge_adapters, save_adapter
from thawline.tuners.mhr.layer import find_layers
from thawline.tuners.to_lora import to_lora

ABOUT, HEADS, ADAPTER = "domain.json", "heads.safetensors", "adapter_config.json"

TEXT, MAPPING = (str, "a text"), (Mapping, "a mapping")

KINDS: dict[str, tuple[Any, str]] = {
    "name": TEXT, "threshold": (int | float, "a number"), "base": TEXT, "base_label": TEXT, "tuner": TEXT,
    "metrics": MAPPING, "recipe": MAPPING,
}  # fmt: skip
"""Kind of the values in domain.json that no other check looks at."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Contents of domain.json."""

    name: str
    class_names: tuple[str, ...]
    class_groups: tuple[int, ...] = ()
    """Number of classes that it was trained with first, and added each time since. Empty: all at once."""
    threshold: float
    """Score from which detections count: that of the best F1 on the held-out images."""
    base: str
    """Digest of the base, `base_digest`."""
    base_label: str
    """Name of the base, for messages."""
    image_size: tuple[int, int]
    tuner: str
    """Method of the adapter; "frozen": class heads alone."""
    parameters: int
    """Number of parameters that it has of its own."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Results on the held-out images when it was trained."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Recipe that trained it; its data is what `thawline eval` judges the domain on."""

    def __post_init__(self) -> None:
        if isinstance(self.class_names, str):
            raise ValueError(f"`class_names` is the text {self.class_names!r}, expected a list")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "class_groups", tuple(self.class_groups))
        object.__setattr__(self, "image_size", tuple(self.image_size))

    def check(self) -> None:
        """Check the values of a file that was read. Raises: ValueError: naming one that cannot be."""
        for name, (kind, word) in KINDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"`{name}` is {value!r}, expected {word}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` is {self.threshold}, expected 0 to 1")
        if not all(isinstance(name, str) for name in self.class_names):
            raise ValueError(f"`class_names` are {list(self.class_names)}, expected names")
        base = self.recipe.get("base", {})
        if not isinstance(base, Mapping):
            raise ValueError(f"`recipe.base` is {base!r}, expected a mapping")
        for name in ("weights", "variant"):
            if not isinstance(base.get(name), str | None):
                raise ValueError(f"`recipe.base.{name}` is {base[name]!r}, expected a text")
        groups = self.class_groups
        if groups and (min(groups) < 1 or sum(groups) != len(self.class_names)):
            raise ValueError(f"`class_groups` {self.class_groups} are not {len(self.class_names)} classes")


def base_digest(model: DEIMv2) -> str:
    """Return a SHA-256 of a detector's shape, and of every weight and statistic outside the class layers.

    Detectors of one digest become the same detector by a domain.
    """
    config = model.config
    shape = (config.backbone, config.encoder, config.decoder, config.image_mean, config.image_std)
    digest = hashlib.sha256(repr(shape).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if is_class_layer(name) or name.endswith("num_batches_tracked"):
            continue
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_domain(
    model: DEIMv2, about: Domain, folder: str | Path, task: str | None = None, adapter: Path | None = None
) -> None:
    """Write the domain in a detector that `attach_domain` has prepared; the folder appears whole.

    MHR's mixture of skills for a task is exactly a LoRA, and written as one.

    Args:
        task: the task of the mixture. None: the only one.
        adapter: domain that this one has its adapter from, unchanged. None: it is in the model.
    """
    heads = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if is_class_layer(name)
    }
    with atomic_folder(folder) as temporary:
        if about.tuner != "frozen":
            if adapter is not None:
                for file in adapter.glob("adapter_*"):
                    shutil.copy(file, temporary)
            elif next(find_layers(model), None) is None:
                save_adapter(model, temporary)
            else:
                to_lora(model, temporary, task=task)
        save_file(heads, temporary / HEADS)
        write_json(temporary / ABOUT, dataclasses.asdict(about))


def read_domain(folder: str | Path) -> Domain:
    """Read a domain.json. Raises: CheckpointError: there is none, or it is not whole."""
    if not (Path(folder) / ABOUT).is_file():
        raise CheckpointError(f"'{folder}' holds no domain (no {ABOUT}).")
    values = read_json(Path(folder) / ABOUT)
    known = {one.name for one in dataclasses.fields(Domain)}
    try:
        about = Domain(**{name: value for name, value in values.items() if name in known})
        about.check()
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{Path(folder) / ABOUT}' is damaged: {error}.") from error
    if about.tuner != "frozen" and not (Path(folder) / ADAPTER).is_file():
        raise CheckpointError(f"'{folder}' is not whole: {ADAPTER} is missing.")
    return about


def load_domain(base: DEIMv2, folder: str | Path, digest: str | None = None) -> DEIMv2:
    """Return a copy of `base` with a domain in it, merged: a plain detector of the domain's classes.

    Args:
        base: the detector that the domain was trained on; not changed.
        digest: of `base`, where it is known.
    Raises: CheckpointError: the domain is damaged, or of another base, another size or other classes.
    """
    about = read_domain(folder)
    digest = base_digest(base) if digest is None else digest
    if about.base != digest:
        raise CheckpointError(
            f"The domain in '{folder}' belongs to the base {about.base[:12]} ('{about.base_label}'), not to "
            f"{digest[:12]} ('{base.config.variant}'). Train it on this base."
        )
    if about.image_size != base.config.image_size:
        raise CheckpointError(
            f"The domain in '{folder}' was trained at (height, width) {about.image_size}, the base takes "
            f"{base.config.image_size}. Train it at the base's size."
        )
    config = dataclasses.replace(
        base.config, num_classes=len(about.class_names), class_names=about.class_names
    )
    model = DEIMv2(config).eval()
    if len(about.class_groups) > 1:
        group_classes(model, about.class_groups)
    heads = _read_heads(Path(folder), model)
    shared = {name: tensor for name, tensor in base.state_dict().items() if not is_class_layer(name)}
    model.load_state_dict(shared | heads)
    return model if about.tuner == "frozen" else merge_adapters(load_adapter(model, folder))


def _read_heads(folder: Path, model: DEIMv2) -> dict[str, Tensor]:
    """Read the class layers. Raises: CheckpointError: damaged, missing, or of another shape."""
    try:
        heads = load_file(folder / HEADS)
    except (*DAMAGED, OSError) as error:
        raise CheckpointError(f"'{folder / HEADS}' cannot be read: {error}") from error
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if is_class_layer(name)}
    got = {name: tensor.shape for name, tensor in heads.items()}
    for name in sorted(own.keys() | got.keys()):
        if own.get(name) != got.get(name):
            expected, found = own.get(name), got.get(name)
            raise CheckpointError(
                f"'{folder / HEADS}' does not fit {len(model.config.shown_names)} classes: '{name}' is "
                f"{'missing' if found is None else tuple(found)}, expected "
                f"{'no such tensor' if expected is None else tuple(expected)}."
            )
    return heads
