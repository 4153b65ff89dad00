"""Label files of YOLO: found for their images, read line by line.

class cx cy w h                 a box, in fractions of the image
class cx cy w h x y v x y v …   with keypoints, where the YAML file has `kpt_shape`; they are not read
class x1 y1 x2 y2 x3 y3 …       a polygon, which becomes the box around it
"""

from __future__ import annotations

__all__ = ["LabelReader"]

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from thawline.data.detection.formats.places import files_in, plain_parts, relative_name, subfolders
from thawline.data.detection.formats.raw import RawBox, RawImage, RawSet, box_around, listed
from thawline.data.detection.formats.splits import split_of_folder
from thawline.data.detection.images import is_image

RELATIVE_MIN, RELATIVE_MAX = -0.5, 1.5
"""Coordinates beyond these are no fractions, which may leave 0–1 where a box leaves its image a little."""
NOT_LABELS = ("classes.txt", "labels.txt", "obj.names", "notes.txt", "README.txt")


class LabelReader:
    """Reads the label files of the images of a dataset.

    Args:
        raw: gets boxes and problems.
        n_keypoint_values: number of values after a box, which are not read.
    """

    def __init__(self, raw: RawSet, n_keypoint_values: int) -> None:
        self.raw, self.n_keypoint_values = raw, n_keypoint_values
        self._n_polygons = 0
        self._n_like_keypoints = Counter[int]()
        """Polygons whose numbers could as well be a box and keypoints of two or three values."""
        self._labels_in = cache(_labels_in)
        self._label_folder = cache(_label_folder)

    def read(self, split: str) -> None:
        """Read the labels of a split."""
        raw, unlabelled, paths = self.raw, list[RawImage](), list[Path]()
        by_label: defaultdict[Path, list[RawImage]] = defaultdict(list)
        for image in raw.splits[split]:
            if image.path is not None:
                paths.append(image.path)
                label = self._label_of(image.path)
                by_label[label].append(image) if label else unlabelled.append(image)
        for label, owners in by_label.items():
            where = relative_name(label, raw.root)
            if len({image.path for image in owners}) > 1:
                names = ", ".join(image.name for image in owners)
                raw.add_problem("ambiguous-image", where, f"may be the labels of {names}", split)
                for image in owners:
                    image.is_unusable = True
                continue
            boxes = self._read_labels(label, where, split)
            for image in owners:
                image.where, image.boxes = where, list(boxes)
        if paths and not by_label:
            expected = self._label_folder(paths[0].parent) / f"{paths[0].stem}.txt"
            detail = (
                f"none of the {len(paths)} images of '{split}' has a label file; expected e.g. '{expected}'"
            )
            raw.add_problem("missing-labels", split, detail, split)
        elif unlabelled:
            names = listed([image.name for image in unlabelled])
            detail = f"{len(unlabelled)} of {len(paths)} images ({names})"
            raw.add_problem("unlabelled", split, detail, split)
        self._report_orphans(paths, set(by_label), split)

    def check_keypoints(self, where: str) -> None:
        """Report label lines that were read as polygons, and all look like a box and keypoints."""
        counts, n = self._n_like_keypoints, self._n_polygons
        if n and counts[3] == n:
            detail = "all label lines look like a box and keypoints: add `kpt_shape: [number, 3]`"
            self.raw.add_problem("malformed", where, detail)
        elif n and counts[2] == n:
            detail = "if all label lines are a box and keypoints, add `kpt_shape: [number, 2]`"
            self.raw.add_problem("like-keypoints", where, detail)

    def _label_of(self, image: Path) -> Path | None:
        for folder in dict.fromkeys((self._label_folder(image.parent), image.parent)):
            labels = self._labels_in(folder)
            if label := labels.get(image.stem) or labels.get(_plain(image.stem)):
                return label
        return None

    def _read_labels(self, file: Path, where: str, split: str) -> list[RawBox]:
        boxes = []
        for number, line in enumerate(self.raw.read_text(file, split).splitlines(), start=1):
            if line.strip():
                try:
                    boxes.append(self._parse_line(line))
                except ValueError as error:
                    self.raw.add_problem("malformed", f"{where}:{number}", str(error), split)
        return boxes

    def _parse_line(self, line: str) -> RawBox:
        """Parse a line of a label file. Raises: ValueError: with what is wrong with it."""
        try:
            class_id, *values = map(float, line.split())
        except ValueError as error:
            raise ValueError(f"expected numbers, got '{line.strip()}'") from error
        if not class_id.is_integer():
            raise ValueError(f"the class must be an integer, got {line.split()[0]}")
        n, n_more = len(values), self.n_keypoint_values
        if n_more and n not in (4, 4 + n_more):
            raise ValueError(
                f"expected `class cx cy w h` and {n_more} values of keypoints, got {n + 1} numbers"
            )
        is_polygon = not n_more and n >= 6 and n % 2 == 0
        if not n_more and n != 4 and not is_polygon:
            raise ValueError(f"expected `class cx cy w h` or a polygon, got {n + 1} numbers{_hint(values)}")
        coordinates = values if is_polygon else values[:4]
        if min(coordinates) < RELATIVE_MIN or max(coordinates) > RELATIVE_MAX:
            raise ValueError(f"expected fractions of the image, got pixels ('{line.strip()}'){_hint(values)}")
        if is_polygon:
            self._n_polygons += 1
            self._n_like_keypoints.update(k for k in (2, 3) if _is_like_keypoints(values, k))
            return RawBox(box_around(values[::2], values[1::2]), int(class_id))
        cx, cy, w, h = coordinates
        return RawBox((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), int(class_id))

    def _report_orphans(self, images: Sequence[Path], used: set[Path], split: str) -> None:
        """Report label files without an image, except those whose image a list leaves out on purpose."""
        siblings: defaultdict[Path, set[Path]] = defaultdict(set)
        for folder in {image.parent for image in images}:
            siblings[self._label_folder(folder)].add(folder)
        for folder in {path.parent for path in used}:
            siblings[folder] = siblings[folder] or {folder}
        for folder in sorted(siblings):
            files = [path for sibling in siblings[folder] for path in sibling.iterdir()]
            stems = {_plain(path.stem) for path in files if is_image(path)}
            others = {_plain(path.stem): path.name for path in files if path.suffix.lower() != ".txt"}
            for path in files_in(folder, ".txt"):
                stem = _plain(path.stem)
                is_list = split_of_folder(path.stem) is not None
                if path not in used and stem not in stems and path.name not in NOT_LABELS and not is_list:
                    other = f", and '{others[stem]}' is of no format that is read" if stem in others else ""
                    self.raw.add_problem(
                        "unknown-image", path.name, f"no image '{path.stem}.*'{other}", split
                    )


