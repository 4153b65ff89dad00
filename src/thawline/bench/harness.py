"""Options, results and tables that the benches share."""

from __future__ import annotations

__all__ = ["bench_parser", "bench_results", "markdown", "use_device"]

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from thawline.measure import machine_stamp


def bench_parser(
    name: str, description: str, *, rounds: int = 10, threads: int = 2, on_device: bool = True
) -> argparse.ArgumentParser:
    """Build a parser with the options of every bench: --rounds, --threads, --device, --out.

    Args:
        name: of the command line, after `thawline bench`.
        rounds: default number of paired rounds.
        threads: default number of CPU threads.
        on_device: False: without --threads and --device.
    """
    parser = argparse.ArgumentParser(prog=f"thawline bench {name}", description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="Paired timing rounds.")
    if on_device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--threads", type=int, default=threads, help="CPU threads.")
        parser.add_argument(
            "--device", choices=("cpu", "cuda"), default=default, help="Default: %(default)s."
        )
    parser.add_argument("--out", type=Path, help="Write the results to this JSON file.")
    return parser


def use_device(options: argparse.Namespace) -> torch.device:
    """Set the number of threads and return the device that the options ask for."""
    torch.set_num_threads(options.threads)
    return torch.device(options.device)


def bench_results(bench: str, command: str, device: torch.device, **fields: Any) -> dict[str, Any]:
    """Start the results of a bench with its command, the machine and the device."""
    stamp = {"bench": bench, "command": command, "machine": machine_stamp(), "device": device.type}
    return stamp | fields


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format text cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
