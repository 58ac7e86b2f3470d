"""Report: which layers a task changed, and what each of them holds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..base.scan import inside
from .state import TaskState


@dataclass(frozen=True)
class Row:
    """One gated layer.

    Attributes:
        layer: its name. open: its gate. score: None for a fixed gate. parameters: the base's weights there.
        own: the values that the task holds in their place or beside them while it is open. bytes: what these take.
        change: their kind ("dense", "lowrank", ...), or "" for a layer that is closed for good.
    """

    layer: str
    open: bool
    score: float | None
    parameters: int
    bytes: int
    own: int = 0
    change: str = ""


@dataclass(frozen=True)
class Report:
    """What one task adds to the base.

    Attributes:
        rows: the gated layers in module order.
        gated: weights in gated layers. open: those in open ones. share: open / gated.
        norms, others, head: the task's own further values (parameters; buffers are not counted).
        parameters: all trainable values that the task adds: open Deltas, norms, others and head.
        base_parameters: parameters of the base.
        shared: the values that the task's family holds for all of its tasks.
        left: by name, the values of the base's parameters that stay the base's under this task, the largest first: of
            those with more than a thousandth of all, each. frozen: of all parameters that were frozen before the base
            was adapted, and so stay the base's.
    """

    task: str
    method: str
    rows: list[Row] = field(repr=False)
    gated: int
    open: int
    norms: int
    others: int
    head: int
    base_parameters: int
    shared: int = 0
    left: dict[str, int] = field(default_factory=dict, repr=False)
    frozen: int = 0

    @property
    def reached(self) -> float:
        """The share of the base's parameters that lie in gated layers, in [0, 1]."""
        return self.gated / self.base_parameters if self.base_parameters else 0.0

    @property
    def share(self) -> float:
        """The share of the gated weights that are open, in [0, 1]."""
        return self.open / self.gated if self.gated else 0.0

    @property
    def parameters(self) -> int:
        """All values that the task adds."""
        return sum(row.own for row in self.rows) + self.norms + self.others + self.head

    @property
    def bytes(self) -> int:
        """What the open layers store."""
        return sum(row.bytes for row in self.rows)

    @property
    def layers_open(self) -> int:
        """How many gated layers are open."""
        return sum(row.open for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every attribute and total, the rows among them."""
        extra = {name: getattr(self, name) for name in ("share", "reached", "parameters", "bytes", "layers_open")}
        return {**asdict(self), **extra}

    def to_json(self, **kwargs: Any) -> str:
        """:meth:`to_dict` as text; `kwargs` are those of `json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    def table(self) -> str:
        """A plain-text table with a line for each layer and the totals."""
        width = max([5, *(len(row.layer) for row in self.rows)])
        lines = [f"{'layer':<{width}}  gate    score   parameters        bytes"]
        for row in self.rows:
            score = "  fixed" if row.score is None else f"{row.score:7.4f}"
            state = "open  " if row.open else "closed"
            lines.append(f"{row.layer:<{width}}  {state} {score} {row.parameters:12,} {row.bytes:12,}")
        lines.append(
            f"{self.task} ({self.method}): {self.layers_open} of {len(self.rows)} layers open, "
            f"{100 * self.share:.1f} % of {self.gated:,} gated weights; norms {self.norms:,}, "
            f"others {self.others:,}, head {self.head:,}; base {self.base_parameters:,}"
            + (f"; shared with its family {self.shared:,}" if self.shared else "")
        )
        lines.append(f"{100 * self.reached:.1f} % of the base's parameters lie in gated layers")
        if self.frozen:
            lines[-1] += f"; {self.frozen:,} were frozen by the user and stay the base's"
        for name, count in self.left.items():
            lines.append(f"  the base's own: {name} {count:,}")
        return "\n".join(lines)

    __str__ = table


def make_report(name: str, state: TaskState, base: nn.Module) -> Report:
    """The report of a task; reads the scores from their device."""
    open_layers = set(state.open_layers())
    rows = []
    for layer, part, gate in state.gated():
        held = part.changes() if layer in open_layers else []
        row = Row(
            layer=layer,
            open=layer in open_layers,
            score=gate.score.item() if gate.learn and gate.score is not None else None,
            parameters=gate.size,
            bytes=sum(parameter.nbytes for parameter in held),
            own=sum(parameter.numel() for parameter in held),
            change=part.change_kind,
        )
        rows.append(row)
    roles: Counter[str] = Counter()
    for own in state.table.values():
        for role, parameters in own.roles().items():
            roles[role] += sum(parameter.numel() for parameter in parameters)
    total = sum(p.numel() for p in base.parameters())
    return Report(
        task=name,
        method=state.config.method,
        rows=rows,
        gated=sum(row.parameters for row in rows),
        open=sum(row.parameters for row in rows if row.open),
        norms=roles["norm"],
        others=roles["bias"] + roles["other"],
        head=roles["head"],
        base_parameters=total,
        shared=0 if state.family is None else sum(p.numel() for p in state.family.parameters()),
        left=_left(state, base, total),
        frozen=sum(p.numel() for n, p in base.named_parameters() if n in state.reach.frozen and not _has(state, n)),
    )


def _has(state: TaskState, name: str) -> bool:
    """Whether a task, or its family, has a part that stands for a parameter of the base."""
    module, _, key = name.rpartition(".")
    if state.head_path is not None and inside(module, state.head_path):
        return True
    for table in (state.table, state.shared):
        part = table.get(module)
        if name in table or (part is not None and part.covers(key)):
            return True
    return False


def _left(state: TaskState, base: nn.Module, total: int) -> dict[str, int]:
    found = {n: p.numel() for n, p in base.named_parameters() if 1000 * p.numel() > total and not _has(state, n)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
