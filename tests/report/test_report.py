"""The report: one file that holds all of a run and loads nothing."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.support.detection_files import write_coco
from tests.support.detections import NAMES, detected, measure, random_set
from thawline.cli import main
from thawline.data.detection.dataset import DetectionDataset, load_detection
from thawline.errors import DataError, MissingExtraError
from thawline.metrics.detection import DetectionEvaluator
from thawline.report.page import Chart, Line, Section, Table, Text, write_page
from thawline.report.pictures import save_worst_images
from thawline.report.run_report import build_report


class Page(HTMLParser):
    """A page's headings, table cells, and every address it refers to; unclosed tags are counted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "pre"):
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
        "Result", "Curves", "Detection", "Pictures", "Plan", "Recipe", "Environment",
    ]  # fmt: skip
    for cell in ("0.4321", "groups.1.lr", "5e-05", "3.11", *NAMES, "base: {variant: pico}\nname: <b>&amp;\n"):
        assert cell in page.cells, cell
    # Three curves (loss with its evaluation, rate, AP), precision-recall, confusions; one picture.
    images = [address for address in page.addresses if address.startswith("data:image/")]
    assert len(images) == 3 + 2 + 1
    assert [one for one in page.addresses if one not in images] == [f"#s{i}" for i in range(1, 8)]
    assert "http" not in re.sub(r'"data:[^"]*"', "", path.read_text(encoding="utf-8"))


def test_charts_are_svg_without_references_and_pictures_the_files_own_bytes(run: Path) -> None:
    page = read(build_report(run))
    svgs = [base64.b64decode(a.split(",")[1]) for a in page.addresses if a.startswith("data:image/svg")]
    for svg in svgs:
        for node in ElementTree.fromstring(svg).iter():
            assert all(v.startswith(("#", "data:")) for k, v in node.attrib.items() if k.endswith("href"))
    [picture] = [a for a in page.addresses if a.startswith("data:image/png")]
    assert base64.b64decode(picture.split(",")[1]) == (run / "pictures/worst.png").read_bytes()


def test_a_run_of_text_or_one_just_begun_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert read(build_report(tmp_path)).headings == ["Curves"]
    parts = {"ag_news": {"rows": 4, "exact_match": 0.5}, "boolq": {"rows": 6, "exact_match": 0.25}}
    result = {"metrics": {"exact_match": 0.35}, "parts": parts}
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = read(build_report(tmp_path))
    assert page.headings == ["Result", "Curves"]
    assert {"ag_news", "boolq", "0.25", "0.35"} <= set(page.cells)


def test_nothing_to_report_and_damaged_files_are_named(tmp_path: Path, capsys) -> None:
    with pytest.raises(DataError, match="holds nothing to report"):
        build_report(tmp_path)
    (tmp_path / "result.json").write_text('{"metrics": ')
    assert main(["report", str(tmp_path)]) == 1
    assert "is damaged: JSONDecodeError" in capsys.readouterr().err
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


@pytest.mark.parametrize("module", ["jinja2", "matplotlib.figure"])
def test_a_missing_library_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"thawline\[report\]"):
        build_report(run)
