"""The `taps.*` entries of a task file: what each must hold.

    taps.format    "1.2"; another major is refused. A minor only adds optional entries, kinds and layouts, and a writer
                   stamps the lowest minor that its content needs: a newer minor is read as long as every entry and
                   kind in the file is known. 1.1 added the kind "state", 1.2 the table of parts
    taps.kind      "task", "shared", or "state": where a training run stands
    taps.name      name of the task (optional)
    taps.method    JSON object: the method's configuration, with the method's own name under "method" (a state
                   needs none)
    taps.parent    "sha256:<hex>": fingerprint of the base, or `taps.digest` of a shared file
    taps.parts     JSON: module -> {"facts": {...}, "tensors": [...]}: every part, by the name of its base module ("" is
                   the base itself), with sorted names of its tensors. Facts name the part's "kind"; "gate", where
                   there is one, is {"learn": bool, "open": bool, "threshold": float}; all else is the kind's
    taps.labels    JSON list of class names (optional)
    taps.metrics   JSON object (optional)
    taps.versions  JSON: {"taps_ext": ..., "torch": ...} of the writer
    taps.digests   JSON: tensor -> "sha256:<hex>", for exactly the tensors in the file
    taps.digest    "sha256:<hex>" over the header without this entry: the identity of the file

States, and all files of 1.0 and 1.1, have these in the place of `taps.parts` (a state's are empty but for its values):

    taps.layers    JSON: layer -> {"learn": bool, "open": bool}
    taps.codecs    JSON: layer -> "dense" or "weight", for exactly the open layers
    taps.contents  JSON: {"head": [...], "norms": [...], "values": [...]}, sorted names of all further tensors
    taps.head      JSON object that says how to rebuild the head (optional)

Any other `taps.*` key is refused; keys outside `taps.` are kept as they are. Version 0.1 wrote a state as a task whose
method is "trainer-state": it is read as the state that it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import older, strict_json
from .errors import DigestError, FormatVersionError, KindError, LimitError, MetadataError, Path, UnknownKeyError, show
from .format import FORMAT, FORMAT_KEY, MAX_ENTRIES, MAX_ENTRY_TOKENS, PATCH_KEY, check_name
from .table import Claim, PartEntry, check_names, check_parts, claims_of, is_strings

INCOMPLETE = "a file of format 1.0 does not list parts without tensors: load it into its model, and save the task there"

KINDS = ("task", "shared", "state")
_MINOR_OF_KIND = {"task": 2, "shared": 2, "state": 1}
_STATE_OF_0_1 = {"method": "trainer-state"}
_REQUIRED = ("format", "kind", "parent", "versions", "digests", "digest")
_OPTIONAL = ("method", "name", "labels", "metrics")
_OLDER = ("layers", "codecs", "contents")
_KNOWN = frozenset("taps." + key for key in (*_REQUIRED, *_OPTIONAL, *_OLDER, "head", "parts"))
_JSON = ("method", "parts", *_OLDER, "head", "labels", "metrics", "versions", "digests")
_OBJECTS = ("layers", "codecs", "contents", "parts")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The `taps.*` entries, parsed.

    `parts` is what a task or shared file holds, `values` what a state does. `method` is empty where there is none,
    `extra` holds entries outside `taps.`; digests are the business of `io`. `older` are the claims of a file of 1.0 or
    1.1, whose tensors have other names.
    """

    kind: str
    parent: str
    method: dict[str, Any] = field(default_factory=dict)
    parts: Mapping[str, PartEntry] = field(default_factory=dict)
    values: tuple[str, ...] = ()
    labels: list[str] | None = None
    metrics: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    name: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    older: Mapping[str, Claim] | None = field(default=None, compare=False)

    @property
    def complete(self) -> bool:
        """Whether the table lists all parts. That of an older file lacks those without tensors and gates."""
        return self.older is None

    def to_strings(self, *, path: Path) -> dict[str, str]:
        """The entries as stored, without digests. Raises the errors of `validate`, and MetadataError where the table is
        that of an older file.
        """
        self.validate(path=path)
        if not self.complete:
            raise MetadataError(path, INCOMPLETE)
        strings = dict(self.extra)
        strings[FORMAT_KEY] = f"{FORMAT[0]}.{_MINOR_OF_KIND[self.kind]}"
        strings["taps.kind"] = self.kind
        if self.method:
            strings["taps.method"] = strict_json.dumps(self.method)
        strings["taps.parent"] = self.parent
        if self.kind == "state":
            contents = {"head": [], "norms": [], "values": list(self.values)}
            strings |= {"taps.layers": "{}", "taps.codecs": "{}", "taps.contents": strict_json.dumps(contents)}
        else:
            strings["taps.parts"] = strict_json.dumps(_table(self.parts))
        strings["taps.versions"] = strict_json.dumps(self.versions)
        if self.name:
            strings["taps.name"] = self.name
        for key, value in (("labels", self.labels), ("metrics", self.metrics)):
            if value is not None:
                strings["taps." + key] = strict_json.dumps(value)
        return strings

    def validate(self, *, path: Path, parsed: bool = False) -> None:
        """Raises MetadataError, KindError, GateRecordError, HeaderError, TensorNameError or LimitError. `parsed`: what
        was read is JSON, as what is written may not be.
        """
        if self.kind not in KINDS:
            raise KindError(path, f"taps.kind: expected one of {', '.join(map(repr, KINDS))}, got {show(self.kind)}")
        if not isinstance(self.parent, str) or not _DIGEST.fullmatch(self.parent):
            raise MetadataError(path, f"taps.parent: expected 'sha256:' and 64 hex digits, got {show(self.parent)}")
        if self.name:
            check_name(self.name, path=path, what="task")
        _check_method(self.kind, self.method, path=path)
        if self.metrics is not None and not isinstance(self.metrics, dict):
            raise MetadataError(path, f"taps.metrics: expected a JSON object, got {show(self.metrics)}")
        if self.labels is not None and not is_strings(self.labels):
            raise MetadataError(path, f"taps.labels: expected a list of strings, got {show(self.labels)}")
        if not isinstance(self.versions, dict) or not is_strings(list(self.versions.values())):
            raise MetadataError(path, f"taps.versions: expected names and version strings, got {show(self.versions)}")
        if self.kind == "state" and self.parts:
            raise MetadataError(path, "taps.kind: a state file holds values, got parts")
        if self.kind != "state" and self.values:
            raise MetadataError(path, f"taps.kind: a {self.kind} file holds parts, got values")
        check_names(self.values, "taps.contents: values", path=path)
        check_parts(self.parts, path=path)
        for key, text in self.extra.items():
            if not isinstance(key, str) or key.startswith("taps.") or not isinstance(text, str):
                raise UnknownKeyError(path, f"__metadata__: extra key {show(key)}: expected text outside 'taps.'")
        if parsed:
            return
        tables = {"method": self.method, "metrics": self.metrics, "labels": self.labels, "versions": self.versions}
        for key, value in {**tables, "parts": _table(self.parts)}.items():
            strict_json.check(value, path=path, where=f"taps.{key}")
        strict_json.check(dict(self.extra), path=path, where="__metadata__")

    def claims(self) -> Mapping[str, Claim]:
        """Which tensors the file must hold: stored name -> claim, exactly one each (see `table.claims_of`).

        A state's value `v` is stored as `v.value`.
        """
        if self.older is not None:
            return self.older
        if self.kind == "state":
            return {f"{name}.value": Claim("", name) for name in self.values}
        return claims_of(self.parts)


