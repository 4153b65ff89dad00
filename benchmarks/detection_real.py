"""DEIMv2 on small real image sets, beside transformers' port; what parts of the recipe matter; a few images.

    python benchmarks/detection_real.py --shared ../shared --out benchmarks/results/detection_real.json

Protocol, fixed before the first run. Everything is Atto, from random weights unless said, fp32 on one thread,
and goes through the call behind `thawline train` with its derived schedule: given are epochs and input size.

sets      bccd, cards and aerial_cars at 320 × 320. Beside each, `Deimv2ForObjectDetection` of the same
          shape, from the same initial weights, trained by transformers' Trainer with the port's own loss for
          as many images: resize and horizontal flip, AdamW with the same peak rate, batch and clipping,
          cosine to zero. aerial_cars once more with Atto's published limit of 12 pixels, under which boxes
          are not learned: the only way there was at first.
ablation  bccd at 256 × 256: the recipe, then without Dense O2O, with focal loss for MAL, and without EMA,
          each alone, two seeds.
few       one detector is trained on the three sets together (14 classes, 256 × 256); from it nuts (16 images)
          and trees (6): backbone frozen, PaCA on the backbone, or all of it training. Limit: 12 pixels.

AP is of the weights that the run ends with (averaged, where there is EMA), not of the best epoch: the
held-out images are looked at for the curve alone. Rows are appended to <out>.rows.jsonl as they come, so that
a stopped benchmark goes on where it was; run folders stay in --runs.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import Rows, study_parser, study_results
from thawline.measure import write_results

SETS = {"bccd": 60, "cards": 60, "aerial_cars": 180}
"""Epochs for each: about 8,000 to 18,000 images."""
ABLATION_EPOCHS = 30
ABLATIONS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "no_dense_o2o": {"dense_o2o": False},
    "focal": {"class_loss": "focal"},
    "no_ema": {"ema": False},
}
JOINT_EPOCHS, FEW_EPOCHS = 36, 60
FEW = ("nuts", "trees")
TUNERS = ("frozen", "paca", "none")
PARTS = ("sets", "few", "ablation")


@dataclass(frozen=True)
class Job:
    """One training run."""

    part: str
    data: str
    method: str
    seed: int = 0


FIRST = [*(Job("sets", data, "thawline") for data in SETS), Job("sets", "aerial_cars", "limit_12")]
JOINT = Job("few", "joint", "none")
PEERS = [Job("sets", data, "transformers") for data in SETS]
ABLATED = [Job("ablation", "bccd", name, seed) for name in ABLATIONS for seed in (0, 1)]
LAST = [Job("few", data, tuner) for data in FEW for tuner in TUNERS]


def main() -> None:
    parser = study_parser(__doc__, "detection_real.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/detection_real"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run of it")
    parser.add_argument("--curves", type=Path, help="Image file for a plot of AP over epochs.")
    args = parser.parse_args()

    rows = Rows(args.out, Job)
    train = partial(train_one, shared=args.shared, runs=args.runs)
    # The few-image runs start from the joint detector, so they come in a wave of their own.
    for wave in ([*FIRST, JOINT, *PEERS], [*LAST, *ABLATED]):
        jobs = [job for job in wave if job.part in args.parts]
        rows.run(train, jobs, workers=args.workers, jobs_per_process=1)
    found = summarise(rows.done)
    write_results(args.out, found)
    if args.curves:
        draw_curves(found, args.curves)


def train_one(job: Job, shared: Path, runs: Path) -> dict[str, Any]:
    """Train and evaluate once; return the scores and their curve."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    folder = runs / "-".join([job.part, job.data, job.method, str(job.seed)])
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    start = time.process_time()
    if job.method == "transformers":
        outcome = train_port(job, shared, folder)
    else:
        outcome = train_recipe(recipe(job, shared, folder), folder)
    return {**outcome, "cpu_seconds": round(time.process_time() - start, 1)}


