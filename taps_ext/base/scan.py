"""What the base model is made of: layers that can be gated, norms, other tensors, and the head."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModuleError, suggestion
from ..parts import Own, Part
from ..parts.host import (
    GATED_TYPES,
    base_bias,
    base_weight,
    bias_name,
    host_of,
    hosts_by_name,
    is_norm,
    owner_of,
    weight_name,
)
from .caches import appeared
from .weights import KNOWN_TYPES, TABLES, globs, hosts_in, refusal


@dataclass(frozen=True)
class Reach:
    """What of a base its tasks are given, beside what their configs say; files keep it.

    Attributes:
        frozen: names of parameters that the user froze before the base was adapted, and which stay the base's unless
            `target_modules` names their layer.
        any_weight: False for linear layers, 2-d convolutions and attention alone, as files without `weights` have it.
    """

    frozen: frozenset[str] = frozenset()
    any_weight: bool = False


@dataclass
class Scan:
    """What methods make parts for, by name, in module order.

    Attributes:
        order: the place of every module and parameter.
        gated: linear and 2-d convolution layers and attention's input projections, which have kernels of ours.
        rebuilt: every other weight that can be gated, which torch multiplies with: a layer (transposed convolutions,
            transformers' Conv1D), or one weight of a module that has more of its own (recurrent layers, experts).
        norms: normalisation layers. others: modules that own further parameters or buffers.
        head: the head's name, or None.
        frozen: names of parameters that the user froze before the base was adapted. left: those of weights that
            `exclude_modules` names by themselves. any_weight: whether the base has weights that are not of `gated`.
        taps: the modules whose outputs a dense base gives to decoders; none where the base says nothing of any.
    """

    order: dict[str, int] = field(default_factory=dict)
    gated: dict[str, nn.Module] = field(default_factory=dict)
    rebuilt: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    others: dict[str, nn.Module] = field(default_factory=dict)
    head: str | None = None
    frozen: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()
    any_weight: bool = False
    taps: tuple[str, ...] = ()

    @property
    def reach(self) -> Reach:
        """What files keep of how it was made."""
        return Reach(self.frozen, self.any_weight)

    @property
    def weights(self) -> dict[str, nn.Module]:
        """All that can be gated: `gated` and `rebuilt`."""
        both = {**self.gated, **self.rebuilt}
        return {name: both[name] for name in sorted(both, key=self.order.__getitem__)}

    def bias(self, name: str, host: nn.Module) -> Tensor | None:
        """The base's bias of a layer, of which a task may have one of its own; None where there is none, or where the
        user froze it."""
        full = f"{name}.{bias_name(host)}" if name else bias_name(host)
        return None if full in self.frozen else base_bias(host)

    def owned(self, name: str, module: nn.Module) -> list[str]:
        """The names of a module's parameters that a task may have of its own: neither gated nor frozen."""
        taken = {*self.rebuilt, *self.frozen, *self.left}
        held = [key for key, parameter in module._parameters.items() if parameter is not None]
        return [key for key in held if (f"{name}.{key}" if name else key) not in taken]

    def own(
        self, modules: Mapping[str, nn.Module], *, buffers: bool = True, only: Callable[[str], bool] | None = None
    ) -> dict[str, Part]:
        """A task's own tensors for each of these modules; with `buffers` False their parameters alone.

        Args:
            only: which parameters, by their names in the module; modules that have none of them are left out.

        Raises:
            UnsupportedModuleError: a module whose tensors cannot be a task's own, naming it.
        """
        made: dict[str, Part] = {}
        for name, module in modules.items():
            held = self.owned(name, module)
            every = sum(parameter is not None for parameter in module._parameters.values())
            names = None if only is None and len(held) == every else held if only is None else list(filter(only, held))
            if names == [] and (only is not None or not buffers or not _lasts(module)):
                continue
            try:
                made[name] = Own(module, buffers=buffers, only=names)
            except UnsupportedModuleError as error:
                raise UnsupportedModuleError(f"{name or 'the base'}: {error}") from None
        return made

    def follows(self) -> dict[str, str]:
        """Norm -> the gated layer that it follows in module order, for norms that have one before them."""
        names = sorted([*self.gated, *self.norms], key=self.order.__getitem__)
        found, last = {}, None
        for name in names:
            if name in self.gated:
                last = name
            elif last is not None:
                found[name] = last
        return found


def in_order(base: nn.Module, parts: Mapping[str, Part]) -> dict[str, Part]:
    """Parts in one order, whoever made them: gated ones, norms, others, and modules that stand in for the base's; each
    in module order.

    Raises:
        ConfigError: a part over a module that the base has not.
    """
    order = {name: index for index, name in enumerate(hosts_by_name(base))}
    for name in parts:
        if name not in order:
            raise ConfigError(f"parts: the base has no module {name!r}{suggestion(name, order)}")

    def rank(name: str) -> tuple[int, int]:
        part = parts[name]
        kind = 0 if part.gate is not None else 3 if part.replacement is not None else 1 + ("norm" not in part.roles())
        return kind, order[name]

    return {name: parts[name] for name in sorted(parts, key=rank)}


def match(patterns: Iterable[str], names: Sequence[str], argument: str) -> list[str]:
    """The names that any glob matches, in order; a pattern that matches none is a ConfigError naming it."""
    found: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise ConfigError(f"{argument}: pattern {pattern!r} matches no layer{suggestion(pattern, names)}")
        found.update(hits)
    return [name for name in names if name in found]


def inside(name: str, parent: str | None) -> bool:
    """True if the module `name` is `parent` or lies in it."""
    return parent is not None and (name == parent or name.startswith(parent + ".") or parent == "")


def _lasts(module: nn.Module, late: Collection[int] = ()) -> bool:
    """True if the module has floating-point buffers, or others that its state holds. `late`: buffers (by id) that are
    its forward's business."""
    lasting = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return any(b is not None for b in lasting.values()) or any(
        b is not None and b.is_floating_point() and id(b) not in late for b in module._buffers.values()
    )


def names_of(base: nn.Module, module: nn.Module) -> list[str]:
    """All names that a module has in the base, the first one first."""
    return [name for name, other in base.named_modules(remove_duplicate=False) if other is module]


def shared_tensors(base: nn.Module) -> list[tuple[str, str]]:
    """Pairs of full names of parameters that are one tensor in the base."""
    first: dict[int, str] = {}
    pairs = []
    for name, module in base.named_modules():
        for key, parameter in module._parameters.items():
            full = f"{name}.{key}" if name else key
            if parameter is not None and (other := first.setdefault(id(parameter), full)) != full:
                pairs.append((other, full))
    return pairs


def trainable(base: nn.Module) -> dict[str, bool]:
    """Whether each floating-point parameter requires a gradient now."""
    return {name: p.requires_grad for name, p in base.named_parameters() if p.is_floating_point()}


def frozen_by_user(flags: Mapping[str, bool], heads: Iterable[str]) -> frozenset[str]:
    """The parameters outside the heads that require no gradient, where others do. `flags`: of :func:`trainable`."""
    kept = list(heads)
    body = {n: flag for n, flag in flags.items() if not any(inside(n.rpartition(".")[0], head) for head in kept)}
    return frozenset(name for name, flag in body.items() if not flag) if any(body.values()) else frozenset()


def check_shared(base: nn.Module, modules: Iterable[str], heads: Collection[str] = ()) -> None:
    """Raise if some of the modules, which are to have tensors of their own, share a parameter: it would become two.

    Args:
        heads: modules of the base that the task has others in place of, which cannot be excluded.

    Raises:
        UnsupportedModuleError: naming all of them.
    """
    chosen, tied = set(modules), dict[str, list[str]]()
    for one, other in shared_tensors(base):
        tied.setdefault(one, [one]).append(other)
    tied = {one: [name for name in names if name.rpartition(".")[0] in chosen] for one, names in tied.items()}
    found = [names for names in tied.values() if len(names) > 1]
    if not found:
        return
    holders = list(dict.fromkeys(name.rpartition(".")[0] for names in found for name in names))
    holders = [name for name in holders if not any(inside(name, head) for head in heads)]
    others = [name for name, module in base.named_modules() if module._parameters and name not in holders]
    what = "; ".join(
        f"{', '.join(names[1:])}: {'is' if len(names) == 2 else 'are'} one tensor with {names[0]}" for names in found
    )
    raise UnsupportedModuleError(
        f"{what}; a task would train each as its own, so that they part; to leave them frozen, name their modules in "
        f"exclude_modules ({globs(holders, others)})"
    )


def check_kept(base: nn.Module, layers: Iterable[str]) -> None:
    """Raise if a module keeps a gated weight beside its parameters: what it reads there is the base's, never a task's.

    Raises:
        UnsupportedModuleError: naming both.
    """
    hosts = {name: host_of(base, name) for name in layers}
    weights = {id(base_weight(host)): name for name, host in hosts.items()}
    recurrent = {id(owner_of(host)) for host in hosts.values() if isinstance(owner_of(host), nn.RNNBase)}
    for name, module in base.named_modules():
        for key, value in module.__dict__.items():
            if key == "_flat_weights" and id(module) in recurrent:
                continue
            items = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            )
            for item in items if key != "_parameters" else ():
                if isinstance(item, nn.Parameter) and id(item) in weights:
                    raise UnsupportedModuleError(
                        f"{weights[id(item)]}: its weight is kept in {name or 'the base'}.{key} too, where no task is "
                        "seen; name the layer in exclude_modules"
                    )


