"""Cost of several domains on one detector: memory, switching, batches of several domains.

    thawline bench domains --size atto n s --out benchmarks/results/domains.json

Domains are PaCA adapters of `--r` columns on every layer, with random values: cost does not depend on them.
All calls are fused and take images as bytes, in the detector's size; preparation and post-processing count.

    tensor bytes   of the base and all domains ÷ the base's
    RSS            of a process that has answered with all domains ÷ one with a plain detector
    switch         a call of a domain after one of another, less one after the same
    mixed          a batch of four domains ÷ a batch of one
"""

from __future__ import annotations

__all__ = ["main", "measure_size"]

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thawline.bench.harness import bench_parser, bench_results, markdown, use_device
from thawline.domains.attach import attach_domain, is_class_layer
from thawline.domains.domain import Domain, base_digest, save_domain
from thawline.domains.folder import SharedFolder
from thawline.inference.detector import Detector
from thawline.inference.shared import SharedDetector
from thawline.measure import write_results
from thawline.models.deimv2 import VARIANTS, DEIMv2
from thawline.recipe import Paca

N_MIXED = 4
"""Images, and domains, of the mixed batch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    parser = bench_parser("domains", __doc__.partition("\n")[0], rounds=20)
    parser.add_argument("--size", nargs="+", choices=list(VARIANTS), default=["atto"], help="Default: atto.")
    parser.add_argument("--domains", type=int, default=10, help="Number of domains. Default: 10.")
    parser.add_argument("--r", type=int, default=3, help="Columns of each layer. Default: 3.")
    parser.add_argument("--rss", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = use_device(args)
    if args.rss is not None:
        sys.stdout.write(f"{_resident_bytes(Path(args.rss), device)}\n")
        return 0
    command = (
        f"thawline bench domains --size {' '.join(args.size)} --domains {args.domains} --r {args.r} "
        f"--rounds {args.rounds} --threads {args.threads}"
    )
    results = bench_results("domains", command, device, rounds=args.rounds, r=args.r, sizes={})
    for size in args.size:
        results["sizes"][size] = measure_size(
            size, n_domains=args.domains, r=args.r, rounds=args.rounds, device=device
        )
        write_results(args.out, results)
    sys.stdout.write(f"{_table(results['sizes'])}\n")
    return 0


def measure_size(size: str, *, n_domains: int, r: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure one size; return a JSON-ready record of bytes, milliseconds and ratios (medians of rounds)."""
    with tempfile.TemporaryDirectory() as folder:
        plain, shop = Path(folder) / "plain", Path(folder) / "shop"
        _write_domains(size, plain, shop, n_domains, r)
        rss = {name: _rss_of(path, device) for name, path in (("plain", plain), ("shared", shop))}
        shared = SharedDetector.from_pretrained(shop, device=device)
    names = shared.domains
    base = sum(tensor.nbytes for tensor in shared._network.model.state_dict().values())
    added = [shared.nbytes(name) for name in names]
    image = np.zeros((*shared._network.config.image_size, 3), np.uint8)
    batch, mixed = [image] * N_MIXED, [names[i % len(names)] for i in range(N_MIXED)]
    samples: dict[str, list[float]] = {"same": [], "switched": [], "switch": [], "one": [], "mixed": []}
    for index in range(rounds + 1):
        first, other = names[index % len(names)], names[(index + 1) % len(names)]
        shared(image, domain=first)
        same = _seconds(shared, image, first)
        shared(image, domain=other)
        switched = _seconds(shared, image, first)
        one = _seconds(shared, batch, [mixed[0]] * N_MIXED)
        several = _seconds(shared, batch, mixed)
        if index:  # the first round warms up
            for name, value in zip(samples, (same, switched, switched - same, one, several), strict=True):
                samples[name].append(value)
    ratios = [several / one for several, one in zip(samples["mixed"], samples["one"], strict=True)]
    return {
        "domains": len(names),
        "base_bytes": base,
        "domain_bytes": round(statistics.mean(added)),
        "of_base": statistics.mean(added) / base,
        "tensor_ratio": (base + sum(added)) / base,
        "rss_ratio": rss["shared"] / rss["plain"],
        "call_ms": 1000 * statistics.median(samples["same"]),
        "switch_ms": 1000 * statistics.median(samples["switch"]),
        "mixed_ratio": statistics.median(ratios),
        "mixed_ms": 1000 * statistics.median(samples["mixed"]),
    }


def _write_domains(size: str, plain: Path, shop: Path, n_domains: int, r: int) -> None:
    base = DEIMv2.from_variant(size, class_names=("first", "second")).eval()
    base.save_pretrained(plain)
    SharedFolder.create(shop, base)
    digest = base_digest(base)
    shared = {name: tensor for name, tensor in base.state_dict().items() if not is_class_layer(name)}
    for index in range(n_domains):
        model = DEIMv2.from_variant(size, class_names=("a", "b", "c"))
        model.load_state_dict(shared, strict=False)
        attach_domain(model.eval(), Paca(r=r, seed=index))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for name, parameter in trained:
                if not is_class_layer(name):
                    parameter.normal_(std=0.01)
        about = Domain(
            name=f"domain{index}", class_names=("a", "b", "c"), threshold=0.4, base=digest, base_label=size,
            image_size=base.config.image_size, tuner="paca", parameters=sum(p.numel() for _, p in trained),
        )  # fmt: skip
        save_domain(model, about, shop / "domains" / about.name)


def _seconds(shared: SharedDetector, source: Any, domain: Any) -> float:
    start = time.perf_counter()
    shared(source, domain=domain)
    return time.perf_counter() - start


def _rss_of(path: Path, device: torch.device) -> int:
    """Return the resident memory of a process of its own that has answered, bytes."""
    words = ["-m", "thawline.bench.domains", "--rss", str(path), "--device", device.type]
    threads = ["--threads", str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, *words, *threads], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _resident_bytes(path: Path, device: torch.device) -> int:
    detector: Any
    if (path / "base").is_dir():
        detector = SharedDetector.from_pretrained(path, device=device)
        names: Sequence[str | None] = detector.domains
    else:
        detector, names = Detector.from_pretrained(path, device=device), [None]
    image = np.zeros((640, 640, 3), np.uint8)
    for _ in range(2):
        for name in names:
            detector(image, **({} if name is None else {"domain": name}))
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _table(sizes: dict[str, Any]) -> str:
    head = ["size", "domain, kB", "of base", "all tensors", "RSS", "call, ms", "switch, ms", "mixed ÷ one"]
    rows = []
    for size, row in sizes.items():
        memory = [
            f"{row['domain_bytes'] / 1000:.0f}",
            f"{row['of_base']:.1%}",
            f"× {row['tensor_ratio']:.2f}",
        ]
        times = [f"{row['call_ms']:.1f}", f"{row['switch_ms']:.2f}", f"{row['mixed_ratio']:.2f}"]
        rows.append([size, *memory, f"× {row['rss_ratio']:.2f}", *times])
    return markdown(head, rows)


if __name__ == "__main__":
    sys.exit(main())
