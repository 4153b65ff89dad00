"""Packed rows beside padded ones, and beside TRL's packing, on real rows.

    python benchmarks/packing.py --shared ../shared --out benchmarks/results/packing.json

Rows are of the text tasks of ../shared/data/text, with the tokenizer of stories260K. The model is a Llama of
random weights (width 128, three blocks) with PaCA. Padded batches hold rows in random order, each padded to
the longest of its batch, as a run pads them; two mixtures of tasks are chosen whose batches are padding by
about a half and by about three quarters. Packed batches, ours and TRL's (`SFTTrainer(packing=True)`, whose
collator makes one sequence of a batch), hold as many tokens as the padded ones.

A round takes one pass over the same rows in each way, training steps included, one after the other; the
clock is the CPU time of the process, which a busy machine disturbs least. TRL's batches run in the same
loop, so that its trainer's own work does not count.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from harness import study_parser, study_results
from thawline.bench.harness import markdown
from thawline.measure import median_ratio, median_seconds, paired_rounds, write_results
from thawline.recipe import RunConfig
from thawline.training.text.objective import TextObjective
from thawline.tuners.build import attach_tuner

MIXTURES = {"half": ("t0_*",), "three quarters": ("nlu_*", "t0_*")}
N_ROWS, BATCH, LENGTH = 96, 16, 512


def main() -> None:
    parser = study_parser(__doc__, "packing.json")
    parser.add_argument("--rounds", type=int, default=5, help="Paired timing rounds.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [_compare(name, args.shared, args.rounds) for name in MIXTURES]
    write_results(args.out, study_results(__file__, rounds=args.rounds, rows=rows))
    lines = [
        [
            f"{row['padding']:.0%}",
            *(
                f"{row[name]['rows_per_second'] / row['padded']['rows_per_second']:.2f}"
                for name in ("packed", "trl")
            ),
            *(f"{row[name]['rows_per_second']:.1f}" for name in ("padded", "packed", "trl")),
        ]
        for row in rows
    ]
    head = ["padding", "packed, × rows/s", "TRL, × rows/s", "padded rows/s", "packed", "TRL"]
    print(markdown(head, lines))


def _compare(mixture: str, shared: Path, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        _save_base(Path(folder), shared / "models/stories260K")
        data = {
            "path": str(shared / "data/text/tasks"), "tasks": list(MIXTURES[mixture]), "max_rows": N_ROWS,
            "max_length": LENGTH,
        }  # fmt: skip
        recipe = {
            "base": folder,
            "data": data,
            "objective": {"loss_on": "all"},
            "training": {"batch_size": BATCH},
        }
        objectives = {
            name: TextObjective(
                RunConfig.from_mapping({**recipe, "data": {**data, "packing": packing}}), described={}
            )
            for name, packing in (("padded", False), ("packed", True))
        }
        padded = _padded_batches(objectives["padded"])
        n_tokens = sum(batch["input_ids"].numel() for batch in padded)
        n_real = sum(int(batch["attention_mask"].sum()) for batch in padded)
        per_batch = max(1, n_tokens // len(padded) // LENGTH)
        batches: dict[str, list[Mapping[str, Any]]] = {
            "padded": padded,
            "packed": [
                objectives["packed"].collate(objectives["packed"].train_rows[i : i + per_batch])
                for i in range(0, len(objectives["packed"].train_rows), per_batch)
            ],
            "trl": _trl_batches(objectives["padded"], folder, per_batch),
        }
        passes = {name: _pass(folder, own) for name, own in batches.items()}
        samples = paired_rounds(passes, rounds=rounds, warmup=1)
    row: dict[str, Any] = {
        "mixture": mixture,
        "padding": 1 - n_real / n_tokens,
        "tokens": n_real,
        "rows": N_ROWS,
    }
    for name, own in samples.items():
        seconds = median_seconds(own)
        n_all = sum(batch["input_ids"].numel() for batch in batches[name])
        row[name] = {
            "rows_per_second": N_ROWS / seconds,
            "tokens_per_second": n_real / seconds,
            "speed_of_padded": 1 / median_ratio(own, samples["padded"]),
            "padding": 1 - n_real / n_all,
            "steps": len(batches[name]),
        }
    return row


def _save_base(folder: Path, tokenizer: Path) -> None:
    found = AutoTokenizer.from_pretrained(tokenizer)
    found.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(found), hidden_size=128, intermediate_size=448, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        pad_token_id=found.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def _padded_batches(objective: TextObjective) -> list[Mapping[str, Any]]:
    rows = random.Random(0).sample(list(objective.train_rows), len(objective.train_rows))
    return [objective.collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


def _trl_batches(objective: TextObjective, folder: str, per_batch: int) -> list[Mapping[str, Any]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in objective.train_rows])
    config = SFTConfig(
        output_dir=folder, packing=True, max_length=LENGTH, per_device_train_batch_size=per_batch,
        use_cpu=True, report_to="none",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM.from_pretrained(folder)
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=objective.processor)
        return [dict(batch) for batch in trainer.get_train_dataloader()]


def _pass(folder: str, batches: Iterable[Mapping[str, Any]]) -> Callable[[], None]:
    """Return a call that takes a training step on each batch."""
    config = RunConfig.from_mapping({"base": folder, "data": "none", "tuner": {"method": "paca", "r": 16}})
    model = attach_tuner(LlamaForCausalLM.from_pretrained(folder), config.tuner).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    return partial(_train, model, optimizer, list(batches))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Mapping[str, Any]]) -> None:
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
