"""No byte of a patch can change unnoticed, and no bytes make the reader do anything but refuse or read.

`make fuzz` flips all eight bits, and runs the random tests for minutes from a fresh seed.
"""

from __future__ import annotations

import hashlib
import json
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patch_states import copies, example, same
from stages import THOROUGH
from store_files import Draft, assemble
from torch import Tensor

from taps_ext import TaskFileError, patch
from taps_ext.patch.errors import IndexCodeError, IndexRangeError, IndexTwiceError
from taps_ext.patch.format import Patch
from taps_ext.store.errors import (
    DigestError,
    DtypeMismatchError,
    FormatVersionError,
    LimitError,
    MetadataError,
    MissingTensorError,
    ShapeMismatchError,
    TruncatedFileError,
    UnexpectedTensorError,
    UnknownDtypeError,
    UnknownKeyError,
)

RUNS = settings(
    max_examples=20_000 if THOROUGH else 200,
    deadline=None,
    derandomize=not THOROUGH,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As small as a patch gets with a sparse tensor, a whole one and a boolean one."""
    old = {"a": torch.arange(40, dtype=torch.int16), "b": torch.tensor(1.0), "c": torch.zeros(40, dtype=torch.bool)}
    new = copies(old)
    new["a"][torch.tensor([3, 30])] = 7
    new["b"] += 1
    new["c"][::2] = True
    return old, new


OLD, NEW = pair()
SMALL = patch.diff(OLD, NEW).to_bytes()
HONEST = patch.diff(*example()).to_bytes()


def accepted(blob: bytes) -> Patch | None:
    """The patch, where the bytes are read; anything raised that is not a TaskFileError fails the test."""
    try:
        return patch.parse(blob)
    except TaskFileError as error:
        assert str(error).isprintable() and len(error.problem) < 1000
        return None


def test_every_bit_counts() -> None:
    assert accepted(SMALL)
    for index in range(len(SMALL)):
        for bit in range(8) if THOROUGH else (index % 8, 5):  # bit 5 is the case of a letter
            flipped = bytearray(SMALL)
            flipped[index] ^= 1 << bit
            assert not accepted(bytes(flipped)), f"byte {index} bit {bit}"


def test_every_length_counts(tmp_path: Path) -> None:
    for length in range(0, len(SMALL), 1 if THOROUGH else 3):
        assert not accepted(SMALL[:length]), f"length {length}"
        assert not accepted(SMALL + SMALL[: length + 1])
    path = tmp_path / "cut.tapspatch"
    for length in range(0, len(SMALL), 7):
        path.write_bytes(SMALL[:length])
        with pytest.raises(TaskFileError):
            patch.load(path)


@RUNS
@given(blob=st.binary(max_size=400))
def test_noise(blob: bytes) -> None:
    assert not accepted(blob)


@RUNS
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=6), st.integers(0, 6)), max_size=5))
def test_spliced(edits: list[tuple[int, bytes, int]]) -> None:
    blob = HONEST
    for position, insert, remove in edits:
        position %= len(blob) + 1
        blob = blob[:position] + insert + blob[position + remove :]
    assert bool(accepted(blob)) == (blob == HONEST)


def signed(draft: Draft, *, ends: bool = True) -> bytes:
    """A draft with right digests: of the tensors, the header, and (`ends`) of the states."""
    table = json.loads(draft.metadata["taps.tensors"]) if ends else None
    for end in ("before", "after") if isinstance(table, dict) else ():
        total = hashlib.sha256(b"taps state 1\n")
        try:
            for name, entry in sorted(table.items()):
                if (form := entry[end]) is not None:
                    line = [name, form["dtype"], form["shape"], form["sum"]]
                    total.update(json.dumps(line).encode() + b"\n")
        except (TypeError, KeyError):
            continue
        draft.metadata[f"taps.{end}"] = "sha256:" + total.hexdigest()
    return draft.build()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
LIKELY = st.sampled_from(
    [
        "gap8",
        "gap16",
        "gap32",
        "bitmask",
        "whole",
        "BOOL",
        "I16",
        "U8",
        "C128",
        "0" * 32,
        None,
        [],
        [40],
        [2**62],
        [2**63],
    ]
)


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The way to everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inner for place in places(item, (*path, key))]


@RUNS
@given(pick=st.integers(0, 1 << 16), value=JSON | LIKELY, drop=st.booleans())
def test_signed_nonsense_in_the_table(pick: int, value: object, drop: bool) -> None:
    """Right digests over a wrong table: refused, or it means the very same."""
    draft = Draft.of(SMALL)
    table = json.loads(draft.metadata["taps.tensors"])
    everywhere = places(table)
    *way, last = everywhere[pick % len(everywhere)]
    inside: Any = table
    for key in way:
        inside = inside[key]
    if drop:
        del inside[last]
    else:
        inside[last] = value
    try:
        draft.metadata["taps.tensors"] = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        blob = signed(draft)
    except (UnicodeEncodeError, ValueError):
        return
    check_meaning(blob)


@RUNS
@given(
    which=st.sampled_from(["index:a", "values:a", "values:b", "index:c", "values:c"]),
    data=st.binary(max_size=12) | st.lists(st.sampled_from([0, 1, 2, 3, 27, 255]), max_size=9).map(bytes),
    form=st.sampled_from(["U8", "I8", "I16"]),
)
def test_signed_nonsense_in_the_data(which: str, data: bytes, form: str) -> None:
    draft = Draft.of(SMALL)
    size = len(data) // (2 if form == "I16" else 1)
    draft.tensors[which] = (form, [size], data)
    check_meaning(signed(draft))


def check_meaning(blob: bytes) -> None:
    """What is read either applies to the state that it says and gives the one that it says, or changes nothing."""
    found = accepted(blob)
    if found is None:
        return
    target = copies(OLD)
    try:
        patch.apply(target, found)
    except TaskFileError as error:
        assert same(target, OLD) and len(str(error)) < 1200
    else:
        assert patch.digest(target) == found.after


# ------------------------------------------------------------------------- each mistake has its own words


def edited(change: Any, **data: bytes) -> bytes:
    draft = Draft.of(SMALL)
    table = json.loads(draft.metadata["taps.tensors"])
    change(table)
    draft.metadata["taps.tensors"] = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for name, raw in data.items():
        stored = name.replace("_", ":")
        draft.tensors[stored] = ("U8", [len(raw)], raw)
    return signed(draft)


def nothing(table: Any) -> None:
    pass


def entry(name: str, **changes: Any) -> Any:
    return lambda table: table[name].update(changes)


REFUSALS: list[tuple[str, bytes, type[TaskFileError], str]] = [
    (
        "range",
        edited(nothing, index_a=bytes([4, 37])),
        IndexRangeError,
        "tensor 'a': expected numbers from 0 to 39, got 40",
    ),
    ("twice", edited(nothing, index_a=bytes([4, 0])), IndexTwiceError, "tensor 'a': element 3 is there twice"),
    (
        "few",
        edited(nothing, index_a=bytes([4])),
        IndexCodeError,
        "'a': expected 2 numbers for as many values, got 1",
    ),
    ("many", edited(nothing, index_a=bytes([4, 1, 1])), IndexCodeError, "expected 2 numbers for as many values, got 3"),
    ("other", edited(nothing, index_a=bytes([5, 27])), DigestError, "tensor 'a': its values do not lead"),
    ("values", edited(nothing, values_a=bytes([8, 0, 7, 0])), DigestError, "tensor 'a': its values do not lead"),
    ("odd", edited(nothing, values_a=bytes([7, 0, 7])), ShapeMismatchError, "'values:a': expected elements of 2 bytes"),
    ("whole", edited(nothing, values_b=bytes(5)), ShapeMismatchError, "'values:b': expected 4 bytes, got 5"),
    ("mask", edited(nothing, index_c=bytes(4)), ShapeMismatchError, "'index:c': expected 5 bytes, got 4"),
    ("bool", edited(nothing, values_c=bytes([2]) * 20), DtypeMismatchError, "'c': expected only bytes 0 and 1"),
    ("surplus", edited(nothing, index_b=bytes(1)), UnexpectedTensorError, "'index:b': nothing in taps.tensors"),
    ("coding", edited(entry("a", coding="gap9")), MetadataError, "tensor 'a': coding: expected one of gap8"),
    (
        "wide",
        edited(entry("a", coding="gap16"), index_a=bytes(3)),
        ShapeMismatchError,
        "'index:a': expected codes of 2",
    ),
    ("no index", edited(entry("b", coding="gap8", replaced="0" * 32)), MissingTensorError, "'index:b': expected one"),
    ("sum", edited(entry("a", replaced="x")), MetadataError, "tensor 'a': expected a sum of 32 hexadecimal digits"),
    ("dtype", edited(lambda t: t["a"]["after"].update(dtype="F4")), UnknownDtypeError, "tensor 'a': dtype 'F4'"),
    ("form", edited(lambda t: t["a"]["after"].update(shape=[41])), MetadataError, "tensor 'a': coding: expected whole"),
    ("shape", edited(lambda t: t["a"]["after"].update(shape=[-1])), MetadataError, "tensor 'a': shape: expected sizes"),
    (
        "huge",
        edited(lambda t: [t["a"][end].update(shape=[2**61 + 8]) for end in ("before", "after")]),
        LimitError,
        "'a': shape",
    ),
    ("nowhere", edited(entry("a", before=None, after=None)), MetadataError, "tensor 'a': expected it before or after"),
    ("unknown", edited(entry("a", more=1)), MetadataError, "tensor 'a': expected before and after"),
]


@pytest.mark.parametrize(("blob", "kind", "words"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_refusals(blob: bytes, kind: type[TaskFileError], words: str) -> None:
    with pytest.raises(kind) as stop:
        patch.parse(blob)
    assert words in str(stop.value) and type(stop.value) is kind and len(str(stop.value)) < 600


def test_an_index_that_ends_within_a_gap() -> None:
    old = {"a": torch.zeros(1000, dtype=torch.uint8)}
    new = {"a": old["a"].index_fill(0, torch.arange(0, 600, 50), 1)}
    draft = Draft.of(patch.diff(old, new).to_bytes())
    assert draft.tensors["index:a"][2] == bytes([1] + [50] * 11)
    draft.tensors["index:a"] = ("U8", [12], bytes([1] + [50] * 10 + [255]))
    with pytest.raises(IndexCodeError, match="tensor 'a': it ends within a gap"):
        patch.parse(signed(draft))


def metadata(key: str, value: str | None) -> bytes:
    draft = Draft.of(SMALL)
    draft.metadata.pop(key, None)
    if value is not None:
        draft.metadata[key] = value
    return signed(draft, ends=False)


@pytest.mark.parametrize(
    ("blob", "kind", "words"),
    [
        (metadata("taps.patch", None), MetadataError, "'taps.patch'"),
        (metadata("taps.patch", "2.0"), FormatVersionError, "expected version 1.x, got '2.0'"),
        (metadata("taps.patch", "x" * 100_000), FormatVersionError, "got 'xxx"),
        (metadata("taps.before", None), MetadataError, "'taps.before'"),
        (metadata("taps.after", "sha256:" + "0" * 64), DigestError, "taps.after: states"),
        (metadata("taps.more", "1"), UnknownKeyError, "'taps.more'"),
        (metadata("taps.tensors", "[]"), MetadataError, "taps.tensors: expected a JSON object"),
        (assemble(b"{}", b""), MetadataError, "taps.patch"),
        ((1 << 40).to_bytes(8, "little") + b"{}", LimitError, "header length"),
        (b"", TruncatedFileError, "8 bytes"),
    ],
)
def test_refusals_of_the_header(blob: bytes, kind: type[TaskFileError], words: str) -> None:
    with pytest.raises(kind) as stop:
        patch.parse(blob)
    assert words in str(stop.value) and type(stop.value) is kind and len(str(stop.value)) < 600


def test_a_newer_minor_is_read() -> None:
    assert patch.parse(metadata("taps.patch", "1.7")).after == patch.parse(SMALL).after


def test_a_file_that_promises_much_costs_little(tmp_path: Path) -> None:
    """1 GiB by the header in a file that is short, and in a sparse one whose table is wrong."""
    huge = edited(lambda t: t["b"].update(after={**t["b"]["after"], "shape": [1 << 28]}))
    path = tmp_path / "huge.tapspatch"
    path.write_bytes(huge)
    with pytest.raises(ShapeMismatchError, match="'values:b': expected 1073741824 bytes, got 4"):
        patch.load(path)
    draft = Draft.of(SMALL)
    draft.entries["values:b"] = {"shape": [1 << 30], "data_offsets": [0, 1 << 30]}
    short = draft.build()
    sparse = tmp_path / "sparse.tapspatch"
    sparse.write_bytes(short)
    with sparse.open("rb+") as file:
        file.truncate(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for file_path in (path, sparse):
        with pytest.raises(TaskFileError):
            patch.load(file_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10
