"""A batch of several tasks: the road that it takes, and both of them.

"layers" is one pass of the base, in which each layer serves all tasks (:mod:`..routing.mixture`); "tasks" runs each
task's samples through the whole base by themselves, to the bit as separate calls do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .. import reference
from ..errors import UnsupportedModuleError
from ..parts.sampling import batch_size
from ..routing.frame import Frame
from ..routing.mixture import Layouts, Mixture, Places, Probe, Segment, layouts, places, running_in
from .mixed import MixedOutput, Share, check_batch, cut, shares
from .running import check_seen, prepared, run_frame, warn_of_sample, watched

if TYPE_CHECKING:
    from .task_model import TaskModel

# For tests and measurements: None leaves it to what was measured.
forced: str | None = None

_SIGNATURES = 64  # of inputs, whose layouts are kept


@torch.compiler.disable(recursive=False)
def run_mixed(model: TaskModel, entry: str | None, tasks: Any, args: Any, kwargs: Any) -> MixedOutput:
    """The base, or its method `entry`, on a batch of several tasks. Raises as :meth:`TaskModel.forward` says."""
    found = shares(tasks, model._names)
    check_batch(tasks, args, kwargs, model.batch_dim)
    batch, dim = len(tasks), model.batch_dim
    known = _layers_of(model, entry, found, args, kwargs)
    if known is not None:
        return MixedOutput(_by_layers(model, found, known, batch, args, kwargs), batch, dim, "layers")
    outputs = []
    for share in found:
        rows = cut((args, kwargs), share, batch, dim)
        outputs.append((share, model._forward(entry, share.task, None, *rows)))
    return MixedOutput(outputs, batch, dim, "tasks")


@torch.compiler.disable
def _layers_of(model: TaskModel, entry: str | None, found: Sequence[Share], args: Any, kwargs: Any) -> _Known | None:
    """Where the base has samples, if the batch is to go layer by layer."""
    if not goes_by_layers(model) or len(found) == 1 or entry is not None:
        return None
    if torch.compiler.is_compiling() or reference.may_be_transformed() or kwargs.get("labels") is not None:
        return None
    if any(isinstance(leaf, list) for leaf in (*args, *kwargs.values())):
        return None
    known = _known(model, args, kwargs)
    return known if all(_fits(model, share, known) for share in found) else None


def goes_by_layers(model: TaskModel) -> bool:
    """Whether a batch of several tasks takes one pass of the base, where that can be.

    On a GPU a task's few samples leave most of it idle, and a launch serves all tasks (predicted). On a CPU the
    samples of one task are as many as a cache likes, and W_t of a layer is read once either way (docs/mixed.md)."""
    if forced is not None or model.row_invariant:
        return forced == "layers" and not model.row_invariant
    return next(model.base.parameters()).is_cuda


class _Known:
    """What two small runs of the base have shown about inputs of one signature.

    Args:
        modules: where each module has its samples. runs: the probes. outputs: where the base's outputs have theirs.
    """

    def __init__(self, modules: Layouts, runs: Sequence[Probe], outputs: Places | None) -> None:
        self.modules, self.outputs = modules, outputs
        within: dict[str, set[str]] = {}
        for probe in runs:
            for reader, names in probe.within.items():
                within.setdefault(reader, set()).update(names)
        self.within = {reader: frozenset(names) for reader, names in within.items()}
        apart = {name for (name, _), layout in modules.items() if layout is not None and layout.apart}
        whole = {name for (name, _), layout in modules.items() if layout is None or not layout.apart}
        good = apart - whole
        self.fit = good | {name for reader in good for name in self.within.get(reader, ())}
        self.fit -= whole | {name for probe in runs for name in probe.read}
        self.fit -= {name for reader in self.within.keys() - good for name in self.within[reader]}


def _fits(model: TaskModel, share: Share, known: _Known) -> bool:
    """Whether the base has samples wherever a task changes something."""
    if known.outputs is None:
        return False
    if share.task is None:
        return True
    stacks = model.state(share.task).stacks()
    return all(name in known.fit for name, stack in stacks.items() if not all(part.idle() for part in stack))


def _known(model: TaskModel, args: Any, kwargs: Any) -> _Known:
    """Where the base has samples for such inputs, found out once."""
    leaves, dim = tree_leaves((args, kwargs)), model.batch_dim
    signature = (
        *(_key(leaf, dim) for leaf in leaves),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        model.training,
    )
    known = model._layouts.get(signature)
    if known is None:
        known = _probe(model, args, kwargs)
        model._layouts = {**dict(list(model._layouts.items())[1 - _SIGNATURES :]), signature: known}
    return known


def _key(leaf: Any, dim: int) -> Any:
    if isinstance(leaf, Tensor):
        shape = tuple(leaf.shape)
        return (*shape[:dim], *shape[dim + 1 :]), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf)


@torch.no_grad()
def _probe(model: TaskModel, args: Any, kwargs: Any) -> _Known:
    """Run the base on two and on three samples of the batch, the last two of which are the same."""
    leaves, spec = tree_flatten((args, kwargs))
    dim = model.batch_dim
    batch = batch_size(args, kwargs, dim)
    assert batch is not None and batch > 1  # several tasks have a sample each
    runs = []
    for rows in ((0, batch - 1), (0, batch - 1, batch - 1)):
        few = [_few(leaf, rows, batch, dim) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        probe = Probe()
        some, named = tree_unflatten(few, spec)
        devices = [leaf.device for leaf in few if isinstance(leaf, Tensor) and leaf.is_cuda]
        with (
            torch.random.fork_rng([*{device.index or 0 for device in devices}]),
            running_in(Frame({}, set(), mixture=probe)),
        ):
            output = model.base(*some, **named)
        runs.append((probe, [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]))
    (two, first), (three, second) = runs
    outputs = places(first, second)
    if outputs is not None:  # what has no samples must be no sum over them
        constant = all(
            place is not None or torch.equal(a, b) for a, b, place in zip(first, second, outputs, strict=True)
        )
        outputs = outputs if constant else None
    return _Known(layouts(two, three), (two, three), outputs)


def _few(leaf: Tensor, rows: Sequence[int], batch: int, dim: int) -> Tensor:
    if leaf.dim() <= dim or leaf.shape[dim] != batch:
        return leaf
    picked = leaf.detach().index_select(dim, torch.tensor(rows, device=leaf.device))
    same = torch.equal(picked.select(dim, 0), picked.select(dim, 1))
    if same and picked.is_floating_point():  # else nobody could tell whose rows are whose
        other = picked.select(dim, 0)
        ramp = torch.linspace(0, 1, other.numel(), device=leaf.device, dtype=leaf.dtype).view(other.shape)
        for place in range(1, len(rows)):
            picked.select(dim, place).add_(ramp)
    return picked


@torch.compiler.disable
def _by_layers(
    model: TaskModel, found: Sequence[Share], known: _Known, batch: int, args: Any, kwargs: Any
) -> list[tuple[Share, Any]]:
    dim = model.batch_dim
    args, kwargs = cut((args, kwargs), Share(None, torch.cat([share.rows for share in found])), batch, dim)
    segments, states, first = [], [], 0
    for share in found:
        size = len(share.rows)
        if share.task is None:
            frame = Frame({}, set())
        else:
            state = model._begin(share.task)
            states.append((share.task, state))
            own = cut((args, kwargs), Share(None, torch.arange(first, first + size)), batch, dim)
            frame = prepared(model, share.task, state, own[0], own[1], together=False)
        segments.append(Segment(share.task, frame, first, size))
        first += size
    heads = frozenset(state.head_path for _, state in states if state.head_path is not None)
    mixture = Mixture(model, batch, segments, known.modules, known.within, heads)
    frame = Frame({}, set(), mixture=mixture)
    output = watched(model, states, lambda: run_frame(model, None, frame, args, kwargs))
    for segment in segments:
        if segment.task is not None:
            warn_of_sample(model, segment.task, segment.frame.sample)
            check_seen(model, segment.task, model.state(segment.task), frame.entered | segment.frame.entered)
    return list(zip(found, _outputs(mixture, known, output), strict=True))


def _outputs(mixture: Mixture, known: _Known, output: Any) -> list[Any]:
    """What the base returned, by task, of heads of several sizes each its own."""
    leaves, spec = tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert known.outputs is not None
    for padded, _ in mixture.padded:
        if all(padded is not leaf for leaf in tensors):
            raise UnsupportedModuleError(
                "tasks: heads of several sizes need a base that returns what its head gives, and this one computes on; "
                "row_invariant=True runs a batch's tasks one by one"
            )
    sizes = {id(padded): by_segment for padded, by_segment in mixture.padded}
    found = []
    for place, segment in enumerate(mixture.segments):
        where = iter(known.outputs)
        own = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (at := next(where)) is not None:
                rows = at.cut(leaf, mixture.batch, segment.first, segment.size)
                by_segment = sizes.get(id(leaf))
                leaf = rows if by_segment is None else rows[..., : by_segment[place]]
            own.append(leaf)
        found.append(tree_unflatten(own, spec))
    return found
