"""The benches' cases, made small."""

from __future__ import annotations

from dataclasses import replace

import thawline.bench.cases as cases
from thawline.bench.cases import CASES


def reference(layers: int, batch: int, length: int) -> cases.Case:
    """The reference case at its true widths, shorter and shallower."""
    return replace(
        CASES["reference"],
        build=cases._llama(hidden=512, mlp=1408, layers=layers, heads=8, kv_heads=8, vocab=512),
        batch=cases._tokens(vocab=512, batch=batch, length=length),
    )
