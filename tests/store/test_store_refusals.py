"""Bad files: each is refused with its own class and message, which names what is wrong.

A case is made from an honest file of each layout that it names: 1.0, as 0.1 wrote it, and 1.2.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

import pytest
from store_files import PARENT, Draft, assemble, blob_of, canonical, example, older_example

from taps_ext import store
from taps_ext.store import errors as e

Make = Callable[[bytes], bytes]
BOTH, OLD, NEW = ("1.0", "1.2"), ("1.0",), ("1.2",)
CASES: dict[str, tuple[type[e.TaskFileError], tuple[str, ...], Make, tuple[str, ...]]] = {}


def case(name: str, error: type[e.TaskFileError], *words: str, of: tuple[str, ...] = OLD) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        assert name not in CASES
        CASES[name] = (error, words, make, of)
        return make

    return add


def forged(
    name: str, error: type[e.TaskFileError], *words: str, of: tuple[str, ...] = OLD
) -> Callable[[Callable[[Draft], object]], None]:
    """A case whose digests are all right: `change` edits a draft of the honest file."""

    def add(change: Callable[[Draft], object]) -> None:
        def make(blob: bytes) -> bytes:
            draft = Draft.of(blob)
            change(draft)
            return draft.build()

        case(name, error, *words, of=of)(make)

    return add


def header_of(blob: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(blob[:8], "little")
    return blob[8 : 8 + length], blob[8 + length :]


# -- the container
case("empty file", e.TruncatedFileError, "0 bytes", of=BOTH)(lambda b: b"")
case("five bytes", e.TruncatedFileError, "5 bytes", of=BOTH)(lambda b: b[:5])
case("truncated in the header", e.TruncatedFileError, "cut short: header length", "only 92 bytes")(lambda b: b[:100])
case("truncated by a byte", e.TruncatedFileError, "cut short", "'conv3.delta' ends at", "data bytes")(lambda b: b[:-1])
case("a trailing byte", e.LayoutError, "1 trailing bytes after tensor 'conv3.delta'")(lambda b: b + b"\0")
case("header length of 2**64 - 1", e.LimitError, str(2**64 - 1), of=BOTH)(lambda b: b"\xff" * 8 + b[8:])
case("header of 17 MiB", e.LimitError, str(17 << 20), str(16 << 20))(
    lambda b: assemble(b"{}" + b" " * ((17 << 20) - 2), b"")
)
case("header length beyond the file", e.TruncatedFileError, "header length 8000", of=BOTH)(
    lambda b: (8000).to_bytes(8, "little") + b[8:]
)
case("header length of zero", e.HeaderError, "b''", of=BOTH)(lambda b: bytes(8) + b[8:])
case("a pickle", e.LimitError, "not a task file", "a pickle, as torch.save")(
    lambda b: b"\x80\x02}q\x00X\x05\x00\x00\x00state" * 4
)
case("a zip archive", e.LimitError, "as torch.save")(lambda b: b"PK\x03\x04\x00\x00\x08\x08" + b)
case("a web page", e.LimitError, "a web page")(lambda b: b"<!DOCTYPE html><html>not found</html>")
case("a pointer", e.LimitError, "Git LFS")(lambda b: b"version https://git-lfs.github.com/spec/v1")
case("a patch", e.FormatVersionError, "a patch (taps patch inspect)")(
    lambda b: assemble(b'{"__metadata__":{"taps.patch":"1.0"}}', b"")
)
case("header is a list", e.HeaderError, "expected a JSON object", "b'[")(lambda b: assemble(b"[]", b""))
case("header is not JSON", e.HeaderError, "not JSON", "character 1")(lambda b: assemble(b"{nonsense}", b""))
case("header is not UTF-8", e.HeaderError, "not UTF-8 at byte 2")(lambda b: assemble(b'{"\xff":1}', b""))
case("bytes after the JSON", e.HeaderError, "Extra data")(lambda b: assemble(b"{}{}", b""))
case("NaN in the header", e.HeaderError, "NaN")(lambda b: assemble(b'{"a":NaN}', b""))
case("1e999 in the header", e.HeaderError, "1e999")(lambda b: assemble(b'{"a":1e999}', b""))
case("nested 200,000 deep", e.LimitError, "deeper than 32")(lambda b: assemble(b'{"a":' + b"[" * 200_000, b""))
case("a million values", e.LimitError, "JSON tokens")(lambda b: assemble(b'{"a":[' + b"1," * (1 << 20), b""))
case("an integer of 5000 digits", e.LimitError, "5000 digits")(lambda b: assemble(b'{"a":' + b"9" * 5000 + b"}", b""))
case("too many tensors", e.LimitError, "65537 tensors in a task's header, at most 8192 allowed")(
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


@case("flipped bit in the header", e.DigestError, "taps.digest states", of=BOTH)
def _flip_header(blob: bytes) -> bytes:
    return blob.replace(b"jay", b"jax")


@case("padding moved", e.HeaderError, "canonical", of=BOTH)
def _spaces(blob: bytes) -> bytes:
    header, data = header_of(blob)
    return assemble(header + b" " * 8, data)


@forged("no header digest", e.DigestError, "'taps.digest', got none", of=BOTH)
def _(d: Draft) -> None:
    del d.metadata["taps.digest"]


@forged("no tensor digests", e.MetadataError, "'taps.digests', got none", of=BOTH)
def _(d: Draft) -> None:
    del d.metadata["taps.digests"]


@forged("missing digest", e.DigestError, "digest of tensor 'conv1.delta', got none")
def _(d: Draft) -> None:
    d.digests["conv1.delta"] = None


@forged("digest for a missing tensor", e.DigestError, "a digest of 'ghost'", of=BOTH)
def _(d: Draft) -> None:
    d.digests["ghost"] = PARENT


@forged("digest of another kind", e.DigestError, "'conv1.delta'", "'md5:0'")
def _(d: Draft) -> None:
    d.digests["conv1.delta"] = "md5:0"


@forged("digest of other bytes", e.DigestError, "'conv1.delta'", PARENT)
def _(d: Draft) -> None:
    d.digests["conv1.delta"] = PARENT


# -- the entries
@forged("format 2.0", e.FormatVersionError, "expected 1.x, got '2.0'", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.format"] = "2.0"


@forged("format without a minor", e.FormatVersionError, "major.minor", "'1'", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.format"] = "1"


@forged("unknown key", e.UnknownKeyError, "'taps.rotation'", "format 1.9", "knows 1.2", of=BOTH)
def _(d: Draft) -> None:
    d.metadata.update({"taps.format": "1.9", "taps.rotation": "{}"})


@forged("no parent", e.MetadataError, "'taps.parent', got none", of=BOTH)
def _(d: Draft) -> None:
    del d.metadata["taps.parent"]


@forged("parent is no digest", e.MetadataError, "taps.parent", "'main'", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.parent"] = "main"


@forged("unknown kind", e.KindError, "'recipe'", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.kind"] = "recipe"


@forged("a shared file as a task", e.KindError, "expected a task file, got a shared file", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.kind"] = "shared"


@forged("a run's state as a task", e.KindError, "a state file", "unfinished training run", "same settings and out")
def _(d: Draft) -> None:
    d.metadata.update({"taps.kind": "state", "taps.layers": "{}", "taps.codecs": "{}"})
    d.edit("taps.contents", lambda c: c.update(head=[], norms=[]))
    d.tensors = {"cls_token.value": d.tensors["cls_token.value"]}
    del d.metadata["taps.method"], d.metadata["taps.head"]


@forged("a state with layers", e.MetadataError, "a state holds values alone")
def _(d: Draft) -> None:
    d.metadata["taps.kind"] = "state"


@forged("a state with parts", e.MetadataError, "a state file holds values, got 'taps.parts'", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.kind"] = "state"


@forged("a state with parts under 0.1's name", e.MetadataError, "expected a task's method, got 'trainer-state'", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.method"] = canonical({"method": "trainer-state"})


@forged("a task without a method", e.MetadataError, "'taps.method', got none", of=BOTH)
def _(d: Draft) -> None:
    del d.metadata["taps.method"]


@forged("a state with half a method", e.MetadataError, "expected none in a state", "{}", of=BOTH)
def _(d: Draft) -> None:
    d.metadata.update({"taps.kind": "state", "taps.method": "{}"})


@forged("method without a name", e.MetadataError, "under 'method'", "'lam'", of=BOTH)
def _(d: Draft) -> None:
    d.edit("taps.method", lambda m: m.pop("method"))


@forged("method is a list", e.MetadataError, "taps.method", "['taps']", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.method"] = '["taps"]'


@forged("method is not JSON", e.HeaderError, "taps.method: not JSON", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.method"] = "{"


@forged("duplicate key in the method", e.DuplicateKeyError, "taps.method", "'lam' occurs twice", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.method"] = '{"lam":1,"lam":2,"method":"taps"}'


@forged("Infinity in the metrics", e.HeaderError, "taps.metrics", "-Infinity", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.metrics"] = '{"top1":-Infinity}'


@forged("deep metrics", e.LimitError, "taps.metrics", "deeper", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.metrics"] = '{"a":' * 40 + "1" + "}" * 40


@forged("labels are numbers", e.MetadataError, "taps.labels", "[1, 2]", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.labels"] = "[1,2]"


@forged("versions are numbers", e.MetadataError, "taps.versions", "2.15", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.versions"] = '{"torch":2.15}'


@forged("an empty name", e.MetadataError, "taps.name", of=BOTH)
def _(d: Draft) -> None:
    d.metadata["taps.name"] = ""


@forged("contents without norms", e.MetadataError, "taps.contents: expected lists")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c.pop("norms"))


@forged("a value listed twice", e.MetadataError, "taps.contents: values", "'cls_token' before 'cls_token'")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c["values"].append("cls_token"))


# -- layers and tensors, as 1.0 stored them
@forged("gate is a number", e.MetadataError, "'conv2'", "booleans learn and open")
def _(d: Draft) -> None:
    d.edit("taps.layers", lambda layers: layers["conv2"].update(open=0))


@forged("closed with a codec", e.GateRecordError, "'conv2'", "codec 'dense'")
def _(d: Draft) -> None:
    d.edit("taps.codecs", lambda table: table.update(conv2="dense"))


@forged("closed with a delta", e.UnexpectedTensorError, "'conv2.delta'")
def _(d: Draft) -> None:
    d.tensors["conv2.delta"] = ("F32", [1], bytes(4))


@forged("open without a codec", e.CodecError, "'conv1'", "got none")
def _(d: Draft) -> None:
    d.edit("taps.codecs", lambda table: table.pop("conv1"))


@forged("open without a delta", e.MissingTensorError, "'conv1.delta'", "lists it, got none")
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


@forged("learned without a score", e.MissingTensorError, "'conv2.score'", "lists it, got none")
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


@forged("extra tensor", e.UnexpectedTensorError, "'passenger'", of=BOTH)
def _(d: Draft) -> None:
    d.tensors["passenger"] = ("U8", [3], b"abc")


@forged("boolean byte 2", e.DtypeMismatchError, "'cls_token.value'", "0 and 1")
def _(d: Draft) -> None:
    d.tensors["cls_token.value"] = ("BOOL", [1], b"\2")


@forged("one module of a gate and a norm", e.MetadataError, "'conv1': expected one part, got layer and own")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c["norms"].append("conv1.bias"))


@forged("one module of a norm and a value", e.MetadataError, "'bn1': expected one part, got own and own")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c["values"].insert(0, "bn1.bias"))


@forged("one module of a gate and a value", e.MetadataError, "'conv2': expected one part, got layer and own")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c["values"].append("conv2.weight"))


@forged("one module of a value and a head", e.MetadataError, "'fc': expected one part, got own and instead")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c["values"].append("fc.scale"))


@forged("two values that are one tensor", e.MetadataError, "part ''", "'cls_token' before 'cls_token'")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c["values"].insert(0, ".cls_token"))


@forged("a value without a tensor's name", e.TensorNameError, "tensor name ''")
def _(d: Draft) -> None:
    d.edit("taps.contents", lambda c: c["values"].append("cls_token."))


@forged("a head that names no module", e.MetadataError, "taps.head", "names its module", "'linear'")
def _(d: Draft) -> None:
    d.edit("taps.head", lambda head: head.pop("module"))


@forged("a head of a module 7", e.MetadataError, "taps.head", "'module': 7")
def _(d: Draft) -> None:
    d.edit("taps.head", lambda head: head.update(module=7))


@forged("a head that is a list", e.MetadataError, "taps.head", "got []")
def _(d: Draft) -> None:
    d.metadata["taps.head"] = "[]"


@forged("a head's tensors alone", e.MetadataError, "how to rebuild the head of ['bias', 'weight']")
def _(d: Draft) -> None:
    del d.metadata["taps.head"]


def settings(name: str, error: type[e.TaskFileError], *words: str, **entries: object) -> None:
    """A case of a method whose thresholds cannot be read."""

    @forged(name, error, "taps.method", *words)
    def _(d: Draft) -> None:
        d.edit("taps.method", lambda method: method.update(entries))


settings("a threshold of zero", e.MetadataError, "threshold: expected a float32 above 0, got 0", threshold=0)
settings("a threshold that rounds to zero", e.MetadataError, "got 1e-50", threshold=1e-50)
settings("a threshold beyond float32", e.MetadataError, "got 1e+39", threshold=1e39)
settings("a threshold beyond float32 as an integer", e.MetadataError, str(-(10**19)), threshold=-(10**19))
settings("a threshold that is a flag", e.MetadataError, "got True", threshold=True)
settings("a threshold in words", e.MetadataError, "got 'low'", threshold="low")
settings("overrides that are a list", e.MetadataError, "expected {glob: settings}, got ['conv1']", overrides=["conv1"])
settings("an override that is a number", e.MetadataError, "got {'conv1': 1}", overrides={"conv1": 1})
settings(
    "an override of minus one", e.MetadataError, "'conv*': threshold", "got -1", overrides={"conv*": {"threshold": -1}}
)
settings(
    "more globs than are worth matching",
    e.LimitError,
    "600 globs, 4 layers",
    overrides={f"{'x' * 500}{i}": {"threshold": 1} for i in range(600)},
)


# -- parts, as 1.2 stores them
def change_parts(
    name: str, error: type[e.TaskFileError], *words: str
) -> Callable[[Callable[[dict[str, dict[str, object]]], object]], None]:
    """A case of another table of parts."""

    def add(change: Callable[[dict[str, dict[str, object]]], object]) -> None:
        forged(name, error, *words, of=NEW)(lambda d: d.edit("taps.parts", change))

    return add


def gate(name: str, *words: str, error: type[e.TaskFileError] = e.MetadataError, **settings: object) -> None:
    """A case of another gate of the closed, learned layer conv2."""
    change_parts(name, error, "part 'conv2'", *words)(lambda t: t["conv2"]["facts"]["gate"].update(settings))  # type: ignore[index]


@forged("neither parts nor layers", e.MetadataError, "'taps.layers', got none", of=NEW)
def _(d: Draft) -> None:
    del d.metadata["taps.parts"]


@forged("parts and layers", e.MetadataError, "'taps.parts' or 'taps.layers', got both", of=NEW)
def _(d: Draft) -> None:
    d.metadata.update({"taps.layers": "{}", "taps.codecs": "{}", "taps.contents": "{}"})


@forged("layers and parts", e.MetadataError, "'taps.parts' or 'taps.layers', got both")
def _(d: Draft) -> None:
    d.metadata["taps.parts"] = "{}"


@forged("parts and a head", e.MetadataError, "'taps.parts' or 'taps.head', got both", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.head"] = canonical({"type": "linear", "module": "fc"})


@forged("parts in a list", e.MetadataError, "taps.parts: expected a JSON object, got []", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.parts"] = "[]"


@forged("parts that are not JSON", e.HeaderError, "taps.parts: not JSON", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.parts"] += "}"


@forged("a part twice", e.DuplicateKeyError, "taps.parts", "'fc' occurs twice", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.parts"] = '{"fc":{"facts":{},"tensors":[]},"fc":{"facts":{},"tensors":[]}}'


@forged("Infinity in the facts", e.HeaderError, "taps.parts", "Infinity", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.parts"] = '{"fc":{"facts":{"kind":"x","y":Infinity},"tensors":[]}}'


@forged("deep facts", e.LimitError, "taps.parts", "deeper", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.parts"] = '{"fc":{"facts":{"a":' + "[" * 30 + "]" * 30 + '},"tensors":[]}}'


@forged("half a surrogate in the facts", e.HeaderError, "taps.parts: a lone surrogate", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.parts"] = '{"fc":{"facts":{"kind":"\\ud800"},"tensors":[]}}'


@forged("more facts than are read", e.LimitError, "taps.parts", "JSON tokens", of=NEW)
def _(d: Draft) -> None:
    d.metadata["taps.parts"] = '{"fc":{"facts":{"kind":"x","y":[' + "1," * (1 << 18) + '1]},"tensors":[]}}'


@change_parts("a part in a list", e.MetadataError, "'fc': expected facts and names of tensors, got []")
def _(t: dict[str, object]) -> None:
    t["fc"] = []


change_parts("a part without facts", e.MetadataError, "'conv4'", "got {'tensors'")(lambda t: t["conv4"].pop("facts"))
change_parts("a part without names", e.MetadataError, "'conv4'", "got {'facts'")(lambda t: t["conv4"].pop("tensors"))
change_parts("a part with more", e.MetadataError, "'fc'", "expected facts and names")(lambda t: t["fc"].update(bytes=1))
change_parts("a part with names in words", e.MetadataError, "'bn1'")(lambda t: t["bn1"].update(tensors="weight"))
change_parts("a part with a name 7", e.MetadataError, "'blocks.0'")(lambda t: t["blocks.0"].update(tensors=[7]))
change_parts("facts in a list", e.MetadataError, "'fc': facts", "object, got []")(lambda t: t["fc"].update(facts=[]))
change_parts("no facts", e.MetadataError, "'fc': facts", "object, got None")(lambda t: t["fc"].update(facts=None))
change_parts("facts without a kind", e.MetadataError, "'fc'", "kind, got None")(lambda t: t["fc"].update(facts={}))
change_parts("a kind without a name", e.MetadataError, "'fc'", "kind, got ''")(
    lambda t: t["fc"].update(facts={"kind": ""})
)
change_parts("a kind that is a number", e.MetadataError, "'fc'", "kind, got 7")(
    lambda t: t["fc"].update(facts={"kind": 7})
)
change_parts("names out of order", e.MetadataError, "part 'bn1'", "'weight' before 'running_mean'")(
    lambda t: t["bn1"].update(tensors=["num_batches_tracked", "weight", "running_mean"])
)
change_parts("a name twice", e.MetadataError, "part 'fc'", "'bias' before 'bias'")(
    lambda t: t["fc"].update(tensors=["bias", "bias", "weight"])
)
change_parts("a tensor without a name", e.TensorNameError, "tensor name ''")(lambda t: t["conv4"].update(tensors=[""]))
change_parts("an unprintable tensor", e.TensorNameError, r"'a\x1b[2J'")(
    lambda t: t["conv4"].update(tensors=["a\x1b[2J"])
)
change_parts("a tensor of 513 characters", e.LimitError, "513 characters")(
    lambda t: t["conv4"].update(tensors=["n" * 513])
)
change_parts("an unprintable module", e.TensorNameError, r"module name 'a\nb'")(
    lambda t: t.update({"a\nb": t["conv4"]})
)
change_parts("a module of 600 characters", e.LimitError, "module name", "600 characters")(
    lambda t: t.update({"m" * 600: t["conv4"]})
)
change_parts("more names than tensors are allowed", e.LimitError, "taps.parts: more than 8192 tensors")(
    lambda t: t["conv4"].update(tensors=sorted(f"{i}" for i in range(8192)))
)
change_parts("a gate in words", e.MetadataError, "part 'fc': gate", "got 'open'")(
    lambda t: t["fc"].update(facts={"kind": "x", "gate": "open"})
)
change_parts("a gate without a threshold", e.MetadataError, "part 'conv4': gate", "a threshold above 0, got")(
    lambda t: t["conv4"]["facts"]["gate"].pop("threshold")  # type: ignore[index]
)
gate("a gate with more", "'warmth': 1", warmth=1)
gate("a gate open by 1", "'open': 1", open=1)
gate("a gate learned by name", "'learn': 'yes'", learn="yes")
gate("a gate's threshold of zero", "'threshold': 0.0", threshold=0.0)
gate("a gate's threshold as an integer", "'threshold': 1}", threshold=1)
gate("a gate's threshold below zero", "'threshold': -0.1", threshold=-0.1)
gate("a fixed gate with a score", "fixed, so no score is expected", error=e.GateRecordError, learn=False)
change_parts("a learned gate without a score", e.GateRecordError, "part 'conv4'", "learned, so a score is expected")(
    lambda t: t["conv4"]["facts"]["gate"].update(learn=True)  # type: ignore[index]
)
change_parts("one more tensor in the table", e.MissingTensorError, "'blocks.0:zeal'", "lists it, got none")(
    lambda t: t["blocks.0"].update(tensors=["a.b:c", "score", "weight~", "zeal"])
)
change_parts("one tensor less in the table", e.UnexpectedTensorError, "'blocks.0:weight~'", "nothing")(
    lambda t: t["blocks.0"].update(tensors=["a.b:c", "score"])
)
change_parts("one part less in the table", e.UnexpectedTensorError, "'fc:")(lambda t: t.pop("fc"))


@forged("one tensor less in the file", e.MissingTensorError, "'bn1:running_mean'", of=NEW)
def _(d: Draft) -> None:
    del d.tensors["bn1:running_mean"]


@forged("a tensor under its name of 1.0", e.MissingTensorError, "'conv1:delta'", of=NEW)
def _(d: Draft) -> None:
    d.tensors["conv1.delta"] = d.tensors.pop("conv1:delta")


@forged("a part's NaN score", e.GateRecordError, "'conv2:score'", "got nan", of=NEW)
def _(d: Draft) -> None:
    d.tensors["conv2:score"] = ("F32", [], struct.pack("<f", float("nan")))


@forged("a part's infinite score", e.GateRecordError, "'conv2:score'", "got -inf", of=NEW)
def _(d: Draft) -> None:
    d.tensors["conv2:score"] = ("F32", [], struct.pack("<f", float("-inf")))


@forged("a part's score of half precision", e.DtypeMismatchError, "'conv2:score'", "BF16", of=NEW)
def _(d: Draft) -> None:
    d.tensors["conv2:score"] = ("BF16", [], bytes(2))


@forged("a part's score with a dimension", e.ShapeMismatchError, "'conv2:score'", "[1]", of=NEW)
def _(d: Draft) -> None:
    d.tensors["conv2:score"] = ("F32", [1], bytes(4))


@forged("a part's boolean byte 2", e.DtypeMismatchError, "'blocks.0:a.b:c'", "0 and 1", of=NEW)
def _(d: Draft) -> None:
    d.tensors["blocks.0:a.b:c"] = ("BOOL", [1], b"\2")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return {"1.0": older_example().build(), "1.2": blob_of(example(), tmp_path_factory.mktemp("honest"))}


@pytest.fixture(scope="module")
def refusals(
    honest: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], e.TaskFileError]:
    path = tmp_path_factory.mktemp("bad") / "bad.taps"
    caught: dict[tuple[str, str], e.TaskFileError] = {}
    for name, (_, _, make, layouts) in CASES.items():
        for layout in layouts:
            path.write_bytes(make(honest[layout]))
            try:
                store.load(path, kind="task")
            except e.TaskFileError as error:
                caught[name, layout] = error
    return caught


@pytest.mark.parametrize("layout", BOTH)
def test_the_forger_is_honest_when_it_changes_nothing(layout: str, honest: dict[str, bytes]) -> None:
    assert Draft.of(honest[layout]).build() == honest[layout]


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, case in CASES.items() for layout in case[3]])
def test_refused_by_name(name: str, layout: str, refusals: dict[tuple[str, str], e.TaskFileError]) -> None:
    error, words, _, _ = CASES[name]
    assert (name, layout) in refusals, "the file was accepted"
    caught = refusals[name, layout]
    assert type(caught) is error
    assert str(caught) == f"{caught.path}: {caught.problem}" and caught.path.endswith("bad.taps")
    for word in words:
        assert word in caught.problem
    assert str(caught).isprintable() and len(caught.problem) < 500


def test_messages_differ(refusals: dict[tuple[str, str], e.TaskFileError]) -> None:
    for layout in BOTH:
        of = [error.problem for (_, found), error in refusals.items() if found == layout]
        assert len({*of}) == len(of) >= 60


def test_every_class_of_refusal_is_shown() -> None:
    shown = {case[0] for case in CASES.values()}
    elsewhere = {e.MissingFileError, e.NotRegularFileError, e.UnsupportedTensorError, e.ParentMismatchError}
    elsewhere |= {e.TensorValueError, e.BadPathError}  # tests/files/test_values.py
    elsewhere |= {e.PackedTensorError}  # the kind's affair, not the store's: tests/files/test_packed_files.py
    every = {c for c in vars(e).values() if isinstance(c, type) and issubclass(c, e.TaskFileError)}
    assert shown | elsewhere | {e.TaskFileError} == every
