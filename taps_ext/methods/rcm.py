"""Reparameterised convolutions (RCM, arXiv 2007.12540): a task's own modulator behind each convolution."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.scan import Scan
from ..errors import ConfigError, TapsError, suggestion
from ..parts import Dense, Gate, Layer, Modulator, Part
from ..parts.host import base_bias, base_weight
from .base import MethodConfig, one_of, register_method

_SHORTCUTS = ("downsample", "shortcut")  # what torchvision and timm call them, and small ResNets


def _shortcut(name: str, host: nn.Module) -> bool:
    """True for the 1 x 1 convolution of a residual connection that changes shape."""
    small = isinstance(host, nn.Conv2d) and host.kernel_size == (1, 1)
    return small and any(word in _SHORTCUTS for word in name.split("."))


@register_method("rcm")
@dataclass(frozen=True, kw_only=True)
class RcmConfig(MethodConfig):
    """Settings of reparameterised convolutions: `W_t = M_t W`, which is a 1 x 1 convolution M_t behind the frozen one.

    A modulator has `O^2 / groups` values, which for 1 x 1 convolutions is often more than a Delta's: a warning says so
    where they hold more than half of it. Every task has its own normalisation layers. A layer's bias is the base's.

    Attributes:
        kernel_sizes: "k>1" modulates the convolutions whose kernel is larger than 1 x 1; "all" every layer.
        normalise: the rows of M_t are `gain * v / |v|` (normalised feature fusion), which starts as the same.
        private_shortcuts: the 1 x 1 convolutions of residual connections, which are known by "downsample" or "shortcut"
            in their names, are wholly the task's (an open Delta) and not modulated.
        start: "identity" starts from M_t = I. "response" lets tasks share a rotation of the responses U^T, in a family
            that is not trained, so that M_t starts from U: call :func:`initialise` once the first task is added.
    """

    kernel_sizes: str = "k>1"
    normalise: bool = True
    private_shortcuts: bool = True
    start: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.kernel_sizes, ("k>1", "all"), "kernel_sizes")
        one_of(self.start, ("identity", "response"), "start")
        for name in ("normalise", "private_shortcuts"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    def modulated(self, base: Scan) -> dict[str, nn.Module]:
        """The layers that get modulators."""
        return {
            name: host
            for name, host in base.gated.items()
            if not (self.private_shortcuts and _shortcut(name, host))
            and (self.kernel_sizes == "all" or (isinstance(host, nn.Conv2d) and host.kernel_size != (1, 1)))
        }

    def parts(self, base: Scan) -> dict[str, Part]:
        """Modulators, private shortcuts and norms."""
        modulated = self.modulated(base)
        if not modulated:
            raise ConfigError(
                f"rcm: the base has no layer to modulate with kernel_sizes={self.kernel_sizes!r}; "
                "'all' takes linear layers and 1x1 convolutions, too"
            )
        layers: dict[str, Part] = {
            name: Layer(Gate(learn=False), Modulator(host, normalise=self.normalise))
            for name, host in modulated.items()
        }
        if self.private_shortcuts:
            layers |= {
                name: Layer(Gate(learn=False), Dense(host), bias=base_bias(host))
                for name, host in base.gated.items()
                if _shortcut(name, host)
            }
        return {**layers, **base.own(base.norms)}

    def shared(self, base: Scan) -> dict[str, Part]:
        """The rotations of responses, the identity until :func:`initialise`; nothing trains them."""
        layers = self.modulated(base) if self.start == "response" else {}
        return {name: Layer(Gate(learn=False), Modulator(host)).requires_grad_(False) for name, host in layers.items()}

    def begin(self, base: Scan, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> None:
        """Start from what undoes the family's rotations, and warn of modulators as large as Deltas."""
        for name, below in shared.items():
            _modulator(parts[name]).take(_inverse(_modulator(below)))
        own = sum(p.numel() for name in self.modulated(base) for p in parts[name].changes())
        dense = sum(base_weight(host).numel() for host in self.modulated(base).values())
        if 2 * own > dense:
            warnings.warn(
                f"rcm: the modulators hold {own:,} values, {100 * own / dense:.0f} % of what Deltas on the same layers "
                "would",
                stacklevel=4,  # the caller of add_task
            )


def _modulator(part: Part) -> Modulator:
    change = part.change
    assert isinstance(change, Modulator)
    return change


def _inverse(below: Modulator) -> Tensor:
    """What undoes a rotation as it was rounded, so that a task that is added later starts with the same bits."""
    return torch.linalg.inv(below.whole(torch.float64).detach())


