"""What there is to choose from, read off the literal dicts that hold the choices, without importing them.

A choice's home (tuners/paca/selection.py, say) may need torch or PEFT, and `thawline list` must answer at
once. So its source is parsed; each key comes with one line about its value.
"""

from __future__ import annotations

__all__ = ["CHOICES", "literal_dict"]

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path

from thawline.recipe import OBJECTIVES, TUNERS


def literal_dict(file: str, name: str) -> dict[str, str]:
    """The keys of a module's literal dict, each with one line about its value.

    Args:
        file: the module, below the package ("data/text/rows.py").
        name: the dict.

    Returns: key → the value where it is text, its parts where it is a tuple of texts, and the first line of
        its docstring where it is a function or class of the same file.
    """
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    docs = {
        node.name: _first_line(ast.get_docstring(node))
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not (isinstance(target, ast.Name) and target.id == name):
            continue
        table = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(table, ast.Dict):
            keys = [str(key.value) for key in table.keys if isinstance(key, ast.Constant)]
            return {key: _about(value, docs) for key, value in zip(keys, table.values, strict=True)}
    raise LookupError(f"{file} has no literal dict {name}")


CHOICES: dict[str, Callable[[], dict[str, str]]] = {
    "tuners": lambda: {name: _first_line(kind.__doc__) for name, kind in TUNERS.items()},
    "selections": partial(literal_dict, "tuners/paca/selection.py", "SELECTIONS"),
    "objectives": lambda: {
        name: _first_line(kinds["objective"].__doc__) for name, kinds in OBJECTIVES.items()
    },
    "formats": partial(literal_dict, "data/text/rows.py", "FORMATS"),
    "metrics": partial(literal_dict, "metrics/text.py", "METRICS"),
    "sampling": partial(literal_dict, "data/text/multitask.py", "SAMPLING"),
    "routers": partial(literal_dict, "tuners/mhr/routing.py", "ROUTERS"),
}
"""Topic → its choices, name by name, with one line about each."""


def _about(value: ast.expr, docs: dict[str, str]) -> str:
    if isinstance(value, ast.Name):
        return docs.get(value.id, "")
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.Tuple):
        return ", ".join(str(part.value) for part in value.elts if isinstance(part, ast.Constant))
    return ""


def _first_line(doc: str | None) -> str:
    return doc.strip().splitlines()[0] if doc else ""
