"""Gate: when a part lets its change in, g = 1[score >= threshold], learned straight-through, or fixed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import reference
from ..errors import GateError
from . import token

Stamp = tuple[weakref.ref[Tensor], int]


def stamp(tensor: Tensor) -> Stamp:
    """A tensor as it is now: the object, not kept alive, and its version counter (inference tensors have none)."""
    return weakref.ref(tensor), -1 if tensor.is_inference() else tensor._version


def same_stamp(seen: Stamp | None, tensor: Tensor) -> bool:
    """True if `tensor` is the stamped object and has not been written to since."""
    return seen is not None and seen[0]() is tensor and not tensor.is_inference() and seen[1] == tensor._version


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


class _Straight(torch.autograd.Function):
    """`chosen` with the score's straight-through derivative. The difference gets no gradient, rather than one of zeros;
    of the score's gradient it gets its own."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, score: Tensor, difference: Tensor) -> Tensor:
        ctx.save_for_backward(difference)
        ctx.dtype = score.dtype
        return chosen.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (difference,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        wide = torch.promote_types(gradient.dtype, ctx.dtype)
        score = (gradient * difference).sum(dtype=wide).to(ctx.dtype) if wanted[1] else None
        return gradient if wanted[0] else None, score, None


class Gate(nn.Module):
    """The gate of one layer of one task.

    Args:
        learn: True trains a score that decides the gate (TAPS, arXiv 2203.16708, equation 4: binary forward, the
            identity backward); False fixes it to `open`.
        open: the state of a fixed gate.
        score_init: the score's first value (0.15 in the authors' code).
        threshold: tau (0.1 in the authors' code).

    Attributes:
        score: float32, shape []; it stays float32 through `.half()`. None where the gate is fixed.
        known: the gate as the host knows it, which forwards use; None where the score is read on its device.
        size: how many of the base's weights it is the gate of.
    """

    score: nn.Parameter | None

    def __init__(
        self, *, learn: bool = True, open: bool = True, score_init: float = 0.15, threshold: float = 0.1
    ) -> None:
        super().__init__()
        self.learn, self.size = learn, 0
        # As a float32 score is compared with it, on the host as on the device.
        self.threshold = torch.tensor(threshold, dtype=torch.float32, device="cpu").item()
        score = nn.Parameter(torch.full([], score_init, dtype=torch.float32)) if learn else None
        self.register_parameter("score", score)
        self._seen: Stamp | None = None
        self.known = (score_init >= threshold) if learn else open

    @property
    def known(self) -> bool | None:
        known: bool | None = self.__dict__["_known"]
        return known

    @known.setter
    def known(self, known: bool | None) -> None:
        if known is not self.__dict__.get("_known", self):
            self.__dict__["_known"] = known
            token.note()

    @property
    def open(self) -> bool:
        """The gate, read from the score's device where the host does not know it."""
        return bool(self.known) if self.known is not None or self.score is None else self.score.item() >= self.threshold

    @property
    def learns(self) -> bool:
        """True if the score is to have a gradient."""
        return self.score is not None and self.score.requires_grad

    @property
    def shut(self) -> bool:
        """True if what lies below is all there is to do: closed, and no score is to have a gradient."""
        return (
            self.known is False
            and not (self.learns and torch.is_grad_enabled())
            and not reference.transformed(self.score)
        )

    def select(self, opened: Tensor, closed: Tensor) -> Tensor:
        """`opened` or `closed` by the gate, with the score's straight-through derivative <G, opened - closed>, for
        plain torch code. What is not selected gets no gradient."""
        chosen = opened if self.known else closed
        if self.known is None:
            assert self.score is not None
            chosen = torch.where(self.score >= self.threshold, opened, closed)
        if self.score is None or not (self.learns or reference.transformed(self.score)) or not torch.is_grad_enabled():
            return chosen
        difference = opened - closed
        compiling = torch.compiler.is_compiling()
        if not compiling and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
            made: Tensor = _Straight.apply(chosen, self.score, difference)
            return made
        if compiling:  # whose backward is not differentiated
            difference = difference.detach()
        straight = (self.score - self.score.detach()).to(chosen.dtype) * difference
        return chosen + torch.where(torch.isfinite(difference), straight, torch.zeros_like(straight))

    def setting(self) -> tuple[Any, ...]:
        """What its arithmetic depends on beside the tensors that autograd watches."""
        watched = self.score if self.known is None else None
        version = None if watched is None or watched.is_inference() else watched._version
        return self.known, None if watched is None else id(watched), version

    def stale(self) -> bool:
        """True if the host's copy may differ from the score: another tensor, or one written to."""
        return self.learn and self.score is not None and not same_stamp(self._seen, self.score)

    def take(self, score: float, name: str = "") -> None:
        """Set the host's copy from the score's value; a NaN score raises :class:`GateError`."""
        assert self.score is not None
        if score != score:
            raise GateError(f"{name}: score: expected a number, got NaN".removeprefix(": "))
        self.known = score >= self.threshold
        self._seen = stamp(self.score)

    def fix(self, open: bool) -> None:
        """Turn a learned gate into a fixed one."""
        self.learn, self.known, self._seen = False, open, None
        self.register_parameter("score", None)
        token.note()  # the score is gone, too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        self._seen = None
        result: Gate = super()._apply(keep_float32(self, fn, ("score",)), recurse)
        token.note()  # the score may be where to read it costs more, or less
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # a copy's version counters start anew

    def extra_repr(self) -> str:
        return f"{'learned' if self.learn else 'fixed'}, known={self.known}, threshold={self.threshold:.6g}"
