"""The report: one file that holds all of a run and loads nothing."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.support.detection_files import write_coco
from tests.support.detections import NAMES, detected, measure, random_set
from thawline.cli import main
from thawline.data.detection.dataset import DetectionDataset, load_detection
from thawline.errors import DataError, MissingExtraError
from thawline.metrics.detection import DetectionEvaluator
from thawline.metrics.mistakes import Confusion
from thawline.report.gallery import save_gallery, save_worst_images
from thawline.report.page import Chart, Line, Section, Table, Text, write_page
from thawline.report.run_report import _confusion, build_report


class Page(HTMLParser):
    """A page's headings, table cells, and every address it refers to; unclosed tags are counted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.charts: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        self.ids += [value for name, value in attributes if name == "id"]
        assert tag not in ("script", "link", "iframe", "object")
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        if self.open[-1] == "h2":
            self.headings.append(data)
        if self.open[-1] == "h3":
            self.charts.append(data)
        if self.open[-1] in ("td", "pre", "dd", "span") or "score" in self.open[-1]:
            self.cells.append(data)


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, as training leaves it."""
    folder = tmp_path / "bccd-pico"
    (folder / "pictures").mkdir(parents=True)
    rows = [
        {"step": s, "loss": 3 / s, "learning_rate": 1e-4, "epoch": s / 9, "seconds": s} for s in range(1, 9)
    ]
    rows += [{"step": s, "eval_loss": 2 / s, "eval_AP": s / 10, "seconds": s} for s in (4, 8)]
    rows.append({"step": 9, "loss": math.nan})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(
        json.dumps({"status": "finished", "steps": 8, "metrics": {"AP": 0.4321}})
    )
    (folder / "plan.json").write_text(json.dumps({"steps": 8, "groups": [{"lr": 1e-4}, {"lr": 5e-5}]}))
    (folder / "config.yaml").write_text("base: {variant: pico}\nname: <b>&amp;\n")
    (folder / "env.json").write_text(json.dumps([{"python": "3.10"}, {"python": "3.11", "gpu": None}]))
    (folder / "detection_metrics.json").write_text(json.dumps(measure(*random_set(9)).to_dict()))
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "pictures/worst.png")
    return folder


def test_a_run_is_reported_whole_in_one_file(run: Path) -> None:
    path = build_report(run)
    assert path == run / "report.html"
    page = read(path)
    assert page.headings == [
        "Result", "Training", "Detection", "Images", "More curves", "Plan", "Recipe", "Environment",
    ]  # fmt: skip
    assert page.charts == [
        "Loss", "Average precision, held-out images", "Precision over recall at IoU 0.5", "learning_rate",
    ]  # fmt: skip
    for cell in ("0.4321", "groups.1.lr", "5e-05", "3.11", *NAMES, "base: {variant: pico}\nname: <b>&amp;\n"):
        assert cell in page.cells, cell
    text = path.read_text(encoding="utf-8")
    assert "0.432<small>AP" in text
    images = [address for address in page.addresses if address.startswith("data:image/")]
    assert [base64.b64decode(image.split(",")[1]) for image in images] == [
        (run / "pictures/worst.png").read_bytes()
    ]
    assert all(address.startswith("#") for address in page.addresses if address not in images)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http" not in re.sub(r'"data:[^"]*"', "", text)


def test_charts_take_their_colours_of_text_from_the_page(run: Path) -> None:
    text = build_report(run).read_text(encoding="utf-8")
    assert "currentColor" in text
    for stand_in in ("#0a0b0c", "#0d0e0f"):
        assert stand_in not in text
    assert "prefers-color-scheme: dark" in text


def test_the_headline_says_what_was_trained_on_what_and_for_how_long(run: Path) -> None:
    overview = {"base": "deimv2_pico", "tuner": "paca", "data": "sets/bccd: 1,234 rows", "steps": "800 steps"}
    (run / "plan.json").write_text(json.dumps({"overview": {**overview, "sample": "not in it"}}))
    result = {"status": "finished", "steps": 800, "seconds": 3725.0, "metrics": {"AP": 0.5}}
    (run / "result.json").write_text(json.dumps(result))
    text = build_report(run).read_text(encoding="utf-8")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts == {
        **{key.capitalize(): value for key, value in overview.items()},
        "Status": "finished, 1:02:05 of training",
    }


def test_a_run_of_text_or_one_just_begun_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert read(build_report(tmp_path)).headings == ["Training"]
    parts = {"ag_news": {"rows": 4, "exact_match": 0.25}, "boolq": {"rows": 6, "exact_match": 0.5}}
    start = {"name": "zero-shot", "metrics": {}, "parts": {"boolq": {"exact_match": 0.125}}}
    result = {"metrics": {"exact_match": 0.35}, "parts": parts, "start": start}
    (tmp_path / "result.json").write_text(json.dumps(result))
    rows = [
        {"task": "boolq", "input": "is it?" * 99, "answer": "yes", "prediction": found}
        for found in ["yes"] * 30 + ["no"] * 3
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = read(build_report(tmp_path))
    assert page.headings == ["Result", "Training", "Predictions"]
    assert {"ag_news", "boolq", "0.25", "0.35"} <= set(page.cells)
    # Bars are sorted, the best task first, and show where they started.
    assert page.cells.index("boolq") < page.cells.index("ag_news")
    assert 'class="earlier" style="left: 12.50%"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    # Wrong answers are shown even where they are rare, and long texts are shortened.
    assert (page.cells.count("✗"), page.cells.count("✓")) == (3, 9)
    assert max(map(len, page.cells)) == 301


def test_confusions_of_many_classes_are_listed_instead_of_drawn() -> None:
    n = 300
    confusions = [Confusion(true=7, detected=9, count=4), Confusion(true=n, detected=3, count=2)]
    classes = [SimpleNamespace(name=f"class {i}") for i in range(n)]
    table = _confusion(SimpleNamespace(classes=classes, confusions=confusions, threshold=0.5))
    assert table.rows == [["class 7", "class 9", 4], ["nothing", "class 3", 2]]


def test_nothing_to_report_and_damaged_files_are_named(tmp_path: Path, capsys) -> None:
    with pytest.raises(DataError, match="holds nothing to report"):
        build_report(tmp_path)
    (tmp_path / "result.json").write_text('{"metrics": ')
    assert main(["report", str(tmp_path)]) == 1
    assert "result.json' is damaged: Expecting value" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_command_prints_the_path(run: Path, capsys) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    evil = '<script>"&'
    sections = [
        Section(
            title=evil,
            note=evil,
            parts=[
                Table(header=[evil], rows=[[evil], [math.nan]], caption=evil),
                Text(text=evil),
                Chart(
                    title=evil,
                    lines=[Line(name=n, x=[1], y=[2]) for n in ("$x^$ $\\y", evil)],
                ),
            ],
        )
    ]
    page = read(write_page(tmp_path / "report.html", evil, sections))
    assert page.headings == [evil]
    assert page.cells == [evil, "–", evil]


def test_the_worst_images_are_drawn_as_annotated_and_as_detected(tmp_path: Path) -> None:
    data = load_detection(write_coco(tmp_path / "set"))
    dataset = DetectionDataset(data.records("train"))
    evaluator = DetectionEvaluator(dataset.records, data.class_names)
    hit = detected([[0, 0, 16, 32]], [0.9], [0])
    evaluator.update(range(3), [detected([[1, 1, 20, 20]], [0.95], [0]), detected(), hit])
    metrics = evaluator.compute()
    assert metrics.images[0].index == 0
    path = save_worst_images(tmp_path / "pictures/worst.png", dataset, evaluator, metrics, n_images=2)
    picture = np.asarray(Image.open(path))
    assert picture.shape[1] == 4 * 366 + 6
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_the_gallery_holds_the_worst_median_and_best_images_once_each(tmp_path: Path) -> None:
    data = load_detection(write_coco(tmp_path / "set"))
    dataset = DetectionDataset(data.records("train"))
    evaluator = DetectionEvaluator(dataset.records, data.class_names)
    hit = detected([[0, 0, 16, 32]], [0.9], [0])
    evaluator.update(range(3), [detected([[1, 1, 20, 20]], [0.95], [0]), detected(), hit])
    metrics = evaluator.compute()
    files = save_gallery(tmp_path / "run/pictures", dataset, evaluator, metrics, n_each=1)
    assert [file.parent.name for file in files] == ["worst", "median", "best"][: len(files)]
    assert f"{dataset.records[metrics.images[0].index].path.stem}.jpg" in files[0].name
    stems = [file.stem.split("-", 1)[1] for file in files]
    assert len(stems) == len(set(stems)) >= 2
    # A later evaluation into the same folder leaves nothing of the earlier one.
    (files[0].parent / "09-earlier.jpg").write_bytes(files[0].read_bytes())
    again = save_gallery(tmp_path / "run/pictures", dataset, evaluator, metrics, n_each=1)
    assert sorted((tmp_path / "run/pictures").rglob("*.jpg")) == sorted(again) == sorted(files)
    page = read(build_report(tmp_path / "run"))
    assert page.headings == ["Images"]
    assert "Worst images" in page.charts


@pytest.mark.parametrize("module", ["jinja2", "matplotlib.figure"])
def test_a_missing_library_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"thawline\[report\]"):
        build_report(run)
