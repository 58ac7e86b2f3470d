"""What was measured: seconds of every variant, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .cases import describe


@dataclass(frozen=True)
class Result:
    """What came of a case. `seconds`: medians by variant; "taps" is ours, "stock" the least that a task could cost.

    `limit`: the seconds that this machine needs at least for the operations and bytes, or None where it was not asked.
    `ratios`: to the stock op in each of several passes, the lowest first; empty where there was one. `predicted`: the
    path was picked by a threshold that nobody has measured yet (docs/choose.md).
    """

    group: str
    layer: str
    rows: int
    dtype: torch.dtype
    path: str | None
    seconds: dict[str, float]
    limit: float | None
    ratios: tuple[float, ...] = ()
    predicted: bool = False

    @property
    def ratio(self) -> float:
        """Time over the stock op on whole weights."""
        return self.seconds["taps"] / self.seconds["stock"]

    @property
    def alternative(self) -> str | None:
        """The fastest of what one would write without this package."""
        others = [name for name in self.seconds if name not in ("taps", "stock")]
        return min(others, key=lambda name: self.seconds[name], default=None)

    @property
    def against(self) -> float | None:
        """Time over that alternative."""
        return None if self.alternative is None else self.seconds["taps"] / self.seconds[self.alternative]

    @property
    def share(self) -> float | None:
        """Of the machine's limit that was reached."""
        return None if self.limit is None else self.limit / self.seconds["taps"]

    @property
    def name(self) -> str:
        return describe(self.group, self.layer, self.rows, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with what follows from the seconds."""
        derived: dict[str, Any] = {
            "name": self.name,
            "ratio": self.ratio,
            "alternative": self.alternative,
            "against": self.against,
            "share": self.share,
        }
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch."), **derived}


def combined(passes: Sequence[Result]) -> Result:
    """One of several of the same case: every variant by its median share of the stock op's time.

    What slows a machine for a while slows a whole pass, and with it both sides of a share.
    """
    first, *more = passes
    if not more:
        return first
    stock = statistics.median(found.seconds["stock"] for found in passes)
    shares = {
        name: statistics.median(found.seconds[name] / found.seconds["stock"] for found in passes)
        for name in first.seconds
    }
    ratios = tuple(sorted(found.ratio for found in passes))
    return replace(first, seconds={name: stock * share for name, share in shares.items()}, ratios=ratios)


HEADER = ("layer", "rows", "type", "path", "ms", "/ stock", "/ best alternative", "% of limit")


def cells(result: Result) -> list[str]:
    """A result as a row of a table."""
    against = "" if result.against is None else f"{result.against:.2f} ({result.alternative})"
    return [
        result.layer,
        str(result.rows),
        str(result.dtype).removeprefix("torch."),
        (result.path or "") + (" (predicted)" if result.predicted else ""),
        f"{1e3 * result.seconds['taps']:.3g}",
        f"{result.ratio:.2f}" + (f" ({result.ratios[0]:.2f}-{result.ratios[-1]:.2f})" if result.ratios else ""),
        against,
        "" if result.share is None else f"{100 * result.share:.0f}",
    ]


def table(results: Sequence[Result]) -> str:
    """The results in Markdown, one table for each group."""
    lines: list[str] = []
    for group in dict.fromkeys(result.group for result in results):
        lines += [f"### {group}", "", f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
        lines += [f"| {' | '.join(cells(result))} |" for result in results if result.group == group]
        lines.append("")
    return "\n".join(lines).rstrip()
