"""TapsLinear and TapsConv2d: the stock layers with one gated Delta, for use without a TaskModel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..errors import GateError, UnsupportedModuleError
from ..parts import Bound
from .bind import bind_layer
from .forward import gated_forward
from .gated import Stamp, float32_bound, keep_float32, same_stamp, stamp

_Self = TypeVar("_Self", bound="_TapsLayer")


# What bindings are not made for.
_autocast = torch._C._is_any_autocast_enabled
_transforms = torch._C._are_functorch_transforms_active


class _TapsLayer(nn.Module):
    """What both layers share: `delta`, `score`, `threshold` and the host's copy of the gate."""

    weight: Tensor
    bias: Any  # Tensor or None
    whole = merged = None  # no merged weight
    _bound: Bound | None = None  # of the gate as it is; made at the next forward where there is none
    _seen: Stamp | None = None

    def _add_gate(self, threshold: float, score_init: float) -> None:
        weight = self.weight
        options: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
        weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros(weight.shape, **options))
        self.score = nn.Parameter(torch.full([], score_init, **options))
        self.threshold = float32_bound(threshold)
        self.gate: bool | None = None

    def forward(self, input: Tensor) -> Tensor:
        if is_compiling() or _transforms() or forward_ad._current_level >= 0:
            known = None if self.score.is_cpu else self.gate  # on a CPU the operator reads the score itself
            return gated_forward(self, self, input, self.bias, gate=known)
        self._follow()
        if _autocast():
            return gated_forward(self, self, input, self.bias, gate=self.gate)
        bound = self._bound or self._bind()
        made: Tensor = bound[torch.is_grad_enabled()](self, input, None)
        return made

    def _general(self, host: nn.Module, input: Tensor, sample: None) -> Tensor:
        return gated_forward(self, self, input, self.bias, gate=self.gate)

    def _bind(self) -> Bound:
        bound = self.__dict__["_bound"] = bind_layer(self, self)
        return bound

    def _follow(self) -> None:
        """Bring the host's gate up to date: on a CPU with the score's value, on a GPU, once the host has it, where the
        score's tensor or version changed."""
        score = self._parameters["score"]
        assert score is not None
        if score.is_cpu:
            value = score.item()
            gate = value >= self.threshold
            if gate is not self.gate or value != value:
                self._take(value)
        elif self.gate is not None and not same_stamp(self._seen, score):
            self.refresh_gate()

    def _take(self, score: float) -> None:
        if score != score:
            raise GateError("score: expected a number, got NaN")
        self.gate, self._bound = score >= self.threshold, None

    def refresh_gate(self) -> bool:
        """Copy the gate to the host (one synchronisation on a GPU), which follows the score from then on: a GPU's where
        its version changes. On a CPU nothing needs to be called.

        Raises:
            GateError: the score is NaN.
        """
        self._take(self.score.item())
        self._seen = stamp(self.score)
        return self.gate is True

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_bound", "_seen", "_taps_cast")}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__ and name not in ("_bound", "_seen", "training"):  # a setting, such as `stride`
            self.__dict__["_bound"] = None

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        self._seen = None
        return super()._apply(keep_float32(self, fn, ("delta", "score")), recurse)

    @classmethod
    def _from(cls: type[_Self], stock: nn.Module, kind: type[nn.Module], threshold: float, score_init: float) -> _Self:
        if type(stock) is not kind:
            raise UnsupportedModuleError(f"layer: expected a plain {kind.__name__}, got {type(stock).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for key, value in stock.__dict__.items():
            layer.__dict__[key] = dict(value) if isinstance(value, dict) else value
        layer._add_gate(threshold, score_init)
        return layer


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
        self._add_gate(threshold, score_init)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, threshold: float = 0.1, score_init: float = 0.15) -> TapsLinear:
        """Wrap a plain `nn.Linear`, sharing (and freezing) its parameters."""
        return cls._from(linear, nn.Linear, threshold, score_init)


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
        self._add_gate(threshold, score_init)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, threshold: float = 0.1, score_init: float = 0.15) -> TapsConv2d:
        """Wrap a plain `nn.Conv2d`, sharing (and freezing) its parameters."""
        return cls._from(conv, nn.Conv2d, threshold, score_init)
