"""The `.tapspatch` file: a safetensors container whose header vouches for every byte (docs/patch.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TaskFileError
from ..store import strict_json
from ..store.descriptors import open_regular, read_all, write_all
from ..store.durable import replacing
from ..store.errors import (
    DigestError,
    DtypeMismatchError,
    FormatVersionError,
    LimitError,
    MetadataError,
    MissingTensorError,
    Path,
    ShapeMismatchError,
    UnexpectedTensorError,
    UnknownDtypeError,
    UnknownKeyError,
    show,
)
from ..store.format import (
    ALL_DTYPES,
    DIGEST_KEY,
    MAX_TENSOR_BYTES,
    MAX_TENSORS,
    PATCH_KEY,
    Header,
    TensorInfo,
    check_canonical,
    check_name,
    count_bytes,
    encode_header,
    header_digest,
    header_length,
    parse_header,
    plan_layout,
)
from ..store.metadata import parse_digests
from ..store.tensors import TensorHash, check_bool, memory
from . import kernels
from .codes import WIDTHS, CodeFault, Fault
from .errors import IndexCodeError, IndexRangeError, IndexTwiceError
from .kernels import WHOLE, Numbers, unit_of, units_of
from .sums import MODULUS, state_digest

FORMAT = (1, 0)
_KEYS = {PATCH_KEY, "taps.before", "taps.after", "taps.tensors", "taps.digests", DIGEST_KEY}
MAX_BYTES = 1 << 62
_MAX_TOKENS = 1 << 21
_SUM = re.compile(r"[0-9a-f]{32}")


class Form(NamedTuple):
    """A tensor of a state: dtype as safetensors names it, shape, and the sum of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sum: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return ALL_DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return units_of(self.torch_dtype, self.shape) * unit_of(self.torch_dtype)


class Part(NamedTuple):
    """What a patch holds of a tensor that changes: coding, index (`places`) and values, as uint8 on the CPU, and the
    sum of the elements that they replace (0 where there are none)."""

    coding: str
    places: Tensor
    values: Tensor
    replaced: int


class Entry(NamedTuple):
    """A tensor of the two states: before and after, None where it is not there; `part` is None where it stays."""

    before: Form | None
    after: Form | None
    part: Part | None

    @property
    def in_place(self) -> bool:
        """Whether it keeps dtype and shape."""
        return self.before is not None and self.after is not None and self.before[:2] == self.after[:2]

    def numbers(self) -> Numbers:
        """The change as the kernels take it."""
        assert self.after is not None and self.part is not None
        dtype = self.after.torch_dtype
        coding, index, values, _ = self.part
        return Numbers(coding, index, values, unit_of(dtype), units_of(dtype, self.after.shape))

    @property
    def elements(self) -> int:
        """How many elements it writes (halves of elements of 16 bytes)."""
        if self.part is None or self.after is None:
            return 0
        return len(self.part.values) // unit_of(self.after.torch_dtype)


