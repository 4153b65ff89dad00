"""Run the benches and studies of benchmarks/gpu.sh, made small, as if some packages were not installed.

python bare_benches.py tuners,vision scipy,PIL
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from dataclasses import replace
from typing import Any

# What thawline's other parts use, and no bench of gpu.sh may.
ABSENT = {
    "bitsandbytes", "cv2", "datasets", "faster_coco_eval", "matplotlib", "onnx",
    "onnxruntime", "pandas", "pyarrow", "pycocotools", "rouge_score", "supervision", "timm",
    "torchvision", "trl",
}  # fmt: skip


class PathFinderWithout:
    """Python's own finder, for which some packages do not exist."""

    def __init__(self, absent: set[str]) -> None:
        self.absent = absent

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.absent:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.machinery.PathFinder, name)


def run_tuners() -> None:
    from thawline.bench import cases, tuners

    llama = cases._llama(hidden=16, mlp=24, layers=1, heads=2, kv_heads=1, vocab=29)
    batch = cases._tokens(vocab=29, batch=8, length=4)
    for name in ("reference", "skills-small"):
        cases.CASES[name] = replace(cases.CASES[name], build=llama, batch=batch)
    flags = [
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--variants",
        "floor",
        "lora_dropout",
        "paca_lean",
        "poly",
        "mhr",
    ]
    assert tuners.main([*flags, "--case", "reference", "skills-small"]) == 0


def run_vision() -> None:
    import vision

    vision.N_TRAIN, vision.N_VALIDATION, vision.N_TEST, vision.RATES = 32, 16, 16, (1e-3,)
    flags = ["--network", "convnet", "--seeds", "1", "--pretrain-steps", "2", "--adapt-steps", "2"]
    assert vision.main([*flags, "--device", "cpu"]) == 0


def run_detector() -> None:
    from thawline.bench import detector

    whole = detector.measure_size
    detector.measure_size = lambda size, **settings: whole(size, **settings, resolution=(192, 256))
    assert detector.main(["--rounds", "1", "--device", "cpu", "--threads", "1"]) == 0


def run_train_step() -> None:
    from thawline.bench import train_step

    flags = ["--variants", "atto", "--size", "160", "--batch_size", "1", "--rounds", "1", "--threads", "1"]
    assert train_step.main([*flags, "--device", "cpu"]) == 0


def run_backbone() -> None:
    import backbone

    flags = ["--variant", "atto", "--size", "64", "--batch_size", "1", "--rounds", "1", "--threads", "1"]
    assert backbone.main([*flags, "--device", "cpu"]) == 0


if __name__ == "__main__":
    _, benches, absent = sys.argv
    finder = PathFinderWithout(ABSENT | set(filter(None, absent.split(","))))
    sys.meta_path = [finder if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
    for bench in benches.split(","):
        globals()[f"run_{bench}"]()
    found = finder.absent & {name.partition(".")[0] for name in sys.modules}
    assert not found, f"imported past the finder: {found}"
