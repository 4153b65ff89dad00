"""Does finer routing find skills that tasks share? LoRA, Poly, MHR and controls where the truth is known.

    python benchmarks/skills.py --out benchmarks/results/skills.json

In each world of `skill_worlds` a method is trained on all training tasks at once, then adapted
to every held-out task from a few examples. The score is the squared error on fresh data, relative to that of
the frozen net: 1 is no better than knowing nothing of the task, 0 is perfect.

Protocol, fixed before the first full run:
- width 32, inventory of 4 rank-1 skills per linear, 4 blocks; 24 training tasks, 8 held out.
- methods have 4 skills of rank 1 (`private`: one per task), scale 1, no noise; all through `get_peft_model`.
- training: Adam, 800 steps, 16 fresh rows of every task in each. Adaptation: 150 steps on 32 rows of a task.
- learning rates: for each family, method and phase the best of four on a seed outside the five: 0.003, 0.01,
  0.03, 0.1 for adapters with routing at 0.1, and 0.03, 0.1, 0.3, 1 where routing alone trains. Where the
  grid's edge wins, the results say so.
- alignment of the training tasks' gradients, every 40 of the first 600 steps on 64 rows a task: the mean over
  that trajectory (`thawline.analysis`), with all methods at rate 0.01. A higher rate makes gradients agree,
  whatever the method: all tasks want back what a step too long has done. Alignment at the tuned rates is in
  the results too.
- recovery: where a learned table has as many heads as the truth, the correlation over tasks of its weights
  with the teachers', skills matched head by head.
- intervals: bootstrap over seeds, then over tasks within them; ratios are paired.

A row is appended to <out>.rows.jsonl for every run, so that a stopped benchmark goes on.
"""

from __future__ import annotations

__all__ = ["METHODS", "main", "run_one"]

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from bootstrap import interval
from harness import Rows, study_results
from skill_worlds import FAMILIES, LAYERS, Size, World, mean_squared_error
from thawline.analysis.recorder import AlignmentRecorder, average
from thawline.analysis.routing import read_routing
from thawline.measure import write_results
from thawline.tuners.mhr import MHRConfig, MHRLinear, parameter_groups, set_task_ids, start_adaptation
from thawline.tuners.mhr.routing import LearnedRouter

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 1},
    "lora_rS": {"r": 4},
    "private": {"router": "private"},
    "uniform": {"router": "uniform"},
    "random": {"router": "random", "n_heads": 4},
    "poly": {"n_heads": 1},
    "mhr2": {"n_heads": 2},
    "mhr4": {"n_heads": 4},
    "mhr8": {"n_heads": 8},
}
"""What differs between the methods."""
Mode = Literal["full", "z", "mu"]
SPACES = ("skill", "effective")
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
RATES = (0.003, 0.01, 0.03, 0.1)
ROUTING_RATES = (0.03, 0.1, 0.3, 1.0)
ROUTING_RATE = 0.1
ALIGN_RATE = 0.01
NEVER = -1e4
"""A logit whose sigmoid and gradient are 0."""


@dataclass(frozen=True)
class Effort:
    """Steps and rows; smaller in tests."""

    train_steps: int = 800
    train_rows: int = 16
    adapt_steps: int = 150
    shots: int = 32
    test_rows: int = 512
    align_every: int = 40
    align_until: int = 600
    align_rows: int = 64


