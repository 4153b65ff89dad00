"""Rows of a `datasets` dataset: one on the disk, or one of the Hub. The only file that knows the library."""

from __future__ import annotations

__all__ = ["dataset_rows", "is_dataset"]

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thawline.errors import DataError, MissingExtraError

HUB = "hf://"


def is_dataset(path: str | Path) -> bool:
    """Whether `path` is "hf://…", or a folder that `save_to_disk` wrote."""
    names = ("dataset_dict.json", "state.json")
    return str(path).startswith(HUB) or any((Path(path) / name).is_file() for name in names)


def dataset_rows(path: str) -> Iterator[tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]]:
    """The splits of a dataset, each with its rows and their place. Class labels become their names, and, as
    `choices`, all of them.

    Args:
        path: a folder, or "hf://OWNER/NAME", with "/CONFIG" behind it where the dataset has several.
    """
    found = _load(path)
    splits = found.items() if isinstance(found, dict) else [(str(found.split or ""), found)]
    for name, rows in splits:
        yield name, _rows(rows, f"{path}[{name}]" if name else path)


def _rows(rows: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    names = {key: feature.names for key, feature in rows.features.items() if hasattr(feature, "names")}
    only = {"choices": next(iter(names.values()))} if len(names) == 1 else {}
    for i, row in enumerate(rows):
        # −1 stands for an unlabelled row, which is no text and so is refused by its reader.
        named = {
            key: known[row[key]] for key, known in names.items() if row[key] is not None and row[key] >= 0
        }
        yield f"{where}:{i}", {**only, **row, **named}


def _load(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("A dataset", "datasets", "text") from error
    try:
        if not path.startswith(HUB):
            return datasets.load_from_disk(path)
        parts = path.removeprefix(HUB).split("/")
        name, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
        return datasets.load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot load '{path}': {str(error).strip().splitlines()[0]}") from error
