"""Offloading: a base whose weights are brought by hooks when a module runs, and are nowhere in between.

Tasks are made, rebuilt, merged and saved from the base's weights, outside of its modules' forwards too.
"""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModuleError
from .scan import inside


def _brought(module: nn.Module) -> bool:
    """True if code that is not the module's own runs before its forward: hooks, or a forward put in its place."""
    return bool(module._forward_pre_hooks) or "forward" in module.__dict__


def offloaded(base: nn.Module) -> str | None:
    """The name of a tensor on `meta` in a module that is hooked, or whose parent is; None where there is none. A base
    that is on `meta` without hooks holds no values and wants none, as for a dry run."""
    hooked: list[str] = []
    for name, module in base.named_modules():
        if _brought(module):
            hooked.append(name)
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and tensor.is_meta and any(inside(name, above) for above in hooked):
                    return f"{name}.{key}" if name else key
    return None


def refusal(tensor: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{tensor}: is on the device 'meta', and a hook is to bring its values when its module runs (cpu_offload, "
        "disk_offload, a device_map): tasks need the base's weights where they run; take the hooks away "
        "(accelerate.hooks.remove_hook_from_module(base, recurse=True)) or load the base without offloading, before it "
        "is wrapped"
    )


def check_present(base: nn.Module) -> None:
    """Raise UnsupportedModuleError for a base that is offloaded, naming a tensor."""
    tensor = offloaded(base)
    if tensor is not None:
        raise refusal(tensor)
