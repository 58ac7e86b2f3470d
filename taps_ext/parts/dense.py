"""Dense: W + Delta, the change of TAPS and of fine-tuning. Whole: a weight in the place of W + Delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from . import bind, sampling
from .bind import Bound, Road
from .change import Change, register_change
from .gate import Gate
from .host import Op, base_weight, op_of, resting_weight, weight_name
from .sampling import Sample


@register_change("dense")
class Dense(Change):
    """`W_t = W + Delta` (TAPS, arXiv 2203.16708, equation 2), Delta `[*W.shape]`, zero at the start."""

    delta: nn.Parameter | None

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {"delta": weight.shape}

    def fold(self, weight: Tensor) -> Tensor:
        return weight if self.delta is None else ops.effective_weight(weight, self.delta, gate=True)

    def added(self, weight: Tensor) -> Tensor | None:
        return self.delta

    def run(
        self,
        op: Op,
        input: Tensor,
        weight: Tensor,
        gate: Gate,
        bias: Tensor | None,
        sample: Sample | None = None,
    ) -> Tensor:
        tensors = (input, weight, self.delta, gate.score, bias)
        return sampling.run(op.gated, op.trailing, sample, *tensors, *op.geometry, **self._known(gate))

    @classmethod
    def mixed(
        cls,
        changes: Sequence[tuple[Change, Gate] | None],
        host: nn.Module,
        input: Tensor,
        bias: Tensor | None,
        ids: Tensor,
    ) -> Tensor | None:
        gates = [None if found is None else found[1] for found in changes]
        thresholds = {gate.threshold for gate in gates if gate is not None and gate.known is None}
        if len(thresholds) > 1:  # which only a device that reads the scores has to know
            return None
        deltas = [None if found is None else found[0]._parameters["delta"] for found in changes]
        scores = [
            gate.score if gate is not None and (gate.learns or gate.known is None) and delta is not None else None
            for gate, delta in zip(gates, deltas, strict=True)
        ]
        known = [False if gate is None else gate.known for gate in gates]
        op, input = op_of(host, input)
        weight = resting_weight(host, base_weight(host), input)
        run: Any = ops.mixed_linear if op.geometry == () else ops.mixed_conv2d
        threshold = {"threshold": thresholds.pop()} if thresholds else {}
        made: Tensor = run(input, weight, deltas, scores, ids, bias, *op.geometry, gates=known, **threshold)
        return made

    def weight_over(self, weight: Tensor, gate: Gate) -> Tensor:
        if gate.shut:
            return weight
        if self.delta is None:  # as a zero Delta would: torch picks some products by that flag
            learns = (gate.learns and torch.is_grad_enabled()) or reference.transformed(gate.score)
            return weight.detach().requires_grad_() if learns else weight
        make = ops.unread_weight if gate.known is False else ops.effective_weight
        return make(weight, self.delta, gate.score, **self._known(gate))

    def unread(self, weight: Tensor, gate: Gate) -> Tensor:
        if self.delta is None:
            return weight.detach().requires_grad_(gate.learns and torch.is_grad_enabled())
        if not torch.is_grad_enabled() or not (self.trains or gate.learns):
            return weight.detach()
        return ops.unread_weight(weight, self.delta, gate.score, **self._known(gate))

    @staticmethod
    def _known(gate: Gate) -> dict[str, Any]:
        return {"gate": gate.known, "threshold": gate.threshold}

    def bind(self, host: nn.Module, gate: Gate, bias_of: nn.Module | None, general: Road) -> Bound | None:
        return bind.dense(host, gate, self, bias_of, general)

    def gathers(self, host: nn.Module, gate: Gate, *, sampled: bool, dtype: torch.dtype | None) -> ops.Gated | None:
        """A closed layer is W itself, whose gradient is formed for its score: where all of the batch is taken, and not
        in fp16, where sums over all pixels leave the type's range, and their infinity times a zero of Delta is NaN.

        None where the weight that the layer will have is not known yet: a hook of others' may put another in its place
        before the layer runs.
        """
        weight, delta = host._parameters.get(weight_name(host)), self._parameters.get("delta")
        known, score = gate.known, gate.score
        learns, closed = score is not None and score.requires_grad, known is False
        if type(self) is not Dense or self._forward_pre_hooks or self._forward_hooks or _watched(host):
            return None
        if weight is None or delta is None or weight.requires_grad or weight.device != delta.device or weight.is_meta:
            return None
        if not (learns or (delta.requires_grad and not closed)):
            return None
        if closed and (sampled or torch.float16 in (dtype, weight.dtype)):
            return None
        below: Tensor = weight
        if closed and dtype is not None and dtype != weight.dtype:
            kept = resting_weight(host, weight, weight)
            below = kept if kept.dtype == dtype else weight.to(dtype)
        return ops.Gated(below, delta, score if learns or known is None else None, known, gate.threshold, dtype)

    def scratch(self, host: nn.Module, gate: Gate, dtype: torch.dtype, rows: int, *, training: bool) -> int:
        """The weight that is rebuilt, or whose gradient is formed, outside of the results; or what is packed."""
        weight = base_weight(host)
        if self.delta is None or ops._C is None:
            return 0
        if not training and gate.known and isinstance(host, (nn.Linear, nn.Conv2d)):
            packed = _fused_bytes(weight, self.delta, dtype, rows, getattr(host, "groups", 1))
            if packed is not None:
                return packed
        learns = training and gate.learns
        if gate.known is not False or (learns and (weight.dim() == 2 or dtype != self.delta.dtype)):
            return weight.numel() * dtype.itemsize
        return 0


@register_change("whole")
class Whole(Change):
    """`W_t = weight`, for a converted checkpoint: for some W_t no Delta gives it in float32. It has the type of the
    host's weight, and follows `.half()` and `.bfloat16()`."""

    role = "weight"
    replaces = True

    weight: nn.Parameter | None

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {"weight": weight.shape}

    def dtype_of(self, weight: Tensor) -> torch.dtype:
        return weight.dtype

    def start(self, weight: Tensor) -> None:
        assert self.weight is not None
        self.weight.copy_(weight)

    def fold(self, weight: Tensor) -> Tensor:
        if self.weight is None:
            return weight
        # A product of some inputs is picked by the flag, which must say no more than the caller asks for.
        return self.weight if torch.is_grad_enabled() else self.weight.detach()

    def added(self, weight: Tensor) -> Tensor | None:
        """The nearest Delta: it gives this weight up to the rounding of the difference."""
        return None if self.weight is None else self.weight.float() - weight.float()

    def run(
        self,
        op: Op,
        input: Tensor,
        weight: Tensor,
        gate: Gate,
        bias: Tensor | None,
        sample: Sample | None = None,
    ) -> Tensor:
        whole = self.weight_over(weight, gate)
        return op.stock(input, resting_weight(self, whole, input), bias, *op.geometry)

    def bind(self, host: nn.Module, gate: Gate, bias_of: nn.Module | None, general: Road) -> Bound | None:
        if not gate.known:
            return bind.base(host, bias_of, general)

        def weight() -> Tensor:
            own: Tensor = self._parameters["weight"]  # type: ignore[assignment]
            return own

        return bind.whole(host, weight, bias_of, general)

    def _apply(self, fn: object, recurse: bool = True) -> Whole:
        result: Whole = nn.Module._apply(self, fn, recurse)
        return result


