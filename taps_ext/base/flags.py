"""The base's flags as they were before adapting."""

from __future__ import annotations

from torch import nn

from ..routing.route import unroute


class Flags:
    """The training mode of a base's modules and `requires_grad` of its parameters, as they are now."""

    def __init__(self, base: nn.Module) -> None:
        self.root = base.training  # the base itself is not kept alive by its flags
        self.modes = [(module, module.training) for module in base.modules() if module is not base]
        self.gradients = {name: parameter.requires_grad for name, parameter in base.named_parameters()}

    def restore_copy(self, copied: nn.Module, base: nn.Module) -> None:
        """Make a copy of the routed base what the base will be after `unroute` and :meth:`restore`."""
        modes = {id(module): mode for module, mode in self.modes}
        for own, module in zip(copied.modules(), base.modules(), strict=True):
            unroute(own)
            own.training = self.root if module is base else modes.get(id(module), module.training)
        self._restore_gradients(copied)

    def restore(self, base: nn.Module) -> None:
        base.training = self.root
        for module, mode in self.modes:
            module.training = mode
        self._restore_gradients(base)

    def _restore_gradients(self, module: nn.Module) -> None:
        """By name: loading may have put other parameters in the place of those that were."""
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self.gradients.get(name, parameter.requires_grad))
