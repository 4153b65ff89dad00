"""Files of `thawline align`: routing and alignment of a run or adapter, as JSON and plots.

align.json          routing statistics, similarity of tasks, alignment over steps and its mean
routes.png          a heat map per layer: tasks × skills
tasks.png           a dendrogram of the tasks and their similarity
alignment.png       coherence of the tasks' gradients over steps, both spaces
"""

from __future__ import annotations

__all__ = ["align", "summary"]

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from thawline.analysis.plots import draw_alignment, draw_routes, draw_tasks, order_tasks
from thawline.analysis.recorder import ALIGNMENT, average, read_trajectory
from thawline.analysis.routing import RoutingTable, read_routing, routing_statistics, task_similarity
from thawline.errors import CheckpointError, DataError, RoutingError
from thawline.files import write_json


def align(source: str | Path, out: str | Path, *, beside: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Write align.json and a plot for each thing it holds.

    Args:
        source: folder of a run, of an adapter, or of `save_routing`.
        out: folder to write to; files of an earlier call are replaced.
        beside: folders of other runs, whose alignment is plotted too.
    Returns: the contents of align.json; `routing` or `alignment` is missing where there is none.
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
    write_json(out / "align.json", found, indent=1)
    return found


def summary(found: Mapping[str, Any]) -> list[str]:
    """Return the result of `align` as lines for a person."""
    lines = []
    if "routing" in found:
        routing = found["routing"]
        lines.append(f"{len(routing['tasks'])} tasks, {len(routing['modules'])} routing tables")
        lines += [f"  {name:12} {routing[name]:.3f}   {meaning}" for name, meaning in READINGS.items()]
        lines += ["  most similar:", *(f"    {cosine:.3f}  {a}, {b}" for cosine, a, b in _closest(routing))]
    for name, one in found.get("alignment", {}).items():
        steps = one["steps"]
        lowest, level = (steps[-1][key] for key in ("cosine_if_cancelling", "coherence_if_orthogonal"))
        lines.append(f"alignment of {name}: mean of {len(steps)} measurements up to step {steps[-1]['step']}")
        lines += [
            f"  {space:9}  cosine {mean['mean_cosine']:+.4f} (cancelling {lowest:+.4f})   "
            f"coherence {mean['coherence']:.4f} (orthogonal {level:.4f})"
            for space, mean in one["mean"].items()
        ]
    return lines


READINGS = {
    "discreteness": "0: skills are on or off, 1: undecided",
    "sparsity": "share of skills that are on",
    "usage": "0: one skill serves all tasks, 1: all skills serve equally",
}


def _closest(routing: Mapping[str, Any], most: int = 3) -> list[tuple[float, str, str]]:
    """Return the most similar pairs of tasks."""
    names, similarity = routing["tasks"], routing["similarity"]
    pairs = [(similarity[i][j], names[i], names[j]) for i, j in combinations(range(len(names)), 2)]
    return sorted(pairs, reverse=True)[:most]


def _routing(source: Path, required: bool) -> RoutingTable | None:
    """Read the table of a folder or of a run's `model/`; None if there is none and none is required."""
    folder = source / "model" if (source / "model").is_dir() else source
    try:
        return read_routing(folder)
    except (CheckpointError, RoutingError):
        if required:
            raise
        return None


def _trajectories(source: Path, beside: Sequence[str | Path]) -> dict[str, list[dict[str, Any]]]:
    """Read the alignment over steps of the runs that recorded it, by name."""
    folders = [source] if (source / ALIGNMENT).is_file() else []
    found = {}
    for folder in [*folders, *map(Path, beside)]:
        name = folder.resolve().name
        try:
            found[str(folder) if name in found else name] = read_trajectory(folder / ALIGNMENT)
        except FileNotFoundError as error:
            raise DataError(f"'{folder}' has no {ALIGNMENT}: no alignment was recorded there.") from error
        except ValueError as error:
            raise DataError(f"'{folder / ALIGNMENT}' is damaged: {error}.") from error
    return found
