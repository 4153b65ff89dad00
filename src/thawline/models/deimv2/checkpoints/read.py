"""Read a detector from any checkpoint that holds one, and report everything that does not fit.

    thawline        a folder written by `save_pretrained`
    authors         their `.pth` (the EMA weights, `ema.module`, before `model`) or a folder from their hub
    transformers    a folder or file of `Deimv2ForObjectDetection`
    backbone        pretrained weights of the backbone alone: the rest of the detector stays random

Files are read with `weights_only=True` or by safetensors, so nothing in them can run. Missing, unexpected and
misshapen tensors raise one error that lists them all; rows of the heads that move or are re-initialised, for
other classes, are logged.
"""

from __future__ import annotations

__all__ = ["Checkpoint", "Layout", "config_of", "load_backbone", "load_weights", "read_checkpoint"]

import datetime
import logging
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from thawline.coco import COCO_NAMES
from thawline.errors import CheckpointError
from thawline.files import read_json
from thawline.models.deimv2.checkpoints.names import StateDict, from_transformers, read_backbone
from thawline.models.deimv2.config import DEIMv2Config, with_overrides
from thawline.models.deimv2.network.hgnetv2 import HGNetV2
from thawline.models.deimv2.network.sta import AdaptedViT, AdaptedViTConfig
from thawline.models.deimv2.variants import VARIANTS, get_variant

logger = logging.getLogger(__name__)

Layout = Literal["thawline", "authors", "transformers", "backbone"]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
RUN_PARTS = ("model", "best", "last")
"""Subfolders of a run that hold a detector, in order of preference."""
SCORE_HEADS = ("decoder.enc_score_head.weight", "model.enc_score_head.weight")
_CLASS_LAYER = re.compile(
    r"decoder\.(enc_score_head|dec_score_head\.\d+|denoising_class_embed)\.(weight|bias)"
)
_OPTIONAL = ("num_batches_tracked", "rope_embed.periods")
"""Tensors that may be missing or left over: a counter that nothing reads, a table computed from shapes."""
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
"""Objects besides tensors in training checkpoints: dates, and metrics as NumPy scalars."""
_MAX_LISTED = 6
"""Maximum number of names of each kind in an error."""


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a file or folder, under its own tensor names."""

    path: str
    layout: Layout
    state: StateDict
    config: DEIMv2Config | None
    """Complete config; only thawline's own folders have one."""
    class_names: tuple[str, ...] | None

    @property
    def score_head(self) -> Tensor:
        """Weight of the encoder's score head, (classes, hidden_dim)."""
        for name in SCORE_HEADS:
            if name in self.state:
                return self.state[name]
        raise CheckpointError(
            f"No score head among {len(self.state)} tensors ({_some(self.state)}): the file is incomplete."
        )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file, a folder or a hub repository and recognise its layout.

    Args:
        path: a file (`.pth`, `.pt`, `.bin`, `.safetensors`), a folder, a run folder, a size for its published
            weights, or a hub id, `owner/name`.
    Raises: CheckpointError: not found, unreadable, or not a detector.
    """
    folder = Path(path) if Path(path).exists() else _download(str(path))
    file, settings = folder, {}
    if folder.is_dir():
        folder, file = _weight_file(folder)
        settings = read_json(folder / "config.json")
    state = _without_wrappers(_read_tensors(file))
    layout = _layout(state, settings, path)
    config = DEIMv2Config(**settings) if layout == "thawline" else None
    checkpoint = Checkpoint(str(path), layout, state, config, config.class_names if config else None)
    return replace(checkpoint, class_names=_class_names(checkpoint, settings))


def config_of(checkpoint: Checkpoint, variant: str | None, overrides: Mapping[str, Any]) -> DEIMv2Config:
    """Return the config of the detector in a checkpoint, with overrides applied.

    Args:
        variant: the size, for checkpoints that do not determine it.
    Raises: CheckpointError: the size is unknown, or is not `variant`.
    """
    config = checkpoint.config
    found = config.variant if config else _size_of(checkpoint)
    if variant is not None and found is not None and variant != found:
        raise CheckpointError(
            f"'{checkpoint.path}' holds a '{found}', not a '{variant}'. Leave `variant` out."
        )
    if config is None:
        size = variant or found
        if size is None:
            raise CheckpointError(
                f"'{checkpoint.path}' does not say which size it is for. Pass `variant`: "
                f"{', '.join(VARIANTS)}."
            )
        config = get_variant(size).config
        if checkpoint.layout != "backbone":
            n_classes = len(checkpoint.score_head)
            config = replace(config, num_classes=n_classes, class_names=checkpoint.class_names)
    return with_overrides(config, overrides)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into a detector built from `config_of`.

    Raises: CheckpointError: tensors are missing, unexpected, misshapen or not finite.
    """
    if checkpoint.layout == "backbone":
        load_backbone(model, checkpoint)
        logger.warning(
            "'%s' holds a backbone alone: encoder and decoder have random weights.", checkpoint.path
        )
    else:
        own = model.state_dict()
        config: Any = model.config
        _load(
            model,
            _fit_class_layers(_renamed(checkpoint, own), own, checkpoint, config.class_names),
            checkpoint.path,
        )


