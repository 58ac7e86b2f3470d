"""Between parts and the `.taps` format: what is saved is what was trained, what is loaded is checked (law 15: a file is
read without its method)."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import store
from ..base.caches import passing
from ..base.head import own_head
from ..base.known import Known
from ..base.scan import Reach, inside
from ..errors import ConfigError, GateError, TapsError
from ..methods import MethodConfig, UnknownMethod
from ..parts import Part, part_kinds
from ..parts.change import bare
from ..parts.host import base_weight, host_of, hosts_by_name
from ..store.errors import MetadataError, MissingTensorError, ParentMismatchError, UnexpectedTensorError, show
from ..store.record import Record


class Read(NamedTuple):
    """What a file describes: its config, its parts by module name, the module that its head replaces, those that only
    training runs, whether a forward in training has entered all, and what of the base the task was given."""

    config: MethodConfig
    parts: dict[str, Part]
    head_path: str | None
    training_only: set[str]
    entered: bool
    reach: Reach


def join(module: str, tensor: str) -> str:
    """The full name of a module's tensor."""
    return f"{module}.{tensor}" if module else tensor


def to_records(parts: Mapping[str, Part], opened: Collection[str]) -> dict[str, Record]:
    """What a file holds of these parts. `opened`: the names of those whose gate is open.

    Warns where a module holds what no file keeps, so that another model might be loaded.

    Raises:
        GateError: Inf or NaN in what is to be saved, naming it. TapsError: the file would belong to no model.
    """
    records = {}
    for module, part in parts.items():
        try:
            records[module] = part.record(open=module in opened)
            lost = part.lost()
        except TapsError as error:
            kind = GateError if isinstance(error, GateError) else TapsError
            raise kind(f"{module}: {error}") from None
        if lost:
            warnings.warn(f"{module}: has {' and '.join(lost)}, which the task's file does not hold", stacklevel=5)
    return records


def check_labels(labels: Sequence[str] | None, head: nn.Module | None, name: str) -> None:
    """Raise ConfigError for one string, and for another number of labels than the head's `out_features`."""
    outputs = getattr(head, "out_features", None)
    if isinstance(labels, str):
        raise ConfigError(f"labels: expected a list of strings, got {labels!r}")
    if labels is not None and isinstance(outputs, int) and len(labels) != outputs:
        raise ConfigError(f"labels: expected {outputs} names (the head of {name!r}), got {len(labels)}")


