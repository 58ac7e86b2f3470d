"""Task streams (MTLoRA, arXiv 2403.20320): in the last block of a stage every task has rows of its own beside the
shared ones, which alone go on to the next stage.

Within such a block a tensor holds `(1 + T) * B` rows in its leading dimension: the shared stream's, then each task's.
A :class:`Streams` part makes and ends them; norms, activations and residuals between task layers see nothing but more
rows. A task layer (:class:`StreamLowRank`) runs the base's product once, on the shared rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..dense import streams
from ..errors import UnsupportedModuleError
from ..ops import mixed_lowrank
from ..store.record import Record
from .change import Change, register_change
from .gate import Gate
from .lowrank import LowRank
from .part import Below, Part, forward_of, register_part

ROLES = ("block", "last", "shared", "same", "widen", "merging")


def widened(input: Tensor, tasks: int) -> Tensor:
    """The rows of the shared stream, and the same for each task."""
    return input.unsqueeze(0).expand(1 + tasks, *input.shape).flatten(0, 1)


def shared_rows(input: Tensor, tasks: int) -> Tensor:
    """Those of the shared stream.

    Raises:
        UnsupportedModuleError: there are no streams in it.
    """
    rows, rest = divmod(input.shape[0], 1 + tasks)
    if rest:
        raise UnsupportedModuleError(
            f"task streams: expected (1 + {tasks}) * B rows in the leading dimension, got {list(input.shape)}"
        )
    return input.narrow(0, 0, rows)


# ------------------------------------------------------------------------------------ where streams begin and end


@register_part("streams")
class Streams(Part):
    """What one module has to do with the streams of a stage. It has no tensors.

    Args:
        role: "block" begins them at its input and ends them at its output, which remembers them; "last" begins them,
            and what follows it goes on with the tasks' rows alone. Within such a block "shared" hands the shared rows
            alone to its module, "widen" gives its result to all streams, and "same" does both. "merging" runs what a
            block's output remembers along.
        tasks: how many tasks there are.
    """

    alone: ClassVar[bool] = True
    rides: ClassVar[bool] = True

    def __init__(self, role: str, tasks: int = 1) -> None:
        super().__init__()
        if role not in ROLES:
            raise ValueError(f"role: expected one of {list(ROLES)}, got {role!r}")
        self.role, self.tasks = role, tasks

    def forward(self, below: Below, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], Tensor):
            got = type(args[0]).__name__ if args else "no positional argument"
            raise UnsupportedModuleError(
                f"task streams: expected a {type(below.host).__name__} that is called with a tensor first, got {got}"
            )
        input, rest, tasks = args[0], args[1:], self.tasks
        if self.role == "shared":
            return below(shared_rows(input, tasks), *rest, **kwargs)
        if self.role in ("same", "widen"):
            input = shared_rows(input, tasks) if self.role == "same" else input
            return widened(self._tensor(below, below(input, *rest, **kwargs)), tasks)
        if self.role == "merging":
            rows = streams.found(input)
            if rows is None:
                raise UnsupportedModuleError(
                    f"task streams: expected a {type(below.host).__name__} that is given what the block before it "
                    "returns, got another tensor; set merging=False to take a stage's features before it"
                )
            # Apart, so that the shared stream is what it is without tasks to the bit.
            shared = self._tensor(below, below(input, *rest, **kwargs))
            return streams.attach(shared, self._tensor(below, below(rows, *rest, **kwargs)))
        wide = widened(input, tasks)
        made = self._tensor(below, below(wide, *rest, **kwargs))
        if made.shape[0] != wide.shape[0]:
            raise UnsupportedModuleError(
                f"task streams: expected a {type(below.host).__name__} that returns {wide.shape[0]} rows for as many, "
                f"got {list(made.shape)}"
            )
        rows = made.narrow(0, len(input), tasks * len(input))
        return rows if self.role == "last" else streams.attach(made.narrow(0, 0, len(input)), rows)

    def _tensor(self, below: Below, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            kind = type(below.host).__name__
            raise UnsupportedModuleError(
                f"task streams: expected a {kind} that returns a tensor, got a {type(output).__name__}"
            )
        return output

    def reads(self, below: Below, key: str, enter: Any, *, fused: bool) -> Any:
        return below.parts[-1].reads(below.under, key, enter, fused=fused) if below.parts else NotImplemented

    @property
    def runs_host(self) -> bool:
        return False

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {}

    def covers(self, key: str) -> bool:
        return False

    def values(self, below: Below) -> dict[str, Tensor]:
        """None.

        Raises:
            UnsupportedModuleError: streams of which a merged task would have none.
        """
        if self.role == "block":
            raise UnsupportedModuleError(
                "expected a task whose layers lie in the last of its stages, where all that follows is the task's; "
                "behind this block the shared stream goes on without it, so that no one model is both"
            )
        return {}

    def merged(self, below: Below) -> Part:
        self.values(below)
        return below.parts[-1] if below.parts else Through()

    def record(self, *, open: bool) -> Record:
        return Record({"kind": self.kind, "role": self.role}, {})

    @classmethod
    def read(cls, record: Record, host: nn.Module, given: nn.Module | None = None) -> Streams:
        record.only("role")
        role = record.fact("role", str)
        if role not in ROLES:
            raise record.refuse(f"role: expected one of {list(ROLES)}, got {role!r}")
        return cls(role)

    def differs(self, other: Part) -> str | None:
        if not isinstance(other, Streams):
            return super().differs(other)
        return None if self.role == other.role else f"role: expected {other.role!r}, got {self.role!r}"

    def joins(self) -> Hashable:
        return self.kind, self.role

    @classmethod
    def joined(cls, parts: Sequence[Part], batch: int) -> Part:
        first = parts[0]
        assert isinstance(first, Streams)
        return cls(first.role, len(parts))


class Through(Part):
    """What lies below: in the place of streams that a merged task does without."""

    kind = "through"

    def forward(self, below: Below, *args: Any, **kwargs: Any) -> Any:
        return below(*args, **kwargs)

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {}


# ------------------------------------------------------------------------------------ low rank


def _check_share(dropout: Any) -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}")
    return float(dropout)


@register_change("lowrank-dropout")
class DropoutLowRank(LowRank):
    """:class:`LowRank` whose A sees a part of its inputs as zeros in training: `y = below(x) + scale * B A dropout(x)`.

    Args:
        dropout: the share of inputs, in [0, 1).

    Raises:
        ValueError: another share, rank or scale.
    """

    settings: ClassVar[tuple[str, ...]] = ("rank", "scale", "dropout")

    def __init__(
        self, host: nn.Module, *, rank: int, scale: float = 1.0, dropout: float = 0.0, held: bool = True
    ) -> None:
        self.dropout = _check_share(dropout)
        super().__init__(host, rank=rank, scale=scale, held=held)

    @property
    def drops(self) -> bool:
        """Whether it drops inputs now."""
        return self.training and self.dropout > 0.0

    def seen(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.dropout, training=True) if self.drops else input

    def product(self, below: Below, input: Tensor, gate: Gate, bias: Tensor | None) -> Tensor:
        host = below.host
        if self.drops and isinstance(host, nn.Conv2d) and (host.groups != 1 or host.padding_mode != "zeros"):
            raise UnsupportedModuleError(
                f"dropout: expected a convolution without groups and padded by zeros, got {host}; exclude it, or set "
                "dropout=0.0"
            )
        return super().product(below, input, gate, bias)

    forward = product

    @classmethod
    def mixed(
        cls,
        changes: Sequence[tuple[Change, Gate] | None],
        host: nn.Module,
        input: Tensor,
        bias: Tensor | None,
        ids: Tensor,
    ) -> Tensor | None:
        if any(isinstance(pair[0], DropoutLowRank) and pair[0].drops for pair in changes if pair is not None):
            return None
        return super().mixed(changes, host, input, bias, ids)

    def weight_over(self, weight: Tensor, gate: Gate) -> Tensor:
        """W_t.

        Raises:
            UnsupportedModuleError: in training with dropout, of which a weight knows nothing.
        """
        if self.drops and not gate.shut:
            raise UnsupportedModuleError(
                "dropout: expected layers whose own forward multiplies with their weight, which is read here by other "
                "code; set dropout=0.0, or exclude the layer"
            )
        return super().weight_over(weight, gate)


@register_change("stream-lowrank")
class StreamLowRank(DropoutLowRank):
    """A task layer: of the base's product `p = W x + b`, which runs on the shared rows x alone,

        y = p + s B A x'                    the shared stream, by the change below
        y_t = p + scale * B_t A_t x_t       each task's

    Args:
        first: whether the streams begin here: the input holds the shared rows alone and `x_t = x'`, both being
            `dropout(x)`; else it holds all rows, and x_t are the task's.

    Raises:
        ValueError: a host that is no linear layer; another share, rank or scale.
    """

    settings = ("rank", "scale", "dropout", "first")
    over_base: ClassVar[bool] = True

    def __init__(
        self,
        host: nn.Module,
        *,
        rank: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        first: bool = False,
        held: bool = True,
    ) -> None:
        if not isinstance(host, nn.Linear):
            raise ValueError(f"host: expected a linear layer, got {type(host).__name__}")
        if not isinstance(first, bool):
            raise ValueError(f"first: expected True or False, got {first!r}")
        self.first, self.inputs = first, host.in_features
        super().__init__(host, rank=rank, scale=scale, dropout=dropout, held=held)

    def product(self, below: Below, input: Tensor, gate: Gate, bias: Tensor | None) -> Tensor:
        return products([(self, gate)], below, input, bias)

    forward = product

    @classmethod
    def mixed(
        cls,
        changes: Sequence[tuple[Change, Gate] | None],
        host: nn.Module,
        input: Tensor,
        bias: Tensor | None,
        ids: Tensor,
    ) -> Tensor | None:
        return None

    def weight_over(self, weight: Tensor, gate: Gate) -> Tensor:
        """Raises UnsupportedModuleError: the rows of streams need the layer itself."""
        raise UnsupportedModuleError(
            "task streams: expected layers whose own forward multiplies with their weight, which is read here by other "
            "code (torchvision's Swin, fused attention); take a model whose blocks call their layers (timm's), or "
            "leave the layer out of task_modules"
        )

    def fold(self, weight: Tensor) -> Tensor:
        return super().fold(self.closed(weight))

    def closed(self, weight: Tensor) -> Tensor:
        """W itself: `y_t = p`.

        Raises:
            UnsupportedModuleError: p is not of the task's rows.
        """
        if not self.first:
            raise UnsupportedModuleError(
                "expected a task layer whose input is the shared stream, got one behind others: its base product is of "
                "the shared rows and its own of the task's, which no one weight gives"
            )
        return weight

    def operations(self, input: Tensor, output: Tensor) -> int:
        """Of the task's own rows in its own run, which has two streams."""
        return super().operations(input, output) // 2

    def spared(self, output: Tensor) -> int:
        return output.numel() * self.inputs  # half of all rows, two for a multiplication and an addition

    def joins(self) -> Hashable:
        return self.kind, self.first, self.dropout

    @classmethod
    def joined(cls, changes: Sequence[tuple[Change, Gate]]) -> Part:
        return TaskLayers(changes)