def recipe(job: Job, shared: Path, folder: Path) -> dict[str, Any]:
    """The recipe of a run, as a YAML file would say it."""
    base: dict[str, Any] = {"variant": "atto", "size": 320 if job.part == "sets" else 256}
    objective: dict[str, Any] = {"kind": "detection"}
    tuner = job.method if job.part == "few" else "none"
    if job.part == "few" or job.method == "limit_12":
        objective["min_box_size"] = 12
    if job.part == "sets":
        epochs = SETS[job.data]
    elif job.part == "ablation":
        epochs = ABLATION_EPOCHS
        objective |= ABLATIONS[job.method]
    elif job == JOINT:
        epochs = JOINT_EPOCHS
    else:
        epochs = FEW_EPOCHS
        base["weights"] = str(folder.parent / "-".join([JOINT.part, JOINT.data, JOINT.method, "0"]) / "last")
    data = {"path": str(shared / "data" / "detection" / job.data), "format": "coco"}
    if job == JOINT:
        data = {"path": str(join_sets(shared, folder.parent / "joint")), "format": "coco"}
        data["images"] = str(shared / "data" / "detection")
    return {
        "objective": objective,
        "base": base,
        "tuner": tuner,
        "data": data,
        "training": {
            "epochs": epochs,
            "save_every": "end",
            "workers": 0,
            "precision": "fp32",
            "args": {"disable_tqdm": True},
        },
        "folder": str(folder.parent),
        "name": folder.name,
        "seed": job.seed,
    }


