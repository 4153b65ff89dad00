"""Best scores of a run, which decide about best/ and about the restarts of the published stage 2."""

from __future__ import annotations

__all__ = ["Scores"]

import math
from dataclasses import dataclass


@dataclass
class Scores:
    """Results of the evaluations so far; saved with every checkpoint."""

    best: float = -math.inf
    """Best score of the run."""
    best_step: int = -1
    stretch_best: float = -math.inf
    """Best score since training last restarted from stage 1."""
    start_again: bool = False
    """The next epoch restarts from the best of stage 1."""

    def note(self, score: float, *, step: int, is_stage_2: bool) -> bool:
        """Record the score of an evaluation. Returns: whether it is the best of the run.

        In stage 2 a score that beats none of those since the last restart causes the next one.
        """
        is_best = score > self.best
        if is_best:
            self.best, self.best_step = score, step
        self.start_again = is_stage_2 and score <= self.stretch_best
        self.stretch_best = -math.inf if self.start_again else max(score, self.stretch_best)
        return is_best
