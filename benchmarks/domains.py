"""Domains of one frozen detector beside fine-tuned ones: AP for equal images seen, and what is forgotten.

    python benchmarks/domains.py --base runs/base --keep runs/domains --data shapes bccd --epochs 8 --forget

One run: a tuner on a set ("shapes" is generated, the others are those of data/detection), from the base or,
as `scratch`, from random weights; --images training images, one thread, fp32, the derived schedule.

    paca, lora    a domain: an adapter on every layer, and class heads        heads    class heads alone
    full          the whole detector, fine-tuned from the base                scratch  from random weights
    pacaR         r = R instead of 3                 plain  before an arm: no strong augmentation
    adjacent, activation, gradient                   paca with columns chosen so
    @F            after an arm: F times the derived learning rate

With --forget, the `paca` domains are added one after the other to a shared folder, and every domain is
evaluated again after each; beside it one detector is fine-tuned on the same sets in turn, with all classes.

Rows are appended to <out>.rows.jsonl as they come, so that a stopped study resumes.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import Rows, study_parser, study_results
from thawline.files import write_json
from thawline.measure import write_results

SIZE = 320
N_VAL = 48
"""Held-out images of the generated set."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    data: str
    arm: str
    epochs: int
    seed: int = 0
    n_images: int = 96


def main() -> None:
    parser = study_parser(__doc__, "domains-study.json")
    parser.add_argument("--base", type=Path, required=True, help="Trained detector.")
    parser.add_argument("--keep", type=Path, required=True, help="Folder for runs and the shared folder.")
    parser.add_argument("--data", nargs="+", default=["shapes"], help="Sets.")
    parser.add_argument("--arms", nargs="*", default=["paca", "lora", "heads", "full"])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=96, help="Training images of a set.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--forget", action="store_true", help="Add the domains one by one; fine-tune in turn."
    )
    args = parser.parse_args()
    sets = {name: prepare(name, args.shared, args.keep / "sets") for name in args.data}
    rows = Rows(args.out, Job)
    jobs = [
        Job(data, arm, args.epochs, seed, args.images)
        for seed in args.seeds
        for data in args.data
        for arm in args.arms
    ]
    call = partial(train_one, base=args.base, keep=args.keep, sets=sets)
    rows.run(call, jobs, workers=args.workers, jobs_per_process=1)
    found: dict[str, Any] = {"table": summarise(rows.done)}
    if args.forget:
        found["domains"] = add_in_turn(args.keep, args.base, args.data, args.epochs)
        found["fine_tuning"] = fine_tune_in_turn(args, sets)
    write_results(args.out, study_results("domains.py", **found))


def prepare(name: str, shared: Path, folder: Path) -> Path:
    """Return the folder of a set; the generated one is written once."""
    if name != "shapes":
        return shared / "data" / "detection" / name
    from thawline.demo.toy_images import write_shapes

    if not (folder / name).is_dir():
        write_shapes(folder / name, 2 * N_VAL, N_VAL)
    return folder / name


def recipe(
    job: Job, base: str | None, path: Path, folder: Path, name: str, domain: str | None
) -> dict[str, Any]:
    arm, _, factor = job.arm.removeprefix("plain-").partition("@")
    kind, r = re.fullmatch(r"([a-z]+)(\d*)", arm).groups()  # type: ignore[union-attr]
    tuners: dict[str, Any] = {
        "paca": {"method": "paca", "r": int(r or 3)}, "lora": {"method": "lora", "r": int(r or 3)},
        "heads": "frozen", "full": "none", "scratch": "none",
    }  # fmt: skip
    for selection in ("adjacent", "activation", "gradient"):
        tuners[selection] = {"method": "paca", "r": int(r or 3), "selection": selection}
    return {
        "objective": {"kind": "detection", "strong_augmentation": False if "plain-" in job.arm else None},
        "base": {"variant": "atto", "size": SIZE, "weights": base},
        "tuner": tuners[kind],
        "domain": domain,
        "data": {"path": str(path), "format": "coco", "max_images": job.n_images},
        "training": {
            "epochs": job.epochs, "save_every": "end", "eval_every": "end", "workers": 0, "precision": "fp32",
            "log_every": 10_000, "args": {"disable_tqdm": True},
        },
        "folder": str(folder), "name": name, "seed": job.seed,
    } | ({"rate_factor": float(factor)} if factor else {})  # fmt: skip


