"""Text datasets: rows of any format, their tokens, and the order in which tasks and rows are drawn."""

from __future__ import annotations

__all__ = [
    "FORMATS",
    "IGNORED",
    "Example",
    "OverlongError",
    "Split",
    "TextEncoder",
    "collate_tokens",
    "format_prompt",
    "load_examples",
    "prompt_example",
    "read_manifest",
    "split_examples",
]

from thawline.data.text.encode import IGNORED, OverlongError, TextEncoder, collate_tokens
from thawline.data.text.rows import (
    FORMATS,
    Example,
    Split,
    format_prompt,
    load_examples,
    prompt_example,
    read_manifest,
    split_examples,
)