def load_backbone(model: nn.Module, source: str | Path | Checkpoint) -> None:
    """Load pretrained weights into the backbone of a detector and leave the rest as it is.

    Args:
        source: DINOv3 from Meta, transformers or timm, the authors' ViT-Tiny, PaddleClas' HGNetv2, or any
            detector whose backbone has the same shape.
    Raises: CheckpointError: the weights are of another backbone, or incomplete.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    backbone = model.get_submodule("backbone")
    if checkpoint.layout != "backbone":
        state = _renamed(checkpoint, model.state_dict())
        prefix = "backbone."
        state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    else:
        backbone = backbone.vit if isinstance(backbone, AdaptedViT) else backbone
        own = backbone.state_dict()
        state = read_backbone(checkpoint.state, own)
        if isinstance(backbone, HGNetV2):
            state = _pruned(state, own, checkpoint.path)
    _load(backbone, state, checkpoint.path)


def _size_of(checkpoint: Checkpoint) -> str | None:
    """Return the published size with the widths of these weights; no two sizes share them."""
    if checkpoint.layout == "backbone":
        return None
    dim = checkpoint.score_head.shape[1]
    tokens = [t.shape[-1] for name, t in checkpoint.state.items() if name.endswith("cls_token")]
    for name, variant in VARIANTS.items():
        backbone = variant.config.backbone
        width = [backbone.vit.dim] if isinstance(backbone, AdaptedViTConfig) else []
        if (variant.config.decoder.hidden_dim, width) == (dim, tokens):
            return name
    return None


def _renamed(checkpoint: Checkpoint, own: StateDict) -> StateDict:
    """Return the tensors under this network's names."""
    is_port = checkpoint.layout == "transformers"
    return from_transformers(checkpoint.state, own) if is_port else checkpoint.state


def _fit_class_layers(
    state: StateDict, own: StateDict, checkpoint: Checkpoint, class_names: tuple[str, ...] | None
) -> StateDict:
    """Give each class of the model its row of the layers that have one per class; log what that changes.

    Where both name their classes, rows go by name, and classes that the checkpoint lacks keep the model's own
    rows. Otherwise, and where no name is shared, rows stay in their order if their number is the same, and
    are the model's own if not.
    """
    if SCORE_HEADS[0] not in state:
        return state  # reported as missing
    before, n_before, n_now = checkpoint.class_names, len(state[SCORE_HEADS[0]]), len(own[SCORE_HEADS[0]])
    by_name = before is not None and class_names is not None and bool(set(before) & set(class_names))
    if n_before == n_now and (not by_name or before == class_names):
        if before is not None and class_names is not None and not by_name:
            logger.warning(
                "'%s' has none of these classes: its rows become theirs, in order.", checkpoint.path
            )
        return state
    layers = [
        name
        for name, tensor in state.items()
        if _CLASS_LAYER.fullmatch(name) and name in own and len(tensor) - len(own[name]) == n_before - n_now
    ]
    if not by_name or before is None or class_names is None:
        logger.warning(
            "'%s' was trained on %d classes, this model has %d: these layers are re-initialised: %s.",
            checkpoint.path, n_before, n_now,
            ", ".join(sorted({name.rpartition(".")[0].removeprefix("decoder.") for name in layers})),
        )  # fmt: skip
        return state | {name: own[name] for name in layers}
    rows = [(before.index(name), now) for now, name in enumerate(class_names) if name in before]
    groups = {
        "moved": [class_names[now] for row, now in rows if row != now],
        "in place": [class_names[now] for row, now in rows if row == now],
        "new, re-initialised": [name for name in class_names if name not in before],
        "left out": [name for name in before if name not in class_names],
    }
    found = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in groups.items() if names)
    logger.warning("'%s': the heads' rows go by class name: %s.", checkpoint.path, found)
    fitted = {}
    for name in layers:
        tensor = own[name].clone()
        old, new = zip(*rows, strict=True)
        tensor[list(new)] = state[name][list(old)].to(tensor)
        fitted[name] = tensor
    return state | fitted


def _load(module: nn.Module, state: StateDict, path: str) -> None:
    """Load every tensor, or raise with everything that does not fit."""
    own = module.state_dict()
    state = _with_shared(state, module)
    fitting = {name: t for name, t in state.items() if name not in own or t.shape == own[name].shape}
    result = module.load_state_dict(fitting, strict=False)
    problems = {
        "missing": [n for n in result.missing_keys if n not in state and not n.endswith(_OPTIONAL)],
        "unexpected": [name for name in result.unexpected_keys if not name.endswith(_OPTIONAL)],
        "of another shape": [
            f"{name}: {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
            for name, tensor in state.items()
            if name not in fitting
        ],
        "not finite": [n for n, t in fitting.items() if n in own and not bool(t.isfinite().all())],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names
        )
        raise CheckpointError(
            f"'{path}' does not fit the model ({len(own)} tensors): {found}. Check `variant`, and that the "
            "file is of this detector."
        )


