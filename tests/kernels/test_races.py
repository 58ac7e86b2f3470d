"""No two threads of a kernel race, proven from nvcc's PTX (tests/helpers/races.py), and planted races are found.

A proof is of one launch, whose sizes and alignments it takes as they are: small ones, with more than one block where
there can be more, and with every ring of stages filled anew.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ptx_files import CODES, Arguments, demangled, layout_of, needs_nvcc, text_of
from races import Launch, Verdict, entry_of, needs_verifier, verdict

pytestmark = [pytest.mark.sanitize, needs_nvcc, needs_verifier]
BYTES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}
NAMES = {"f32": "float", "bf16": "taps::dev::bf16", "f16": "taps::dev::f16"}
ADDRESS = 1 << 32  # of every object: only its low bits are asked for, and objects do not overlap
CLUSTERED = "clustered_product<"  # of these there are no proofs: the verifier knows no clusters
CODECS = ("bitmask", "int8", "int4", "sign")  # Codec
BF16, MIXED, WIDE = ("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32"), ("bf16", "f32", "f32")  # x, W, Delta
FULL = ("f32", "f32", "f32")
HALF, MIXED_HALF, WIDE_HALF = ("f16", "f16", "f16"), ("f16", "f16", "f32"), ("f16", "f32", "f32")
TYPES, DOUBLE = (BF16, MIXED, WIDE, HALF, MIXED_HALF, WIDE_HALF), ("f64", "f64", "f64")


class Layout:
    """Arguments of a launch and the objects among them, at addresses that are multiples of 16 plus so many bytes."""

    def __init__(self, layout: Mapping[str, int], name: str) -> None:
        self.arguments, self.layout, self.name = Arguments(layout, name), layout, name
        self.pointers: dict[int, str] = {}
        self.set = self.arguments.set

    def object(self, field: str, *rest: int, name: str = "", offset: int = 0, base: int = 0) -> None:
        """An object's address, and the field behind it; `base`: where this struct is in that of the launch."""
        self.set(field, "Q" + "q" * len(rest), ADDRESS + offset, *rest)
        self.pointers[base + self.layout[f"{self.name}.{field}"]] = name or field

    def gate(self, opened: bool = True) -> None:
        self.set("gate.open", "?", opened)
        self.set("gate.threshold", "d", 0.1)


