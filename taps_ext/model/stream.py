"""Between files, a part at a time: a checkpoint to a task's file, and a task's file to a checkpoint.

The base is in memory, since it says what a checkpoint's tensors are; of the checkpoint and of the task no more than one
part is. What is made waits on the disk (`store.Spool`) until the file is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .. import store
from ..base.fingerprint import base_fingerprint
from ..base.scan import Scan, inside, names_of, shared_tensors
from ..errors import ConfigError, TapsError
from ..files import checkpoint, merge
from ..files import task as task_file
from ..files.pack import PackedRow, Packing
from ..methods import FullConfig
from ..parts import Layer, Part, part_kinds
from ..parts.host import base_weight, host_of, owner_of
from ..parts.packing import Rule, Spec, choose
from ..store import shards
from ..store.record import OnDisk, Record
from .state import Parts, check_stands

Checkpoint = str | PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Extracted:
    """What was made of a checkpoint.

    Attributes:
        task: its name. bytes: of the file. layers: how many can be gated.
        as_deltas, as_weights: how many of the open ones hold a Delta, or the checkpoint's own weight.
        packing: how open layers were thinned, None where they were not.
    """

    task: str
    bytes: int
    layers: int
    as_deltas: int
    as_weights: int
    packing: Packing | None = field(default=None, repr=False)

    @property
    def layers_open(self) -> int:
        """How many differ from the base."""
        return self.as_deltas + self.as_weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {key: value for key, value in asdict(self).items() if key != "packing"}
        thinned = {} if self.packing is None else {"packing": self.packing.to_dict()}
        return {**found, "layers_open": self.layers_open, **thinned}


@dataclass(frozen=True)
class Merged:
    """What was written of a task: its name, how many tensors, and the bytes."""

    task: str
    tensors: int
    bytes: int


def fraction_rule(top_fraction: float | None) -> Rule | None:
    """How layers are thinned. Raises ConfigError: no number in (0, 1]."""
    if top_fraction is None:
        return None
    number = isinstance(top_fraction, (int, float)) and not isinstance(top_fraction, bool)
    if not number or not 0.0 < top_fraction <= 1.0:
        raise ConfigError(f"top_fraction: expected a number in (0, 1], got {top_fraction!r}")
    return Rule(Spec("bitmask", float(top_fraction)))


@contextmanager
def opened(given: Checkpoint) -> Iterator[Mapping[str, Tensor] | shards.Checkpoint]:
    """A checkpoint whose tensors are read where they are asked for; one in memory as it is.

    Raises:
        TaskFileError: a file or an index is not what it must be.
    """
    if not isinstance(given, (str, PathLike)):
        yield given
        return
    shards.check_machine()
    with shards.opened(given) as files:
        yield files


def thinner(rule: Rule, rows: list[PackedRow]) -> checkpoint.Thin:
    """What packs an open layer by a rule, and notes what that did."""

    def thin(name: str, part: Layer, host: nn.Module) -> Part:
        weight = base_weight(host).detach()
        delta = part.added(weight)
        if delta is None:  # closed
            return part
        before = sum(parameter.nbytes for parameter in part.changes())
        ((_, choice),) = choose(rule, {name: lambda: delta})
        if choice.made is None:
            rows.append(PackedRow(name, part.change_kind, before, before, 0.0))
            return part
        rows.append(PackedRow(name, choice.codec, before, choice.nbytes, choice.error))
        return part.pack(choice.made, host)

    return thin


def extract_file(
    base: nn.Module,
    scanned: Scan,
    given: Checkpoint,
    out: str | PathLike[str],
    *,
    name: str,
    config: FullConfig,
    head: nn.Module | None,
    top_fraction: float | None,
    labels: Callable[[int], list[str]] | None,
) -> Extracted:
    """See `TaskModel.extract_file`."""
    rule, rows = fraction_rule(top_fraction), list[PackedRow]()
    thin = None if rule is None else thinner(rule, rows)
    records: dict[str, Record] = {}
    made_head: nn.Module | None = None
    kinds: list[str] = []
    with store.Spool(out) as spool, opened(given) as found:
        for module, part in checkpoint.extract(base, found, scanned, head, thin):
            Parts(base, {module: part})  # its checks
            open_now = part.gate is not None and part.gate.open
            (record,) = task_file.to_records({module: part}, [module] if open_now else []).values()
            records[module] = Record(record.facts, spool.put(record.tensors))
            if part.gate is not None:
                kinds.append(part.change_kind if open_now else "")
            if part.replacement is not None:
                made_head = part.replacement
            del part, record
        names = None if labels is None else _labels(labels, made_head, name)
        written = task_file.save(
            out,
            records,
            kind="task",
            name=name,
            config=config,
            parent=base_fingerprint(base, None if made_head is None else scanned.head),
            labels=names,
            reach=scanned.reach,
        )
    whole = kinds.count("whole")
    packing = None if rule is None else Packing(name, rows)
    return Extracted(name, written, len(kinds), len(kinds) - kinds.count("") - whole, whole, packing)


def _labels(labels: Callable[[int], list[str]], head: nn.Module | None, name: str) -> list[str]:
    """The names of a task's classes. Raises ConfigError where its head does not say how many, and for others than it
    has."""
    if head is None:
        raise ConfigError("labels: expected a task with a head, got none")
    outputs = getattr(head, "out_features", None)
    if not isinstance(outputs, int):
        raise ConfigError(f"labels: expected a head that has out_features, got a {type(head).__name__}")
    found = labels(outputs)
    task_file.check_labels(found, head, name)
    return found


def merge_file(
    base: nn.Module, heads: Sequence[str], path: str | PathLike[str], out: str | PathLike[str], shared: Any
) -> Merged:
    """See `TaskModel.merge_file`. `heads`: the model's, the one that counts as its head first."""
    head_path = next(iter(heads), None)
    with ExitStack() as stack:
        spool = stack.enter_context(store.Spool(out))  # first: a bad `out` is refused before there is any work
        file = stack.enter_context(store.opened(path, kind="task"))
        family = _family(file, base, head_path, shared, stack)
        merging = _Merging(base, spool, family)
        if family is not None:
            task_file.build(family, base, default_head=head_path, further=heads[1:], each=merging.check_shared)
        task_file.build(file, base, default_head=head_path, each=merging.take)
        for module in merging.shared.keys() - file.parts.keys():
            merging.take(module, None)
        tensors = merging.tensors()
        written = store.write_safetensors(out, tensors, {"format": "pt"})
    return Merged(file.name, len(tensors), written)


