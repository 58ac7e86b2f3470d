"""A batch of several tasks: the road that it takes, and both of them.

"layers" is one pass of the base, in which each layer serves all tasks (:mod:`..routing.mixture`); "tasks" runs each
task's samples through the whole base by themselves, to the bit as separate calls do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .. import reference
from ..errors import UnsupportedModuleError
from ..parts.sampling import batch_size
from ..routing.frame import Frame
from ..routing.layout import Layouts, Places, Probe, layouts, places
from ..routing.mixture import Mixture, Segment, running_in, too_few
from ..routing.still import Still
from .mixed import MixedOutput, Share, check_batch, cut, shares
from .running import check_seen, prepared, run_frame, warn_of_sample, watched

if TYPE_CHECKING:
    from .task_model import TaskModel

# For tests and measurements: None leaves it to what was measured.
forced: str | None = None

# Of inputs that go through the base at a time on a CPU without gradients: eight images of 224 pixels in fp32. What
# serves ResNet-50 and ViT-S best is printed by benchmarks/mixed.py. 0: the whole batch.
piece_bytes = 8 * 3 * 224 * 224 * 4

_PLAIN = (Tensor, type(None), bool, int, float, str)

_SIGNATURES = 64  # of inputs, whose layouts are kept


@torch.compiler.disable(recursive=False)
def run_mixed(model: TaskModel, entry: str | None, tasks: Any, args: Any, kwargs: Any) -> MixedOutput:
    """The base, or its method `entry`, on a batch of several tasks. Raises as :meth:`TaskModel.forward` says."""
    found = shares(tasks, model._names)
    check_batch(tasks, args, kwargs, model.batch_dim)
    batch = len(tasks)
    if (size := _piece(model, entry, args, kwargs)) < batch:
        known = _known(model, args, kwargs)
        if known.outputs is not None:
            return _in_pieces(model, found, size, known.outputs, batch, args, kwargs)
    return _whole(model, entry, found, batch, args, kwargs)


def _whole(
    model: TaskModel, entry: str | None, found: Sequence[Share], batch: int, args: Any, kwargs: Any
) -> MixedOutput:
    dim = model.batch_dim
    known = _layers_of(model, entry, found, args, kwargs)
    # In training the base still evaluates: its samples cannot share a pass with those that dropout is for.
    pass_of = [share for share in found if share.task is not None or not model.training] if known is not None else []
    outputs = dict(_by_layers(model, pass_of, known, batch, args, kwargs)) if known is not None else {}
    for share in found:
        if share.task not in outputs:
            rows = cut((args, kwargs), share, batch, dim)
            try:
                outputs[share.task] = model._forward(entry, share.task, None, *rows)
            except ValueError as error:
                if not model.training or not str(error).startswith("Expected more than 1 value per channel"):
                    raise
                raise too_few("", share.task, len(share.rows), error) from error
    places = None
    if dim and _plain(entry, args, kwargs):  # else outputs have theirs where the inputs do
        places = (known or _known(model, args, kwargs)).outputs
    parts = [(share, outputs[share.task]) for share in found]
    return MixedOutput(parts, batch, dim, "tasks" if known is None else "layers", places)


def _plain(entry: str | None, args: Any, kwargs: Any) -> bool:
    """A forward on tensors that returns what each sample gives, in eager mode."""
    if entry is not None or torch.compiler.is_compiling() or reference.may_be_transformed():
        return False
    if kwargs.get("labels") is not None or any(isinstance(leaf, list) for leaf in (*args, *kwargs.values())):
        return False
    return all(isinstance(leaf, _PLAIN) for leaf in tree_leaves((args, kwargs)))  # others (caches) are no sample's


def _piece(model: TaskModel, entry: str | None, args: Any, kwargs: Any) -> int:
    """How many samples go through the base at a time."""
    whole = sys.maxsize
    if model.row_invariant or model.training or torch.is_grad_enabled() or not _plain(entry, args, kwargs):
        return whole
    largest = 0
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim() > model.batch_dim:
            if leaf.device.type != "cpu":
                return whole
            largest = max(largest, leaf.nbytes // max(1, leaf.shape[model.batch_dim]))
    return max(1, piece_bytes // largest) if largest and piece_bytes else whole


@torch.compiler.disable
def _in_pieces(
    model: TaskModel, found: Sequence[Share], size: int, places: Places, batch: int, args: Any, kwargs: Any
) -> MixedOutput:
    """A few samples after the other, those of a task together, so that what layers hand on stays in cache."""
    made: dict[str | None, list[tuple[Tensor, Any]]] = {share.task: [] for share in found}
    roads = set()
    for piece in _pieces(found, size):
        sorted_rows = Share(None, torch.cat([share.rows for share in piece]))
        own = cut((args, kwargs), sorted_rows, batch, model.batch_dim)
        first, here = 0, []
        for share in piece:
            here.append(Share(share.task, torch.arange(first, first + len(share.rows))))
            first += len(share.rows)
        out = _whole(model, None, here, first, *own)
        roads.add(out.road)
        for share in piece:
            made[share.task].append((share.rows, out[share.task][1]))
    parts = []
    for task, outputs in made.items():
        leaves = [tree_flatten(output) for _, output in outputs]
        if any(sum(isinstance(leaf, Tensor) for leaf in flat) != len(places) for flat, _ in leaves):
            return _whole(model, None, found, batch, args, kwargs)  # a head of another make than the base's
        joined, where = [], iter(places)
        for values in zip(*(flat[0] for flat in leaves), strict=True):
            place = next(where) if isinstance(values[0], Tensor) else None
            counts = [len(rows) for rows, _ in outputs]
            joined.append(values[0] if place is None or len(values) == 1 else place.join(values, counts))
        own_rows = torch.cat([rows for rows, _ in outputs])
        parts.append((Share(task, own_rows), tree_unflatten(joined, leaves[0][1])))
    where_of = places if model.batch_dim else None
    return MixedOutput(parts, batch, model.batch_dim, "layers" if "layers" in roads else "tasks", where_of)


def _pieces(found: Sequence[Share], size: int) -> Iterator[list[Share]]:
    """Whole tasks while they fit, larger ones in equal parts."""
    piece: list[Share] = []
    room = size
    for share in found:
        count = len(share.rows)
        if count > room and piece:
            yield piece
            piece, room = [], size
        if count <= room:
            piece.append(share)
            room -= count
            continue
        yield from ([Share(share.task, rows)] for rows in share.rows.tensor_split(-(-count // size)))
    if piece:
        yield piece


@torch.compiler.disable
def _layers_of(model: TaskModel, entry: str | None, found: Sequence[Share], args: Any, kwargs: Any) -> _Known | None:
    """Where the base has samples, if the batch is to go layer by layer."""
    if not goes_by_layers(model) or len(found) == 1 or not _plain(entry, args, kwargs):
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
    state = model.state(share.task)
    if model.gates == "host":
        state.refresh()  # a layer that has opened since the last forward is not idle
    stacks = state.stacks()
    if any(part.alone for stack in stacks.values() for part in stack):
        return False
    return all(name in known.fit for name, stack in stacks.items() if not all(part.idle() for part in stack))


def _known(model: TaskModel, args: Any, kwargs: Any) -> _Known:
    """Where the base has samples for such inputs, found out once."""
    leaves, spec = tree_flatten((args, kwargs))
    dim, batch = model.batch_dim, batch_size(args, kwargs, model.batch_dim)
    signature = (
        str(spec),
        *(_key(leaf, dim, batch) for leaf in leaves),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        model.training,
    )
    known = model._layouts.get(signature)
    if known is None:
        known = _probe(model, args, kwargs)
        model._layouts = {**dict(list(model._layouts.items())[1 - _SIGNATURES :]), signature: known}
    return known


def _key(leaf: Any, dim: int, batch: int | None) -> Any:
    if isinstance(leaf, Tensor):
        shape: tuple[int | None, ...] = tuple(leaf.shape)
        if len(shape) > dim and shape[dim] == batch:
            shape = (*shape[:dim], None, *shape[dim + 1 :])
        return shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf)


@torch.no_grad()
def _probe(model: TaskModel, args: Any, kwargs: Any) -> _Known:
    """Run the base on two and on three samples of the batch, the last two of which are the same."""
    leaves, spec = tree_flatten((args, kwargs))
    dim = model.batch_dim
    batch = batch_size(args, kwargs, dim)
    assert batch is not None
    last, watch = batch - 1, Still()

    def run(*rows: int) -> tuple[Probe, list[Any]]:
        few = [_few(leaf, rows, batch, dim) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        probe = Probe()
        some, named = tree_unflatten(few, spec)
        devices = [leaf.device for leaf in few if isinstance(leaf, Tensor) and leaf.is_cuda]
        with (
            torch.random.fork_rng([*{device.index or 0 for device in devices}]),
            running_in(Frame({}, set(), mixture=probe)),
            watch,
        ):
            return probe, tree_leaves(model.base(*some, **named))

    (two, first), (three, second) = run(0, last), run(0, last, last)
    outputs = None if watch.ragged else _places_of(first, second)
    if outputs is not None and None in outputs:  # what has no samples must say nothing of them, nor be their largest
        others = [[leaf for leaf in run(*rows)[1] if isinstance(leaf, Tensor)] for rows in ((0, 0), (last, last))]
        kept = [leaf for leaf in second if isinstance(leaf, Tensor)]
        for other in ([leaf for leaf in first if isinstance(leaf, Tensor)], *others):
            if any(place is None and not torch.equal(a, b) for a, b, place in zip(kept, other, outputs, strict=True)):
                outputs = None
                break
    return _Known(layouts(two, three), (two, three), outputs)


def _places_of(two: Sequence[Any], three: Sequence[Any]) -> Places | None:
    """Where the base's outputs have samples, of which the first is the same in both; None where they hold something
    that cannot be dealt out, or where a sample's own depends on the others."""
    if len(two) != len(three) or not all(isinstance(leaf, _PLAIN) for leaf in three):
        return None
    if any(not isinstance(a, Tensor) and a != b for a, b in zip(two, three, strict=True)):
        return None
    pairs = [(a, b) for a, b in zip(two, three, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    found = places([a for a, _ in pairs], [b for _, b in pairs])
    for (a, b), place in zip(pairs, found or (), strict=False):
        if place is None or not b.is_floating_point():
            continue
        one, other = place.cut(a, 2, 0, 1).double(), place.cut(b, 3, 0, 1).double()
        # Products of other sizes round otherwise: by far less than the root of the type's resolution.
        bound = torch.finfo(b.dtype).eps ** 0.5 * max(1.0, float(other.nan_to_num().abs().amax())) if b.numel() else 0.0
        if float((one - other).nan_to_num().abs().sum()) > bound * max(1, one.numel()):
            return None
    return found


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
) -> list[tuple[str | None, Any]]:
    dim, rows = model.batch_dim, torch.cat([share.rows for share in found])
    args, kwargs = cut((args, kwargs), Share(None, rows), batch, dim)
    batch = len(rows)
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
    return list(zip((share.task for share in found), _outputs(mixture, known, output), strict=True))


def _outputs(mixture: Mixture, known: _Known, output: Any) -> list[Any]:
    """What the base returned, by task, of heads of several sizes each its own."""
    leaves, spec = tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert known.outputs is not None
    guarded, mixture.padded = mixture.padded, []  # which hold the graph that holds the mixture
    for padded, _ in guarded:
        if all(padded is not leaf for leaf in tensors):
            raise UnsupportedModuleError(
                "tasks: heads of several sizes need a base that returns what its head gives, and this one computes on; "
                "row_invariant=True runs a batch's tasks one by one"
            )
    sizes = {id(padded): (padded.plain(), by_segment) for padded, by_segment in guarded}
    found = []
    for place, segment in enumerate(mixture.segments):
        where = iter(known.outputs)
        own = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (at := next(where)) is not None:
                plain, by_segment = sizes.get(id(leaf), (leaf, None))
                rows = at.cut(plain, mixture.batch, segment.first, segment.size)
                leaf = rows if by_segment is None else _unfilled(rows, by_segment[place], at.dim)
            own.append(leaf)
        found.append(tree_unflatten(own, spec))
    return found


def _unfilled(rows: Tensor, sizes: Sequence[int], samples: int) -> Tensor:
    """A task's own outputs of those that were filled up. `sizes`: in all dimensions but that of samples."""
    for place, size in enumerate(sizes):
        rows = rows.narrow(place if place < samples else place + 1, 0, size)
    return rows
