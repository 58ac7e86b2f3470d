"""Steps of a run: its optimizer, the learning rates, and the scale of losses; ours, or made by the user's factories."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ConfigError
from .config import TrainConfig
from .gradients import add_gradients
from .packing import pack, unpack
from .precision import Scaler

Groups = list[dict[str, Any]]
UNCLIPPED = ("score", "weighting")  # groups whose gradients do not count in the global norm


class Own(NamedTuple):
    """What the user brings instead of the config's optimizer and schedule (see `Trainer`); None: the config's."""

    optimizer: Callable[[Groups], torch.optim.Optimizer] | None = None
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None

    def check(self, config: TrainConfig) -> None:
        """Raise ConfigError for what is no factory, and for settings that a factory leaves without effect."""
        plain = TrainConfig()
        for name, factory, idle in (
            ("optimizer", self.optimizer, ("optimizer", "momentum", "betas")),
            ("scheduler", self.scheduler, ("schedule", "step_epochs", "step_gamma", "lr_warmup")),
        ):
            if factory is None:
                continue
            if not callable(factory) or isinstance(factory, (torch.optim.Optimizer, LRScheduler)):
                got = type(factory).__name__
                raise ConfigError(f"{name}: expected a function that makes one, called for every run, got {got}")
            for setting in idle:
                if getattr(config, setting) != getattr(plain, setting):
                    raise ConfigError(
                        f"{setting}: expected its default with {name}=..., which replaces it, got "
                        f"{getattr(config, setting)!r}"
                    )
        if config.hierarchy is not None and (self.optimizer is not None or self.scheduler is not None):
            raise ConfigError(
                "hierarchy: expected None with an optimizer or scheduler of your own, whose steps the prior's do not "
                f"follow, got {config.hierarchy}"
            )


def make_optimizer(groups: Groups, config: TrainConfig, own: Own) -> torch.optim.Optimizer:
    """The optimizer of these groups; each keeps its rate as "base_lr".

    Raises:
        ConfigError: an optimizer of the user's that leaves parameters out, changes groups' names or needs a closure.
    """
    if own.optimizer is not None:
        names = {id(p): group["name"] for group in groups for p in group["params"]}
        optimizer = _made("optimizer", own.optimizer, groups, torch.optim.Optimizer)
        if _needs_arguments(optimizer.step):
            raise ConfigError(
                f"optimizer: expected one whose step() needs no closure, got {type(optimizer).__name__}; a step's "
                "gradients are made once"
            )
        held = {id(p): group.get("name") for group in optimizer.param_groups for p in group["params"]}
        if held.keys() != names.keys():
            raise ConfigError(
                f"optimizer: expected one of all {len(names)} parameters that are trained and no others, got "
                f"{len(held.keys() & names.keys())} of them and {len(held.keys() - names.keys())} others; make it of "
                "the groups that the factory is given"
            )
        if held != names:
            raise ConfigError(
                "optimizer: expected one made of the groups as they are given, whose names say what is clipped, got "
                f"groups named {[group.get('name') for group in optimizer.param_groups]}"
            )
        _warn_of_idle(optimizer)
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
        return optimizer
    for group in groups:
        group["base_lr"] = group["lr"]
    fused = on_cuda(groups)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, fused=fused)
    return torch.optim.SGD(groups, momentum=config.momentum, fused=fused)


def on_cuda(groups: Groups) -> bool | None:
    """True where torch's fused steps are worth it, one launch for each group of parameters; None leaves it to torch."""
    return True if all(p.is_cuda and p.is_floating_point() for g in groups for p in g["params"]) else None


def _warn_of_idle(optimizer: torch.optim.Optimizer) -> None:
    """Say so where a rate or a decay was given to the optimizer, in vain: the groups bring those of the config."""
    usual = inspect.signature(type(optimizer)).parameters
    for key in ("lr", "weight_decay"):
        given, found = optimizer.defaults.get(key), [group.get(key) for group in optimizer.param_groups]
        if key not in usual or given == usual[key].default or given in found:
            continue
        warnings.warn(
            f"optimizer: {key}={given!r} of {type(optimizer).__name__} has no effect, since its groups bring their "
            f"own, {found}: set TrainConfig({key}=...), or group[{key!r}] in the factory",
            stacklevel=5,
        )


def _made(name: str, factory: Callable[[Any], Any], argument: Any, kind: type) -> Any:
    try:
        made = factory(argument)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"{name}: the factory failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise ConfigError(f"{name}: expected a factory that returns a torch {kind.__name__}, got {type(made).__name__}")
    return made


def _needs_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    return False


