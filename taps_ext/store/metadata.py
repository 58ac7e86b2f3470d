"""The `taps.*` entries of a task file: what each must hold, and which tensor belongs to which entry.

    taps.format    "1.0"; another major is refused. A minor only adds optional entries, kinds and codecs, and a
                   writer stamps the lowest minor that its content needs: a newer minor is read as long as
                   every entry, kind and codec in the file is known. 1.1 added the kind "state"
    taps.kind      "task", "shared", or "state": where a training run stands
    taps.name      name of the task (optional)
    taps.method    JSON object: the method's configuration, with the method's own name under "method" (a state
                   needs none)
    taps.parent    "sha256:<hex>": fingerprint of the base, or `taps.digest` of a shared file
    taps.layers    JSON: layer -> {"learn": bool, "open": bool}
    taps.codecs    JSON: layer -> codec, for exactly the open layers
    taps.contents  JSON: {"head": [...], "norms": [...], "values": [...]}, sorted names of all further tensors
    taps.head      JSON object that says how to rebuild the head (optional)
    taps.labels    JSON list of class names (optional)
    taps.metrics   JSON object (optional)
    taps.versions  JSON: {"taps_ext": ..., "torch": ...} of the writer
    taps.digests   JSON: tensor -> "sha256:<hex>", for exactly the tensors in the file
    taps.digest    "sha256:<hex>" over the header without this entry: the identity of the file

Any other `taps.*` key is refused; keys outside `taps.` are kept as they are. Version 0.1 wrote a state as a task whose
method is "trainer-state": it is read as the state that it is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import codecs, strict_json
from .errors import (
    CodecError,
    DigestError,
    FormatVersionError,
    GateRecordError,
    KindError,
    MetadataError,
    Path,
    UnknownKeyError,
    show,
)
from .format import FORMAT, check_name

KINDS = ("task", "shared", "state")
_MINOR_OF_KIND = {"state": 1}
_STATE_OF_0_1 = {"method": "trainer-state"}
_REQUIRED = (
    "format",
    "kind",
    "parent",
    "layers",
    "codecs",
    "contents",
    "versions",
    "digests",
    "digest",
)
_OPTIONAL = ("method", "name", "head", "labels", "metrics")
_KNOWN = frozenset("taps." + key for key in _REQUIRED + _OPTIONAL)
_TABLE_TOKENS = 1 << 20  # 65,536 layers or digests
_VERSION = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class LayerEntry(NamedTuple):
    """A gated layer. `learn`: the gate is learned, and a score is stored. `open`: a delta is stored, by
    `codec`.
    """

    learn: bool
    open: bool
    codec: str | None


class Claim(NamedTuple):
    """What a stored tensor is: `group` "score", "delta", "value", "norm" or "head"; `part` a codec's
    suffix.
    """

    group: str
    name: str
    part: str = ""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The `taps.*` entries, parsed. `method` is empty where there is none, `extra` holds entries outside `taps.`;
    digests are the business of `io`.
    """

    kind: str
    parent: str
    method: dict[str, Any] = field(default_factory=dict)
    layers: Mapping[str, LayerEntry] = field(default_factory=dict)
    values: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    head_spec: dict[str, Any] | None = None
    labels: list[str] | None = None
    metrics: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    name: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def to_strings(self, *, path: Path) -> dict[str, str]:
        """The entries as stored, without digests. Raises the errors of `validate`."""
        self.validate(path=path)
        strings = dict(self.extra)
        strings["taps.format"] = f"{FORMAT[0]}.{_MINOR_OF_KIND.get(self.kind, 0)}"
        strings["taps.kind"] = self.kind
        if self.method:
            strings["taps.method"] = strict_json.dumps(self.method)
        strings["taps.parent"] = self.parent
        strings["taps.layers"] = strict_json.dumps(
            {name: {"learn": entry.learn, "open": entry.open} for name, entry in self.layers.items()}
        )
        strings["taps.codecs"] = strict_json.dumps(
            {name: entry.codec for name, entry in self.layers.items() if entry.codec is not None}
        )
        contents = {"head": list(self.head), "norms": list(self.norms), "values": list(self.values)}
        strings["taps.contents"] = strict_json.dumps(contents)
        strings["taps.versions"] = strict_json.dumps(self.versions)
        if self.name:
            strings["taps.name"] = self.name
        for key, value in (("head", self.head_spec), ("labels", self.labels), ("metrics", self.metrics)):
            if value is not None:
                strings["taps." + key] = strict_json.dumps(value)
        return strings

    def validate(self, *, path: Path) -> None:
        """Raises MetadataError, KindError, GateRecordError, CodecError, HeaderError, TensorNameError or
        LimitError.
        """
        if self.kind not in KINDS:
            raise KindError(path, f"taps.kind: expected one of {', '.join(map(repr, KINDS))}, got {show(self.kind)}")
        if not isinstance(self.parent, str) or not _DIGEST.fullmatch(self.parent):
            raise MetadataError(path, f"taps.parent: expected 'sha256:' and 64 hex digits, got {show(self.parent)}")
        if self.name:
            check_name(self.name, path=path, what="task")
        for key, value in (("method", self.method), ("head", self.head_spec), ("metrics", self.metrics)):
            if not isinstance(value, dict) and (value is not None or key == "method"):
                raise MetadataError(path, f"taps.{key}: expected a JSON object, got {show(value)}")
            strict_json.check(value, path=path, where=f"taps.{key}")
        if self.method or self.kind != "state":
            _check_method(self.kind, self.method, path=path)
        if self.labels is not None and not _strings(self.labels):
            raise MetadataError(path, f"taps.labels: expected a list of strings, got {show(self.labels)}")
        strict_json.check(self.labels, path=path, where="taps.labels")
        if not isinstance(self.versions, dict) or not _strings(list(self.versions.values())):
            raise MetadataError(path, f"taps.versions: expected names and version strings, got {show(self.versions)}")
        strict_json.check(self.versions, path=path, where="taps.versions")
        for group, names in (("head", self.head), ("norms", self.norms), ("values", self.values)):
            _check_names(group, names, path=path)
        for name, entry in self.layers.items():
            _check_layer(name, entry, path=path)
        for key, text in self.extra.items():
            if not isinstance(key, str) or key.startswith("taps.") or not isinstance(text, str):
                raise UnknownKeyError(path, f"__metadata__: extra key {show(key)}: expected text outside 'taps.'")
            strict_json.check({key: text}, path=path, where="__metadata__")

    def claims(self, *, path: Path) -> dict[str, Claim]:
        """Which tensors the file must hold: stored name -> claim, exactly one each.

        A layer `l` stores `l.score` and `l.<part>` of its codec, a value `v` stores `v.value`, a norm tensor
        `n` stores `norm.n`, a head tensor `h` stores `head.h`. Where two of these meet (a layer called
        "head", a norm inside a module called "norm"), the later one in this order gets "~" appended: reader
        and writer agree because both derive the names from the tables, never the tables from the names.
        Raises CodecError (unknown codec).
        """
        claims: dict[str, Claim] = {}

        def add(stored: str, claim: Claim) -> None:
            while stored in claims:
                stored += "~"
            claims[stored] = claim

        for name in sorted(self.layers):
            entry = self.layers[name]
            if entry.learn:
                add(f"{name}.score", Claim("score", name))
            if entry.codec is not None:
                for part in codecs.get(entry.codec, layer=name, path=path).parts:
                    add(f"{name}.{part}", Claim("delta", name, part))
        for name in self.values:
            add(f"{name}.value", Claim("value", name))
        for name in self.norms:
            add(f"norm.{name}", Claim("norm", name))
        for name in self.head:
            add(f"head.{name}", Claim("head", name))
        return claims