def _watched(host: nn.Module) -> bool:
    """True where somebody else's code runs before the host: profilers of ours leave its weight alone."""
    hooks = host._forward_pre_hooks.values()
    return bool(hooks) and not all((getattr(hook, "__module__", None) or "").startswith("taps_ext.") for hook in hooks)


def _one_layout(weight: Tensor, delta: Tensor) -> bool:
    if weight.is_contiguous():
        return delta.is_contiguous()
    last = torch.channels_last
    return weight.dim() == 4 and weight.is_contiguous(memory_format=last) and delta.is_contiguous(memory_format=last)


def _fused_bytes(weight: Tensor, delta: Tensor, dtype: torch.dtype, rows: int, groups: int = 1) -> int | None:
    """What an open layer on the CPU packs of its input where it multiplies without rebuilding its weight, else None."""
    assert ops._C is not None
    convolution, narrow = weight.dim() == 4, dtype == torch.bfloat16
    known = not convolution or (groups == 1 and weight[0, 0].numel() <= ops._C.most_places)
    fusable = (
        known
        and weight.device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and _one_layout(weight, delta)
    )
    sizes = {"rows": rows, "inputs": weight[0].numel()}
    packed = ops._C.fused_bytes(convolution=convolution, narrow=narrow, **sizes)
    places = weight[0, 0].numel() if convolution else 0
    path = ops._C.choose(open=True, fusable=fusable, narrow=narrow, places=places, outputs=weight.shape[0], **sizes)
    return packed if path == "fused" else None
