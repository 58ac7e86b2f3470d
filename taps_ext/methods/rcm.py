"""Reparameterised convolutions (RCM, arXiv 2007.12540): a task's own modulator behind each convolution."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.dataflow import dataflow
from ..base.scan import Scan
from ..errors import ConfigError, TapsError, suggestion
from ..parts import Axes, Change, Dense, Gate, Layer, LowModulator, Modulator, Part
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
            that is not trained, so that M_t starts from U: call :func:`prepare` before the first task is added, or
            :func:`initialise` once it is.
        rank: with start="response", how many axes of a layer's responses a task keeps, in each group of outputs (ours):
            `W_t = M_t (U_r^T W)`, M_t `[O, rank]`, which starts from U_r. The mean of the responses that is lost so,
            `b = (I - U_r U_r^T) E[W x]`, is added to the layer's bias, which is the task's own then, or subtracted from
            the running mean of the task's norm behind it: BN(z + b; mu) = BN(z; mu - b). (The paper's code adds it
            there.) Call :func:`prepare` before the first task is added. None keeps all of them; so does, exactly, a
            rank that is no less than a layer's outputs in a group.
    """

    kernel_sizes: str = "k>1"
    normalise: bool = True
    private_shortcuts: bool = True
    start: str = "identity"
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.kernel_sizes, ("k>1", "all"), "kernel_sizes")
        one_of(self.start, ("identity", "response"), "start")
        for name in ("normalise", "private_shortcuts"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.rank is not None:
            if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
                raise ConfigError(f"rank: expected an int >= 1 or None, got {self.rank!r}")
            if self.start != "response":
                raise ConfigError(
                    'rank: expected start="response" beside it, whose axes a task keeps some of, got '
                    f"start={self.start!r}"
                )

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
        layers: dict[str, Part] = {name: self._over(host) for name, host in modulated.items()}
        if self.private_shortcuts:
            layers |= {
                name: Layer(Gate(learn=False), Dense(host), bias=base.bias(name, host))
                for name, host in base.gated.items()
                if _shortcut(name, host)
            }
        return {**layers, **base.own(base.norms)}

    def _over(self, host: nn.Module) -> Layer:
        """A task's modulator over one layer."""
        if self.rank is None:
            return Layer(Gate(learn=False), Modulator(host, normalise=self.normalise))
        change = LowModulator(host, rank=self.rank, normalise=self.normalise)
        return Layer(Gate(learn=False), change, bias=base_bias(host) if _loses(host, self.rank) else None)

    def shared(self, base: Scan) -> dict[str, Part]:
        """The rotations of responses, the identity until :func:`prepare` or :func:`initialise`; nothing trains them."""
        layers = self.modulated(base) if self.start == "response" else {}
        kind: type[Change] = Modulator if self.rank is None else Axes
        return {name: Layer(Gate(learn=False), kind(host)).requires_grad_(False) for name, host in layers.items()}

    def begin(self, base: Scan, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> None:
        """Start from what undoes the family's rotations, and warn of modulators as large as Deltas.

        Raises:
            ConfigError: a rank, and no axes yet of which it keeps some.
        """
        for name, below in shared.items():
            if self.rank is None:
                _modulator(parts[name]).take(_inverse(_modulator(below)))
            else:
                self._keep(base, name, parts, below)
        own = sum(p.numel() for name in self.modulated(base) for p in parts[name].changes())
        dense = sum(base_weight(host).numel() for host in self.modulated(base).values())
        if 2 * own > dense:
            warnings.warn(
                f"rcm: the modulators hold {own:,} values, {100 * own / dense:.0f} % of what Deltas on the same layers "
                "would",
                stacklevel=4,  # the caller of add_task
            )

    def _keep(self, base: Scan, name: str, parts: Mapping[str, Part], below: Part) -> None:
        """Start a modulator from the first axes, and restore the mean that the others took with them."""
        axes, own, host = _axes(below), _modulator(parts[name]), base.gated[name]
        undone = _inverse(axes)  # [groups, size, size]
        rank = own.matrix.shape[1]
        if not _loses(host, rank):
            own.take(undone)
            return
        blocks = axes.whole(torch.float32)
        if torch.equal(blocks, torch.eye(blocks.shape[1], device=blocks.device).expand_as(blocks)):
            raise ConfigError(
                f"rcm: rank {self.rank}: the axes of {name}'s responses are not known yet; call rcm.prepare(model, "
                "batches) before the first task is added"
            )
        own.take(undone[..., :rank])
        with torch.no_grad():
            mean = axes.mean.double().view(axes.groups, -1, 1)
            kept = own.whole(torch.float64) @ (axes.whole(torch.float64)[:, :rank] @ mean)
            lost = (mean - kept).flatten()
            bias = parts[name]._parameters["bias"]
            if bias is not None:
                bias.add_(lost)
            else:
                parts[_norm_behind(base, name, self.rank)].get_buffer("running_mean").sub_(lost)


def _loses(host: nn.Module, rank: int) -> bool:
    """Whether a modulator of this rank keeps less than all of a layer's outputs in each group."""
    return len(base_weight(host)) // getattr(host, "groups", 1) > rank


def _norm_behind(base: Scan, layer: str, rank: int | None) -> str:
    """The batch norm behind a layer, which can hold a mean.

    Raises:
        ConfigError: there is none.
    """
    for norm, before in base.follows().items():
        if before == layer:
            if getattr(base.norms[norm], "running_mean", None) is not None:
                return norm
            break
    raise _homeless(layer, rank)


def _homeless(layer: str, rank: int | None) -> ConfigError:
    return ConfigError(
        f"rcm: rank {rank}: {layer} has neither a bias nor a batch norm that alone reads its result, to hold the mean "
        "that it loses; name it in exclude_modules"
    )


def _modulator(part: Part) -> Modulator:
    change = part.change
    assert isinstance(change, Modulator)
    return change


def _axes(part: Part) -> Axes:
    change = part.change
    assert isinstance(change, Axes)
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
    names = list(_family(model).table) if layers is None else list(layers)
    return {name: found.axes() for name, found in _responses(model, batches, names).items()}


def _responses(model: nn.Module, batches: Iterable[Any], names: Sequence[str]) -> dict[str, _Sums]:
    """What :func:`response_basis` says, before it makes axes of it."""
    families = getattr(model, "families", None)
    base: nn.Module = model if families is None else model.base  # type: ignore[assignment]
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
            x = _input(batch)
            with torch.no_grad():
                base(x) if families is None else model(x, task=None)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    for name, found in sums.items():
        found.settle(name)
    return sums


def _input(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


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

    def settle(self, name: str) -> None:
        """Make mean `[groups, 1, O / groups]` and covariance of the sums."""
        if not self.count:
            raise ConfigError(f"batches: expected some that reach {name!r}, got none")
        self.mean = self.sum / self.count
        self.covariance = self.products / self.count - self.mean.mT @ self.mean
        if not bool(torch.isfinite(self.covariance).all()):
            raise ConfigError(f"batches: expected finite responses of {name!r}, got Inf or NaN")

    def axes(self) -> Tensor:
        axes = torch.linalg.eigh(self.covariance).eigenvectors.flip(-1)
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
def prepare(model: Any, batches: Iterable[Any], config: RcmConfig | None = None) -> None:
    """Make the axes of the base's responses that the tasks of an RCM family start from, before there is one:

        model = TaskModel(base, RcmConfig(start="response", rank=16))
        rcm.prepare(model, batches)
        model.add_task("birds", num_classes=200)

    Args:
        model: a :class:`taps_ext.TaskModel`, whose base is run.
        batches: as :func:`response_basis`. config: of the tasks; by default the model's.

    Raises:
        ConfigError: a config without start="response"; bad batches; a layer of which a rank would lose a mean that
            nothing can hold, naming it.
        TapsError: tasks build on the family already, or it is in a file.
    """
    config = getattr(model, "default_config", None) if config is None else config
    if not isinstance(config, RcmConfig) or config.start != "response":
        raise ConfigError(f'config: expected RcmConfig(start="response"), got {config!r}')
    family = model.add_family(config)
    if family.digest or any(model.state(name).family is family for name in model.tasks):
        raise TapsError("prepare: tasks build on the family already; call it before the first one is added")
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ConfigError("batches: expected some, got none")
    if config.rank is not None:
        found = model._scan(config)
        flow = dataflow(model.base, lambda: model(_input(first), task=None))
        for name, host in config.modulated(found).items():
            lossy = _loses(host, config.rank) and base_bias(host) is None
            if lossy and flow.layer.get(_norm_behind(found, name, config.rank)) != name:
                raise _homeless(name, config.rank)
    for name, sums in _responses(model, itertools.chain([first], batches), list(family.table)).items():
        below, bias = _modulator(family.table[name]), base_bias(model.base.get_submodule(name))
        below.take(sums.axes().reshape(below.groups, -1, below.matrix.shape[1]).mT)
        if config.rank is not None:
            mean = sums.mean.flatten()
            _axes(family.table[name]).mean.copy_(mean if bias is None else mean - bias)


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
    if family.config.rank is not None:
        raise TapsError("initialise: the family's tasks keep a rank of its axes; call prepare before they are added")
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
