"""TapsLinear and TapsConv2d: the stock layers with one gated Delta, for use without a TaskModel."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..errors import GateError, UnsupportedModuleError
from ..methods.base import number
from ..parts import Below, Dense, Gate, Layer, token
from ..parts.bind import Bound
from ..parts.gate import same_stamp, stamp

_Self = TypeVar("_Self", bound="_TapsLayer")


_UNBOUND: tuple[Any, Any] = (None, None)

# What bindings are not made for.
_autocast = torch._C._is_any_autocast_enabled
_transforms = torch._C._are_functorch_transforms_active


class _Read(NamedTuple):
    """A gate as one call sees it."""

    score: Tensor | None
    threshold: float
    known: bool | None


class _TapsLayer(nn.Module):
    """What both layers share: a frozen stock layer, and a :class:`taps_ext.parts.Layer` over it."""

    weight: Tensor
    bias: Any  # Tensor or None
    part: Layer
    _bound: tuple[object, Bound] | None = None  # `token.now` when it was made, and the binding
    taps_drop_in = True
    _asked = False  # whether the host is to know the gate on a GPU

    def _add_part(self, threshold: float, score_init: float) -> None:
        number(threshold, "threshold", 0.0, open_low=True)
        number(score_init, "score_init", float("-inf"))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.part = Layer(Gate(score_init=score_init, threshold=threshold), Dense(self))
        self.part.gate.size = self.weight.numel()
        self.part.gate.known = None

    @property
    def delta(self) -> Tensor:
        """Delta, shaped like `weight`, float32."""
        delta: Tensor = self.part.change.delta  # type: ignore[union-attr, assignment]
        return delta

    @property
    def score(self) -> Tensor | None:
        """The score, shape [], float32; None where the gate is fixed."""
        return self.part.gate.score

    @property
    def gate(self) -> bool | None:
        """The gate as the host knows it; None where the score is read on its device."""
        return self.part.gate.known

    @property
    def threshold(self) -> float:
        """tau: the gate is open where `score >= threshold`."""
        return self.part.gate.threshold

    def forward(self, input: Tensor) -> Tensor:
        gate = self.part.gate
        if is_compiling() or _transforms() or forward_ad._current_level >= 0:
            # The operator reads the score itself where the host was not asked to know the gate, and on a CPU.
            known = gate.known if gate.score is None or (self._asked and not gate.score.is_cpu) else None
            return self._with(_Read(gate.score, gate.threshold, known), input)
        try:
            self._follow(gate)
        except DataDependentOutputException:  # fake tensors are about, of which no value can be read
            return self._with(_Read(gate.score, gate.threshold, None), input)
        if _autocast():
            return self.part(Below(self), input)
        at, bound = self._bound or _UNBOUND
        if at is not token.now:
            bound = self._bind()
        made: Tensor = bound[torch.is_grad_enabled()](self, input, None)
        return made

    def _with(self, gate: Any, input: Tensor) -> Tensor:
        assert self.part.change is not None
        return self.part.change.product(Below(self), input, gate, self.bias)

    def _bind(self) -> Bound:
        while True:
            now = token.now
            bound = self.part.bind(self, stock=True)
            assert bound is not None
            self.__dict__["_bound"] = now, bound
            if now is token.now:  # else another thread has taken another gate, and this binding over its own
                return bound

    def _follow(self, gate: Gate) -> None:
        """Bring the host's gate up to date: on a CPU with the score's value, on a GPU, once the host has it, where the
        score's tensor or version changed."""
        score = gate._parameters.get("score")
        if score is None:  # fixed, or pruned or parametrised
            score = gate.score
            if score is None:
                return
        if score.is_cpu:
            value = score.item()
            known = value >= gate.threshold
            if known is not gate.known or value != value:
                self._take(value)
        elif gate.known is not None and not self._asked:  # found on a CPU, where that costs nothing
            gate.known = None
        elif gate.known is not None and not same_stamp(gate._seen, score):
            self.refresh_gate()

    def _take(self, score: float) -> None:
        if score != score:
            raise GateError("score: expected a number, got NaN")
        self.part.gate.known = score >= self.threshold

    def refresh_gate(self) -> bool:
        """Copy the gate to the host (one synchronisation on a GPU), which follows the score from then on: a GPU's where
        its version changes. On a CPU nothing needs to be called.

        Raises:
            GateError: the score is NaN.
        """
        score = self.score
        if score is not None:
            self._take(score.item())
            self._asked, self.part.gate._seen = True, stamp(score)
        return self.gate is True

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_bound", "_taps_cast")}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__ and name not in ("_bound", "training"):  # a setting, such as `stride`
            self.__dict__["_bound"] = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for old, new in (("delta", "part.change.delta"), ("score", "part.gate.score")):  # as 0.1 called them
            if (found := state_dict.pop(prefix + old, None)) is not None:
                state_dict[prefix + new] = found
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _from(cls: type[_Self], stock: nn.Module, kind: type[nn.Module], threshold: float, score_init: float) -> _Self:
        if type(stock) is not kind:
            raise UnsupportedModuleError(f"layer: expected a plain {kind.__name__}, got {type(stock).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for key, value in stock.__dict__.items():
            layer.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
        layer._add_part(threshold, score_init)
        return layer

    def to_stock(self, *, merge: bool = True) -> nn.Module:
        """The stock layer, with its mode. `merge`: with `W_t` for its weight, a new tensor where the gate is open;
        otherwise with the base's own weight."""
        kind: Any = type(self).__mro__[2]
        plain: nn.Module = kind.__new__(kind)
        nn.Module.__init__(plain)
        skipped = ("part", "_bound", "_asked", "_taps_cast")
        for key, value in self.__dict__.items():
            if key not in skipped:
                plain.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
        plain._modules.pop("part", None)
        if merge and self.score is not None:
            self._take(self.score.item())  # it may have been written to since the last call
        folded = self.part.fold(self.weight) if merge else self.weight
        if folded is not self.weight:
            plain._parameters["weight"] = nn.Parameter(folded, requires_grad=False)
        return plain


class TapsLinear(_TapsLayer, nn.Linear):
    """`nn.Linear` on `W + g * Delta` (TAPS, arXiv 2203.16708, equation 2).

    `weight [N, K]` and `bias [N]` are kept and frozen; `delta [N, K]` (zero) and `score []` are trained, in
    float32. `gate` is None (the score is read on its device) until :meth:`refresh_gate` copies it to the host.

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear`.
        threshold: the gate is open where `score >= threshold`.
        score_init: the score's first value.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        threshold: float = 0.1,
        score_init: float = 0.15,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._add_part(threshold, score_init)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, threshold: float = 0.1, score_init: float = 0.15) -> TapsLinear:
        """Wrap a plain `nn.Linear`, sharing (and freezing) its parameters."""
        return cls._from(linear, nn.Linear, threshold, score_init)

    @classmethod
    def from_stock(cls, stock: nn.Module, *, threshold: float = 0.1, score_init: float = 0.15) -> TapsLinear:
        """As :meth:`from_linear`."""
        return cls._from(stock, nn.Linear, threshold, score_init)


class TapsConv2d(_TapsLayer, nn.Conv2d):
    """`nn.Conv2d` on `W + g * Delta` (TAPS, arXiv 2203.16708, equation 2).

    `weight [O, C / groups, kh, kw]` and `bias [O]` are kept and frozen; `delta` (shaped like `weight`, zero)
    and `score []` are trained, in float32. All padding modes are those of `nn.Conv2d`.

    Args:
        in_channels, out_channels, kernel_size and the rest up to dtype: as `nn.Conv2d`.
        threshold, score_init: as :class:`TapsLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        threshold: float = 0.1,
        score_init: float = 0.15,
    ) -> None:
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._add_part(threshold, score_init)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, threshold: float = 0.1, score_init: float = 0.15) -> TapsConv2d:
        """Wrap a plain `nn.Conv2d`, sharing (and freezing) its parameters."""
        return cls._from(conv, nn.Conv2d, threshold, score_init)

    @classmethod
    def from_stock(cls, stock: nn.Module, *, threshold: float = 0.1, score_init: float = 0.15) -> TapsConv2d:
        """As :meth:`from_conv2d`."""
        return cls._from(stock, nn.Conv2d, threshold, score_init)
