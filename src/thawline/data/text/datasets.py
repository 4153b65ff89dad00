"""Rows of a `datasets` dataset: on the disk, of the Hub, or a Parquet or CSV file; only this file knows the
library."""

from __future__ import annotations

__all__ = ["TABLES", "dataset_rows", "is_dataset", "table_rows"]

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from thawline.errors import DataError, MissingExtraError

logger = logging.getLogger(__name__)

HUB = "hf://"

TABLES = ("parquet", "csv")
"""Suffixes of files that the library reads for us; also its names for them."""

UNLABELLED = -1
"""What stands for a class that was not given, as in the test splits of GLUE."""


def is_dataset(path: str | Path) -> bool:
    """Whether `path` is "hf://…", or a folder that `save_to_disk` wrote."""
    names = ("dataset_dict.json", "state.json")
    return str(path).startswith(HUB) or any((Path(path) / name).is_file() for name in names)


def dataset_rows(
    path: str, answers: Collection[str] = ()
) -> Iterator[tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]]:
    """The splits of a dataset, each with its rows and their place.

    Class labels become their names, and those of the answers' column, all together, `choices` of rows that
    have none. A split without any label is left out.

    Args:
        path: a folder, or "hf://OWNER/NAME", with "/CONFIG" behind it where the dataset has several.
        answers: what the column of the answers may be called.
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
    """Place and content of every row of a Parquet or CSV file; class labels as in `dataset_rows`."""
    rows = _checked(
        str(file),
        lambda library: library.load_dataset(
            file.suffix.removeprefix("."), data_files=str(file), split="train"
        ),
    )
    return _rows(rows, str(file), answers)


def _classes(rows: Any) -> dict[str, list[str]]:
    """The names of classes, by column."""
    return {key: feature.names for key, feature in rows.features.items() if hasattr(feature, "names")}


def _rows(rows: Any, where: str, answers: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    classes = _classes(rows)
    own = next((names for key, names in classes.items() if key in answers), None)
    choices = {} if own is None else {"choices": own}
    for i, row in enumerate(rows):
        # A class that was not given is no text, and so is refused by its reader.
        named = {key: names[row[key]] for key, names in classes.items() if row[key] not in (None, UNLABELLED)}
        yield f"{where}:{i}", {**choices, **row, **named}


def _load(path: str) -> Any:
    if not path.startswith(HUB):
        return _checked(path, lambda library: library.load_from_disk(path))
    parts = path.removeprefix(HUB).split("/")
    name, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    return _checked(path, lambda library: library.load_dataset(name, config))


def _checked(path: str, load: Callable[[Any], Any]) -> Any:
    """What `load` makes of the library. Raises: DataError: in one line."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("A dataset", "datasets", "text") from error
    try:
        return load(datasets)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error  # of a broken file the library only says that it failed
        raise DataError(f"Cannot load '{path}': {str(reason).strip().splitlines()[0]}") from error
