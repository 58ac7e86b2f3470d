"""Change: what an open gate lets in at one linear or convolution layer.

A kind of change is a class with its tensors' shapes, their first values and `fold`; everything else has a default that
is right for it, in plain torch. Kinds with kernels of their own override `run`, `product` or `bind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import TapsError
from ..ops import Gated
from ..store.record import Record
from . import token
from .bind import Bound, Road
from .gate import Gate, keep_float32
from .host import Op, base_weight, op_of
from .sampling import Sample

if TYPE_CHECKING:
    from .part import Below, Part

_Kind = TypeVar("_Kind", bound="type[Change]")
_KINDS: dict[str, type[Change]] = {}


def register_change(name: str) -> Callable[[_Kind], _Kind]:
    """Class decorator: make a kind of change known under the name that files have for it."""

    def register(cls: _Kind) -> _Kind:
        if name in _KINDS:
            raise TapsError(f"register_change: {name!r} is already {_KINDS[name].__name__}")
        if cls.role not in ("delta", "weight"):
            raise TapsError(f"register_change: {cls.__name__}.role: expected 'delta' or 'weight', got {cls.role!r}")
        cls.kind, _KINDS[name] = name, cls
        return cls

    return register


def change_kinds() -> Mapping[str, type[Change]]:
    """The known kinds by name."""
    return _KINDS


def kind_of(facts: Any) -> type[Change] | None:
    """The kind that the facts of a change name, if it is known."""
    name = facts.get("kind") if isinstance(facts, dict) else None
    return _KINDS.get(name) if isinstance(name, str) else None


# What a file's change may take at most, beside the weight that it changes.
_MOST_VALUES, _MOST_SHARE = 1 << 20, 16

_bare: ContextVar[bool] = ContextVar("taps_ext_bare", default=False)


@contextmanager
def bare() -> Iterator[None]:
    """Inside, changes are made without their tensors: for who only asks how they are built. Nothing of a weight's size
    is allocated, and no random number is drawn."""
    before = _bare.set(True)
    try:
        yield
    finally:
        _bare.reset(before)


def without_autocast(weight: Tensor) -> AbstractContextManager[Any]:
    """For what makes W_t: products in it are as exact under autocast as without, so that W_t is rounded once."""
    kind = weight.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if casts else nullcontext()


class Change(nn.Module):
    """What a task lets in at one layer. Its parameters are float32 and stay so through `.half()` and `.bfloat16()`.

    Args:
        host: the layer; read, never changed.
        held: False where the change is as it starts, and takes no memory until :meth:`grow`.

    Attributes:
        kind: its name in files.
        role: what its parameters are to optimizers: "delta" (weight decay is right) or "weight" (it is not).
        replaces: whether it holds a weight that is multiplied with in the place of the host's.
        over_base: whether W_t is made of the base's weight, whatever lies between, so that closed it is W.
        coded: whether its tensors are what a codec made of a Delta, of which no one has a gradient.
        settings: the names of its arguments beside `host` and `held`, which are attributes too: files keep them.
        names: of its tensors.
        owed: whether its tensors are yet to be made.
    """

    kind: ClassVar[str]
    role: ClassVar[str] = "delta"
    replaces: ClassVar[bool] = False
    over_base: ClassVar[bool] = False
    coded: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, host: nn.Module, *, held: bool = True) -> None:
        super().__init__()
        weight = base_weight(host)
        self.owed = True
        self.names = tuple(self.shapes(weight))
        if taken := {"score", "bias"} & set(self.names):
            raise TapsError(
                f"{type(self).__name__}.shapes: {sorted(taken)[0]!r} is the name of another tensor of a layer"
            )
        for name in self.names:
            self.register_parameter(name, None)
        if held and not _bare.get():
            self.grow(weight)

    # -- what a kind must say

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        """The shapes of its tensors, by name, for a host of this weight. No name may be "score" or "bias"."""
        raise NotImplementedError

    def start(self, weight: Tensor) -> None:
        """Give its tensors, which are zero, their first values: those that leave the weight as it is."""

    def fold(self, weight: Tensor) -> Tensor:
        """W_t, shaped and typed like `weight`, as a new tensor, differentiable in its parameters and `weight`. Its
        tensors are there.

        Compute in `torch.promote_types(weight.dtype, torch.float32)` and round once.
        """
        raise NotImplementedError

    # -- what it may say better

    def run(
        self,
        op: Op,
        input: Tensor,
        weight: Tensor,
        gate: Gate,
        bias: Tensor | None,
        sample: Sample | None = None,
    ) -> Tensor:
        """A product with W_t, of any geometry, where `weight` lies below. `sample`: what the score of a closed layer
        learns from; a kind that takes everything is right, too."""
        return op.stock(input, self.weight_over(weight, gate), bias, *op.geometry)

    def product(self, below: Below, input: Tensor, gate: Gate, bias: Tensor | None) -> Tensor:
        """The product of a stock linear or convolution layer with W_t."""
        op, input = op_of(below.host, input)
        weight = below.resting(input) if gate.known is False else below.weight()
        return self.run(op, input, weight, gate, bias, below.sample)

    forward = product  # so that hooks (pruning's, for one) can be run around it

    @classmethod
    def mixed(
        cls,
        changes: Sequence[tuple[Change, Gate] | None],
        host: nn.Module,
        input: Tensor,
        bias: Tensor | None,
        ids: Tensor,
    ) -> Tensor | None:
        """As `Part.mixed` has it, with changes of this kind and their gates, and a bias for all."""
        return None

    def joins(self) -> Hashable | None:
        """As `Part.joins` has it, of a change with a fixed gate."""
        return None

    @classmethod
    def joined(cls, changes: Sequence[tuple[Change, Gate]]) -> Part:
        """As `Part.joined` has it, of changes of this kind with their gates."""
        raise NotImplementedError(f"{cls.kind}: serves one task at a time")

    def weight_over(self, weight: Tensor, gate: Gate) -> Tensor:
        """W_t where `weight` lies below, differentiable in the parameters and the score."""
        return weight if gate.shut or self.owed else gate.select(self.fold(weight), weight)

    def closed(self, weight: Tensor) -> Tensor:
        """:meth:`fold` of a closed gate."""
        return weight

    def bias_over(self, bias: Tensor, gate: Gate) -> Tensor:
        """The bias under it, where `bias` is that of the layer, differentiable as :meth:`weight_over`."""
        return bias

    def unread(self, weight: Tensor, gate: Gate) -> Tensor:
        """A tensor with the derivatives of :meth:`weight_over`, of whose values only shape and type count."""
        return self.weight_over(weight, gate)

    def bind(self, host: nn.Module, gate: Gate, bias_of: nn.Module | None, general: Road) -> Bound | None:
        """Faster roads for a gate that the host knows over the base itself, as `Part.bind` has them; None for none.
        `bias_of`: the module with the task's own bias, or None. `general`: what they may fall back to."""
        return None

    def gathers(self, host: nn.Module, gate: Gate, *, sampled: bool, dtype: torch.dtype | None) -> Gated | None:
        """As `Part.gathers` has it."""
        return None

    def operations(self, input: Tensor, output: Tensor) -> int:
        """Floating-point operations of a forward beside those of the host's product."""
        return 0

    def spared(self, output: Tensor) -> int:
        """Floating-point operations of the host's product with all rows that a forward does without."""
        return 0

    def scratch(self, host: nn.Module, gate: Gate, dtype: torch.dtype, rows: int, *, training: bool) -> int:
        """Bytes that a product of `rows` rows rebuilds or packs beside its results, for `estimate`."""
        return 0

    # -- what the house asks

    def describe(self) -> dict[str, Any]:
        """Its kind and settings, JSON-ready."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.settings}}

    def dtype_of(self, weight: Tensor) -> torch.dtype:
        """The type of its tensors over a host of this weight."""
        return torch.float32

    def dtypes(self, weight: Tensor) -> dict[str, torch.dtype]:
        """The type of each of its tensors, by name, for a kind that has several."""
        return dict.fromkeys(self.names, self.dtype_of(weight))

    def added(self, weight: Tensor) -> Tensor | None:
        """What it adds to `weight`, shaped like it, as others can be packed in its place; None where it is small or no
        such thing. Its tensors are there."""
        return None

    def prove(self, tensors: dict[str, Tensor], weight: Tensor, record: Record) -> None:
        """Raise TaskFileError for values that no writer of its kind gives; shapes and types are as they should be."""

    @property
    def trains(self) -> bool:
        """True if a parameter is to have a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def grow(self, weight: Tensor) -> int:
        """Make the tensors that are owed, as they start; returns their bytes."""
        if not self.owed:
            return 0
        self.owed, dtypes = False, self.dtypes(weight)
        for name, shape in self.shapes(weight).items():
            if tuple(shape) == tuple(weight.shape):
                made = torch.zeros_like(weight, dtype=dtypes[name])  # with the weight's strides
            else:
                made = torch.zeros(tuple(shape), dtype=dtypes[name], device=weight.device)
            self.register_parameter(name, nn.Parameter(made, not self.coded))
        with torch.no_grad():
            self.start(weight.detach())
        token.note()
        return self.nbytes

    @classmethod
    def read(cls, record: Record, host: nn.Module) -> Change:
        """The change that a record describes: with its tensors where it has some, else owed.

        Raises:
            TaskFileError: an unknown kind, settings that do not fit, a tensor of another shape or type.
        """
        facts = record.fact("change", dict)
        kind = kind_of(facts)
        if kind is None:
            known = ", ".join(sorted(_KINDS))
            raise record.refuse(
                f"change: expected one of {known}, got {facts.get('kind')!r}; import the package that registers it"
            )
        settings = {name: value for name, value in facts.items() if name != "kind"}
        if settings.keys() != set(kind.settings):
            raise record.refuse(f"change {kind.kind!r}: expected {sorted(kind.settings)}, got {sorted(settings)}")
        try:
            made = kind(host, held=False, **settings)
        except (TypeError, ValueError) as error:
            raise record.refuse(f"change {kind.kind!r}: {error}") from None
        weight = base_weight(host)
        values = sum(math.prod(shape) for shape in made.shapes(weight).values())
        if values > max(_MOST_VALUES, _MOST_SHARE * weight.numel()):  # it may be made later, of no tensors in the file
            raise record.refuse(f"change {kind.kind!r}: {values:,} values for a weight of {weight.numel():,}")
        if any(name in record.tensors for name in made.names):
            dtypes = made.dtypes(weight)
            shapes = {name: (shape, dtypes[name]) for name, shape in made.shapes(weight).items()}
            given = record.take(shapes, free=made.names if made.coded else ())  # codes are proven by their kind
            made.prove(given, weight, record)
            made.hold(given, weight)
        return made

    def hold(self, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        """Copies of these tensors, which are of its shapes and types, in the place of those that are owed."""
        self.owed = False
        for name, tensor in tensors.items():
            strided = weight if tensor.shape == weight.shape else tensor
            own = torch.empty_like(strided, dtype=tensor.dtype, device=weight.device).copy_(tensor)
            self.register_parameter(name, nn.Parameter(own, not self.coded))
        token.note()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Change:
        result: Change = super()._apply(keep_float32(self, fn, tuple(self._parameters)), recurse)
        token.note()
        return result

    def extra_repr(self) -> str:
        return ", ".join([self.kind, *(f"{name}={getattr(self, name)}" for name in self.settings)])
