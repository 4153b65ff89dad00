"""Task ids, read and checked on the host before anything runs: which routing row each row of a batch uses."""

from __future__ import annotations

__all__ = ["AVERAGE", "Groups", "Ids", "read_ids"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from thawline.errors import RoutingError, did_you_mean
from thawline.tuners.mhr.config import MHRConfig


@dataclass(frozen=True, eq=False)
class Groups:
    """Assignment of a batch's rows to routing rows: equal-sized groups of consecutive rows use one each.

    Attributes:
        rows: (U,) int64, the distinct routing rows, each mixed once.
        index: (groups,) int64, position in `rows` that each group uses; `None` where group g uses position g.
        n: number of groups.
        by_token: every token is a group.
    """

    rows: Tensor
    index: Tensor | None
    n: int
    by_token: bool = False


AVERAGE = Groups(torch.zeros(1, dtype=torch.int64), None, 1)
"""Assignment for routers without rows: every row of the batch uses the average of the skills."""


class Ids:
    """Task ids of one batch.

    Attributes:
        batch: number of rows with an id; `None` for a single id that serves any number of rows.
        tokens: number of ids per row; `None` where a row has one id.
        highest: the largest id.
        groups: the rows grouped by task.
        n_distinct: number of different tasks.
        names: names of all tasks, if ids were given by name and so mean nothing in a table of other names.
    """

    def __init__(
        self,
        ids: Sequence[int],
        batch: int | None,
        tokens: int | None,
        device: torch.device,
        names: Sequence[str] | None = None,
    ) -> None:
        self.batch, self.tokens, self.names = batch, tokens, names
        self.key = (tuple(ids), tokens)
        self.highest = max(ids)
        # Consecutive rows of one task form one group: beams, and batches sorted by task, need no indexing.
        run = 1 if tokens else math.gcd(*(len(list(same)) for _, same in groupby(ids)))
        per_group = list(ids[::run])
        distinct = list(dict.fromkeys(per_group))
        self.n_distinct = len(distinct)
        rows, index, n = _int64(distinct, device), None, len(per_group)
        if len(distinct) == 1:
            n = 1
        elif len(distinct) < n or tokens:
            position = {row: number for number, row in enumerate(distinct)}
            index = _int64([position[row] for row in per_group], device)
        self.groups = Groups(rows, index, n, by_token=index is not None and tokens is not None)
        self._examples = Groups(_int64(ids, device), None, len(ids))

    def examples(self, rows: int) -> Groups:
        """Return one group per example, for noise drawn per example; a single id has `rows` examples."""
        if self.batch is None and self._examples.n != rows:
            self._examples = Groups(_int64(self.key[0] * rows, self.groups.rows.device), None, rows)
        return self._examples

    def check_table(self, n_tasks: int) -> None:
        """Raises: RoutingError: if an id is not in a table of `n_tasks` rows."""
        if self.highest >= n_tasks:
            raise RoutingError(
                f"Task id {self.highest} is not in the routing table, which has rows 0 to {n_tasks - 1}."
                " Add tasks with thawline.add_tasks(model, names)."
            )

    def check_packed(self, shape: torch.Size) -> None:
        """Raises: RoutingError: if a layer's input (..., I) does not have one token per id."""
        if shape[:-1].numel() != (self.batch or 0) * (self.tokens or 0):
            raise RoutingError(
                f"Task ids for {self.batch} rows of {self.tokens} tokens, but a layer's input has"
                f" {tuple(shape[:-1])}. Give one id per token, or one per row."
            )

    def check_rows(self, rows: int, expanded: bool, what: str) -> None:
        """Check that there is an id for each of `rows` rows.

        Args:
            expanded: accept a multiple: `generate` repeats each row for its beams.
            what: name of the tensor with these rows, for the message.
        Raises: RoutingError.
        """
        if self.batch is None or rows == self.batch or (expanded and rows % self.batch == 0):
            return
        raise RoutingError(
            f"{self.batch} task ids for {rows} rows of {what}. Give one id per row"
            + ("" if expanded else " (only generate repeats rows)")
            + ", or a single id for all of them."
        )


def read_ids(ids: Any, config: MHRConfig, device: torch.device) -> Ids:
    """Parse task ids in any form a user may give them.

    Args:
        ids: an id or a name, for any number of rows; a sequence or tensor (batch,) of them; or (batch,
            tokens) for packed rows. (batch, 1) is read as (batch,).
        config: config of the adapter, with the size of its table and its task names.
        device: device of the routing table.
    Raises: RoutingError: for ids that are misshapen, not integers, negative, too large, or unknown names.
    """
    if isinstance(ids, Tensor) and (ids.is_floating_point() or ids.dtype is torch.bool):
        raise RoutingError(f"Task ids are {ids.dtype}; expected integers, e.g. torch.int64.")
    plain, batch = _plain(ids), None
    if isinstance(plain, str | int) and not isinstance(plain, bool):
        rows = [[plain]]
    elif isinstance(plain, Sequence) and len(plain) > 0:
        rows = [
            list(row) if isinstance(row, Sequence) and not isinstance(row, str) else [row]
            for row in map(_plain, plain)
        ]
        batch = len(rows)
    else:
        raise RoutingError(
            f"Task ids {_brief(ids)}: expected one per row of the batch, or one per token of each row."
        )
    tokens = len(rows[0])
    if tokens == 0 or any(len(row) != tokens for row in rows):
        raise RoutingError(
            f"Task ids {_brief(ids)}: rows of {sorted({len(row) for row in rows})} ids. Expected one id per"
            " row, or one per token of each row, with all rows of the same length."
        )
    flat = [_plain(one) for row in rows for one in row]
    names = config.task_names if any(isinstance(one, str) for one in flat) else None
    numbers = [_number(one, config) for one in flat]
    found = Ids(numbers, batch, tokens if tokens > 1 else None, device, names)
    found.check_table(config.n_tasks or 1)
    return found


def _plain(ids: Any) -> Any:
    """Convert a tensor or array, or an element of one, to Python numbers and lists."""
    return ids.tolist() if hasattr(ids, "tolist") else ids


def _number(one: Any, config: MHRConfig) -> int:
    if isinstance(one, str):
        names = config.task_names or []
        if one not in names:
            hint = "This model's tasks have no names: give MHRConfig task_names, or use the task's number."
            raise RoutingError(f"Unknown task {one!r}. {did_you_mean(one, names) if names else hint}")
        return names.index(one)
    if not isinstance(one, int) or isinstance(one, bool):
        raise RoutingError(f"Task id {one!r} is a {type(one).__name__}; expected an integer or a task name.")
    if one < 0:
        raise RoutingError(f"Task id {one} is negative; ids run from 0 to {(config.n_tasks or 1) - 1}.")
    return one


def _int64(values: Sequence[int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # tensors made in inference mode could never be saved for a backward
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _brief(ids: Any) -> str:
    text = repr(tuple(ids.shape)) if isinstance(ids, Tensor) else repr(ids)
    return text if len(text) < 80 else f"{text[:77]}..."
