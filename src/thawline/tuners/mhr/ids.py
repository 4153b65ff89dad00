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
    """How the rows of a batch share routing rows. Equal-sized groups of consecutive rows use one each.

    Attributes:
        rows: (U,) int64, routing rows to mix.
        index: (groups,) int64, which of `rows` each group uses; `None` where group g uses row g.
        n: number of groups, or of tokens.
        by_token: the groups are tokens.
    """

    rows: Tensor
    index: Tensor | None
    n: int
    by_token: bool = False


AVERAGE = Groups(torch.zeros(1, dtype=torch.int64), None, 1)
"""Where rows do not matter: every row uses the average of the skills."""


class Ids:
    """Task ids of one batch.

    Attributes:
        batch: how many rows they are for; `None` for one id that is for any number of rows.
        tokens: how many tokens each row has an id for; `None` where a row has one id.
        highest: the largest id.
        groups: distinct routing rows, each mixed once.
        examples: one routing row per example, for noise that is drawn per example.
        n_distinct: how many tasks there are.
        names: of all tasks, where ids were given by name: a table of other names would mean others.
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
        # Tensors made in inference mode could never be saved for a backward.
        with torch.inference_mode(False):
            # Rows of one task in a row are one group: beams, and batches sorted by task, need no indexing.
            run = 1 if tokens else math.gcd(*(len(list(same)) for _, same in groupby(ids)))
            per_group = list(ids[::run])
            distinct = list(dict.fromkeys(per_group))
            self.n_distinct = len(distinct)
            where = {row: place for place, row in enumerate(distinct)}
            rows = _int64(distinct, device)
            if len(distinct) == 1:
                self.groups = Groups(rows, None, 1)
            elif len(distinct) == len(per_group) and tokens is None:
                self.groups = Groups(rows, None, len(per_group))
            else:
                index = _int64([where[row] for row in per_group], device)
                self.groups = Groups(rows, index, len(per_group), by_token=tokens is not None)
            self.examples = Groups(_int64(ids, device), None, len(ids))

    def check_table(self, n_tasks: int) -> None:
        """Raises: RoutingError: if an id is not in a table of `n_tasks` rows."""
        if self.highest >= n_tasks:
            raise RoutingError(
                f"Task id {self.highest} is not in the routing table, which has rows 0 to {n_tasks - 1}."
                " Add tasks with thawline.add_tasks(model, names)."
            )

    def check_packed(self, shape: torch.Size) -> None:
        """Raises: RoutingError: if a layer's input (..., I) has another number of tokens than the ids."""
        if shape[:-1].numel() != (self.batch or 0) * (self.tokens or 0):
            raise RoutingError(
                f"Task ids for {self.batch} rows of {self.tokens} tokens, but a layer's input has"
                f" {tuple(shape[:-1])}."
                " Give one id per token, or one per row."
            )

    def repeated(self, rows: int) -> Ids:
        """One id for `rows` rows, each of them in a group of its own."""
        return Ids(self.key[0] * rows, rows, None, self.groups.rows.device)

    def check_rows(self, rows: int, expanded: bool, what: str) -> None:
        """Check that there is an id for each of `rows` rows.

        Args:
            expanded: accept a multiple: `generate` repeats each row for its beams.
            what: what has these rows, for the message.
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
    """Work out what a user gives as task ids.

    Args:
        ids: an id or a name, for any number of rows; a sequence or tensor (batch,) of them; or (batch,
            tokens) for packed rows. (batch, 1) is (batch,).
        config: of the adapter whose table and task names are meant.
        device: where the rows will be looked up.
    Raises: RoutingError: for ids that are misshapen, no whole numbers, negative, too large, or unknown names.
    """
    if isinstance(ids, str | int) and not isinstance(ids, bool):
        number = _number(ids, config)
        found = Ids([number], None, None, device, config.task_names if isinstance(ids, str) else None)
    else:
        nested = _plain(ids)
        if isinstance(ids, Tensor) and (ids.is_floating_point() or ids.dtype is torch.bool):
            raise RoutingError(f"Task ids are {ids.dtype}; expected whole numbers, e.g. torch.int64.")
        if isinstance(nested, int) and not isinstance(nested, bool):
            return read_ids(nested, config, device)
        if not isinstance(nested, Sequence) or len(nested) == 0:
            raise RoutingError(
                f"Task ids {_brief(ids)}: expected one per row of the batch, or one per token of each row."
            )
        rows = [
            list(row) if isinstance(row, Sequence) and not isinstance(row, str) else [row]
            for row in map(_plain, nested)
        ]
        tokens = len(rows[0])
        if tokens == 0 or any(len(row) != tokens for row in rows):
            raise RoutingError(
                f"Task ids {_brief(ids)}: rows of {sorted({len(row) for row in rows})} ids. Expected one id"
                " per row,"
                " or one per token of each row, all rows of a length."
            )
        each = [_plain(one) for row in rows for one in row]
        names = config.task_names if any(isinstance(one, str) for one in each) else None
        numbers = [_number(one, config) for one in each]
        found = Ids(numbers, len(rows), tokens if tokens > 1 else None, device, names)
    found.check_table(config.n_tasks or 1)
    return found


def _plain(ids: Any) -> Any:
    """Python's own numbers and lists of what a tensor, an array, or an element of one holds."""
    return ids.tolist() if hasattr(ids, "tolist") else ids


def _number(one: Any, config: MHRConfig) -> int:
    if isinstance(one, str):
        names = config.task_names or []
        if one not in names:
            known = (
                did_you_mean(one, names)
                if names
                else "This model's tasks go by number: give MHRConfig task_names."
            )
            raise RoutingError(f"Unknown task {one!r}. {known}")
        return names.index(one)
    if not isinstance(one, int) or isinstance(one, bool):
        raise RoutingError(
            f"Task id {one!r} is a {type(one).__name__}; expected a whole number or a task's name."
        )
    if one < 0:
        raise RoutingError(f"Task id {one} is negative; ids run from 0 to {(config.n_tasks or 1) - 1}.")
    return one


def _int64(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _brief(ids: Any) -> str:
    text = repr(tuple(ids.shape)) if isinstance(ids, Tensor) else repr(ids)
    return text if len(text) < 80 else f"{text[:77]}..."
