"""TaskState: everything one task adds to the base, by module name."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.parameter import is_lazy

from . import reference
from .errors import ConfigError, GateError, UnsupportedModuleError
from .methods import MethodConfig, Plan
from .nn import GatedLayer, TaskNorm, TaskTensors, changes
from .nn.forward import base_bias, base_weight
from .nn.frame import Placed, gate_changed, sequence_number, settings
from .nn.own import HOOKS, TaskHead, shared_containers
from .nn.route import is_stock, misplaced, original_class, unroute
from .parts import Part

# Held while the host's gates are taken from scores, so that what was taken and what is remembered of it are one.
_taking = threading.RLock()


def module_key(name: str) -> str:
    """A dotted module or task name as a key that nn.ModuleDict accepts and has no attribute of."""
    return "/" + name.replace(".", "/")


def _plain(head: nn.Module) -> nn.Module:
    """Undo the routing that a copy of a base module brings along."""
    for module in head.modules():
        unroute(module)
    return head


def own_head(taken: nn.Module, head: nn.Module) -> nn.Module:
    """Check that a head brought by the user is a module of its own, and make it plain.

    Args:
        taken: whose tensors it must not share: the base, or the model with all its tasks.

    Raises:
        ConfigError: not a module, one that shares tensors, or state that no task file holds.
    """
    if not isinstance(head, nn.Module):
        raise ConfigError(f"head: expected an nn.Module, got {type(head).__name__}")
    shared = {id(t) for held in (taken.parameters(), taken.buffers()) for t in held}
    if any(id(t) in shared for held in (head.parameters(), head.buffers()) for t in held):
        raise ConfigError("head: expected a module of its own, got one that shares tensors with the base or a task")
    for name, module in head.named_modules():
        if any(is_lazy(tensor) for held in (module._parameters, module._buffers) for tensor in held.values()):
            raise ConfigError(
                f"head: {name or type(head).__name__}: expected initialised parameters; run it once first"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ConfigError(f"head: {name or type(head).__name__}: has extra state, which no task file holds")
    return _plain(head)


def _copied(old: nn.Module, path: str) -> nn.Module:
    """A copy of the base's head without its hooks: they run where it is called, whoever's head answers."""
    try:
        head = _plain(copy.deepcopy(old)).requires_grad_(True)
    except RuntimeError as error:
        raise ConfigError(f"head: {path} cannot be copied ({error}); give num_classes or a head") from None
    for key in HOOKS:
        head.__dict__[key] = type(head.__dict__[key])()
    return head


def make_head(
    base: nn.Module, path: str | None, num_classes: int | None, head: nn.Module | None, taken: nn.Module
) -> nn.Module | None:
    """The head of a new task: `head`, a fresh `nn.Linear` to `num_classes`, or a copy of the base's own.

    `taken`: as for :func:`own_head`.
    """
    if head is not None and num_classes is not None:
        raise ConfigError("add_task: expected num_classes or head, got both")
    if num_classes is not None and (
        isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1
    ):
        raise ConfigError(f"num_classes: expected an int >= 1, got {num_classes!r}")
    if path is None:
        if head is None and num_classes is None:
            return None
        raise ConfigError("head_module: no linear classifier was found in the base; name the module to replace")
    old = base.get_submodule(path)
    if head is not None:
        own = own_head(taken, head)
        if isinstance(old, nn.Linear) and isinstance(own, nn.Linear) and own.in_features != old.in_features:
            raise ConfigError(f"head: expected {old.in_features} inputs as the base's has, got {own.in_features}")
        return own
    if num_classes is None:
        return _copied(old, path)
    if not isinstance(old, nn.Linear):
        raise ConfigError(f"head: expected a module, since {path!r} is a {original_class(old).__name__}, not a Linear")
    return nn.Linear(old.in_features, num_classes, old.bias is not None, old.weight.device, old.weight.dtype)


def _values_of(layers: list[tuple[str, GatedLayer]]) -> list[float]:
    return [part.score.item() for _, part in layers]  # type: ignore[union-attr]


class Bindings(NamedTuple):
    """What forwards use of a task until something changes.

    Attributes:
        at: `changes.now` when they were made.
        bound: the parts' bindings by module name.
        settings: the gates by layer, or None where the host does not know them all.
        resting: the parameters of learned layers that are closed.
    """

    at: object = None
    bound: Mapping[str, Placed] = {}
    settings: Mapping[str, Any] | None = None
    resting: Sequence[dict[str, Any]] = ()


class TaskState(nn.Module):
    """One task's parts. `table` maps base module names to parts and is what a forward looks up.

    Args:
        base: the (routed) base model; read, never changed.
        plan: which layers get gates and which modules their own tensors.
        head_path, head: the replaced module's name and the task's own head, or None.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MethodConfig,
        plan: Plan,
        head_path: str | None,
        head: nn.Module | None,
        gates: str,
    ) -> None:
        super().__init__()
        self.config = config
        self.gates_mode = gates
        self.head_path = head_path if head is not None else None
        self.parts = nn.ModuleDict()
        self.table: dict[str, Part] = {}
        self.closed: set[str] = set()  # layers that closed since the last forward in training
        self.warned = False
        self.told = False  # the gates are as they were set, whatever the scores say
        self.watched = False
        self.seen: dict[bool, frozenset[str]] = {}  # by mode: what a forward entered that was checked
        self.required: list[str] = []  # no effect unless a forward enters them: all but those of buffers alone
        self.entered: set[str] = set()  # in training
        self.training_only: set[str] = set()  # entered in training, and not in evaluation
        self.hosts: list[tuple[str, nn.Module, str, nn.Module]] = []  # name, parent, its key, module
        self.noted: Mapping[str, Any] | None = None
        self.changes: dict[int, tuple[int, int]] = {}  # thread: number of its last change, and of its last forward
        self._start_anew()
        for name, spec in plan.gates.items():
            host = base.get_submodule(name)
            weight = base_weight(host)
            part = GatedLayer(
                weight.shape if spec.delta and spec.held else None,
                learn=spec.learn,
                open=spec.open,
                score_init=spec.score_init,
                threshold=spec.threshold,
                bias=base_bias(host) if spec.bias else None,
                weight=weight if spec.weight else None,
                device=weight.device,
            )
            part.size = weight.numel()
            if spec.delta and not spec.held:
                part.owe(weight.numel())
            if part.delta is not None:
                part.delta.data = torch.zeros_like(weight, dtype=torch.float32)  # the weight's strides
                part.delta.requires_grad_(spec.learn or spec.open)
            if spec.learn and gates == "device":
                part.gate = None
            self._add(name, part)
        shared = shared_containers(base)
        for names, kind in ((plan.norms, TaskNorm), (plan.others, TaskTensors)):
            for name in names:
                host = base.get_submodule(name)
                if isinstance(host, torch.fx.GraphModule):
                    raise UnsupportedModuleError(
                        f"{name or 'the base'}: a traced module that holds {[*host._parameters, *host._buffers]}; "
                        "adapt the model that it was traced from"
                    )
                if any(p is not None and p.is_complex() for p in host._parameters.values()):
                    raise UnsupportedModuleError(
                        f"{name}: holds complex parameters, which no task trains; to leave them frozen, name it in "
                        "exclude_modules"
                    )
                self._add(name, kind(host, original_class(host), shared))
        if head is not None and head_path is not None:
            self._add(head_path, TaskHead(head))

    def _add(self, name: str, part: Part) -> None:
        key = module_key(name)
        if key in self.parts:
            raise UnsupportedModuleError(f"{name}: has the name of another module but for '/' and '.'; rename one")
        self.parts[key] = part
        self.table[name] = part
        if type(part) is not TaskTensors or any(True for _ in part.parameters()):
            self.required.append(name)

    def _start_anew(self) -> None:
        self.bindings = Bindings()
        self._followed: tuple[object, list[tuple[str, GatedLayer]], bool] = (None, [], False)
        self._values: list[float] | None = None

    @torch.compiler.disable
    def catch_up(self) -> Bindings:
        """Take over what was set on base modules, gates and modes since the last forward, in bindings made anew.

        They are swapped whole, so that a forward that runs in another thread keeps its own.
        """
        now, last = changes.now, self.bindings
        if last.at is now:
            return last
        for part in self.table.values():
            part.follow()
        made = [(name, host, self.table[name].bind(host, stock=is_stock(host))) for name, _, _, host in self.hosts]
        found: Mapping[str, Any] | None = settings(self.table)
        if any(part.gate is None for _, part in self.gated()):
            found = None
        self.bindings = bindings = Bindings(
            now,
            {name: (bound, id(host)) for name, host, bound in made if bound is not None},
            last.settings if found == last.settings else found,
            [part._parameters for _, part in self.learned() if part.gate is False],
        )
        return bindings

    # -- what there is

    def gated(self) -> Iterator[tuple[str, GatedLayer]]:
        """(layer name, part) in module order."""
        for name, part in self.table.items():
            if part.gated:
                yield name, cast(GatedLayer, part)

    def _build(self) -> tuple[Any, ...]:
        """What decides whether two states differ in their values alone."""
        gates = [(name, p.learn, p.threshold, None if p.learn else p.gate) for name, p in self.gated()]
        tensors = [(name, t.shape, t.dtype) for name, t in self.state_dict(keep_vars=True).items()]
        return self.config, self.head_path, list(self.table), gates, tensors

    def take_over(self, other: TaskState) -> bool:
        """Copy another state's values in place; False, and nothing done, if it is built differently."""
        if self._build() != other._build():
            return False
        self.load_state_dict(other.state_dict())
        for parameter in self.parameters():
            parameter.grad = None  # of the values that are gone
        for part in self.table.values():
            part.drop_caches()
        self.refresh(force=True)
        return True

    def learned(self) -> list[tuple[str, GatedLayer]]:
        return [(name, part) for name, part in self.gated() if part.learn]

    def remember_hosts(self, base: nn.Module) -> None:
        """The modules that the parts stand in for, once they are routed."""
        for name in self.table:
            parent, _, key = name.rpartition(".")
            if name:
                self.hosts.append((name, base.get_submodule(parent), key, base.get_submodule(name)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, layers: Collection[str] | None = None) -> tuple[int, int]:
        """Make the zero Deltas that loaded layers do without while they are closed: (how many, their bytes).

        `layers`: those alone.
        """
        parts = dict(self.gated())
        grown = [
            parts[name].grow(base_weight(host).detach())
            for name, _, _, host in self.hosts
            if name in parts and (layers is None or name in layers)
        ]
        return sum(nbytes > 0 for nbytes in grown), sum(grown)

    @torch.compiler.disable
    def check_hosts(self) -> None:
        """Raise if a module that has a part is not in its place any more: the task would be left out there.

        Raises:
            TapsError: naming it.
        """
        for name, parent, key, module in self.hosts:
            found = parent._modules.get(key)
            if found is not module and (found is None or all(inner is not module for inner in found.modules())):
                raise misplaced(name)

    def get_extra_state(self) -> Tensor:
        """The fixed gates, which no other tensor holds: by layer 0 (closed), 1 (open) or -1 (learned)."""
        return torch.tensor([-1 if part.learn else int(bool(part.gate)) for _, part in self.gated()], dtype=torch.int8)

    def set_extra_state(self, state: Tensor) -> None:
        """Fix the gates as they were.

        Raises:
            ConfigError: of another number of layers, or one with a learned gate on one side alone.
        """
        layers = list(self.gated())
        if not isinstance(state, Tensor) or state.shape != (len(layers),):
            raise ConfigError(f"state_dict: expected the gates of {len(layers)} layers, got {state!r}")
        for (name, part), gate in zip(layers, state.tolist(), strict=True):
            if (gate < 0) != part.learn:
                kinds = ("a learned", "a fixed") if part.learn else ("a fixed", "a learned")
                raise ConfigError(f"state_dict: {name}: expected {kinds[0]} gate, got {kinds[1]} one")
            if not part.learn:
                if gate and part.change is None:
                    raise ConfigError(
                        f"state_dict: {name}: expected a closed gate, there being no Delta; got an open one"
                    )
                if bool(gate) != bool(part.gate):
                    part.fix(bool(gate))

    def _load_from_state_dict(self, *args: Any) -> None:
        """Other values are on their way, with `assign` maybe on another device: closed Deltas are checked again."""
        self.closed = {name for name, part in self.learned() if part.gate is False}
        changes.note()
        state_dict, prefix = args[:2]
        self.grow([name for name in self.table if f"{prefix}parts.{module_key(name)}.delta" in state_dict])
        super()._load_from_state_dict(*args)

    @property
    def head(self) -> nn.Module | None:
        part = None if self.head_path is None else self.table[self.head_path]
        return None if part is None else part.replacement

    # -- gates

    def _following(self) -> tuple[list[tuple[str, GatedLayer]], bool]:
        """The learned gates, and whether all of their scores are on a CPU, where to read them costs little."""
        now, layers, on_cpu = self._followed
        if now is not changes.now:
            now, layers = changes.now, self.learned()
            on_cpu = all(part.score is not None and part.score.device.type == "cpu" for _, part in layers)
            self._followed = now, layers, on_cpu
        return layers, on_cpu

    @torch.compiler.disable
    def refresh(self, *, force: bool = False) -> None:
        """Bring the host's gates up to date with the scores: on a CPU by their values, however they were written, on a
        GPU by one copy where a score's tensor or version changed (all of them with `force`).

        Raises:
            GateError: a score is NaN, naming the layer.
        """
        layers, on_cpu = self._following()
        if not layers or self.told:
            return
        try:
            if on_cpu and not force and _values_of(layers) == self._values:  # never so with a NaN
                return
        except DataDependentOutputException:  # fake tensors are about, of which no value can be read
            on_cpu = False
        with _taking:
            if on_cpu:
                values = _values_of(layers)
            else:
                layers = [(name, part) for name, part in layers if force or part.stale()]
                if not layers:
                    return
                values = torch.stack([part.score.detach() for _, part in layers]).tolist()  # type: ignore[union-attr]
            self._values = None  # a NaN leaves some gates taken and others not: of no values that were read
            self._take(layers, values)
            self._values = values

    def _take(self, layers: list[tuple[str, GatedLayer]], values: list[float]) -> None:
        for (name, part), value in zip(layers, values, strict=True):
            before = part.gate
            part.take(value, name)
            if part.gate and part.owed:
                self.grow([name])
            if self.gates_mode == "device":
                part.gate = None
            elif before is not part.gate:
                (self.closed.discard if part.gate else self.closed.add)(name)

    @torch.compiler.disable
    def note_gates(self, node: int | None) -> None:
        """Remember when the gates were first seen as they are; they may not have changed since `node` was made.

        For activation checkpointing of a whole forward, which ran without gradients and so left no call behind.

        Raises:
            GateError: a gate changed between that forward and its recomputation.
        """
        known = self.catch_up().settings
        now = settings(self.table) if known is None else known
        thread, here, noted = threading.get_ident(), sequence_number(), self.noted
        changed = [] if noted is None or noted is now else [name for name in now if now[name] != noted.get(name)]
        since, last = self.changes.get(thread, (0, -1))
        if node is not None:
            others = [number for number, _ in self.changes.values()]
            began = since if thread in self.changes else max(others, default=0)
            if changed or began > node + 1:
                raise gate_changed(next(iter(changed), "a layer"))
        if changed:  # a forward noted under this number already ran before the change
            since = here + (last == here)
        self.noted, self.changes[thread] = now, (since, here)

    def take_as_told(self, other: TaskState) -> None:
        """Have another state's gates from now on, as if every score and closed Delta had been read and found good: for
        a copy whose tensors hold no values."""
        self.watched = self.told = True
        self.closed = set()
        for (_, part), (_, known) in zip(self.gated(), other.gated(), strict=True):
            part.gate = known.gate

    def open_layers(self) -> list[str]:
        """Names of the layers whose gate is open now (one copy from the device)."""
        learned = self.learned()
        scores = torch.stack([p.score.detach() for _, p in learned]).tolist() if learned else []  # type: ignore[union-attr]
        state, unseen = {name: part.gate is True for name, part in self.gated()}, False
        for (name, part), value in zip(learned, scores, strict=True):
            if value != value:
                raise GateError(f"{name}: score: expected a number, got NaN")
            state[name] = value >= part.threshold
            unseen = unseen or (self.gates_mode == "host" and part.gate is not None and part.gate is not state[name])
        if unseen and not self.told:
            self._follow_late(learned, scores)
        return [name for name, is_open in state.items() if is_open]

    def _follow_late(self, learned: list[tuple[str, GatedLayer]], scores: list[float]) -> None:
        """What is told is what runs: take gates that no forward has seen, and say once where only values showed it."""
        unseen = [
            name
            for (name, part), value in zip(learned, scores, strict=True)
            if part.gate is not (value >= part.threshold) and not part.stale()
        ]
        if unseen and not self._following()[1] and not self.warned:
            self.warned = True
            warnings.warn(
                f"{unseen[0]}: its score was written in a way that leaves no trace (.data, graph replay), so that "
                "forwards since then ran the gate from before; call refresh_gates() after such writes",
                stacklevel=5,
            )
        with _taking:
            self._values = None
            self._take(learned, scores)

    @torch.compiler.disable
    def look_again(self) -> None:
        """Compare the host's gates with the scores' values where forwards go by versions alone: on a GPU."""
        layers, on_cpu = self._following()
        without_values = any(part.score is not None and part.score.is_meta for _, part in layers)
        if self.gates_mode == "host" and not on_cpu and not without_values:
            with contextlib.suppress(GateError):  # the next forward's affair
                self.open_layers()

    @torch.compiler.disable
    def lay_to_rest(self) -> None:
        """What closed since the last forward in training gives up its gradient, which no optimizer may act on.

        Raises:
            GateError: Inf or NaN in a Delta that closed, which would poison its score; of one that is written to later
                backward says so.
        """
        closed = [(name, part.delta) for name, part in self.learned() if name in self.closed and part.gate is False]
        deltas = [(name, delta) for name, delta in closed if delta is not None and delta.numel()]
        for _, delta in deltas:
            delta.grad = None
        if deltas:
            bounds = torch.stack([torch.stack(torch.aminmax(delta.detach())) for _, delta in deltas])
            for (name, _), good in zip(deltas, torch.isfinite(bounds).all(dim=1).tolist(), strict=True):
                if not good:
                    raise GateError(
                        f"{name}: delta: expected finite values in a closed layer during training, got Inf or NaN"
                    )
        self.closed = set()

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {
            "noted": None,
            "changes": {},
            "bindings": Bindings(),
            "_values": None,
        }
        return {**self.__dict__, **fresh, "_followed": (None, [], False)}  # a copy binds its own modules

    def penalty_weights(self) -> list[float]:
        """w_i of the learned gates: 1, or in proportion to the layer's parameters with mean 1."""
        learned = self.learned()
        if getattr(self.config, "penalty", "layer") == "layer":
            return [1.0] * len(learned)
        sizes = [part.size for _, part in learned]
        mean = sum(sizes) / max(1, len(sizes))
        return [size / mean for size in sizes]

    def sparsity_loss(self) -> Tensor | None:
        """lam / L * sum w_i |s_i| over the learned gates, or None if there are none."""
        lam = getattr(self.config, "lam", None)
        scores: list[Tensor] = [part.score for _, part in self.learned() if part.score is not None]
        if lam is None or not scores:
            return None
        stacked = torch.stack(scores)
        weights = stacked.new_tensor(self.penalty_weights())
        return reference.sparsity_loss(stacked, weights, float(lam))

    def drop_closed_gradients(self) -> None:
        """Set the gradients of closed Deltas to None, so that no optimizer moves them or their state."""
        self.refresh()
        open_now = set(self.open_layers()) if self.gates_mode == "device" else None
        for name, part in self.gated():
            closed = part.gate is False if open_now is None else name not in open_now
            if closed and part.change is not None:
                part.change.grad = None
