"""The identity of a base: one digest over all its parameters and buffers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from .errors import DuplicateKeyError, UnsupportedTensorError, show
from .tensors import tensor_digest

_WRAPPERS = frozenset({"module", "_orig_mod"})


def plain_name(name: str) -> str:
    """`name` without the `module` and `_orig_mod` that DataParallel and torch.compile put into dotted
    paths.
    """
    *modules, last = name.split(".")
    return ".".join([part for part in modules if part not in _WRAPPERS] + [last])


def fingerprint(named_tensors: Mapping[str, Tensor]) -> str:
    """Digest "sha256:<hex>" over names, dtypes, shapes and canonical bytes, in the order of the plain names.

    The same for channels_last and contiguous, CPU and CUDA, wrapped and unwrapped models; another for a cast,
    another value or another name. Hashes one tensor at a time, so at most one is copied (from CUDA, or to
    make it contiguous).

    Raises DuplicateKeyError if two names are one without their wrappers, UnsupportedTensorError naming a
    sharded, meta, uninitialised, sparse, quantised or complex tensor.
    """
    plain: dict[str, str] = {}
    for name in named_tensors:
        if "_fsdp_wrapped_module" in name.split("."):
            raise UnsupportedTensorError("fingerprint", f"tensor {show(name)}: sharded by FSDP; gather the full state")
        other = plain.setdefault(plain_name(name), name)
        if other != name:
            raise DuplicateKeyError(
                "fingerprint", f"tensors {show(other)} and {show(name)} are both {show(plain_name(name))}"
            )
    total = hashlib.sha256(b"taps fingerprint 1\n")
    for name in sorted(plain):
        digest = tensor_digest(named_tensors[plain[name]], name=plain[name], path="fingerprint")
        total.update(json.dumps([name, digest]).encode() + b"\n")
    return "sha256:" + total.hexdigest()