def check_version(strings: Mapping[str, str], *, path: Path) -> None:
    """Raises FormatVersionError unless `taps.format` is there and has our major version."""
    text = strings.get("taps.format")
    if text is None:
        raise FormatVersionError(path, "__metadata__ has no 'taps.format': not a task file")
    match = _VERSION.fullmatch(text)
    if match is None:
        raise FormatVersionError(path, f"taps.format: expected major.minor, got {show(text)}")
    if int(match[1]) != FORMAT[0]:
        raise FormatVersionError(path, f"taps.format: expected {FORMAT[0]}.x, got {show(text)}")


def parse_metadata(strings: Mapping[str, str], *, path: Path) -> Metadata:
    """Parses and validates the `taps.*` entries of a file. Raises the errors of `Metadata.validate`, and
    FormatVersionError, UnknownKeyError, DuplicateKeyError."""
    check_version(strings, path=path)
    ours = {key for key in strings if key.startswith("taps.")}
    if unknown := sorted(ours - _KNOWN):
        raise UnknownKeyError(
            path,
            f"__metadata__: unknown key {show(unknown[0])}; the file is of format {strings['taps.format']}, "
            f"this reader knows {FORMAT[0]}.{FORMAT[1]}",
        )
    required = _REQUIRED if strings.get("taps.kind") == "state" else ("method", *_REQUIRED)
    if missing := [key for key in required if "taps." + key not in ours]:
        raise MetadataError(path, f"__metadata__: expected the key 'taps.{missing[0]}', got none")

    def table(key: str, default: object = None) -> Any:
        if "taps." + key not in ours:
            return default
        large = key in ("layers", "codecs", "contents")
        tokens = _TABLE_TOKENS if large else 1 << 18
        value = strict_json.loads(strings["taps." + key], path=path, where=f"taps.{key}", max_tokens=tokens)
        if value is None or (large and not isinstance(value, dict)):
            raise MetadataError(path, f"taps.{key}: expected a JSON object, got {show(value)}")
        return value

    gates, codec_of, contents = table("layers"), table("codecs"), table("contents")
    if not _strings(list(codec_of.values())):
        raise MetadataError(path, f"taps.codecs: expected a codec name per layer, got {show(codec_of)}")
    if contents.keys() != {"head", "norms", "values"} or not all(map(_strings, contents.values())):
        raise MetadataError(path, f"taps.contents: expected lists head, norms and values, got {show(contents)}")
    layers: dict[str, LayerEntry] = {}
    for name, gate in gates.items():
        if (
            not isinstance(gate, dict)
            or gate.keys() != {"learn", "open"}
            or not all(isinstance(flag, bool) for flag in gate.values())
        ):
            raise MetadataError(
                path, f"taps.layers: layer {show(name)}: expected booleans learn and open, got {show(gate)}"
            )
        layers[name] = LayerEntry(gate["learn"], gate["open"], codec_of.pop(name, None))
    if codec_of:
        raise MetadataError(path, f"taps.codecs: {show(min(codec_of))} is not a layer in taps.layers")
    if strings.get("taps.name") == "":
        raise MetadataError(path, "taps.name: expected a name, got ''")
    kind, method = strings["taps.kind"], table("method", {})
    if kind == "state" and "taps.method" in ours and not method:
        raise MetadataError(path, f"taps.method: expected none in a state, or a method, got {show(method)}")
    if kind == "task" and method == _STATE_OF_0_1:
        kind, method = "state", {}
    metadata = Metadata(
        kind=kind,
        method=method,
        parent=strings["taps.parent"],
        layers=layers,
        values=tuple(contents["values"]),
        norms=tuple(contents["norms"]),
        head=tuple(contents["head"]),
        head_spec=table("head"),
        labels=table("labels"),
        metrics=table("metrics"),
        versions=table("versions"),
        name=strings.get("taps.name", ""),
        extra={key: value for key, value in strings.items() if key not in ours},
    )
    metadata.validate(path=path)
    return metadata