def _hint(values: Sequence[float]) -> str:
    """Return what to try for numbers that cannot be read as they are."""
    if not _is_like_keypoints(values, 3):
        return ""
    return ". Of a box and keypoints? Then add `kpt_shape` to the YAML file"


def _is_like_keypoints(values: Sequence[float], n_values: int) -> bool:
    """Return True if numbers fit a box (cx cy w h) and keypoints (x y, or x y visibility) inside of it."""
    rest = np.array(values[4:])
    if not len(rest) or len(rest) % n_values:
        return False
    center, size = np.array(values[:2]), np.array(values[2:4])
    points = rest.reshape(-1, n_values)
    if n_values == 3:
        if not np.isin(points[:, 2], (0, 1, 2)).all():
            return False
        points = points[points[:, 2] > 0]
    is_in_image = (np.abs(center - 0.5) + size / 2 <= 0.55).all()
    return bool(is_in_image and (np.abs(points[:, :2] - center) <= 0.6 * size).all())


def _label_folder(images: Path) -> Path:
    """Return the folder of the labels of a folder of images: images/ becomes labels/, else it is the same."""
    for folder in (images, *images.parents):
        if folder.name.lower() in ("images", "jpegimages"):
            named = [path for path in subfolders(folder.parent) if path.name.lower() == "labels"]
            return (named[0] if named else folder.with_name("labels")) / images.relative_to(folder)
    return images


def _labels_in(folder: Path) -> dict[str, Path]:
    """Return the text files of a folder by stem, and by stem as `_plain` writes it."""
    files = files_in(folder, ".txt")
    return {_plain(file.stem): file for file in files} | {file.stem: file for file in files}


def _plain(name: str) -> str:
    return "/".join(plain_parts(name))