def entry_tokens() -> strict_json.Tokens:
    """What the JSON of all of a file's entries may have together."""
    return strict_json.Tokens(MAX_ENTRY_TOKENS)


def check_tokens(strings: Mapping[str, str], *, path: Path) -> None:
    """Raises LimitError where the entries to be written, digests included, are more than a reader reads."""
    tokens = entry_tokens()
    for key in _JSON:
        if (text := strings.get("taps." + key)) is not None:
            strict_json.scan(text, path=path, where=f"taps.{key}", max_tokens=tokens)


def check_entries(strings: Mapping[str, str], *, path: Path) -> None:
    """Raises LimitError for more entries than are worth sorting."""
    if len(strings) > MAX_ENTRIES:
        raise LimitError(path, f"__metadata__: {len(strings)} entries, at most {MAX_ENTRIES} allowed")


def is_state(strings: Mapping[str, str]) -> bool:
    """Whether entries are a state's, or one of 0.1."""
    kind = strings.get("taps.kind")
    return kind == "state" or (kind == "task" and strings.get("taps.method") == strict_json.dumps(_STATE_OF_0_1))


def check_version(strings: Mapping[str, str], *, path: Path) -> None:
    """Raises FormatVersionError unless `taps.format` is there and has our major version."""
    text = strings.get(FORMAT_KEY)
    if text is None:
        kind = "a patch (taps patch inspect)" if PATCH_KEY in strings else "another safetensors file"
        raise FormatVersionError(path, f"__metadata__ has no 'taps.format': not a task file, but {kind}")
    match = _VERSION.fullmatch(text)
    if match is None:
        raise FormatVersionError(path, f"taps.format: expected major.minor, got {show(text)}")
    if int(match[1]) != FORMAT[0]:
        raise FormatVersionError(path, f"taps.format: expected {FORMAT[0]}.x, got {show(text)}")


