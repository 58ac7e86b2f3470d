"""TaskSet: a frozen base, the named tasks beside it, and their gates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import groups, merging, modes
from .checks import check_base, own
from .errors import ConfigError, TapsError, suggestion
from .guard import Guard
from .methods import MethodConfig
from .nn.forward import GATED_TYPES
from .nn.mirror import Mirror
from .nn.own import NORM_TYPES
from .nn.route import route
from .scan import check_kept, check_shared, head_path, inside, match, scan
from .task import TaskState, make_head, module_key

_Self = TypeVar("_Self", bound="TaskSet")


class TaskSet(nn.Module):
    """What :class:`taps_ext.TaskModel` knows of its tasks; see there."""

    def __init__(
        self,
        base: nn.Module,
        config: MethodConfig | None = None,
        *,
        gates: str = "host",
        head_module: str | None = None,
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        check_base(base)
        if gates not in ("host", "device"):
            raise ConfigError(
                f"gates: expected 'host' or 'device', got {gates!r}{suggestion(str(gates), ('host', 'device'))}"
            )
        if config is not None and not isinstance(config, MethodConfig):
            raise ConfigError(f"config: expected a method config such as TapsConfig, got {type(config).__name__}")
        self.base = base
        self.config = config
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ConfigError(f"batch_dim: expected an int >= 0, got {batch_dim!r}")
        self.gates = gates
        self.batch_dim = batch_dim
        self._states = nn.ModuleDict()
        self._names: dict[str, TaskState] = {}
        self._active: str | None = None
        self._merged: str | None = None
        self._head = head_path(base, head_module)
        self._flags: modes.Flags | None = modes.Flags(base)
        self._mirror = Mirror()
        own(base, self, self._flags)
        base.requires_grad_(False)
        self._guard = Guard()
        routed: tuple[type[nn.Module], ...] = (*GATED_TYPES, *NORM_TYPES)
        encoders = [module for module in base.modules() if isinstance(module, nn.TransformerEncoderLayer)]
        fused = {part for encoder in encoders for part in encoder.modules()}
        for name, module in list(base.named_modules()):
            if isinstance(module, routed) and not inside(name, self._head):
                route(module, name, fused=module in fused)
        self.training = base.training  # without touching the modules, each of which has a mode of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy adapts a base of its own."""
        super().__setstate__(state)
        if self._flags is not None:
            own(self.base, self, self._flags)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self._names:
            self._guard.forget(self.base, self._head)
        result = super()._apply(*args, **kwargs)
        if self._merged is not None:  # of what the weights are now
            merging.merge(self.state(self._merged), self.base)
        return result

    def _check_base(self) -> None:
        """Raise if something wrote to the base unseen: tasks would belong to no base that exists.

        Raises:
            TapsError: naming the tensor.
        """
        problem = self._guard.check(self.base, self._head)
        if problem is not None:
            raise TapsError(problem)

    # -- tasks

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order they were added."""
        return list(self._names)

    @property
    def active_task(self) -> str | None:
        """The task that `model(x)` runs, or None for the base."""
        return self._active

    def state(self, name: str | None) -> TaskState:
        """The parts of one task. Raises ConfigError for an unknown name."""
        self._loaded()
        state = self._names.get(name) if isinstance(name, str) else None
        if state is None:
            hint = suggestion(str(name), self._names)
            raise ConfigError(f"task: expected one of {self.tasks}, got {name!r}{hint}")
        return state

    def _new_name(self, name: str) -> str:
        if not isinstance(name, str) or not name or not name.isprintable() or "/" in name or len(name) > 255:
            raise ConfigError(f"name: expected a printable name of up to 255 characters without '/', got {name!r}")
        if name in self._names or module_key(name) in self._states:
            raise ConfigError(f"name: a task called {name!r} exists already")
        return name

    def _states_for(self, tasks: Iterable[str] | str | None) -> list[TaskState]:
        if tasks is None:
            return list(self._names.values())
        return [self.state(name) for name in ([tasks] if isinstance(tasks, str) else tasks)]

    def _loaded(self) -> None:
        if self._flags is None:
            raise TapsError("this TaskModel was unloaded; wrap the base in a new one")

    def _not_merged(self, name: str, action: str) -> None:
        if self._merged == name:
            raise TapsError(f"{action}: task {name!r} is merged; call unmerge_task() first")

    @torch.inference_mode(False)
    def add_task(
        self,
        name: str,
        *,
        num_classes: int | None = None,
        head: nn.Module | None = None,
        head_module: str | None = None,
        config: MethodConfig | None = None,
    ) -> None:
        """Add a task that starts as the base with a new head.

        Args:
            name: printable, without '/'.
            num_classes: makes a linear head with that many outputs, drawn from torch's generator.
            head: a head of your own instead. Without either, the task starts from a copy of the base's head.
            head_module: the name of the module that the head replaces, where it is not the model's.
            config: a method for this task only.

        Raises:
            ConfigError: a taken or bad name, no head found, a pattern that matches nothing.
            UnsupportedModuleError: a layer that cannot be gated, naming it.
        """
        self._loaded()
        name = self._new_name(name)
        config = config if config is not None else self.config
        if not isinstance(config, MethodConfig):
            raise ConfigError(f"config: expected a method config such as TapsConfig, got {type(config).__name__}")
        path = self._head if head_module is None else head_path(self.base, head_module)
        own = make_head(self.base, path, num_classes, head, self)
        found = scan(self.base, path, target=config.target_modules, exclude=config.exclude_modules)
        plan = config.plan(found)
        check_kept(self.base, plan.gates)
        inherited = [] if own is None or path is None or num_classes is not None or head is not None else [path]
        check_shared(
            self.base,
            [*(n for n, spec in plan.gates.items() if spec.delta), *plan.norms, *plan.others, *inherited],
        )
        self._install(name, TaskState(self.base, config, plan, path, own, self.gates))

    def _install(self, name: str, state: TaskState) -> None:
        if not self._names:
            self._guard = Guard()  # the base's tensors may have been loaded since
            self._guard.note(self.base)
        for module in state.table:
            route(self.base.get_submodule(module), module)
        for layer, _ in state.gated():
            self.base.get_submodule(layer).__dict__["_taps_gated"] = True
        state.remember_hosts(self.base)
        state.train(self.training)
        self._states[module_key(name)] = state
        self._names[name] = state

    def _load_from_state_dict(self, *args: Any) -> None:
        if self._merged is not None:
            raise TapsError(f"load_state_dict: task {self._merged!r} is merged; call unmerge_task() first")
        self._guard = Guard()  # the base's own may come with it
        super()._load_from_state_dict(*args)

    def delete_task(self, name: str) -> None:
        """Forget a task. The active task becomes the base if it was this one."""
        self.state(name)
        if self._merged == name:
            self.unmerge_task()
        if self._active == name:
            self._active = None
        del self._states[module_key(name)], self._names[name]

    def rename_task(self, name: str, new_name: str) -> None:
        """Rename a task, keeping its place in the order."""
        self.state(name)
        self._new_name(new_name)
        renamed = {new_name if n == name else n: s for n, s in self._names.items()}
        self._states = nn.ModuleDict({module_key(n): s for n, s in renamed.items()})
        self._names = renamed
        self._active = new_name if self._active == name else self._active
        self._merged = new_name if self._merged == name else self._merged

    def set_task(self, name: str | None) -> None:
        """Make `model(x)` run this task; None is the base, in evaluation semantics."""
        if name is not None:
            self.state(name)
        self._active = name

    @contextmanager
    def use_task(self: _Self, name: str | None) -> Iterator[_Self]:
        """`with model.use_task("birds"):` sets the task and restores the previous one."""
        before = self._active
        self.set_task(name)
        try:
            yield self
        finally:
            self._active = before if before in self._names else None

    # -- gates

    def refresh_gates(self) -> None:
        """Read all scores again, and forget weights cast under autocast, for writes that leave no trace (`.data`, graph
        replay). Checks for NaN."""
        for module in self.modules():
            module.__dict__.pop("_taps_cast", None)
        for state in self._names.values():
            state.refresh(force=True)

    def set_gates(self, name: str, open: Sequence[str], *, learn: bool = False) -> None:
        """Fix a task's gates: layers that a glob in `open` matches are open, all others closed.

        Raises:
            ConfigError: a pattern matches no layer; a layer without a Delta is to be opened; `learn=True`
                (a score is learned, never set).
        """
        if learn:
            raise ConfigError("learn: expected False; scores are learned, not set")
        self._not_merged(name, "set_gates")
        state = self.state(name)
        layers = dict(state.gated())
        if isinstance(open, str):
            raise ConfigError(f"open: expected a list of patterns, got {open!r}")
        chosen = match(open, list(layers), "open")
        state.grow(chosen)
        for layer in chosen:
            if layers[layer].change is None:
                raise ConfigError(f"open: {layer} has no Delta under method {state.config.method!r}")
        for layer, part in layers.items():
            part.fix(layer in chosen)

    def freeze_gates(self, tasks: Iterable[str] | str | None = None) -> None:
        """Fix every learned gate in its present state; closed layers then keep no input for backward."""
        chosen = self._states_for(tasks)
        for name, state in self._names.items():
            if state in chosen:
                self._not_merged(name, "freeze_gates")
        for state in chosen:
            opened = set(state.open_layers())
            for name, part in state.learned():
                part.fix(name in opened)

    def sparsity_loss(self, tasks: Iterable[str] | str | None = None, scale: float = 1.0) -> Tensor:
        """`scale * sum over tasks of lam / L * sum_i w_i |s_i|` (equation 5), a scalar.

        Args:
            tasks: which tasks; by default the active one.
            scale: 0 during warm-up.

        Raises:
            ConfigError: none is named and none is active.
        """
        if tasks is None and self._active is None and self._names:
            raise ConfigError("tasks: no task is active; name those whose penalty is meant")
        chosen = tasks if tasks is not None else [] if self._active is None else [self._active]
        terms = [term for state in self._states_for(chosen) if (term := state.sparsity_loss()) is not None]
        if not terms:
            return torch.zeros([], device=next(self.parameters()).device)
        return scale * torch.stack(terms).sum()

    def drop_closed_gradients(self, tasks: Iterable[str] | str | None = None) -> None:
        """Set gradients of closed Deltas to None before an optimizer step.

        Needed for gates="device", where backward gives zeros, and after `zero_grad(set_to_none=False)` between the
        forward and the step: with zero gradients momentum and weight decay would move a Delta that should rest.
        """
        for state in self._states_for(tasks):
            state.drop_closed_gradients()

    def parameter_groups(
        self,
        tasks: Iterable[str] | str | None = None,
        *,
        lr: float,
        score_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Optimizer groups named "delta", "score", "norm", "other" and "head".

        Args:
            tasks: which tasks; by default all.
            lr: learning rate. score_lr: that of the scores (default: lr).
            weight_decay: applies to Deltas and heads only. A closed Delta has no gradient and rests.

        A task that was loaded gets the zero Deltas of its closed layers here, with a warning that says what they take.
        """
        chosen = self._states_for(tasks)
        for name, state in self._names.items():
            count, nbytes = state.grow() if state in chosen else (0, 0)
            if count:
                warnings.warn(
                    f"task {name!r}: {count} closed layers were loaded without a Delta and get one of zeros to train "
                    f"({nbytes / 2**20:.1f} MiB)",
                    stacklevel=2,
                )
        return groups.parameter_groups(chosen, lr=lr, score_lr=score_lr, weight_decay=weight_decay)

    # -- merging

    def merge_task(self, name: str) -> None:
        """Install `W + Delta` of the open layers beside the base, so that the task runs at the base's cost."""
        if self._merged is not None:
            raise TapsError(f"merge_task: task {self._merged!r} is merged already; call unmerge_task() first")
        merging.merge(self.state(name), self.base)
        self._merged = name

    def unmerge_task(self) -> None:
        """Drop the merged weights; the base was never changed, so this is exact."""
        if self._merged is not None:
            merging.unmerge(self.state(self._merged))
        self._merged = None
