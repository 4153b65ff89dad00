"""Read a detector from whatever holds one, and refuse, in words, what does not fit.

    thawline        a folder written by `save_pretrained`
    authors         their `.pth` (the average `ema.module` before `model`) or a folder from their hub
    transformers    a folder or file of `Deimv2ForObjectDetection`
    backbone        pretrained weights of the backbone alone: the rest of the detector starts anew

Files are read without running anything they hold: `weights_only=True`, or safetensors. Nothing is skipped
in silence: what is missing, unexpected or of another shape is one error that lists it; what is replaced on
purpose, the layers of another set of classes, is logged.
"""

from __future__ import annotations

__all__ = ["Checkpoint", "Layout", "load_backbone", "load_pretrained", "read_checkpoint"]

import datetime
import json
import logging
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from thawline.errors import CheckpointError
from thawline.models.deimv2.checkpoints.names import StateDict, from_transformers, read_backbone
from thawline.models.deimv2.coco import COCO_NAMES
from thawline.models.deimv2.config import DEIMv2Config, with_overrides
from thawline.models.deimv2.network.hgnetv2 import HGNetV2
from thawline.models.deimv2.network.sta import AdaptedViT, AdaptedViTConfig
from thawline.models.deimv2.variants import VARIANTS, get_variant

if TYPE_CHECKING:
    from thawline.models.deimv2.model import DEIMv2

logger = logging.getLogger(__name__)

Layout = Literal["thawline", "authors", "transformers", "backbone"]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
RUN_PARTS = ("model", "best", "last")
"""Detectors in a run's folder, by which is taken first."""
_CLASS_LAYER = re.compile(
    r"decoder\.(enc_score_head|dec_score_head\.\d+|denoising_class_embed)\.(weight|bias)"
)
_FOLLOWS = ("num_batches_tracked", "rope_embed.periods")
"""Tensors that may be absent or left over: a counter that nothing reads, and what follows from the shape."""
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    datetime.datetime,
    datetime.timedelta,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]
"""What training checkpoints hold beside tensors: dates, and metrics as NumPy scalars."""
_LISTED = 6
"""Names of each kind that an error shows."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file or folder holds, in its own names."""

    path: str
    layout: Layout
    state: StateDict
    config: DEIMv2Config | None
    """Only thawline's own folders have one that says everything."""
    class_names: tuple[str, ...] | None


def load_pretrained(
    cls: type[DEIMv2], path: str | Path, variant: str | None, overrides: Mapping[str, Any]
) -> DEIMv2:
    """See `DEIMv2.from_pretrained`."""
    checkpoint = read_checkpoint(path)
    model = cls(_config(checkpoint, variant, overrides)).eval()
    if checkpoint.layout == "backbone":
        load_backbone(model, checkpoint)
        logger.warning(
            "'%s' holds a backbone alone: encoder and decoder have random weights.", checkpoint.path
        )
    else:
        state = _in_our_names(checkpoint, model)
        _fit(model, _with_own_class_layers(state, model, checkpoint.path), checkpoint.path)
    return model


def load_backbone(model: DEIMv2, source: str | Path | Checkpoint) -> None:
    """Fill the backbone of a detector, and nothing else, with pretrained weights.

    Args:
        source: DINOv3 as Meta, transformers or timm ship it, the authors' ViT-Tiny, PaddleClas' HGNetv2, or
            any detector whose backbone has the same shape.
    Raises: CheckpointError: the weights are of another backbone, or incomplete.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    if checkpoint.layout != "backbone":
        state = _in_our_names(checkpoint, model)
        part = {
            name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")
        }
        _fit(model.backbone, part, checkpoint.path)
        return
    backbone = model.backbone.vit if isinstance(model.backbone, AdaptedViT) else model.backbone
    state = read_backbone(checkpoint.state, backbone.state_dict())
    if isinstance(backbone, HGNetV2):
        state = _pruned(state, backbone, checkpoint.path)
    _fit(backbone, state, checkpoint.path)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file, a folder, or a repository on the hub, and say what it is.

    Args:
        path: of a file (`.pth`, `.pt`, `.bin`, `.safetensors`) or folder, also a run's; a size, for its
            published weights; or a hub id, `owner/name`.
    Raises: CheckpointError: nothing there, unreadable, or no detector.
    """
    place = Path(path) if Path(path).exists() else _download(str(path))
    settings: dict[str, Any] = {}
    file = place
    if place.is_dir():
        place, file = _weight_file(place)
        if (place / "config.json").is_file():
            settings = json.loads((place / "config.json").read_text())
    state = _without_wrappers(_read_tensors(file))
    layout = _layout(state, settings, path)
    config = DEIMv2Config(**settings) if layout == "thawline" else None
    return Checkpoint(str(path), layout, state, config, _class_names(layout, state, settings, config))