@dataclass(frozen=True)
class Linear:
    """One of the three products. `offset`: elements that a matrix begins behind 16 bytes; `padding`: columns."""

    kind: str
    types: tuple[str, str, str]
    rows: int
    outputs: int
    inputs: int
    architecture: str = "compute_90a"
    opened: bool = True
    splits: int = 1
    offset: int = 0
    padding: int = 0
    wide: int = 0  # rows of tiles of 128 columns
    file = "linear"
    guess = False

    def __str__(self) -> str:
        words = [self.kind, self.types[0], self.types[2], f"{self.rows}x{self.outputs}x{self.inputs}"]
        words += [] if self.types[0] == self.types[1] else ["wide"]
        words += [] if self.opened else ["closed"]
        words += [f"{name}{n}" for name, n in (("offset", self.offset), ("padding", self.padding)) if n]
        words += [f"splits{self.splits}"] if self.splits > 1 else []
        words += [f"tiles{self.wide}"] if self.wide else []
        return "-".join(words + ([] if self.architecture == "compute_90a" else [self.architecture]))

    @property
    def tile(self) -> tuple[int, int, int]:
        """Rows, columns, depth of a step."""
        if self.wide:
            return self.wide, 128, 16 if self.types[2] == "f32" else 32
        return (16, 32, 64) if self.rows <= 16 and self.kind == "forward" else (64, 64, 32)

    @property
    def without_tiles(self) -> bool:
        return self.rows <= 4 and self.kind == "forward"

    @property
    def pattern(self) -> str:
        compute, weight, delta = (NAMES[one] for one in self.types)
        if self.kind == "weight":
            return rf"WeightGradient<.*>, {compute}, {delta}>"
        if self.without_tiles:
            return rf"Rows<{1 if self.rows == 1 else 4}, {compute}, {weight}, {delta}>"
        turned = "true" if self.kind == "input" else "false"
        shape = rf"taps::dev::Shape<{self.tile[0]}, {self.tile[1]},.*>"
        return rf"Activation<{shape}, {compute}, {weight}, {delta}, {turned}>"

    def launch(self, layout: Mapping[str, int], kernel: str, shared: int) -> Launch:
        made = Layout(layout, "LinearProduct")
        compute, weight, delta = self.types
        m, n, k = self.rows, self.outputs, self.inputs
        for name, value in (("rows", m), ("outputs", n), ("inputs", k)):
            made.set(name, "q", value)
        for name, kind, columns in (("x", compute, k), ("dy", compute, n), ("weight", weight, k), ("delta", delta, k)):
            made.object(name, columns + self.padding, offset=self.offset * BYTES[kind])
        for name, kind in (("compute", compute), ("weight_dtype", weight), ("delta_dtype", delta)):
            made.set(name, "B", CODES[kind])
        made.gate(self.opened)
        rows, columns = (n, k) if self.kind == "weight" else (m, n if self.kind == "forward" else k)
        depth = {"forward": k, "input": n, "weight": m}[self.kind]
        made.object("result")
        made.set("ld_result", "q", columns)
        made.object("memory")
        if self.kind == "forward":
            made.object("bias")
        if self.kind == "weight":
            made.object("score_gradient")
        made.set("scale", "d", 2.0)
        tile_rows, tile_columns, tile_depth = self.tile
        splits, per_split = self.splits, -(-depth // (tile_depth * self.splits)) * tile_depth
        if self.without_tiles:  # as many slices of a block, each a whole number of lines of memory
            splits, tile_columns = 1, 16 // self.splits
        made.set("splits", "i", splits)
        made.set("slices", "i", self.splits if self.without_tiles else 1)
        made.set("depth_of_split", "q", depth if self.kind == "weight" else per_split)
        tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
        threads = 128 if self.kind == "weight" else 256
        return Launch(kernel, bytes(made.arguments.bytes), made.pointers, (tiles, splits), threads, shared)


@dataclass(frozen=True)
class AddSplits(Linear):
    """What adds the sums of splits."""

    def __str__(self) -> str:
        return f"add_splits-{super().__str__()}"

    @property
    def pattern(self) -> str:
        return f"add_splits<{NAMES[self.types[0]]}>"

    def launch(self, layout: Mapping[str, int], kernel: str, shared: int) -> Launch:
        one, count = super().launch(layout, kernel, shared), self.rows * self.outputs
        arguments = one.arguments + struct.pack("<2q", self.rows, self.outputs)
        return replace(one, arguments=arguments, blocks=(-(-count // 256), 1), threads=256)


@dataclass(frozen=True)
class Tensor:
    """W_t as a tensor, of W and Delta dense in `layout`: flat, a list of tensors (foreach), or turned (any strides).

    `in_place`: over W. `offset`: elements that out and W begin behind 16 bytes.
    """

    walk: str
    types: tuple[str, str, str]
    rows: int
    columns: int
    in_place: bool = False
    offset: int = 0
    architecture: str = "compute_90a"
    file = "reconstruct"
    guess = False

    def __str__(self) -> str:
        place = "-in-place" if self.in_place else ""
        return f"{self.walk}-{'-'.join(self.types)}-{self.rows}x{self.columns}{place}-offset{self.offset}"

    @property
    def pattern(self) -> str:
        name = {"flat": "reconstruct_flat", "turned": "reconstruct_strided", "foreach": "foreach_chunks"}[self.walk]
        return f"{name}<{'double' if 'f64' in self.types else 'float'}>"

    def rebuild(self, made: Layout, base: int = 0, before: str = "") -> None:
        for field, kind in zip(("out", "weight", "delta"), self.types, strict=True):
            name = before + ("weight" if self.in_place and field == "out" else field)
            made.object(field, name=name, base=base, offset=self.offset * BYTES[kind] if field != "delta" else 0)
            made.set(f"{field}_dtype", "B", CODES[kind])
        made.set("scale", "d", 1.0)
        made.gate()

    def launch(self, layout: Mapping[str, int], kernel: str, shared: int) -> Launch:
        if self.walk == "foreach":
            return self.list_of(layout, kernel)
        made = Layout(layout, "Reconstruct")
        self.rebuild(made)
        made.set("walk.numel", "q", self.rows * self.columns)
        tail = bytes([self.offset == 0])
        if self.walk == "turned":
            made.set("walk.ndim", "i", 2)
            made.set("walk.sizes", "2q", self.rows, self.columns)
            strides, tail = ((self.columns, 1), (1, self.rows), (self.columns, 1)), b""
            for k, one in enumerate(strides):
                struct.pack_into("<2q", made.arguments.bytes, layout["Reconstruct.walk.strides"] + 64 * k, *one)
        return Launch(kernel, bytes(made.arguments.bytes) + tail, made.pointers, (2, 1), 256, shared)

    def list_of(self, layout: Mapping[str, int], kernel: str) -> Launch:
        """One of a number, one of this size, one of two pieces."""
        whole, end, counts = Layout(layout, "ForeachReconstruct"), 0, (1, self.rows * self.columns, 16385)
        for index, count in enumerate(counts):
            item, size = Layout(layout, "Rebuild"), layout["Rebuild"]
            self.rebuild(item, base=index * size, before="abc"[index] + ".")
            whole.arguments.bytes[index * size : (index + 1) * size] = item.arguments.bytes
            whole.pointers |= item.pointers
            end += -(-count // 16384)
            struct.pack_into("<q", whole.arguments.bytes, layout["ForeachReconstruct.numel"] + 8 * index, count)
            struct.pack_into("<i", whole.arguments.bytes, layout["ForeachReconstruct.end"] + 4 * index, end)
        whole.set("count", "i", len(counts))
        return Launch(kernel, bytes(whole.arguments.bytes), whole.pointers, (end, 1), 256, 0)


@dataclass(frozen=True)
class Packed(Tensor):
    """W_t of a packed Delta; the walk is its codec, or "count" for the bits of a bitmask's chunks."""

    file = "unpack"

    @property
    def codec(self) -> str:
        return "bitmask" if self.walk == "count" else self.walk

    @property
    def pattern(self) -> str:
        kind = "double" if "f64" in self.types else "float"
        names = {"count": "count_bitmask<", "bitmask": f"unpack_bitmask<{kind}"}
        return names.get(self.walk, f"unpack_codes<{kind}>")

    @property
    def guess(self) -> bool:
        return self.walk == "bitmask"

    def launch(self, layout: Mapping[str, int], kernel: str, shared: int) -> Launch:
        made, count = Layout(layout, "Unpack"), self.rows * self.columns
        for field, kind in zip(("out", "weight"), self.types[:2], strict=True):
            made.object(field, name="weight" if self.in_place else field, offset=self.offset * BYTES[kind])
            made.set(f"{field}_dtype", "B", CODES[kind])
        made.set("scale", "d", 1.0)
        made.gate()
        made.set("delta.codec", "b", CODECS.index(self.codec))
        made.object("delta.codes")
        made.object("delta.values")
        made.set("delta.rows", "q", self.rows)
        made.set("delta.columns", "q", self.columns)
        blocks = 2
        if self.codec == "bitmask":
            made.set("delta.kept", "q", count // 3)
            made.set("chunk", "q", 4096)  # two tiles
            made.object("counts")
            blocks = -(-count // 4096) - (self.walk == "count")
        tail = b"" if self.walk == "count" else bytes([self.offset == 0])
        return Launch(kernel, bytes(made.arguments.bytes) + tail, made.pointers, (blocks, 1), 256, shared)


@dataclass(frozen=True)
class Dot:
    """<G, Delta>: flat, turned, or the sum of what the blocks have left ("finish", of `rows` of them)."""

    walk: str
    types: tuple[str, str]
    rows: int
    columns: int
    offset: int = 0
    architecture: str = "compute_90a"
    file = "dot"
    guess = False

    def __str__(self) -> str:
        return f"dot-{self.walk}-{'-'.join(self.types)}-{self.rows}x{self.columns}-offset{self.offset}"

    @property
    def pattern(self) -> str:
        flat = f"dot_flat<{'double' if 'f64' in self.types else 'float'}"
        return {"flat": flat, "turned": "dot_strided<", "finish": "dot_finish<"}[self.walk]

    def launch(self, layout: Mapping[str, int], kernel: str, shared: int) -> Launch:
        if self.walk == "finish":
            arguments = struct.pack("<QqdQB", ADDRESS, self.rows, 0.5, ADDRESS, CODES["f32"])
            return Launch(kernel, arguments, {0: "partials", 24: "result"}, (1, 1), 256, shared)
        made, count, turned = Layout(layout, "Dot"), self.rows * self.columns, self.walk == "turned"
        for field, kind in zip("ab", self.types, strict=True):
            made.object(field, offset=self.offset * BYTES[kind])
            made.set(f"{field}_dtype", "B", CODES[kind])
        made.object("partials")
        made.set("walk.numel", "q", count)
        made.set("walk.ndim", "i", 2 if turned else 1)
        made.set("walk.sizes", "2q", self.rows if turned else count, self.columns)
        for k, one in enumerate(((self.columns, 1), (1, self.rows)) if turned else ((1, 0), (1, 0))):
            struct.pack_into("<2q", made.arguments.bytes, layout["Dot.walk.strides"] + 64 * k, *one)
        chunks = -(-self.rows // max(1, 16384 // self.columns)) if turned else -(-count // 16384)
        tail = struct.pack("<q", -(-count // chunks)) if turned else bytes([self.offset == 0])
        return Launch(kernel, bytes(made.arguments.bytes) + tail, made.pointers, (chunks, 1), 256, shared)


@dataclass(frozen=True)
class Convolved(Linear):
    """A convolution's forward: `outputs` of a kernel over one image of whole pixels, [size, size, channels].

    `rows` and `inputs` follow from these. `between`: elements between the channels of two pixels.
    """

    channels: int = 0
    size: int = 0
    kernel: int = 3
    stride: int = 1
    images: int = 1
    dilation: int = 1
    between: int = 0
    file = "conv2d"

    def __str__(self) -> str:
        place = f"{self.images}x{self.size}x{self.size}-{self.kernel}x{self.kernel}"
        place += f"-stride{self.stride}" if self.stride > 1 else ""
        place += f"-dilation{self.dilation}" if self.dilation > 1 else ""
        place += f"-between{self.between}" if self.between else ""
        return f"conv2d-{super().__str__()}-{place}"

    @property
    def pattern(self) -> str:
        compute, weight, delta = (NAMES[one] for one in self.types)
        return rf"Convolved<taps::dev::Shape<{self.tile[0]},.*>, {compute}, {weight}, {delta}>"

    def launch(self, layout: Mapping[str, int], kernel: str, shared: int) -> Launch:
        one = super().launch({**layout, "LinearProduct": layout["Convolution"]}, kernel, shared)
        made, step = Arguments(layout, "Convolution"), self.channels + self.between
        made.bytes = bytearray(one.arguments)  # a convolution begins with its product
        made.set("channels", "q", self.channels)
        made.set("x_strides", "4q", self.size * self.size * step, 1, self.size * step, step)
        pixels = result_size(self.size, self.kernel, self.stride, self.dilation)
        assert self.rows == self.images * pixels**2 and self.inputs == self.kernel**2 * self.channels
        for name, value in (
            ("size", self.size),
            ("kernel", self.kernel),
            ("stride", self.stride),
            ("padding", self.kernel // 2),
            ("dilation", self.dilation),
            ("result_size", pixels),
        ):
            made.set(name, "2q", value, value)
        return replace(one, arguments=bytes(made.bytes))


def result_size(size: int, kernel: int, stride: int, dilation: int = 1) -> int:
    """Pixels of a result, with a padding of half a kernel."""
    return (size + 2 * (kernel // 2) - dilation * (kernel - 1) - 1) // stride + 1


def convolved(
    types: tuple[str, str, str], channels: int, size: int, outputs: int, *, kernel: int = 3, **more: Any
) -> Convolved:
    pixels = result_size(size, kernel, more.get("stride", 1), more.get("dilation", 1))
    rows, inputs = more.get("images", 1) * pixels**2, kernel**2 * channels
    return Convolved("forward", types, rows, outputs, inputs, channels=channels, size=size, kernel=kernel, **more)


@dataclass(frozen=True)
class Depthwise:
    """A product of a depthwise convolution, or "settle" for the second pass of its weight's gradient.

    `offset`: elements that images begin behind 16 bytes, so that no vectors are read.
    """

    kind: str
    types: tuple[str, str, str]
    channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    images: int = 2
    vectors: int = 2
    splits: int = 2
    opened: bool = True
    offset: int = 0
    architecture: str = "compute_90a"
    file = "depthwise"
    guess = False

    def __str__(self) -> str:
        words = ["depthwise", self.kind, self.types[0], self.types[2], f"{self.kernel}x{self.kernel}"]
        words += [f"stride{self.stride}", f"{self.images}x{self.size}x{self.size}x{self.channels}"]
        words += [f"vectors{self.vectors}", f"splits{self.splits}"]
        words += ([] if self.opened else ["closed"]) + ([f"offset{self.offset}"] if self.offset else [])
        return "-".join(words)

    @property
    def pattern(self) -> str:
        if self.kind == "settle":
            return "depthwise_settle<"
        instance = f"{NAMES[self.types[0]]}, {self.kernel}, {self.stride}"
        if self.kind == "weight":
            return f"DepthwiseWeight<{instance}>"
        return f"DepthwiseActivation<{instance}, {'true' if self.kind == 'input' else 'false'}>"

    @property
    def strips(self) -> int:
        """As `strips_of` of depthwise.cuh."""
        backward, pixels = self.kind == "input", 4
        if self.kernel == 7:
            pixels = 2 if self.kind == "weight" else 3
        elif (self.kind, self.kernel, self.stride) == ("forward", 5, 2):
            pixels = 2
        size = self.size if backward else result_size(self.size, self.kernel, self.stride)
        before = self.kernel // 2 % self.stride if backward else 0
        return self.images * size * -(-(size + before) // pixels)

    def launch(self, layout: Mapping[str, int], kernel: str, shared: int) -> Launch:
        made, places = Layout(layout, "Depthwise"), self.kernel**2
        compute, weight, delta = self.types
        gradient = self.kind in ("weight", "settle")
        pixels = result_size(self.size, self.kernel, self.stride)
        for name in ("x", "dy"):
            made.object(name, 0, offset=self.offset * BYTES[compute])
        for name, kind in (("weight", weight), ("delta", delta)):
            made.object(name, places)
            made.set(f"{name}_dtype", "B", CODES[kind])
        made.set("compute", "B", CODES[compute])
        made.object("result", offset=0 if gradient else self.offset * BYTES[compute])
        made.set("ld_result", "q", places)
        made.object("bias")
        if gradient:
            made.object("memory")
            made.object("score_gradient")
        made.gate(self.opened)
        made.set("scale", "d", 2.0)
        for name, value in (("rows", self.images * pixels**2), ("outputs", self.channels), ("inputs", places)):
            made.set(name, "q", value)
        made.set("batch", "q", self.images)
        for name, value in (
            ("size", self.size),
            ("result_size", pixels),
            ("stride", self.stride),
            ("padding", self.kernel // 2),
        ):
            made.set(name, "2i", value, value)
        for name, value in (("kernel", self.kernel), ("vectors", self.vectors), ("splits", self.splits)):
            made.set(name, "i", value)
        made.set("depth_of_split", "q", -(-self.strips // self.splits))
        of_block = self.vectors * (16 // BYTES[compute])
        blocks = (-(-self.channels // of_block), self.splits)
        if self.kind == "settle":
            blocks = (-(-self.channels * places // 8), 1)
        return Launch(kernel, bytes(made.arguments.bytes), made.pointers, blocks, 256, shared)


@dataclass(frozen=True)
class Settled:
    """Gradients of a list of W_t, of those types: the pass over them ("chunks"), or the sums of scores ("scores").

    `turned`: the list's second G has channels last. `in_place`: Deltas' gradients are written over G. `offset`:
    elements that all begin behind 16 bytes. `closed`: the last gate.
    """

    walk: str
    types: tuple[str, str]
    rows: int
    columns: int
    turned: bool = False
    in_place: bool = False
    offset: int = 0
    closed: bool = False
    architecture: str = "compute_90a"
    file = "settle"
    guess = False

    def __str__(self) -> str:
        words = ["settle", self.walk, *self.types, f"{self.rows}x{self.columns}", f"offset{self.offset}"]
        return "-".join(words + [name for name in ("turned", "in_place", "closed") if getattr(self, name)])

    @property
    def pattern(self) -> str:
        return (
            f"settle_chunks<{'double' if 'f64' in self.types else 'float'},"
            if self.walk == "chunks"
            else "settle_scores<"
        )

    def launch(self, layout: Mapping[str, int], kernel: str, shared: int) -> Launch:
        """One of a number, whose score is not asked for, one of this size, one of two pieces."""
        whole, end, counts = Layout(layout, "ForeachSettle"), 0, (1, self.rows * self.columns, 16385)
        for index, count in enumerate(counts):
            item, size, before = Layout(layout, "Settle"), layout["Settle"], "abc"[index] + "."
            base = index * size
            for field, kind in zip(("gradient", "delta"), self.types, strict=True):
                item.object(field, name=before + field, base=base, offset=self.offset * BYTES[kind])
                item.set(f"{field}_dtype", "B", CODES[kind])
            over = "gradient" if self.in_place else "delta_gradient"
            item.object("delta_gradient", name=before + over, base=base, offset=self.offset * BYTES[self.types[1]])
            if index > 0:
                item.object("score_gradient", name=before + "score_gradient", base=base)
                item.set("score_dtype", "B", CODES["f32"])
            if self.turned and index == 1:
                item.set("inner", "I", 5)
                item.set("outer", "I", self.columns // 5)
            item.gate(not self.closed or index < 2)
            whole.arguments.bytes[base : base + size] = item.arguments.bytes
            whole.pointers |= item.pointers
            end += -(-count // 16384)
            struct.pack_into("<q", whole.arguments.bytes, layout["ForeachSettle.numel"] + 8 * index, count)
            struct.pack_into("<i", whole.arguments.bytes, layout["ForeachSettle.end"] + 4 * index, end)
        whole.set("count", "i", len(counts))
        whole.object("partials")
        blocks = end if self.walk == "chunks" else len(counts)
        return Launch(kernel, bytes(whole.arguments.bytes), whole.pointers, (blocks, 1), 256, shared)


Case = Linear | Tensor | Dot | Depthwise | Settled
LINEAR: list[Linear] = [
    # Whole stages, as many as a ring has (3, 4 or 6) and one more, so that the sums lie where a stage was just read.
    *(Linear("forward", types, 16, 64, 832) for types in TYPES),
    *(Linear("forward", types, 64, 128, 416) for types in TYPES),
    *(Linear("forward", types, rows, 21, 1096, splits=2) for types in TYPES for rows in (1, 4)),  # slices of a block
    *(Linear("forward", types, wide, 256, 416, wide=wide) for types in TYPES for wide in (64, 128)),
    *(Linear("input", types, 64, 416, 128) for types in TYPES),
    *(Linear("weight", types, 160, 128, 64) for types in (BF16, MIXED, HALF, MIXED_HALF)),
    # Tails in every direction: pieces of 4 bytes, and elements that are 2 bytes beside 4; rows apart; splits.
    Linear("forward", BF16, 5, 30, 330, splits=2),
    Linear("forward", MIXED, 5, 30, 330, padding=2),
    Linear("forward", BF16, 3, 31, 301),
    Linear("forward", MIXED, 1, 31, 302),
    Linear("forward", BF16, 9, 31, 301),
    Linear("forward", BF16, 33, 60, 198, splits=2),
    Linear("forward", MIXED, 20, 33, 101, padding=2),
    Linear("forward", MIXED, 35, 140, 198, splits=2, wide=64),
    Linear("forward", BF16, 70, 133, 101, wide=128),
    Linear("input", BF16, 20, 100, 34),
    Linear("input", MIXED, 33, 70, 67, offset=1),
    Linear("weight", BF16, 40, 34, 66),
    Linear("weight", MIXED, 33, 35, 67),
    # Closed gates have loops of their own.
    Linear("forward", BF16, 16, 64, 832, opened=False),
    Linear("forward", MIXED, 64, 128, 416, opened=False),
    Linear("forward", BF16, 4, 21, 1096, opened=False, splits=4),
    Linear("forward", BF16, 128, 256, 416, opened=False, wide=128),
    Linear("input", WIDE, 64, 416, 128, opened=False),
    Linear("weight", BF16, 160, 128, 64, opened=False),
    # The other architecture.
    Linear("forward", HALF, 16, 64, 832, architecture="compute_80"),
    Linear("forward", HALF, 4, 21, 1096, architecture="compute_80", splits=2),
    Linear("forward", BF16, 64, 128, 416, architecture="compute_80"),
    Linear("forward", BF16, 64, 256, 416, architecture="compute_80", wide=64),
    Linear("input", MIXED, 64, 416, 128, architecture="compute_80"),
    Linear("weight", MIXED, 160, 128, 64, architecture="compute_80"),
    *(AddSplits("forward", types, 33, 60, 198, splits=2) for types in (BF16, HALF)),
]
TENSORS: list[Case] = [
    Tensor("flat", MIXED, 64, 65),
    Tensor("flat", MIXED, 64, 65, in_place=True),
    Tensor("flat", BF16, 64, 65, offset=1),
    *(Tensor(walk, DOUBLE, 64, 65) for walk in ("flat", "turned", "foreach")),
    Tensor("turned", MIXED, 33, 130),
    Tensor("foreach", MIXED, 64, 65, in_place=True),
    Tensor("foreach", BF16, 64, 65, offset=1),
    *(Packed(codec, MIXED, 40, 130) for codec in ("sign", "int4", "int8")),
    *(Packed(codec, MIXED, 45, 137, offset=1, in_place=True) for codec in ("sign", "int4", "int8")),
    Packed("count", MIXED, 90, 137),
    Packed("bitmask", MIXED, 90, 137),
    Packed("bitmask", MIXED, 90, 137, offset=1, in_place=True),
    *(Packed(codec, DOUBLE, 40, 130) for codec in ("int4", "bitmask")),
    Dot("flat", ("bf16", "f32"), 40, 500),
    Dot("flat", ("bf16", "f32"), 40, 500, offset=1),
    Dot("flat", ("f64", "f32"), 40, 500),
    Dot("turned", ("bf16", "f32"), 40, 500),
    Dot("finish", ("f64", "f64"), 700, 1),
]
CONVOLUTIONS: list[Convolved] = [
    # Whole stages, nine of them. All threads go to the next place of the kernel at once: where they do not, each on its
    # own path, a proof takes ten times as long.
    *(convolved(types, 64, 4, 64) for types in TYPES),
    *(convolved(types, 32, 8, 128) for types in TYPES),
    # Tails in every direction, several places of the kernel to a stage, splits.
    convolved(BF16, 8, 4, 33),
    convolved(MIXED, 8, 7, 33, stride=2, splits=2, between=8),
    convolved(WIDE, 24, 3, 31),
    convolved(BF16, 8, 6, 30, images=2),
    convolved(MIXED, 32, 9, 66, stride=2, images=3, splits=2),
    convolved(HALF, 8, 6, 60, dilation=2, images=5, between=8),
    convolved(BF16, 64, 4, 64, opened=False),
    convolved(MIXED, 32, 8, 128, opened=False),
    convolved(HALF, 64, 4, 64, architecture="compute_80"),
    convolved(MIXED, 32, 8, 128, architecture="compute_80"),
]
DEPTHWISE: list[Depthwise] = [
    # Every instance, with three vectors of channels, two to a block.
    *(
        Depthwise(kind, types, 48 // BYTES[types[0]], 9, kernel, stride)
        for types in (MIXED, MIXED_HALF, FULL)
        for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1))
        for kind in ("forward", "input", "weight")
    ),
    *(Depthwise("settle", types, 20, 9) for types in (BF16, MIXED)),
    # Splits of more than 32 of G, one to a thread, so that a thread has more than one.
    Depthwise("settle", FULL, 20, 9, splits=40),
    # More strips than threads; channels one by one, and one at the end; closed gates.
    *(Depthwise(kind, BF16, 72, 9, vectors=8, splits=1) for kind in ("forward", "input", "weight")),
    *(Depthwise(kind, BF16, 24, 7, offset=1) for kind in ("forward", "input", "weight")),
    *(Depthwise(kind, MIXED, 17, 7, vectors=1, splits=3) for kind in ("forward", "input", "weight")),
    *(Depthwise(kind, MIXED, 24, 9, opened=False) for kind in ("forward", "input", "settle")),
]
SETTLED: list[Settled] = [
    Settled("chunks", ("bf16", "f32"), 64, 65),
    Settled("chunks", ("bf16", "f32"), 64, 65, turned=True),
    Settled("chunks", ("bf16", "bf16"), 64, 65, in_place=True, closed=True),
    Settled("chunks", ("f16", "f32"), 64, 65, offset=1),
    Settled("chunks", ("f64", "f64"), 64, 65, in_place=True),
    Settled("chunks", ("f64", "f64"), 64, 65, turned=True, closed=True),
    Settled("scores", ("bf16", "f32"), 64, 65),
]
CASES: list[Case] = [*LINEAR, *TENSORS, *CONVOLUTIONS, *DEPTHWISE, *SETTLED]


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return layout_of(tmp_path_factory)


@pytest.fixture
def prove(tmp_path_factory, layout, tmp_path: Path) -> Callable[..., Verdict]:
    """What the verifier says of a case, with a change of the kernel's text."""

    def proven(case: Case, change: Callable[[str], str] = lambda entry: entry) -> Verdict:
        text = text_of(tmp_path_factory, case.file, case.architecture)
        names = demangled({name: name for name in re.findall(r"\.entry (\w+)\(", text)})
        found = [full for full in names if re.search(case.pattern, full) and CLUSTERED not in full]
        assert len(found) == 1, (case.pattern, found)
        shared = int(match[1]) if (match := re.search(r"(\d+)u>\(", found[0])) else 0
        entry = entry_of(text, names[found[0]])
        if case.guess:
            entry = without_values(entry)
        return verdict(change(entry), case.launch(layout, names[found[0]], shared), tmp_path, guess=case.guess)

    return proven


def without_values(entry: str) -> str:
    """A bitmask's values are not read: where one is depends on the bits, and an address that nobody knows may be
    anywhere. Nothing writes them."""
    changed, count = re.subn(r"ld\.global\.u32\s+(%r\d+), \[%rd\d+\];", r"mov.u32 \1, 0;", entry)
    assert count >= 8, "one for each bit of a byte"
    return changed


@pytest.mark.parametrize("file", ["linear", "reconstruct", "unpack", "dot", "conv2d", "depthwise", "settle"])
def test_every_kernel_has_a_proof(file: str, tmp_path_factory) -> None:
    entries = re.findall(r"\.entry (\w+)\(", text_of(tmp_path_factory, file, "compute_90a"))
    patterns = [case.pattern for case in CASES if case.file == file]
    for name in demangled({name: name for name in entries}):
        assert any(re.search(pattern, name) for pattern in patterns) or CLUSTERED in name, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_race(case: Case, prove: Callable[..., Verdict]) -> None:
    found = prove(case)
    assert found.race_free, (found.result, found.checks, found.reasons)
    assert bool(found.guessed) == case.guess  # whether there is a value


# --- planted races -------------------------------------------------------------------------------------------------


def replaced(pattern: str, change: str | Callable[[re.Match[str]], str]) -> Callable[[str], str]:
    def changed(entry: str) -> str:
        text, count = re.subn(pattern, change, entry)
        assert count > 0, "the change finds no place"
        return text

    return changed


def without_barriers(of: int, *places: int) -> Callable[[str], str]:
    """Some of a kernel's barriers left out, of so many."""

    def changed(entry: str) -> str:
        parts = re.split(r"bar\.sync\s+0;", entry)
        assert len(parts) == of + 1, f"{len(parts) - 1} barriers"
        return parts[0] + "".join(("" if at in places else "bar.sync 0;") + part for at, part in enumerate(parts[1:]))

    return changed


one_block = replaced(r"mov\.u32\s+(%r\d+), %ctaid\.x;", r"mov.u32 \1, 0;")
one_split = replaced(r"mov\.u32\s+(%r\d+), %ctaid\.y;", r"mov.u32 \1, 0;")
one_thread = replaced(r"mov\.u32\s+(%r\d+), %tid\.x;", r"mov.u32 \1, 0;")
too_early = replaced(r"cp\.async\.wait_group ([1-9]);", lambda found: f"cp.async.wait_group {int(found[1]) + 1};")
no_barriers = replaced(r"bar\.sync\s+0;", "")
# The barriers of a product: the loops' of a closed and an open gate, then before and after a slice's sums are written,
# twice; of a weight gradient: the loop's, before and after the warps' sums are written.
loops, before_slices, after_slices = (without_barriers(6, *places) for places in ((0, 1), (2, 4), (3, 5)))
FEW, MORE = Linear("forward", BF16, 16, 64, 832), Linear("forward", MIXED, 64, 128, 416)
IMAGES, IMAGE = convolved(BF16, 32, 8, 128), convolved(MIXED, 64, 4, 64)
NO_TILES = Linear("forward", BF16, 4, 21, 1096, splits=2)
WIDE_TILES = Linear("forward", MIXED, 128, 256, 416, wide=128)
INPUT, WEIGHT = Linear("input", BF16, 64, 416, 128), Linear("weight", BF16, 160, 128, 64)
PLANTED: dict[str, tuple[Case, Callable[[str], str]]] = {
    "few rows, a group too few is waited for": (FEW, too_early),
    "few rows, no barrier in the loop": (FEW, loops),
    "few rows, no barrier before the slices' sums": (FEW, before_slices),
    "few rows, no barrier behind the slices' sums": (FEW, after_slices),
    "few rows, all blocks write one tile": (FEW, one_block),
    "few rows, two splits write one sum": (Linear("forward", BF16, 5, 30, 330, splits=2), one_split),
    "no tiles, no barrier": (NO_TILES, without_barriers(1, 0)),
    "no tiles, all blocks write the same outputs": (NO_TILES, one_block),
    "more rows, a group too few is waited for": (MORE, too_early),
    "more rows, no barrier in the loop": (MORE, loops),
    "more rows, no barrier before the slices' sums": (MORE, before_slices),
    "more rows, all blocks write one tile": (MORE, one_block),
    "wide tiles, a group too few is waited for": (WIDE_TILES, too_early),
    "wide tiles, no barrier in the loop": (WIDE_TILES, without_barriers(2, 0, 1)),
    "wide tiles, all blocks write one tile": (WIDE_TILES, one_block),
    "input gradient, a group too few is waited for": (INPUT, too_early),
    "input gradient, no barrier in the loop": (INPUT, loops),
    "input gradient, no barrier behind the slices' sums": (INPUT, after_slices),
    "weight gradient, a group too few is waited for": (WEIGHT, too_early),
    "weight gradient, no barrier in the loop": (WEIGHT, without_barriers(3, 0)),
    "weight gradient, no barrier before the warps' sums": (WEIGHT, without_barriers(3, 1)),
    "weight gradient, no barrier behind the warps' sums": (WEIGHT, without_barriers(3, 2)),
    "weight gradient, all blocks write one tile": (WEIGHT, one_block),
    "splits added, all blocks the same": (AddSplits("forward", BF16, 33, 60, 198, splits=2), one_block),
    "rebuild, all blocks the same": (Tensor("flat", MIXED, 64, 65), one_block),
    "turned rebuild, all threads the same": (Tensor("turned", MIXED, 33, 130), one_thread),
    "list, all threads the same": (Tensor("foreach", MIXED, 64, 65), one_thread),
    "codes, all blocks the same": (Packed("int4", MIXED, 40, 130), one_block),
    "bits counted, no barriers": (Packed("count", MIXED, 90, 137), no_barriers),
    # Its last barrier, behind the warps' counts of bits, does not do: without it the verifier does not go on to races.
    "bitmask, no barrier behind the sum of counts": (Packed("bitmask", MIXED, 90, 137), without_barriers(10, 8)),
    "dot, no barriers": (Dot("flat", ("bf16", "f32"), 40, 500), no_barriers),
    "dot, all blocks leave one sum": (Dot("turned", ("bf16", "f32"), 40, 500), one_block),
    "dot's end, no barriers": (Dot("finish", ("f64", "f64"), 700, 1), no_barriers),
    "images, a group too few is waited for": (IMAGES, too_early),
    "images, no barrier in the loop": (IMAGES, loops),
    "images, no barrier before the slices' sums": (IMAGES, before_slices),
    "images, all blocks write one tile": (IMAGES, one_block),
    "images, two splits write one sum": (convolved(BF16, 32, 8, 64, splits=2), one_split),
    "one image, a group too few is waited for": (IMAGE, too_early),
    "one image, threads without a row fetch one": (
        IMAGE,
        replaced(r"(setp\.lt\.s32\s+%p\d+, %r\d+), 128;", r"\1, 256;"),
    ),
    "one image, no barrier in the loop": (IMAGE, loops),
    "one image, no barrier behind the slices' sums": (IMAGE, after_slices),
    "one image, all blocks write one tile": (IMAGE, one_block),
    "depthwise, no barrier behind W_t": (Depthwise("forward", MIXED, 24, 9), no_barriers),
    "depthwise, all groups of channels the same": (Depthwise("forward", FULL, 12, 9), one_block),
    "depthwise, all splits the same": (Depthwise("forward", MIXED, 24, 9), one_split),
    "depthwise input gradient, no barrier behind W_t": (Depthwise("input", FULL, 12, 9, 5), no_barriers),
    "depthwise input gradient, all groups of channels the same": (Depthwise("input", MIXED, 24, 9), one_block),
    "depthwise input gradient, all splits the same": (Depthwise("input", MIXED, 24, 9, 3, 2), one_split),
    # Of a weight gradient: before and behind what the threads leave of each column of the kernel, but before the first.
    "depthwise weight gradient, no barrier behind a column": (
        Depthwise("weight", MIXED, 24, 9),
        without_barriers(5, 2),
    ),
    "depthwise weight gradient, no barrier before one": (Depthwise("weight", FULL, 12, 9, 5), without_barriers(9, 7)),
    "depthwise weight gradient, all groups of channels the same": (Depthwise("weight", MIXED, 24, 9), one_block),
    "depthwise weight gradient, all splits the same": (Depthwise("weight", FULL, 12, 9), one_split),
    "depthwise second pass, no barrier behind the sums": (Depthwise("settle", MIXED, 24, 9), without_barriers(2, 0)),
    "depthwise second pass, no barrier behind the dots": (Depthwise("settle", MIXED, 24, 9), without_barriers(2, 1)),
    "depthwise second pass, all blocks the same": (Depthwise("settle", MIXED, 24, 9), one_block),
    "gradients settled, no barriers": (Settled("chunks", ("bf16", "f32"), 64, 65), no_barriers),
    "gradients settled, all blocks the same": (Settled("chunks", ("bf16", "f32"), 64, 65), one_block),
    "gradients settled over G, all threads the same": (
        Settled("chunks", ("bf16", "bf16"), 64, 65, in_place=True),
        one_thread,
    ),
    "scores settled, no barriers": (Settled("scores", ("bf16", "f32"), 64, 65), no_barriers),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_race_is_found(name: str, prove: Callable[..., Verdict]) -> None:
    case, change = PLANTED[name]
    found = prove(case, change)
    assert found.race, (found.result, found.checks, found.reasons)