@dataclass(frozen=True)
class Job:
    """One training, and adaptations of what came out."""

    family: str
    method: str
    seed: int
    lr: float
    adapt: tuple[tuple[Mode, float], ...] = ()
    """(mode, learning rate) each."""
    size: Size = field(default_factory=Size)
    effort: Effort = field(default_factory=Effort)

    def to_row(self) -> dict[str, str]:
        """The job as one value of its row."""
        fields = [self.family, self.method, self.seed, self.lr, self.adapt]
        return {"job": json.dumps([*fields, *astuple(self.size), *astuple(self.effort)])}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Job:
        """Take the job out of its row."""
        family, method, seed, lr, adapt, *sizes = json.loads(row.pop("job"))
        n = len(dataclass_fields(Size))
        adapt = tuple((mode, rate) for mode, rate in adapt)
        return cls(family, method, seed, lr, adapt, Size(*sizes[:n]), Effort(*sizes[n:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=1, help="Processes of one thread each.")
    parser.add_argument("--out", type=Path, help="Write the results as JSON; rows go beside it.")
    args = parser.parse_args(argv)
    rows = Rows(args.out, Job)
    pairs = [(family, method) for family in args.family for method in args.method]

    tuning = [Job(family, method, TUNING_SEED, lr) for family, method in pairs for lr in RATES]
    rows.run(run_one, tuning, workers=args.workers)
    tries = []
    for family, method in pairs:
        jobs = [job for job in tuning if (job.family, job.method) == (family, method)]
        best = min(jobs, key=lambda job: _mean(rows.done[job]["train"]))
        adapt = tuple((mode, lr) for mode in modes_of(method) for lr in rates(mode))
        tries.append(replace(best, adapt=adapt))
    rows.run(run_one, tries, workers=args.workers)
    final = [
        replace(job, seed=seed, adapt=tuple(_best_adaptations(rows.done[job])))
        for job in tries
        for seed in args.seeds
    ]
    rows.run(run_one, final, workers=args.workers)
    aligned = [job if job.lr == ALIGN_RATE else _at_common_rate(job) for job in final]
    rows.run(run_one, aligned, workers=args.workers)
    results = summarise(
        [(job, rows.done[job] | {"aligned": rows.done[at]}) for job, at in zip(final, aligned, strict=True)]
    )
    write_results(args.out, results)
    sys.stdout.write(table(results))
    return 0


def _at_common_rate(job: Job) -> Job:
    """The job that alignment is taken from, where the tuned rate is another."""
    effort = replace(job.effort, train_steps=job.effort.align_until)
    return replace(job, lr=ALIGN_RATE, adapt=(), effort=effort)


def modes_of(method: str) -> tuple[Mode, ...]:
    """Ways in which a method can be adapted.

    Full and mu are one thing for private adapters, whose mean is adapted, and under Adam for uniform ones.
    """
    config = METHODS[method]
    if "r" in config or config.get("router") == "private":
        return ("full",)
    if config.get("router") == "uniform":
        return ("mu",)
    return ("full", "mu") if "router" in config else ("full", "z", "mu")


def rates(mode: str) -> tuple[float, ...]:
    """The learning rates that are tried."""
    return ROUTING_RATES if mode == "z" else RATES


def run_one(job: Job) -> dict[str, Any]:
    """Train, measure alignment on the way, adapt.

    Returns: a JSON-ready row: `train` has a score per training task, `few_shot` per adaptation and held-out
        task, `zero_shot` that of the average of the skills, `alignment` per space over the trajectory.
    """
    torch.set_num_threads(1)
    start = time.process_time()
    world, effort = World(job.family, job.seed, job.size), job.effort
    torch.manual_seed(job.seed)
    model = get_peft_model(world.net(), _config(job.method, job.size)).train()
    recorder = _train(model, world, job.lr, effort)
    row: dict[str, Any] = {"train": _scores(model, world, world.train_tasks, effort)}
    row["alignment"] = average(recorder.rows) if recorder.rows else {}
    row["recovery"] = _recovery(model, world)
    row["few_shot"] = {}
    for mode, lr in job.adapt:
        row["few_shot"][f"{mode} {lr:g}"] = _few_shot(model, world, mode, lr, effort)
    if job.adapt:
        row["zero_shot"] = _few_shot(model, world, "mu", 0.0, effort)
    return {**row, "trained": _n_trained(model), "seconds": round(time.process_time() - start, 2)}


def _config(method: str, size: Size) -> PeftConfig:
    fields = METHODS[method]
    if "r" in fields:
        return LoraConfig(r=fields["r"], lora_alpha=fields["r"], target_modules=list(LAYERS))
    n_skills = size.n_train if fields.get("router") == "private" else size.n_skills
    return MHRConfig(r=1, n_tasks=size.n_train, n_skills=n_skills, target_modules=list(LAYERS), **fields)


def _train(model: nn.Module, world: World, lr: float, effort: Effort) -> AlignmentRecorder:
    tasks = world.train_tasks
    held = [part.chunk(len(tasks)) for part in world.draw(tasks, effort.align_rows, draw=1)]
    batches = dict(zip(tasks, zip(*held, strict=True), strict=True))
    recorder = AlignmentRecorder(batches, mean_squared_error, every=effort.align_every)
    align_until = 0 if world.seed == TUNING_SEED else effort.align_until
    optimizer = torch.optim.Adam(_groups(model, lr), fused=True)
    _route(model, tasks, effort.train_rows)
    for step in range(1, effort.train_steps + 1):
        _step(model, optimizer, world.draw(tasks, effort.train_rows, draw=10 + step))
        if step <= align_until:
            recorder(model, step)
    return recorder


def _few_shot(model: nn.Module, world: World, mode: Mode, lr: float, effort: Effort) -> list[float]:
    """A score per held-out task, each adapted from the model by itself. lr 0 leaves adaptation out."""
    tasks = world.held_out_tasks
    adapted = copy.deepcopy(model)
    if isinstance(adapted.peft_config["default"], MHRConfig):
        start_adaptation(adapted, mode, tasks=len(tasks))
    if mode != "z":
        adapted = _side_by_side(adapted, world, len(tasks))
    return _adapt(adapted, world, tasks, mode, lr, effort)


def _side_by_side(model: nn.Module, world: World, n_tasks: int) -> nn.Module:
    """A model in which every task has skills of its own, all starting as those of `model`.

    Tasks adapt as if each were alone, to rounding, in a fraction of the time. A task's logits are `NEVER` for
    the skills of others: weight and gradient are exactly 0.
    """
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in LAYERS}
    parts = {name: _inventory(layer, n_tasks) for name, layer in layers.items()}
    logits, A, _ = parts[LAYERS[0]]
    n_heads, n_skills = logits.shape[1:]
    sizes = {"r": A.shape[-1], "n_tasks": n_tasks, "n_skills": n_tasks * n_skills, "n_heads": n_heads}
    config = MHRConfig(**sizes, target_modules=list(LAYERS))
    copied = get_peft_model(world.net(), config)
    own = torch.eye(n_tasks, dtype=torch.bool).repeat_interleave(n_skills, 1)[:, None]
    for name, (logits, A, B) in parts.items():
        layer = copied.get_submodule(f"base_model.model.{name}")
        layer.mhr_A["default"].data.copy_(A.repeat(n_tasks, 1, 1))
        layer.mhr_B["default"].data.copy_(B.repeat(n_tasks, 1, 1))
        table = layer.routers["default"].logits
        table.data.copy_(torch.where(own, logits.repeat(1, 1, n_tasks), NEVER))
        table.requires_grad_(logits.requires_grad)
    return copied


def _inventory(layer: nn.Module, n_tasks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (tasks, H, S), requiring a gradient where they learn, and skills A (S, I, r), B (S, O, r)."""
    if not isinstance(layer, MHRLinear):
        A, B = layer.lora_A["default"].weight.detach().T, layer.lora_B["default"].weight.detach()
        return torch.zeros(n_tasks, 1, 1), A[None], B[None]
    A, B = layer.mhr_A["default"].detach(), layer.mhr_B["default"].detach()
    router = layer.routers["default"]
    if isinstance(router, LearnedRouter):
        return router.logits, A, B
    weights = router(torch.arange(n_tasks))
    if weights is None:
        return torch.zeros(n_tasks, 1, len(A)), A, B
    return torch.where(weights > 0, -NEVER, NEVER), A, B


def _adapt(
    model: nn.Module, world: World, tasks: range, mode: Mode, lr: float, effort: Effort
) -> list[float]:
    if lr:
        groups = _groups(model, lr, routing_lr=lr if mode == "z" else ROUTING_RATE)
        optimizer = torch.optim.Adam(groups, fused=True)
        model.train()
        _route(model, tasks, effort.shots)
        batch = _rows_of(world, tasks, effort.shots, draw=2)
        for _ in range(effort.adapt_steps):
            _step(model, optimizer, batch, len(tasks))
    return _scores(model, world, tasks, effort)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], n_losses: int = 1
) -> None:
    """One step on the mean loss, or on the sum of the losses of `n_losses` tasks with equally many rows."""
    (n_losses * mean_squared_error(model, batch)).backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _scores(model: nn.Module, world: World, tasks: range, effort: Effort) -> list[float]:
    """Error on fresh rows, relative to the frozen net's, of every task."""
    was_training = model.training
    model.eval()
    _route(model, tasks, effort.test_rows)
    x, y = _rows_of(world, tasks, effort.test_rows, draw=3)
    errors = [(net(x) - y).square().view(len(tasks), -1).mean(1) for net in (model, world.net())]
    model.train(was_training)
    return (errors[0] / errors[1]).tolist()


def _rows_of(world: World, tasks: range, n: int, draw: int) -> tuple[Tensor, Tensor]:
    """A held-out task's rows do not depend on which tasks are drawn beside it."""
    every = world.held_out_tasks if tasks.start in world.held_out_tasks else tasks
    first = (tasks.start - every.start) * n
    x, y = world.draw(every, n, draw)
    return x[first : first + len(tasks) * n], y[first : first + len(tasks) * n]


def _recovery(model: nn.Module, world: World) -> float | None:
    """Mean correlation of learned with true weights under the best matching of skills; 1 is the truth."""
    learned = isinstance(model.peft_config["default"], MHRConfig) and model.peft_config["default"].router
    if learned != "learned":
        return None
    found = []
    for name, weights_KHS in read_routing(model).weights.items():
        true_KHS = world.routes[name][: len(weights_KHS)].double()
        if true_KHS.shape != weights_KHS.shape:
            return None
        n_skills = weights_KHS.shape[-1]
        for mine_KS, true_KS in zip(weights_KHS.unbind(1), true_KHS.unbind(1), strict=True):
            both = torch.corrcoef(torch.cat([mine_KS.T, true_KS.T]))[:n_skills, n_skills:]
            orders = itertools.permutations(range(n_skills))
            found.append(max(float(both[range(n_skills), order].mean()) for order in orders))
    return _mean(found)


def _route(model: nn.Module, tasks: range, n: int) -> None:
    """n rows of each task after another; ids count from the first of `tasks`."""
    if isinstance(model.peft_config["default"], MHRConfig):
        set_task_ids(model, [number for number in range(len(tasks)) for _ in range(n)])


def _groups(model: nn.Module, lr: float, routing_lr: float = ROUTING_RATE) -> list[dict[str, Any]]:
    if isinstance(model.peft_config["default"], MHRConfig):
        return parameter_groups(model, lr, routing_lr)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


def _n_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _best_adaptations(row: Mapping[str, Any]) -> Iterator[tuple[Mode, float]]:
    """Find the learning rate with the lowest mean score for every mode."""
    for mode in get_args(Mode):
        tried = {lr: row["few_shot"].get(f"{mode} {lr:g}") for lr in rates(mode)}
        scores = {lr: _mean(found) for lr, found in tried.items() if found}
        if scores:
            yield mode, min(scores, key=scores.__getitem__)


def summarise(rows: Sequence[tuple[Job, Mapping[str, Any]]]) -> dict[str, Any]:
    """Means with intervals by family, method and phase; MHR against Poly; alignment by seed."""
    families: dict[str, Any] = {}
    for family in dict.fromkeys(job.family for job, _ in rows):
        methods = {}
        for method in dict.fromkeys(job.method for job, _ in rows if job.family == family):
            own = [(job, row) for job, row in rows if (job.family, job.method) == (family, method)]
            methods[method] = _summary(own)
        families[family] = {"methods": methods, "compared": dict(_comparisons(methods))}
    return {
        "bench": "skills",
        **study_results(__file__),
        "size": asdict(Size()),
        "effort": asdict(Effort()),
        "seconds_of_final_runs": round(sum(row["seconds"] for _, row in rows)),
        "families": families,
    }


def _summary(runs: Sequence[tuple[Job, Mapping[str, Any]]]) -> dict[str, Any]:
    job, first = runs[0]
    scores = {"train": [row["train"] for _, row in runs], "zero_shot": [row["zero_shot"] for _, row in runs]}
    lrs = {"train": job.lr}
    for mode, lr in job.adapt:
        scores[mode] = [row["few_shot"][f"{mode} {lr:g}"] for _, row in runs]
        lrs[mode] = lr
    edges = [phase for phase, lr in lrs.items() if lr in (rates(phase)[0], rates(phase)[-1])]
    return {
        "trained": first["trained"],
        "lr": lrs,
        "lr_at_the_grids_edge": edges,
        "score": {phase: _with_interval(groups) for phase, groups in scores.items()},
        "alignment": _alignment([row["aligned"] for _, row in runs]),
        "alignment_at_own_lr": _alignment([row for _, row in runs]),
        "recovery": [row["recovery"] for _, row in runs],
        "by_seed": scores,
    }


def _alignment(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Alignment by space and measure, a value per seed."""
    names = ("mean_cosine", "coherence")
    found = {}
    for space in SPACES:
        found[space] = {name: [row["alignment"][space][name] for row in rows] for name in names}
    return found


def _comparisons(methods: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each MHR's error over Poly's, paired, and in how many seeds MHR's alignment is the highest."""
    for name in (name for name in methods if name.startswith("mhr") and "poly" in methods):
        ratios = {}
        for phase, mine in methods[name]["by_seed"].items():
            theirs = methods["poly"]["by_seed"][phase]
            pairs = [list(zip(a, b, strict=True)) for a, b in zip(mine, theirs, strict=True)]
            low, high = interval(pairs, _ratio)
            ratios[phase] = {"ratio": _ratio([p for group in pairs for p in group]), "low": low, "high": high}
        highest = {space: _times_highest(name, methods, space) for space in SPACES}
        yield name, {"of_poly": ratios, "seeds_of_highest_coherence": highest}


def _times_highest(name: str, methods: Mapping[str, Any], space: str) -> int:
    """In how many seeds this MHR is the most coherent, beside all that share adapters but are no MHR."""
    rivals = [name, *(method for method in methods if not method.startswith(("mhr", "private")))]
    by_seed = zip(*(methods[method]["alignment"][space]["coherence"] for method in rivals), strict=True)
    return sum(values[0] == max(values) for values in by_seed)


def _with_interval(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    low, high = interval(groups, _mean)
    return {"mean": _mean([value for group in groups for value in group]), "low": low, "high": high}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines: list[str] = []
    for family, found in results["families"].items():
        lines += [
            f"\n{family}: {FAMILIES[family]}",
            "| method | trained | train | zero-shot | full | z | mu | coherence, skill | effective |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for method, row in found["methods"].items():
            cells = [_cell(row["score"].get(phase)) for phase in ("train", "zero_shot", "full", "z", "mu")]
            coherence = [statistics.mean(row["alignment"][space]["coherence"]) for space in SPACES]
            cells += [f"{value:.4f}" for value in coherence]
            lines.append(f"| {method} | {row['trained']} | " + " | ".join(cells) + " |")
        for name, compared in found["compared"].items():
            ratios = ", ".join(
                f"{phase} {r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
                for phase, r in compared["of_poly"].items()
            )
            highest = compared["seeds_of_highest_coherence"]
            lines.append(f"\n{name} / poly: {ratios}; highest coherence in {highest} seeds")
    return "\n".join(lines) + "\n"


def _cell(score: Mapping[str, float] | None) -> str:
    return "" if score is None else f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


if __name__ == "__main__":
    raise SystemExit(main())