class Stepper:
    """The optimizer of a run and all that goes with its steps.

    Args:
        groups: of `TaskModel.parameter_groups`.

    Raises:
        ConfigError: an optimizer or scheduler of the user's that cannot be used, or whose state cannot be kept.
    """

    def __init__(self, groups: Groups, config: TrainConfig, own: Own, device: torch.device) -> None:
        self.config, self.own = config, own
        self.optimizer = make_optimizer(groups, config, own)
        self.scaler = Scaler(config.amp, self.optimizer, device)
        self.scheduler: LRScheduler | None = None
        if own.scheduler is not None:
            self.scheduler = _made("scheduler", own.scheduler, self.optimizer, LRScheduler)
            name = type(self.scheduler).__name__
            if _needs_arguments(self.scheduler.step):
                raise ConfigError(f"scheduler: expected one whose step() needs no metric, got {name}")
            if getattr(self.scheduler, "optimizer", self.optimizer) is not self.optimizer:
                raise ConfigError(f"scheduler: expected one of the optimizer that the factory is given, got {name}")
        self.saved()  # what cannot be saved is said now
        self.checked = own.optimizer is None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def check_length(self, steps: int) -> None:
        """Raise ConfigError for a scheduler that ends before a run of `steps` steps does."""
        known = getattr(self.scheduler, "total_steps", None)  # OneCycleLR's
        if isinstance(known, int) and known < steps:
            raise ConfigError(
                f"scheduler: expected one of {steps} steps or more, as the run has (it is stepped after every step of "
                f"the optimizer), got {type(self.scheduler).__name__} with total_steps = {known}"
            )

    def rates(self, step: int, steps_per_epoch: int) -> None:
        """Set the learning rates of a step of the run (from 0), unless a scheduler of the user's does."""
        if self.scheduler is None:
            factor = self.config.lr_scale(step, steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    def rates_now(self) -> dict[str, float]:
        """The learning rates of the step at hand, by "lr/<group>"."""
        return {f"lr/{group['name']}": float(group["lr"]) for group in self.optimizer.param_groups}

    def backward(self, loss: Tensor) -> None:
        self.scaler.scaled(loss).backward()

    def add(self, penalty: Tensor) -> None:
        """The gradients of a penalty, on top of those of the loss."""
        add_gradients(self.scaler.scaled(penalty), self.parameters)

    def clip(self) -> None:
        """As `TrainConfig.clip_norm` says."""
        if self.config.clip_norm is not None:
            clipped = [p for g in self.optimizer.param_groups if g["name"] not in UNCLIPPED for p in g["params"]]
            nn.utils.clip_grad_norm_(clipped, self.config.clip_norm)

    def step(self) -> None:
        """Take the step.

        Raises:
            ConfigError: after the first one, an optimizer of the user's whose state cannot be kept; a scheduler that
                takes no further step.
        """
        self.optimizer.step()
        self.scaler.update()
        if self.scheduler is not None:
            try:
                self.scheduler.step()
            except ValueError as error:  # OneCycleLR's end
                raise ConfigError(
                    f"scheduler: expected one that is stepped after every step of the optimizer, got "
                    f"{type(self.scheduler).__name__}: {error}"
                ) from error
        if not self.checked:
            moments(self.optimizer)
            self.checked = True

    # -- the state on disk

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-ready counters and tensors of all but the optimizer's moments; empty for what the config tells."""
        counters: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        if self.scaler.enabled:
            counters["scaler"] = self.scaler.state()
        if self.own.optimizer is not None or self.own.scheduler is not None:  # optimizers keep numbers in groups
            options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
            counters["groups"] = pack(options, tensors, "optimizer.param_groups")
        if self.scheduler is not None:
            counters["scheduler"] = pack(self.scheduler.state_dict(), tensors, "scheduler")
        return counters, tensors

    def load(self, counters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`saved` gave; the optimizer's moments are put back before."""
        if "scaler" in counters:
            self.scaler.load(counters["scaler"])
        if "groups" in counters:
            for group, options in zip(self.optimizer.param_groups, unpack(counters["groups"], tensors), strict=True):
                group.update(options)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(unpack(counters["scheduler"], tensors))


def moments(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors by "<index>.<key>", and the rest of its state likewise, JSON-ready.

    Raises:
        ConfigError: a state that is not by parameter, or that holds what :func:`pack` does not take.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        if not isinstance(index, int) or not isinstance(values, Mapping):
            raise ConfigError(
                f"optimizer: expected a state for each parameter, so that a run can be resumed, got {index!r}"
            )
        for key, value in values.items():
            packed = pack(value, tensors, f"{index}.{key}")
            if not isinstance(value, Tensor):
                numbers[f"{index}.{key}"] = packed
    return tensors, numbers


def put_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Put back what :func:`moments` gave."""
    within = {name for packed in numbers.values() for name in _named(packed)}
    values = {name: value for name, value in tensors.items() if name not in within}
    values |= {name: unpack(packed, tensors) for name, packed in numbers.items()}
    state: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, held in state.items():  # torch gives tensors their parameter's dtype, whatever the optimizer keeps
        mine = optimizer.state[parameters[number]]
        for key, value in held.items():
            mine[key] = _as_kept(value, mine[key])


def _as_kept(saved: Any, loaded: Any) -> Any:
    """A saved value, its tensors where those that torch has loaded are."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device)
    if isinstance(saved, (list, tuple)):
        return type(saved)(_as_kept(one, other) for one, other in zip(saved, loaded, strict=True))
    if isinstance(saved, dict):
        made = {key: _as_kept(value, loaded[key]) for key, value in saved.items()}
        return Counter(made) if isinstance(saved, Counter) else made
    return saved


def _named(packed: Any) -> list[str]:
    """Names of the tensors in what `pack` gave."""
    if not isinstance(packed, list):
        return []
    if packed[0] == "tensor":
        return [packed[1]]
    pairs = packed[1] if packed[0] in ("list", "tuple") else [item for _, item in packed[1]]
    return [name for item in pairs for name in _named(item)]