def train_recipe(mapping: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run thawline on a recipe; return the scores, the size of the run and its curve."""
    from thawline.recipe import RunConfig
    from thawline.run import run

    config = RunConfig.from_mapping(mapping)
    result = run(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plan = json.loads((folder / "plan.json").read_text())
    return {
        **measure_last(config, folder),
        "steps": result.steps,
        "images": result.steps * plan["rows_a_step"],
        "trainable": result.trainable,
        "curve": [
            [round(line["epoch"], 1), line["eval_AP"], line["eval_AP50"]]
            for line in lines
            if "eval_AP" in line
        ],
    }


def measure_last(config: Any, folder: Path) -> dict[str, Any]:
    """AP of last/: what a run says of itself is of model/, its best by the held-out images."""
    from thawline.models.deimv2 import DEIMv2
    from thawline.training.objective import build_objective

    objective: Any = build_objective(config)
    model = DEIMv2.from_pretrained(folder / "last")
    return as_row(objective.measure(model, 2 * objective.schedule.settings.batch_size)[0])


def as_row(metrics: Any) -> dict[str, Any]:
    return {
        "AP": metrics.statistics["AP"],
        "AP50": metrics.statistics["AP50"],
        "by_class": {entry.name: entry.AP50 for entry in metrics.classes if entry.AP50 == entry.AP50},
    }


def train_port(job: Job, shared: Path, folder: Path) -> dict[str, Any]:
    """transformers' port, by transformers' Trainer, as its users would: no Dense O2O, no EMA."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from thawline.bench.port import build_port
    from thawline.recipe import RunConfig
    from thawline.training.objective import build_objective

    config = RunConfig.from_mapping(recipe(job, shared, folder))
    objective: Any = build_objective(config)
    torch.manual_seed(job.seed)
    base = objective.load_base()
    port = build_port(base)
    settings = objective.schedule.settings
    epochs = SETS[job.data]
    curve: list[list[float]] = []

    def measure(model: torch.nn.Module) -> dict[str, float]:
        metrics, _ = objective.measure(Detects(model, base), 2 * settings.batch_size)
        model.train()
        return metrics.statistics

    class Curve(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if round(state.epoch) % 4 == 0:
                found = measure(kwargs["model"])
                curve.append([round(state.epoch, 1), found["AP"], found["AP50"]])

    steps = objective.schedule.steps_per_epoch * epochs
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=objective.schedule.settings.warmup_steps,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=job.seed,
    )
    rows = PortRows(objective.records, objective.size)
    trainer = Trainer(port, arguments, train_dataset=rows, data_collator=collate_port, callbacks=[Curve()])
    trainer.train()
    port.save_pretrained(folder / "model")
    metrics, _ = objective.measure(Detects(port, base), 2 * settings.batch_size)
    return {
        **as_row(metrics),
        "steps": steps,
        "images": steps * settings.batch_size,
        "trainable": sum(p.numel() for p in port.parameters() if p.requires_grad),
        "curve": curve,
    }


class Detects:
    """The port behind the face that our evaluation knows: same pixels in, same post-processing."""

    def __init__(self, port: Any, ours: Any) -> None:
        self.port, self.config, self.postprocess = port, ours.config, ours.postprocess

    def __call__(self, pixels: Any) -> Any:
        return self.port(pixel_values=pixels)

    def eval(self) -> None:
        self.port.eval()

    def parameters(self) -> Any:
        return self.port.parameters()


class PortRows:
    """Images as the port's Trainer takes them: resized, flipped at random, 0 to 1."""

    def __init__(self, records: Any, size: tuple[int, int]) -> None:
        from thawline.data.detection.dataset import DetectionDataset

        self.images, self.size = DetectionDataset(records), size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        from thawline.data.detection.geometry import resize

        sample = self.images.sample(index)
        height, width = sample.image.shape[:2]
        pixels = (
            torch.from_numpy(resize(sample.image, height=self.size[0], width=self.size[1])).permute(2, 0, 1)
            / 255
        )
        x1, y1, x2, y2 = torch.from_numpy(sample.boxes_xyxy).unbind(1)
        boxes = torch.stack(
            [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], 1
        )
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
            boxes[:, 0] = 1 - boxes[:, 0]
        return {
            "pixel_values": pixels.contiguous(),
            "labels": {"class_labels": torch.from_numpy(sample.labels), "boxes": boxes},
        }


def collate_port(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


def join_sets(shared: Path, folder: Path, names: Iterable[str] = tuple(SETS)) -> Path:
    """Join datasets into one COCO dataset of all their classes; file names are relative to their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        categories: list[dict[str, Any]] = []
        for name in names:
            own = json.loads((shared / "data" / "detection" / name / f"instances_{split}.json").read_text())
            first_image, first_class = len(images), len(categories)
            place = {image["id"]: first_image + i for i, image in enumerate(own["images"])}
            classes = {entry["id"]: first_class + i for i, entry in enumerate(own["categories"])}
            images += [
                {**image, "id": place[image["id"]], "file_name": f"{name}/images/{image['file_name']}"}
                for image in own["images"]
            ]
            categories += [{"id": classes[entry["id"]], "name": entry["name"]} for entry in own["categories"]]
            annotations += [
                {
                    **box,
                    "id": len(annotations) + i,
                    "image_id": place[box["image_id"]],
                    "category_id": classes[box["category_id"]],
                }
                for i, box in enumerate(own["annotations"])
            ]
        joint = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(joint))
    return folder


def summarise(done: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """Every run by part, set and method: mean over seeds, spread, curves."""
    found: dict[str, Any] = {}
    for job in [*FIRST, *PEERS, *ABLATED, JOINT, *LAST]:
        rows = [
            row
            for other, row in done.items()
            if (other.part, other.data, other.method) == (job.part, job.data, job.method)
        ]
        if rows:
            found.setdefault(job.part, {}).setdefault(job.data, {})[job.method] = {
                "AP": statistics.mean(row["AP"] for row in rows),
                "AP50": statistics.mean(row["AP50"] for row in rows),
                "AP_of_seeds": [row["AP"] for row in rows],
                "AP50_of_seeds": [row["AP50"] for row in rows],
                "best_AP_on_the_way": max(ap for row in rows for _, ap, _ in row["curve"]),
                "AP50_by_class": rows[0]["by_class"],
                "images": rows[0]["images"],
                "steps": rows[0]["steps"],
                "cpu_seconds": statistics.mean(row["cpu_seconds"] for row in rows),
                "curve_epoch_AP_AP50": rows[0]["curve"],
            }
    return study_results(__file__, **found)


def draw_curves(found: dict[str, Any], path: Path) -> None:
    """AP (line) and AP50 (dashes) of held-out images over epochs, a panel a set and one for the ablation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {name: found["sets"][name] for name in SETS} | {
        "bccd, parts left out": found["ablation"]["bccd"]
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for axis, (title, methods) in zip(axes, panels.items(), strict=True):
        for index, (method, result) in enumerate(methods.items()):
            epochs, ap, ap50 = zip(*result["curve_epoch_AP_AP50"], strict=True)
            axis.plot(epochs, ap, color=f"C{index}", label=method.replace("_", " "))
            axis.plot(epochs, ap50, color=f"C{index}", linestyle="--", linewidth=0.8)
        axis.set(title=title, xlabel="epoch", ylim=(0, None))
        axis.legend(fontsize=8)
    axes[0].set_ylabel("AP (dashed: AP50)")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    sys.exit(main())
