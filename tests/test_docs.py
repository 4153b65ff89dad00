"""The documentation tells the truth: its names exist, its imports are public, the quickstart runs."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

import thawline

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])
PUBLIC = {"thawline", "thawline.runtime", "thawline.tuners", "thawline.tuners.mhr"}


def python_blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [
        re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        for indent, code in re.findall(r"^( *)```python\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_imports_public_modules_only(page: Path) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert not module.startswith("thawline") or module in PUBLIC, f"{page.name}: {module}"


def test_every_public_name_is_in_the_api_reference() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^::: thawline\.(\w+)$|\{#thawline\.(\w+)\}", text, flags=re.MULTILINE)
    assert sorted(a or b for a, b in documented) == sorted(set(thawline.__all__) - {"__version__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_and_images_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_quickstart_runs(
    tmp_path: Path, tiny_llama: Path, painted_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the page as written, except for the base model and the length of the runs."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{word} ends in", "completion": word[-1], "split": split}
            for word in ("sky", "sea", "tree", "grass") for split in ("train",) * 4 + ("test",)]  # fmt: skip
    for name in ("train", "tasks/first", "tasks/second", "tasks/new_task"):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dataset").symlink_to(painted_set)
    shutil.copy(painted_set / "7.png", "photo.jpg")  # decoders look at the content, not at the name
    stand_ins = {
        "HuggingFaceTB/SmolLM2-135M": str(tiny_llama),
        '"epochs": 72': '"max_steps": 2',
        '{"variant": "atto"}': '{"variant": "atto", "size": 64}',
    }
    names: dict[str, object] = {}
    for block in python_blocks(DOCS / "quickstart.md"):
        for wanted, stand_in in stand_ins.items():
            block = block.replace(wanted, stand_in)
        exec(compile(block, "quickstart.md", "exec"), names)
    assert {path.name for path in Path("runs").iterdir()} >= {"colours", "skills", "new", "detector"}
    assert all((Path("runs") / name / "report.html").is_file() for name in ("colours", "new", "detector"))
