"""Packing a task in memory: which codec each open layer gets, and by what error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, TapsError
from ..files.pack import PackedRow
from ..parts import Part
from ..parts.host import base_weight, host_of, op_of
from ..parts.packing import Measure, Rule, choose
from .state import TaskState


def check_trains(name: str, state: TaskState) -> None:
    """Raise TapsError for a packed task, naming a layer."""
    for layer, part, _ in state.gated():
        if part.packed is not None:
            raise TapsError(
                f"parameter_groups: task {name!r}: {layer} is packed ({part.change_kind}) and trains no further; call "
                f"unpack_task({name!r}) first"
            )


def pack(
    name: str,
    state: TaskState,
    base: nn.Module,
    rule: Rule,
    opened: Iterable[str],
    inputs: Mapping[str, list[Tensor]],
) -> tuple[dict[str, Part], list[PackedRow]]:
    """The parts that take the place of open layers, and a row for each open layer that holds a Delta."""
    hosts = {layer: host_of(base, layer) for layer in opened}
    parts: dict[str, Part] = {layer: part for layer, part, _ in state.gated() if layer in hosts}
    deltas: dict[str, Callable[[], Tensor]] = {}
    for layer, part in parts.items():
        if part.packed is not None:
            raise ConfigError(f"pack_task: task {name!r}: {layer} is packed already; unpack_task({name!r}) first")
        if part.added(base_weight(hosts[layer])) is not None:
            deltas[layer] = lambda part=part, host=hosts[layer]: part.added(base_weight(host))  # type: ignore[misc]
    measures = {layer: _measure(hosts[layer], deltas[layer], inputs[layer]) for layer in deltas if inputs.get(layer)}
    found: dict[str, Part] = {}
    rows = []
    for layer, choice in choose(rule, deltas, measures):
        part, weight = parts[layer], base_weight(hosts[layer]).detach()
        before = sum(parameter.nbytes for parameter in part.changes())
        made = None if choice.made is None else part.pack(choice.made, hosts[layer], choice.output_error)
        if made is not None and rule.lossless and not torch.equal(made.fold(weight), part.fold(weight)):
            made = None  # a whole weight that no Delta gives
        if made is None:
            rows.append(PackedRow(layer, part.change_kind, before, before, 0.0, 0.0 if layer in measures else None))
            continue
        found[layer] = made
        rows.append(PackedRow(layer, choice.codec, before, choice.nbytes, choice.error, choice.output_error))
    return found, rows


def _measure(host: nn.Module, read: Callable[[], Tensor], inputs: list[Tensor]) -> Measure:
    """The relative error of what a Delta adds to a layer's outputs."""

    def outputs(delta: Tensor) -> float:
        total = 0.0
        for input in inputs:
            op, padded = op_of(host, input.float())
            total += float(op.stock(padded, delta, None, *op.geometry).double().square().sum())
        return total**0.5

    def measure(kept: Tensor) -> float:
        delta = read().float()
        size, lost = outputs(delta), outputs(delta - kept)
        return lost / size if size else 0.0 if not lost else float("inf")

    return measure


def inputs_of(run: Callable[..., Any], hosts: Mapping[str, nn.Module], data: Any) -> dict[str, list[Tensor]]:
    """What stock linear and convolution layers are given in forwards over data.

    Args:
        run: called with the arguments and keyword arguments of a forward.

    Raises:
        ConfigError: data that is no batch and no iterable of batches, or that a forward does not take.
    """
    found: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                found.setdefault(name, []).append(args[0].detach())

        return hook

    stock = {name: host for name, host in hosts.items() if isinstance(host, (nn.Linear, nn.Conv2d))}
    handles = [host.register_forward_pre_hook(watch(name)) for name, host in stock.items()]
    try:
        for args, kwargs in _batches(data):
            try:
                run(args, kwargs)
            except TypeError as error:  # labels beside the inputs, mostly
                expected = "expected batches of inputs alone, without labels"
                raise ConfigError(f"data: {expected}, got one that a forward does not take: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def _batches(data: Any) -> Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    if isinstance(data, (Tensor, tuple, Mapping)):
        data = [data]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise ConfigError(f"data: expected a batch of inputs or an iterable of some, got {type(data).__name__}")
    for batch in data:
        if isinstance(batch, Tensor):
            yield (batch,), {}
        elif isinstance(batch, Mapping):
            yield (), batch
        elif isinstance(batch, (tuple, list)):
            yield tuple(batch), {}
        else:
            raise ConfigError(f"data: expected a tensor, a tuple or a dictionary a batch, got {type(batch).__name__}")
