"""Checkpoints of a run's folder: which are whole, and the newest of those.

A checkpoint is sealed once it is saved: manifest.json, written last and in one step, gives the size and the
SHA-256 digest of each file. A checkpoint is whole if its files are those of the manifest and each can be
opened. Nothing is unpickled but tensors and plain values, so a file from elsewhere cannot run code.

A checkpoint with neither a manifest nor a readable trainer_state.json, which transformers' Trainer writes
last, is half-written: the run was killed, or the disk was full.
"""

from __future__ import annotations

__all__ = [
    "WholeCheckpoints",
    "checkpoint_fault",
    "checkpoint_step",
    "find_checkpoints",
    "load_state",
    "newest_checkpoint",
    "remove_half_written",
    "seal_checkpoint",
]

import hashlib
import json
import logging
import pickle
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thawline.errors import CheckpointError
from thawline.files import DAMAGED, read_json, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNREADABLE = (*DAMAGED, OSError, ValueError, RuntimeError)
"""Raised on opening a file that is damaged, of another kind, or absent."""
_NEVER_READ = "training_args.bin"
# NumPy's random state, as transformers saves it.
_HARMLESS: list[Any] = [np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.UInt32DType]


class WholeCheckpoints(TrainerCallback):
    """Seals each checkpoint when all processes have saved their part; forgets a best one that is damaged."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the best checkpoint among those to come if the best of a resumed run is not whole."""
        if state.best_model_checkpoint is None:
            return
        best = Path(args.output_dir) / Path(state.best_model_checkpoint).name
        state.best_model_checkpoint = str(best)  # the folder may have moved
        if fault := checkpoint_fault(best):
            logger.warning(
                "The best checkpoint is lost: %s (%s). Another is chosen from here on.", best, fault
            )
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the manifest of the checkpoint that was just saved."""
        PartialState().wait_for_everyone()
        if args.should_save:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def seal_checkpoint(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint: size and digest of each of its files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    facts = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in files
    }
    write_json(checkpoint / MANIFEST, {"files": facts})


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not whole, naming the file; None: it is whole."""
    if not checkpoint.is_dir():
        return "no such folder"
    try:
        if not (checkpoint / MANIFEST).is_file():
            return f"{MANIFEST} is missing: it is written last"
        for name, facts in read_json(checkpoint / MANIFEST)["files"].items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != facts["bytes"]:
                return f"{name} has {size:,} bytes, not {facts['bytes']:,}"
            if _digest(file) != facts["sha256"]:
                return f"{name} has changed since it was saved"
    except (CheckpointError, AttributeError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for file in sorted(checkpoint.iterdir()):
        try:
            _open(file)
        except UNREADABLE as error:
            return f"{file.name} {_reason(file, error)}"
    return None


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run folder, oldest first; the others are named in a warning."""
    faults = {path: checkpoint_fault(path) for path in _checkpoint_folders(folder)}
    _warn({path: fault for path, fault in faults.items() if fault is not None})
    return [path for path, fault in faults.items() if fault is None]


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run folder; newer ones that are damaged are named in a warning.

    Returns: None if the run has saved no checkpoint.
    Raises: CheckpointError: if there are checkpoints, all of them damaged.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(_checkpoint_folders(folder)):
        if (fault := checkpoint_fault(path)) is None:
            _warn(damaged, f" Going on from {path.name}.")
            return path
        damaged[path] = fault
    if damaged:
        raise CheckpointError(
            f"'{folder}' has no whole checkpoint: {_named(damaged)}. Train again under another --name, or "
            "delete its checkpoints to start it again at step 0."
        )
    return None


def remove_half_written(folder: Path) -> None:
    """Delete checkpoints that a kill or a full disk left half-written."""
    for path in _folders(folder):
        if _is_half_written(path):
            logger.warning("%s is half-written (the run ended while saving it): removed.", path)
            shutil.rmtree(path)


def checkpoint_step(checkpoint: str | Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(Path(checkpoint).name.split("-")[1])


def load_state(file: Path, device: torch.device | str = "cpu") -> Any:
    """Load tensors and plain values that `torch.save` wrote; nothing else is unpickled.

    Raises: CheckpointError: for a file that is damaged or absent.
    """
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(f"'{file}' {_reason(file, error)}.") from error


def _checkpoint_folders(folder: Path) -> list[Path]:
    return [path for path in _folders(folder) if not _is_half_written(path)]


def _folders(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=checkpoint_step)


def _is_half_written(checkpoint: Path) -> bool:
    state = checkpoint / "trainer_state.json"
    if (checkpoint / MANIFEST).is_file():
        return False
    try:
        read_json(state)
    except CheckpointError:
        return True
    return not state.is_file()


def _open(file: Path) -> None:
    """Open a file as resuming would, without reading its tensors. Raises: one of UNREADABLE."""
    if file.suffix == ".json":
        json.loads(file.read_bytes())
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass
    elif file.suffix in (".pt", ".pth", ".bin") and file.name != _NEVER_READ:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about a pickle that is refused anyway
            torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)


def _reason(file: Path, error: Exception) -> str:
    """Return what is wrong with a file, given what opening it raised."""
    if file.is_file() and not file.stat().st_size:
        return "is empty"
    if isinstance(error, pickle.UnpicklingError):
        return "holds other objects than tensors, which are not loaded because loading them could run code"
    return (
        f"cannot be read: {str(error).strip().splitlines()[0] if str(error).strip() else 'it is cut short'}"
    )


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _warn(damaged: dict[Path, str], more: str = "") -> None:
    if damaged:
        logger.warning("Passed over %s.%s", _named(damaged), more)


def _named(damaged: dict[Path, str]) -> str:
    return ", ".join(f"{path.name} ({fault})" for path, fault in damaged.items())
