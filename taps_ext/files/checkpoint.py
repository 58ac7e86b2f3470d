"""Between a plain fine-tuned checkpoint and a task, without losing a bit.

In float32 some weights have no Delta with round(W + Delta) = W_t (W_t much smaller than W), so a converted layer
holds a Delta where one is exact in every element, and the checkpoint's own weight otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import ops, store
from ..base.head import own_head
from ..base.ownership import check_state
from ..base.scan import inside, names_of, scan
from ..errors import ConfigError
from ..methods import FullConfig
from ..parts import Dense, Gate, Instead, Layer, Part, Whole
from ..parts.host import base_bias, base_weight, bias_name, original_class, weight_name
from ..routing.route import unroute
from .task import join

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(first: Tensor, second: Tensor) -> bool:
    """True if two tensors of one shape and dtype hold the same bits (0.0 and -0.0 differ, a NaN equals itself)."""
    if first.dtype == torch.bool:
        return torch.equal(first, second)
    kind = _BITS[first.element_size()]
    return torch.equal(first.detach().contiguous().view(kind), second.detach().contiguous().view(kind))


def exact_delta(weight: Tensor, wanted: Tensor) -> Tensor | None:
    """A float32 Delta with round(weight + Delta) = wanted in every bit, or None if W_ft - W is not one."""
    delta = torch.empty_like(weight, dtype=torch.float32)
    delta.copy_(wanted.float() - weight.float())
    made = ops.reconstruct_(torch.empty_like(weight), weight, delta, gate=True)
    return delta if same_bits(made, wanted) else None


def _given(state_dict: Mapping[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's tensors under the base's names, whatever wrappers' prefixes either of them has."""
    plain: dict[str, Tensor] = {}
    own = {store.plain_name(name): name for name in base.state_dict()}
    if not isinstance(state_dict, Mapping):
        raise ConfigError(f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ConfigError(f"state_dict: expected tensors by name, got {type(tensor).__name__} under {name!r}")
        short = own.get(store.plain_name(name), store.plain_name(name))
        if short in plain:
            raise ConfigError(f"state_dict: {name!r} is there twice, with and without a wrapper's prefix")
        plain[short] = tensor.detach()
    return plain


def _head(base: nn.Module, path: str, values: dict[str, Tensor], head: nn.Module | None) -> nn.Module:
    """The checkpoint's head: `head`, or the base's own kind of head with the checkpoint's number of outputs."""
    old = base.get_submodule(path)
    weight = values.get("weight")
    if head is not None:
        own = own_head(base, head)
    elif original_class(old) is nn.Linear and isinstance(old, nn.Linear) and weight is not None and weight.ndim == 2:
        own = nn.utils.skip_init(
            nn.Linear,
            old.in_features,
            len(weight),
            old.bias is not None,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
    else:
        own = copy.deepcopy(old)
        for module in own.modules():
            unroute(module)
        own.requires_grad_(True)
    check_state(
        {join(path, n): t for n, t in own.state_dict().items()},
        {join(path, n): t for n, t in values.items()},
        where="state_dict",
        what="head",
    )
    own.load_state_dict(values)
    return own


def _layer(host: nn.Module, wanted: Tensor, bias: Tensor | None) -> Layer:
    """How one layer holds its weight: closed (the base's bits), a Delta, or a weight of its own."""
    weight = base_weight(host).detach()
    if same_bits(weight, wanted):
        return Layer(Gate(learn=False, open=False), Dense(host, held=False), bias=bias)
    delta = exact_delta(weight, wanted)
    change: Dense | Whole = Whole(host) if delta is None else Dense(host)
    with torch.no_grad():
        next(change.parameters()).copy_(wanted if delta is None else delta)
    return Layer(Gate(learn=False), change, bias=bias)


def _check_finite(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], path: str | None) -> None:
    """Raise for Inf or NaN that the base does not have in the same place."""
    for name, tensor in given.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            like = wanted.get(name)
            if like is None or not same_bits(like, tensor.to(like.device)):
                full = name if path is None else join(path, name)
                raise ConfigError(f"state_dict: {full}: expected finite values, got Inf or NaN")


def _check_rest(base: nn.Module, held: set[str], given: Mapping[str, Tensor], heads: list[str]) -> None:
    """Raise if a tensor that the task does not hold differs from the base's, or tied ones from each other."""
    first: dict[int, str] = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        if any(inside(name.rpartition(".")[0], head) for head in heads):
            continue
        other = first.setdefault(id(tensor), name)
        if other != name:
            if not same_bits(given[name], given[other]):
                raise ConfigError(
                    f"state_dict: {name}: expected the same values as {other}, being one tensor in the base"
                )
        elif name not in held and not same_bits(tensor, given[name].to(tensor.device)):
            raise ConfigError(
                f"state_dict: {name}: expected the base's values, since the task cannot hold it, got others"
            )


def extract(
    base: nn.Module,
    state_dict: Mapping[str, Tensor],
    config: FullConfig,
    path: str | None,
    head: nn.Module | None,
) -> dict[str, Part]:
    """The parts of the task whose model is the checkpoint, bit for bit. `path` names the base's head; see
    `TaskModel.extract_task`."""
    given = _given(state_dict, base)
    heads = [] if path is None else names_of(base, base.get_submodule(path))
    of_head, *others = [{n[len(h) + 1 :]: t for n, t in given.items() if n.startswith(h + ".")} for h in heads] or [{}]
    for again in others:
        for name, tensor in again.items():
            if name not in of_head or tensor.shape != of_head[name].shape or not same_bits(tensor, of_head[name]):
                raise ConfigError(f"state_dict: {name} of the head: expected one value under {' and '.join(heads)}")
    given, wanted = (
        {n: t for n, t in tensors.items() if not any(inside(n.rpartition(".")[0], h) for h in heads)}
        for tensors in (given, base.state_dict())
    )
    check_state(wanted, given, where="state_dict", what="base")
    _check_finite(wanted, given, None)
    _check_finite({}, of_head, path)
    if head is not None and path is None:
        raise ConfigError("head_module: no linear classifier was found in the base; name the module to replace")
    own = None if path is None else _head(base, path, of_head, head)
    found = scan(base, path, target=config.target_modules, exclude=config.exclude_modules)
    held: set[str] = set()
    parts: dict[str, Part] = {}
    for layer, host in found.gated.items():
        name, bias = join(layer, weight_name(host)), base_bias(host)
        own_bias = None if bias is None else torch.empty_like(bias).copy_(given[join(layer, bias_name(host))])
        parts[layer] = _layer(host, torch.empty_like(base_weight(host)).copy_(given[name]), own_bias)
        held |= {name, join(layer, bias_name(host))}
    for module, part in {**found.own(found.norms), **found.own(found.others)}.items():
        parts[module] = part
        with torch.no_grad():
            for name, tensor in part.state_dict(keep_vars=True).items():
                tensor.copy_(given[join(module, name)])
                held.add(join(module, name))
    _check_rest(base, held, given, heads)
    return parts if own is None or path is None else {**parts, path: Instead(own, "head")}
