"""`thawline align`: JSON and pictures of a folder, read by eye and by machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import thawline
from tests.support.small_net import batches, mhr, mse, net
from thawline import MissingExtraError
from thawline.analysis import plots
from thawline.analysis.align import align
from thawline.analysis.plots import _most_different_heads, _spread, draw_routes, order_tasks
from thawline.analysis.recorder import ALIGNMENT, AlignmentRecorder
from thawline.analysis.routing import RoutingTable, read_routing, routing_statistics
from thawline.cli import main
from thawline.report.run_report import build_report


def picture_size(file: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(file) as image:
        assert len(image.convert("L").getcolors() or []) > 2, f"{file} is blank"
        return image.size


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder: the adapter in model/, alignment recorded beside it."""
    folder = tmp_path / "my-run"
    model = mhr(task_names=["red", "green", "blue"], n_tasks=None)
    model.save_pretrained(folder / "model")
    named = dict(zip(["red", "green", "blue"], batches().values(), strict=True))
    record = AlignmentRecorder(named, mse, every=2, file=folder / ALIGNMENT)
    for step in range(1, 7):
        record(model, step)
    return folder


def test_a_run_gets_json_and_three_pictures_that_its_report_shows(run, capsys):
    assert main(["align", str(run)]) == 0
    said = capsys.readouterr().out
    found = json.loads((run / "align" / "align.json").read_text())
    routing = found["routing"]
    expected = routing_statistics(read_routing(run / "model"))
    assert routing["usage"] == pytest.approx(expected["usage"])
    assert f"usage        {expected['usage']:.3f}" in said
    assert sorted(routing["order"]) == sorted(routing["tasks"]) == ["blue", "green", "red"]
    assert [row["step"] for row in found["alignment"]["my-run"]["steps"]] == [2, 4, 6]
    assert "mean of 3 measurements up to step 6" in said
    for name in ("routes", "tasks", "alignment"):
        assert min(picture_size(run / "align" / f"{name}.png")) > 100
    page = build_report(run).read_text()
    assert "Routing and alignment" in page
    assert page.count("data:image/png") == 3


def test_json_goes_to_stdout_and_the_rest_to_out(run, tmp_path, capsys):
    out = tmp_path / "elsewhere"
    assert main(["align", str(run / "model"), "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "align.json").read_text())
    assert "alignment" not in printed
    assert sorted(path.name for path in out.iterdir()) == ["align.json", "routes.png", "tasks.png"]
    assert not (run / "align").exists()


def test_runs_without_routing_are_drawn_beside(run, tmp_path, capsys):
    lora = tmp_path / "lora"
    get_peft_model(net(), LoraConfig(target_modules=["first"])).save_pretrained(lora / "model")
    (lora / ALIGNMENT).write_text((run / ALIGNMENT).read_text())
    assert main(["align", str(run), "--beside", str(lora)]) == 0
    assert "alignment of lora: mean of 3" in capsys.readouterr().out
    assert main(["align", str(lora)]) == 0
    assert sorted(path.name for path in (lora / "align").iterdir()) == ["align.json", "alignment.png"]


def test_mistakes_end_in_one_line(run, tmp_path, capsys):
    def said(*words: str) -> str:
        assert main(["align", *words]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "holds no routing: expected adapter_config.json" in said(str(tmp_path))
    assert "'nowhere' has no alignment.jsonl" in said(str(run), "--beside", "nowhere")
    get_peft_model(net(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "lora")
    assert "is a LORA adapter; only MHR and Poly route tasks" in said(str(tmp_path / "lora"))
    (run / ALIGNMENT).write_text("{]\n")
    assert "is damaged" in said(str(run))
    assert not (run / "align").exists()


def test_one_task_has_pictures_too(tmp_path):
    mhr(n_tasks=1).save_pretrained(tmp_path)
    assert main(["align", str(tmp_path)]) == 0
    assert picture_size(tmp_path / "align" / "tasks.png")


def test_order_brings_alike_tasks_together():
    rows = torch.tensor([[1, 0, 0], [0, 1, 0], [0.9, 0.1, 0], [0.1, 0.9, 0], [0, 0, 1.0]]).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    order, tree = order_tasks(rows @ rows.T)
    assert tree.shape == (4, 4)
    assert abs(order.index(0) - order.index(2)) == 1
    assert abs(order.index(1) - order.index(3)) == 1


def test_of_many_parts_and_heads_some_are_drawn(tmp_path):
    names = [f"part{i}" for i in range(40)]
    chosen = _spread(names, 12)
    assert len(chosen) == 12
    assert (chosen[0], chosen[-1]) == ("part0", "part39")
    weights = torch.full((3, 64, 8), 1 / 8)
    told = [5, 9, 20, 33, 40, 61]
    weights[0, told] = torch.eye(8)[:6].float()
    assert _most_different_heads(weights).tolist() == told
    table = RoutingTable(("a", "b", "c"), {}, dict.fromkeys(names, weights))
    width, height = picture_size(draw_routes(table, tmp_path / "routes.png"))
    assert max(width, height) < 2000


def test_pictures_name_what_tells_parts_apart_and_count_whole_steps(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure) or file)
    names = [
        f"encoder.layer.{i}.attention.{part}.dense_of_a_long_name"
        for i in (4, 5)
        for part in ("self", "output")
    ]
    weights = torch.full((3, 1, 4), 1 / 4)
    draw_routes(RoutingTable(("a", "b", "c"), {}, dict.fromkeys(names, weights)), tmp_path / "routes.png")
    titles = [axes.get_title() for axes in figures[0].axes if axes.get_title()]
    assert len(set(titles)) == len(names)
    assert titles[0].startswith("4.attention")
    row = {"coherence_if_orthogonal": 0.1} | {space: {"coherence": 0.2} for space in ("skill", "effective")}
    plots.draw_alignment({"run": [row | {"step": step} for step in (1, 2)]}, tmp_path / "alignment.png")
    assert all(tick == int(tick) for tick in figures[1].axes[0].get_xticks())


def test_parts_stand_in_the_order_of_blocks():
    from tests.support.mhr import routed
    from tests.support.models import tiny_llama

    model = routed(tiny_llama(num_hidden_layers=11), target_modules=["q_proj"])
    assert [name.split(".")[2] for name in read_routing(model).weights] == [str(i) for i in range(11)]
    assert thawline.read_routing is read_routing


@pytest.mark.parametrize(
    ("library", "what"), [("scipy.cluster.hierarchy", "scipy"), ("matplotlib.figure", "matplotlib")]
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(run, library, what, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"needs {what}: `pip install 'thawline\[analysis\]'`"):
        align(run, run / "align")
