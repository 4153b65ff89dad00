"""Plots of routing and alignment as PNG files: weights by task and skill, tasks by similarity, curves."""

from __future__ import annotations

__all__ = ["draw_alignment", "draw_routes", "draw_tasks", "order_tasks"]

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thawline.analysis.routing import RoutingTable, task_similarity
from thawline.errors import MissingExtraError
from thawline.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 12
MOST_COLUMNS = 48
"""Maximum heads × skills of a panel; beyond it only some heads are drawn."""
ROW_INCHES = 0.2
NAMED_ROWS = 150
"""Maximum number of tasks that are named."""
DPI = 120


def order_tasks(similarity: Tensor) -> tuple[list[int], np.ndarray]:
    """Order tasks so that similar ones are neighbours, by average linkage on 1 − cosine.

    Args:
        similarity: cosines of the tasks, (K, K).
    Returns: the order, and scipy's linkage matrix (K − 1, 4); both trivial for a single task.
    Raises: MissingExtraError: without scipy.
    """
    try:
        from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
        from scipy.spatial.distance import squareform
    except ImportError as error:
        raise MissingExtraError("Ordering tasks", "scipy", "analysis") from error
    if len(similarity) == 1:
        return [0], np.empty((0, 4))
    distances = squareform((1 - similarity).clamp(min=0).fill_diagonal_(0).numpy(), checks=False)
    tree = optimal_leaf_ordering(linkage(distances, "average"), distances)
    return [int(leaf) for leaf in leaves_list(tree)], tree


def draw_routes(table: RoutingTable, file: Path) -> Path:
    """Draw a heat map of weights per part of the model, tasks × skills, in the order of `order_tasks`.

    Parts and heads are not averaged: their routes are unrelated. Of more than 12 parts 12 are drawn, spread
    evenly over the model; of many heads those in which tasks differ most.
    """
    order, _ = order_tasks(task_similarity(table)[0])
    parts = _spread(list(table.weights), MOST_PANELS)
    # The common beginning of all names, up to a dot, is left out.
    n_shared = commonprefix(parts).rfind(".") + 1 if len(parts) > 1 else 0  # noqa: RUF071
    n_columns = min(len(parts), 4)
    n_rows = -(-len(parts) // n_columns)
    figure = _figure(2.6 * n_columns + 1.8, n_rows * (_height(len(order)) + 0.7))
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    drawn = [table.weights[part][order][:, _most_different_heads(table.weights[part])] for part in parts]
    colours = {"vmin": 0, "vmax": max(float(weights.max()) for weights in drawn), "cmap": "viridis"}
    for axes, part, weights_KHS in zip(grid.flat, parts, drawn, strict=False):
        n_heads, n_skills = weights_KHS.shape[1:]
        image = axes.imshow(weights_KHS.flatten(1).numpy(), aspect="auto", interpolation="nearest", **colours)
        for head in range(1, n_heads):
            axes.axvline(head * n_skills - 0.5, color="white", linewidth=1.5)
        n_all = table.weights[part].shape[1]
        heads = f"{n_heads} heads" if n_heads == n_all else f"{n_heads} of {n_all} heads"
        axes.set_title(_short(part[n_shared:] or "all layers"), fontsize=8)
        axes.set_xlabel(f"{n_skills} skills" if n_all == 1 else f"{heads} × {n_skills} skills", fontsize=7)
        axes.set_xticks([])
        _name_rows(axes, [table.tasks[i] for i in order] if axes in grid[:, 0] else [])
    for axes in grid.flat[len(parts) :]:
        axes.axis("off")
    figure.colorbar(image, ax=grid, label="weight", shrink=0.6, pad=0.02, aspect=40)
    return _save(figure, file)


def draw_tasks(table: RoutingTable, file: Path) -> Path:
    """Draw a dendrogram of the tasks and, in the same order, their similarity."""
    from scipy.cluster.hierarchy import dendrogram

    similarity, _ = task_similarity(table)
    order, tree = order_tasks(similarity)
    side = max(_height(len(order)), 2.5)
    figure = _figure(side * 1.4 + 3.6, side + 0.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.5))
    if len(order) > 1:
        drawn = dendrogram(tree, no_plot=True)
        for places, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True):
            # scipy puts leaf n at 10 n + 5.
            left.plot(heights, [(place - 5) / 10 for place in places], color="0.3", linewidth=1)
    left.set_xlabel("1 − cosine of routing rows", fontsize=8)
    left.set_ylim(len(order) - 0.5, -0.5)
    left.invert_xaxis()
    left.set_yticks([])
    left.tick_params(labelsize=7)
    left.spines[["left", "top", "right"]].set_visible(False)
    names = [table.tasks[i] for i in order]
    # Left blank, the diagonal leaves the colours to what differs.
    others = similarity[order][:, order].clone().fill_diagonal_(float("nan"))
    image = right.imshow(others.numpy(), cmap="magma", aspect="auto", interpolation="nearest")
    right.set_xticks([])
    _name_rows(right, names, on_the_right=True)
    figure.colorbar(
        image, ax=right, label="cosine, mean over layers", shrink=0.6, location="bottom", pad=0.03
    )
    return _save(figure, file)


