"""Reading takes regular files, one descriptor and little memory; so does writing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peak import grown
from store_files import Draft, Record, assemble, blob_of, example, own, state, tiny

from taps_ext import store
from taps_ext.store import io
from taps_ext.store.errors import MissingFileError, NotRegularFileError, UnsupportedTensorError


def test_short_writes_and_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = blob_of(example(), tmp_path)
    write, readv = os.write, os.readv
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    monkeypatch.setattr(os, "readv", lambda fd, views: readv(fd, [views[0][:5]]))
    assert blob_of(example(), tmp_path) == expected
    assert store.load(tmp_path / "made.taps").name == "birds"


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MissingFileError, match=r"nothing\.taps: no such file"):
        store.load(tmp_path / "nothing.taps")
    with pytest.raises(FileNotFoundError):  # the same error, for those who look for the usual one
        store.load(tmp_path / "nothing.taps")
    for name, word in (("", "a folder"), ("pipe", "a pipe")):
        with pytest.raises(NotRegularFileError, match=word):
            store.load(tmp_path / name)
        with pytest.raises(NotRegularFileError, match=word):
            store.save(tmp_path / name, tiny())
    with pytest.raises(NotRegularFileError, match="a device"):
        store.load("/dev/null")
    with pytest.raises(MissingFileError, match="no such folder"):
        store.save(tmp_path / "no" / "where.taps", tiny())
    assert sorted(os.listdir(tmp_path)) == ["pipe"]


def test_the_file_may_be_swapped_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was validated is what is read, even if the path comes to mean another file in between."""
    path, other = tmp_path / "a.taps", tmp_path / "b.taps"
    store.save(path, example())
    store.save(other, tiny())
    parse = io.parse_metadata

    def swap(*args: object, **kwargs: object) -> object:
        os.replace(other, path)
        return parse(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(io, "parse_metadata", swap)
    assert store.load(path).name == "birds"


@pytest.mark.parametrize("act", [store.load, store.verify], ids=["load", "verify"])
def test_the_file_may_be_cut_while_it_is_read(
    act: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, behind the proof of its header: an error and not the end of this one, as in mapped memory."""
    path = tmp_path / "a.taps"
    size = store.save(path, example())
    parse = io.parse_metadata

    def cut(*args: object, **kwargs: object) -> object:
        os.truncate(path, size - 8)
        return parse(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(io, "parse_metadata", cut)
    with pytest.raises(store.errors.TruncatedFileError, match="ended while being read"):
        act(path)


def test_verify_false_skips_tensor_digests_only(tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    blob = bytearray(blob_of(example(), tmp_path))
    blob[-1] ^= 1
    path.write_bytes(blob)
    last = list(store.read_header(path).tensors)[-1]
    claim = store.read_header(path).claims[last]
    assert claim.tensor in store.load(path, verify=False).parts[claim.module].tensors
    assert store.verify(path).damaged == (last,) and not store.verify(path).ok
    path.write_bytes(bytes(blob).replace(b"jay", b"joy"))
    with pytest.raises(store.errors.DigestError, match="header"):
        store.load(path, verify=False)


def test_sound_says_what_is_wrong_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    store.save(path, example())
    header, problem = store.sound(path)
    assert header == store.read_header(path) and problem is None
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    *_, last = store.read_header(path).tensors
    assert store.sound(path) == (None, f"tensor {last!r}: its bytes are not those that were written")
    blob[-(len(blob) - header.data_begin) :] = bytes(len(blob) - header.data_begin)
    path.write_bytes(blob)
    (first, *more) = store.verify(path).damaged
    assert more and store.sound(path)[1] == (
        f"tensor {first!r} (and {len(more)} more): its bytes are not those that were written"
    )
    path.write_bytes(blob[:4])
    assert store.sound(path) == (None, "expected the 8 bytes of a header length, got a file of 4 bytes")
    assert store.sound(tmp_path / "none.taps") == (None, "no such file")


def test_the_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    size = store.save(path, example())
    header = store.read_header(path)
    assert header.file_bytes == size and header.digest == store.load(path).digest
    assert header.metadata.labels == ["jay", "wren"]
    assert header.tensors["conv1:delta"].shape == (2, 3, 1, 1)
    assert header.claims["conv1:delta"] == store.Claim("conv1", "delta")
    assert header.claims["conv1:score"] == store.Claim("conv1", "score", score=True)
    assert header.metadata.parts["conv1"].tensors == ("delta", "score")
    assert header.digests["conv1:delta"] == store.tensor_digest(example().parts["conv1"].tensors["delta"])


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.nn.parameter.UninitializedParameter(), "uninitialised"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8), "quantised"),
        (torch.zeros(2, dtype=torch.float8_e5m2), "float8_e5m2"),
        ([1.0], "list"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_bytes_are_refused_by_name(tensor: object, word: str, tmp_path: Path) -> None:
    if callable(tensor) and not isinstance(tensor, torch.Tensor):
        tensor = tensor()
    with pytest.raises(UnsupportedTensorError, match=rf"'a:pos'.*{word}"):
        store.save(tmp_path / "a.taps", example(parts={"a": own("other", pos=tensor)}))
    with pytest.raises(UnsupportedTensorError, match=rf"'pos\.value'.*{word}"):
        store.save(tmp_path / "a.state", state(values={"pos": tensor}))
    assert os.listdir(tmp_path) == []


def test_a_device_is_honoured(tmp_path: Path) -> None:
    store.save(tmp_path / "a.taps", tiny())
    back = store.load(tmp_path / "a.taps", device=torch.device("cpu")).parts[""].tensors["mask"]
    assert back.device.type == "cpu"


def test_memory(tmp_path: Path) -> None:
    """128 MiB: writing and verifying need a constant amount, reading the tensors once."""
    path, mib = tmp_path / "large.taps", 1 << 20
    task = tiny()
    tensors = {str(i): torch.full((8 << 20,), float(i)) for i in range(4)}
    task.parts["b"] = Record({"kind": "x"}, tensors)
    store.save(tmp_path / "small.taps", tiny())
    store.verify(tmp_path / "small.taps")
    assert grown(lambda: torch.ones(16 << 20)) > 60 * mib, "the measurement works"
    assert grown(lambda: store.save(path, task)) < 8 * mib
    assert grown(lambda: store.fingerprint(tensors)) < 8 * mib
    assert 100 * mib < grown(lambda: store.load(path)) < (128 + 8) * mib
    assert grown(lambda: store.verify(path)) < (16 + 8) * mib
    assert grown(lambda: store.read_header(path)) < 4 * mib


def test_a_hostile_size_is_refused_by_arithmetic(tmp_path: Path) -> None:
    path = tmp_path / "huge.taps"
    entry = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (2**60, 2**60)
    path.write_bytes(assemble(entry, b""))

    def load() -> None:
        with pytest.raises(store.errors.TruncatedFileError, match="1152921504606846976"):
            store.load(path)

    assert grown(load) < 8 << 20


BOMBS = [b"[],", b'"":0,', b"1e9,", b'"\\u0061",', b'{"a":{}},', b"\\\\", b'"', b'"[",', b'"","[":0,', b'""']


@pytest.mark.parametrize("piece", BOMBS)
@pytest.mark.parametrize("opening", [b'{"taps.kind":"state","a":[', b'{"taps.kind":"state",', b"{"])
@pytest.mark.parametrize("count", [16 << 20, 250_000])
def test_hostile_headers_cost_little_memory(opening: bytes, piece: bytes, count: int, tmp_path: Path) -> None:
    """16 MiB of anything, or 250,000 times the piece, is refused within 256 MiB; a task's before it is parsed."""
    path = tmp_path / "bomb.taps"
    path.write_bytes(assemble(opening + (piece * count)[: (16 << 20) - 64], b""))

    def load() -> None:
        with pytest.raises(store.TaskFileError):
            store.load(path)

    assert grown(load) < 256 << 20


@pytest.mark.parametrize("piece", ['"{:x}":0,', '["{:x}"],', '{{"{:x}":0}},', '"{:x}",'])
def test_hostile_facts_cost_little_memory(piece: str, tmp_path: Path) -> None:
    """As many values as a table may have, and a right digest over them."""
    many = ((1 << 18) - 64) // sum(piece.replace("{:x}", "").replace("{{", "{").count(c) for c in "[{}]:,")
    inner = "".join(piece.format(i) for i in range(many // 2 if piece.startswith("{") else many))[: (10 << 20)]
    inner = inner[: inner.rindex(",")]
    around = "{%s}" if piece.startswith('"{:x}":') else "[%s]"
    draft = Draft.of(blob_of(tiny(), tmp_path))
    draft.metadata["taps.parts"] = '{"a":{"facts":{"kind":"x","y":%s},"tensors":[]}}' % (around % inner)
    path = tmp_path / "bomb.taps"
    path.write_bytes(draft.build())

    def load() -> None:
        with pytest.raises(store.errors.UnexpectedTensorError):
            store.load(path)

    assert grown(load) < 256 << 20