def check_kind(expected: str | None, got: str, *, path: Path) -> None:
    """Raises KindError, which says what to do with the file, unless its kind `got` is `expected` (None: any)."""
    if expected in (None, got):
        return
    advice = ""
    if got == "state":
        advice = (
            ", which says where an unfinished training run stands: train on with the same settings and out, and the "
            "end of the run writes the task's file"
        )
    raise KindError(path, f"taps.kind: expected a {expected} file, got a {got} file{advice}")


def parse_digests(strings: Mapping[str, str], tensors: Mapping[str, object], *, path: Path) -> dict[str, str]:
    """The table of tensor digests; raises DigestError unless it has exactly one well-formed digest per
    tensor.
    """
    digests = strict_json.loads(
        strings.get("taps.digests", "null"), path=path, where="taps.digests", max_tokens=_TABLE_TOKENS
    )
    if not isinstance(digests, dict):
        raise MetadataError(path, f"taps.digests: expected a JSON object, got {show(digests)}")
    if absent := sorted(tensors.keys() - digests.keys()):
        raise DigestError(path, f"taps.digests: expected a digest of tensor {show(absent[0])}, got none")
    if surplus := sorted(digests.keys() - tensors.keys()):
        raise DigestError(path, f"taps.digests: a digest of {show(surplus[0])}, but the file has no such tensor")
    for name, digest in digests.items():
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise DigestError(path, f"taps.digests: tensor {show(name)}: expected sha256:<hex>, got {show(digest)}")
    return digests


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_method(kind: str, method: dict[str, Any], *, path: Path) -> None:
    name = method.get("method")
    if not isinstance(name, str) or not name:
        raise MetadataError(path, f"taps.method: expected the method's name under 'method', got {show(method)}")
    if kind == "task" and method == _STATE_OF_0_1:  # it would be read as a state
        raise MetadataError(path, f"taps.method: expected a task's method, got {name!r}, the name of 0.1's states")


def _check_names(group: str, names: tuple[str, ...], *, path: Path) -> None:
    for name in names:
        check_name(name, path=path, what=f"taps.contents {group}")
    for first, second in itertools.pairwise(names):
        if first >= second:
            raise MetadataError(
                path,
                f"taps.contents: {group}: expected sorted, distinct names, got {show(first)} before {show(second)}",
            )


def _check_layer(name: str, entry: LayerEntry, *, path: Path) -> None:
    if name != "":  # the base itself may be a gated layer
        check_name(name, path=path, what="layer")
    if entry.codec is None:
        if entry.open:
            raise CodecError(path, f"layer {show(name)}: open, so a codec for its delta is expected, got none")
    elif not isinstance(entry.codec, str):
        raise CodecError(path, f"layer {show(name)}: expected a codec's name, got {show(entry.codec)}")
    elif not entry.open:
        raise GateRecordError(
            path, f"layer {show(name)}: closed, so no delta is expected, got codec {show(entry.codec)}"
        )