def draw_alignment(trajectories: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> Path:
    """Draw coherence over steps in both spaces, a line per run, with the level of orthogonal gradients.

    Args:
        trajectories: name of a run → rows of an `AlignmentRecorder`.
    """
    figure = _figure(8.4, 3.2)
    grid = figure.subplots(1, 2, sharey=True)
    for axes, space in zip(grid, ("skill", "effective"), strict=True):
        for name, rows in trajectories.items():
            steps = [row["step"] for row in rows]
            mark = "o" if len(steps) < 3 else None
            axes.plot(steps, [row[space]["coherence"] for row in rows], label=name, marker=mark, markersize=4)
        levels = {row["coherence_if_orthogonal"] for rows in trajectories.values() for row in rows}
        for level in levels:
            axes.axhline(level, color="0.6", linestyle=":", linewidth=1)
            place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            axes.annotate("orthogonal", (1, level), fontsize=7, color="0.4", **place)
        axes.set_title(f"{space} space", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("coherence of the tasks' gradients", fontsize=8)
    grid[0].set_ylim(bottom=0)
    if len(trajectories) > 1:
        grid[1].legend(fontsize=7, frameon=False)
    return _save(figure, file)


def _most_different_heads(weights_KHS: Tensor) -> Tensor:
    """Return the heads in which tasks differ most, in their order, as many as a panel holds."""
    n_heads, n_skills = weights_KHS.shape[1:]
    most = max(MOST_COLUMNS // n_skills, 1)
    if n_heads <= most:
        return torch.arange(n_heads)
    return weights_KHS.var(0, correction=0).sum(-1).topk(most).indices.sort().values


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Drawing routes and alignment", "matplotlib", "analysis") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, file: Path) -> Path:
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    return file


def _name_rows(axes: Any, names: Sequence[str], on_the_right: bool = False) -> None:
    shown = [_short(name) for name in names] if len(names) <= NAMED_ROWS else []
    axes.set_yticks(range(len(shown)), shown, fontsize=7)
    if on_the_right:
        axes.yaxis.tick_right()
    axes.tick_params(length=0)


def _height(n_rows: int) -> float:
    """Return the height of rows in inches, within bounds."""
    return min(max(ROW_INCHES * n_rows, 1.2), 24.0)


def _spread(names: list[str], most: int) -> list[str]:
    """Return at most `most` of the names, evenly spaced, including the first and the last."""
    places = np.linspace(0, len(names) - 1, min(len(names), most)).round().astype(int)
    return [names[place] for place in places]


def _short(name: str, most: int = 30) -> str:
    """Cut a name in the middle: modules and tasks differ at the beginning and the end."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"
