"""Several tasks in one pass: at each base module the samples that a task changes go their task's way, all others the
base's, together.

The batch is sorted by task before the base runs, so that a task's samples lie side by side wherever the model keeps
samples in one dimension (:mod:`.layout`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import ConfigError, TapsError, UnsupportedModuleError
from ..parts.host import is_norm
from .frame import Call, Frame, enter, in_backward, leave, prefix_of, sequence_number
from .layout import Layout, Layouts, Place, signature_of
from .route import is_stock


class Padded(Tensor):
    """Outputs of heads of several sizes, filled up with zeros: to be returned, not computed on."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in ("__get__", "size", "dim", "numel", "__hash__", "__repr__"):
            raise UnsupportedModuleError(
                "tasks: heads of several sizes need a base that returns what its head gives, and this one computes on "
                f"({func.__name__}); row_invariant=True runs a batch's tasks one by one"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def plain(self) -> Tensor:
        """The tensor to take each task's own from."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)


def too_few(where: str, task: str | None, size: int, error: ValueError) -> ConfigError:
    """For a task whose samples in a batch of several tasks make no statistic. `where`: what the message begins with."""
    return ConfigError(
        f"{where}task {task!r} has {size} samples in this batch, too few for statistics of its own ({error}); those of "
        "the batch's other tasks may have moved"
    )


class Segment(NamedTuple):
    """The samples of one task in a sorted batch: its frame, and which they are. Of the base the frame has no stacks."""

    task: str | None
    frame: Frame
    first: int
    size: int


class Mixture:
    """One forward of a sorted batch of several tasks.

    Args:
        owner: the TaskModel. batch: samples in it. segments: its tasks, one after the other. found: where the base has
            samples for such inputs. within: whose tensors a module's forward reads beside its own.
        heads: the modules that tasks' heads replace, whose outputs may differ in their sizes.

    Attributes:
        padded: what a head's module returned for heads of several sizes, each filled up with zeros to the largest, and
            the sizes, but that of samples, by segment. Whoever asks empties it: graphs hold this.
    """

    def __init__(
        self,
        owner: nn.Module,
        batch: int,
        segments: Sequence[Segment],
        found: Layouts,
        within: Mapping[str, frozenset[str]],
        heads: frozenset[str],
    ) -> None:
        self._owner = weakref.ref(owner)  # graphs hold this
        self.batch, self.segments = batch, tuple(segments)
        self.layouts, self.within, self.heads = found, within, heads
        self.padded: list[tuple[Padded, tuple[tuple[int, ...], ...]]] = []
        self._known_ids: dict[torch.device, Tensor] = {}

    def _acts(self, segment: Segment, names: Sequence[str]) -> bool:
        return any(not part.idle() for name in names for part in segment.frame.stacks.get(name, ()))

    def buffer(self, module: nn.Module, key: str, own: Any) -> Any:
        """A module's buffer."""
        return own

    def sets(self, module: nn.Module, key: str, value: Any) -> bool:
        """A module's buffer is set, which is the base's."""
        return False

    def touches(self, name: str) -> bool:
        """Whether a task changes anything at a module."""
        return any(self._acts(segment, (name,)) for segment in self.segments)

    def reads(self, name: str) -> None:
        """Raise UnsupportedModuleError: code that reads a tensor gets one, and tasks have several."""
        raise UnsupportedModuleError(
            f"{name}: its tensors are used by other code than its own forward, which takes those of one task; "
            "row_invariant=True runs a batch's tasks one by one"
        )

    def run(self, module: nn.Module, frame: Frame, base: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One module: the rows of each task that changes something there its way, all others the base's.

        Raises:
            UnsupportedModuleError: the module's arguments or outputs are not made of samples, naming it.
        """
        name: str = module.__dict__["_taps_name"]
        slots: Mapping[str, tuple[str, nn.Module]] = module.__dict__.get("_taps_weights", {})
        names = (name, *(found for found, _ in slots.values() if found != name), *self.within.get(name, ()))
        frame.entered.update(names)
        acting = [self._acts(segment, names) for segment in self.segments]
        if not any(acting):
            return base(*args, **kwargs)
        if module._modules:  # a task that changes something inside runs this by itself too: the rest runs as the base
            inside = prefix_of(name)
            changed = [[key for key in one.frame.stacks if key.startswith(inside)] for one in self.segments]
            every = zip(acting, self.segments, changed, strict=True)
            acting = [acts or self._acts(one, keys) for acts, one, keys in every]
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        layout = self.layouts.get((name, signature_of(tensors)))
        if layout is None or not layout.apart:
            raise UnsupportedModuleError(
                f"{name}: expected arguments and outputs with a dimension of samples, got "
                f"{[list(tensor.shape) for tensor in tensors]}; row_invariant=True runs a batch's tasks one by one"
            )
        for tensor, place in zip(tensors, layout.inputs, strict=True):
            if place is not None and tensor.shape[place.dim] != place.before * self.batch * place.after:
                raise UnsupportedModuleError(
                    f"{name}: expected equally many rows of each of the {self.batch} samples in dimension {place.dim}, "
                    f"got {list(tensor.shape)}; row_invariant=True runs a batch's tasks one by one"
                )
        made = self._together(module, name, acting, layout, args, kwargs)
        return self._apart(module, name, frame, acting, layout, leaves, spec) if made is None else made

    def _together(
        self, module: nn.Module, name: str, acting: Sequence[bool], layout: Layout, args: Any, kwargs: Any
    ) -> Tensor | None:
        """A linear or convolution layer in as few calls as what tasks have there takes; None for task by task."""
        place, out = layout.inputs[0], layout.outputs[0]
        if place is None or out is None or place.dim or out.dim or place.before != 1:
            return None
        if kwargs or len(args) != 1 or not is_stock(module):
            return None
        stacks = [
            one.frame.stacks.get(name, ()) if acts else () for one, acts in zip(self.segments, acting, strict=True)
        ]
        if any(len(stack) > 1 for stack in stacks) or any(one.frame.sample is not None for one in self.segments):
            return None
        parts = [stack[0] if stack else None for stack in stacks]
        kinds = {type(part) for part in parts if part is not None}
        return kinds.pop().mixed(parts, module, args[0], self._ids(args[0].device)) if len(kinds) == 1 else None

    def _ids(self, device: torch.device) -> Tensor:
        """The place among the segments of each sample, int64 `[batch]`."""
        if device not in self._known_ids:
            sizes = torch.tensor([one.size for one in self.segments])
            found = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
            self._known_ids[device] = found.to(device, non_blocking=True)
        return self._known_ids[device]

    def _apart(
        self,
        module: nn.Module,
        name: str,
        frame: Frame,
        acting: Sequence[bool],
        layout: Layout,
        leaves: list[Any],
        spec: TreeSpec,
    ) -> Any:
        """Task by task, as separate runs would, and neighbours that change nothing together."""
        pieces: list[Any] = []
        counts: list[int] = []
        rest = Frame({}, frame.entered, method=frame.method)
        for one, first, count in self._runs(acting):
            own = rest if one is None else one.frame
            rows = iter(layout.inputs)
            cut = [self._cut(leaf, next(rows), first, count) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(cut, spec)
            pieces.append(self._one(module, name, own, one, args, kwargs))
            counts.append(count)
        if len(pieces) == 1:
            return pieces[0]
        flat = [tree_flatten(piece) for piece in pieces]
        if any(found[1] != flat[0][1] for found in flat):
            raise TapsError(
                f"{name}: expected outputs of one structure from all tasks, got {[str(f[1]) for f in flat]}"
            )
        if len(layout.outputs) != (found := sum(isinstance(value, Tensor) for value in flat[0][0])):
            raise UnsupportedModuleError(
                f"{name}: expected {len(layout.outputs)} tensors as the base returns here, got {found} from tasks; "
                "row_invariant=True runs a batch's tasks one by one"
            )
        joined, where = [], iter(layout.outputs)
        for values in zip(*(found[0] for found in flat), strict=True):
            place = next(where) if isinstance(values[0], Tensor) else None
            joined.append(values[0] if place is None else self._join(name, values, counts, place))
        return tree_unflatten(joined, flat[0][1])

    def _runs(self, acting: Sequence[bool]) -> Iterator[tuple[Segment | None, int, int]]:
        """(segment, first, count) of what runs by itself; None is neighbours that the base serves."""
        begun, length = 0, 0
        for segment, acts in zip(self.segments, acting, strict=True):
            if not acts:
                begun = begun if length else segment.first
                length += segment.size
                continue
            if length:
                yield None, begun, length
                length = 0
            yield segment, segment.first, segment.size
        if length:
            yield None, begun, length

    def _cut(self, leaf: Tensor, place: Place | None, first: int, count: int) -> Tensor:
        return leaf if place is None else place.cut(leaf, self.batch, first, count)

    def _one(self, module: nn.Module, name: str, frame: Frame, one: Segment | None, args: Any, kwargs: Any) -> Any:
        owner = self._owner()
        # What is recomputed within it in backward has these rows alone.
        remember = bool(module._modules) and torch.is_grad_enabled() and owner is not None
        first = sequence_number() if remember else 0
        with running_in(frame):
            try:
                output = module.forward(*args, **kwargs)
            except ValueError as error:
                if one is None or not is_norm(module):
                    raise
                raise too_few(f"{name}: ", one.task, one.size, error) from error
        if remember:
            assert owner is not None
            Call(owner, None if one is None else one.task, frame, first, output, within=name)
        return output

    def _join(self, name: str, values: Sequence[Tensor], counts: Sequence[int], place: Place) -> Tensor:
        around = any(head == name or head.startswith(prefix_of(name)) for head in self.heads)
        sizes = [(*value.shape[: place.dim], *value.shape[place.dim + 1 :]) for value in values]
        if around and len({*sizes}) > 1 and len({value.dim() for value in values}) == 1:
            largest = [max(found) for found in zip(*sizes, strict=True)]
            largest.insert(place.dim, 0)
            values = [_filled(value, largest, place.dim) for value in values]
            joined = place.join(values, counts)
            if in_backward():  # recomputed: what it is for was looked at in the forward
                return joined
            guarded = joined.as_subclass(Padded)
            self.padded.append((guarded, self._spread(sizes, counts)))
            return guarded
        return place.join(values, counts)

    def _spread(self, sizes: Sequence[tuple[int, ...]], counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """What runs had, by segment."""
        found: list[tuple[int, ...]] = []
        for size, count in zip(sizes, counts, strict=True):
            while count > 0:
                count -= self.segments[len(found)].size
                found.append(size)
        return tuple(found)


def _filled(value: Tensor, sizes: Sequence[int], samples: int) -> Tensor:
    """Zeros behind a tensor's values up to these sizes, but in the dimension of samples."""
    wanted = [0 if dim == samples else size - value.shape[dim] for dim, size in enumerate(sizes)]
    return nn.functional.pad(value, [pad for missing in reversed(wanted) for pad in (0, missing)])


@contextmanager
def running_in(frame: Frame) -> Iterator[None]:
    """Inside, modules run in this frame."""
    token = enter(frame)
    try:
        yield
    finally:
        leave(token)
