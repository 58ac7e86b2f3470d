"""Result: what training one task came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """What training one task came to. Metrics are those of the selected epoch (from 0)."""

    task: str
    epoch: int
    val: dict[str, float]
    test: dict[str, float]
    share: float
    layers_open: int
    within_budget: bool
    seconds: float
    file: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