class TaskLayers(Part):
    """The task layers of several tasks at one module, for one pass."""

    kind = "task layers"

    def __init__(self, changes: Sequence[tuple[Change, Gate]]) -> None:
        super().__init__()
        self.__dict__["changes_of"] = list(changes)  # the tasks', not this one's

    def forward(self, below: Below, input: Tensor) -> Tensor:
        return products(self.__dict__["changes_of"], below, input, below.bias())

    def setting(self) -> tuple[Any, ...]:
        return tuple(gate.setting() for _, gate in self.__dict__["changes_of"])

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {}


def _factors(change: LowRank, gate: Gate, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
    """A and B in the type of the products, and the scale; None where they add nothing."""
    if change.owed or not gate.open:
        return None
    return change.down.to(dtype), change.up.to(dtype), change.scale


def products(changes: Sequence[tuple[Any, Gate]], below: Below, input: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's results for the shared stream and one for each task, `[(1 + T) * rows, ..., N]`: one product of the
    base's, whatever T is.

    Args:
        changes: of the tasks, with their gates. input: `[rows, ..., K]` where streams begin here, else
            `[(1 + T) * rows, ..., K]`.
    """
    first, tasks = changes[0][0], len(changes)
    shared = input if first.first else shared_rows(input, tasks)
    made = below._replace(parts=(), ready=None).product(shared, bias)
    lower = _lower(below)
    found = [None if lower is None else _factors(*lower, input.dtype)]
    found += [_factors(change, gate, input.dtype) for change, gate in changes]
    seen = first.seen(shared)
    if all(factors is None for factors in found):
        return widened(made, tasks)
    if first.first:
        return torch.cat([made if factors is None else made + _added(seen, *factors) for factors in found])
    rows = input if seen is shared else torch.cat([seen, input.narrow(0, len(shared), tasks * len(shared))])
    a, b = ([None if factors is None else factors[place] for factors in found] for place in (0, 1))
    scales = [0.0 if factors is None else factors[2] for factors in found]
    ids = torch.arange(1 + tasks, device=input.device)
    added = mixed_lowrank(rows, a, b, ids, scales)  # type: ignore[arg-type]
    return (made + added.unflatten(0, (1 + tasks, len(shared)))).flatten(0, 1)


def _added(input: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return scale * F.linear(F.linear(input, down), up)


def _lower(below: Below) -> tuple[LowRank, Gate] | None:
    """What tasks share at a task layer, with its gate; None where they share nothing there.

    Raises:
        UnsupportedModuleError: anything else than a low-rank change.
    """
    if not below.parts:
        return None
    part = below.parts[-1]
    change, gate = getattr(part, "change", None), part.gate
    if len(below.parts) > 1 or not isinstance(change, LowRank) or gate is None or gate.known is None:
        raise UnsupportedModuleError(
            f"task streams: expected a low-rank change below a task layer, or none, got a part {part.kind!r}"
        )
    return change, gate


# ------------------------------------------------------------------------------------ heads


class Heads(Part):
    """The heads of several tasks in one pass: each is given its own rows.

    Args:
        heads: the parts in the base's head's place, by task. batch: how many samples there are.

    Attributes:
        made: what each returned.
    """

    kind = "heads"

    def __init__(self, heads: Sequence[Part], batch: int) -> None:
        super().__init__()
        self.__dict__["heads"] = list(heads)
        self.batch, self.made = batch, list[Any]()

    def forward(self, below: Below, *args: Any, **kwargs: Any) -> Any:
        """What the first of them returns: the base is to hand that on as it is."""
        leaves, spec = tree_flatten((args, kwargs))
        made = []
        for place, head in enumerate(self.__dict__["heads"]):
            own_args, own_kwargs = tree_unflatten([self._rows(leaf, place) for leaf in leaves], spec)
            made.append(forward_of(head)(below, *own_args, **own_kwargs))
        if torch._C._current_graph_task_id() == -1:  # else it is recomputed: nobody asks, and graphs hold this
            self.made += made
        return made[0]

    def _rows(self, leaf: Any, place: int) -> Any:
        """A tensor's rows of one task, where it has some for each; one of the shared stream is given to all."""
        heads = len(self.__dict__["heads"])
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] == self.batch or heads == 1:
            return leaf
        if leaf.shape[0] != heads * self.batch:
            raise UnsupportedModuleError(
                f"forward_tasks: expected features of {self.batch} or {heads} * {self.batch} rows before the heads, "
                f"got {list(leaf.shape)}; run the tasks one by one: model(x, task=...)"
            )
        return leaf.narrow(0, place * self.batch, self.batch)

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {}
