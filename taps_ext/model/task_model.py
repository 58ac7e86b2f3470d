"""TaskModel: one frozen base model, many tasks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import store
from ..base import flags
from ..base.caches import Caches, forget
from ..base.classifiers import check_one
from ..base.fingerprint import base_fingerprint
from ..base.guard import Guard
from ..base.head import head_path, head_paths, make_head
from ..base.known import Known
from ..base.offload import check_present
from ..base.ownership import check_base, disown, own
from ..base.scan import Reach, Scan, check_kept, check_shared, frozen_by_user, inside, match, scan, trainable
from ..errors import ConfigError, TapsError, suggestion
from ..files import checkpoint, merge
from ..files import task as task_file
from ..files.pack import PackedRow, Packing
from ..methods import FullConfig, MethodConfig
from ..parts import Instead, Part, token
from ..parts.host import GATED_TYPES, NORM_TYPES, host_of, owner_of
from ..parts.mirror import Mirror
from ..parts.packing import Rule
from ..routing.frame import Frame, in_backward, recomputed_call, running_node
from ..routing.route import claim, gated, route, unroute, whole_model
from . import groups, packing, rest, stream
from .entry import ACTIVE, EntryPoints
from .mixing import run_mixed
from .passes import run_tasks
from .report import Report, make_report
from .running import run_base, run_task
from .state import Family, Parts, TaskState, module_key
from .tracing import MODULE_CALL, Untraced, check_symbolic, refuse


def _checked(parts: Any, config: MethodConfig) -> dict[str, Part]:
    """What a method made, if it is parts by name, and the method has a name that files can give.

    Raises:
        ConfigError: it is not, or has none.
    """
    if not config.method:
        raise ConfigError(
            f"config: expected a method that has a name, got {type(config).__name__}; decorate its class by "
            '@register_method("a name")'
        )
    if not isinstance(parts, Mapping):
        raise ConfigError(f"method {config.method!r}: parts: expected a dictionary, got {type(parts).__name__}")
    for name, part in parts.items():
        if not isinstance(part, Part):
            raise ConfigError(f"method {config.method!r}: parts[{name!r}]: expected a Part, got {type(part).__name__}")
    return dict(parts)


class TaskModel(EntryPoints, Untraced):
    """Adapt one frozen base model to many tasks (TAPS, arXiv 2203.16708, and related methods).

    The base keeps its parameters, buffers, names and hooks; each task adds parts beside it.

    A method of the base that neither nn.Module nor this class has a name for (`generate`, `forward_features`) runs the
    active task as `model(x)` does, or with `task=` another one for this call. One that changes the base's tensors
    raises :class:`TapsError`, naming one. Plain attributes of the base can be read here (docs/entry.md).

    Args:
        base: any module. Its parameters stop requiring gradients until :meth:`unload`.
        config: the method for tasks that bring none of their own: the attribute `default_config`.
        gates: "host" decides on the host which layers are closed, so that they cost what the base costs;
            "device" reads scores where they live, for captured graphs and compilation without recompiling.
        head_module: the classifier's name, where it is not found (see :func:`taps_ext.base.head.find_head`); a list of
            names where the base has several classifiers, each of which tasks get a linear head in the place of; `[]`
            for tasks without a head, to which the base's own is a layer like any (a language model's words).
        batch_dim: which dimension of the forward's tensors counts samples: that of the first which has more than one
            there; with 0 a list of images `[C, H, W]` counts as many as it has.
        unsupported: "raise" refuses a base with weights that cannot be gated, naming them all; "freeze" leaves them to
            the base.
        row_invariant: True gives a task's samples in a batch of several tasks, to the bit, what they are given alone.

    Parameters of the base that do not require a gradient now stay the base's in every task, unless its config's
    `target_modules` name their layer; where nothing outside the head requires one, that says nothing.

    Raises:
        ConfigError: a base whose forward has an argument named `task` or `tasks`; unknown `gates` or `unsupported`; a
            negative `batch_dim`.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MethodConfig | None = None,
        *,
        gates: str = "host",
        head_module: str | Sequence[str] | None = None,
        batch_dim: int = 0,
        unsupported: str = "raise",
        row_invariant: bool = False,
    ) -> None:
        super().__init__()
        check_base(base)
        if not isinstance(row_invariant, bool):
            raise ConfigError(f"row_invariant: expected a bool, got {row_invariant!r}")
        if unsupported not in ("raise", "freeze"):
            hint = suggestion(str(unsupported), ("raise", "freeze"))
            raise ConfigError(f"unsupported: expected 'raise' or 'freeze', got {unsupported!r}{hint}")
        if gates not in ("host", "device"):
            raise ConfigError(
                f"gates: expected 'host' or 'device', got {gates!r}{suggestion(str(gates), ('host', 'device'))}"
            )
        if config is not None and not isinstance(config, MethodConfig):
            raise ConfigError(f"config: expected a method config such as TapsConfig, got {type(config).__name__}")
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ConfigError(f"batch_dim: expected an int >= 0, got {batch_dim!r}")
        self.default_config, self.gates, self.batch_dim = config, gates, batch_dim
        self.unsupported, self.row_invariant = unsupported, row_invariant
        self._layouts: dict[Any, Any] = {}  # of batches of several tasks
        self.base = base
        self._states = nn.ModuleDict()
        self._names: dict[str, TaskState] = {}
        self._families = nn.ModuleDict()
        self._active: str | None = None
        self._said_base = False  # that none is active is what was asked for
        self._warned_of_base = False
        self._merged: str | None = None
        self._heads = head_paths(base, head_module)
        self._head = next(iter(self._heads), None)
        self._head_named = head_module is not None
        self._flags: flags.Flags | None = flags.Flags(base)
        self._mirror = Mirror()
        self._caches = Caches(base)
        own(base, self, self._flags)
        self._trainable = trainable(base)
        base.requires_grad_(False)
        self._guard, self._known = Guard(), Known()
        routed: tuple[type[nn.Module], ...] = (*GATED_TYPES, *NORM_TYPES)
        encoders = [module for module in base.modules() if isinstance(module, nn.TransformerEncoderLayer)]
        fused = {part for encoder in encoders for part in encoder.modules()}
        for name, module in list(base.named_modules()):
            if isinstance(module, routed) and not inside(name, self._head):
                route(module, name, fused=module in fused)
        claim(base, self)
        self.training = base.training  # without touching the modules, each of which has a mode of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy adapts a base of its own."""
        super().__setstate__(state)
        if self._flags is not None:
            own(self.base, self, self._flags)
            claim(self.base, self)
            self._caches.note(self.base)

    def active_frame(self) -> Frame | None:
        """A frame of the active task, for base modules that are spoken to outside of forwards; None for the base."""
        return None if self._active is None else Frame(self.state(self._active).stacks(), set())

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self._names:
            self._guard.forget(self.base, self._head)
        self._known.forget()
        result = super()._apply(*args, **kwargs)
        self._caches.follow(self.base, args[0] if args else kwargs["fn"])
        if self._merged is not None:  # of what the weights are now
            self._install_merged(self._merged)
        return result

    def _check_base(self) -> None:
        """Raise if something wrote to the base unseen: tasks would belong to no base that exists.

        Raises:
            TapsError: naming the tensor.
        """
        check_present(self.base)
        problem = self._guard.check(self.base, self._head)
        if problem is not None:
            raise TapsError(problem)

    # -- forward

    def forward(self, *args: Any, task: str | None = ACTIVE, tasks: Any = None, **kwargs: Any) -> Any:
        """Run the base with one task's parts.

        Args:
            task: the task of this call; by default the active one. None is the base, as it was before.
            tasks: a task's name or None for each sample of the batch, in its order: a :class:`MixedOutput`
                (docs/mixed.md).
            args, kwargs: what the base's forward takes.

        Raises:
            ConfigError: an unknown task; in training `gate_fraction` below 1 with gates="device", or no tensor to draw
                samples of.
            GateError: a NaN score; in training, Inf or NaN in a Delta that closed or was loaded since the last forward.
                Of one that is written to while it is closed backward says so for a `Dense` on a CPU; otherwise its
                score becomes NaN, which the next forward says.
            BypassedLayerError: the task's first forward did not enter every layer that has parts.
        """
        if torch.compiler.is_exporting():
            refuse("torch.export")
        return self._forward(None, task, tasks, args, kwargs)

    def forward_tasks(self, *args: Any, tasks: Sequence[str], **kwargs: Any) -> dict[str, Any]:
        """Run several tasks on the same samples: what `model(x, task=name)` gives for each, by name.

        Tasks whose parts can be served together share one pass of the base: those of one MTLoRA family, and those that
        have nothing but a head. All others run one after the other, and so do merged tasks and samples that are not
        counted in dimension 0. Dropout draws once for what a pass shares.

        Args:
            tasks: names, each once. args, kwargs: what the base's forward takes.

        Raises:
            ConfigError: anything else in `tasks`. UnsupportedModuleError: tasks that share a pass, and a base that
                computes on with what its head gives. Else as :meth:`forward`.
        """
        if torch.compiler.is_exporting():
            refuse("torch.export")
        return run_tasks(self, tasks, args, kwargs)

    @torch.compiler.disable(recursive=False)
    def _forward(self, entry: str | None, task: str | None, tasks: Any, args: Any, kwargs: Any) -> Any:
        """`forward`, or what else the base has a method `entry` for."""
        if nn.Module.__call__ is not MODULE_CALL:
            check_symbolic(args, kwargs)
        if tasks is not None:
            if task is not ACTIVE:
                raise ConfigError(f"task: expected one of task and tasks, got both, task={task!r}")
            return run_mixed(self, entry, tasks, args, kwargs)
        repeated = recomputed_call(owner=self) if in_backward() else None
        unknown = in_backward() and repeated is None and torch.is_grad_enabled()
        if task is not ACTIVE:
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
            if task is ACTIVE and self._names:
                self._warn_of_base(6 if entry is None else 4)
            return run_base(self, args, kwargs, entry)
        return run_task(self, name, self._begin(name), args, kwargs, entry)

    def _begin(self, name: str) -> TaskState:
        """Bring a task up to date for a forward, or one that is recomputed in backward."""
        repeated = recomputed_call(owner=self) if in_backward() else None
        unknown = in_backward() and repeated is None and torch.is_grad_enabled()
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
            state.rest()
        return state

    def _warn_of_base(self, level: int) -> None:
        """Say that no task runs: in training always, else once, and not to who asked for that by `set_task(None)`.

        level: of the caller of `model(x)`, seen from the forward.
        """
        trains = self.training and torch.is_grad_enabled()
        if trains or not (self._said_base or self._warned_of_base):
            self._warned_of_base = self._warned_of_base or not trains
            warnings.warn(
                "no task is active, so this is the frozen base; name one: model(x, task=...) or set_task(...)",
                stacklevel=level + 1,
            )

    def _replicate_for_data_parallel(self) -> Any:
        raise TapsError(
            "DataParallel: expected one process for each GPU, got threads; use DistributedDataParallel instead"
        )

    def train(self, mode: bool = True) -> TaskModel:
        """Training mode for tasks and the base's dropout; the base's own norms stay in evaluation mode."""
        with whole_model(mode):
            super().train(mode)
        self._guard.asks = True
        self._known.forget()
        if not mode and not torch.compiler.is_compiling():
            for state in self._names.values():
                state.look_again()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> TaskModel:
        """Let all tasks and families train, or none. The base never does until :meth:`unload`, a family that is in a
        file does no more, and packed Deltas and those of gates that are fixed and closed rest."""
        for held in (*self.families.values(), *self._names.values()):
            held.requires_grad_(requires_grad)
        return self

    def apply(self, fn: Callable[[nn.Module], Any]) -> TaskModel:
        """Call `fn` with every module of the base and of the tasks, children first; it may set their settings.

        Raises:
            TapsError: it wrote to the base's tensors outside the head while there are tasks, naming one.
        """
        super().apply(fn)
        if self._names:
            self._check_base()
        return self

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
            if not self._names:
                raise ConfigError(
                    f"task: the model has no task yet (add_task makes one, load_task reads one), got {name!r}"
                )
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
        head_module: str | Sequence[str] | None = None,
        config: MethodConfig | None = None,
    ) -> None:
        """Add a task that starts as the base with a new head.

        Args:
            name: printable, without '/'.
            num_classes: makes a linear head with that many outputs, drawn from torch's generator.
            head: a head of your own instead. Without either, the task starts from a copy of the base's head.
            head_module: the name of the module that the head replaces, where it is not the model's; or several names.
            config: a method for this task only.

        Raises:
            ConfigError: a taken or bad name, no head found, several classifiers found and none named, a pattern that
                matches nothing.
            UnsupportedModuleError: a layer that cannot be gated, naming it.
        """
        self._loaded()
        check_present(self.base)
        name = self._new_name(name)
        config = config if config is not None else self.default_config
        if not isinstance(config, MethodConfig):
            raise ConfigError(f"config: expected a method config such as TapsConfig, got {type(config).__name__}")
        heads = self._heads if head_module is None else head_paths(self.base, head_module)
        heads = heads if config.own_head else heads[:1]
        path = next(iter(heads), None)
        if not config.own_head and (num_classes is not None or head is not None):
            raise ConfigError(
                f"add_task: method {config.method!r} is set to run on the base's own head, got another; leave out "
                "num_classes and head"
            )
        if config.own_head and head_module is None and not self._head_named:
            check_one(self.base, path)
        sizes = {one: getattr(self.base.get_submodule(one), "out_features", None) for one in heads}
        if len(heads) > 1 and num_classes is not None and len(set(sizes.values())) > 1:
            raise ConfigError(
                f"num_classes: expected none for heads of several sizes ({sizes}), got {num_classes}; name the module "
                "that holds them in head_module, and give one of your own as head"
            )
        if len(heads) > 1 and head is not None:
            raise ConfigError(f"head: expected num_classes, which makes a head for each of {heads}, got a module")
        own = make_head(self.base, path, num_classes, head, self) if config.own_head else None
        others = {other: make_head(self.base, other, num_classes, None, self) for other in heads[1:]}
        known = self.families.get(config.family)
        found = self._scan(config, heads, reach=None if known is None else known.reach)
        parts = _checked(config.parts(found), config)
        check_kept(self.base, [n for n, part in parts.items() if part.gate is not None])
        family = self._family(config, found)
        config.begin(found, parts, self._shared(family))
        trained = [n for n, part in {**parts, **self._shared(family)}.items() if any(True for _ in part.parameters())]
        if own is not None and path is not None:
            parts[path] = Instead(own, "head")
            trained += heads if num_classes is None and head is None else []
            parts |= {name: Instead(made, "further head") for name, made in others.items() if made is not None}
        check_shared(self.base, trained, heads)
        state = TaskState(self.base, config, parts, None if own is None else path, self.gates, family)
        state.reach = found.reach
        self._install(name, state)
        if not trained and own is None:
            warnings.warn(
                f"task {name!r}: method {config.method!r} finds nothing to train in this base, and it has no head",
                stacklevel=3,
            )

    def _scan(
        self,
        config: MethodConfig,
        heads: Sequence[str] | None = None,
        *,
        frozen: bool = True,
        reach: Reach | None = None,
    ) -> Scan:
        """What a method may put parts over.

        Args:
            heads: the modules that are left to heads, by default the model's.
            frozen: what the user froze stays the base's; False for a checkpoint, which may have changed it.
            reach: what of the base the tasks of a family were given, for another one.
        """
        heads = self._heads if heads is None else heads
        head = next(iter(heads), None)
        if reach is None:
            reach = Reach(frozen_by_user(self._trainable, heads) if frozen else frozenset(), any_weight=True)
        return scan(
            self.base,
            head,
            target=config.target_modules,
            exclude=config.exclude_modules,
            heads=heads[1:],
            reach=reach,
            freeze_unsupported=self.unsupported == "freeze",
        )

    @staticmethod
    def _shared(family: Family | None) -> Mapping[str, Part]:
        return {} if family is None else family.table

    def _install(self, name: str, state: TaskState, *, loaded: bool = False) -> None:
        """Add a task. `loaded`: from a file, so that what was found of the base by versions holds (`base/known.py`)."""
        if not self._names and loaded:
            self._guard = self._known.guard(self.base)
        elif not self._names:
            self._guard = Guard()  # the base's tensors may have been loaded since
            self._guard.note(self.base)
        if state.family is not None and state.family.name not in self.families:
            self._place(state.family)
            self._families[module_key(state.family.name)] = state.family
        self._place(state)
        self._states[module_key(name)] = state
        self._names[name] = state

    def _place(self, parts: Parts) -> None:
        """Route what parts stand on."""
        for name in parts.table:
            host = host_of(self.base, name)
            owner, module = owner_of(host), name if owner_of(host) is host else name.rpartition(".")[0]
            route(owner, module)
            if parts.table[name].gate is not None:
                gated(owner, name, host)
        claim(self.base, self)
        parts.remember_hosts(self.base)
        parts.train(self.training)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self._merged is not None:
            raise TapsError(f"load_state_dict: task {self._merged!r} is merged; call unmerge_task() first")
        self._guard = Guard()  # the base's own may come with it
        self._known.forget()
        super()._load_from_state_dict(*args)

    def delete_task(self, name: str) -> None:
        """Forget a task, and its family if that is in no file and has no other task.

        The active task becomes the base if it was this one.
        """
        family = self.state(name).family
        if self._merged == name:
            self.unmerge_task()
        if self._active == name:
            self._active = None
        del self._states[module_key(name)], self._names[name]
        if family is not None and not family.digest and all(s.family is not family for s in self._names.values()):
            del self._families[module_key(family.name)]
        token.note()

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
        """Make `model(x)` run this task; None is the base, in evaluation semantics.

        A model with tasks of which none was ever set runs the base with a warning: in evaluation once.
        """
        if name is not None:
            self.state(name)
        self._active, self._said_base = name, name is None

    @contextmanager
    def use_task(self, name: str | None) -> Iterator[TaskModel]:
        """`with model.use_task("birds"):` sets the task and restores the previous one."""
        before, state, said = self._active, self._names.get(self._active or ""), self._said_base
        self.set_task(name)
        try:
            yield self
        finally:  # under the name that it has now
            now = next((found for found, known in self._names.items() if known is state), before)
            self._active = now if now in self._names else None
            self._said_base = said

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
        layers = {layer: part for layer, part, _ in state.gated()}
        if isinstance(open, str):
            raise ConfigError(f"open: expected a list of patterns, got {open!r}")
        chosen = match(open, list(layers), "open")
        state.grow(chosen)
        for layer in chosen:
            if not layers[layer].changes():
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
            for name, part, _ in state.learned():
                part.fix(name in opened)

    def sparsity_loss(self, tasks: Iterable[str] | str | None = None, scale: float = 1.0) -> Tensor:
        """`scale` times what the methods of these tasks add to the loss, a scalar; for TAPS the sum over tasks of
        `lam / L * sum_i w_i |s_i|` (equation 5).

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
        total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        return total if scale == 1.0 else scale * total

    def drop_closed_gradients(self, tasks: Iterable[str] | str | None = None) -> None:
        """Set gradients of closed Deltas to None before an optimizer step.

        Needed for gates="device", where backward gives zeros, and after `zero_grad(set_to_none=False)` between the
        forward and the step: with zero gradients momentum and weight decay would move a Delta that should rest. It asks
        the device which gates are closed; :meth:`resting` does not.
        """
        for state in self._states_for(tasks):
            state.drop_closed_gradients()

    def resting(
        self, optimizer: torch.optim.Optimizer, tasks: Iterable[str] | str | None = None
    ) -> AbstractContextManager[None]:
        """Around an optimizer's step: closed Deltas and their optimizer state are afterwards what they were before.

            with model.resting(optimizer):
                optimizer.step()                  # or scaler.step(optimizer)

        For gates="device" the device chooses and nothing waits for it, so that the step can be captured in a CUDA
        graph; it costs a copy of the Deltas and of their state while it runs. Where the host knows the gates, it is
        what :meth:`drop_closed_gradients` does. State that the optimizer makes in this step for a closed Delta, its
        first, stays as a step without a gradient makes it.

        Raises:
            ConfigError: state in numbers or on another device than the score (`capturable=True` puts Adam's steps
                there); state that is first made in a captured step.
        """
        return rest.resting(optimizer, self._states_for(tasks))

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

        Raises:
            ConfigError: a rate or decay that is negative, not finite or no number.
            TapsError: a packed task, naming a layer: it trains no further until :meth:`unpack_task`.
        """
        chosen = self._states_for(tasks)
        for name, state in self._names.items():
            if state in chosen:
                packing.check_trains(name, state)
        for name, state in self._names.items():
            count, nbytes = state.grow() if state in chosen else (0, 0)
            if count:
                warnings.warn(
                    f"task {name!r}: {count} closed layers were loaded without a Delta and get one of zeros to train "
                    f"({nbytes / 2**20:.1f} MiB)",
                    stacklevel=2,
                )
        return groups.parameter_groups(chosen, lr=lr, score_lr=score_lr, weight_decay=weight_decay)

    # -- packing

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack_task(
        self,
        name: str,
        *,
        codec: str | None = None,
        max_error: float | None = None,
        budget: int | None = None,
        data: Any = None,
    ) -> Packing:
        """Hold the Deltas of a task's open layers in fewer bytes, in memory and in its file. It runs, reports, merges
        and saves as before, and trains no further until :meth:`unpack_task`. Heads, norms and biases stay as they are,
        and so do changes that are no Delta, and layers that would take no fewer bytes.

        Args:
            codec: "bitmask" (exact), "bitmask:SHARE" (of the largest elements), "int8", "int4", "sign" or
                "lowrank:RANK", for all layers (docs/packed.md).
            max_error: for each layer the fewest bytes with a relative error |Delta - packed| / |Delta| of no more.
            budget: for all these layers together the least squared error in so many bytes.
                Without any of the three nothing is lost: "bitmask" where that is smaller.
            data: a batch of inputs (a tensor, a tuple of arguments, a dictionary of keyword arguments), or an iterable
                of some: then errors are those of what Delta adds to a layer's own outputs, where a forward enters the
                layer itself. The layers' inputs are held meanwhile: a few dozen samples are right.

        Raises:
            ConfigError: arguments that make no sense; a task that is packed already; a Delta that is not finite, naming
                its layer; a budget that is too small; `data` in training mode. Nothing has changed then.
        """
        state = self.state(name)
        self._not_merged(name, "pack_task")
        rule = Rule.of(codec, max_error, budget)
        if data is not None and self.training:
            raise ConfigError("data: expected a model in evaluation mode, got training mode; call eval() first")
        state.grow(opened := state.open_layers())
        found, rows = packing.pack(name, state, self.base, rule, opened, self._inputs_of(name, opened, data))
        state.exchange(found)
        return Packing(name, rows)

    def _inputs_of(self, name: str, layers: list[str], data: Any) -> dict[str, list[Tensor]]:
        run = lambda args, kwargs: self(*args, task=name, **kwargs)  # noqa: E731
        return {} if data is None else packing.inputs_of(run, {n: host_of(self.base, n) for n in layers}, data)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unpack_task(self, name: str) -> list[str]:
        """Hold what a packed task has as Deltas again, which train; returns the layers. What was lost stays so.

        Raises:
            ConfigError: the task is not packed.
        """
        state = self.state(name)
        self._not_merged(name, "unpack_task")
        packed = {n: part.unpack(host_of(self.base, n)) for n, part, _ in state.gated() if part.packed}
        if not packed:
            raise ConfigError(f"unpack_task: expected a packed task, got {name!r}, which is not")
        state.exchange(packed)
        return list(packed)

    # -- merging

    def merge_task(self, name: str) -> None:
        """Install the weights of the open layers (`W + Delta`) beside the base, so that the task runs at the base's
        cost.

        Raises:
            TapsError: a task is merged already. UnsupportedModuleError: a change that does not fold, naming its module.
        """
        if self._merged is not None:
            raise TapsError(f"merge_task: task {self._merged!r} is merged already; call unmerge_task() first")
        self._install_merged(name)
        self._merged = name
        self._warned_of_base = False  # one that runs the base now may have meant the merged task

    def _install_merged(self, name: str) -> None:
        state = self.state(name)
        check_present(self.base)
        state.open_layers()  # refuses a NaN score
        state.check_registered()
        state.install(merge.folded(state.stacks(merged=False), self.base))

    def unmerge_task(self) -> None:
        """Drop the merged weights; the base was never changed, so this is exact."""
        if self._merged is not None:
            self.state(self._merged).install({})
        self._merged = None

    # -- reports and files

    def report(self, name: str | None = None) -> Report:
        """Which layers a task (default: the active one) changed, and what it holds."""
        name = self._active if name is None else name
        return make_report(str(name), self.state(name), self.base)

    def fingerprint(self, head_module: str | None = None) -> str:
        """SHA-256 over the base's parameters and buffers outside the head."""
        return base_fingerprint(self.base, self._head if head_module is None else head_module)

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
        task_file.check_labels(labels, state.head, name)
        self._check_base()
        opened = set(state.open_layers())
        state.grow(opened)
        base = base_fingerprint(self.base, state.head_path) if state.family is None else None
        parent = base or state.family.parent()  # type: ignore[union-attr]
        return task_file.save(
            path,
            task_file.to_records(state.table, opened),
            kind="task",
            name=name,
            config=state.config,
            parent=parent,
            labels=labels,
            metrics=metrics,
            preprocessing=preprocessing,
            training_only=state.training_only,
            entered=False not in state.seen and bool(state.entered) and state.entered.issuperset(state.required()),
            reach=state.reach,
        )

    @torch.inference_mode(False)
    def load_task(
        self,
        path: str | PathLike[str] | store.TaskFile,
        name: str | None = None,
        *,
        head: nn.Module | None = None,
        shared: str | PathLike[str] | None = None,
        allow_dtype_cast: bool = False,
    ) -> str:
        """Add the task in a `.taps` file, or as `store.load` has read it, under its own name or `name`; returns that.

        A file holds no closed Delta: after loading these are zero, so that their gates get no gradient and stay closed
        if the task is trained on. They take no memory until `parameter_groups` is asked for the task, or a gate opens.
        A run that is to go on is the Trainer's (`TrainConfig(out=...)`).

        Args:
            head: a module of the saved head's structure, needed where the head is not a plain linear layer.
            shared: the file of the family that the task builds on, where that is neither loaded nor beside `path`.
            allow_dtype_cast: accept a base that was cast (`.half()`, `.double()`) after the task was trained. The task
                is cast alike, as if the whole model had been. That the values are those of the file's base cannot be
                proven then; names, shapes and the file itself are checked as ever.

        Raises:
            TaskFileError: the file is damaged, belongs to another base, or does not fit; nothing is added.
        """
        self._loaded()
        check_present(self.base)
        with self._opened(path) as file:
            name = self._new_name(file.name if name is None else name)
            state = self._prepare(file, head, shared, allow_dtype_cast)
        self._install(name, state, loaded=True)
        return name

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare_task(
        self, file: store.TaskFile, *, shared: store.TaskFile | None = None, codec: str | None = None
    ) -> TaskState:
        """The task in a file as `store.load` has read it, built and checked, for :meth:`install_task`: the long half of
        :meth:`load_task`, which changes nothing here and may run beside forwards in another thread.

        Args:
            shared: the file of the family that the task builds on, where that is not loaded. Nothing is looked for.
            codec: holds the Deltas of open layers in this one, as :meth:`pack_task`; a packed task stays as it is.

        Raises:
            TaskFileError: as :meth:`load_task`. ConfigError: an unknown codec; a Delta that is not finite.
        """
        self._loaded()
        check_present(self.base)
        head = task_file.head_of(file)
        at_hand = any(family.digest == file.parent for family in self.families.values())
        if shared is None and not at_hand:
            task_file.check_parent(file, self.base, head, known=self._known)
        state = self._prepare(file, None, shared, False)
        if codec is not None and not any(part.packed for _, part, _ in state.gated()):
            opened = state.open_layers()
            found, _ = packing.pack(file.name, state, self.base, Rule.of(codec, None, None), opened, {})
            state.exchange(found)
        return state

    def install_task(self, state: TaskState, name: str) -> None:
        """Add a task that :meth:`prepare_task` has built: the short half, for a moment when no forward runs.

        Raises:
            ConfigError: a taken or bad name.
        """
        self._loaded()
        self._install(self._new_name(name), state, loaded=True)

    def _prepare(
        self,
        file: store.TaskFile,
        head: nn.Module | None,
        shared: str | PathLike[str] | store.TaskFile | None,
        allow_dtype_cast: bool,
    ) -> TaskState:
        family = self._parent_of(file, shared, allow_dtype_cast)
        read = task_file.build(
            file,
            self.base,
            head,
            default_head=self._head,
            further=self._heads[1:],
            allow_dtype_cast=allow_dtype_cast,
            known=self._known,
        )
        return self._state_of(read, family)

    @staticmethod
    @contextmanager
    def _opened(path: str | PathLike[str] | store.TaskFile) -> Iterator[store.TaskFile]:
        """A task's file, whose tensors are read once what it says of them fits."""
        if isinstance(path, store.TaskFile):
            yield path
        else:
            with store.opened(Path(path), kind="task") as file:
                yield file

    def _state_of(self, read: task_file.Read, family: Family | None) -> TaskState:
        """The state of what a file describes."""
        state = TaskState(self.base, read.config, read.parts, read.head_path, self.gates, family)
        state.training_only, state.reach = read.training_only, read.reach
        state.entered = set(state.required()) if read.entered else set()
        return state

    @torch.inference_mode(False)
    def reload_task(self, name: str, path: str | PathLike[str]) -> None:
        """Replace a task's values by those in a file. Raises as :meth:`load_task`; then nothing has changed.

        The parameters stay the same objects, so an optimizer made before goes on training them, unless the file's
        task is built differently (other layers, types or method).
        """
        old = self.state(name)
        self._not_merged(name, "reload_task")
        custom = None if type(old.head) is nn.Linear else copy.deepcopy(old.head)
        with self._opened(path) as file:
            family = self._parent_of(file, None, False)
            read = task_file.build(
                file, self.base, custom, default_head=self._head, further=self._heads[1:], whole=True
            )
        state = self._state_of(read, family)
        if not old.take_over(state):
            self._install(name, state)

    # -- families: what tasks have together

    @property
    def families(self) -> dict[str, Family]:
        """The families by name: what their tasks have together, below their own parts."""
        return {family.name: family for family in self._families.values()}  # type: ignore[misc]

    def _family(self, config: MethodConfig, found: Scan) -> Family | None:
        """The family of a new task: the one of its name, or a new one that is not placed yet; None for a method without
        shared parts.

        Raises:
            ConfigError: the one of its name is built differently.
        """
        parts = _checked(config.shared(found), config)
        known = self.families.get(config.family)
        if not parts:
            return None
        if known is None:
            family = Family(self.base, self._family_name(config.family), config, parts)
            family.reach = found.reach
            return family
        same = parts.keys() == known.table.keys() and all(
            known.table[n].differs(part) is None for n, part in parts.items()
        )
        if not same:
            raise ConfigError(
                f"config: the family {config.family!r} of the tasks before has other shared parts; a family's tasks "
                "have the same settings of what they share, and others belong in a TaskModel of their own"
            )
        return known

    def add_family(self, config: MethodConfig | None = None) -> Family:
        """What the tasks of a method are to have together, before there is one of them; the family at hand where there
        is one. A first task makes it else.

        Raises:
            ConfigError: a method without shared parts; the family of its name is built differently.
        """
        self._loaded()
        config = self.default_config if config is None else config
        if not isinstance(config, MethodConfig):
            raise ConfigError(f"config: expected a method config such as JointTapsConfig, got {type(config).__name__}")
        found = self._scan(config)
        family = self._family(config, found)
        if family is None:
            raise ConfigError(f"config: method {config.method!r} has no shared parts as it is set")
        if family.name not in self.families:
            self._place(family)
            self._families[module_key(family.name)] = family
        return family

    def _family_name(self, name: str) -> str:
        """The name of a new family. Raises ConfigError where one differs from it by dots and slashes alone."""
        if module_key(name) in self._families:
            raise ConfigError(f"family: {name!r} has the name of another family but for '/' and '.'; rename one")
        return name

    def save_shared(self, family: str, path: str | PathLike[str]) -> int:
        """Write what the tasks of a family have together to a file, the parent of their files; returns the bytes
        written. From then on nothing trains it.

        Raises:
            ConfigError: an unknown family. GateError: Inf or NaN in what is to be saved.
        """
        self._loaded()
        known = self.families.get(family)
        if known is None:
            hint = suggestion(str(family), self.families)
            raise ConfigError(f"family: expected one of {list(self.families)}, got {family!r}{hint}")
        self._check_base()
        opened = [name for name, _, gate in known.gated() if gate.open]
        records = task_file.to_records(known.table, opened)
        written = task_file.save(
            path,
            records,
            kind="shared",
            name=family,
            config=known.config,
            parent=self.fingerprint(),
            reach=known.reach,
        )
        known.freeze(store.read_header(path).digest)
        return written

    @torch.inference_mode(False)
    def load_shared(self, path: str | PathLike[str]) -> str:
        """Add the family in a shared file, or load it into the one of its name that nothing has frozen yet; returns its
        name. Its tasks' files find it by its digest.

        Raises:
            TaskFileError: the file is damaged, belongs to another base, or does not fit. ConfigError: another family of
                that name.
        """
        self._loaded()
        file = store.load(Path(path), kind="shared")
        known = self.families.get(file.name)
        if known is not None and not known.digest:  # in the place of what its tasks would train
            known.take_over(self._built_family(file))
        family = self._read_family(file)
        if family.name not in self.families:
            self._place(family)
            self._families[module_key(family.name)] = family
        return family.name

    def _read_family(self, file: store.TaskFile, *, allow_dtype_cast: bool = False) -> Family:
        """The family in a shared file; the one at hand if it is that."""
        known = self.families.get(file.name)
        if known is not None:
            if known.digest != file.digest:
                raise ConfigError(
                    f"family: another family called {file.name!r} is there already; load into another TaskModel"
                )
            return known
        self._family_name(file.name)
        return self._built_family(file, allow_dtype_cast=allow_dtype_cast)

    def delete_family(self, name: str) -> None:
        """Forget a family that no task builds on, as those of files are kept when their last task goes.

        Raises:
            ConfigError: an unknown family, or one that a task builds on, naming it.
        """
        family = self.families.get(name)
        if family is None:
            hint = suggestion(str(name), self.families)
            raise ConfigError(f"family: expected one of {list(self.families)}, got {name!r}{hint}")
        users = [task for task, state in self._names.items() if state.family is family]
        if users:
            raise ConfigError(f"family: {name!r} is what task {users[0]!r} builds on; delete that first")
        del self._families[module_key(name)]
        token.note()

    def _built_family(self, file: store.TaskFile, *, allow_dtype_cast: bool = False) -> Family:
        task_file.check_parent(file, self.base, self._head, allow_dtype_cast=allow_dtype_cast, known=self._known)
        read = task_file.build(
            file,
            self.base,
            default_head=self._head,
            further=self._heads[1:],
            allow_dtype_cast=allow_dtype_cast,
            known=self._known,
        )
        family = Family(self.base, file.name, read.config, read.parts)
        family.reach = read.reach
        family.freeze(file.digest)
        return family

    def _parent_of(
        self, file: store.TaskFile, shared: str | PathLike[str] | store.TaskFile | None, allow_dtype_cast: bool
    ) -> Family | None:
        """The family that a task's file builds on, by digest: among those at hand, in `shared`, or beside the file;
        None where it builds on the base.

        Raises:
            ParentMismatchError: it builds on neither.
        """
        for family in self.families.values():
            if family.digest == file.parent:
                if not allow_dtype_cast:  # cast it has other bytes
                    family.check_kept("load_task", by_versions=True)
                return family
        if shared is None:
            if task_file.belongs(file, self.base, task_file.head_of(file), self._known):
                return None  # and nothing beside it needs a look
            shared = task_file.beside(file)
        if shared is not None:
            parent = shared if isinstance(shared, store.TaskFile) else store.load(Path(shared), kind="shared")
            store.check_parent(parent.digest, file.parent, path=file.path)
            return self._read_family(parent, allow_dtype_cast=allow_dtype_cast)
        task_file.check_parent(
            file, self.base, task_file.head_of(file), allow_dtype_cast=allow_dtype_cast, known=self._known
        )
        return None

    # -- plain checkpoints

    @torch.inference_mode(False)
    def extract_task(
        self,
        name: str,
        state_dict: Mapping[str, Tensor] | str | PathLike[str],
        *,
        head: nn.Module | None = None,
        head_module: str | None = None,
        config: FullConfig | None = None,
        top_fraction: float | None = None,
    ) -> Packing | None:
        """Add the task whose model is a fine-tuned copy of the base, bit for bit.

        Layers with the base's own weights are closed. An open one holds a Delta where that gives the checkpoint's
        weight exactly in every element, and the checkpoint's weight itself where it does not.

        Args:
            name: printable, without '/'.
            state_dict: all tensors of the fine-tuned model under the base's names, in the base's shapes and dtypes
                (wrappers' prefixes `module.` and `_orig_mod.` are dropped). The head may have another number of
                outputs where the base's is an `nn.Linear`. Or a safetensors file, an index or folder of some, of which
                one layer at a time is read.
            head: a module of the checkpoint's head's structure, where it differs otherwise.
            head_module: the head's name, where it is not the model's.
            config: `FullConfig(exclude_modules=[...])` for modules that cannot be gated; they must be the base's.
            top_fraction: X, to keep of each layer's Delta the fraction X of its elements whose magnitude is largest
                alone, by the codec `bitmask` (docs/packed.md); the result then says what that lost of each layer. A
                layer that takes no fewer bytes so stays as it is.

        Raises:
            ConfigError: a tensor that is missing, too many, of another shape or dtype, not finite, or changed where
                the task cannot hold a change, naming it; a fraction outside of (0, 1]; nothing is added.
            UnsupportedModuleError: a layer that cannot be gated, naming it. TaskFileError: no sound safetensors file.
        """
        self._loaded()
        name = self._new_name(name)
        config, scanned = self._converted(config, head_module)
        rule, rows = stream.fraction_rule(top_fraction), list[PackedRow]()
        thin = None if rule is None else stream.thinner(rule, rows)
        with stream.opened(state_dict) as found:
            parts = dict(checkpoint.extract(self.base, found, scanned, head, thin))
        state = TaskState(self.base, config, parts, scanned.head if scanned.head in parts else None, self.gates)
        state.reach = scanned.reach
        self._install(name, state)
        return None if rule is None else Packing(name, rows)

    def _converted(self, config: FullConfig | None, head_module: str | None) -> tuple[FullConfig, Scan]:
        """The config of a converted checkpoint, and what of the base its task is given."""
        config = FullConfig() if config is None else config
        if not isinstance(config, FullConfig):
            raise ConfigError(f"config: expected a FullConfig, got {type(config).__name__}")
        path = self._head if head_module is None else head_path(self.base, head_module)
        return config, self._scan(config, [] if path is None else [path], frozen=False)

    @torch.inference_mode(False)
    def extract_file(
        self,
        name: str,
        state_dict: Mapping[str, Tensor] | str | PathLike[str],
        out: str | PathLike[str],
        *,
        head: nn.Module | None = None,
        head_module: str | None = None,
        config: FullConfig | None = None,
        top_fraction: float | None = None,
        labels: Callable[[int], list[str]] | None = None,
    ) -> stream.Extracted:
        """Write the file of the task that :meth:`extract_task` would add, byte for byte, without adding it: beside the
        base no more than one layer is in memory, in a few copies. What is made waits on the disk beside `out`, which
        takes its bytes twice meanwhile.

        Args:
            labels: gives the names of the classes for their number, which is the `out_features` of the head.

        Raises:
            As :meth:`extract_task`; ConfigError for labels that :meth:`save_task` refuses, or for a head without
            `out_features`; TaskFileError for a bad `out`, before a tensor is read; OSError from the disk. Then there is
            no file, or the one from before.
        """
        self._loaded()
        name = self._new_name(name)
        config, scanned = self._converted(config, head_module)
        self._check_base()
        return stream.extract_file(
            self.base,
            scanned,
            state_dict,
            out,
            name=name,
            config=config,
            head=head,
            top_fraction=top_fraction,
            labels=labels,
        )

    @torch.inference_mode(False)
    def merge_file(
        self, path: str | PathLike[str], out: str | PathLike[str], *, shared: str | PathLike[str] | None = None
    ) -> stream.Merged:
        """Write a task's file as a plain safetensors checkpoint: the tensors of :meth:`task_state_dict`, bit for bit,
        of which beside the base no more than one layer's is in memory. The task is not added.

        Args:
            shared: the file of the family that the task builds on, where it is not beside `path`.

        Raises:
            TaskFileError: as :meth:`load_task`, and a bad `out`, before a tensor is read. ConfigError: a head that is
                no linear layer. TapsError: the base shares a tensor between two modules, and the task has another value
                for each. OSError: from the disk.
        """
        self._loaded()
        self._check_base()
        return stream.merge_file(self.base, self._heads, path, out, shared)

    @torch.inference_mode(False)
    def task_state_dict(self, name: str) -> dict[str, Tensor]:
        """A task as a plain checkpoint: the state of `merge_and_unload(name)`, with this model left as it is.

        For a task made by :meth:`extract_task` these are the checkpoint's tensors, bit for bit.

        Raises:
            TapsError: the base shares a tensor between two modules, and the task has another value for each.
        """
        tensors = {n: t.detach() for n, t in self._plain_copy(name).state_dict().items()}
        merge.check_one_value(self.base, tensors)
        return tensors

    def _plain_copy(self, name: str) -> nn.Module:
        state = self.state(name)
        assert self._flags is not None  # `state` has refused an unloaded model
        check_present(self.base)
        state.open_layers()  # refuses a NaN score
        state.check_registered()
        return merge.plain_copy(self.base, state.stacks(merged=False), state.head_path, self._flags)

    # -- unloading

    def unload(self) -> nn.Module:
        """Give the base back as it was: classes, flags, modes and tensors. All tasks are dropped."""
        if self._flags is None:
            return self.base
        for module in self.base.modules():
            unroute(module)
        self._flags.restore(self.base)
        self._flags = None
        self._known.forget()
        disown(self.base)
        forget(self.base)
        self._states, self._names, self._mirror = nn.ModuleDict(), {}, Mirror()
        self._families = nn.ModuleDict()
        self._active = self._merged = None
        return self.base

    def merge_and_unload(self, name: str) -> nn.Module:
        """A plain copy of the base with one task's weights, norms and head in place; the TaskModel is unloaded.

        The copy is in the TaskModel's mode (training or evaluation); the base gets its own modes back.
        """
        plain = self._plain_copy(name)  # while the tasks still are there: not everything can be copied
        self.unload()
        return plain.train(self.training)
