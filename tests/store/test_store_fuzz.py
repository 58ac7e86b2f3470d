"""No byte of a task file can change unnoticed, and no bytes make the reader do anything but refuse or read.

`make fuzz` flips all eight bits, and runs the random tests for minutes from a fresh seed.
"""

from __future__ import annotations

from json import dumps
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stages import THOROUGH
from store_files import Draft, assemble, blob_of, example, tiny

from taps_ext import store
from taps_ext.store import TaskFileError

RUNS = settings(
    max_examples=20_000 if THOROUGH else 200,
    deadline=None,
    derandomize=not THOROUGH,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return blob_of(tiny(), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return blob_of(example(), tmp_path_factory.mktemp("honest"))


def accepted(path: Path, blob: bytes) -> bool:
    """Whether the file is read; anything raised that is not a TaskFileError fails the test."""
    path.write_bytes(blob)
    try:
        store.load(path)
    except TaskFileError as error:
        assert str(error).isprintable() and len(error.problem) < 1000
        return False
    return True


def test_every_byte_counts(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped.taps"
    assert accepted(path, small)
    for index in range(len(small)):
        for bit in range(8) if THOROUGH else (index % 8, 5):  # bit 5 is the case of a letter
            flipped = bytearray(small)
            flipped[index] ^= 1 << bit
            assert not accepted(path, flipped), f"byte {index} bit {bit}"


def test_every_length_counts(honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.taps"
    for length in range(len(honest)):
        assert not accepted(path, honest[:length]), f"length {length}"


def test_verify_finds_what_load_refuses(honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped.taps"
    data = 8 + int.from_bytes(honest[:8], "little")
    for index in range(data, len(honest)):
        flipped = bytearray(honest)
        flipped[index] ^= 16
        path.write_bytes(flipped)
        result = store.verify(path)
        info = result.header.tensors[result.damaged[0]]
        assert len(result.damaged) == 1 and info.begin <= index - data < info.end


@RUNS
@given(blob=st.binary(max_size=400))
def test_noise(blob: bytes, tmp_path: Path) -> None:
    assert not accepted(tmp_path / "noise.taps", blob)


@RUNS
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=6), st.integers(0, 6)), max_size=5))
def test_spliced(edits: list[tuple[int, bytes, int]], honest: bytes, tmp_path: Path) -> None:
    blob = honest
    for position, insert, remove in edits:
        position %= len(blob) + 1
        blob = blob[:position] + insert + blob[position + remove :]
    assert accepted(tmp_path / "spliced.taps", blob) == (blob == honest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BOOL", "U8", "F64"]) | JSON,
        "shape": st.lists(st.integers(-1, 5) | st.sampled_from([2**31, 2**62, 2**64]), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    }
)


@RUNS
@given(header=st.dictionaries(st.text(max_size=6), ENTRY | JSON, max_size=3), data=st.binary(max_size=40))
def test_invented_headers(header: dict[str, object], data: bytes, tmp_path: Path) -> None:
    assert not accepted(tmp_path / "invented.taps", assemble(dumps(header).encode(), data))
    path = tmp_path / "plain.safetensors"
    path.write_bytes(assemble(dumps(header).encode(), data))
    try:
        tensors, _ = store.read_safetensors(path)
    except TaskFileError:
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == len(data)


KEYS = [
    "codecs",
    "contents",
    "head",
    "kind",
    "labels",
    "layers",
    "method",
    "metrics",
    "name",
    "parent",
    "versions",
]


@RUNS
@given(key=st.sampled_from(KEYS), value=JSON, raw=st.booleans())
def test_signed_nonsense(key: str, value: object, raw: bool, honest: bytes, tmp_path: Path) -> None:
    """Right digests over any metadata: refused, or read and written again to the same meaning."""
    draft = Draft.of(honest)
    draft.metadata["taps." + key] = str(value) if raw else dumps(value)
    path, again = tmp_path / "signed.taps", tmp_path / "again.taps"
    try:
        blob = draft.build()
    except UnicodeEncodeError:
        return
    if accepted(path, blob):
        store.save(again, store.load(path))
        assert store.read_header(again).metadata == store.read_header(path).metadata
