"""Rows read by the `datasets` library: saved datasets, datasets of the Hub, Parquet files."""

from __future__ import annotations

__all__ = ["dataset_rows", "is_dataset", "table_rows"]

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from thawline.errors import DataError, requires_extra

logger = logging.getLogger(__name__)

HUB = "hf://"

UNLABELLED = -1
"""Class id of a row without a label, as in the test splits of GLUE."""
WITHOUT_ROWS = ("BatchSize must be greater than 0", "corresponds to no data")
"""Parts of the library's messages about a table without rows."""


def is_dataset(path: str | Path) -> bool:
    """Return True for "hf://…" and for folders written by `save_to_disk`."""
    names = ("dataset_dict.json", "state.json")
    return str(path).startswith(HUB) or any((Path(path) / name).is_file() for name in names)


def dataset_rows(
    path: str, answers: Collection[str] = ()
) -> Iterator[tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]]:
    """Yield the name of every split of a dataset with its rows, each as place and content.

    Class ids become class names, and all names of the answer column become the `choices` of rows without
    choices. A split without any label is left out.

    Args:
        path: a folder, or "hf://OWNER/NAME", followed by "/CONFIG" if the dataset has several.
        answers: possible names of the answer column.
    """
    found = _load(path)
    splits = found.items() if isinstance(found, dict) else [(str(found.split or ""), found)]
    for name, rows in splits:
        where = f"{path}[{name}]" if name else path
        given = next((key for key in _classes(rows) if key in answers), None)
        if given is not None and all(label == UNLABELLED for label in rows[given]):
            logger.warning("%s: no row has a label; left out.", where)
            continue
        yield name, _rows(rows, where, answers)


def table_rows(file: Path, answers: Collection[str] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield place and content of every row of a Parquet file, with classes as in `dataset_rows`."""
    return _rows(_load(str(file)), str(file), answers)


def _classes(rows: Any) -> dict[str, list[str]]:
    """Return the class names of every column of classes."""
    return {key: feature.names for key, feature in rows.features.items() if hasattr(feature, "names")}


def _rows(rows: Any, where: str, answers: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    classes = _classes(rows)
    own = next((names for key, names in classes.items() if key in answers), None)
    choices = {} if own is None else {"choices": own}
    for i, row in enumerate(rows):
        # A missing class becomes None, which `load_examples` refuses.
        named = {
            key: None if row[key] in (None, UNLABELLED) else names[row[key]] for key, names in classes.items()
        }
        plain = {key: _without_nulls(value) for key, value in row.items()}
        yield f"{where}:{i}", {**choices, **plain, **named}


def _without_nulls(value: Any) -> Any:
    """Return a value without keys that are null: a table's objects have the keys of all its rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _load(path: str) -> Any:
    """Load what `dataset_rows` or `table_rows` were given. Raises: DataError: with the reason in one line."""
    with requires_extra("A dataset", "datasets", "text"):
        import datasets
    try:
        if path.startswith(HUB):
            parts = path.removeprefix(HUB).split("/")
            return datasets.load_dataset("/".join(parts[:2]), "/".join(parts[2:]) or None)
        if Path(path).is_dir():
            return datasets.load_from_disk(path)
        return datasets.load_dataset("parquet", data_files=path, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error  # the library's own message about a broken file gives no reason
        if any(part in str(reason) for part in WITHOUT_ROWS):
            raise DataError(f"{path}: no rows.") from error
        raise DataError(f"Cannot load '{path}': {str(reason).strip().splitlines()[0]}") from error