def scan(
    base: nn.Module,
    head: str | None,
    *,
    target: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    heads: Sequence[str] = (),
    reach: Reach = Reach(any_weight=True),
    freeze_unsupported: bool = False,
) -> Scan:
    """Sort the base's modules; see :class:`Scan`. `heads`: further ones beside `head`.

    Args:
        reach: what of the base is given at all.
        freeze_unsupported: leave out what cannot be gated instead of raising.

    Raises:
        ConfigError: a pattern matches nothing.
        UnsupportedModuleError: targeted layers cannot be gated, all of them named with what is in the way.
    """
    places = hosts_by_name(base)
    order = {name: index for index, name in enumerate(places)}
    result = Scan(head=head, order=order, frozen=reach.frozen, taps=tuple(getattr(base, "tap_names", ())))
    named = [
        (name, module)
        for name, (module, key) in places.items()
        if not key and not any(inside(name, h) for h in (head, *heads))
    ]
    reasons = {name: reason for name, module in named if (reason := refusal(module)) is not None}
    known = {name: hosts_in(module, name, asked=target is not None) for name, module in named if name not in reasons}
    if not reach.any_weight:
        known = {name: hosts for name, hosts in known.items() if isinstance(places[name][0], GATED_TYPES)}
    layers = [host for name, _ in named for host in ([name] if name in reasons else known.get(name, []))]
    late = appeared(base)
    owners = [n for n, m in named if m._parameters or m._buffers or n in layers]
    if target is not None:
        chosen = match(target, layers, "target_modules")
    else:
        tables = {host for name, module in named if isinstance(module, TABLES) for host in known.get(name, [])}
        chosen = [name for name in layers if name not in tables and not _rests(places, name, result.frozen)]
    dropped: set[str] = set()
    if exclude is not None:
        dropped = set(match(exclude, list(dict.fromkeys([*owners, *layers])), "exclude_modules"))

    def left(name: str) -> bool:
        return any(name == other or (other and inside(name, other)) for other in dropped)

    chosen = [name for name in chosen if not left(name)]
    others = [host for hosts in known.values() for host in hosts if not isinstance(host_of(base, host), GATED_TYPES)]
    result.any_weight, result.left = bool(others), frozenset(name for name in others if left(name))
    refused = {name: reasons[name] for name in chosen if name in reasons}
    first: dict[int, str] = {}
    for name in chosen:
        if name not in refused:
            host = host_of(base, name)
            other = first.setdefault(id(base_weight(host)), name)
            if other == name:
                (result.gated if isinstance(host, GATED_TYPES) else result.rebuilt)[name] = host
            else:
                refused[name] = f"shares its weight with {other}"
    if refused and not freeze_unsupported:
        raise _unsupported(refused, [name for name in (*layers, *owners) if name not in refused])
    for name, module in named:
        if left(name) or name in reasons or name in result.gated or name in result.rebuilt:
            continue
        slots = any(host in result.rebuilt for host in known.get(name, []))
        every = any(parameter is not None for parameter in module._parameters.values())
        owned = bool(result.owned(name, module))
        if is_norm(module):
            if owned or not every:
                result.norms[name] = module
        elif (owned or _lasts(module, late)) and (slots or not isinstance(module, (*GATED_TYPES, *KNOWN_TYPES))):
            result.others[name] = module
    return result


def _unsupported(refused: Mapping[str, str], others: Collection[str]) -> UnsupportedModuleError:
    """Everything that stands in the way, and how to go on without it."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        by_reason.setdefault(reason, []).append(name or "the base")
    found = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    one = len(refused) == 1
    return UnsupportedModuleError(
        f"{found}; to leave {'it' if one else 'them'} frozen, name {'it' if one else 'them'} in exclude_modules "
        f"({globs(list(refused), others)}), or give TaskModel unsupported='freeze'"
    )


def _rests(places: Mapping[str, tuple[nn.Module, str]], name: str, frozen: Collection[str]) -> bool:
    """Whether the user froze a host's weight before the base was adapted."""
    module, key = places[name]
    weight = key or weight_name(module)
    full = name if key else f"{name}.{weight}" if name else weight
    return full in frozen
