"""Accuracy after adapting a small vision network to another domain: head alone, full, LoRA, PaCA.

    python benchmarks/vision.py --out benchmarks/results/vision.json

Each network is trained on the source domain of `flowers`, then adapted, with a new head, to a
few images of the target domain. Every method gets the same steps, and the same learning rates to choose from
by validation images; the test accuracy reported is that of the chosen rate. PaCA's paper adapts vision models
too; these images are generated, so the numbers are not comparable with its.
"""

from __future__ import annotations

__all__ = ["main", "measure_network"]

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowers import draw_flowers
from harness import study_results
from thawline.bench.cases import CASES
from thawline.bench.harness import bench_parser, markdown, use_device
from thawline.bench.methods import attach
from thawline.measure import write_results

NETWORKS = ("vit", "convnet")
METHODS = {"head": "floor", "full": "full", "lora": "lora", "paca": "paca"}
"""Name in the table → method of `thawline.bench.methods`."""
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BATCH = 32
N_TRAIN, N_VALIDATION, N_TEST = 384, 1000, 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    args = _parser().parse_args(argv)
    device = use_device(args)
    results = study_results(__file__, bench="vision", device=device.type, networks={})
    for name in args.network:
        measured = measure_network(
            name,
            device=device,
            n_seeds=args.seeds,
            pretrain_steps=args.pretrain_steps,
            adapt_steps=args.adapt_steps,
        )
        results["networks"][name] = measured
        sys.stdout.write(f"\n{_table(name, measured)}\n")
        sys.stdout.flush()
        write_results(args.out, results)
    return 0


def measure_network(
    name: str, *, device: torch.device, n_seeds: int, pretrain_steps: int, adapt_steps: int
) -> dict[str, Any]:
    """Pretrain one network, adapt it by every method, and compare.

    Args:
        name: of `NETWORKS`.
        n_seeds: target training sets, and initialisations of head and adapters.
    Returns: a JSON-ready record; accuracies in 0 … 1.
    """
    source = _draw(pretrain_steps * BATCH, seed=0, device=device)
    torch.manual_seed(0)
    pretrained = CASES[name].build().to(device)
    _train(pretrained, source, steps=pretrain_steps, lr=1e-3)
    validation = _draw(N_VALIDATION, seed=1, device=device, target=True)
    test = _draw(N_TEST, seed=2, device=device, target=True)
    record: dict[str, Any] = {
        "source_accuracy": _accuracy(pretrained, _draw(N_TEST, seed=3, device=device)),
        "n_train": N_TRAIN,
        "pretrain_steps": pretrain_steps,
        "adapt_steps": adapt_steps,
        "rates": RATES,
        "methods": {},
    }
    for method, variant in METHODS.items():
        record["methods"][method] = _compare_rates(
            name, variant, pretrained, validation, test, n_seeds=n_seeds, steps=adapt_steps
        )
    return record


def _compare_rates(
    name: str,
    variant: str,
    pretrained: nn.Module,
    validation: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    n_seeds: int,
    steps: int,
) -> dict[str, Any]:
    """Adapt with every rate and seed; report the test accuracy of the rate that validates best."""
    adapt = replace(CASES[name].adapt, head="head")
    found: dict[float, list[tuple[float, float]]] = {}
    trainable = 0
    for lr in RATES:
        found[lr] = []
        for seed in range(n_seeds):
            torch.manual_seed(seed)
            base = copy.deepcopy(pretrained)
            base.get_submodule("head").reset_parameters()
            model = attach(variant, base, adapt)
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            few = _draw(N_TRAIN, seed=10 + seed, device=test[1].device, target=True)
            _train(model, few, steps=steps, lr=lr)
            found[lr].append((_accuracy(model, validation), _accuracy(model, test)))
    best = max(RATES, key=lambda lr: statistics.mean(v for v, _ in found[lr]))
    tests = [t for _, t in found[best]]
    return {
        "trainable": trainable,
        "lr": best,
        "validation_by_rate": {f"{lr:g}": statistics.mean(v for v, _ in found[lr]) for lr in RATES},
        "test": tests,
        "test_mean": statistics.mean(tests),
        "test_sd": statistics.stdev(tests) if len(tests) > 1 else 0.0,
    }


def _draw(n: int, *, seed: int, device: torch.device, target: bool = False) -> tuple[Tensor, Tensor]:
    images, labels = draw_flowers(n, torch.Generator().manual_seed(seed), target=target)
    return images.to(device), labels.to(device)


def _train(model: nn.Module, data: tuple[Tensor, Tensor], *, steps: int, lr: float) -> None:
    """Plain AdamW over shuffled batches, one cycle of a cosine after a short warm-up."""
    images, labels = data
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(labels))])
        batch, order = order[:BATCH].to(labels.device), order[BATCH:]
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    model.eval()
    images, labels = data
    predicted = torch.cat([model(part).argmax(-1) for part in images.split(256)])
    return float((predicted == labels).float().mean())


def _table(name: str, record: dict[str, Any]) -> str:
    rows = [
        [method, str(row["trainable"]), f"{row['lr']:g}", f"{row['test_mean']:.3f} ± {row['test_sd']:.3f}"]
        for method, row in record["methods"].items()
    ]
    table = markdown(["method", "trained", "learning rate", "test accuracy"], rows)
    return f"{name}: {record['source_accuracy']:.3f} on its source domain\n{table}"


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser("vision", "Accuracy of vision networks adapted to another domain.", threads=1)
    parser.prog = "vision.py"
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--adapt-steps", type=int, default=150)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
