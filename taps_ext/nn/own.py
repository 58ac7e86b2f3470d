"""TaskTensors: run a module's original forward on a task's own parameters and buffers.

A shallow copy of the host shares its submodules and settings and differs only in its direct tensors, so that
any class with any forward (BatchNormAct2d, LayerNorm2d, a ViT's class token) keeps working, in any thread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModuleError

NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone(memory_format=torch.preserve_format)


class TaskTensors(nn.Module):
    """A task's own copies of one module's direct parameters and buffers, used in its original forward.

    Args:
        host: the base module. Its tensors are copied in value; it is never changed.
        cls: the class whose forward runs (the host's class before it was routed).
    """

    def __init__(self, host: nn.Module, cls: type[nn.Module] | None = None) -> None:
        super().__init__()
        for name, parameter in host._parameters.items():
            own = _copied(parameter)
            trainable = own is not None and own.is_floating_point()
            self.register_parameter(name, None if own is None else nn.Parameter(own, requires_grad=trainable))
        for name, buffer in host._buffers.items():
            self.register_buffer(name, _copied(buffer), name not in host._non_persistent_buffers_set)
        clone = object.__new__(cls or type(host))
        clone.__dict__.update(host.__dict__)
        clone.__dict__["_parameters"] = self._parameters
        clone.__dict__["_buffers"] = self._buffers
        clone.__dict__["training"] = self.training
        self.__dict__["clone"] = clone  # not a submodule: its children belong to the base

    def forward(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["clone"].forward(*args, **kwargs)

    def train(self, mode: bool = True) -> TaskTensors:
        super().train(mode)
        self.__dict__["clone"].__dict__["training"] = mode
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name: what a task file must hold."""
        return dict(self.state_dict(keep_vars=True))


class TaskNorm(TaskTensors):
    """A task's own normalisation: affine parameters and running statistics (if the module keeps any).

    Raises:
        UnsupportedModuleError: `host` is not a batch, instance, layer, group or RMS norm.
    """

    def __init__(self, host: nn.Module, cls: type[nn.Module] | None = None) -> None:
        if not isinstance(host, NORM_TYPES):
            raise UnsupportedModuleError(f"host: expected a normalisation layer, got {type(host).__name__}")
        super().__init__(host, cls)
