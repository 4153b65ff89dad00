"""Real sets: their COCO files against their origins' own VOC and YOLO annotations, read by other readers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from thawline.data.detection.dataset import DetectionDataset, load_detection, read_detection
from thawline.data.detection.records import DetectionSet, clip_boxes

SETS = {
    "aerial_cars": ({"train": 45, "val": 20}, 2593),
    "bccd": ({"train": 292, "val": 72}, 4886),
    "cards": ({"train": 296, "val": 67}, 670),
    "nuts": ({"train": 16, "val": 2}, 164),
    "trees": ({"train": 6, "val": 2}, 314),
}
"""Set → (images by split, boxes), as its SOURCE.md counts them."""

Boxes = Counter[tuple[str, tuple[float, ...]]]


def boxes_by_image(data: DetectionSet, digits: int) -> dict[str, Boxes]:
    """File name → its boxes by class name: neither the order nor the ids of two formats need agree."""
    return {
        record.path.name: Counter(
            (data.class_names[label], tuple(round(value, digits) for value in box))
            for label, box in zip(record.labels.tolist(), record.boxes_xyxy.tolist(), strict=True)
        )
        for records in data.splits.values()
        for record in records
    }


@pytest.mark.parametrize("name", SETS)
def test_real_coco_files_are_read_whole_without_naming_a_format(shared: Path, name: str) -> None:
    data = load_detection(shared / "data/detection" / name)
    n_images, n_boxes = SETS[name]
    assert data.format == "coco"
    assert {split: len(records) for split, records in data.splits.items()} == n_images
    assert sum(len(record.labels) for records in data.splits.values() for record in records) == n_boxes
    assert data.problems == ()
    image, target = DetectionDataset(data.records("train"))[0]
    assert image.shape[1:] == (data.records("train")[0].height, data.records("train")[0].width)
    assert len(target["labels"]) > 0


def test_nuts_voc_equals_its_coco_copy(shared: Path) -> None:
    coco, voc = (load_detection(shared / "data/detection/nuts", format=name) for name in ("coco", "voc"))
    assert coco.class_names == voc.class_names
    assert boxes_by_image(coco, 3) == boxes_by_image(voc, 3)


def test_bccd_voc_equals_its_coco_copy_but_for_two_boxes_without_area(shared: Path) -> None:
    coco, voc = (load_detection(shared / "data/detection/bccd", format=name) for name in ("coco", "voc"))
    # VOC has no ids, so its labels follow the alphabet; the copy's ids follow the first file.
    assert coco.class_names == ("RBC", "WBC", "Platelets")
    assert voc.class_names == ("Platelets", "RBC", "WBC")
    left, right = boxes_by_image(coco, 3), boxes_by_image(voc, 3)
    assert left.keys() == right.keys()
    extra = {name: right[name] - left[name] for name in left if right[name] != left[name]}
    assert extra == {
        "BloodImage_00338.jpg": Counter([("RBC", (504.0, 337.0, 504.0, 337.0))]),
        "BloodImage_00343.jpg": Counter([("RBC", (181.0, 329.0, 181.0, 329.0))]),
    }
    assert [problem.kind for problem in voc.problems] == ["box-degenerate"] * 2


def test_cards_voc_is_in_the_pixels_of_larger_images_and_says_so(shared: Path) -> None:
    coco, voc = (read_detection(shared / "data/detection/cards", format=name) for name in ("coco", "voc"))
    # The images were shrunk to 512 pixels and the COCO copy with them; the XML files were not.
    shrunk = {problem.where for problem in voc.problems}
    assert {problem.kind for problem in voc.problems} == {"image-size"}
    assert len(shrunk) == 51
    left, right = boxes_by_image(coco, 3), boxes_by_image(voc, 3)
    different = {name for name in left if left[name] != right[name]}
    assert {Path(where).stem for where in shrunk} == {Path(name).stem for name in different}


def test_trees_voc_annotates_crops_of_which_only_tiles_are_there(shared: Path) -> None:
    voc = read_detection(shared / "data/detection/trees", format="voc")
    assert [problem.kind for problem in voc.problems] == ["missing-image"] * 3


def test_aerial_cars_darknet_labels_equal_the_coco_copy(shared: Path, tmp_path: Path) -> None:
    origin = shared / "data/detection/aerial_cars"
    coco = load_detection(origin)
    # The origin has darknet's layout, labels in a folder of their own and no yaml; links give it YOLO's.
    (tmp_path / "images").symlink_to(origin / "images")
    (tmp_path / "labels").symlink_to(origin / "annotations")
    names = (origin / "annotations/aerial.names").read_text().split()
    (tmp_path / "data.yaml").write_text(f"train: images\nnames: {names}\n")
    yolo = load_detection(tmp_path)
    assert yolo.class_names == coco.class_names
    # The copy is clipped and rounded to hundredths, corner and size apart: 0.01 at the far corner.
    left, right = ({r.path.name: r for rs in d.splits.values() for r in rs} for d in (coco, yolo))
    assert left.keys() == right.keys()
    for name, record in left.items():
        assert record.labels.tolist() == right[name].labels.tolist()
        clipped = clip_boxes(right[name].boxes_xyxy, record.width, record.height)
        assert abs(record.boxes_xyxy - clipped).max(initial=0) <= 0.0101