def response_basis(model: nn.Module, batches: Iterable[Any], layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The principal axes of layers' responses, the largest first: by layer U in float64, in the form of a modulator's
    matrix, `[O, O / groups]` (the columns of each group's block are orthonormal).

    Responses are not kept: their sums and their products' sums are, `O + O^2 / groups` values for each layer.

    Args:
        model: a base, or a :class:`taps_ext.TaskModel`, whose base is run. It runs in evaluation mode.
        batches: inputs of the forward, or tuples and lists of which they are the first.
        layers: names of linear layers and convolutions; by default, of a TaskModel, those that its family of
            :class:`RcmConfig` rotates.

    Raises:
        ConfigError: a name of no such layer; no batches; responses that are not finite.
    """
    families = getattr(model, "families", None)
    base: nn.Module = model if families is None else model.base  # type: ignore[assignment]
    names = list(_family(model).table) if layers is None else list(layers)
    modules, sums = dict(base.named_modules()), {}
    for name in names:
        host = modules.get(name)
        if not isinstance(host, (nn.Linear, nn.Conv2d)):
            hint = suggestion(name, modules) if host is None else f", got a {type(host).__name__}"
            raise ConfigError(f"layers: expected linear layers and convolutions, {name!r} is none{hint}")
        sums[name] = _Sums(host)
    handles = [modules[name].register_forward_hook(found.add) for name, found in sums.items()]
    modes = {module: module.training for module in base.modules()} if families is None else {}
    try:
        for module in modes:
            module.training = False
        for batch in batches:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            with torch.no_grad():
                base(x) if families is None else model(x, task=None)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return {name: found.axes(name) for name, found in sums.items()}


class _Sums:
    """Of a layer's responses in each group: how many, their sum, and the sum of their products."""

    def __init__(self, host: nn.Module) -> None:
        self.groups = getattr(host, "groups", 1)
        size, device = len(base_weight(host)) // self.groups, base_weight(host).device
        self.count = 0
        self.sum = torch.zeros(self.groups, 1, size, dtype=torch.float64, device=device)
        self.products = torch.zeros(self.groups, size, size, dtype=torch.float64, device=device)

    def add(self, module: nn.Module, args: Any, response: Tensor) -> None:
        channels = 1 if isinstance(module, nn.Conv2d) else -1
        rows = response.detach().double().movedim(channels, 0).flatten(1)  # [O, rows]
        rows = rows.view(self.groups, -1, rows.shape[1])
        self.count += rows.shape[2]
        self.sum += rows.sum(dim=2)[:, None]
        self.products += rows @ rows.mT

    def axes(self, name: str) -> Tensor:
        if not self.count:
            raise ConfigError(f"batches: expected some that reach {name!r}, got none")
        mean = self.sum / self.count
        covariance = self.products / self.count - mean.mT @ mean
        if not bool(torch.isfinite(covariance).all()):
            raise ConfigError(f"batches: expected finite responses of {name!r}, got Inf or NaN")
        axes = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        return (axes * largest.sign()).flatten(0, 1)  # of an axis and its opposite always the same


def _family(model: Any) -> Any:
    """The only family of a model that rotates responses."""
    found = [f for f in getattr(model, "families", {}).values() if isinstance(f.config, RcmConfig)]
    if len(found) != 1:
        raise ConfigError(
            f"model: expected a TaskModel with one family of RcmConfig(start='response'), got {len(found)}; add a task "
            "first"
        )
    return found[0]


@torch.no_grad()
def initialise(model: Any, basis: Mapping[str, Tensor]) -> None:
    """Rotate the responses that the tasks of an RCM family share, and undo it in the modulator of every task, so that
    none computes anything else: `W_t = (M_t U) (U^T W)`, as the paper initialises.

        model = TaskModel(base, RcmConfig(start="response"))
        model.add_task("birds", num_classes=200)
        rcm.initialise(model, rcm.response_basis(model, batches))

    Tasks that are added later start from the same U.

    Args:
        model: a :class:`taps_ext.TaskModel`.
        basis: U by layer, as :func:`response_basis` makes it; layers that are missing stay as they are.

    Raises:
        ConfigError: no such family; a layer that it has not; a U of another shape.
        TapsError: the family is in a file, on which its tasks' files build; a task is merged.
    """
    family = _family(model)
    if family.digest:
        raise TapsError("initialise: the family is in a file, on which its tasks build; call it before save_shared")
    states = [state for name in model.tasks if (state := model.state(name)).family is family]
    if any(state.installed for state in states):
        raise TapsError("initialise: a task is merged; call unmerge_task() first")
    for name, axes in basis.items():
        if name not in family.table:
            raise ConfigError(f"basis: the family has no layer {name!r}{suggestion(name, family.table)}")
        shape = _modulator(family.table[name]).matrix.shape
        if axes.shape != shape:
            raise ConfigError(f"basis: {name}: expected shape {list(shape)}, got {list(axes.shape)}")
    for name, axes in basis.items():
        below = _modulator(family.table[name])
        before = below.whole(torch.float64)
        below.take(axes.to(before).reshape(before.shape).mT)
        undone = before @ _inverse(below)
        for state in states:
            own = _modulator(state.table[name])
            own.take(own.whole(torch.float64) @ undone)
