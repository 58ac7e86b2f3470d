"""No byte of a task file can change unnoticed, and no bytes make the reader do anything but refuse or read.

`make fuzz` flips all eight bits, and runs the random tests for minutes from a fresh seed.
"""

from __future__ import annotations

from json import dumps, loads
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stages import THOROUGH
from store_files import Draft, assemble, blob_of, canonical, example, older, older_example, tiny

from taps_ext import store
from taps_ext.store import TaskFileError

RUNS = settings(
    max_examples=20_000 if THOROUGH else 200,
    deadline=None,
    derandomize=not THOROUGH,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


LAYOUTS = ["1.0", "1.2"]


@pytest.fixture(scope="module", params=LAYOUTS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """As small as a task gets with a change, a score and a boolean in it."""
    if request.param == "1.2":
        return blob_of(tiny(), tmp_path_factory.mktemp("small"))
    return older(
        {"a.score": torch.tensor(0.5), "a.delta": torch.tensor([1.0]), "mask.value": torch.tensor([True])},
        layers={"a": {"learn": True, "open": True}},
        codecs={"a": "dense"},
        contents={"values": ["mask"]},
        method=canonical({"method": "taps"}),
    ).build()


@pytest.fixture(scope="module", params=LAYOUTS)
def honest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if request.param == "1.0":
        return older_example().build()
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


KEYS = ["kind", "labels", "method", "metrics", "name", "parent", "versions"]
KEYS_OF = {"1.0": [*KEYS, "codecs", "contents", "head", "layers"], "1.2": [*KEYS, "parts"]}


def resaved(path: Path) -> bool:
    """Whether the task, saved again, has the same meaning; an older one as who knows that it lists all parts."""
    task = store.load(path)
    task.complete = True
    store.save(path.with_name("again.taps"), task)
    return store.read_header(path.with_name("again.taps")).metadata == store.read_header(path).metadata


@RUNS
@given(at=st.integers(0, 10), value=JSON, raw=st.booleans())
def test_signed_nonsense(at: int, value: object, raw: bool, honest: bytes, tmp_path: Path) -> None:
    """Right digests over any metadata: refused, or read and written again to the same meaning."""
    draft = Draft.of(honest)
    keys = KEYS_OF[draft.metadata["taps.format"]]
    draft.metadata["taps." + keys[at % len(keys)]] = str(value) if raw else dumps(value)
    try:
        blob = draft.build()
    except UnicodeEncodeError:
        return
    if accepted(tmp_path / "signed.taps", blob):
        assert resaved(tmp_path / "signed.taps")


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The way to everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inner for place in places(item, (*path, key))]


@RUNS
@given(
    pick=st.integers(0, 1 << 16), value=JSON | st.sampled_from(["", "layer", "score", "conv1", "delta", 0.5, -1, True])
)
def test_signed_nonsense_in_a_table(pick: int, value: object, honest: bytes, tmp_path: Path) -> None:
    """The same of any one place in the tables: those of the two layouts must agree with the tensors."""
    draft = Draft.of(honest)
    keys = {"taps.parts", "taps.layers", "taps.codecs", "taps.contents", "taps.head", "taps.method"}
    tables = {key: loads(draft.metadata[key]) for key in sorted(keys & draft.metadata.keys())}
    everywhere = places(tables)
    everywhere = [place for place in everywhere if len(place) > 1]
    *way, last = everywhere[pick % len(everywhere)]
    inside: Any = tables
    for key in way:
        inside = inside[key]
    inside[last] = value
    draft.metadata.update({key: dumps(table) for key, table in tables.items()})
    try:
        blob = draft.build()
    except UnicodeEncodeError:
        return
    if accepted(tmp_path / "signed.taps", blob):
        assert resaved(tmp_path / "signed.taps")
