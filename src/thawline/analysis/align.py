"""What `thawline align` writes of a run or adapter: routes and alignment, as JSON and as pictures.

align.json          routing statistics, similarity of tasks, alignment over steps and its mean
routes.png          a heat map per layer: tasks × skills
tasks.png           a dendrogram of the tasks, beside their similarity
alignment.png       coherence of the tasks' gradients over steps, both spaces
"""

from __future__ import annotations

__all__ = ["align", "summary"]

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from thawline.analysis.plots import draw_alignment, draw_routes, draw_tasks, order_tasks
from thawline.analysis.recorder import ALIGNMENT, average, read_trajectory
from thawline.analysis.routing import RoutingTable, read_routing, routing_statistics, task_similarity
from thawline.errors import CheckpointError, DataError, RoutingError


def align(source: str | Path, out: str | Path, *, beside: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Write align.json and the pictures there is something to draw for.

    Args:
        source: folder of a run, of an adapter, or of `save_routing`.
        out: folder to write to; made if missing, what an earlier call wrote is replaced.
        beside: folders of other runs, whose alignment is drawn too.
    Returns: what align.json holds; `routing` or `alignment` is missing where there is none.
    Raises: CheckpointError, RoutingError: if there is neither routing nor a recorded alignment. DataError:
        if a recorded alignment is damaged, or missing in a run of `beside`. MissingExtraError: without
        matplotlib or scipy.
    """
    source, out = Path(source), Path(out)
    trajectories = _trajectories(source, beside)
    table = _routing(source, required=not trajectories)
    found: dict[str, Any] = {"source": str(source)}
    out.mkdir(parents=True, exist_ok=True)
    if table is not None:
        similarity, by_part = task_similarity(table)
        order, _ = order_tasks(similarity)
        found["routing"] = {
            "tasks": list(table.tasks),
            **routing_statistics(table),
            "order": [table.tasks[i] for i in order],
            "similarity": similarity.tolist(),
            "similarity_by_module": {part: cosines.tolist() for part, cosines in by_part.items()},
        }
        draw_routes(table, out / "routes.png")
        draw_tasks(table, out / "tasks.png")
    if trajectories:
        found["alignment"] = {
            name: {"mean": average(rows), "steps": rows} for name, rows in trajectories.items()
        }
        draw_alignment(trajectories, out / "alignment.png")
    temporary = out / ".align.json"
    temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out / "align.json")
    return found


def summary(found: Mapping[str, Any]) -> list[str]:
    """What `align` found, in lines for a person."""
    lines = []
    if "routing" in found:
        routing = found["routing"]
        lines.append(f"{len(routing['tasks'])} tasks, {len(routing['modules'])} routing tables")
        lines += [f"  {name:12} {routing[name]:.3f}   {told}" for name, told in READINGS.items()]
        lines += ["  most alike:", *(f"    {cosine:.3f}  {a}, {b}" for cosine, a, b in _closest(routing))]
    for name, one in found.get("alignment", {}).items():
        steps = one["steps"]
        lowest, level = (steps[-1][key] for key in ("cosine_if_cancelling", "coherence_if_orthogonal"))
        lines.append(f"alignment of {name}: mean of {len(steps)} measurements up to step {steps[-1]['step']}")
        for space, mean in one["mean"].items():
            cosine = f"cosine {mean['mean_cosine']:+.4f} (cancelling {lowest:+.4f})"
            lines.append(
                f"  {space:9}  {cosine}   coherence {mean['coherence']:.4f} (orthogonal {level:.4f})"
            )
    return lines


READINGS = {
    "discreteness": "0: skills are on or off, 1: undecided",
    "sparsity": "share of skills that are on",
    "usage": "0: one skill serves all tasks, 1: skills serve alike",
}


def _closest(routing: Mapping[str, Any], most: int = 3) -> list[tuple[float, str, str]]:
    """The pairs of tasks whose rows are most alike."""
    names, similarity = routing["tasks"], routing["similarity"]
    pairs = [(similarity[i][j], names[i], names[j]) for i, j in combinations(range(len(names)), 2)]
    return sorted(pairs, reverse=True)[:most]


def _routing(source: Path, required: bool) -> RoutingTable | None:
    """The table in a folder, or in the `model/` of a run's; `None` if there is none, and none is needed."""
    folder = source / "model" if (source / "model").is_dir() else source
    try:
        return read_routing(folder)
    except (CheckpointError, RoutingError):
        if required:
            raise
        return None


def _trajectories(source: Path, beside: Sequence[str | Path]) -> dict[str, list[dict[str, Any]]]:
    """Alignment over steps of the runs that recorded it, by name."""
    files = [source / ALIGNMENT] if (source / ALIGNMENT).is_file() else []
    for folder in map(Path, beside):
        if not (folder / ALIGNMENT).is_file():
            raise DataError(f"'{folder}' has no {ALIGNMENT}: no alignment was recorded there.")
        files.append(folder / ALIGNMENT)
    found = {}
    for file in files:
        try:
            name = file.resolve().parent.name
            found[str(file.parent) if name in found else name] = read_trajectory(file)
        except ValueError as error:
            raise DataError(f"'{file}' is damaged: {error}.") from error
    return found
