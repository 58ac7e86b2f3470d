"""Between a plain fine-tuned checkpoint and a task, without losing a bit.

In float32 some weights have no Delta with round(W + Delta) = W_t (W_t much smaller than W), so a converted layer
holds a Delta where one is exact in every element, and the checkpoint's own weight otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, store
from ..base.head import own_head
from ..base.ownership import check_state
from ..base.scan import Scan, inside, names_of
from ..errors import ConfigError
from ..parts import Dense, Gate, Instead, Layer, Part, Whole
from ..parts.host import base_bias, base_weight, bias_name, original_class, weight_of
from ..routing.route import unroute
from ..store.errors import show
from ..store.shards import Checkpoint
from .task import join

Thin = Callable[[str, Layer, nn.Module], Part]
"""What makes a part smaller: called with a layer's name, its part and its host."""

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


class Given:
    """A checkpoint under the base's names, whatever wrappers' prefixes either of them has: shapes and types at once
    (`likes`), a tensor's values where they are asked for.

    Raises:
        ConfigError: no tensors by name, or two of one name.
    """

    def __init__(self, checkpoint: Mapping[str, Tensor] | Checkpoint, base: nn.Module) -> None:
        if not isinstance(checkpoint, (Mapping, Checkpoint)):
            raise ConfigError(f"state_dict: expected a mapping of names to tensors, got {type(checkpoint).__name__}")
        if isinstance(checkpoint, Checkpoint):
            infos = {name: info for name, (_, info) in checkpoint.tensors.items()}
            tensors: Mapping[str, Any] = {
                name: torch.empty(info.shape, dtype=info.torch_dtype, device="meta") for name, info in infos.items()
            }
            self._read: Callable[[str], Tensor] = checkpoint.read
        else:
            tensors, self._read = checkpoint, checkpoint.__getitem__
        own = {store.plain_name(name): name for name in base.state_dict()}
        self._names: dict[str, str] = {}
        self.likes: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ConfigError(
                    f"state_dict: expected tensors by name, got {type(tensor).__name__} under {show(name)}"
                )
            short = own.get(store.plain_name(name), store.plain_name(name))
            if short in self._names:
                raise ConfigError(f"state_dict: {show(name)} is there twice, with and without a wrapper's prefix")
            self._names[short], self.likes[short] = name, tensor.detach()
        self._base = base.state_dict()

    def value(self, name: str, *, like: bool = True) -> Tensor:
        """A tensor. Raises ConfigError for Inf or NaN, but where the base has the same and `like` says that it may."""
        tensor = self._read(self._names[name]).detach()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            other = self._base.get(name) if like else None
            if other is None or not same_bits(other, tensor.to(other.device)):
                shown = name if name in self._base else show(name)  # a head may have any
                raise ConfigError(f"state_dict: {shown}: expected finite values, got Inf or NaN")
        return tensor


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


def _check_rest(base: nn.Module, held: set[str], given: Given, heads: list[str]) -> None:
    """Raise if a tensor that the task does not hold differs from the base's, or tied ones from each other."""
    first: dict[int, str] = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        if any(inside(name.rpartition(".")[0], head) for head in heads):
            continue
        other = first.setdefault(id(tensor), name)
        if other != name:
            if not same_bits(given.value(name), given.value(other)):
                raise ConfigError(
                    f"state_dict: {name}: expected the same values as {other}, being one tensor in the base"
                )
        elif name not in held and not same_bits(tensor, given.value(name).to(tensor.device)):
            raise ConfigError(
                f"state_dict: {name}: expected the base's values, since the task cannot hold it, got others"
            )


def extract(
    base: nn.Module,
    checkpoint: Mapping[str, Tensor] | Checkpoint,
    found: Scan,
    head: nn.Module | None,
    thin: Thin | None = None,
) -> Iterator[tuple[str, Part]]:
    """The parts of the task whose model is the checkpoint, bit for bit but for what `thin` leaves out, one at a time:
    of a checkpoint in files no more is in memory than a part takes. `found`: what of the base the task is given; see
    `TaskModel.extract_task`. What does not fit may be refused at the end, and then none of them counts.
    """
    given, path = Given(checkpoint, base), found.head
    heads = [] if path is None else names_of(base, base.get_submodule(path))
    if head is not None and path is None:
        raise ConfigError("head_module: no linear classifier was found in the base; name the module to replace")
    wanted, likes = (
        {n: t for n, t in tensors.items() if not any(inside(n.rpartition(".")[0], h) for h in heads)}
        for tensors in (base.state_dict(), given.likes)
    )
    check_state(wanted, likes, where="state_dict", what="base")
    held: set[str] = set()
    for layer, host in found.weights.items():
        name, bias = weight_of(layer, host), base_bias(host)
        own_bias = None if bias is None else torch.empty_like(bias).copy_(given.value(join(layer, bias_name(host))))
        made = _layer(host, torch.empty_like(base_weight(host)).copy_(given.value(name)), own_bias)
        yield layer, made if thin is None else thin(layer, made, host)
        del made, own_bias
        held |= {name, *([] if bias is None else [join(layer, bias_name(host))])}
    for module, host in {**found.norms, **found.others}.items():
        for part in found.own({module: host}).values():
            with torch.no_grad():
                for name, tensor in part.state_dict(keep_vars=True).items():
                    tensor.copy_(given.value(join(module, name)))
                    held.add(join(module, name))
            yield module, part
    _check_rest(base, held, given, heads)
    if path is not None:
        yield path, Instead(_own_head(base, path, given, heads, head), "head")


def _own_head(base: nn.Module, path: str, given: Given, heads: list[str], head: nn.Module | None) -> nn.Module:
    """The head that the checkpoint has under each of these names."""
    first, *others = [[n for n in given.likes if n.startswith(h + ".")] for h in heads]
    of_head = {name[len(heads[0]) + 1 :]: given.value(name, like=False) for name in first}
    for again, names in zip(heads[1:], others, strict=True):
        for name in names:
            here = of_head.get(name[len(again) + 1 :])
            if here is None or here.shape != given.likes[name].shape or not same_bits(given.value(name), here):
                raise ConfigError(
                    f"state_dict: {show(name)} of the head: expected one value under {' and '.join(heads)}"
                )
    return _head(base, path, of_head, head)
