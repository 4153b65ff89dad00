"""The house: imports point downwards, siblings never meet, and each outside library has its doors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "thawline"
FLOOR = {
    "errors": -3, "coco": -3, "files": -2, "tables": -1, "measure": -1, "sessions": -1,  # used on every floor
    "recipe": 0, "ops": 0,
    "tuners": 1, "models": 1, "data": 1, "metrics": 1,
    "domains": 2,
    "training": 3, "analysis": 3, "exporters": 3, "inference": 3, "report": 3,
    "run_folder": 4, "planning": 4, "runtime": 4, "service": 4, "web": 4,
    "run": 5, "bench": 5,
    "jobs": 6, "demo": 6,
    "cli": 7,
}  # fmt: skip
DOORS = {
    "peft": ("tuners", "bench"),  # bench: PEFT's own tuners, measured as its users make them
    # tuners: the Conv1D layer; analysis: a callback of Trainer's
    "transformers": ("training", "run", "data/text", "bench", "tuners", "demo", "analysis/recorder"),
    "faster_coco_eval": ("metrics", "data"),
    "supervision": ("data", "metrics", "inference", "report"),
    "cv2": ("data", "inference", "report"),
    "onnx": ("exporters", "sessions"),
    "onnxruntime": ("exporters", "sessions"),
    "openvino": ("exporters", "sessions"),
    "executorch": ("exporters", "sessions"),
    "bitsandbytes": ("training/text/pretrained", "bench"),
    "matplotlib": ("report", "analysis"),
    **dict.fromkeys(("litserve", "fastapi", "starlette", "uvicorn"), ("service",)),
    "scipy": ("analysis", "models/deimv2/loss/matcher"),
}
FILES = sorted(SRC.rglob("*.py"))


def imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            base = node.module or ""
            # `from thawline import x` names a room; `from thawline.ops import x` is in one.
            names += [f"{base}.{alias.name}" for alias in node.names] if base == "thawline" else [base]
    return names


def room(path: Path) -> str:
    relative = path.relative_to(SRC)
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_downwards(path: Path) -> None:
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    assert here in FLOOR, f"'{here}' has no floor: give it one in FLOOR and in docs/architecture.md"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "thawline" or len(parts) == 1:
            continue
        there = parts[1]
        if there in ("__version__", here):
            continue
        assert there in FLOOR, f"{path}: imports {name} through the face; name its home"
        assert FLOOR[there] < FLOOR[here], (
            f"{path}: {here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_outside_libraries_come_in_by_their_doors(path: Path) -> None:
    where = path.relative_to(SRC).with_suffix("").as_posix()
    for name in imports(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or where.startswith(doors), f"{where} imports {name}; only {doors} may"
