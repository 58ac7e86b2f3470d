"""Part: what the rest of the house knows of a task, and what a part stands on.

Reports, files, optimizer groups, merging, profiling and routing speak to parts in these words and ask for nothing of a
part's kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import TapsError, UnsupportedModuleError
from ..ops import Gated
from ..store.record import Record, not_finite
from .bind import Bound, Made
from .gate import Gate
from .host import Op, base_bias, base_weight, original_class, resting_weight, stock_forward
from .packing import Encoded, Packed
from .sampling import Sample

_Kind = TypeVar("_Kind", bound="type[Part]")


def forward_of(part: Part) -> Callable[..., Any]:
    """A part's forward, with its own hooks where there are some (pruning's, for one) and never with global ones: those
    see base modules alone."""
    return hooked(part, part.forward)


def hooked(module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """What a module of ours does, with its own forward hooks where there are some and never with global ones."""
    if not (module._forward_pre_hooks or module._forward_hooks):
        return run
    return functools.partial(_with_hooks, module, run)


def _with_hooks(module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for key, before in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = before(module, args, kwargs) or (args, kwargs)
        elif (found := before(module, args)) is not None:
            args = found if isinstance(found, tuple) else (found,)
    output = run(*args, **kwargs)
    for key, after in list(module._forward_hooks.items()):
        given = (args, kwargs, output) if key in module._forward_hooks_with_kwargs else (args, output)
        found = after(module, *given)
        output = output if found is None else found
    return output


class Below(NamedTuple):
    """What a part stands on at one module: the shared parts over the base, or the base alone.

    Attributes:
        host: the base's module.
        parts: the parts between, the lowest first.
        sample: what closed layers estimate their score gradients from; None is everything.
        ready: gives the W_t of the part above where it was made together with others; it is asked at each use, since
            what is made of this may outlive the forward.
    """

    host: nn.Module
    parts: tuple[Part, ...] = ()
    sample: Sample | None = None
    ready: Callable[[], Tensor | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        if self.parts:
            return forward_of(self.parts[-1])(self.under, *args, **kwargs)
        return original_class(self.host).forward(self.host, *args, **kwargs)

    @property
    def made(self) -> Tensor | None:
        """The W_t of the part above, in the type of the products that the forward began with."""
        return None if self.ready is None else self.ready()

    @property
    def under(self) -> Below:
        """What its uppermost part stands on."""
        return self._replace(parts=self.parts[:-1], ready=None)

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Its product with `input`, of a stock linear or convolution layer, and another bias."""
        if self.parts:
            return self.parts[-1].product(self.under, input, bias)
        return stock_forward(self.host, input, resting_weight(self.host, base_weight(self.host), input), bias)

    def weight(self) -> Tensor:
        """The weight that it multiplies with, differentiable in what the parts train."""
        return self.parts[-1].weight_over(self.under) if self.parts else base_weight(self.host)

    def folded(self) -> Tensor:
        """The same as it is now, for merging: the base's own weight where nothing changes it."""
        weight = base_weight(self.host)
        for part in self.parts:
            weight = part.fold(base_weight(self.host) if part.over_base else weight)
        return weight

    def resting(self, input: Tensor) -> Tensor:
        """The same in the type of the product, for a part that changes nothing of it."""
        return self.weight() if self.parts else resting_weight(self.host, base_weight(self.host), input)

    def bias(self) -> Tensor | None:
        """The bias that it adds."""
        return self.parts[-1].bias_over(self.under) if self.parts else base_bias(self.host)


class Cost(NamedTuple):
    """What one call of a module does: floating-point operations, and the bytes that have to be read and written at
    least once; backward included where gradients are on."""

    operations: int
    moved: int


def saved(tensors: dict[str, Tensor], error: type[TapsError] = TapsError) -> dict[str, Tensor]:
    """These tensors, for a file. Raises `error` for Inf or NaN, naming the first."""
    if (wrong := not_finite(tensors)) is not None:
        raise error(f"{wrong}: expected finite values in a task to save, got Inf or NaN")
    return tensors


