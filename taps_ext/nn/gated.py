"""GatedLayer: what one task adds to one linear or convolution layer of the base."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import GateError, TapsError
from ..parts import Bound, Part
from . import changes
from .bind import bind_layer
from .forward import base_bias, base_weight, bias_name, gated_forward, weight_name
from .sampling import Sample


def keep_float32(module: nn.Module, fn: Callable[[Tensor], Tensor], names: tuple[str, ...]) -> Any:
    """Wrap `fn` of `Module._apply` so that the named float32 parameters change device but never dtype."""
    kept = {id(p) for name in names if (p := module._parameters.get(name)) is not None}
    kept |= {id(p.grad) for name in names if (p := module._parameters.get(name)) is not None and p.grad is not None}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in kept:
            return fn(tensor)
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def float32_bound(threshold: float) -> float:
    """The threshold as a float32 score is compared with it, on the host as on the device."""
    return torch.tensor(threshold, dtype=torch.float32).item()


Stamp = tuple[weakref.ref[Tensor], int]


def stamp(tensor: Tensor) -> Stamp:
    """A tensor as it is now: the object, not kept alive, and its version counter (inference tensors have none)."""
    return weakref.ref(tensor), -1 if tensor.is_inference() else tensor._version


def same_stamp(seen: Stamp | None, tensor: Tensor) -> bool:
    """True if `tensor` is the stamped object and has not been written to since."""
    return seen is not None and seen[0]() is tensor and not tensor.is_inference() and seen[1] == tensor._version


def _refuse(gradient: Tensor) -> None:
    raise TapsError("the task is merged, so its Deltas get no gradient; call unmerge_task() to train it")


def refusing(weight: Tensor) -> Tensor:
    """A merged weight that refuses the gradient which its Delta cannot get."""
    own = weight.detach().requires_grad_()
    own.register_hook(_refuse)
    return own


class GatedLayer(Part):
    """A task's share of one layer: `W_t = W + g * Delta`, `g = 1[score >= threshold]`.

    A converted checkpoint may have a `weight` of its own instead: `W_t = weight` where the (fixed) gate is open, since
    for some W_t no Delta gives it in float32.

    Args:
        shape: the base weight's shape; None makes no Delta (a layer that is closed for good).
        learn: True trains a score that decides the gate; False fixes it to `open`.
        open: the state of a fixed gate.
        score_init: the score's first value (0.15 in the authors' code).
        threshold: tau (0.1 in the authors' code).
        bias: a task's own bias `[N]`, or None to use the base layer's.
        weight: the task's own weight, with `shape=None` and `learn=False`. It follows `.half()` and `.bfloat16()`.
        device: where Delta and score live. Both are float32 and stay so through `.half()` and `.bfloat16()`.

    """

    gated = True
    group = "values"

    delta: nn.Parameter | None
    score: nn.Parameter | None
    bias: nn.Parameter | None
    weight: nn.Parameter | None

    def __init__(
        self,
        shape: torch.Size | None,
        *,
        learn: bool = True,
        open: bool = True,
        score_init: float = 0.15,
        threshold: float = 0.1,
        bias: Tensor | None = None,
        weight: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        delta = None if shape is None else nn.Parameter(torch.zeros(shape, **options))
        self.register_parameter("delta", delta)
        self.register_parameter("score", nn.Parameter(torch.full([], score_init, **options)) if learn else None)
        for name, value in (("bias", bias), ("weight", weight)):
            own = None if value is None else value.detach().clone(memory_format=torch.preserve_format)
            self.register_parameter(name, None if own is None else nn.Parameter(own))
        self.threshold = float32_bound(threshold)
        self.learn = learn
        self.size = 0 if shape is None else shape.numel()
        self.owed = False  # its Delta is zero and not there yet
        self.gate = (score_init >= threshold) if learn else open
        self.merged = None
        self._seen: Stamp | None = None

    @property
    def gate(self) -> bool | None:
        """What the forward uses: a bool known to the host, or None to read the score on its device."""
        gate: bool | None = self.__dict__["_gate"]
        return gate

    @gate.setter
    def gate(self, gate: bool | None) -> None:
        if gate is not self.__dict__.get("_gate", self):
            self.__dict__["_gate"] = gate
            changes.note()

    @property
    def merged(self) -> Tensor | None:
        """The weight that the task multiplies by while it is merged."""
        merged: Tensor | None = self.__dict__["_merged"]
        return merged

    @merged.setter
    def merged(self, weight: Tensor | None) -> None:
        self.__dict__["_merged"] = weight
        changes.note()

    @property
    def whole(self) -> Tensor | None:
        """The tensor to multiply by where there is one: the merged weight, or the task's own while it is open."""
        if self.merged is not None:
            return self.merged
        return self.weight if self.gate else None

    @property
    def change(self) -> nn.Parameter | None:
        """What an open gate lets in: Delta, or the task's own weight; None for a layer that is closed for good."""
        return self.weight if self.delta is None else self.delta

    @property
    def open(self) -> bool:
        """The gate, read from the score's device where the host does not know it."""
        return bool(self.gate) if self.gate is not None or self.score is None else self.score.item() >= self.threshold

    def bind(self, host: nn.Module, *, stock: bool) -> Bound | None:
        return bind_layer(host, self) if stock else None

    def roles(self) -> dict[str, list[nn.Parameter]]:
        named = {"delta": self.delta, "weight": self.weight, "score": self.score, "bias": self.bias}
        return {role: [parameter] for role, parameter in named.items() if parameter is not None}

    def fold(self, weight: Tensor) -> Tensor:
        """W_t in the type of the base's `weight`, which a closed layer is itself."""
        if not self.open or self.change is None:
            return weight
        if self.delta is None:
            return self.change.detach().clone(memory_format=torch.preserve_format)
        return ops.reconstruct_(torch.empty_like(weight), weight.detach(), self.delta.detach(), gate=True)

    def stored(self) -> dict[str, Tensor]:
        return {} if self.bias is None else {"bias": self.bias}

    def values(self, host: nn.Module) -> dict[str, Tensor]:
        weight = base_weight(host)
        folded = self.fold(weight)
        own: dict[str, Tensor] = {} if folded is weight else {weight_name(host): folded}
        return own if self.bias is None else {**own, bias_name(host): self.bias}

    # The general road; bind.py has the usual ones.
    def forward(self, host: nn.Module, input: Tensor, sample: Sample | None = None) -> Tensor:
        bias = base_bias(host) if self.bias is None else self.bias
        return gated_forward(host, self, input, bias, sample, gate=self.gate)

    def stale(self) -> bool:
        """True if the host's copy of the gate may differ from the score: another tensor, or one written to."""
        return self.learn and self.score is not None and not same_stamp(self._seen, self.score)

    def take(self, score: float, name: str) -> None:
        """Set the host gate from the score's value; a NaN score raises :class:`GateError`."""
        assert self.score is not None
        if score != score:
            raise GateError(f"{name}: score: expected a number, got NaN")
        self.gate = score >= self.threshold
        self._seen = stamp(self.score)

    def owe(self, size: int) -> None:
        """Be a closed layer whose Delta of `size` elements is zero, and takes no memory until it is to be trained."""
        self.size, self.owed = size, True

    def grow(self, weight: Tensor) -> int:
        """Make the zero Delta that is owed, like the base's `weight`; returns its bytes."""
        if not self.owed:
            return 0
        self.owed = False
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32), self.learn or bool(self.gate))
        changes.note()
        return self.delta.nbytes

    def fix(self, open: bool) -> None:
        """Turn a learned gate into a fixed one; Delta keeps its values."""
        self.learn, self.gate, self._seen = False, open, None
        self.register_parameter("score", None)
        if self.change is not None:
            self.change.requires_grad_(open)
            if not open:
                self.change.grad = None
        changes.note()  # the score is gone, too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedLayer:
        self._seen = None
        result: GatedLayer = super()._apply(keep_float32(self, fn, ("delta", "score")), recurse)
        if self.merged is not None:
            moved = fn(self.merged.detach())
            self.merged = refusing(moved) if self.merged.requires_grad else moved
        changes.note()  # scores may be where to read them costs more, or less
        return result

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key != "_taps_cast"}
        return {**kept, "_seen": None}  # a copy's version counters start anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.merged is not None and self.merged.requires_grad:
            self.merged = refusing(self.merged)  # hooks do not travel

    def extra_repr(self) -> str:
        kind = "learned" if self.learn else "fixed"
        return f"{kind}, gate={self.gate}, threshold={self.threshold:.6g}"
