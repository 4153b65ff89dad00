"""Files of a dataset: walk its folders, resolve the names in annotations and decode text, for every format.

A name in an annotation file was often written on another machine: with backslashes, percent signs for spaces,
another Unicode form, another case, an absolute path. `Places` takes a file of exactly that name first; else
files whose path agrees with the name after these differences are removed, as far as both go. Where several
agree equally well, it returns all of them: none is guessed.
"""

from __future__ import annotations

__all__ = [
    "Places",
    "decode_text",
    "existing",
    "files_in",
    "find_path",
    "hidden_images",
    "is_url",
    "list_images",
    "plain_parts",
    "read_text",
    "relative_name",
    "subfolders",
]

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from urllib.parse import unquote

from thawline.data.detection.formats.splits import split_of_folder
from thawline.data.detection.images import IMAGE_SUFFIXES, is_image
from thawline.files import marked_encoding


class Places:
    """Folders in which the files that annotations name are searched.

    Args:
        folders: in order of preference.
        split: split that the files belong to; subfolders that name another one are not searched, unless the
            name says so. None: all are searched.
        suffixes: of the files.
    """

    def __init__(
        self, folders: Sequence[Path], split: str | None = None, suffixes: Sequence[str] = IMAGE_SUFFIXES
    ) -> None:
        self.folders, self.split, self.suffixes = tuple(folders), split, tuple(suffixes)

    def find(self, name: str) -> list[Path]:
        """Return the file of a name, with or without suffix and folders; several if they agree equally."""
        for folder in self.folders:
            if _is_file(folder / name):
                return [folder / name]
        *parents, last = plain_parts(name) or [""]
        by_agreement: defaultdict[tuple[int, int, int], list[Path]] = defaultdict(list)
        for order, path, (*folders, _) in self._files[last]:
            n = min(len(parents), len(folders))
            own = folders[: len(folders) - n]
            names_other_split = self.split and any(
                split_of_folder(folder) not in (None, self.split) for folder in own
            )
            if folders[len(own) :] == parents[len(parents) - n :] and not names_other_split:
                by_agreement[-n, len(own), order].append(path)
        best = by_agreement[min(by_agreement)] if by_agreement else []
        return list({path.resolve(): path for path in best}.values())

    @cached_property
    def _files(self) -> defaultdict[str, list[tuple[int, Path, list[str]]]]:
        """Order of the folder, path and plain parts below the folder of all files, by plain name and stem."""
        files: defaultdict[str, list[tuple[int, Path, list[str]]]] = defaultdict(list)
        for order, folder in enumerate(self.folders):
            for path in _walk(folder):
                if path.suffix.lower() in self.suffixes:
                    parts = plain_parts(str(path.relative_to(folder)))
                    for key in (parts[-1], PurePath(parts[-1]).stem):
                        files[key].append((order, path, parts))
        return files


def find_path(name: str, folders: Iterable[Path]) -> Path | None:
    """Return the folder or list of files that a path means, below one of `folders` or absolute.

    `../` in front is left out if need be, as by Roboflow's readers; of an absolute path of another machine,
    the longest end that exists counts: two parts or more, or the name of a split.
    """
    folders = list(folders)
    written = name.replace("\\", "/")
    for spelling in dict.fromkeys((name, written, re.sub(r"^(\.\./)+", "", written))):
        for folder in folders:
            if (folder / spelling).exists():
                return folder / spelling
    parts = plain_parts(name)
    is_absolute = written.startswith("/") or re.match(r"[a-zA-Z]:", written) is not None
    for start in range(len(parts) if is_absolute else 1):
        rest = parts[start:]
        if start == 0 or len(rest) > 1 or split_of_folder(rest[0]):
            for folder in folders:
                if (path := _descend(folder, rest)) is not None:
                    return path
    return None


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted, without hidden ones; links to folders are followed."""
    return sorted(path for path in _walk(folder) if is_image(path))


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files directly in a folder with one of the suffixes, sorted, without hidden ones."""
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        child
        for child in children
        if child.suffix.lower() in suffixes and not _is_hidden(child.name) and child.is_file()
    ]


def subfolders(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, sorted, without hidden ones."""
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and not _is_hidden(child.name)]


def hidden_images(folder: Path) -> list[Path]:
    """Return the images in hidden files and folders directly in a folder, such as .ipynb_checkpoints."""
    hidden = [child for child in sorted(folder.iterdir()) if _is_hidden(child.name)]
    files = [path for child in hidden for path in (child.rglob("*") if child.is_dir() else [child])]
    return sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)


def existing(folders: Iterable[Path]) -> list[Path]:
    """Return the folders that exist, each once."""
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def relative_name(path: Path, root: Path) -> str:
    """Return a path for messages: relative to the dataset's folder if it lies inside."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def is_url(name: str) -> bool:
    """Return True for a web address, also one that a path has shortened to a single slash."""
    return re.match(r"[a-zA-Z][\w+.-]+:/", name) is not None


def plain_parts(name: str) -> list[str]:
    """Return the parts of a path without case, Unicode form, separators and outer spaces, which differ."""
    text = unicodedata.normalize("NFC", unquote(name).casefold()).replace("\\", "/")
    return [part for part in map(str.strip, text.split("/")) if part not in ("", ".", "..")]


def read_text(path: Path) -> str:
    """Read a text file of any usual encoding; see `decode_text`."""
    return decode_text(path.read_bytes())[0]


def decode_text(data: bytes) -> tuple[str, bool]:
    """Decode text: UTF-8 or UTF-16, with or without a byte order mark, else Windows-1252.

    Returns: the text, and True if its encoding is certain.
    """
    encoding = marked_encoding(data) or "utf-8"
    if encoding == "utf-8" and 0 in data[:2]:
        encoding = "utf-16-le" if data[0] else "utf-16-be"
    try:
        return data.decode(encoding), True
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), False


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, without hidden ones; a folder that several links name is read once."""
    seen = set[str]()
    for top, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        is_new = real not in seen
        seen.add(real)
        folders[:] = sorted(name for name in folders if is_new and not _is_hidden(name))
        yield from (Path(top, name) for name in sorted(files) if is_new and not _is_hidden(name))


def _descend(folder: Path, parts: Sequence[str]) -> Path | None:
    """Return the path below a folder whose plain parts are `parts`, if there is exactly one."""
    paths = [folder]
    for part in parts:
        children = [child for path in paths if path.is_dir() for child in path.iterdir()]
        paths = [child for child in children if plain_parts(child.name) == [part]]
    return paths[0] if len(paths) == 1 else None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False
