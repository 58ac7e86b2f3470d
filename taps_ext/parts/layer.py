"""Layer: a gated change of one linear or convolution layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..errors import ConfigError, GateError, TapsError
from ..ops import Gated
from ..store.errors import GateRecordError
from ..store.record import Record
from . import bind, reads
from .bind import Bound, Made, Road
from .change import Change, change_kinds, kind_of
from .dense import Dense, Whole
from .gate import Gate
from .host import (
    Op,
    base_bias,
    base_weight,
    bias_name,
    multiplications,
    original_class,
    resting_weight,
    stock_forward,
    weight_name,
)
from .packing import LOW_RANK, Encoded, Packed
from .part import Below, Cost, Part, forward_of, hooked, register_part, saved
from .sampling import Sample


def _autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def general(part: Part) -> Road:
    """The road that is right everywhere over a stock layer."""

    def run(host: nn.Module, input: Tensor, sample: Sample | None) -> Any:
        return forward_of(part)(Below(host, (), sample), input)

    return run


def bound(part: Part, host: nn.Module, roads: Callable[[nn.Module, Road], Bound | None]) -> Bound:
    """The bindings that `roads` makes for a part over a stock layer, or the general road alone."""
    road = general(part)
    return roads(host, road) or (road, road)


def read(part: Part, below: Below, key: str, enter: Callable[[str], None], *, fused: bool) -> Any:
    """A layer's weight or bias under a part, for their readers."""
    if key == bias_name(below.host):
        return part.bias_over(below)
    return reads.weight(below, part, enter, fused=fused) if key == weight_name(below.host) else NotImplemented


def _product(below: Below, product: Callable[[Tensor], Tensor], input: Tensor) -> Tensor | None:
    """A product with the W_t that is there, or None: of inputs that are multiplied in another type than it has, and of
    those that the layer alone has the words for."""
    weight = below.made
    if weight is None or not isinstance(input, Tensor) or weight.dtype != (ops.autocast_dtype(input) or input.dtype):
        return None
    try:
        return product(weight)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _gate_facts(record: Record) -> dict[str, Any]:
    """How a record's gate is: learn, open, threshold. Raises MetadataError."""
    facts = record.fact("gate", dict)
    types = {key: type(value) for key, value in facts.items()}
    if types != {"learn": bool, "open": bool, "threshold": float}:
        raise record.refuse(f"gate: expected learn and open, and a threshold, got {facts}")
    if not 0.0 < torch.tensor(facts["threshold"], dtype=torch.float32, device="cpu").item() < math.inf:
        raise record.refuse(f"gate: threshold: expected a float32 above 0, got {facts['threshold']}")
    return facts


