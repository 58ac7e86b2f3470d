"""The identity of a base: SHA-256 over what tasks build on."""

from __future__ import annotations

from torch import nn

from .. import store
from .caches import fresh_buffers
from .scan import inside, names_of


def base_fingerprint(base: nn.Module, head: str | None) -> str:
    """Fingerprint of all parameters and buffers outside the head (non-persistent buffers included, of an adapted base
    as they were before its forward built some anew)."""
    tensors = [*base.named_parameters(remove_duplicate=False), *fresh_buffers(base).items()]
    heads = [] if head is None else names_of(base, base.get_submodule(head))
    return store.fingerprint({n: t for n, t in tensors if not any(inside(n.rpartition(".")[0], h) for h in heads)})
