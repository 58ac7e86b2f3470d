"""Between a task's parts and the `.taps` format: what is saved is what was trained, what is loaded is checked."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import store
from .errors import ConfigError, GateError, TapsError
from .methods import GateSpec, MethodConfig, Plan
from .nn.route import original_class
from .scan import inside, names_of, scan
from .store.errors import GateRecordError, MetadataError, MissingTensorError, ParentMismatchError, UnexpectedTensorError
from .task import TaskState, own_head


def join(module: str, tensor: str) -> str:
    """The full name of a module's tensor."""
    return f"{module}.{tensor}" if module else tensor


def base_fingerprint(base: nn.Module, head: str | None) -> str:
    """Fingerprint of all parameters and buffers outside the head (non-persistent buffers included)."""
    tensors = [*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False)]
    heads = [] if head is None else names_of(base, base.get_submodule(head))
    return store.fingerprint({n: t for n, t in tensors if not any(inside(n.rpartition(".")[0], h) for h in heads)})


def _head_spec(state: TaskState) -> dict[str, Any] | None:
    head = state.head
    if head is None:
        return None
    if type(head) is nn.Linear or original_class(head) is nn.Linear:
        kind: dict[str, Any] = {
            "in": head.in_features,
            "out": head.out_features,
            "bias": head.bias is not None,
        }
        return {"type": "linear", "module": state.head_path, **kind}
    return {"type": "custom", "module": state.head_path, "class": type(head).__qualname__}


def _stored(state: TaskState, group: str) -> dict[str, Tensor]:
    return {
        join(module, name): tensor.detach()
        for module, part in state.table.items()
        if part.group == group
        for name, tensor in part.stored().items()
    }


def _say_what_is_lost(state: TaskState) -> None:
    """Warn where a module of the task holds what no file keeps, so that another model might be loaded."""
    for module, part in state.table.items():
        try:
            lost = part.lost()
        except TapsError as error:
            raise TapsError(f"{module}: {error}") from None
        if lost:
            warnings.warn(f"{module}: has {' and '.join(lost)}, which the task's file does not hold", stacklevel=5)