def save(
    path: str | PathLike[str],
    records: Mapping[str, Record],
    *,
    kind: str,
    name: str,
    config: MethodConfig,
    parent: str,
    labels: Sequence[str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    training_only: Iterable[str] = (),
    entered: bool = False,
    reach: Reach = Reach(),  # noqa: B008  (immutable)
) -> int:
    """Write one task or family, atomically and durably; returns the bytes written."""
    extra = {} if preprocessing is None else {"preprocessing": json.dumps(dict(preprocessing))}
    if only := sorted(training_only):
        extra["training_only"] = json.dumps(only)
    if entered:
        extra["entered"] = "in training"
    if reach.frozen:
        extra["frozen"] = json.dumps(sorted(reach.frozen))
    if reach.any_weight:
        extra["weights"] = "any"
    file = store.TaskFile(
        kind=kind,
        method=config.to_dict(),
        parent=parent,
        name=name,
        parts=dict(records),
        labels=None if labels is None else list(labels),
        metrics=None if metrics is None else dict(metrics),
        extra=extra,
    )
    return store.save(Path(path), file)


def head_of(file: store.TaskFile) -> str | None:
    """The module that a file's head replaces."""
    for name, record in file.parts.items():
        kind = part_kinds().get(record.facts.get("kind", ""))
        if kind is not None and kind.stands_in and record.facts.get("role", "head") == "head":
            return name
    return None


def further_heads(parts: Mapping[str, Part], head: str | None) -> list[str]:
    """The modules beside `head` that heads of a task replace, in the place of a base's other classifiers."""
    return [n for n, part in parts.items() if n != head and part.replacement is not None and "head" in part.roles()]


def beside(file: store.TaskFile) -> Path | None:
    """The shared file that a task's file builds on, if it lies beside it: by the name that a folder of tasks gives it,
    else whatever it is called."""
    folder = Path(file.path).parent
    named = folder / f"{store.names.shared_file_name(file.parent)}.taps"
    for path in [named, *sorted(folder.glob("*.taps"))] if file.path else ():
        try:
            header = store.read_header(path, kind="shared")
        except (TapsError, OSError):  # a task's, or somebody else's file
            continue
        if header.digest == file.parent:
            return path
    return None


def belongs(file: store.TaskFile, base: nn.Module, head: str | None, known: Known | None = None) -> bool:
    """True if a file was trained on this base, outside of the module `head`. `known`: what was found of it before."""
    known = Known() if known is None else known
    return (head is None or head in dict(base.named_modules())) and known.fingerprint(base, head) == file.parent


def check_parent(
    file: store.TaskFile,
    base: nn.Module,
    head: str | None,
    *,
    allow_dtype_cast: bool = False,
    known: Known | None = None,
) -> None:
    """Raise unless a file belongs to this base, outside of the module `head`.

    A cast base has other bytes, so `allow_dtype_cast` takes the parent on trust where the file's types differ from the
    base's.

    Raises:
        ParentMismatchError: it belongs to another.
    """
    if head is not None and head not in dict(base.named_modules()):
        raise ParentMismatchError(
            file.path, f"belongs to another base: it replaces the head {head!r}, which this one lacks"
        )
    found = (Known() if known is None else known).fingerprint(base, head)
    if not (allow_dtype_cast and found != file.parent and _is_cast(file, base)):
        store.check_parent(found, file.parent, path=Path(file.path), hint=_hint(base))


def _hint(base: nn.Module) -> str:
    """What a base of the right weights may differ by."""
    names = [name for name, tensor in passing(base) if tensor is not None]
    if not names:
        return ""
    return (
        f"; if a forward builds {show(names[0])}, take a base that had run before it was adapted, or one that had not, "
        "as the file's"
    )


def _floats(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _is_cast(file: store.TaskFile, base: nn.Module) -> bool:
    """True unless the file's tensors show that this base has the type of the one it was trained on: those that have the
    base's type, which changes and scores have not."""
    kinds = part_kinds()
    stored: set[torch.dtype] = set()
    for record in file.parts.values():
        kind = kinds.get(record.facts.get("kind", ""))
        if kind is not None:
            stored |= _floats(kind.typed_as_base(record))
    return not stored or not stored <= _floats([*base.parameters(), *base.buffers()])


def build(
    file: store.TaskFile,
    base: nn.Module,
    head: nn.Module | None = None,
    *,
    default_head: str | None = None,
    further: Sequence[str] = (),
    allow_dtype_cast: bool = False,
    whole: bool = False,
    each: Callable[[str, Part], Part | None] | None = None,
    known: Known | None = None,
) -> Read:
    """The parts that a file describes, with every tensor checked against the base before one is copied.

    Args:
        head: a module that the user brings in the place of a head that is no linear layer.
        default_head: the base's head, which a task without one of its own runs on; `further`: others beside it, which
            the tasks of a family have heads in the place of.
        allow_dtype_cast: floating-point tensors take the types that this base has.
        whole: with the Deltas of closed layers, which no file holds, in memory.
        each: takes a part's values as soon as it was read, and gives the part back, which may be without them then.
        known: what was found of the base before.

    Raises:
        TaskFileError: a missing, unexpected or ill-shaped tensor, named; parts that the base or the file's own method
            has not; a gate that contradicts its score.
        ConfigError: a head of another structure than `head`, or a custom head without.
    """
    config = _config(file)
    head_path = head_of(file)
    if head_path is None and head is not None:
        raise ConfigError(f"head: expected None, since {file.path} holds a task without a head")
    given = None if head is None else own_head(base, head)
    places, kinds, reach = hosts_by_name(base), part_kinds(), _reach(file)
    parts: dict[str, Part] = {}
    for name, given_record in file.parts.items():
        record = dataclasses.replace(given_record, cast=allow_dtype_cast, taken=set())  # the caller's stays as it is
        kind = kinds.get(record.facts.get("kind", ""))
        if name not in places:
            raise record.refuse("the base has no module of that name", UnexpectedTensorError)
        if kind is None:
            raise record.refuse(f"kind: expected one of {sorted(kinds)}, got {record.facts.get('kind')!r}")
        host = host_of(base, name)
        parts[name] = kind.read(record, host, given if name == head_path else None)
        record.check_taken()
        if whole and parts[name].gate is not None:
            parts[name].grow(base_weight(host))
        if each is not None:
            parts[name] = each(name, parts[name]) or parts[name]
    if default_head is not None and any(inside(name, default_head) for name in parts):
        default_head, further = None, ()  # to a task without a head the base's own is a layer like any
    heads = further if head_path is None else further_heads(parts, head_path)
    known = Known() if known is None else known
    _check_method(file, config, base, head_path or default_head, heads, parts, reach, known)
    outputs = getattr(parts[head_path].replacement, "out_features", None) if head_path is not None else None
    if file.labels is not None and isinstance(outputs, int) and len(file.labels) != outputs:
        raise MetadataError(file.path, f"taps.labels: expected {outputs} names (the head), got {len(file.labels)}")
    return Read(config, parts, head_path, _training_only(file, parts), "entered" in file.extra, reach)


def _config(file: store.TaskFile) -> MethodConfig:
    try:
        return MethodConfig.from_dict(file.method)
    except ConfigError as error:
        if MethodConfig.known(file.method.get("method")):
            raise MetadataError(file.path, f"taps.method: {error}") from None
    return UnknownMethod(settings=file.method)


def _check_method(
    file: store.TaskFile,
    config: MethodConfig,
    base: nn.Module,
    head_path: str | None,
    further: Sequence[str],
    parts: dict[str, Part],
    reach: Reach,
    known: Known,
) -> None:
    """Refuse parts that the file's own method would not have made, where it is known.

    A file of format 1.0 says nothing of a part without tensors: that one is the method's.
    """
    if isinstance(config, UnknownMethod):
        return
    try:
        patterns = {"target": config.target_modules, "exclude": config.exclude_modules}
        found = known.scan(base, head_path, **patterns, heads=further, reach=reach, freeze_unsupported=True)
        with bare():
            wanted = (config.shared if file.kind == "shared" else config.parts)(found)
    except ConfigError as error:
        raise MetadataError(file.path, f"taps.method: {error}") from None
    for name, part in wanted.items():
        if name in parts:
            if (problem := parts[name].differs(part)) is not None:
                raise MetadataError(file.path, f"part {name!r}: {problem}, by its method {config.method!r}")
        elif not file.complete and part.gate is None and not part.record(open=True).tensors:
            parts[name] = part
        else:
            raise MissingTensorError(
                file.path, f"part {name!r}: expected one by its method {config.method!r}, got none"
            )
    extra = [name for name in parts if name not in wanted and name not in (head_path, *further)]
    if extra:
        raise UnexpectedTensorError(
            file.path, f"part {extra[0]!r}: expected none by its method {config.method!r}, got one"
        )


def _reach(file: store.TaskFile) -> Reach:
    """What of the base the file's task was given.

    Raises:
        MetadataError: no list of names; another word for the weights than "any".
    """
    text, weights = file.extra.get("frozen", "[]"), file.extra.get("weights")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise MetadataError(file.path, f"frozen: expected a JSON list of the base's parameters, got {text[:80]!r}")
    if weights not in (None, "any"):
        raise MetadataError(file.path, f"weights: expected 'any' or none, got {weights[:80]!r}")
    return Reach(frozenset(names), weights == "any")


def _training_only(file: store.TaskFile, parts: Mapping[str, Part]) -> set[str]:
    """The modules that only training runs (auxiliary heads), as the file names them."""
    text = file.extra.get("training_only", "[]")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name in parts for name in names):
        raise MetadataError(file.path, f"training_only: expected a JSON list of the task's modules, got {text[:80]!r}")
    return set(names)
