"""Where a step's time and memory go: bytes in use over time, and layers against the machine's roofs."""

from __future__ import annotations

from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING

from .canvas import new_figure

if TYPE_CHECKING:
    from ..profiling import Profile

_COLOURS = {"open": "tab:orange", "closed": "tab:blue", "device": "tab:green"}


def profile_picture(path: str | PathLike[str], found: Profile) -> None:
    """Draw a profile into a PNG. Raises ConfigError where matplotlib is not installed."""
    figure = new_figure(11.0, 4.4)
    over_time, roofs = figure.subplots(1, 2)

    times = [time for time, _ in found.timeline]
    mib = [count / 2**20 for _, count in found.timeline]
    over_time.fill_between(times, mib, step="post", alpha=0.35)
    over_time.step(times, mib, where="post", linewidth=1)
    level = 0.0
    for name, value in asdict(found.memory).items():
        if (
            name in ("weights", "deltas", "task", "optimizer", "inputs", "workspace")
            and value > 0.02 * found.memory.peak
        ):
            level += value / 2**20
            over_time.axhline(level, color="grey", linewidth=0.7, linestyle="--")
            over_time.text(0.01, level, name, transform=over_time.get_yaxis_transform(), va="top", fontsize=8)
    over_time.set(
        xlabel="ms, slowed by watching", ylabel="MiB in use", ylim=(0, None), title=f"{found.phase} step, memory"
    )

    machine = found.machine
    rows = [row for row in found.rows if row.seconds and row.moved]
    for gate, colour in _COLOURS.items():
        mine = [row for row in rows if row.gate == gate]
        if mine:
            roofs.scatter(
                [row.operations / row.moved for row in mine],
                [row.operations / row.seconds / 1e9 for row in mine],
                s=14,
                color=colour,
                label=gate,
            )
    ridge = machine.rate / machine.bandwidth
    ends = [min([ridge / 8, *(row.operations / row.moved for row in rows)]), ridge]
    ends.append(max([8 * ridge, *(row.operations / row.moved for row in rows)]))
    roofs.plot(ends, [min(machine.rate, machine.bandwidth * x) / 1e9 for x in ends], color="black", linewidth=1)
    roofs.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte",
        ylabel="GFLOP/s",
        title=f"gated layers against the measured roofs of {found.device}",
    )
    if rows:
        roofs.legend(fontsize=8)
    figure.savefig(path, dpi=130)
