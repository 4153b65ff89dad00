"""A shared folder: one base, and the domains that were trained on it (`thawline.domains`)."""

from __future__ import annotations

__all__ = [
    "SharedFolder", "check_new", "domain_folders", "find_domain", "find_domains", "load_base", "named_domain",
]  # fmt: skip

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from thawline.domains import BASE, DOMAINS, shared_path
from thawline.domains.attach import merged_detector
from thawline.domains.domain import Domain, base_digest, load_domain, read_domain
from thawline.errors import CheckpointError, ConfigError, did_you_mean
from thawline.files import atomic_folder, write_json
from thawline.models.deimv2.model import DEIMv2
from thawline.recipe.checks import domain_name


def find_domains(path: str | Path) -> list[Path]:
    """Return the folders of domains: the path itself, or those of a run or shared folder.

    Raises: CheckpointError: there is none.
    """
    found = [Path(path)] if (Path(path) / "domain.json").is_file() else domain_folders(path)
    if not found:
        raise CheckpointError(f"'{path}' holds no domain. Train one: thawline train … --domain NAME.")
    return found


def find_domain(path: str | Path) -> Path:
    """Return the folder of a domain: the path itself, or the one of a run or shared folder.

    Raises: CheckpointError: there is none, or there are several.
    """
    found = find_domains(path)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise CheckpointError(f"'{path}' holds several domains ({names}). Name the folder of one.")
    return found[0]


def named_domain(path: str | Path, name: str) -> Path:
    """Return the folder of a domain of a run or shared folder. Raises: ConfigError: there is none."""
    folders = {one.name: one for one in domain_folders(path)}
    if name not in folders:
        raise ConfigError(f"'{path}' has no domain '{name}'. {did_you_mean(name, list(folders))}")
    return folders[name]


def domain_folders(path: str | Path) -> list[Path]:
    """Return the folders of the domains that a run or shared folder holds."""
    return _subfolders(Path(path) / DOMAINS)


def load_base(domain: str | Path, base: str | Path | None = None) -> DEIMv2:
    """Load the detector that a domain was trained on.

    Args:
        domain: the domain's folder.
        base: its weights. None: those that the domain's recipe names.
    Raises: CheckpointError: they are not there.
    """
    recipe = read_domain(domain).recipe.get("base", {})
    weights = base or recipe.get("weights")
    if weights is None:
        raise CheckpointError(f"'{domain}' does not say what it was trained on. Give --base.")
    try:
        return DEIMv2.from_pretrained(weights, recipe.get("variant"))
    except CheckpointError as error:
        if base is not None:
            raise
        raise CheckpointError(f"The base of '{domain}' cannot be read; give --base. {error}") from error


def check_new(path: str | Path, folders: Iterable[Path], base: DEIMv2, name: str | None = None) -> list[str]:
    """Return the names that domains get in a shared folder, once all are known to fit.

    Args:
        path: the shared folder, which may not exist yet.
        folders: of the domains.
        base: the detector of the shared folder.
        name: None: those that they were trained under.
    Raises: ConfigError: a name is taken or cannot be one. CheckpointError: as `load_domain`.
    """
    digest, names = base_digest(base), []
    for folder in folders:
        new = domain_name(name or read_domain(folder).name)
        if new in names or (Path(path) / DOMAINS / new).exists():
            raise ConfigError(f"'{path}' already has a domain '{new}'. Remove or rename it, or give --name.")
        load_domain(base, folder, digest)
        names.append(new)
    return names


class SharedFolder:
    """A folder of a base and domains.

    Raises: CheckpointError: it has no base.
    """

    def __init__(self, path: str | Path) -> None:
        found = shared_path(path)
        if found is None:
            raise CheckpointError(
                f"'{path}' is no shared folder: it has no {BASE}/ with a detector. `thawline domains add "
                "FOLDER RUN` makes one."
            )
        self.path = found

    @classmethod
    def create(cls, path: str | Path, base: DEIMv2) -> SharedFolder:
        """Make a shared folder around a base.

        Raises: ConfigError: the folder holds something else.
        """
        if Path(path).exists() and any(Path(path).iterdir()):
            raise ConfigError(f"'{path}' holds other files. Give a new folder, or one with {BASE}/.")
        with atomic_folder(Path(path) / BASE) as temporary:
            base.save_pretrained(temporary)
        return cls(path)

    def base(self) -> DEIMv2:
        """Load the base."""
        return DEIMv2.from_pretrained(self.path / BASE)

    def domains(self) -> Iterator[tuple[str, Domain | str]]:
        """Yield the name of each domain and what it says of itself, or why it cannot be read."""
        for folder in domain_folders(self.path):
            try:
                yield folder.name, read_domain(folder)
            except CheckpointError as error:
                yield folder.name, str(error)

    def folder(self, name: str) -> Path:
        """Return the folder of a domain. Raises: ConfigError: there is none of this name."""
        return named_domain(self.path, name)

    def only_one(self, name: str | None) -> str:
        """Return the name, if given, else that of the only domain. Raises: ConfigError: there are others."""
        names = [folder.name for folder in domain_folders(self.path)]
        if name is None and len(names) != 1:
            known = ", ".join(names) or "it has none"
            raise ConfigError(f"Which domain of '{self.path}'? Give `domain`: {known}.")
        return names[0] if name is None else name

    def load(self, name: str) -> DEIMv2:
        """Load the detector that a domain makes of the base, merged. Raises: ConfigError, CheckpointError."""
        return merged_detector(load_domain(self.base(), self.folder(name)))

    def add(self, source: str | Path, name: str | None = None, base: DEIMv2 | None = None) -> str:
        """Copy a domain into the folder, once it is known to fit the base, and return its name.

        Args:
            source: folder of a domain, or of a run that trained one.
            name: None: the one it was trained under.
            base: the base, where it is loaded.
        Raises: ConfigError: the name is taken or cannot be one. CheckpointError: as `load_domain`.
        """
        folder = find_domain(source)
        (name,) = check_new(self.path, [folder], base or self.base(), name)
        self.copy(folder, name)
        return name

    def remove(self, name: str) -> None:
        """Delete a domain. Raises: ConfigError: there is none of this name."""
        folder = self.folder(name)
        gone = folder.with_name(f".{name}.removed")
        os.replace(folder, gone)  # at once: nobody reads half a domain
        shutil.rmtree(gone)

    def rename(self, name: str, new: str) -> None:
        """Rename a domain. Raises: ConfigError: no such domain, or the new name is taken."""
        folder, new = self.folder(name), domain_name(new)
        if (self.path / DOMAINS / new).exists():
            raise ConfigError(f"'{self.path}' already has a domain '{new}'.")
        self.copy(folder, new)
        self.remove(name)

    def copy(self, folder: Path, name: str) -> None:
        """Copy a domain, which fits the base, under a name that is free."""
        with atomic_folder(self.path / DOMAINS / name) as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
            about = replace(read_domain(folder), name=name)
            write_json(temporary / "domain.json", vars(about))


def _subfolders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
