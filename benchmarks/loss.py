"""The chunked loss of `lean` beside the plain one: memory and time of head and loss.

    python benchmarks/loss.py --out benchmarks/results/loss.json

Peak memory is counted operation by operation on tensors without data, at 128 k words and 8 k tokens, and
measured as the resident memory of a process at sizes that a processor holds. Time is the median ratio of
paired rounds in CPU time of the process, which a busy machine disturbs least. The head is frozen, as with
every adapter, or trained: then its gradient alone, which no loss can avoid, is the `floor`. `mixed` has
float32 weights and bfloat16 products.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import study_results
from thawline.bench.harness import markdown
from thawline.measure import median_ratio, median_seconds, paired_rounds, write_results
from thawline.ops.linear_cross_entropy import linear_cross_entropy
from thawline.planning.simulate import simulate_step

LARGE = {"n_tokens": 8192, "width": 4096, "n_words": 128_000}
MEASURED = {"n_tokens": 4096, "width": 256, "n_words": 8_000}
"""Proportions of the large one, a sixteenth of its words and width; as many chunks."""


class Plain(nn.Linear):
    """A head with the loss of transformers' models, which computes it in float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(hidden).float(), _labels(hidden))


class Chunked(nn.Linear):
    """The same by `linear_cross_entropy`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.weight, _labels(hidden))


KINDS = {"plain": Plain, "chunked": Chunked}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="Paired timing rounds.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loss.json"))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # the process whose memory is measured
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        _measure(*args.measure)
        sys.exit()
    rows = []
    for dtype in ("float32", "bfloat16", "mixed"):
        for trained in (False, True):
            row: dict[str, Any] = {"dtype": dtype, "head": "trained" if trained else "frozen"}
            row["counted"] = {name: _counted_peak(name, dtype, trained) for name in KINDS}
            if dtype == "float32":  # few processors multiply bfloat16 fast
                row["resident"] = {name: _resident_peak(name, dtype, trained) for name in KINDS}
                steps = {name: partial(_step, *_head(name, dtype, trained)) for name in KINDS}
                samples = paired_rounds(steps, rounds=args.rounds, warmup=1)
                row["seconds"] = {name: median_seconds(own) for name, own in samples.items()}
                row["time_ratio"] = median_ratio(samples["chunked"], samples["plain"])
            for what in ("counted", "resident"):
                if what in row:
                    row[f"{what}_ratio"] = row[what]["chunked"] / row[what]["plain"]
                    row[f"{what}_floor"] = _gradient_bytes(what, dtype, trained) / row[what]["plain"]
            rows.append(row)
            results = study_results(__file__, rounds=args.rounds, large=LARGE, measured=MEASURED, rows=rows)
            write_results(args.out, results)
    ratios = ("counted_ratio", "counted_floor", "resident_ratio", "resident_floor", "time_ratio")
    lines = [
        [row["dtype"], row["head"], *(f"{row[key]:.3f}" if key in row else "-" for key in ratios)]
        for row in rows
    ]
    print(markdown(["type", "head", "counted peak", "floor", "resident peak", "floor", "CPU time"], lines))


def _labels(hidden: Tensor) -> Tensor:
    return torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)


def _head(name: str, dtype: str, trained: bool, sizes: dict[str, int] = MEASURED) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    head = KINDS[name](sizes["width"], sizes["n_words"], bias=False, dtype=kind).requires_grad_(trained)
    return head, torch.randn(sizes["n_tokens"], sizes["width"], dtype=kind)


def _step(head: nn.Linear, hidden: Tensor) -> None:
    hidden.grad = head.weight.grad = None
    head(hidden.requires_grad_()).backward()


def _counted_peak(name: str, dtype: str, trained: bool) -> int:
    with torch.device("meta"):
        head, hidden = _head(name, dtype, trained, LARGE)
    autocast = torch.bfloat16 if dtype == "mixed" else None
    return simulate_step(head, hidden, lambda model, x: model(x.requires_grad_()), autocast=autocast).peak


def _gradient_bytes(what: str, dtype: str, trained: bool) -> int:
    with torch.device("meta"):
        head, _ = _head("plain", dtype, trained, LARGE if what == "counted" else MEASURED)
    return head.weight.nbytes if trained else 0


def _resident_peak(name: str, dtype: str, trained: bool) -> int:
    """Return the bytes that a step adds to the resident memory of a process of its own."""
    words = [name, dtype, str(int(trained))]
    found = subprocess.run(
        [sys.executable, __file__, "--measure", *words], stdout=subprocess.PIPE, check=True
    )
    return int(json.loads(found.stdout))


def _measure(name: str, dtype: str, trained: str) -> None:
    small = {**MEASURED, "n_tokens": 2, "n_words": 8}
    _step(*_head(name, dtype, bool(int(trained)), small))  # libraries load what they need
    head, hidden = _head(name, dtype, bool(int(trained)))
    before = _highest()
    _step(head, hidden)
    print(_highest() - before)


def _highest() -> int:
    """Return the most resident memory so far; `ru_maxrss` would begin with that of the parent process."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