@register_part("layer")
class Layer(Part):
    """A task's share of one layer: what lies below it, and its change where the gate is open.

    Args:
        gate: learned or fixed; it decides about this layer alone.
        change: what an open gate lets in; None for a layer that is closed for good.
        bias: a task's own bias `[N]`, or None to use what lies below.
        packed: how the change was packed, if it was: it then stands for a Delta, and trains no further.

    Raises:
        TapsError: codes that nothing is known of.
    """

    bears: ClassVar[bool] = True
    former: ClassVar[Mapping[str, str]] = {"delta": "change.delta", "weight": "change.weight", "score": "gate.score"}

    gate: Gate
    change: Change | None
    bias: nn.Parameter | None

    def __init__(
        self, gate: Gate, change: Change | None, *, bias: Tensor | None = None, packed: Packed | None = None
    ) -> None:
        super().__init__()
        self.gate, self.change, self._packed = gate, change, packed
        if change is not None and change.coded and packed is None:
            raise TapsError(f"change: {change.kind!r} is a packed Delta, so `packed` is expected to say how, got None")
        own = None if bias is None else bias.detach().clone(memory_format=torch.preserve_format)
        self.register_parameter("bias", None if own is None else nn.Parameter(own))
        if change is not None:
            self._wake()

    def _wake(self) -> None:
        assert self.change is not None
        score = self.gate.score
        for parameter in self.change.parameters():
            if parameter.is_meta:
                raise ConfigError("weight: expected one on a device, got one on meta; build the model on the CPU")
            parameter.requires_grad_(self.packed is None and (self.gate.learn or bool(self.gate.known)))
            if score is not None and score.device != parameter.device:
                score.data = score.data.to(parameter.device)

    @property
    def change_kind(self) -> str:
        return "" if self.change is None else self.change.kind

    # -- packing

    @property
    def packed(self) -> Packed | None:
        return self._packed

    def added(self, weight: Tensor) -> Tensor | None:
        change = self.change
        if change is None or change.owed or not (self.packed or isinstance(change, (Dense, Whole))):
            return None
        delta = change.added(weight)
        return None if delta is None else delta.detach()

    def _with(self, kind: str, settings: dict[str, Any], tensors: Mapping[str, Tensor], host: nn.Module) -> Change:
        change = change_kinds()[kind](host, held=False, **settings)
        change.hold(tensors, base_weight(host))
        return change

    def pack(self, made: Encoded, host: nn.Module, output_error: float | None = None) -> Layer:
        change = self._with(made.kind, made.settings, made.tensors, host)
        packed = Packed(made.error, tuple(base_weight(host).shape), output_error)
        return Layer(self.gate, change, bias=self.bias, packed=packed)

    def unpack(self, host: nn.Module) -> Layer:
        change, weight = self.change, base_weight(host)
        if change is None or change.owed:
            return Layer(self.gate, Dense(host, held=False), bias=self.bias)
        delta = change.added(weight)
        assert delta is not None  # what packs has one
        return Layer(self.gate, self._with("dense", {}, {"delta": delta.detach()}, host), bias=self.bias)

    # -- the work

    def forward(self, below: Below, input: Tensor) -> Tensor:
        return self.product(below, input, self.bias_over(below))

    def product(self, below: Below, input: Tensor, bias: Tensor | None) -> Tensor:
        change = self.change
        if below.ready is not None:
            product = _product(below, lambda weight: stock_forward(below.host, input, weight, bias), input)
            if product is not None:
                return product
            below = below._replace(ready=None)  # says what is wrong as it does by itself
        if change is None or (below.parts and self.gate.shut and not change.over_base):
            return below.product(input, bias)
        made: Tensor = hooked(change, change.product)(below, input, self.gate, bias)
        return made

    def weight_over(self, below: Below) -> Tensor:
        made = below.made
        if made is not None and made.dtype == base_weight(below.host).dtype:  # what is read is not cast
            return made
        return below.weight() if self.change is None else self.change.weight_over(below.weight(), self.gate)

    def bias_over(self, below: Below) -> Tensor | None:
        bias = below.bias() if self.bias is None else self.bias
        return bias if bias is None or self.change is None else self.change.bias_over(bias, self.gate)

    def run_over(self, op: Op, below: Below, input: Tensor, bias: Tensor | None) -> Tensor:
        if below.ready is not None:
            product = _product(below, lambda weight: op.stock(input, weight, bias, *op.geometry), input)
            if product is not None:
                return product
            below = below._replace(ready=None)
        if self.change is None:
            return super().run_over(op, below, input, bias)
        weight = below.resting(input) if self.gate.known is False else below.weight()
        return self.change.run(op, input, weight, self.gate, bias, below.sample)

    def unread(self, below: Below) -> Tensor:
        return below.weight().detach() if self.change is None else self.change.unread(below.weight(), self.gate)

    def rests(self, below: Below) -> bool:
        change, gate = self.change, self.gate
        if below.parts or reference.transformed(gate.score, *self.changes()):
            return False
        # In training a reader may hold the weight until gradients are on; in evaluation fused paths want plain tensors.
        learns = gate.learns and (below.host.training or torch.is_grad_enabled())
        closed = change is None or (gate.known is False and not learns)
        closed = closed or (change is not None and change.replaces and gate.known is True and not change.trains)
        return closed and not _autocast()

    @classmethod
    def mixed(cls, parts: Sequence[Part | None], host: nn.Module, input: Tensor, ids: Tensor) -> Tensor | None:
        changes: list[tuple[Change, Gate] | None] = []
        own = False
        for part in parts:
            if part is None:
                changes.append(None)
                continue
            if not isinstance(part, Layer) or type(part) is not Layer or part.change is None:
                return None
            if _hooked(part) or _hooked(part.change):
                return None
            own = own or part.bias is not None
            changes.append((part.change, part.gate))
        kinds = {type(found[0]) for found in changes if found is not None}
        if len(kinds) != 1:
            return None
        bias = base_bias(host)
        made = kinds.pop().mixed(changes, host, input, None if own else bias, ids)
        if made is None or not own or bias is None:
            return made
        below = Below(host)
        of_tasks = torch.stack([bias if part is None else part.bias_over(below) for part in parts])  # type: ignore[misc]
        rows = of_tasks.to(made.dtype)[ids.repeat_interleave(len(made) // len(ids))]
        before, after = (made.dim() - 2, 0) if isinstance(host, nn.Linear) else (0, made.dim() - 2)
        return made + rows.view(len(made), *(1,) * before, -1, *(1,) * after)

    @property
    def over_base(self) -> bool:
        return self.change is not None and self.change.over_base

    def joins(self) -> Hashable | None:
        change, gate = self.change, self.gate
        if type(self) is Layer and change is None and self.bias is None and not _hooked(self):
            return self.kind, "closed"
        if type(self) is not Layer or change is None or self.bias is not None or gate.learn or gate.known is None:
            return None
        return None if _hooked(self) or _hooked(change) else change.joins()

    @classmethod
    def joined(cls, parts: Sequence[Part], batch: int) -> Part:
        changes = [(part.change, part.gate) for part in parts if isinstance(part, Layer) and part.change is not None]
        return type(changes[0][0]).joined(changes) if changes else parts[0]

    def idle(self) -> bool:
        return self.bias is None and (self.change is None or (self.gate.shut and not self.over_base))

    def bind(self, host: nn.Module, *, stock: bool) -> Bound | None:
        return bound(self, host, self._roads) if stock else None

    def _roads(self, host: nn.Module, general: Road) -> Bound | None:
        gate, change, bias_of = self.gate, self.change, None if self.bias is None else self
        if gate.known is None or self.over_base:
            return None
        if change is None or (gate.known is False and (gate.score is None or change.owed)):
            return bind.base(host, bias_of, general)
        return change.bind(host, gate, bias_of, general)

    @property
    def runs_host(self) -> bool:
        return True

    def reads(self, below: Below, key: str, enter: Callable[[str], None], *, fused: bool) -> Any:
        return read(self, below, key, enter, fused=fused)

    def gathers(self, host: nn.Module, *, sampled: bool, dtype: torch.dtype | None) -> Gated | None:
        change = self.change
        if change is None or type(self) is not Layer or self._forward_pre_hooks or self._forward_hooks:
            return None
        return change.gathers(host, self.gate, sampled=sampled, dtype=dtype)

    def bind_made(self, host: nn.Module) -> Made | None:
        return bind.made(host, None if self.bias is None else self, general(self))

    def cost(self, host: nn.Module, input: Tensor, output: Tensor, fraction: float) -> Cost:
        weight, gate, change = base_weight(host), self.gate, self.change
        product = 2 * multiplications(host, input, output) - (0 if change is None else change.spared(output))
        x, y, w = input.nbytes, output.nbytes, weight.nbytes
        opened = gate.known is not False and change is not None
        held = 0 if change is None else change.nbytes
        more = held if opened and change is not None and not change.replaces else 0  # else in the place of W
        extra = change.operations(input, output) if opened and change is not None else 0
        operations, moved = product + extra, x + w + more + y
        if not torch.is_grad_enabled():
            return Cost(operations, moved)
        if input.requires_grad:
            operations, moved = operations + product + extra, moved + y + w + more + x
        if opened and any(p.requires_grad for p in self.changes()):
            operations, moved = operations + (extra or product), moved + y + x + held
        elif gate.known is False and gate.learns:
            operations, moved = operations + int(fraction * product), moved + int(fraction * (x + y)) + held
        return Cost(operations, moved)

    def scratch(self, host: nn.Module, dtype: torch.dtype, rows: int, *, training: bool) -> int:
        return 0 if self.change is None else self.change.scratch(host, self.gate, dtype, rows, training=training)

    # -- what it holds

    def fold(self, weight: Tensor) -> Tensor:
        """W_t in the type of `weight`, which a closed layer is itself."""
        if self.change is None:
            return weight
        if self.change.owed or not self.gate.open:
            return self.change.closed(weight)
        exact = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda")) if _autocast() else ()
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for context in exact:
                stack.enter_context(context)
            return self.change.fold(weight.detach())

    def roles(self) -> dict[str, list[nn.Parameter]]:
        # In this order, which states of runs go by: 0.1 had the bias before a weight.
        found: dict[str, list[nn.Parameter]] = {"bias": [] if self.bias is None else [self.bias]}
        found |= {self.change.role if self.change is not None else "delta": self.changes()}
        found |= {"score": [] if self.gate.score is None else [self.gate.score]}
        return {role: parameters for role, parameters in found.items() if parameters}

    def held(self) -> Mapping[str, nn.Parameter | None]:
        return {} if self.change is None else self.change._parameters

    def values(self, below: Below) -> dict[str, Tensor]:
        host = below.host
        folded = self.fold(base_weight(host) if self.over_base else below.folded())
        own: dict[str, Tensor] = {} if folded is base_weight(host) else {weight_name(host): folded}
        bias = self.bias_over(below)
        return own if bias is None or bias is base_bias(host) else {**own, bias_name(host): bias}

    def covers(self, key: str) -> bool:
        """A layer that is closed for good leaves its weight to the base, and one without a bias of its own the bias."""
        return self.bias is not None if "bias" in key else self.change is not None

    def fix(self, open: bool) -> None:
        """Turn a learned gate into a fixed one; the change keeps its values."""
        self.gate.fix(open)
        for parameter in self.changes():
            parameter.requires_grad_(open and self.packed is None)
            if not open:
                parameter.grad = None

    def awaits(self, name: str) -> bool:
        own, _, tensor = self.former.get(name, name).partition(".")
        return own == "change" and self.change is not None and self.change.owed and tensor in self.change._parameters

    def grow(self, weight: Tensor) -> int:
        if self.change is None or not self.change.owed:
            return 0
        grown = self.change.grow(weight)
        self._wake()
        return grown

    # -- files

    def record(self, *, open: bool) -> Record:
        gate, tensors = self.gate, {}
        if gate.learn and gate.score is not None:
            tensors["score"] = gate.score.detach()
        if open and self.change is not None:
            for name in self.change.names:
                tensors |= saved({name: getattr(self.change, name).detach()}, GateError)
        if self.bias is not None:
            tensors["bias"] = saved({"bias": self.bias.detach()})["bias"]
        facts = {
            "kind": self.kind,
            "gate": {"learn": gate.learn, "open": open, "threshold": gate.threshold},
            "change": None if self.change is None else self.change.describe(),
        }
        if self.packed is not None:
            facts["packed"] = self.packed.facts()
        return Record(facts, tensors)

    @classmethod
    def read(cls, record: Record, host: nn.Module, given: nn.Module | None = None) -> Layer:
        record.only("gate", "change", "packed")
        facts = _gate_facts(record)
        if host._parameters.get(weight_name(host)) is None:
            raise record.refuse(f"expected a module with a weight, got a {original_class(host).__name__}")
        gate, open = Gate(**facts), facts["open"]
        weight, bias = base_weight(host), base_bias(host)
        if gate.score is not None:
            score = record.take({"score": ((), torch.float32)})["score"]
            if (score.item() >= gate.threshold) != open:
                raise record.refuse(
                    f"score {score.item():.6g} makes it {'closed' if open else 'open'}, but the file says otherwise",
                    GateRecordError,
                )
            gate.score.data = score.to(weight.device, copy=True)
            gate.take(score.item())
        change = None if record.facts.get("change") is None else Change.read(record, host)
        if open and (change is None or change.owed):
            raise record.refuse("open, so the tensors of its change are expected, got none", GateRecordError)
        if not open and change is not None and not change.owed:
            raise record.refuse("closed, so no change is expected, got one", GateRecordError)
        if gate.learn and change is not None and change.replaces and not change.owed:
            raise record.refuse("expected a fixed gate for a whole weight, got a learned one", GateRecordError)
        packed = Packed.of(record) if "packed" in record.facts else None
        if packed is not None and packed.shape != tuple(weight.shape):
            raise record.refuse(f"packed: expected the shape {list(weight.shape)} of the weight, got {packed.shape}")
        packs = change is not None and (change.coded or change.kind == LOW_RANK)
        if (packed is not None and not packs) or (packed is None and change is not None and change.coded):
            kind = "none" if change is None else repr(change.kind)
            raise record.refuse(f"packed: expected with a change that packing makes and nowhere else, got {kind}")
        own = None
        if "bias" in record.tensors:
            if bias is None:
                raise record.refuse("bias: the base has none in its place")
            own = record.take({"bias": (bias.shape, bias.dtype)})["bias"].to(bias.device)
        return cls(gate, change, bias=own, packed=packed)

    @classmethod
    def typed_as_base(cls, record: Record) -> list[Tensor]:
        kind = kind_of(record.facts.get("change"))
        whole = kind is not None and kind.replaces
        return [t for name, t in record.likes().items() if name == "bias" or (whole and name != "score")]

    def differs(self, other: Part) -> str | None:
        if not isinstance(other, Layer):
            return super().differs(other)
        mine, theirs = (part._stands_for() for part in (self, other))
        converted = self.change is not None and self.change.replaces and isinstance(other.change, Dense)  # a checkpoint
        if mine != theirs and not converted:
            return f"change: expected {theirs}, got {mine}"
        if (self.bias is None) != (other.bias is None):
            return f"bias: expected {'none' if other.bias is None else 'one'} of its own"
        if self.gate.learn and not other.gate.learn:
            return "gate: expected a fixed one, got a learned one"
        if self.gate.learn and self.gate.threshold != other.gate.threshold:
            return f"threshold: expected {other.gate.threshold:.6g}, got {self.gate.threshold:.6g}"
        return None

    def _stands_for(self) -> dict[str, Any] | None:
        """The change by which it is known to a method: a packed one is a Delta."""
        if self.packed is not None:
            return {"kind": Dense.kind}
        return None if self.change is None else self.change.describe()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for old, new in self.former.items():
            if (found := state_dict.pop(prefix + old, None)) is not None:
                state_dict[prefix + new] = found
        super()._load_from_state_dict(state_dict, prefix, *args)


class Installed(Part):
    """A merged layer: the weight that a task multiplies with, folded once, and its own bias if it has one."""

    kind = "installed"

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_parameter("bias", bias)
        self.__dict__["whole"] = weight

    @property
    def whole(self) -> Tensor:
        """The folded weight."""
        whole: Tensor = self.__dict__["whole"]
        return whole

    def forward(self, below: Below, input: Tensor) -> Tensor:
        return self.product(below, input, self.bias_over(below))

    def product(self, below: Below, input: Tensor, bias: Tensor | None) -> Tensor:
        return stock_forward(below.host, input, resting_weight(self, self.weight_over(below), input), bias)

    def weight_over(self, below: Below) -> Tensor:
        """Its weight, which requires a gradient only where one may be asked for: torch picks the product of some inputs
        by that flag, and merging must not change a bit."""
        whole = self.whole
        return whole if torch.is_grad_enabled() or reference.transformed(whole) else whole.detach()

    def bias_over(self, below: Below) -> Tensor | None:
        own: Tensor | None = self._parameters["bias"]
        return below.bias() if own is None else own

    def rests(self, below: Below) -> bool:
        return not self.whole.requires_grad and not reference.transformed(self.whole) and not _autocast()

    def bind(self, host: nn.Module, *, stock: bool) -> Bound | None:
        bias_of = None if self.bias is None else self
        roads = lambda host, general: bind.whole(host, lambda: self.whole, bias_of, general)  # noqa: E731
        return bound(self, host, roads) if stock else None

    @property
    def runs_host(self) -> bool:
        return True

    def reads(self, below: Below, key: str, enter: Callable[[str], None], *, fused: bool) -> Any:
        return read(self, below, key, enter, fused=fused)

    def setting(self) -> tuple[Any, ...]:
        return (self.kind,)

    def installed(self) -> list[Tensor]:
        return [self.whole]

    def cost(self, host: nn.Module, input: Tensor, output: Tensor, fraction: float) -> Cost:
        product = 2 * multiplications(host, input, output)
        x, y, w = input.nbytes, output.nbytes, self.whole.nbytes
        backward = torch.is_grad_enabled() and input.requires_grad
        return Cost(2 * product, 2 * (x + y + w)) if backward else Cost(product, x + y + w)

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.whole.requires_grad:
            self.__dict__["whole"] = refusing(self.whole)  # hooks do not travel


def _refuse(gradient: Tensor) -> None:
    raise TapsError("the task is merged, so its Deltas get no gradient; call unmerge_task() to train it")


def refusing(weight: Tensor) -> Tensor:
    """A merged weight that refuses the gradient which its Delta cannot get."""
    own = weight.detach().requires_grad_()
    own.register_hook(_refuse)
    return own
