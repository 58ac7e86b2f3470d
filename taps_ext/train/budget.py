"""Which layers are open within a budget of weights."""

from __future__ import annotations

import torch

from ..model import Report
from ..model.state import TaskState


def chosen(report: Report, budget: float) -> set[str]:
    """The learned layers with the largest scores that fit together into a share `budget` of the gated weights.

    In the order of their scores, each that still fits beside those before it. Layers of fixed open gates count first.
    """
    total = sum(row.parameters for row in report.rows if row.score is None and row.open)
    learned = [row for row in report.rows if row.score is not None]
    kept = set()
    for row in sorted(learned, key=lambda row: -(row.score or 0.0)):
        if (total + row.parameters) / max(1, report.gated) <= budget:  # as `Report.share` divides
            kept.add(row.layer)
            total += row.parameters
    return kept


@torch.no_grad()
def settle(state: TaskState, report: Report, budget: float) -> None:
    """Open the layers that :func:`chosen` names and close the others, moving a score just across its threshold."""
    kept, opened = chosen(report, budget), {row.layer for row in report.rows if row.open}
    for name, _, gate in state.learned():
        if gate.score is None or (name in kept) == (name in opened):
            continue
        threshold = gate.score.new_tensor(gate.threshold)
        toward = torch.full_like(threshold, torch.inf if name in kept else -torch.inf)
        gate.score.copy_(torch.nextafter(threshold, toward))  # beyond it also where fp32 rounds it
    state.refresh()