def to_record(
    name: str,
    state: TaskState,
    base: nn.Module,
    *,
    labels: Sequence[str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> store.TaskFile:
    """The content of a task's file. Raises GateError for a NaN score or an open layer with Inf or NaN in Delta."""
    opened = set(state.open_layers())
    state.grow(opened)
    layers = {}
    for layer, part in state.gated():
        is_open = layer in opened
        change = part.change.detach() if is_open and part.change is not None else None
        if change is not None and not bool(torch.isfinite(change).all()):
            kind = "weight" if part.delta is None else "delta"
            raise GateError(f"{layer}: {kind}: expected finite values in a task to save, got Inf or NaN")
        score = part.score.detach() if part.learn and part.score is not None else None
        codec = "dense" if part.weight is None else "weight"
        layers[layer] = store.LayerRecord(learn=part.learn, open=is_open, score=score, delta=change, codec=codec)
    _say_what_is_lost(state)
    head = state.head
    extra = {} if preprocessing is None else {"preprocessing": json.dumps(dict(preprocessing))}
    if state.training_only:
        extra["training_only"] = json.dumps(sorted(state.training_only))
    return store.TaskFile(
        method=state.config.to_dict(),
        parent=base_fingerprint(base, state.head_path),
        name=name,
        layers=layers,
        norms=_stored(state, "norms"),
        values=_stored(state, "values"),
        head={} if head is None else {k: v.detach() for k, v in head.state_dict().items()},
        head_spec=_head_spec(state),
        labels=None if labels is None else list(labels),
        metrics=None if metrics is None else dict(metrics),
        extra=extra,
    )


def save(name: str, state: TaskState, base: nn.Module, path: str | PathLike[str], **extra: Any) -> int:
    """Write one task, atomically and durably; returns the bytes written."""
    return store.save(Path(path), to_record(name, state, base, **extra))


def _floats(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _is_cast(record: store.TaskFile, base: nn.Module) -> bool:
    """True unless the file's tensors show that this base has the type of the one it was trained on."""
    whole = [e.delta for e in record.layers.values() if e.codec == "weight" and e.delta is not None]
    stored = _floats([*record.norms.values(), *record.values.values(), *record.head.values(), *whole])
    return not stored or not stored <= _floats([*base.parameters(), *base.buffers()])


def _as_wanted(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors in the types of the cast base: what `.to(dtype)` of the whole model makes of them."""
    both = {n for n, t in stored.items() if n in wanted and t.is_floating_point() and wanted[n].is_floating_point()}
    return {n: t.to(wanted[n].dtype) if n in both else t for n, t in stored.items()}


def read(path: str | PathLike[str], base: nn.Module, *, allow_dtype_cast: bool = False) -> store.TaskFile:
    """Read and verify a task file, and prove that it belongs to this base.

    A cast base has other bytes, so `allow_dtype_cast` takes the parent on trust where the file's types differ from
    the base's.

    Raises:
        TaskFileError: damaged, not a task file, or another parent.
    """
    record = store.load(Path(path), kind="task")
    spec = record.head_spec
    module = None if spec is None else spec.get("module")
    if module is not None and module not in dict(base.named_modules()):
        raise ParentMismatchError(
            path, f"belongs to another base: it replaces the head {module!r}, which this one lacks"
        )
    found = base_fingerprint(base, module)
    if not (allow_dtype_cast and found != record.parent and _is_cast(record, base)):
        store.check_parent(found, record.parent, path=Path(path))
    return record


def _make_head(
    record: store.TaskFile, base: nn.Module, head: nn.Module | None, path: Any, cast: bool
) -> nn.Module | None:
    spec = record.head_spec
    if spec is None:
        if head is not None:
            raise ConfigError(f"head: expected None, since {path} holds a task without a head")
        return None
    kinds = {"in": int, "out": int, "bias": bool}
    linear = spec.get("type") == "linear" and all(type(spec.get(k)) is t for k, t in kinds.items())
    if not linear and spec.get("type") != "custom":
        raise MetadataError(path, f"taps.head: expected a linear or custom head, got {spec!r}")
    if head is not None:
        own, kind = own_head(base, head), type(head).__qualname__
        fits = type(head).forward is nn.Linear.forward if linear else kind == spec.get("class")
        if not fits:
            raise ConfigError(f"head: {path} holds a {'Linear' if linear else spec.get('class')}, got a {kind}")
        return own
    if not linear:
        raise ConfigError(f"head: {path} holds a {spec.get('class')}; pass a module of that structure as head=")
    weight = record.head.get("weight")
    if weight is None or list(weight.shape) != [spec["out"], spec["in"]]:
        got = None if weight is None else list(weight.shape)
        raise MissingTensorError(path, f"tensor 'head.weight': expected shape {[spec['out'], spec['in']]}, got {got}")
    like = next(base.get_submodule(spec["module"]).parameters(), weight)
    dtype = like.dtype if cast else weight.dtype
    return nn.utils.skip_init(nn.Linear, spec["in"], spec["out"], bias=spec["bias"], device=like.device, dtype=dtype)


def _plan(record: store.TaskFile, config: MethodConfig, base: nn.Module, path: Any, whole: bool) -> Plan:
    """The config's plan for this base with the gates as the file holds them; `whole`: with closed Deltas in memory."""
    module = None if record.head_spec is None else record.head_spec.get("module")
    found = scan(base, module, target=config.target_modules, exclude=config.exclude_modules)
    plan = config.plan(found)
    missing = [name for name in plan.gates if name not in record.layers]
    extra = [name for name in record.layers if name not in plan.gates]
    if missing:
        raise MissingTensorError(path, f"layer {missing[0]!r}: expected its gate in taps.layers, got none")
    if extra:
        raise UnexpectedTensorError(path, f"layer {extra[0]!r}: the base has no gated layer of that name")
    for name, spec in plan.gates.items():
        entry = record.layers[name]
        own = entry.open and entry.codec == "weight"
        if own and entry.learn:
            raise GateRecordError(path, f"layer {name!r}: expected a fixed gate for a whole weight, got a learned one")
        plan.gates[name] = GateSpec(
            delta=(spec.delta or entry.open) and not own,
            learn=entry.learn,
            open=entry.open,
            bias=spec.bias,
            weight=own,
            threshold=spec.threshold,
            score_init=spec.score_init,
            held=whole or entry.open,
        )
    return plan


def build(
    record: store.TaskFile,
    base: nn.Module,
    gates: str,
    head: nn.Module | None,
    path: str | PathLike[str],
    *,
    allow_dtype_cast: bool = False,
    whole: bool = False,
) -> TaskState:
    """The parts that a file describes, with every tensor checked against the base before one is copied.

    With `allow_dtype_cast` floating-point tensors take the types that this base has. The Delta of a closed layer, which
    no file holds, takes no memory unless the task is to be `whole`.

    Raises:
        TaskFileError: a missing, unexpected or ill-shaped tensor, named; a gate that contradicts its score.
        ConfigError: a custom head without `head`.
    """
    try:
        config = MethodConfig.from_dict(record.method)
        plan = _plan(record, config, base, path, whole)
    except ConfigError as error:
        raise MetadataError(path, f"taps.method: {error}") from None
    own = _make_head(record, base, head, path, allow_dtype_cast)
    state = TaskState(base, config, plan, None if own is None else record.head_spec["module"], own, gates)  # type: ignore[index]
    pairs = [
        ("", _stored(state, "norms"), record.norms),
        ("", _stored(state, "values"), record.values),
        ("head.", {} if own is None else own.state_dict(), record.head),
    ]
    for layer, part in state.gated():
        entry = record.layers[layer]
        if entry.delta is not None:
            assert part.change is not None
            key = f"{layer}.{'delta' if part.weight is None else 'weight'}"
            pairs.append(("", {key: part.change.detach()}, {key: entry.delta}))
        if entry.score is not None:
            _check_gate(layer, entry.score.item(), part.threshold, entry.open, path)
    if allow_dtype_cast:
        pairs = [(prefix, wanted, _as_wanted(stored, wanted)) for prefix, wanted, stored in pairs]
    for prefix, wanted, stored in pairs:
        store.check_tensors(
            {prefix + n: (t.shape, t.dtype) for n, t in wanted.items()},
            {prefix + n: t for n, t in stored.items()},
            path=Path(path),
        )
    state.training_only = _training_only(record, state, path)
    with torch.no_grad():
        for _, wanted, stored in pairs:
            for name, tensor in wanted.items():
                tensor.copy_(stored[name])
        for layer, part in state.gated():
            score = record.layers[layer].score
            if score is not None and part.score is not None:
                part.score.copy_(score)
                part.take(score.item(), layer)
                part.gate = None if gates == "device" else part.gate
    return state


def _training_only(record: store.TaskFile, state: TaskState, path: Any) -> set[str]:
    """The modules that only training runs (auxiliary heads), as the file names them."""
    text = record.extra.get("training_only", "[]")
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name in state.table for name in names):
        raise MetadataError(path, f"training_only: expected a JSON list of the task's modules, got {text[:80]!r}")
    return set(names)


def _check_gate(layer: str, score: float, threshold: float, is_open: bool, path: Any) -> None:
    if (score >= threshold) != is_open:
        expected = "closed" if is_open else "open"
        raise GateRecordError(
            path, f"layer {layer!r}: score {score:.6g} makes it {expected}, but the file says otherwise"
        )
