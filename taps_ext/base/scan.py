"""What the base model is made of: layers that can be gated, norms, other tensors, and the head."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import ConfigError, UnsupportedModuleError, suggestion
from ..parts import Own, Part
from ..parts.host import GATED_TYPES, base_weight, bias_name, is_norm, original_class, weight_name
from .caches import appeared

_UNSUPPORTED: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
)


@dataclass
class Scan:
    """Module names of one base model, in module order.

    `order`: the place of every module; `gated`: linear and 2-d convolution layers; `norms`; `others`: modules that own
    further parameters or buffers; `head`: the head's name, or None.
    """

    order: dict[str, int] = field(default_factory=dict)
    gated: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    others: dict[str, nn.Module] = field(default_factory=dict)
    head: str | None = None

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
            held = [key for key, parameter in module._parameters.items() if parameter is not None]
            names = None if only is None else list(filter(only, held))
            if names == []:
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
    order = {name: index for index, (name, _) in enumerate(base.named_modules())}
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


def _quantised(module: nn.Module) -> bool:
    """True for the linear and convolution layers of torch.ao's eager and graph quantisation."""
    return ".quantized." in f"{type(module).__module__}." and hasattr(module, "_packed_params")


def _refusal(name: str, module: nn.Module) -> str | None:
    """Why a module that holds weights cannot be gated, or None if it can or need not be."""
    kind = original_class(module).__name__
    if isinstance(module, GATED_TYPES):
        if any(isinstance(hook, (SpectralNorm, WeightNorm)) for hook in module._forward_pre_hooks.values()):
            return f"{name}: expected a plain {kind}, got one under weight or spectral norm; remove it first"
        if parametrize.is_parametrized(module):
            return f"{name}: expected a plain {kind}, got a parametrised one; remove the parametrisation first"
        weight = module._parameters.get(weight_name(module))
        if weight is not None and (type(weight) is not nn.Parameter or not weight.is_floating_point()):
            got = f"{type(weight.data).__name__} of {weight.dtype}"
            return f"{name}: expected a {kind} with a plain floating-point weight, got a {got}"
        known = {weight_name(module), bias_name(module)}
        extra = [key for key, parameter in module._parameters.items() if parameter is not None and key not in known]
        if module._parameters.get(weight_name(module)) is None or extra:
            held = [key for key, parameter in module._parameters.items() if parameter is not None]
            return f"{name}: expected a {kind} with {' and '.join(sorted(known, reverse=True))} alone, got {held}"
        return None
    if isinstance(module, _UNSUPPORTED) or _quantised(module):
        kind = f"quantised {kind}" if _quantised(module) else kind
        return f"{name}: {kind} cannot be gated (supported: Linear, Conv2d, MultiheadAttention)"
    return None


def _owns(module: nn.Module, late: set[int]) -> bool:
    """True if the module has direct parameters, floating-point buffers, or others that its state holds. `late`: buffers
    (by id) that are its forward's business."""
    lasting = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return any(p is not None for p in (*module._parameters.values(), *lasting.values())) or any(
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


def check_shared(base: nn.Module, modules: Iterable[str]) -> None:
    """Raise if two of the modules, which are to have tensors of their own, share a parameter: it would become two.

    Raises:
        UnsupportedModuleError: naming both.
    """
    chosen = set(modules)
    for one, other in shared_tensors(base):
        if {one.rpartition(".")[0], other.rpartition(".")[0]} <= chosen:
            raise UnsupportedModuleError(
                f"{other}: is one tensor with {one}, which a task would train as two; to leave one of them frozen, "
                "name its module in exclude_modules"
            )


def check_kept(base: nn.Module, layers: Iterable[str]) -> None:
    """Raise if a module keeps a gated weight beside its parameters: what it reads there is the base's, never a task's.

    Raises:
        UnsupportedModuleError: naming both.
    """
    weights = {id(base_weight(base.get_submodule(name))): name for name in layers}
    for name, module in base.named_modules():
        for key, value in module.__dict__.items():
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
) -> Scan:
    """Sort the base's modules; see :class:`Scan`. `heads`: further ones beside `head`.

    Raises:
        ConfigError: a pattern matches nothing.
        UnsupportedModuleError: a targeted module cannot be gated, naming it; two layers share one weight.
    """
    result = Scan(head=head, order={name: index for index, (name, _) in enumerate(base.named_modules())})
    named = [(n, module) for n, module in base.named_modules() if not any(inside(n, h) for h in (head, *heads))]
    layers = [n for n, m in named if isinstance(m, GATED_TYPES) or _refusal(n, m) is not None]
    chosen = match(target, layers, "target_modules") if target is not None else layers
    owners = [n for n, m in named if m._parameters or m._buffers or n in layers]
    dropped = set(match(exclude, owners, "exclude_modules")) if exclude is not None else set()
    chosen = [name for name in chosen if not any(inside(name, d) for d in dropped)]
    seen: dict[int, str] = {}
    late = appeared(base)
    for name, module in named:
        left = name in dropped or any(d and inside(name, d) for d in dropped)
        if name in chosen:
            reason = _refusal(name, module)
            if reason is not None:
                raise UnsupportedModuleError(f"{reason}; to leave it frozen, name it in exclude_modules")
            other = seen.setdefault(id(base_weight(module)), name)
            if other != name:
                raise UnsupportedModuleError(
                    f"{name}: shares its weight with {other}; to leave it frozen, name it in exclude_modules"
                )
            result.gated[name] = module
        elif is_norm(module):
            if not left:
                result.norms[name] = module
        elif not left and not isinstance(module, GATED_TYPES + _UNSUPPORTED) and _owns(module, late):
            result.others[name] = module
    return result