def train_one(job: Job, base: Path, keep: Path, sets: dict[str, Path]) -> dict[str, Any]:
    """Train and evaluate once; the run's folder is kept."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    name = f"{job.data}-{job.arm}-{job.epochs}-{job.seed}"
    shutil.rmtree(keep / "runs" / name, ignore_errors=True)
    kind = job.arm.removeprefix("plain-")
    is_domain = not kind.startswith(("full", "scratch"))
    weights = None if kind.startswith("scratch") else str(base)
    start = time.process_time()
    mapping = recipe(job, weights, sets[job.data], keep / "runs", name, job.data if is_domain else None)
    result = train(mapping)
    seconds = time.process_time() - start
    plan = json.loads((result.folder / "plan.json").read_text())
    stored = result.folder / "domains" / job.data if is_domain else result.folder / "model"
    return {
        "AP": round(result.metrics["AP"], 5), "AP50": round(result.metrics["AP50"], 5),
        "trained": result.trainable, "lr": plan["parameter_groups"][-1]["lr"], "steps": result.steps,
        "bytes": sum(file.stat().st_size for file in stored.rglob("*") if file.is_file()),
        "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def train(mapping: dict[str, Any]) -> Any:
    """Train by a recipe, at a multiple of the derived rates where it says so."""
    from thawline.recipe import RunConfig
    from thawline.run import run
    from thawline.training.objective import build_objective

    factor = mapping.pop("rate_factor", 1.0)
    config = RunConfig.from_mapping(mapping)
    if factor != 1.0:
        settings = build_objective(config, described={}).schedule.settings  # type: ignore[attr-defined]
        rates = {"lr": factor * settings.lr, "backbone_lr": factor * settings.backbone_lr}
        config = RunConfig.from_mapping({**mapping, "training": {**mapping["training"], **rates}})
    return run(config)


def add_in_turn(keep: Path, base: Path, names: list[str], epochs: int) -> list[dict[str, float]]:
    """Add the domains one after the other; return the AP of each after each."""
    from thawline.jobs import add_domain, evaluate_domains

    shop = keep / "shop"
    shutil.rmtree(shop, ignore_errors=True)
    found = []
    for name in names:
        add_domain(shop, keep / "runs" / f"{name}-paca-{epochs}-0", base=base)
        scores = evaluate_domains(shop)
        found.append({one: scores[one].metrics["AP"] for one in scores})  # type: ignore[union-attr]
    return found


def fine_tune_in_turn(args: Any, sets: dict[str, Path]) -> list[dict[str, float]]:
    """Fine-tune one detector on the sets one after the other; return its AP on each set after each."""
    from thawline.jobs import evaluate

    joined = {name: join_classes(name, sets, args.keep / "joined") for name in args.data}
    weights, found = str(args.base), []
    for index, name in enumerate(args.data):
        job = Job(name, "full", args.epochs, 0, args.images)
        run_name = f"turn-{index}-{name}"
        shutil.rmtree(args.keep / "runs" / run_name, ignore_errors=True)
        mapping = recipe(job, weights, joined[name], args.keep / "runs", run_name, None)
        mapping["data"]["images"] = str(sets[name] / "images")
        folder = train(mapping).folder
        weights = str(folder)
        scores = {}
        for seen in args.data[: index + 1]:
            data = {"path": str(joined[seen]), "images": str(sets[seen] / "images"), "eval_split": "val"}
            scores[seen] = evaluate(folder, data=data).metrics["AP"]
        found.append(scores)
    return found


def join_classes(name: str, sets: dict[str, Path], folder: Path) -> Path:
    """Write a set's annotations with the classes of all sets, so that one head has them all."""
    names = [
        f"{one}: {category['name']}"
        for one, path in sets.items()
        for category in json.loads((path / "instances_train.json").read_text())["categories"]
    ]
    ids = {title: number for number, title in enumerate(names, 1)}
    for split in ("train", "val"):
        content = json.loads((sets[name] / f"instances_{split}.json").read_text())
        own = {one["id"]: ids[f"{name}: {one['name']}"] for one in content["categories"]}
        content["annotations"] = [
            {**one, "category_id": own[one["category_id"]]} for one in content["annotations"]
        ]
        content["categories"] = [{"id": number, "name": title} for title, number in ids.items()]
        write_json(folder / name / f"instances_{split}.json", content, indent=None)
    return folder / name


def summarise(done: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per set, arm and budget: AP by seed and their mean."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for job, row in sorted(done.items(), key=lambda item: (item[0].data, item[0].arm, item[0].seed)):
        groups.setdefault((job.data, job.arm, job.epochs), []).append(row)
    return [
        {
            "data": data, "arm": arm, "epochs": epochs, "AP": [row["AP"] for row in rows],
            "mean_AP": round(statistics.mean(row["AP"] for row in rows), 4), "trained": rows[0]["trained"],
            "bytes": rows[0]["bytes"], "lr": rows[0]["lr"],
        }
        for (data, arm, epochs), rows in groups.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
