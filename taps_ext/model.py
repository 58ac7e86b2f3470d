"""TaskModel: one frozen base model, many tasks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from . import convert, groups, merging, modes, taskfile
from .checks import check_base, disown, own
from .errors import ConfigError, TapsError, suggestion
from .methods import FullConfig, MethodConfig
from .nn.forward import GATED_TYPES
from .nn.frame import in_backward, recomputed_call, running_node
from .nn.own import NORM_TYPES
from .nn.route import follow_mode, route, unroute
from .report import Report, make_report
from .running import run_base, run_task
from .scan import head_path, inside, match, scan
from .task import TaskState, make_head, module_key

_ACTIVE: Any = type("ActiveTask", (), {"__repr__": lambda self: "<the active task>"})()


class TaskModel(nn.Module):
    """Adapt one frozen base model to many tasks (TAPS, arXiv 2203.16708, and related methods).

    The base keeps its parameters, buffers, names and hooks; each task adds parts beside it.

    Args:
        base: any module. Its parameters stop requiring gradients until :meth:`unload`.
        config: the method for tasks that bring none of their own.
        gates: "host" decides on the host which layers are closed, so that they cost what the base costs;
            "device" reads scores where they live, for captured graphs and compilation without recompiling.
        head_module: the classifier's name, where it is not found (see :func:`taps_ext.scan.find_head`).

    Raises:
        ConfigError: a base whose forward has an argument named `task` or `tasks`; unknown `gates`.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MethodConfig | None = None,
        *,
        gates: str = "host",
        head_module: str | None = None,
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
        self.gates = gates
        self._states = nn.ModuleDict()
        self._names: dict[str, TaskState] = {}
        self._active: str | None = None
        self._merged: str | None = None
        self._head = head_path(base, head_module)
        self._flags: modes.Flags | None = modes.Flags(base)
        own(base, self, self._flags)
        base.requires_grad_(False)
        routed: tuple[type[nn.Module], ...] = (*GATED_TYPES, *NORM_TYPES)
        encoders = [module for module in base.modules() if isinstance(module, nn.TransformerEncoderLayer)]
        fused = {part for encoder in encoders for part in encoder.modules()}
        for name, module in list(base.named_modules()):
            if isinstance(module, routed) and not inside(name, self._head):
                route(module, name, fused=module in fused)
            elif modes.follows_mode(module):
                follow_mode(module, name)

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
            raise ConfigError(f"name: expected a printable name without '/', got {name!r}")
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
        own = make_head(self.base, path, num_classes, head)
        found = scan(self.base, path, target=config.target_modules, exclude=config.exclude_modules)
        plan = config.plan(found)
        self._install(name, TaskState(self.base, config, plan, path, own, self.gates))

    def _install(self, name: str, state: TaskState) -> None:
        for module in state.table:
            route(self.base.get_submodule(module), module)
        state.train(self.training)
        self._states[module_key(name)] = state
        self._names[name] = state

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
    def use_task(self, name: str | None) -> Iterator[TaskModel]:
        """`with model.use_task("birds"):` sets the task and restores the previous one."""
        before = self._active
        self.set_task(name)
        try:
            yield self
        finally:
            self._active = before if before in self._names else None

    # -- forward

    def forward(self, *args: Any, task: str | None = _ACTIVE, tasks: Any = None, **kwargs: Any) -> Any:
        """Run the base with one task's parts.

        Args:
            task: the task of this call; by default the active one. None is the base, as it was before.
            args, kwargs: what the base's forward takes.

        Raises:
            ConfigError: an unknown task.
            GateError: a NaN score; Inf or NaN in a closed Delta while training.
            BypassedLayerError: the task's first forward did not enter every layer that has parts.
        """
        if torch.compiler.is_exporting():
            raise TapsError(
                "torch.export: a TaskModel decides per call what runs; export merge_and_unload(name) instead"
            )
        return self._forward(*args, task=task, tasks=tasks, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _forward(self, *args: Any, task: str | None, tasks: Any, **kwargs: Any) -> Any:
        if tasks is not None:
            raise ConfigError("tasks: mixed-task batches are not built yet; call the model once for each task")
        repeated = recomputed_call(owner=self) if in_backward() else None
        unknown = in_backward() and repeated is None and torch.is_grad_enabled()
        if task is not _ACTIVE:
            name = task
        elif repeated is not None:
            name = repeated.task
        elif not unknown:
            name = self._active
        else:
            raise TapsError(
                "task: activation checkpointing repeats this forward in backward, when another task may be active; "
                "name it in the checkpointed call: model(x, task=...)"
            )
        if name is None:
            if task is _ACTIVE and self._names and self.training and torch.is_grad_enabled():
                warnings.warn(
                    "no task is active, so this is the frozen base; name one: model(x, task=...) or set_task(...)",
                    stacklevel=6,  # the caller of model(x)
                )
            return run_base(self, args, kwargs)
        state = self.state(name)
        if self.gates == "host":
            state.refresh()
        if repeated is not None:
            repeated.check_gates()
        else:
            state.note_gates(running_node() if unknown else None)
        learning = self.training and torch.is_grad_enabled()
        if learning:
            self._not_merged(name, "training")
        if learning and self.gates == "host" and not torch._C._are_functorch_transforms_active():
            state.check_rest()
        return run_task(self, name, state, args, kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise TapsError(
            "DataParallel: expected one process for each GPU, got threads; use DistributedDataParallel instead"
        )

    def train(self, mode: bool = True) -> TaskModel:
        """Training mode for tasks and the base's dropout; the base's own norms stay in evaluation mode."""
        super().train(mode)
        return self

    # -- gates

    def refresh_gates(self) -> None:
        """Read all scores again, for writes that leave no trace (`.data`, graph replay). Checks for NaN."""
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
        for layer in chosen:
            if layers[layer].change is None:
                raise ConfigError(f"open: {layer} has no Delta under method {state.config.method!r}")
        for layer, part in layers.items():
            part.fix(layer in chosen)

    def freeze_gates(self, tasks: Iterable[str] | str | None = None) -> None:
        """Fix every learned gate in its present state; closed layers then keep no input for backward."""
        for name, state in self._names.items():
            if state in self._states_for(tasks):
                self._not_merged(name, "freeze_gates")
        for state in self._states_for(tasks):
            opened = set(state.open_layers())
            for name, part in state.learned():
                part.fix(name in opened)

    def sparsity_loss(self, tasks: Iterable[str] | str | None = None, scale: float = 1.0) -> Tensor:
        """`scale * sum over tasks of lam / L * sum_i w_i |s_i|` (equation 5), a scalar.

        Args:
            tasks: which tasks; by default the active one.
            scale: 0 during warm-up.
        """
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
        """
        return groups.parameter_groups(self._states_for(tasks), lr=lr, score_lr=score_lr, weight_decay=weight_decay)

    # -- reports and files

    def report(self, name: str | None = None) -> Report:
        """Which layers a task (default: the active one) changed, and what it holds."""
        name = self._active if name is None else name
        return make_report(str(name), self.state(name), self.base)

    def fingerprint(self, head_module: str | None = None) -> str:
        """SHA-256 over the base's parameters and buffers outside the head."""
        return taskfile.base_fingerprint(self.base, self._head if head_module is None else head_module)

    def save_task(
        self,
        name: str,
        path: str | PathLike[str],
        *,
        labels: Sequence[str] | None = None,
        metrics: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> int:
        """Write a task to a `.taps` file, atomically; returns the bytes written.

        Args:
            labels: class names, one for each output of a linear head.
            metrics, preprocessing: JSON-ready notes, kept as they are.

        Raises:
            ConfigError: another number of labels than outputs.
            GateError: Inf or NaN in what is to be saved. OSError: the file cannot be written.
        """
        state = self.state(name)
        outputs = getattr(state.head, "out_features", None)
        if labels is not None and isinstance(outputs, int) and len(labels) != outputs:
            raise ConfigError(f"labels: expected {outputs} names (the head of {name!r}), got {len(labels)}")
        notes = {"labels": labels, "metrics": metrics, "preprocessing": preprocessing}
        return taskfile.save(name, state, self.base, path, **notes)

    @torch.inference_mode(False)
    def load_task(
        self,
        path: str | PathLike[str],
        name: str | None = None,
        *,
        head: nn.Module | None = None,
        allow_dtype_cast: bool = False,
    ) -> str:
        """Add the task in a `.taps` file under its own name or `name`; returns the name.

        Args:
            head: a module of the saved head's structure, needed where the head is not a plain linear layer.
            allow_dtype_cast: accept a base that was cast (`.half()`, `.double()`) after the task was trained. The task
                is cast alike, as if the whole model had been. That the values are those of the file's base cannot be
                proven then; names, shapes and the file itself are checked as ever.

        Raises:
            TaskFileError: the file is damaged, belongs to another base, or does not fit; nothing is added.
        """
        self._loaded()
        record = taskfile.read(path, self.base, allow_dtype_cast=allow_dtype_cast)
        name = self._new_name(record.name if name is None else name)
        state = taskfile.build(record, self.base, self.gates, head, path, allow_dtype_cast=allow_dtype_cast)
        self._install(name, state)
        return name

    @torch.inference_mode(False)
    def reload_task(self, name: str, path: str | PathLike[str]) -> None:
        """Replace a task's values by those in a file. Raises as :meth:`load_task`; then nothing has changed.

        The parameters stay the same objects, so an optimizer made before goes on training them, unless the file's
        task is built differently (other layers, types or method).
        """
        old = self.state(name)
        self._not_merged(name, "reload_task")
        state = taskfile.build(taskfile.read(path, self.base), self.base, self.gates, copy.deepcopy(old.head), path)
        if not old.take_over(state):
            self._install(name, state)

    # -- plain checkpoints

    @torch.inference_mode(False)
    def extract_task(
        self,
        name: str,
        state_dict: Mapping[str, Tensor],
        *,
        head: nn.Module | None = None,
        head_module: str | None = None,
        config: FullConfig | None = None,
    ) -> None:
        """Add the task whose model is a fine-tuned copy of the base, bit for bit.

        Layers with the base's own weights are closed. An open one holds a Delta where that gives the checkpoint's
        weight exactly in every element, and the checkpoint's weight itself where it does not.

        Args:
            name: printable, without '/'.
            state_dict: all tensors of the fine-tuned model under the base's names, in the base's shapes and dtypes
                (wrappers' prefixes `module.` and `_orig_mod.` are dropped). The head may have another number of
                outputs where the base's is an `nn.Linear`.
            head: a module of the checkpoint's head's structure, where it differs otherwise.
            head_module: the head's name, where it is not the model's.
            config: `FullConfig(exclude_modules=[...])` for modules that cannot be gated; they must be the base's.

        Raises:
            ConfigError: a tensor that is missing, too many, of another shape or dtype, not finite, or changed where
                the task cannot hold a change, naming it; nothing is added.
            UnsupportedModuleError: a layer that cannot be gated, naming it.
        """
        self._loaded()
        name = self._new_name(name)
        config = FullConfig() if config is None else config
        if not isinstance(config, FullConfig):
            raise ConfigError(f"config: expected a FullConfig, got {type(config).__name__}")
        path = self._head if head_module is None else head_path(self.base, head_module)
        self._install(name, convert.extract(self.base, state_dict, config, path, head, self.gates))

    @torch.inference_mode(False)
    def task_state_dict(self, name: str) -> dict[str, Tensor]:
        """A task as a plain checkpoint: the state of `merge_and_unload(name)`, with this model left as it is.

        For a task made by :meth:`extract_task` these are the checkpoint's tensors, bit for bit.
        """
        self._loaded()
        return {n: t.detach() for n, t in convert.plain_copy(self.base, self.state(name)).state_dict().items()}

    # -- merging and unloading

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

    def unload(self) -> nn.Module:
        """Give the base back as it was: classes, flags, modes and tensors. All tasks are dropped."""
        if self._flags is None:
            return self.base
        for module in self.base.modules():
            unroute(module)
        self._flags.restore(self.base)
        self._flags = None
        disown(self.base)
        self._states, self._names = nn.ModuleDict(), {}
        self._active = self._merged = None
        return self.base

    def merge_and_unload(self, name: str) -> nn.Module:
        """A plain copy of the base with one task's weights, norms and head in place; the TaskModel is unloaded.

        The copy is in the TaskModel's mode (training or evaluation); the base gets its own modes back.
        """
        state = self.state(name)
        tensors = merging.task_tensors(state, self.base)
        plain, head = copy.deepcopy((self.base, state.head))  # while the tasks still are there: not all can be copied
        merging.like_unloaded(plain, self.unload())
        merging.install(plain, tensors, state.head_path, head)
        return plain.train(self.training)