def parse_metadata(strings: Mapping[str, str], *, path: Path, tokens: strict_json.Tokens | None = None) -> Metadata:
    """Parses and validates the `taps.*` entries of a file, whose JSON is taken from `tokens`. Raises the errors of
    `Metadata.validate`, CodecError, FormatVersionError, UnknownKeyError and DuplicateKeyError.
    """
    check_version(strings, path=path)
    tokens = tokens or entry_tokens()
    ours = {key for key in strings if key.startswith("taps.")}
    if unknown := sorted(ours - _KNOWN):
        raise UnknownKeyError(
            path,
            f"__metadata__: unknown key {show(unknown[0])}; the file is of format {strings['taps.format']}, "
            f"this reader knows {FORMAT[0]}.{FORMAT[1]}",
        )
    kind, tabled = strings.get("taps.kind"), "taps.parts" in ours
    required = (*(() if kind == "state" else ("method",)), *_REQUIRED, *(() if tabled else _OLDER))
    if missing := [key for key in required if "taps." + key not in ours]:
        raise MetadataError(path, f"__metadata__: expected the key 'taps.{missing[0]}', got none")
    if tabled and (both := [key for key in (*_OLDER, "head") if "taps." + key in ours]):
        raise MetadataError(path, f"__metadata__: expected 'taps.parts' or 'taps.{both[0]}', got both")

    def table(key: str, *, default: object = None) -> Any:
        if "taps." + key not in ours:
            return default
        value = strict_json.loads(strings["taps." + key], path=path, where=f"taps.{key}", max_tokens=tokens)
        if value is None or (key in _OBJECTS and not isinstance(value, dict)):
            raise MetadataError(path, f"taps.{key}: expected a JSON object, got {show(value)}")
        return value

    if strings.get("taps.name") == "":
        raise MetadataError(path, "taps.name: expected a name, got ''")
    kind, method = strings["taps.kind"], table("method", default={})
    if kind == "state" and "taps.method" in ours and not method:
        raise MetadataError(path, f"taps.method: expected none in a state, or a method, got {show(method)}")
    if kind == "task" and method == _STATE_OF_0_1 and not tabled:
        kind, method = "state", {}
    parts: dict[str, PartEntry] = {}
    values: tuple[str, ...] = ()
    claims: dict[str, Claim] | None = None
    if tabled:
        if kind == "state":
            raise MetadataError(path, "taps.kind: a state file holds values, got 'taps.parts'")
        parts = _parse_parts(table("parts"), path=path)
    else:
        layers, codecs, contents = (table(key) for key in _OLDER)
        tables = older.Tables(layers, codecs, contents, table("head"))
        older.check_tables(tables, path=path)
        if kind == "state":
            values = older.values_of(tables, path=path)
        else:
            _check_method(kind, method, path=path)  # thresholds are read from it
            parts, claims = older.to_parts(tables, method, path=path)
    metadata = Metadata(
        kind=kind,
        method=method,
        parent=strings["taps.parent"],
        parts=parts,
        values=values,
        labels=table("labels"),
        metrics=table("metrics"),
        versions=table("versions"),
        name=strings.get("taps.name", ""),
        extra={key: value for key, value in strings.items() if key not in ours},
        older=claims,
    )
    metadata.validate(path=path, parsed=True)
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
    elif (expected, got) == ("task", "shared"):
        advice = ", which tasks build on: load one of their files, or this one with load_shared"
    elif (expected, got) == ("shared", "task"):
        advice = ": load it with load_task"
    raise KindError(path, f"taps.kind: expected a {expected} file, got a {got} file{advice}")


def parse_digests(
    strings: Mapping[str, str], tensors: Mapping[str, object], *, path: Path, tokens: strict_json.Tokens | None = None
) -> dict[str, str]:
    """The table of tensor digests; raises DigestError unless it has exactly one well-formed digest per
    tensor.
    """
    digests = strict_json.loads(
        strings.get("taps.digests", "null"), path=path, where="taps.digests", max_tokens=tokens or entry_tokens()
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


def _check_method(kind: str, method: dict[str, Any], *, path: Path) -> None:
    if not isinstance(method, dict):
        raise MetadataError(path, f"taps.method: expected a JSON object, got {show(method)}")
    name = method.get("method")
    if (method or kind != "state") and (not isinstance(name, str) or not name):
        raise MetadataError(path, f"taps.method: expected the method's name under 'method', got {show(method)}")
    if kind == "task" and method == _STATE_OF_0_1:  # it would be read as a state
        raise MetadataError(path, f"taps.method: expected a task's method, got {name!r}, the name of 0.1's states")


def _table(parts: Mapping[str, PartEntry]) -> dict[str, Any]:
    return {module: {"facts": entry.facts, "tensors": list(entry.tensors)} for module, entry in parts.items()}


def _parse_parts(table: dict[str, Any], *, path: Path) -> dict[str, PartEntry]:
    for module, entry in table.items():
        if not isinstance(entry, dict) or entry.keys() != {"facts", "tensors"} or not is_strings(entry["tensors"]):
            raise MetadataError(
                path, f"taps.parts: part {show(module)}: expected facts and names of tensors, got {show(entry)}"
            )
    return {module: PartEntry(entry["facts"], tuple(entry["tensors"])) for module, entry in table.items()}
