"""TaskModel: one frozen base model, many tasks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from . import convert, merging, taskfile
from .checks import disown
from .errors import ConfigError, TapsError
from .methods import FullConfig
from .nn.frame import in_backward, recomputed_call, running_node
from .nn.mirror import Mirror
from .nn.route import unroute, whole_model
from .report import Report, make_report
from .running import run_base, run_task
from .scan import head_path
from .taskset import TaskSet

_ACTIVE: Any = type("ActiveTask", (), {"__repr__": lambda self: "<the active task>"})()


class TaskModel(TaskSet):
    """Adapt one frozen base model to many tasks (TAPS, arXiv 2203.16708, and related methods).

    The base keeps its parameters, buffers, names and hooks; each task adds parts beside it.

    Args:
        base: any module. Its parameters stop requiring gradients until :meth:`unload`.
        config: the method for tasks that bring none of their own.
        gates: "host" decides on the host which layers are closed, so that they cost what the base costs;
            "device" reads scores where they live, for captured graphs and compilation without recompiling.
        head_module: the classifier's name, where it is not found (see :func:`taps_ext.scan.find_head`).
        batch_dim: which dimension of the forward's first tensor counts samples.

    Raises:
        ConfigError: a base whose forward has an argument named `task` or `tasks`; unknown `gates`; a negative
            `batch_dim`.
    """

    # -- forward

    def forward(self, *args: Any, task: str | None = _ACTIVE, tasks: Any = None, **kwargs: Any) -> Any:
        """Run the base with one task's parts.

        Args:
            task: the task of this call; by default the active one. None is the base, as it was before.
            args, kwargs: what the base's forward takes.

        Raises:
            ConfigError: an unknown task; in training `gate_fraction` below 1 with gates="device", or no tensor to draw
                samples of.
            GateError: a NaN score; in training, Inf or NaN in a Delta that closed or was loaded since the last forward.
                Of one that is written to while it is closed backward says so on a CPU; on a GPU its score becomes NaN.
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
        if learning and not torch._C._are_functorch_transforms_active():
            for held in state.bindings.resting:
                delta = held.get("delta")
                if delta is not None:
                    delta.grad = None  # zeros that someone put there, or of a forward before the gate closed
            if state.closed:
                state.lay_to_rest()
        return run_task(self, name, state, args, kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise TapsError(
            "DataParallel: expected one process for each GPU, got threads; use DistributedDataParallel instead"
        )

    def train(self, mode: bool = True) -> TaskModel:
        """Training mode for tasks and the base's dropout; the base's own norms stay in evaluation mode."""
        with whole_model(mode):
            super().train(mode)
        if not mode and not torch.compiler.is_compiling():
            for state in self._names.values():
                state.look_again()
        return self

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
            ConfigError: another number of labels than outputs; one string instead of a list.
            GateError: Inf or NaN in what is to be saved. OSError: the file cannot be written.
        """
        state = self.state(name)
        outputs = getattr(state.head, "out_features", None)
        if isinstance(labels, str):
            raise ConfigError(f"labels: expected a list of strings, got {labels!r}")
        if labels is not None and isinstance(outputs, int) and len(labels) != outputs:
            raise ConfigError(f"labels: expected {outputs} names (the head of {name!r}), got {len(labels)}")
        self._check_base()
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

        A file holds no closed Delta: after loading these are zero, so that their gates get no gradient and stay closed
        if the task is trained on. They take no memory until `parameter_groups` is asked for the task, or a gate opens.
        A run that is to go on is the Trainer's (`TrainConfig(out=...)`).

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
        record, head = taskfile.read(path, self.base), copy.deepcopy(old.head)
        state = taskfile.build(record, self.base, self.gates, head, path, whole=True)
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

        Raises:
            TapsError: the base shares a tensor between two modules, and the task has another value for each.
        """
        tensors = {n: t.detach() for n, t in self._plain_copy(name).state_dict().items()}
        merging.check_one_value(self.base, tensors)
        return tensors

    def _plain_copy(self, name: str) -> nn.Module:
        state = self.state(name)
        assert self._flags is not None  # `state` has refused an unloaded model
        return merging.plain_copy(self.base, state, self._flags)

    # -- unloading

    def unload(self) -> nn.Module:
        """Give the base back as it was: classes, flags, modes and tensors. All tasks are dropped."""
        if self._flags is None:
            return self.base
        for module in self.base.modules():
            unroute(module)
        self._flags.restore(self.base)
        self._flags = None
        disown(self.base)
        self._states, self._names, self._mirror = nn.ModuleDict(), {}, Mirror()
        self._active = self._merged = None
        return self.base

    def merge_and_unload(self, name: str) -> nn.Module:
        """A plain copy of the base with one task's weights, norms and head in place; the TaskModel is unloaded.

        The copy is in the TaskModel's mode (training or evaluation); the base gets its own modes back.
        """
        plain = self._plain_copy(name)  # while the tasks still are there: not everything can be copied
        self.unload()
        return plain.train(self.training)
