"""Quantisation error that PaCA's columns lose when they start from the original checkpoint.

    python benchmarks/columns_from.py

A real model, the Llama of 260 thousand parameters of stories, is quantised. Measured, before any training, on
texts that it writes itself: how far the logits are from those of the model that is not quantised, with all
columns quantised, and with r columns of every adapted layer as they were. Errors are relative Frobenius
norms; `kl` is the mean divergence of the next token's distribution, in millinats.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from harness import study_parser, study_results
from thawline import PacaConfig, select_columns
from thawline.bench.harness import markdown
from thawline.bench.quantised import engine, quantise
from thawline.measure import write_results

RANKS = (2, 4, 8, 16)


def main() -> None:
    args = study_parser(__doc__, "columns_from.json").parse_args()
    folder = str(args.shared / "models" / "stories260K")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    start = torch.full((24, 1), model.config.bos_token_id)
    texts = model.generate(start, max_new_tokens=128, do_sample=True, pad_token_id=0)
    rows = [row for kind in ("nf4", "int8") for row in measure(model, texts, folder, kind)]
    write_results(args.out, study_results(__file__, bench="columns_from", engine=engine(), rows=rows))
    head = ["base", "columns", "r", "logits' error", "removed", "kl", "removed"]
    lines = [[r["base"], r["columns"], str(r["r"]), *cells(r, rows)] for r in rows]
    sys.stdout.write(markdown(head, lines))


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Return errors, and the shares of them that the columns removed."""
    first = next(other for other in rows if other["base"] == row["base"])
    return [
        f"{row['error']:.4f}", f"{1 - row['error'] / first['error']:.1%}",
        f"{row['kl'] * 1e3:.3f}", f"{1 - row['kl'] / first['kl']:.1%}",
    ]  # fmt: skip


def measure(model: nn.Module, texts: Tensor, folder: str, kind: str) -> list[dict[str, Any]]:
    """Return the errors of one way to quantise; the first row has no original columns."""
    calibration, held_out = {"input_ids": texts[:8]}, texts[8:]
    expected = logits(model, held_out)

    def row(columns: str, r: int, other: nn.Module) -> dict[str, Any]:
        found = logits(other, held_out)
        ours, theirs = found.log_softmax(-1), expected.log_softmax(-1)
        kl = theirs.exp() * (theirs - ours)
        return {
            "base": kind, "columns": columns, "r": r, "kl": float(kl.sum(-1).mean()),
            "error": float((found - expected).norm() / expected.norm()),
        }  # fmt: skip

    base = quantise(copy.deepcopy(model), kind)
    rows = [row("none", 0, base)]
    for selection in ("random", "weight_norm", "activation"):
        for r in RANKS:
            config = PacaConfig(r=r, target_modules="all-linear", selection=selection)
            if selection == "activation":
                config = select_columns(model, config, [calibration])
            config.columns_from = folder
            rows.append(row(selection, r, get_peft_model(copy.deepcopy(base), config)))
    return rows


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits.double()


if __name__ == "__main__":
    main()
