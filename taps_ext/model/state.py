"""What a TaskModel holds of a task or of a family: its parts by module name, and what forwards make of them."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from .. import store
from ..base.guard import Held
from ..base.scan import Reach, in_order
from ..errors import ConfigError, GateError, TapsError, UnsupportedModuleError
from ..methods import MethodConfig
from ..parts import Gate, Part, token
from ..parts.bind import Made
from ..parts.host import GATED_TYPES, base_bias, base_weight, host_of, owner_of, reclassed
from ..parts.own import shared_containers
from ..routing.frame import Placed, gate_changed, sequence_number, settings
from ..routing.ready import misplaced, re_registered
from ..routing.route import is_stock

# Held while the host's gates are taken from scores, so that what was taken and what is remembered of it are one.
_taking = threading.RLock()


def module_key(name: str) -> str:
    """A dotted module or task name as a key that nn.ModuleDict accepts and has no attribute of."""
    return "/" + name.replace(".", "/")


class Parts(nn.Module):
    """Parts over a base, by the names of its modules.

    Args:
        base: the base model; read, never changed.
        parts: in any order; they are held gated ones first, then norms, then others, then modules that stand in.
    """

    def __init__(self, base: nn.Module, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.reach = Reach()
        self.parts = nn.ModuleDict()
        self.table: dict[str, Part] = {}
        self.hosts: list[tuple[str, nn.Module, str, nn.Module]] = []  # name, the module's parent, its key there, host
        self.held_by: dict[str, frozenset[str]] = {}  # the parameters that each module had
        shared = shared_containers(base)
        for name, part in in_order(base, parts).items():
            key = module_key(name)
            if reclassed(owner_of(host_of(base, name))):
                raise re_registered(name, "it was parametrised")
            if key in self.parts:
                raise UnsupportedModuleError(f"{name}: has the name of another module but for '/' and '.'; rename one")
            part.settle(shared)
            if part.gate is not None and "bias" in part.roles() and base_bias(host_of(base, name)) is None:
                raise UnsupportedModuleError(f"{name}: expected no bias of its own, the base having none in its place")
            if part.gate is not None:
                part.gate.size = base_weight(host_of(base, name)).numel()
            self.parts[key] = self.table[name] = part
        resting, held = self._resting(), self.named_parameters()
        # By the method's wish, whatever is asked of the whole.
        self.untrained = {name for name, p in held if not p.requires_grad and id(p) not in resting}

    def _resting(self) -> set[int]:
        """The parameters, by `id`, that nothing trains as their gates are: packed ones, and those behind gates that are
        fixed and closed."""
        shut = [p for p in self.table.values() if p.packed or (p.gate and not p.gate.learn and p.gate.known is False)]
        return {id(parameter) for part in shut for parameter in part.changes()}

    def requires_grad_(self, requires_grad: bool = True) -> Parts:
        """Train all of this, or nothing. What is packed, closed for good, or left untrained by its method, stays so."""
        resting = self._resting()
        for name, parameter in self.named_parameters():
            able = parameter.is_floating_point() and id(parameter) not in resting and name not in self.untrained
            parameter.requires_grad_(requires_grad and able)
        return self

    def remember_hosts(self, base: nn.Module) -> None:
        """The modules that the parts stand on, once they are routed."""
        self.hosts = []
        for name in self.table:
            host = host_of(base, name)
            module = name if owner_of(host) is host else name.rpartition(".")[0]
            parent, _, key = module.rpartition(".")
            if module or owner_of(host) is not host:
                self.hosts.append((name, base.get_submodule(parent) if module else base, key, host))
        kept = [name for name, part in self.table.items() if part.replacement is None]
        self.held_by = {name: frozenset(owner_of(host_of(base, name))._parameters) for name in kept}

    def check_registered(self) -> None:
        """Raise if a module that has a part does not hold its parameters itself any more: tasks know no other base.

        Raises:
            TapsError: naming it.
        """
        for name, _, _, host in self.hosts:
            if gone := sorted(self.held_by.get(name, frozenset()).difference(host._parameters)):
                raise re_registered(name, f"its {gone[0]} stopped being a parameter")

    def gated(self) -> Iterator[tuple[str, Part, Gate]]:
        """(module name, part, its gate) in module order."""
        for name, part in self.table.items():
            if part.gate is not None:
                yield name, part, part.gate

    def learned(self) -> list[tuple[str, Part, Gate]]:
        """Those whose gate is learned."""
        return [found for found in self.gated() if found[2].learn]

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, layers: Collection[str] | None = None) -> tuple[int, int]:
        """Make what loaded layers do without while they are closed (zero Deltas): (how many, their bytes).

        `layers`: those alone.
        """
        grown = [
            self.table[name].grow(base_weight(host).detach())
            for name, _, _, host in self.hosts
            if self.table[name].gate is not None and (layers is None or name in layers)
        ]
        return sum(nbytes > 0 for nbytes in grown), sum(grown)

    def exchange(self, parts: Mapping[str, Part]) -> None:
        """Put gated parts in the place of others over the same modules, whose gates they have."""
        for name, part in parts.items():
            self.parts[module_key(name)] = self.table[name] = part
            part.train(self.training)
        token.note()

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names that they have here, where 0.1 gave them others."""
        found = dict(tensors)
        for name, part in self.table.items():
            prefix = f"parts.{module_key(name)}."
            for old, new in part.former.items():
                if prefix + old in found:
                    found[prefix + new] = found.pop(prefix + old)
        return found

    @torch.compiler.disable
    def check_hosts(self) -> None:
        """Raise if a module that has a part is not in its place any more: the task would be left out there.

        Raises:
            TapsError: naming it.
        """
        for name, parent, key, host in self.hosts:
            module = owner_of(host)
            found = parent._modules.get(key) if key else parent
            if found is not module and (found is None or all(inner is not module for inner in found.modules())):
                raise misplaced(name)

    def get_extra_state(self) -> Tensor:
        """The fixed gates, which no other tensor holds: by layer 0 (closed), 1 (open) or -1 (learned)."""
        return torch.tensor([-1 if g.learn else int(bool(g.known)) for _, _, g in self.gated()], dtype=torch.int8)

    def set_extra_state(self, state: Tensor) -> None:
        """Fix the gates as they were.

        Raises:
            ConfigError: of another number of layers, or one with a learned gate on one side alone.
        """
        layers = list(self.gated())
        if not isinstance(state, Tensor) or state.shape != (len(layers),):
            raise ConfigError(f"state_dict: expected the gates of {len(layers)} layers, got {state!r}")
        for (name, part, gate), value in zip(layers, state.tolist(), strict=True):
            if (value < 0) != gate.learn:
                kinds = ("a learned", "a fixed") if gate.learn else ("a fixed", "a learned")
                raise ConfigError(f"state_dict: {name}: expected {kinds[0]} gate, got {kinds[1]} one")
            if not gate.learn:
                if value and not part.changes():
                    raise ConfigError(
                        f"state_dict: {name}: expected a closed gate, there being no Delta; got an open one"
                    )
                if bool(value) != bool(gate.known):
                    part.fix(bool(value))

    def trains(self) -> list[str]:
        """The modules that have something of their own to train."""
        return [name for name, part in self.table.items() if any(True for _ in part.parameters())]