@dataclass(frozen=True, eq=False)
class Patch:
    """The difference of two states.

    Attributes:
        entries: every tensor of the two, by name, in sorted order. path: where it was read, for messages.
        before, after: digests "sha256:<hex>" of the states (`patch.digest`).
    """

    entries: Mapping[str, Entry]
    path: Path
    before: str
    after: str

    @property
    def changed(self) -> dict[str, Entry]:
        """The tensors that change."""
        return {name: entry for name, entry in self.entries.items() if entry.before != entry.after}

    @property
    def removed(self) -> int:
        """How many tensors go."""
        return sum(entry.after is None for entry in self.entries.values())

    @property
    def added(self) -> int:
        """How many tensors are new."""
        return sum(entry.before is None for entry in self.entries.values())

    @property
    def elements(self) -> int:
        """How many elements it writes."""
        return sum(entry.elements for entry in self.entries.values())

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values."""
        parts = [entry.part for entry in self.entries.values() if entry.part is not None]
        return sum(len(part.places) + len(part.values) for part in parts)

    def save(self, path: Path) -> int:
        """Writes it, durably and at once as `store.write` does; returns the file's bytes. The same patch gives the same
        bytes."""
        header, tensors = _encoded(self, path)
        with replacing(path) as fd:
            write_all(fd, memoryview(header))
            for tensor in tensors:
                write_all(fd, memory(tensor))
        return len(header) + sum(len(tensor) for tensor in tensors)

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        header, tensors = _encoded(self, self.path)
        return b"".join([header, *(bytes(memory(tensor)) for tensor in tensors)])


def make(entries: Mapping[str, Entry], path: Path) -> Patch:
    """A patch of these tensors, in sorted order."""
    ordered = dict(sorted(entries.items()))
    before, after = (
        state_digest((name, *form) for name, entry in ordered.items() if (form := entry[side]) is not None)
        for side in (0, 1)
    )
    return Patch(ordered, path, before, after)


def load(path: Path) -> Patch:
    """Reads a patch and proves all of it that can be proven without the state: header, digests, indices, and that
    before - replaced + new = after for every tensor.

    Needs the file's size in memory, allocated only after the header is proven to describe exactly the file.

    Raises:
        TaskFileError: in a subclass that says what is wrong; the message names the key or tensor.
    """
    with open_regular(path) as (fd, size):
        prefix = bytearray(min(8, size))
        read_all(fd, memoryview(prefix), path=path)
        raw = bytearray(header_length(bytes(prefix), size, path=path))
        read_all(fd, memoryview(raw), path=path)
        header = parse_header(bytes(raw), size, path=path)
        facts = _parse(header, bytes(raw), path)
        data = torch.empty(size - header.data_begin, dtype=torch.uint8)
        read_all(fd, memory(data), path=path)
    return _filled(facts, header, data, path)


def parse(data: bytes, *, path: Path = "patch") -> Patch:
    """`load` of bytes at hand."""
    size = len(data)
    end = 8 + header_length(data[:8], size, path=path)
    raw = data[8:end]
    header = parse_header(raw, size, path=path)
    facts = _parse(header, raw, path)
    rest = bytearray(memoryview(data)[end:])
    held = torch.frombuffer(rest, dtype=torch.uint8) if rest else torch.empty(0, dtype=torch.uint8)
    return _filled(facts, header, held, path)


class _Facts(NamedTuple):
    before: Form | None
    after: Form | None
    coding: str | None
    replaced: int


def _hex(number: int) -> str:
    return f"{number:032x}"


def _form_json(form: Form | None) -> Any:
    return None if form is None else {"dtype": form.dtype, "shape": list(form.shape), "sum": _hex(form.sum)}


def _entry_json(entry: Entry) -> dict[str, Any]:
    facts: dict[str, Any] = {"after": _form_json(entry.after), "before": _form_json(entry.before)}
    if entry.part is not None:
        facts["coding"] = entry.part.coding
        if entry.part.coding != WHOLE:
            facts["replaced"] = _hex(entry.part.replaced)
    return facts


def _stored(name: str, coding: str) -> list[str]:
    return [f"values:{name}"] if coding == WHOLE else [f"index:{name}", f"values:{name}"]


def _encoded(patch: Patch, path: Path) -> tuple[bytes, list[Tensor]]:
    table = {name: _entry_json(entry) for name, entry in patch.entries.items()}
    tensors: dict[str, Tensor] = {}
    for name, entry in patch.entries.items():
        check_name(name, path=path)
        if entry.part is not None:
            held = {f"index:{name}": entry.part.places, f"values:{name}": entry.part.values}
            tensors.update({stored: held[stored].contiguous() for stored in _stored(name, entry.part.coding)})
    plan = plan_layout({name: ("U8", (len(tensor),)) for name, tensor in tensors.items()}, path=path)
    strings = {
        PATCH_KEY: "{}.{}".format(*FORMAT),
        "taps.before": patch.before,
        "taps.after": patch.after,
        "taps.tensors": strict_json.dumps(table),
        "taps.digests": strict_json.dumps({name: _digest(plan[name], tensors[name]) for name in plan}),
    }
    strings[DIGEST_KEY] = header_digest(plan, strings, path=path)
    return encode_header(plan, strings, path=path), [tensors[name] for name in plan]


def _digest(info: TensorInfo, tensor: Tensor) -> str:
    hasher = TensorHash(info.dtype, info.shape)
    hasher.update(memory(tensor))
    return hasher.digest()


def _parse(header: Header, raw: bytes, path: Path) -> dict[str, _Facts]:
    """The table of tensors, proven to be about exactly the stored ones, with their lengths."""
    strings, tensors = header.metadata, header.tensors
    version = strings.get(PATCH_KEY)
    if version is None:
        raise MetadataError(path, f"__metadata__: expected the entry {PATCH_KEY!r} of a patch, got none")
    if not re.fullmatch(r"\d{1,4}\.\d{1,4}", version, re.ASCII) or int(version.split(".")[0]) != FORMAT[0]:
        raise FormatVersionError(path, f"{PATCH_KEY}: expected version {FORMAT[0]}.x, got {show(version)}")
    unknown = sorted(key for key in strings if key.startswith("taps.") and key not in _KEYS)
    if unknown:
        raise UnknownKeyError(path, f"key {show(unknown[0])}: this version cannot honour it")
    missing = sorted(_KEYS - strings.keys() - {DIGEST_KEY, "taps.digests"})
    if missing:
        raise MetadataError(path, f"__metadata__: expected the entry {missing[0]!r}, got none")
    check_canonical(header, raw, path=path)
    table = strict_json.loads(strings["taps.tensors"], path=path, where="taps.tensors", max_tokens=_MAX_TOKENS)
    if not isinstance(table, dict):
        raise MetadataError(path, f"taps.tensors: expected a JSON object, got {show(table)}")
    if len(table) > MAX_TENSORS:
        raise LimitError(path, f"taps.tensors: {len(table)} tensors, at most {MAX_TENSORS} allowed")
    facts = {name: _facts(name, table[name], path) for name in sorted(table)}
    expected: dict[str, tuple[str, _Facts]] = {}
    for name, fact in facts.items():
        for stored in _stored(name, fact.coding) if fact.coding is not None else []:
            expected[stored] = (name, fact)
    for stored in expected:
        if stored not in tensors:
            raise MissingTensorError(path, f"tensor {show(stored)}: expected one, as taps.tensors says, got none")
    for stored, info in tensors.items():
        if stored not in expected:
            raise UnexpectedTensorError(path, f"tensor {show(stored)}: nothing in taps.tensors is about it")
        if info.dtype != "U8" or len(info.shape) != 1:
            raise DtypeMismatchError(
                path, f"tensor {show(stored)}: expected a vector of U8, got {info.dtype} {show(list(info.shape))}"
            )
        _check_length(stored, info.nbytes, *expected[stored], path=path)
    ends = {
        "taps.before": {name: fact.before for name, fact in facts.items()},
        "taps.after": {name: fact.after for name, fact in facts.items()},
    }
    for key, forms in ends.items():
        actual = state_digest((name, *form) for name, form in forms.items() if form is not None)
        if strings[key] != actual:
            raise DigestError(path, f"{key}: states {show(strings[key])}, taps.tensors has {actual}")
    return facts


def _check_length(stored: str, nbytes: int, name: str, fact: _Facts, *, path: Path) -> None:
    """Raise unless an index or values have a length that they can have."""
    assert fact.after is not None and fact.coding is not None
    dtype = fact.after.torch_dtype
    unit, units = unit_of(dtype), units_of(dtype, fact.after.shape)
    if stored == f"values:{name}":
        if fact.coding == WHOLE and nbytes != unit * units:
            raise ShapeMismatchError(path, f"tensor {show(stored)}: expected {unit * units} bytes, got {nbytes}")
        if nbytes % unit:
            raise ShapeMismatchError(path, f"tensor {show(stored)}: expected elements of {unit} bytes, got {nbytes}")
        return
    width = WIDTHS[fact.coding]
    if width == 0 and nbytes != (units + 7) // 8:
        raise ShapeMismatchError(path, f"tensor {show(stored)}: expected {(units + 7) // 8} bytes, got {nbytes}")
    if width and nbytes % width:
        raise ShapeMismatchError(path, f"tensor {show(stored)}: expected codes of {width} bytes, got {nbytes}")


def _facts(name: str, value: Any, path: Path) -> _Facts:
    check_name(name, path=path)

    def refuse(problem: str) -> MetadataError:
        return MetadataError(path, f"taps.tensors: tensor {show(name)}: {problem}")

    if not isinstance(value, dict) or not {"before", "after"} <= value.keys() <= {
        "before",
        "after",
        "coding",
        "replaced",
    }:
        raise refuse(f"expected before and after, coding and replaced, got {show(value)}")
    before, after = (_parse_form(name, value[side], path) for side in ("before", "after"))
    coding = value.get("coding")
    if before is None and after is None:
        raise refuse("expected it before or after, got neither")
    stays = before == after or after is None
    if stays != ("coding" not in value):
        raise refuse(f"coding: expected {'none' if stays else 'one'}, got {show(coding)}")
    if not stays and (not isinstance(coding, str) or coding not in {*WIDTHS, WHOLE}):
        raise refuse(f"coding: expected one of {', '.join(WIDTHS)}, {WHOLE}, got {show(coding)}")
    sparse = coding is not None and coding != WHOLE
    if sparse and (before is None or after is None or before[:2] != after[:2]):
        raise refuse(f"coding: expected {WHOLE} of a tensor that is new or of another dtype or shape, got {coding}")
    if sparse != ("replaced" in value):
        raise refuse(f"replaced: expected {'a sum' if sparse else 'none'}, got {show(value.get('replaced'))}")
    replaced = _parse_sum(value["replaced"], refuse) if sparse else 0 if before is None else before.sum
    return _Facts(before, after, coding, replaced)


def _parse_sum(value: Any, refuse: Any) -> int:
    if not isinstance(value, str) or not _SUM.fullmatch(value):
        raise refuse(f"expected a sum of 32 hexadecimal digits, got {show(value)}")
    return int(value, 16)


def _parse_form(name: str, value: Any, path: Path) -> Form | None:
    def refuse(problem: str) -> MetadataError:
        return MetadataError(path, f"taps.tensors: tensor {show(name)}: {problem}")

    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "sum"}:
        raise refuse(f"expected dtype, shape and sum, got {show(value)}")
    dtype, shape = value["dtype"], value["shape"]
    if not isinstance(dtype, str) or dtype not in ALL_DTYPES:
        known = " ".join(ALL_DTYPES)
        raise UnknownDtypeError(path, f"tensor {show(name)}: dtype {show(dtype)}; expected one of {known}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size <= MAX_TENSOR_BYTES for size in shape):
        raise refuse(f"shape: expected sizes >= 0 below 2**63, got {show(shape)}")
    if count_bytes(name, dtype, shape, path=path) > MAX_BYTES:
        raise LimitError(path, f"tensor {show(name)}: shape {show(shape)}, at most {MAX_BYTES} bytes allowed")
    return Form(dtype, tuple(shape), _parse_sum(value["sum"], refuse))


def _filled(facts: Mapping[str, _Facts], header: Header, data: Tensor, path: Path) -> Patch:
    strings, tensors = header.metadata, header.tensors
    digests = parse_digests(strings, tensors, path=path)
    held: dict[str, Tensor] = {}
    for stored, info in tensors.items():
        held[stored] = data[info.begin : info.end]
        if _digest(info, held[stored]) != digests[stored]:
            raise DigestError(path, f"tensor {show(stored)}: expected {digests[stored]}, got other bytes")
    empty = torch.empty(0, dtype=torch.uint8)
    entries: dict[str, Entry] = {}
    for name, fact in facts.items():
        part = None
        if fact.coding is not None:
            index = held.get(f"index:{name}", empty)
            part = Part(fact.coding, index, held[f"values:{name}"], fact.replaced)
        entries[name] = Entry(fact.before, fact.after, part)
        _prove(name, entries[name], path)
    return Patch(entries, path, strings["taps.before"], strings["taps.after"])


def _prove(name: str, entry: Entry, path: Path) -> None:
    """Raise unless the index is one of the tensor, and before - replaced + new = after."""
    if entry.part is None:
        return
    assert entry.after is not None
    if entry.after.dtype == "BOOL":
        check_bool(name, memory(entry.part.values), path=path)
    try:
        new = kernels.check(entry.numbers())
    except CodeFault as fault:
        raise index_error(name, entry, fault, path) from None
    before = entry.part.replaced if entry.part.coding == WHOLE or entry.before is None else entry.before.sum
    if (before - entry.part.replaced + new - entry.after.sum) % MODULUS:
        raise DigestError(path, f"tensor {show(name)}: its values do not lead from the state before to the one after")


def index_error(name: str, entry: Entry, fault: CodeFault, path: Path) -> TaskFileError:
    """The error for an index that cannot be read."""
    units = entry.numbers().units
    where = f"index of tensor {show(name)}: "
    if fault.fault is Fault.RANGE:
        return IndexRangeError(path, where + f"expected numbers from 0 to {units - 1}, got {fault.at}")
    if fault.fault is Fault.TWICE:
        return IndexTwiceError(path, where + f"element {fault.at} is there twice")
    if fault.fault is Fault.OPEN:
        return IndexCodeError(path, where + "it ends within a gap")
    return IndexCodeError(path, where + f"expected {entry.elements} numbers for as many values, got {fault.at}")
