"""Bad files: each is refused with its own class and message, which names what is wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

import pytest
from store_files import PARENT, Draft, assemble, blob_of, example

from taps_ext import store
from taps_ext.store import errors as e

Make = Callable[[bytes], bytes]
CASES: dict[str, tuple[type[e.TaskFileError], tuple[str, ...], Make]] = {}


def case(name: str, error: type[e.TaskFileError], *words: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        assert name not in CASES
        CASES[name] = (error, words, make)
        return make

    return add


def forged(name: str, error: type[e.TaskFileError], *words: str) -> Callable[[Callable[[Draft], object]], None]:
    """A case whose digests are all right: `change` edits a draft of the honest file."""

    def add(change: Callable[[Draft], object]) -> None:
        def make(blob: bytes) -> bytes:
            draft = Draft.of(blob)
            change(draft)
            return draft.build()

        case(name, error, *words)(make)

    return add


def header_of(blob: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(blob[:8], "little")
    return blob[8 : 8 + length], blob[8 + length :]


# -- the container
case("empty file", e.TruncatedFileError, "0 bytes")(lambda b: b"")
case("five bytes", e.TruncatedFileError, "5 bytes")(lambda b: b[:5])
case("truncated in the header", e.TruncatedFileError, "header length", "only 92 bytes")(lambda b: b[:100])
case("truncated by a byte", e.TruncatedFileError, "'conv3.delta' ends at", "data bytes")(lambda b: b[:-1])
case("a trailing byte", e.LayoutError, "1 trailing bytes after tensor 'conv3.delta'")(lambda b: b + b"\0")
case("header length of 2**64 - 1", e.LimitError, str(2**64 - 1))(lambda b: b"\xff" * 8 + b[8:])
case("header of 17 MiB", e.LimitError, str(17 << 20), str(16 << 20))(
    lambda b: assemble(b"{}" + b" " * ((17 << 20) - 2), b"")
)
case("header length beyond the file", e.TruncatedFileError, "header length 8000")(
    lambda b: (8000).to_bytes(8, "little") + b[8:]
)
case("header length of zero", e.HeaderError, "b''")(lambda b: bytes(8) + b[8:])
case("a pickle", e.LimitError, "not a task file")(lambda b: b"\x80\x02}q\x00X\x05\x00\x00\x00state" * 4)
case("header is a list", e.HeaderError, "expected a JSON object", "b'[")(lambda b: assemble(b"[]", b""))
case("header is not JSON", e.HeaderError, "not JSON", "character 1")(lambda b: assemble(b"{nonsense}", b""))
case("header is not UTF-8", e.HeaderError, "not UTF-8 at byte 2")(lambda b: assemble(b'{"\xff":1}', b""))
case("bytes after the JSON", e.HeaderError, "Extra data")(lambda b: assemble(b"{}{}", b""))
case("NaN in the header", e.HeaderError, "NaN")(lambda b: assemble(b'{"a":NaN}', b""))
case("1e999 in the header", e.HeaderError, "1e999")(lambda b: assemble(b'{"a":1e999}', b""))
case("nested a million deep", e.LimitError, "deeper than 32")(lambda b: assemble(b'{"a":' + b"[" * 10**6, b""))
case("four million values", e.LimitError, "JSON tokens")(lambda b: assemble(b'{"a":[' + b"1," * (4 << 20), b""))
case("an integer of 5000 digits", e.LimitError, "5000 digits")(lambda b: assemble(b'{"a":' + b"9" * 5000 + b"}", b""))
case("too many tensors", e.LimitError, "65537 tensors")(
    lambda b: assemble(
        json.dumps(
            {f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(65537)},
            separators=(",", ":"),
        ).encode(),
        b"",
    )
)
case("duplicate tensor", e.DuplicateKeyError, "'head.bias' occurs twice")(
    lambda b: assemble(header_of(b)[0].replace(b'"head.weight":', b'"head.bias":', 1).rstrip(), header_of(b)[1])
)
case("duplicate key inside a tensor", e.DuplicateKeyError, "'dtype' occurs twice")(
    lambda b: assemble(header_of(b)[0].replace(b'"shape":', b'"dtype":', 1).rstrip(), header_of(b)[1])
)
case("metadata is no object", e.HeaderError, "__metadata__: expected an object", "7")(
    lambda b: assemble(b'{"__metadata__":7}', b"")
)
case("metadata value is no string", e.HeaderError, "'taps.kind'", "True")(
    lambda b: assemble(b'{"__metadata__":{"taps.kind":true}}', b"")
)
case("a lone surrogate", e.HeaderError, "lone surrogate")(lambda b: assemble(b'{"__metadata__":{"a":"\\ud800"}}', b""))
case("not a task file", e.FormatVersionError, "taps.format", "not a task file")(lambda b: assemble(b"{}", b""))


# -- the tensor table
@forged("unprintable name", e.TensorNameError, r"'head.\x1b[2J'")
def _(d: Draft) -> None:
    d.text.append(('"head.bias":{', '"head.\\u001b[2J":{'))


@forged("name too long", e.LimitError, "600 characters", "512")
def _(d: Draft) -> None:
    d.text.append(('"head.bias":{', f'"{"n" * 600}":{{'))


@forged("dtype unknown", e.UnknownDtypeError, "'head.bias'", "'F8_E5M2'", "BF16")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"dtype": "F8_E5M2"}


@forged("tensor without a shape", e.HeaderError, "'head.bias'", "exactly dtype, shape and data_offsets")
def _(d: Draft) -> None:
    d.text.append(('"head.bias":{"dtype":"F32","shape":[2],', '"head.bias":{"dtype":"F32",'))


@forged("a boolean as a size", e.HeaderError, "'head.bias'", "[True]")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"shape": [True]}


@forged("a string as a size", e.HeaderError, "'head.bias'", "['2']")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"shape": ["2"]}


@forged("a negative size", e.HeaderError, "'head.bias'", "[-2]")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"shape": [-2]}


@forged("a fractional offset", e.HeaderError, "'head.bias'", "data_offsets", "0.5")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"data_offsets": [0.5, 8]}


@forged("a shape that overflows", e.LimitError, "'head.bias'", "overflows 64 bits")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"shape": [2**31, 2**31, 2**31]}


@forged("a zero that hides an overflow", e.LimitError, "'head.bias'", "[0, 4611686018427387904")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"shape": [0, 2**62, 2**62]}


@forged("rank 65", e.LimitError, "'head.bias'", "rank 65")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"shape": [1] * 65}


@forged("shape and bytes disagree", e.LayoutError, "'head.bias'", "takes 12 bytes", "give 8")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"shape": [3]}


@forged("offsets backwards", e.LayoutError, "'head.bias'", "[48, 40]", "-8")
def _(d: Draft) -> None:
    d.entries["head.bias"] = {"data_offsets": [48, 40]}


@forged("overlap", e.LayoutError, "'conv3.delta' begins at 80", "overlaps tensor 'norm.bn1.weight', to byte 88")
def _(d: Draft) -> None:
    d.entries["conv3.delta"] = {"data_offsets": [80, 92]}  # the last tensor, at 88 in the honest file


@forged("a hole", e.LayoutError, "a hole of 8 bytes", "'conv3.delta'")
def _(d: Draft) -> None:
    d.entries["conv3.delta"] = {"data_offsets": [96, 108]}
    d.trailing = bytes(8)


# -- damage
@case("flipped bit in data", e.DigestError, "'conv3.delta'", "sha256:")
def _flip_data(blob: bytes) -> bytes:
    return blob[:-1] + bytes([blob[-1] ^ 1])


@case("flipped bit in the header", e.DigestError, "taps.digest states")
def _flip_header(blob: bytes) -> bytes:
    return blob.replace(b"jay", b"jax")


@case("padding moved", e.HeaderError, "canonical")
def _spaces(blob: bytes) -> bytes:
    header, data = header_of(blob)
    return assemble(header + b" " * 8, data)


@forged("no header digest", e.DigestError, "'taps.digest', got none")
def _(d: Draft) -> None:
    del d.metadata["taps.digest"]


@forged("no tensor digests", e.MetadataError, "'taps.digests', got none")
def _(d: Draft) -> None:
    del d.metadata["taps.digests"]


@forged("missing digest", e.DigestError, "digest of tensor 'conv1.delta', got none")
def _(d: Draft) -> None:
    d.digests["conv1.delta"] = None


@forged("digest for a missing tensor", e.DigestError, "a digest of 'ghost'")
def _(d: Draft) -> None:
    d.digests["ghost"] = PARENT


@forged("digest of another kind", e.DigestError, "'conv1.delta'", "'md5:0'")
def _(d: Draft) -> None:
    d.digests["conv1.delta"] = "md5:0"


@forged("digest of other bytes", e.DigestError, "'conv1.delta'", PARENT)
def _(d: Draft) -> None:
    d.digests["conv1.delta"] = PARENT


# -- the entries
@forged("format 2.0", e.FormatVersionError, "expected 1.x, got '2.0'")
def _(d: Draft) -> None:
    d.metadata["taps.format"] = "2.0"


@forged("format without a minor", e.FormatVersionError, "major.minor", "'1'")
def _(d: Draft) -> None:
    d.metadata["taps.format"] = "1"


@forged("unknown key", e.UnknownKeyError, "'taps.rotation'", "format 1.9", "knows 1.1")
def _(d: Draft) -> None:
    d.metadata.update({"taps.format": "1.9", "taps.rotation": "{}"})


@forged("no parent", e.MetadataError, "'taps.parent', got none")
def _(d: Draft) -> None:
    del d.metadata["taps.parent"]


@forged("parent is no digest", e.MetadataError, "taps.parent", "'main'")
def _(d: Draft) -> None:
    d.metadata["taps.parent"] = "main"


@forged("unknown kind", e.KindError, "'recipe'")
def _(d: Draft) -> None:
    d.metadata["taps.kind"] = "recipe"


@forged("a shared file as a task", e.KindError, "expected a task file, got a shared file")
def _(d: Draft) -> None:
    d.metadata["taps.kind"] = "shared"


@forged("a run's state as a task", e.KindError, "a state file", "unfinished training run", "same settings and out")
def _(d: Draft) -> None:
    d.metadata["taps.kind"] = "state"
    del d.metadata["taps.method"]


@forged("a task without a method", e.MetadataError, "'taps.method', got none")
def _(d: Draft) -> None:
    del d.metadata["taps.method"]


@forged("a state with half a method", e.MetadataError, "expected none in a state", "{}")
def _(d: Draft) -> None:
    d.metadata.update({"taps.kind": "state", "taps.method": "{}"})


@forged("method without a name", e.MetadataError, "under 'method'", "'lam'")
def _(d: Draft) -> None:
    d.edit("taps.method", lambda m: m.pop("method"))


@forged("method is a list", e.MetadataError, "taps.method", "['taps']")
def _(d: Draft) -> None:
    d.metadata["taps.method"] = '["taps"]'


@forged("method is not JSON", e.HeaderError, "taps.method: not JSON")
def _(d: Draft) -> None:
    d.metadata["taps.method"] = "{"


@forged("duplicate key in the method", e.DuplicateKeyError, "taps.method", "'lam' occurs twice")
def _(d: Draft) -> None:
    d.metadata["taps.method"] = '{"lam":1,"lam":2,"method":"taps"}'


@forged("Infinity in the metrics", e.HeaderError, "taps.metrics", "-Infinity")
def _(d: Draft) -> None:
    d.metadata["taps.metrics"] = '{"top1":-Infinity}'


@forged("deep metrics", e.LimitError, "taps.metrics", "deeper")
def _(d: Draft) -> None:
    d.metadata["taps.metrics"] = '{"a":' * 40 + "1" + "}" * 40


@forged("labels are numbers", e.MetadataError, "taps.labels", "[1, 2]")
def _(d: Draft) -> None:
    d.metadata["taps.labels"] = "[1,2]"


@forged("versions are numbers", e.MetadataError, "taps.versions", "2.15")
def _(d: Draft) -> None:
    d.metadata["taps.versions"] = '{"torch":2.15}'


@forged("an empty name", e.MetadataError, "taps.name")
def _(d: Draft) -> None:
    d.metadata["taps.name"] = ""


@forged("contents without norms", e.MetadataError, "taps.contents: expected lists")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c.pop("norms"))


@forged("a value listed twice", e.MetadataError, "taps.contents", "'cls_token' before 'cls_token'")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c["values"].append("cls_token"))


# -- layers and tensors
@forged("gate is a number", e.MetadataError, "'conv2'", "booleans learn and open")
def _(d: Draft) -> None:
    d.edit("taps.layers", lambda layers: layers["conv2"].update(open=0))


@forged("closed with a codec", e.GateRecordError, "'conv2'", "codec 'dense'")
def _(d: Draft) -> None:
    d.edit("taps.codecs", lambda table: table.update(conv2="dense"))


@forged("closed with a delta", e.GateRecordError, "'conv2': closed", "tensor 'conv2.delta'")
def _(d: Draft) -> None:
    d.tensors["conv2.delta"] = ("F32", [1], bytes(4))


@forged("open without a codec", e.CodecError, "'conv1'", "got none")
def _(d: Draft) -> None:
    d.edit("taps.codecs", lambda table: table.pop("conv1"))


@forged("open without a delta", e.MissingTensorError, "'conv1.delta'", "the delta of 'conv1'")
def _(d: Draft) -> None:
    del d.tensors["conv1.delta"]


@forged("unknown codec", e.CodecError, "'conv1'", "unknown codec 'fractal'", "dense")
def _(d: Draft) -> None:
    d.edit("taps.codecs", lambda table: table.update(conv1="fractal"))


@forged("codec for no layer", e.MetadataError, "'conv9' is not a layer")
def _(d: Draft) -> None:
    d.edit("taps.codecs", lambda table: table.update(conv9="dense"))


@forged("codec is a number", e.MetadataError, "taps.codecs", "3")
def _(d: Draft) -> None:
    d.edit("taps.codecs", lambda table: table.update(conv1=3))


@forged("learned without a score", e.MissingTensorError, "'conv2.score'", "the score of 'conv2'")
def _(d: Draft) -> None:
    del d.tensors["conv2.score"]


@forged("fixed with a score", e.UnexpectedTensorError, "'conv4.score'")
def _(d: Draft) -> None:
    d.tensors["conv4.score"] = ("F32", [], bytes(4))


@forged("NaN score", e.GateRecordError, "'conv2.score'", "got nan")
def _(d: Draft) -> None:
    d.tensors["conv2.score"] = ("F32", [], struct.pack("<f", float("nan")))


@forged("infinite score", e.GateRecordError, "'conv2.score'", "got inf")
def _(d: Draft) -> None:
    d.tensors["conv2.score"] = ("F32", [], struct.pack("<f", float("inf")))


@forged("score of half precision", e.DtypeMismatchError, "'conv2.score'", "F16")
def _(d: Draft) -> None:
    d.tensors["conv2.score"] = ("F16", [], bytes(2))


@forged("score with a dimension", e.ShapeMismatchError, "'conv2.score'", "[1]")
def _(d: Draft) -> None:
    d.tensors["conv2.score"] = ("F32", [1], bytes(4))


@forged("missing statistics", e.MissingTensorError, "'norm.bn1.running_mean'")
def _(d: Draft) -> None:
    del d.tensors["norm.bn1.running_mean"]


@forged("missing value", e.MissingTensorError, "'cls_token.value'")
def _(d: Draft) -> None:
    del d.tensors["cls_token.value"]


@forged("missing head", e.MissingTensorError, "'head.weight'")
def _(d: Draft) -> None:
    del d.tensors["head.weight"]


@forged("extra tensor", e.UnexpectedTensorError, "'passenger'")
def _(d: Draft) -> None:
    d.tensors["passenger"] = ("U8", [3], b"abc")


@forged("boolean byte 2", e.DtypeMismatchError, "'cls_token.value'", "0 and 1")
def _(d: Draft) -> None:
    d.tensors["cls_token.value"] = ("BOOL", [1], b"\2")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return blob_of(example(), tmp_path_factory.mktemp("honest"))


@pytest.fixture(scope="module")
def refusals(honest: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, e.TaskFileError]:
    path = tmp_path_factory.mktemp("bad") / "bad.taps"
    caught: dict[str, e.TaskFileError] = {}
    for name, (_, _, make) in CASES.items():
        path.write_bytes(make(honest))
        try:
            store.load(path, kind="task")
        except e.TaskFileError as error:
            caught[name] = error
    return caught


def test_the_forger_is_honest_when_it_changes_nothing(honest: bytes) -> None:
    assert Draft.of(honest).build() == honest


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(name: str, refusals: dict[str, e.TaskFileError]) -> None:
    error, words, _ = CASES[name]
    assert name in refusals, "the file was accepted"
    caught = refusals[name]
    assert type(caught) is error
    assert str(caught) == f"{caught.path}: {caught.problem}" and caught.path.endswith("bad.taps")
    for word in words:
        assert word in caught.problem
    assert str(caught).isprintable() and len(caught.problem) < 500


def test_messages_differ(refusals: dict[str, e.TaskFileError]) -> None:
    assert len(refusals) == len(CASES) >= 20
    assert len({error.problem for error in refusals.values()}) == len(CASES)


def test_every_class_of_refusal_is_shown() -> None:
    shown = {error for error, _, _ in CASES.values()}
    elsewhere = {e.MissingFileError, e.NotRegularFileError, e.UnsupportedTensorError, e.ParentMismatchError}
    every = {c for c in vars(e).values() if isinstance(c, type) and issubclass(c, e.TaskFileError)}
    assert shown | elsewhere | {e.TaskFileError} == every
