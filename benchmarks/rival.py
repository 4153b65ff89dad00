"""LibreYOLO's training of DEIMv2 on the sets and images of `recipe.py`, for comparison.

    python benchmarks/rival.py --shared ../shared --budgets 10 5 --data bccd cards aerial_cars --seeds 0 1 2

Needs an environment of its own, with thawline, `libreyolo==1.6.0` and what that asks for.

One run: the network that LibreYOLO builds, from its random weights, trained by its trainer with its defaults
for that size (rates, schedule, augmentation, smallest box), on the training images that a run of `recipe.py`
with the same seed takes. Given are input size, epochs, 8 images a step (its default of 128 would leave one
step an epoch) and no loading processes. The weights as trained are scored by thawline on all held-out images,
resized and counted as for its own detectors; the averaged ones are scored, too, as `EMA_AP`: in runs shorter
than 32 epochs LibreYOLO averages from the start with a decay of 0.9999, so that they are still close to
random. Rows are appended to <out>.rows.jsonl as they come, so that a stopped study resumes; at the end the
table of both recipes is printed, over the seeds that also recipe.rows.jsonl beside <out> has (arm `derived`).
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from harness import Rows, study_results
from recipe import Job, run_config, runs_parser
from thawline.bench.harness import markdown
from thawline.measure import write_results
from thawline.models.deimv2.postprocess import postprocess

OURS, THEIRS = "derived", "libreyolo"
BATCH_SIZE = 8
MAX_DETECTIONS = 300


def main() -> None:
    args = runs_parser(__doc__, "rival.json").parse_args()
    rows = Rows(args.out, Job)
    jobs = [
        Job(data, epochs, THEIRS, seed, args.variant, args.images, args.size)
        for epochs in args.budgets
        for seed in args.seeds
        for data in args.data
    ]
    rows.run(partial(train_one, shared=args.shared), jobs, workers=args.workers, jobs_per_process=1)
    table = compare(rows.done, Rows(args.out.with_name("recipe.json"), Job).done)
    write_results(args.out, study_results("rival.py", table=table))
    lines = [
        [row["data"], str(row["epochs"])]
        + [
            cell
            for name in (OURS, THEIRS)
            for cell in (f"{row['AP'][name]:.3f}", str(row["AP_by_seed"][name]))
        ]
        for row in table
    ]
    sys.stdout.write(markdown(["set", "epochs", OURS, "by seed", THEIRS, "by seed"], lines))


def train_one(job: Job, shared: Path) -> dict[str, Any]:
    """Train with LibreYOLO and evaluate with thawline, once."""
    import torch
    from libreyolo.models.deimv2.model import LibreDEIMv2

    from thawline.training.objective import build_objective

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="rival-"))
    objective: Any = build_objective(run_config(job, shared, folder))
    dataset = objective.datasets[0]
    torch.manual_seed(job.seed)
    detector = LibreDEIMv2(None, job.variant, nb_classes=len(dataset.class_names), device="cpu")
    start = time.process_time()
    results = detector.train(
        data=str(write_dataset(dataset, shared / "data" / "detection" / job.data, folder)),
        epochs=job.epochs, batch=BATCH_SIZE, imgsz=job.size, workers=0, seed=job.seed, device="cpu",
        project=str(folder), name="run", eval_interval=10 * job.epochs,
    )  # fmt: skip
    seconds = time.process_time() - start
    checkpoint = torch.load(results["last_checkpoint"], weights_only=False)
    outcome = {}
    for name, key in (("raw", "train_model"), ("EMA", "ema")):
        detector.model.load_state_dict(checkpoint[key])
        found = objective.measure(Scored(detector.model), 2 * BATCH_SIZE)[0].statistics
        outcome |= {f"{name}_AP": found["AP"], f"{name}_AP50": found["AP50"]}
    shutil.rmtree(folder)
    return {
        "AP": round(outcome["raw_AP"], 5),
        "AP50": round(outcome["raw_AP50"], 5),
        **{k: round(v, 5) for k, v in outcome.items()},
        "steps": job.epochs * (len(dataset.records) // BATCH_SIZE),
        "batch": BATCH_SIZE,
        "train_cpu_seconds": round(seconds, 1),
    }


def write_dataset(dataset: Any, source: Path, folder: Path) -> Path:
    """Write the annotations of the training images, and the file that tells LibreYOLO about a dataset."""
    coco = json.loads((source / "instances_train.json").read_text())
    ids = {record.image_id for record in dataset.records}
    coco["images"] = [image for image in coco["images"] if image["id"] in ids]
    coco["annotations"] = [box for box in coco["annotations"] if box["image_id"] in ids]
    (folder / "train.json").write_text(json.dumps(coco))
    images = str((source / "images").resolve())
    file = folder / "data.yaml"
    annotations = {
        "train": str(folder / "train.json"), "val": str((source / "instances_val.json").resolve())
    }  # fmt: skip
    content = {
        "path": str(folder), "train": images, "val": images, "annotations": annotations,
        "nc": len(dataset.class_names), "names": list(dataset.class_names),
    }  # fmt: skip
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def compare(theirs: dict[Job, dict[str, Any]], ours: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the AP of both recipes on each set and budget, of the seeds that both have."""
    groups: dict[Job, dict[str, list[float]]] = {}
    for job, row in sorted(theirs.items(), key=lambda item: item[0].seed):
        if (same := replace(job, arm=OURS)) in ours:
            found = groups.setdefault(replace(job, seed=0), {OURS: [], THEIRS: []})
            found[OURS].append(ours[same]["AP"])
            found[THEIRS].append(row["AP"])
    return [
        {
            "data": job.data, "epochs": job.epochs, "variant": job.variant, "n_images": job.n_images,
            "size": job.size, "AP_by_seed": found,
            "AP": {name: round(statistics.mean(values), 4) for name, values in found.items()},
        }
        for job, found in groups.items()
    ]  # fmt: skip


class Scored(nn.Module):
    """LibreYOLO's network with what thawline's evaluation asks of a detector."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.config = SimpleNamespace(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self.network(pixel_values)

    def postprocess(self, output: dict[str, Tensor], sizes: Tensor) -> Any:
        return postprocess(output["pred_logits"], output["pred_boxes"], sizes, MAX_DETECTIONS)


if __name__ == "__main__":
    main()
