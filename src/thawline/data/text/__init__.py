"""Text datasets: rows of any format, their tokens, and which task and row comes when."""

from __future__ import annotations

__all__ = [
    "Example",
    "FORMATS",
    "IGNORED",
    "Split",
    "TextEncoder",
    "collate_tokens",
    "format_prompt",
    "load_examples",
    "prompt_example",
    "read_manifest",
    "split_examples",
]

from thawline.data.text.rows import (
    FORMATS,
    IGNORED,
    Example,
    Split,
    TextEncoder,
    collate_tokens,
    format_prompt,
    load_examples,
    prompt_example,
    read_manifest,
    split_examples,
)
