"""Quantisation error that PaCA's columns lose when they start from the original checkpoint.

    python benchmarks/columns_from.py --minilm FOLDER

Two real models are quantised: the Llama of 260 thousand parameters of stories, and, where its folder is
given, the sentence encoder all-MiniLM-L6-v2 of 22 million. Measured, before any training, on texts that the
Llama writes itself and on movie reviews: how far the logits, or the sentences' embeddings, are from those of
the model that is not quantised, with all columns quantised, and with r columns of every adapted layer as they
were. Errors are relative Frobenius norms; `distance` is the mean divergence (KL, nats) of the next token's
distribution, or the embeddings' mean distance by cosine.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from harness import study_parser, study_results
from thawline import PacaConfig, select_columns
from thawline.bench.harness import markdown
from thawline.bench.quantised import engine, quantise
from thawline.files import read_jsonl
from thawline.measure import write_results

RANKS = (2, 4, 8, 16)
N_REVIEWS = 72
N_CALIBRATION = 8
"""Texts that the activations of `selection="activation"` come from."""


@dataclass
class Subject:
    """A model, and texts to run it on."""

    name: str
    folder: str
    model: nn.Module
    inputs: dict[str, Tensor]

    @property
    def calibration(self) -> dict[str, Tensor]:
        return {name: tensor[:N_CALIBRATION] for name, tensor in self.inputs.items()}

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """Return the logits of the held-out texts, or the embeddings of such sentences, in float64."""
        inputs = {name: tensor[N_CALIBRATION:] for name, tensor in self.inputs.items()}
        found = model(**inputs)
        if hasattr(found, "logits"):
            return found.logits.double()
        mask = inputs["attention_mask"][..., None].double()
        return (found.last_hidden_state.double() * mask).sum(1) / mask.sum(1)

    def distance(self, found: Tensor, expected: Tensor) -> float:
        if found.dim() == 2:
            return float(1 - nn.functional.cosine_similarity(found, expected).mean())
        ours, theirs = found.log_softmax(-1), expected.log_softmax(-1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def main() -> None:
    parser = study_parser(__doc__, "columns_from.json")
    parser.add_argument("--minilm", type=Path, help="Folder of all-MiniLM-L6-v2.")
    args = parser.parse_args()
    rows = [
        row
        for subject in subjects(args.shared, args.minilm)
        for kind in ("nf4", "int8")
        for row in measure(subject, kind)
    ]
    write_results(args.out, study_results(__file__, bench="columns_from", engine=engine(), rows=rows))
    head = ["model", "base", "columns", "r", "error", "removed", "distance, thousandths", "removed"]
    lines = [[r["model"], r["base"], r["columns"], str(r["r"]), *cells(r, rows)] for r in rows]
    sys.stdout.write(markdown(head, lines))


def subjects(shared: Path, minilm: Path | None) -> Iterator[Subject]:
    folder = str(shared / "models" / "stories260K")
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    start = torch.full((24, 1), llama.config.bos_token_id)
    texts = llama.generate(start, max_new_tokens=128, do_sample=True, pad_token_id=0)
    yield Subject("stories260K", folder, llama, {"input_ids": texts})
    if minilm is not None:
        encoder = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
        rows = read_jsonl(shared / "data" / "text" / "tasks" / "movie_polarity.jsonl")
        reviews = [row["input"] for row in rows[:N_REVIEWS]]
        tokenizer = AutoTokenizer.from_pretrained(minilm)
        inputs = tokenizer(reviews, padding=True, truncation=True, return_tensors="pt")
        yield Subject("MiniLM", str(minilm), encoder, dict(inputs))


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Return errors, and the shares of them that the columns removed."""
    first = next(one for one in rows if (one["model"], one["base"]) == (row["model"], row["base"]))
    return [
        f"{row['error']:.4f}", f"{1 - row['error'] / first['error']:.1%}",
        f"{row['distance'] * 1e3:.3f}", f"{1 - row['distance'] / first['distance']:.1%}",
    ]  # fmt: skip


def measure(subject: Subject, kind: str) -> list[dict[str, Any]]:
    """Return the errors of one way to quantise; the first row has no original columns."""
    expected = subject.outputs(subject.model)

    def row(columns: str, r: int, other: nn.Module) -> dict[str, Any]:
        found = subject.outputs(other)
        return {
            "model": subject.name, "base": kind, "columns": columns, "r": r,
            "distance": subject.distance(found, expected),
            "error": float((found - expected).norm() / expected.norm()),
        }  # fmt: skip

    base = quantise(copy.deepcopy(subject.model), kind)
    rows = [row("none", 0, base)]
    for selection in ("random", "weight_norm", "activation"):
        for r in RANKS:
            config = PacaConfig(r=r, target_modules="all-linear", selection=selection)
            if selection == "activation":
                config = select_columns(subject.model, config, [subject.calibration])
            config.columns_from = subject.folder
            rows.append(row(selection, r, get_peft_model(copy.deepcopy(base), config)))
    return rows


if __name__ == "__main__":
    main()