def _with_shared(state: StateDict, module: nn.Module) -> StateDict:
    """Give every name of a shared tensor its value: safetensors keeps only one of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    state = dict(state)
    for names in groups.values():
        kept = next((name for name in names if name in state), None)
        if kept is not None:
            state |= {name: state[kept] for name in names if name not in state}
    return state


def _pruned(state: StateDict, own: StateDict, path: str) -> StateDict:
    """Take from B0's file the tensors that Atto, Femto and Pico, its prunings, share with it."""
    shared = {name: t for name, t in state.items() if name in own and t.shape == own[name].shape}
    if not shared:
        raise CheckpointError(f"'{path}' shares no tensor with this backbone: it is not an HGNetv2 B0.")
    rest = [name for name in own if name not in shared and not name.endswith(_OPTIONAL)]
    if rest:
        logger.warning(
            "'%s' gives %d of the backbone's %d tensors; these are re-initialised: %s.",
            path,
            len(shared),
            len(own),
            _some(rest),
        )
    return own | shared


def _layout(state: StateDict, settings: Mapping[str, Any], path: str | Path) -> Layout:
    backbone = settings.get("backbone")
    is_port = any(name.startswith("model.conv_encoder.") for name in state)
    matches: dict[Layout, bool] = {  # the first that holds
        "transformers": is_port or settings.get("model_type") == "deimv2",
        "thawline": SCORE_HEADS[0] in state and isinstance(backbone, Mapping) and "kind" in backbone,
        "authors": SCORE_HEADS[0] in state,
        "backbone": bool({"cls_token", "embeddings.cls_token", "stem.stem1.conv.weight"} & set(state)),
    }
    for layout, does_match in matches.items():
        if does_match:
            return layout
    raise CheckpointError(
        f"'{path}' holds neither a DEIMv2 nor a backbone of one, but {len(state)} tensors: {_some(state)}."
    )


def _class_names(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> tuple[str, ...] | None:
    if checkpoint.layout == "transformers":
        labels = {int(index): str(name) for index, name in settings.get("id2label", {}).items()}
        names = tuple(labels[index] for index in sorted(labels))
        return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
    if checkpoint.layout == "authors" and len(checkpoint.score_head) == len(COCO_NAMES):
        logger.info("80 classes without names: assumed to be COCO's.")
        return COCO_NAMES
    return checkpoint.class_names


def _weight_file(folder: Path) -> tuple[Path, Path]:
    """Return a folder and its weight file; of a run the final, best or last detector."""
    for place in (folder, *(folder / part for part in RUN_PARTS)):
        for name in WEIGHT_FILES:
            if (place / name).is_file():
                return place, place / name
    for place in (folder, *(folder / part for part in RUN_PARTS)):
        if (place / "base" / "config.json").is_file():
            raise CheckpointError(
                f"'{folder}' holds a base and its domains. The base alone is '{place / 'base'}'; its domains "
                "are used by `thawline.SharedDetector`, or `--domain`."
            )
    if any((place / "adapter_config.json").is_file() for place in (folder, folder / "model")):
        raise CheckpointError(f"'{folder}' holds an adapter of another model, and no detector.")
    raise CheckpointError(
        f"No weights in '{folder}': expected {' or '.join(WEIGHT_FILES)}, or a run folder with "
        f"{', '.join(f'{part}/' for part in RUN_PARTS)}."
    )


def _download(path: str) -> Path:
    """Return the local copy of a hub repository, downloaded if necessary."""
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
            f"no '{path}' here. Download it on a machine with network access and pass the folder's path."
        ) from error


def _read_tensors(file: Path) -> StateDict:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with file.open("rb") as opened:
            start = opened.read(24)
        if not start.startswith((b"PK", b"\x80")):
            raise CheckpointError(
                f"'{file}' holds no weights: it begins with {start!r}. Was it downloaded whole?"
            ) from error
        what = re.search("Unsupported .*?(?= was not|$)", str(error), re.MULTILINE)
        raise CheckpointError(
            f"'{file}' holds Python objects besides tensors, and is not opened because loading them could "
            f"run code. Save its state dict alone.{f' ({what[0]})' if what else ''}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {error}. Is it complete?") from error
    return _state_dict(content, file)


def _state_dict(content: Any, file: Path) -> StateDict:
    """Find the weights in a training checkpoint; the EMA weights where there are any."""
    for path in (("ema", "module"), ("ema",), ("model",), ("state_dict",), ()):
        inner = content
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    raise CheckpointError(f"'{file}' holds no state dict.")


def _without_wrappers(state: StateDict) -> StateDict:
    for wrapper in ("module.", "_orig_mod.", "module."):
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def _some(names: Iterable[str]) -> str:
    names = list(names)
    n_more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f", … and {n_more} more" if n_more > 0 else "")
