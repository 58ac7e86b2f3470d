"""What tracers are told that would record one forward of a TaskModel, or its base alone, for every task.

Which layers run is decided at each call, from scores and the task; a trace would keep one decision, or none.
"""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

from torch import nn
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from ..errors import TapsError

MODULE_CALL = nn.Module.__call__
"""As it is while nothing stands in its place. `torch.fx` puts a function there; a look is cheap."""


def refuse(tracer: str) -> NoReturn:
    """Raise TapsError for a tracer, with the way that it has."""
    raise TapsError(
        f"{tracer}: a TaskModel decides per call what runs, which a trace cannot hold; trace or export "
        "merge_and_unload(name) instead, a plain model"
    )


def check_symbolic(args: Any, kwargs: Any) -> None:
    """Raise TapsError for the proxies of `torch.fx`, which records a base's layers by name, and none of a task's."""
    if any(isinstance(leaf, Proxy) for leaf in tree_leaves((args, kwargs))):
        refuse("torch.fx")


class ActiveTask:
    """The default of `task`: the active one."""

    def __repr__(self) -> str:
        return "<the active task>"

    def __ne__(self, other: object) -> bool:
        """Tracers that fill in defaults find none here, so that they come as far as the model, which refuses them."""
        return other is not self and other is not inspect.Parameter.empty

    __hash__ = object.__hash__

    def __fx_create_arg__(self, tracer: Any) -> NoReturn:
        """Called by `torch.fx` before it calls a forward that has this default."""
        refuse("torch.fx")


class Untraced(nn.Module):
    """A module that refuses TorchScript, by functions that torch calls for nothing else."""

    def _slow_forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """In the place of `forward` in `torch.jit.trace` and in the exporters that are made of it."""
        refuse("torch.jit.trace, or torch.onnx.export(dynamo=False)")

    def __prepare_scriptable__(self) -> NoReturn:
        refuse("torch.jit.script")