class Part(nn.Module):
    """What a task has at one module of the base, its host. A part that adds nothing is what lies below it.

    Attributes:
        kind: its name in files.
        gate: what decides whether it acts; None for a part that always does.
        stands_in: whether parts of this kind have a :attr:`replacement`.
        former: names that version 0.1 had for its tensors, and those they have.
        bears: whether a gated part can stand on it, which needs its weight, bias and product.
        rides: whether it can stand on a part of any kind, all that it does with it being to run it.
        alone: whether its task's samples go through the base by themselves in a batch of several tasks.
    """

    kind: ClassVar[str]
    bears: ClassVar[bool] = False
    rides: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    stands_in: ClassVar[bool] = False
    former: ClassVar[Mapping[str, str]] = {}
    gate: Gate | None

    def __init__(self) -> None:
        super().__init__()
        self.gate = None

    @property
    def replacement(self) -> nn.Module | None:
        """The module that stands in the host's place, where one does."""
        return None

    @property
    def over_base(self) -> bool:
        """Whether its W_t is made of the base's weight, whatever lies between."""
        return False

    @property
    def change_kind(self) -> str:
        """The kind of what its gate lets in, as files name it; "" for nothing."""
        return ""

    @property
    def packed(self) -> Packed | None:
        """How what its gate lets in was packed; None where it was not, and trains."""
        return None

    def pack(self, made: Encoded, host: nn.Module, output_error: float | None = None) -> Part:
        """A part with the same gate and bias, which lets in what was made of :meth:`added`; this one stays as it is."""
        raise NotImplementedError(f"{self.kind}: expected a part with something to pack")

    def unpack(self, host: nn.Module) -> Part:
        """A part with the same gate and bias, which lets in as a Delta what a packed one holds."""
        raise NotImplementedError(f"{self.kind}: expected a packed part")

    def added(self, weight: Tensor) -> Tensor | None:
        """What its open gate lets in on top of the base's `weight`, shaped like it, where that is a Delta, packed or
        not; None where it is no such thing."""
        return None

    def forward(self, below: Below, *args: Any, **kwargs: Any) -> Any:
        """The host's work under the task."""
        raise NotImplementedError

    def product(self, below: Below, input: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` of a stock linear or convolution layer with another bias, for parts above."""
        raise NotImplementedError(f"{self.kind}: another part cannot stand on it")

    def run_over(self, op: Op, below: Below, input: Tensor, bias: Tensor | None) -> Tensor:
        """A product of any geometry with W_t."""
        return op.stock(input, self.weight_over(below), bias, *op.geometry)

    def weight_over(self, below: Below) -> Tensor:
        """W_t, differentiable in what it trains."""
        return below.weight()

    def unread(self, below: Below) -> Tensor:
        """A tensor with the derivatives of :meth:`weight_over`, of whose values only shape and type count."""
        return self.weight_over(below)

    @classmethod
    def mixed(cls, parts: Sequence[Part | None], host: nn.Module, input: Tensor, ids: Tensor) -> Tensor | None:
        """The product of a stock host with a batch of several tasks, by as few calls as there are; None where each
        task's rows are to go through its own part.

        Args:
            parts: of this kind, by task; None is the base. input: `[samples * k, ...]`, sample after sample. ids: the
                task of each sample.
        """
        return None

    def joins(self) -> Hashable | None:
        """What is equal in parts of several tasks over one module that one part can serve in one pass over the same
        samples (:meth:`joined`); None where each task needs a pass of its own."""
        return None

    @classmethod
    def joined(cls, parts: Sequence[Part], batch: int) -> Part:
        """A part that serves those of several tasks, all with the same :meth:`joins`, for one forward.

        Args:
            batch: how many samples there are.
        """
        raise NotImplementedError(f"{cls.kind}: serves one task at a time")

    def idle(self) -> bool:
        """True where it is what lies below in outputs and gradients, so that its samples may run with the base's."""
        return False

    def rests(self, below: Below) -> bool:
        """True where a reader of the weight may have a plain tensor at once: what it trains has no say in it, and no
        cast is to be kept."""
        return False

    def bias_over(self, below: Below) -> Tensor | None:
        """The bias under the task."""
        return below.bias()

    def bind(self, host: nn.Module, *, stock: bool) -> Bound | None:
        """What to do at the host without gradients and with them, settled for now, where nothing lies between the two;
        None where `forward` must be asked at every call.

        Args:
            stock: the host is a linear or convolution layer with the stock forward, whose bindings are called with
                (host, input, sample); all others with what the module's forward is called with.
        """
        return None

    def gathers(self, host: nn.Module, *, sampled: bool, dtype: torch.dtype | None) -> Gated | None:
        """Its W_t over the base itself, where a forward with gradients may make it together with those of others;
        None where it makes its own, or learns nothing.

        Args:
            sampled: closed layers learn from a part of the batch. dtype: of W_t; None is the weight's own.
        """
        return None

    def bind_made(self, host: nn.Module) -> Made | None:
        """Its product at a stock host with a W_t that was made together with others; None to go the way of
        :meth:`forward`."""
        return None

    def reads(self, below: Below, key: str, enter: Callable[[str], None], *, fused: bool) -> Any:
        """The host's tensor `key` as it is under the task, for code that reads it instead of calling the host.

        Args:
            enter: to be called with a tensor's name, or "" for the host itself, where its values are used.
            fused: a plain tensor is wanted where no gradients are.
        """
        return NotImplemented

    @property
    def runs_host(self) -> bool:
        """True if the forward of a host that is no stock layer is to run as it is, and read what it needs."""
        return False

    def fold(self, weight: Tensor) -> Tensor:
        """W_t in the type of `weight`, which lies below; the same object where nothing is changed."""
        return weight

    def setting(self) -> tuple[Any, ...]:
        """What its arithmetic depends on beside the tensors that autograd watches: a recomputation must find it
        again."""
        return () if self.gate is None else self.gate.setting()

    def roles(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by what they are: "delta", "weight" (the task's own in the place of W + Delta), "score",
        "bias" (a layer's own), "norm", "other" or "head"."""
        raise NotImplementedError

    def held(self) -> Mapping[str, nn.Parameter | None]:
        """What its gate lets in, as it is at any time."""
        return {}

    def changes(self) -> list[nn.Parameter]:
        """What its gate lets in: no optimizer may move it while the gate is closed."""
        return [parameter for parameter in self.held().values() if parameter is not None]

    def fix(self, open: bool) -> None:
        """Turn a learned gate into a fixed one."""

    def values(self, below: Below) -> dict[str, Tensor]:
        """The tensors that the host has under the task, by their names in it, for plain checkpoints; those that are
        missing are as they are below. They may be the task's own: copy before writing."""
        return {}

    def record(self, *, open: bool) -> Record:
        """What a task's file holds of it. `open`: the gate as it was read for the file."""
        raise NotImplementedError

    @classmethod
    def read(cls, record: Record, host: nn.Module, given: nn.Module | None = None) -> Part:
        """The part that a file's record describes, over this host, with every tensor checked before one is copied.

        Args:
            given: a module that the user brings, for a part that needs one.

        Raises:
            TaskFileError: the record does not fit the host. ConfigError: `given` does not fit the record.
        """
        raise NotImplementedError

    @classmethod
    def typed_as_base(cls, record: Record) -> list[Tensor]:
        """Those tensors of a record that have the type of the base's."""
        return []

    def differs(self, other: Part) -> str | None:
        """In what it is built differently than `other`, in words, or None: values and the state of gates aside."""
        return None if self.kind == other.kind else f"expected a {other.kind!r}, got a {self.kind!r}"

    def lost(self) -> list[str]:
        """What it holds that no file keeps, in words.

        Raises:
            TapsError: without which the file would belong to no model.
        """
        return []

    def settle(self, shared: frozenset[int]) -> None:
        """Called once, when the part gets its place in a model. `shared`: the containers (by id) that modules of the
        base share with each other."""

    def follow(self) -> None:
        """Take over what was set on the host, and its mode."""

    def mode(self) -> None:
        """The host's mode was set: take it."""

    def sets(self, key: str, value: Any) -> bool:
        """An attribute is set on the host while the task runs. True if it was taken as the task's own."""
        return False

    def covers(self, key: str) -> bool:
        """Whether it stands for the host's parameter `key`: changes it, or has one of its own in its place."""
        return True

    def needs_forward(self) -> bool:
        """True if a forward that never enters the host leaves out what the task has there."""
        return True

    def awaits(self, name: str) -> bool:
        """True for a tensor, by its name in the part, that it left out while it was closed."""
        return False

    def grow(self, weight: Tensor) -> int:
        """Make what it left out while it was closed, over the base's `weight`; returns the bytes."""
        return 0

    def drop_caches(self) -> None:
        """Forget what was made of values that are gone."""

    def hand_over(self, plain: nn.Module) -> None:
        """Give a plain module that has this part's values what the task made of them and keeps beside them."""

    def merged(self, below: Below) -> Part | None:
        """What runs in the place of a part without a gate while its task is merged; None for itself.

        Raises:
            UnsupportedModuleError: merged weights would not be all that the task is.
        """
        return None

    def installed(self) -> list[Tensor]:
        """Weights that it holds beside its parameters: those of a merged task."""
        return []

    def cost(self, host: nn.Module, input: Tensor, output: Tensor, fraction: float) -> Cost:
        """What one call costs. `fraction`: of the batch that a closed layer's score learns from."""
        raise UnsupportedModuleError(f"{self.kind}: expected a part over a linear or convolution layer")

    def scratch(self, host: nn.Module, dtype: Any, rows: int, *, training: bool) -> int:
        """Bytes that a product of `rows` rows rebuilds or packs beside its results."""
        return 0


_KINDS: dict[str, type[Part]] = {}


def register_part(name: str) -> Callable[[_Kind], _Kind]:
    """Class decorator: make a kind of part known under the name that files have for it."""

    def register(cls: _Kind) -> _Kind:
        if name in _KINDS:
            raise TapsError(f"register_part: {name!r} is already {_KINDS[name].__name__}")
        cls.kind, _KINDS[name] = name, cls
        return cls

    return register


def part_kinds() -> Mapping[str, type[Part]]:
    """The known kinds by name."""
    return _KINDS
