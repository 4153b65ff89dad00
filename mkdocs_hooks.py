"""API pages: `::: thawline.NAME` becomes a heading and the docstring of what the name stands for.

The face loads its names lazily, so a tool that only reads source files cannot follow them.
"""

from __future__ import annotations

import re
from typing import Any

import thawline


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace every `::: thawline.NAME` of a page by the name's definition."""
    return re.sub(r"^::: thawline\.(\w+)$", _definition, markdown, flags=re.MULTILINE)


def _definition(match: re.Match[str]) -> str:
    name = match[1]
    value = getattr(thawline, name)
    return f"## {name} {{#thawline.{name}}}\n\n::: {value.__module__}.{value.__qualname__}\n"
