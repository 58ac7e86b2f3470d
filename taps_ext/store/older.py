"""Task and shared files of 1.0 and 1.1, read into the table of parts: files of 0.1 load for ever.

Those formats knew gated layers, norms, other values and a head, each with a table of its own, and left it to the
method's settings to say where a gate opens. Here every fact of the table is worked out from what the file holds, so
nothing above the store knows that there were other formats.
"""

from __future__ import annotations

import fnmatch
import math
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .errors import CodecError, GateRecordError, LimitError, MetadataError, Path, show
from .format import check_name
from .table import SCORE, Claim, PartEntry, check_names, is_strings, place

_CODECS = {"dense": ("dense", "delta"), "weight": ("whole", "weight")}  # codec -> kind of change, its tensor
_THRESHOLD = 0.1  # of methods without a setting
_MAX_GLOB_CHARS = 1 << 17  # a second or two of compiling
_MAX_MATCHES = 1 << 22  # a second or two of matching: 2,000 globs for 2,000 layers


class Tables(NamedTuple):
    """`taps.layers`, `taps.codecs`, `taps.contents` (objects) and `taps.head` (None where there is none), parsed."""

    layers: dict[str, Any]
    codecs: dict[str, Any]
    contents: dict[str, Any]
    head: Any


def check_tables(tables: Tables, *, path: Path) -> None:
    """Raises MetadataError, CodecError, GateRecordError, TensorNameError or LimitError unless the tables are well
    formed and agree.
    """
    layers, codecs, contents, head = tables
    if not is_strings(list(codecs.values())):
        raise MetadataError(path, f"taps.codecs: expected a codec name per layer, got {show(codecs)}")
    if contents.keys() != {"head", "norms", "values"} or not all(map(is_strings, contents.values())):
        raise MetadataError(path, f"taps.contents: expected lists head, norms and values, got {show(contents)}")
    for group, names in contents.items():
        check_names(names, f"taps.contents: {group}", path=path)
    for name, gate in layers.items():
        _check_layer(name, gate, codecs.get(name), path=path)
    if surplus := codecs.keys() - layers.keys():
        raise MetadataError(path, f"taps.codecs: {show(min(surplus))} is not a layer in taps.layers")
    if head is None:
        if contents["head"]:
            raise MetadataError(path, f"taps.head: expected how to rebuild the head of {show(contents['head'])}")
    elif not isinstance(head, dict) or not isinstance(head.get("module"), str):
        raise MetadataError(path, f"taps.head: expected an object that names its module, got {show(head)}")


def values_of(tables: Tables, *, path: Path) -> tuple[str, ...]:
    """The values of a state, which is all that one holds. Raises MetadataError for more."""
    contents = tables.contents
    if tables.layers or tables.head is not None or contents["head"] or contents["norms"]:
        raise MetadataError(path, "taps.kind: a state holds values alone, got layers, norms or a head")
    return tuple(contents["values"])