def check_stands(name: str, part: Part, lower: Part, family: str) -> None:
    """Raise UnsupportedModuleError where a part of a module's cannot stand on that of the family."""
    if not part.rides and (part.gate is None or not lower.bears):
        raise UnsupportedModuleError(
            f"{name}: a part of the kind {part.kind!r} cannot stand on the {lower.kind!r} of the family {family!r}, "
            "which it would leave out"
        )


class Family(Parts):
    """The parts that the tasks of one family have together, below their own.

    Attributes:
        digest: of the file that holds them, "" as long as none does.
    """

    def __init__(self, base: nn.Module, name: str, config: MethodConfig, parts: Mapping[str, Part]) -> None:
        super().__init__(base, parts)
        self.name, self.config, self.digest, self._held = name, config, "", ""
        self._unwritten: Held | None = None  # its tensors when their content was last found to be the file's
        for layer, _, gate in self.gated():
            if gate.learn:
                raise ConfigError(f"shared: {layer}: expected a fixed gate in a shared part, got a learned one")

    def _content(self) -> str:
        return store.fingerprint(self.state_dict())

    def freeze(self, digest: str) -> None:
        """A file holds it: nothing trains it any more."""
        self.digest, self._held = digest, self._content()
        self.requires_grad_(False)
        self.train(False)  # nor do batches move the statistics of its norms
        self._unwritten = Held(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unwritten": None}  # a copy's tensors are others

    def train(self, mode: bool = True) -> Family:
        super().train(mode and not self.digest)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Family:
        super().requires_grad_(requires_grad and not self.digest)
        return self

    def take_over(self, other: Family) -> None:
        """Take another family's values and digest.

        Raises:
            ConfigError: it is built differently.
        """
        same = self.table.keys() == other.table.keys()
        if not same or any(part.differs(other.table[name]) for name, part in self.table.items()):
            raise ConfigError(f"family: {other.name!r} in the file is built differently than the one at hand")
        self.load_state_dict(other.state_dict())
        for part in self.table.values():
            part.drop_caches()
        self.freeze(other.digest)

    def parent(self) -> str:
        """The digest of its file, for the files of its tasks.

        Raises:
            TapsError: it is in no file, or has been written to since.
        """
        if not self.digest:
            raise TapsError(
                f"save_task: the task builds on the family {self.name!r}, which is in no file yet; call "
                f"save_shared({self.name!r}, path) first"
            )
        self.check_kept("save_task")
        return self.digest

    def check_kept(self, action: str, *, by_versions: bool = False) -> None:
        """Raise TapsError if it is not what its file holds any more. `by_versions`: tensors to which torch has seen no
        write are taken to be the same."""
        if by_versions and self._unwritten is not None and self._unwritten.changed(self) is None:
            return
        if self._content() != self._held:
            raise TapsError(
                f"{action}: the family {self.name!r} has changed, or was cast, since it was saved; call "
                f"save_shared({self.name!r}, path) again, and save all of its tasks after that"
            )


def _values_of(layers: list[tuple[str, Part, Gate]]) -> list[float]:
    return [gate.score.item() for _, _, gate in layers]  # type: ignore[union-attr]


def _scores_of(layers: list[tuple[str, Part, Gate]]) -> list[float]:
    """The same by one copy from the device."""
    if not layers:
        return []
    found: list[float] = torch.stack([gate.score.detach() for _, _, gate in layers]).tolist()  # type: ignore[union-attr]
    return found


class Bindings(NamedTuple):
    """What forwards use of a task until something changes.

    Attributes:
        at: `token.now` when they were made.
        stacks: the parts over each module: shared, the task's own.
        bound: the bindings of stacks of one part, by module name.
        settings: the gates by layer, or None where the host does not know them all.
        resting: what the gates of learned layers that are closed let in.
        gathering: layers whose W_t may be made together, by module name: with their modules, and their products with
            a W_t that is there.
    """

    at: object = None
    stacks: Mapping[str, tuple[Part, ...]] = {}
    bound: Mapping[str, Placed] = {}
    settings: Mapping[str, Any] | None = None
    resting: Sequence[Mapping[str, nn.Parameter | None]] = ()
    gathering: Mapping[str, tuple[Part, nn.Module, Made | None]] = {}


class TaskState(Parts):
    """One task: its parts, its gates as the host knows them, and its bindings.

    Args:
        parts: the task's own, the head's among them.
        head_path: the name of the module that the task's head replaces, or None.
        gates: "host" or "device", as :class:`TaskModel`.
        family: the parts below, or None.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MethodConfig,
        parts: Mapping[str, Part],
        head_path: str | None,
        gates: str,
        family: Family | None = None,
    ) -> None:
        super().__init__(base, parts)
        self.config = config
        self.gates_mode = gates
        self.head_path = head_path
        self.__dict__["family"] = family  # the model's, not this state's
        for name, part in self.table.items():
            if family is not None and (lower := self.shared.get(name)) is not None:
                check_stands(name, part, lower, family.name)
        self.installed: dict[str, Part] = {}  # while it is merged: what stands in the place of stacks
        self.installed_open: set[str] = set()  # the layers that were open then
        self.closed: set[str] = set()  # layers that closed since the last forward in training
        self.warned = False
        self.told = False  # the gates are as they were set, whatever the scores say
        self.watched = False
        self.seen: dict[bool, frozenset[str]] = {}  # by mode: what a forward entered that was checked
        self.entered: set[str] = set()  # in training
        self.training_only: set[str] = set()  # entered in training, and not in evaluation
        self.noted: Mapping[str, Any] | None = None
        self.changes: dict[int, tuple[int, int]] = {}  # thread: number of its last change, and of its last forward
        self._start_anew()
        if gates == "device":
            for _, _, gate in self.learned():
                gate.known = None

    @property
    def family(self) -> Family | None:
        family: Family | None = self.__dict__["family"]
        return family

    @property
    def shared(self) -> Mapping[str, Part]:
        """The family's parts by module name."""
        return {} if self.family is None else self.family.table

    @property
    def modules_used(self) -> set[str]:
        """The modules that the task or its family has parts over."""
        return {*self.shared, *self.table}

    def required(self) -> list[str]:
        """Modules whose parts have no effect unless a forward enters them: all but those of buffers alone."""
        shared = [] if self.family is None else self.family.trains()
        own = [name for name, part in self.table.items() if part.needs_forward()]
        return list(dict.fromkeys([*shared, *own]))

    def check_registered(self) -> None:
        super().check_registered()
        if self.family is not None:
            self.family.check_registered()

    def _start_anew(self) -> None:
        self.bindings = Bindings()
        self._followed: tuple[object, list[tuple[str, Part, Gate]], bool] = (None, [], False)
        self._values: list[float] | None = None

    @torch.compiler.disable
    def catch_up(self) -> Bindings:
        """Take over what was set on base modules, gates and modes since the last forward, in bindings made anew.

        They are swapped whole, so that a forward that runs in another thread keeps its own.
        """
        now, last = token.now, self.bindings
        if last.at is now:
            return last
        self.check_registered()
        stacks = self.stacks()
        for stack in stacks.values():
            for part in stack:
                part.follow()
        hosts = {name: host for name, _, _, host in (*self.hosts, *(self.family.hosts if self.family else ()))}
        made: dict[str, Placed] = {}
        gathering: dict[str, tuple[Part, nn.Module, Made | None]] = {}
        for name, stack in stacks.items():
            host = hosts.get(name)
            if host is not None and len(stack) == 1:
                if stack[0].gate is not None and isinstance(host, GATED_TYPES):
                    gathering[name] = stack[0], host, stack[0].bind_made(host) if is_stock(host) else None
                bound = stack[0].bind(host, stock=is_stock(host))
                if bound is not None:
                    made[name] = bound, id(host)
        found: Mapping[str, Any] | None = settings(stacks)
        if any(gate.known is None for _, _, gate in self.gated()):
            found = None
        self.bindings = bindings = Bindings(
            now,
            stacks,
            made,
            last.settings if found == last.settings else found,
            [part.held() for _, part, gate in self.learned() if gate.known is False],
            gathering,
        )
        return bindings

    def stacks(self, *, merged: bool = True) -> dict[str, tuple[Part, ...]]:
        """The parts over each module, the lowest first: the family's, then the task's own; with `merged`, what is
        installed in their place."""
        shared = self.shared
        found = {
            name: tuple(part for part in (shared.get(name), self.table.get(name)) if part is not None)
            for name in dict.fromkeys([*shared, *self.table])
        }
        return {**found, **{name: (part,) for name, part in self.installed.items() if merged}}

    def install(self, installed: Mapping[str, Part]) -> None:
        """Run these parts in the place of stacks, or with {} the stacks again."""
        self.installed = dict(installed)
        self.installed_open = {name for name, _, gate in self.gated() if gate.open} if installed else set()
        self.bindings = Bindings()  # which holds what stood there before
        token.note()

    # -- what there is

    def _build(self) -> tuple[Any, ...]:
        """What decides whether two states differ in their values alone."""
        gates = [(name, g.learn, g.threshold, None if g.learn else g.known) for name, _, g in self.gated()]
        tensors = [(name, t.shape, t.dtype) for name, t in self.state_dict(keep_vars=True).items()]
        packed = [(name, part.change_kind, part.packed) for name, part in self.table.items() if part.packed]
        return self.config, self.head_path, list(self.table), gates, tensors, packed

    def take_over(self, other: TaskState) -> bool:
        """Copy another state's values in place; False, and nothing done, if it is built differently."""
        if self._build() != other._build() or self.family is not other.family:
            return False
        self.load_state_dict(other.state_dict())
        for parameter in self.parameters():
            parameter.grad = None  # of the values that are gone
        for part in self.table.values():
            part.drop_caches()
        self.refresh(force=True)
        return True

    def _load_from_state_dict(self, *args: Any) -> None:
        """Other values are on their way, with `assign` maybe on another device: closed Deltas are checked again."""
        self.closed = {name for name, _, gate in self.learned() if gate.known is False}
        token.note()
        state_dict, prefix = args[:2]
        for name, part, _ in self.gated():
            begin = f"{prefix}parts.{module_key(name)}."
            if any(key.startswith(begin) and part.awaits(key.removeprefix(begin)) for key in state_dict):
                self.grow([name])
        super()._load_from_state_dict(*args)

    @property
    def head(self) -> nn.Module | None:
        part = None if self.head_path is None else self.table.get(self.head_path)
        return None if part is None else part.replacement

    # -- gates

    def _following(self) -> tuple[list[tuple[str, Part, Gate]], bool]:
        """The learned gates, and whether all of their scores are on a CPU, where to read them costs little."""
        now, layers, on_cpu = self._followed
        if now is not token.now:
            now, layers = token.now, self.learned()
            on_cpu = all(gate.score is not None and gate.score.device.type == "cpu" for _, _, gate in layers)
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
                layers = [found for found in layers if force or found[2].stale()]
                if not layers:
                    return
                values = _scores_of(layers)
            self._values = None  # a NaN leaves some gates taken and others not: of no values that were read
            self._take(layers, values)
            self._values = values

    def _check_installed(self, layers: list[tuple[str, Part, Gate]], values: list[float]) -> None:
        """Raise GateError if a merged task runs another gate than its score says."""
        for (name, _, gate), value in zip(layers, values, strict=True):
            if value == value and (value >= gate.threshold) is not (name in self.installed_open):
                raise GateError(
                    f"{name}: its score was written while its task is merged, which runs the gate from before; call "
                    "unmerge_task() first"
                )

    def _take(self, layers: list[tuple[str, Part, Gate]], values: list[float]) -> None:
        if self.installed:
            self._check_installed(layers, values)
        for (name, _, gate), value in zip(layers, values, strict=True):
            before = gate.known
            gate.take(value, name)
            if gate.known:
                self.grow([name])
            if self.gates_mode == "device":
                gate.known = None
            elif before is not gate.known:
                (self.closed.discard if gate.known else self.closed.add)(name)

    @torch.compiler.disable
    def note_gates(self, node: int | None) -> None:
        """Remember when the gates were first seen as they are; they may not have changed since `node` was made.

        For activation checkpointing of a whole forward, which ran without gradients and so left no call behind.

        Raises:
            GateError: a gate changed between that forward and its recomputation.
        """
        bindings = self.catch_up()
        now = settings(bindings.stacks) if bindings.settings is None else bindings.settings
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
        for (_, _, gate), (_, _, known) in zip(self.gated(), other.gated(), strict=True):
            gate.known = known.known

    def open_layers(self) -> list[str]:
        """Names of the layers whose gate is open now (one copy from the device)."""
        learned = self.learned()
        scores = _scores_of(learned)
        if self.installed:
            self._check_installed(learned, scores)
        state, unseen = {name: gate.known is True for name, _, gate in self.gated()}, False
        for (name, _, gate), value in zip(learned, scores, strict=True):
            if value != value:
                raise GateError(f"{name}: score: expected a number, got NaN")
            state[name] = value >= gate.threshold
            unseen = unseen or (self.gates_mode == "host" and gate.known is not None and gate.known is not state[name])
        if unseen and not self.told:
            self._follow_late(learned, scores)
        opened = [name for name, is_open in state.items() if is_open]
        if self.gates_mode == "device":  # whose forwards see no gate open that was loaded closed
            self.grow(opened)
        return opened

    def _follow_late(self, learned: list[tuple[str, Part, Gate]], scores: list[float]) -> None:
        """What is told is what runs: take gates that no forward has seen, and say once where only values showed it."""
        unseen = [
            name
            for (name, _, gate), value in zip(learned, scores, strict=True)
            if gate.known is not (value >= gate.threshold) and not gate.stale()
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
        without_values = any(gate.score is not None and gate.score.is_meta for _, _, gate in layers)
        if self.gates_mode == "host" and not on_cpu and not without_values:
            with contextlib.suppress(GateError):  # the next forward's affair
                self.open_layers()

    def rest(self) -> None:
        """Take the gradients from closed parts: zeros that someone put there, or of a forward before a gate closed."""
        for held in self.bindings.resting:
            for parameter in held.values():
                if parameter is not None:
                    parameter.grad = None
        if self.closed:
            self.lay_to_rest()

    @torch.compiler.disable
    def lay_to_rest(self) -> None:
        """What closed since the last forward in training gives up its gradient, which no optimizer may act on.

        Raises:
            GateError: Inf or NaN in a change that closed, which would poison its score; of one that is written to later
                backward says so.
        """
        closed = [(n, p) for n, part, g in self.learned() if n in self.closed and not g.known for p in part.changes()]
        values = [(name, parameter) for name, parameter in closed if parameter.numel()]
        for _, parameter in values:
            parameter.grad = None
        if values:
            bounds = torch.stack([torch.stack(torch.aminmax(parameter.detach())) for _, parameter in values])
            for (name, _), good in zip(values, torch.isfinite(bounds).all(dim=1).tolist(), strict=True):
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

    def sparsity_loss(self) -> Tensor | None:
        """What the method adds to the task's loss, or None."""
        return self.config.penalty_of(self.table, self.shared)

    def drop_closed_gradients(self) -> None:
        """Set the gradients of closed Deltas to None, so that no optimizer moves them or their state."""
        self.refresh()
        open_now = set(self.open_layers()) if self.gates_mode == "device" else None
        for name, part, gate in self.gated():
            closed = gate.known is False if open_now is None else name not in open_now
            for parameter in part.changes() if closed else ():
                parameter.grad = None
