"""Checkpoints of a run's folder: complete ones in the order of steps, half-written ones removed.

A kill while saving leaves a checkpoint half-written. Trainer writes trainer_state.json last, so a checkpoint
is complete exactly if that file can be read.
"""

from __future__ import annotations

__all__ = ["checkpoint_step", "find_checkpoints", "newest_checkpoint", "remove_incomplete_checkpoints"]

import json
import logging
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, oldest first."""
    return [path for path in _checkpoint_folders(folder) if _is_complete(path)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, or None."""
    return next(reversed(find_checkpoints(folder)), None)


def remove_incomplete_checkpoints(folder: Path) -> None:
    """Delete checkpoints that a kill left half-written."""
    for path in _checkpoint_folders(folder):
        if not _is_complete(path):
            logger.warning("%s is half-written (the run was killed while saving): removed.", path)
            shutil.rmtree(path)


def checkpoint_step(checkpoint: str | Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(Path(checkpoint).name.split("-")[1])


def _checkpoint_folders(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True