def _config(checkpoint: Checkpoint, variant: str | None, overrides: Mapping[str, Any]) -> DEIMv2Config:
    """The shape the weights have, but for what is asked for otherwise."""
    config = checkpoint.config
    if config is None:
        found = _size_of(checkpoint)
        size = variant or found
        if size is None:
            raise CheckpointError(
                f"'{checkpoint.path}' does not say which size it is for. Name it: "
                f"`variant` is one of {', '.join(VARIANTS)}."
            )
        config = get_variant(size).config
        if checkpoint.layout != "backbone":
            num_classes = len(_score_head(checkpoint.state))
            config = replace(config, num_classes=num_classes, class_names=checkpoint.class_names)
    else:
        found = config.variant
    if variant is not None and found is not None and variant != found:
        raise CheckpointError(
            f"'{checkpoint.path}' holds a '{found}', not a '{variant}'. Leave `variant` out."
        )
    return with_overrides(config, overrides)


def _size_of(checkpoint: Checkpoint) -> str | None:
    """The published size that has the widths of these weights: no two have the same."""
    if checkpoint.layout == "backbone":
        return None
    dim = _score_head(checkpoint.state).shape[1]
    tokens = [t.shape[-1] for name, t in checkpoint.state.items() if name.endswith("cls_token")]
    for name, variant in VARIANTS.items():
        backbone = variant.config.backbone
        width = [backbone.vit.dim] if isinstance(backbone, AdaptedViTConfig) else []
        if (variant.config.decoder.hidden_dim, width) == (dim, tokens):
            return name
    return None


def _in_our_names(checkpoint: Checkpoint, model: DEIMv2) -> StateDict:
    if checkpoint.layout == "transformers":
        return from_transformers(checkpoint.state, model.state_dict())
    return checkpoint.state


def _with_own_class_layers(state: StateDict, model: DEIMv2, path: str) -> StateDict:
    """Keep the model's own layers whose size is the number of classes, where that differs, and say so."""
    own = model.state_dict()
    other = [
        name
        for name, tensor in state.items()
        if _CLASS_LAYER.fullmatch(name) and name in own and len(tensor) != len(own[name])
    ]
    if other:
        layers = sorted({name.rpartition(".")[0].removeprefix("decoder.") for name in other})
        logger.warning(
            "'%s' was trained on %d classes, this model has %d: these layers start anew: %s.",
            path,
            len(state["decoder.enc_score_head.weight"]),
            model.config.num_classes,
            ", ".join(layers),
        )
    return state | {name: own[name] for name in other}


def _fit(module: nn.Module, state: StateDict, path: str) -> None:
    """Load every tensor, or raise with all that does not fit."""
    own = module.state_dict()
    state = _with_shared(state, module)
    misshapen = [
        f"{name}: {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    fitting = {name: t for name, t in state.items() if name not in own or t.shape == own[name].shape}
    result = module.load_state_dict(fitting, strict=False)
    missing = [name for name in result.missing_keys if name not in state and not name.endswith(_FOLLOWS)]
    unexpected = [name for name in result.unexpected_keys if not name.endswith(_FOLLOWS)]
    broken = [name for name, tensor in fitting.items() if name in own and not _is_finite(tensor)]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "not finite": broken,
    }
    if any(kinds.values()):
        raise CheckpointError(
            f"'{path}' does not fit the model ({len(own)} tensors): "
            + "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names)
            + ". Check `variant`, and that the file is of this detector."
        )