def _family(
    file: store.TaskFile, base: nn.Module, head_path: str | None, shared: Any, stack: ExitStack
) -> store.TaskFile | None:
    """The open file of the family that a task builds on, in `shared` or beside the task's; None where it builds on the
    base. Raises ParentMismatchError where it builds on neither."""
    head = task_file.head_of(file)
    if shared is None:
        if task_file.belongs(file, base, head):
            return None
        shared = task_file.beside(file)
    if shared is None:
        task_file.check_parent(file, base, head)
        return None
    family = stack.enter_context(store.opened(shared, kind="shared"))
    store.check_parent(family.digest, file.parent, path=file.path)
    task_file.check_parent(family, base, head_path)
    return family


class _Merging:
    """A plain checkpoint as it comes to be: the base's tensors, and those of parts on the disk."""

    def __init__(self, base: nn.Module, spool: store.Spool, family: store.TaskFile | None) -> None:
        self.base, self.spool = base, spool
        self.shared: Mapping[str, Record] = {} if family is None else family.parts
        self.family = "" if family is None else family.name
        self.state = base.state_dict(keep_vars=True)
        self.values: dict[str, store.Source] = {}
        self.replaced: list[str] = []

    def check_shared(self, module: str, part: Part) -> Part:
        """A part of the family's file, which is read again where it is merged."""
        Parts(self.base, {module: part})
        if part.gate is not None and part.gate.learn:
            raise ConfigError(f"shared: {module}: expected a fixed gate in a shared part, got a learned one")
        return _emptied(part)

    def take(self, module: str, part: Part | None) -> Part | None:
        """Keep what a module has under its own part and the family's, and give the part back without its values."""
        host, below = host_of(self.base, module), self._shared_part(module)
        stack = tuple(one for one in (below, part) if one is not None)
        if part is not None:
            Parts(self.base, {module: part})
            if below is not None:
                check_stands(module, part, below, self.family)
        replacement = stack[-1].replacement
        if replacement is not None:
            names = names_of(self.base, host)
            self.replaced += names
            self._keep(names, replacement.state_dict())
            return part
        with merge.named(module):
            values = merge.values_of(stack, host)
        owner = owner_of(host)
        if owner is not host:
            module = module.rpartition(".")[0]
        lasting = {key: value.detach() for key, value in values.items() if self._lasts(module, owner, key)}
        cast = {key: value.to(getattr(owner, key).dtype) for key, value in lasting.items()}
        self._keep(names_of(self.base, owner), cast)
        return None if part is None else _emptied(part)

    def _shared_part(self, module: str) -> Part | None:
        record = self.shared.get(module)
        if record is None:
            return None
        return part_kinds()[record.facts["kind"]].read(record, host_of(self.base, module))

    def _lasts(self, module: str, host: nn.Module, key: str) -> bool:
        """Whether a module's tensor is in the base's state, under its own name."""
        name = task_file.join(module, key)
        if key in host._non_persistent_buffers_set:
            return False
        if self.state.get(name) is not getattr(host, key, name):
            raise TapsError(
                f"{name}: expected the base's state_dict to hold it under its own name, got none; save "
                "merge_and_unload()'s copy instead"
            )
        return True

    def _keep(self, modules: list[str], values: Mapping[str, Tensor]) -> None:
        disk: OnDisk = self.spool.put(values)
        record = Record({}, disk)
        self.values |= {task_file.join(m, key): record.source(key) for m in modules for key in values}

    def tensors(self) -> dict[str, store.Source]:
        """All of them. Raises TapsError where the base has one tensor for two values."""
        found: dict[str, store.Source] = {
            name: tensor.detach()
            for name, tensor in self.state.items()
            if not any(inside(name.rpartition(".")[0], module) for module in self.replaced)
        }
        found |= self.values
        for one, other in shared_tensors(self.base):
            pair = [found.get(name) for name in (one, other)]
            if any(isinstance(source, store.Later) for source in pair):
                values = {
                    name: source.read() if isinstance(source, store.Later) else source
                    for name, source in zip((one, other), pair, strict=True)
                    if source is not None
                }
                merge.check_one_value(self.base, values)
        return found


@torch.no_grad()
def _emptied(part: Part) -> Part:
    """A part as it is built, its values gone."""
    for tensor in itertools.chain(part.parameters(), part.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return part
