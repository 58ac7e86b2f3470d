"""What an engine counts, as a dictionary and as a page for Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import Any

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: the upper ends of the histogram's buckets."""


class Counters:
    """Since the engine was made.

    Attributes:
        requests: that were made, refused ones included. answers: with an output. errors: by class. refused: the queue
            was full, or the engine closed. cancelled: by who asked.
        batches, samples: that ran. loads: of tasks' files. evictions: tasks that made room for others.
        latencies: answers by bucket of :data:`BOUNDS`, and one more for those above; seconds: their sum.
    """

    def __init__(self) -> None:
        self.requests = self.answers = self.refused = self.cancelled = 0
        self.batches = self.samples = self.loads = self.evictions = 0
        self.errors: Counter[str] = Counter()
        self.latencies = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def answered(self, seconds: float) -> None:
        self.answers += 1
        self.seconds += seconds
        self.latencies[bisect_left(BOUNDS, seconds)] += 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("requests", "answers", "refused", "cancelled", "batches", "samples", "loads", "evictions")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        buckets = {str(bound): count for bound, count in zip((*BOUNDS, "inf"), self.latencies, strict=True)}
        latency = {"buckets": buckets, "sum": self.seconds, "count": self.answers}
        mean = self.samples / self.batches if self.batches else 0.0
        return {**found, "errors": dict(self.errors), "samples_per_batch": mean, "latency": latency}


_COUNTERS = {
    "requests": "Requests, refused ones included.",
    "answers": "Requests that were answered with an output.",
    "refused": "Requests that found the queue full, or the engine closed.",
    "cancelled": "Requests that were cancelled by who made them.",
    "batches": "Forwards.",
    "samples": "Samples in forwards.",
    "loads": "Task files that were loaded.",
    "evictions": "Tasks that left memory to make room.",
}
_GAUGES = {
    "resident_tasks": "Tasks in memory.",
    "resident_bytes": "Bytes of the tasks in memory, and of what they share.",
    "queued_samples": "Samples that wait.",
}


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def to_text(stats: Mapping[str, Any]) -> str:
    """`Engine.stats()` in the text format of Prometheus, version 0.0.4."""
    lines: list[str] = []

    def metric(name: str, kind: str, help: str, *samples: tuple[str, Any]) -> None:
        lines.extend((f"# HELP taps_{name} {help}", f"# TYPE taps_{name} {kind}"))
        lines.extend(f"taps_{name}{suffix} {value}" for suffix, value in samples)

    for name, help in _COUNTERS.items():
        metric(f"{name}_total", "counter", help, ("", stats[name]))
    errors = [(f'{{kind="{_escaped(kind)}"}}', count) for kind, count in sorted(stats["errors"].items())]
    metric("errors_total", "counter", "Requests that were answered with an error, by its class.", *errors)
    for name, help in _GAUGES.items():
        metric(name, "gauge", help, ("", stats[name]))
    latency, total, buckets = stats["latency"], 0, []
    for bound, count in latency["buckets"].items():
        total += count
        buckets.append((f'_bucket{{le="{"+Inf" if bound == "inf" else bound}"}}', total))
    ends = (("_sum", latency["sum"]), ("_count", latency["count"]))
    metric("latency_seconds", "histogram", "From a request to its answer.", *buckets, *ends)
    return "\n".join(lines) + "\n"
