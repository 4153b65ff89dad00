"""Counts and times of requests, as text that Prometheus reads."""

from __future__ import annotations

__all__ = ["Metrics"]

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper ends of the histogram's buckets, seconds."""


class Metrics:
    """Metrics of a service in one process; `models` are the paths whose requests are timed."""

    def __init__(self, models: Sequence[str]) -> None:
        self.active = 0
        """Requests that are worked on or wait."""
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = dict.fromkeys(models, 0.0)
        self._buckets = {path: [0] * (len(BUCKETS) + 1) for path in models}

    def add(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request, and the time of one to a model."""
        self._requests[path, status] += 1
        if path in self._buckets:
            self._seconds[path] += seconds
            self._buckets[path][bisect_left(BUCKETS, seconds)] += 1

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        lines = [
            "# HELP thawline_requests_total Answered requests.",
            "# TYPE thawline_requests_total counter",
        ]
        lines += [
            f'thawline_requests_total{{path="{path}",status="{status}"}} {n}'
            for (path, status), n in sorted(self._requests.items())
        ]
        lines += ["# HELP thawline_request_seconds Time from a request's headers to its answer."]
        lines += ["# TYPE thawline_request_seconds histogram"]
        for path, counts in self._buckets.items():
            total = 0
            for end, n in zip([*BUCKETS, "+Inf"], counts, strict=True):
                total += n
                lines.append(f'thawline_request_seconds_bucket{{path="{path}",le="{end}"}} {total}')
            lines.append(f'thawline_request_seconds_sum{{path="{path}"}} {self._seconds[path]:.6f}')
            lines.append(f'thawline_request_seconds_count{{path="{path}"}} {total}')
        lines += ["# HELP thawline_active_requests Requests that are worked on or wait."]
        lines += ["# TYPE thawline_active_requests gauge", f"thawline_active_requests {self.active}"]
        return "\n".join(lines) + "\n"
