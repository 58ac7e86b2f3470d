"""What a step may not do: leave weights, averages or statistics that are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import DivergedError


class StepGuard:
    """Undo a step whose loss or gradients are not finite, and stop a run of which too many in a row are.

    Args:
        held: tasks, families and whatever else is trained, whose buffers a step may write, by what they are called.
        most: how many bad steps in a row are left out before the run stops; None: 3.
    """

    def __init__(self, held: Mapping[str, nn.Module], most: int | None) -> None:
        self.held, self.most, self.bad = held, 3 if most is None else most, 0
        self.saved: list[tuple[Tensor, Tensor]] = []

    def before(self) -> None:
        """Remember what a training forward writes without gradients: running statistics."""
        buffers = [buffer for held in self.held.values() for buffer in held.buffers()]
        if [id(buffer) for buffer, _ in self.saved] != [id(buffer) for buffer in buffers]:
            self.saved = [(buffer, torch.empty_like(buffer)) for buffer in buffers]
        for buffer, copy in self.saved:
            copy.copy_(buffer)

    @torch.no_grad()
    def bad_parameter(self) -> str | None:
        """The first parameter whose gradient is not finite, by what holds it and its name."""
        for title, held in self.held.items():
            named = [(name, p.grad) for name, p in held.named_parameters() if p.grad is not None]
            if named and not all_finite(grad for _, grad in named):
                return next(f"{title}: {name}" for name, grad in named if not all_finite([grad]))
        return None

    @torch.no_grad()
    def undo(self, what: str, parameters: Iterable[nn.Parameter]) -> None:
        """Leave everything as it was before the step, and say so.

        Args:
            what: which step it is and what is wrong with it. parameters: those that have gradients now.

        Raises:
            DivergedError: so many steps in a row were bad.
        """
        self.leave_out(parameters)
        self.bad += 1
        advice = "lower lr, or look for Inf or NaN in the data"
        if self.bad > self.most:
            raise DivergedError(f"{what}; after {self.bad} such steps in a row the run stops; {advice}")
        warnings.warn(f"{what}; the step was left out; {advice}", stacklevel=3)

    @torch.no_grad()
    def leave_out(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave everything as it was before the step."""
        for buffer, copy in self.saved:
            buffer.copy_(copy)
        for parameter in parameters:
            parameter.grad = None

    def good(self) -> None:
        """A step was taken."""
        self.bad = 0


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True without an Inf or a NaN in any of them; one synchronisation for each device."""
    held = [tensor for tensor in tensors if tensor.numel()]
    by_device: dict[torch.device, list[Tensor]] = {}
    for norm in torch._foreach_norm(held, float("inf")) if held else ():
        by_device.setdefault(norm.device, []).append(norm.double())
    return all(bool(torch.isfinite(torch.stack(norms)).all()) for norms in by_device.values())