def _with_shared(state: StateDict, module: nn.Module) -> StateDict:
    """Give every name of a shared tensor its value: safetensors keeps but one of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    state = dict(state)
    for names in groups.values():
        kept = next((name for name in names if name in state), None)
        if kept is not None:
            state |= {name: state[kept] for name in names if name not in state}
    return state


def _pruned(state: StateDict, backbone: HGNetV2, path: str) -> StateDict:
    """Atto, Femto and Pico are prunings of B0 and start from what they share with its file."""
    own = backbone.state_dict()
    shared = {name: t for name, t in state.items() if name in own and t.shape == own[name].shape}
    if not shared:
        raise CheckpointError(f"'{path}' shares no tensor with this backbone: it is not an HGNetv2 B0.")
    anew = [name for name in own if name not in shared and not name.endswith(_FOLLOWS)]
    if anew:
        logger.warning(
            "'%s' gives %d of the backbone's %d tensors; these start anew: %s.",
            path,
            len(shared),
            len(own),
            _some(anew),
        )
    return {name: shared.get(name, tensor) for name, tensor in own.items()}


def _layout(state: StateDict, settings: Mapping[str, Any], path: str | Path) -> Layout:
    if settings.get("model_type") == "deimv2" or any(
        name.startswith("model.conv_encoder.") for name in state
    ):
        return "transformers"
    if "decoder.enc_score_head.weight" in state:
        is_ours = isinstance(settings.get("backbone"), Mapping) and "kind" in settings["backbone"]
        return "thawline" if is_ours else "authors"
    if {"cls_token", "embeddings.cls_token", "stem.stem1.conv.weight"} & set(state):
        return "backbone"
    raise CheckpointError(
        f"'{path}' holds neither a DEIMv2 nor a backbone of one, but {len(state)} tensors: {_some(state)}."
    )


def _class_names(
    layout: Layout, state: StateDict, settings: Mapping[str, Any], config: DEIMv2Config | None
) -> tuple[str, ...] | None:
    if config is not None:
        return config.class_names
    if layout == "transformers":
        labels = {int(index): str(name) for index, name in settings.get("id2label", {}).items()}
        names = tuple(labels[index] for index in sorted(labels))
        return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
    if layout == "authors" and len(_score_head(state)) == len(COCO_NAMES):
        logger.info("80 classes without names: taken to be COCO's.")
        return COCO_NAMES
    return None


def _score_head(state: StateDict) -> Tensor:
    for name in ("decoder.enc_score_head.weight", "model.enc_score_head.weight"):
        if name in state:
            return state[name]
    raise CheckpointError(
        f"No score head among {len(state)} tensors ({_some(state)}): the file is incomplete."
    )


def _weight_file(folder: Path) -> tuple[Path, Path]:
    """A folder and its weights; of a run what it ended with, before that its best or its last."""
    for place in (folder, *(folder / part for part in RUN_PARTS)):
        for name in WEIGHT_FILES:
            if (place / name).is_file():
                return place, place / name
    raise CheckpointError(
        f"No weights in '{folder}': expected {' or '.join(WEIGHT_FILES)}, or a run's folder with "
        f"{', '.join(f'{part}/' for part in RUN_PARTS)}."
    )


def _download(path: str) -> Path:
    """The folder of a hub repository in the local cache, fetched if need be."""
    repository = VARIANTS[path].weights_id if path in VARIANTS else path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or Path(path).suffix in _SUFFIXES:
        raise CheckpointError(
            f"No file, folder or hub repository '{path}'. Published weights: {', '.join(VARIANTS)}."
        )
    try:
        return Path(snapshot_download(repository, allow_patterns=["config.json", *WEIGHT_FILES]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"Cannot fetch '{repository}' from the Hugging Face hub ({type(error).__name__}), and there is "
            f"no '{path}' here. Download it where there is a network, and give the folder's path."
        ) from error


def _read_tensors(file: Path) -> StateDict:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{file}' holds Python objects besides tensors, and is not opened because loading them could "
            f"run code. Save its state dict alone. ({str(error).splitlines()[0]})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {error}. Is it complete?") from error
    return _state_dict(content, file)


def _state_dict(content: Any, file: Path) -> StateDict:
    """The weights in a training checkpoint; of the average of the weights, where there is one."""
    for path in (("ema", "module"), ("ema",), ("model",), ("state_dict",)):
        inner = content
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    if isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values()):
        return {name: value for name, value in content.items() if isinstance(value, Tensor)}
    raise CheckpointError(f"'{file}' holds no state dict.")


def _without_wrappers(state: StateDict) -> StateDict:
    for wrapper in ("module.", "_orig_mod.", "module."):
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_LISTED]) + (
        f", … and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    )
