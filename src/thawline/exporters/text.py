"""Exports of a tuned language model: a merged checkpoint, or a stock LoRA for each task.

merged        the base with the adapter inside its weights, bfloat16, with its tokenizer
gguf-ready    the same, of a language model: what llama.cpp's `convert_hf_to_gguf.py` reads
lora          stock PEFT LoRA folders, which vLLM and TGI load beside the base
"""

from __future__ import annotations

__all__ = ["export_text"]

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thawline.errors import ConfigError, did_you_mean
from thawline.files import atomic_folder
from thawline.tuners.mhr import set_task_ids
from thawline.tuners.paca.quantised import merge_and_dequantise
from thawline.tuners.to_lora import to_lora

RECORD = ".thawline-export"
"""File in the folder of an export, with its format: the folder may be written again."""
ALL = "all"
"""In place of a task's name: every task, a folder each."""


def export_text(
    load: Callable[[], tuple[Any, Any]], out: Path, format: str, task: str | None = None
) -> list[Path]:
    """Write a tuned model for serving.

    Args:
        load: returns a freshly loaded tuned model, because merging changes it, and its tokenizer.
        out: folder; with `all` it gets a folder for each task.
        format: merged, lora or gguf-ready.
        task: name of a task of the adapter, or `all`. None: the only one.
    Returns: the folders.
    Raises: ConfigError: no such task, or several and none is chosen; a folder that holds other files.
    """
    model, tokenizer = load()
    tasks = list(getattr(_adapter(model), "task_names", None) or [])
    if task is None and len(tasks) == 1:
        task = tasks[0]
    if tasks and task not in (*tasks, ALL):
        found = f"No task '{task}'." if task else "The adapter serves several tasks: give `task`."
        raise ConfigError(f"{found} {did_you_mean(str(task), [*tasks, ALL])}")
    folders = {name: out / name for name in tasks} if task == ALL and tasks else {task: out}
    for folder in folders.values():
        _check_target(folder, format)
    for index, (name, folder) in enumerate(folders.items()):
        if index:
            model, tokenizer = load()
        with atomic_folder(folder) as temporary:
            _write(model, tokenizer, temporary, format, name if tasks else None)
            (temporary / RECORD).write_text(format)
    return list(folders.values())


def _check_target(folder: Path, format: str) -> None:
    """Check that a folder is new, empty, or an earlier export.

    Raises: ConfigError: if files could be lost, such as the base's own.
    """
    record = folder / RECORD
    if record.is_file() and record.read_text() == format:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"`out`: '{folder}' is in use. Give a new or empty folder, or an earlier {format}.")


def _write(model: Any, tokenizer: Any, folder: Path, format: str, task: str | None) -> None:
    config = _adapter(model)
    if format == "lora":
        if config is None:
            raise ConfigError("There is no adapter: all weights were trained. Export them as `merged`.")
        if config.peft_type.value == "LORA":
            model.save_pretrained(str(folder))
        else:
            to_lora(model, folder, task=task)
        return
    if config is not None:
        if task is not None:
            set_task_ids(model, task)
        model = merge_and_dequantise(model)
    if format == "gguf-ready" and not hasattr(model, "lm_head"):
        raise ConfigError(f"{type(model).__name__} has no language-modelling head; GGUF needs one.")
    model.to(torch.bfloat16).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _adapter(model: Any) -> Any:
    return next(iter(getattr(model, "peft_config", {}).values()), None)