def to_parts(tables: Tables, method: Mapping[str, Any], *, path: Path) -> tuple[dict[str, PartEntry], dict[str, Claim]]:
    """The table of parts, and the claims under the names that these formats stored tensors by.

    A layer `l` stored `l.score` and `l.<tensor of its codec>`, a value `v` stored `v.value`, a norm tensor `n` stored
    `norm.n`, a head tensor `h` stored `head.h`; where two of these met, the later one in this order got "~" appended.

    Raises MetadataError for a module of two parts, a head that names no module, or a threshold that is none, and
    LimitError for more globs than are worth matching.
    """
    layers, codecs, contents, head = tables
    thresholds = _thresholds(layers, method, path=path)
    facts: dict[str, dict[str, Any]] = {}
    claims: dict[str, Claim] = {}

    def put(module: str, made: dict[str, Any]) -> None:
        if facts.setdefault(module, made) != made:
            raise MetadataError(
                path, f"module {show(module)}: expected one part, got {facts[module]['kind']} and {made['kind']}"
            )

    def own(name: str, role: str) -> Claim:
        module, _, tensor = name.rpartition(".")
        if role != "other" or tensor != "bias" or module not in layers:
            put(module, {"kind": "own", "role": role})
        return Claim(module, tensor)

    for layer in sorted(layers):
        gate, change = layers[layer], None
        if gate["learn"]:
            place(claims, f"{layer}.{SCORE}", Claim(layer, SCORE, True))
        if gate["open"]:
            kind, tensor = _CODECS[codecs[layer]]
            place(claims, f"{layer}.{tensor}", Claim(layer, tensor))
            change = {"kind": kind}
        elif method.get("method") != "probe":
            change = {"kind": "dense"}
        put(layer, {"kind": "layer", "gate": {**gate, "threshold": thresholds[layer]}, "change": change})
    for name in contents["values"]:
        place(claims, f"{name}.value", own(name, "other"))
    for name in contents["norms"]:
        place(claims, f"norm.{name}", own(name, "norm"))
    if head is not None:
        spec = {key: value for key, value in head.items() if key != "module"}
        put(head["module"], {"kind": "instead", "module": spec})
        for name in contents["head"]:
            place(claims, f"head.{name}", Claim(head["module"], name))
    tensors: dict[str, list[str]] = {module: [] for module in facts}
    for claim in claims.values():
        tensors[claim.module].append(claim.tensor)
    return {module: PartEntry(facts[module], tuple(sorted(names))) for module, names in tensors.items()}, claims


def _check_layer(name: str, gate: Any, codec: str | None, *, path: Path) -> None:
    if name != "":  # the base itself may be a gated layer
        check_name(name, path=path, what="layer")
    if (
        not isinstance(gate, dict)
        or gate.keys() != {"learn", "open"}
        or not all(isinstance(flag, bool) for flag in gate.values())
    ):
        raise MetadataError(
            path, f"taps.layers: layer {show(name)}: expected booleans learn and open, got {show(gate)}"
        )
    if gate["open"] and codec is None:
        raise CodecError(path, f"layer {show(name)}: open, so a codec for its delta is expected, got none")
    if codec is not None and not gate["open"]:
        raise GateRecordError(path, f"layer {show(name)}: closed, so no delta is expected, got codec {show(codec)}")
    if codec is not None and codec not in _CODECS:
        raise CodecError(path, f"layer {show(name)}: unknown codec {show(codec)}; known are {', '.join(_CODECS)}")


def _thresholds(layers: Iterable[str], method: Mapping[str, Any], *, path: Path) -> dict[str, float]:
    """Where each layer's gate opens, as 0.1 took it from the settings: of two overrides the later one wins."""
    names = list(layers)
    if not names:
        return {}
    found = dict.fromkeys(names, _threshold(method.get("threshold", _THRESHOLD), "threshold", path=path))
    overrides = method.get("overrides", {})
    if not isinstance(overrides, dict) or not all(isinstance(settings, dict) for settings in overrides.values()):
        raise MetadataError(path, f"taps.method: overrides: expected {{glob: settings}}, got {show(overrides)}")
    globs = {glob: settings["threshold"] for glob, settings in overrides.items() if "threshold" in settings}
    if len(globs) * len(names) > _MAX_MATCHES or sum(map(len, globs)) > _MAX_GLOB_CHARS:
        raise LimitError(path, f"taps.method: overrides: too much to match {len(globs)} globs, {len(names)} layers")
    for glob, value in globs.items():
        threshold = _threshold(value, f"overrides: {show(glob)}: threshold", path=path)
        try:
            found |= dict.fromkeys(fnmatch.filter(names, glob), threshold)
        except re.error as error:
            raise MetadataError(path, f"taps.method: overrides: {show(glob)}: no glob: {error}") from None
    return found


def _threshold(value: object, where: str, *, path: Path) -> float:
    """The setting as float32 has it, since scores are compared in that type."""
    rounded = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            (rounded,) = struct.unpack("f", struct.pack("f", value))
        except OverflowError:
            rounded = math.inf
    if not 0.0 < rounded < math.inf:
        raise MetadataError(path, f"taps.method: {where}: expected a float32 above 0, got {show(value)}")
    return rounded
