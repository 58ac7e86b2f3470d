"""The gated convolution's forward as nvcc emits it, run on the CPU (tests/helpers/ptx.py).

Random images, kernels, strides, paddings, dilations, types, splits and gates against whole numbers, which every order
of sums gives exactly; and changes of that text, each of which is found.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import ptx
import pytest
from ptx_files import CODES, Arguments, Texts, demangled, layout_of, needs_nvcc, number, stored, text_of
from stages import SEED, THOROUGH, drawn

pytestmark = needs_nvcc
ARCHITECTURES = ("compute_80", "compute_90a")
TYPES = [("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32"), ("bf16", "f32", "f32")]
TYPES += [("f16", "f16", "f16"), ("f16", "f16", "f32"), ("f16", "f32", "f32")]
Pair = tuple[int, int]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts[dict[str, str]]:
    """Architecture -> file of kernels -> its PTX; the sums over splits are the linear layer's."""
    return Texts(lambda architecture: {f: text_of(tmp_path_factory, f, architecture) for f in ("conv2d", "linear")})


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Where the fields of the arguments are."""
    return layout_of(tmp_path_factory)


@cache
def kernels(text: str) -> dict[tuple[Any, ...], tuple[ptx.Kernel, int]]:
    """(type, weight's, Delta's, few pixels) -> kernel and shared memory."""
    found: dict[tuple[Any, ...], tuple[ptx.Kernel, int]] = {}
    short = {"taps::dev::bf16": "bf16", "taps::dev::f16": "f16", "float": "f32"}
    for name, kernel in demangled(ptx.parse(text)).items():
        types = [short[one] for one in re.findall(r", (taps::dev::b?f16|float)(?=[,>])", name)]
        (shared,) = re.findall(r"(\d+)u>\(", name)
        found[(*types, "Shape<16," in name)] = kernel, int(shared)
    return found


@cache
def adding(text: str) -> dict[str, ptx.Kernel]:
    """Type -> the kernel that adds the splits."""
    names = demangled(ptx.parse(text))
    return {m[1]: k for name, k in names.items() if (m := re.search(r"add_splits<taps::dev::(b?f16)>", name))}


@dataclass
class Problem:
    """A convolution. `between`: elements between the channels of one pixel and of the next."""

    types: tuple[str, str, str]
    images: int
    channels: int
    size: Pair
    outputs: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    open: bool = True
    on_device: bool = False
    splits: int = 1
    between: int = 0
    bias: bool = False

    @property
    def pixels(self) -> Pair:
        """Lines and columns of the result."""
        spans = [
            s + 2 * p - d * (k - 1) - 1
            for s, p, d, k in zip(self.size, self.padding, self.dilation, self.kernel, strict=True)
        ]
        return tuple(span // step + 1 if span >= 0 else 0 for span, step in zip(spans, self.stride, strict=True))

    @property
    def rows(self) -> int:
        return self.images * self.pixels[0] * self.pixels[1]


def seen(x: Any, p: Problem) -> Any:
    """[images, height, width, channels] as [pixels of the result, kH * kW * channels]."""
    padded = np.pad(x, ((0, 0), *((one, one) for one in p.padding), (0, 0)))
    lines, columns = p.pixels
    places = []
    for r in range(p.kernel[0]):
        for s in range(p.kernel[1]):
            top, left = r * p.dilation[0], s * p.dilation[1]
            part = padded[:, top : top + lines * p.stride[0], left : left + columns * p.stride[1]]
            places.append(part[:, :: p.stride[0], :: p.stride[1]])
    return np.concatenate(places, axis=3).reshape(p.rows, -1)


def wrong(p: Problem, text: Mapping[str, str], layout: dict[str, int], chance: np.random.Generator) -> str:
    """What is wrong with the result; "" for nothing. Raises Fault."""
    memory = ptx.Memory(1 << 22, ptx.GLOBAL_BASE, "global")
    arguments = Arguments(layout, "Convolution")
    product = Arguments({**layout, "LinearProduct": layout["Convolution"]}, "LinearProduct")  # which it begins with
    product.bytes = arguments.bytes
    compute, of_weight, of_delta = p.types
    depth = p.channels * p.kernel[0] * p.kernel[1]

    def matrix(rows: int, columns: int, most: int, parts: int, kind: str, between: int = 0) -> tuple[Any, int]:
        """Whole numbers (or `parts` of them) in an allocation of exactly their size, NaN between the rows."""
        values = chance.integers(-most, most + 1, (rows, columns)) / parts
        filled = stored(np.full((rows, columns + between), np.nan), kind)
        filled[:, :columns] = stored(values, kind)
        return values, memory.put(filled.reshape(-1)[: filled.size - between])

    x, at = matrix(p.images * p.size[0] * p.size[1], p.channels, 2, 1, compute, p.between)
    product.set("x", "Q", at)
    step = p.channels + p.between
    arguments.set("x_strides", "4q", p.size[0] * p.size[1] * step, 1, p.size[1] * step, step)
    weight, at = matrix(p.outputs, depth, 8, 1, of_weight)
    product.set("weight", "Qq", at, depth)
    delta, at = matrix(p.outputs, depth, 255, 512, of_delta)  # so that W + Delta is rounded
    if not p.open:  # nothing may read it
        at = memory.reserve(delta.size * (4 if of_delta == "f32" else 2)) if p.on_device else 0
    product.set("delta", "Qq", at, depth)
    bias: Any = 0.0
    if p.bias:
        bias, at = matrix(1, p.outputs, 8, 1, compute)
        product.set("bias", "Q", at)
    for name, value in (("rows", p.rows), ("outputs", p.outputs), ("inputs", depth), ("ld_result", p.outputs)):
        product.set(name, "q", value)
    for name, kind in (("compute", compute), ("weight_dtype", of_weight), ("delta_dtype", of_delta)):
        product.set(name, "B", CODES[kind])
    product.set("gate.open", "?", p.open != p.on_device)  # of two that contradict each other the score counts
    product.set("gate.threshold", "d", 0.1)
    if p.on_device:
        product.set("gate.score", "Q", memory.put(np.array([0.2 if p.open else 0.05], np.float32)))
        product.set("gate.score_dtype", "B", CODES["f32"])
    arguments.set("channels", "q", p.channels)
    for name in ("size", "kernel", "stride", "padding", "dilation"):
        arguments.set(name, "2q", *getattr(p, name))
    arguments.set("result_size", "2q", *p.pixels)
    result = memory.reserve(2 * p.rows * p.outputs)
    product.set("result", "Q", result)
    product.set("memory", "Q", memory.reserve(4 * p.splits * p.rows * p.outputs))
    few = p.rows <= 16
    tile_rows, tile_columns, tile_depth = (16, 32, 64) if few else (64, 64, 32)
    tiles = -(-p.rows // tile_rows) * -(-p.outputs // tile_columns)
    product.set("splits", "i", p.splits)
    product.set("depth_of_split", "q", -(-depth // (tile_depth * p.splits)) * tile_depth)
    kernel, shared = kernels(text["conv2d"])[(*p.types, few)]
    for split in range(p.splits):
        for tile in range(tiles):
            place, grid = (tile, split), (tiles, p.splits)
            ptx.Block(kernel, memory, bytes(arguments.bytes), 256, place, grid, shared).run()
    if p.splits > 1:
        blocks = -(-p.rows * p.outputs // 256)
        given = bytes(arguments.bytes[: layout["LinearProduct"]]) + struct.pack("<2q", p.rows, p.outputs)
        for block in range(blocks):
            ptx.Block(adding(text["linear"])[compute], memory, given, 256, (block, 0), (blocks, 1), 0).run()
    used = number(stored(weight + (delta if p.open else 0.0), compute), compute)
    want = seen(x.reshape(p.images, *p.size, p.channels), p) @ used.T + bias
    got = number(memory.get(result, np.uint16, want.size), compute).reshape(want.shape)
    bad = got != number(stored(want, compute), compute)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        return f"{int(bad.sum())} of {bad.size} wrong, at {place} expected {want[place]}, got {got[place]}"
    return ""


def random_problem(chance: random.Random, types: tuple[str, str, str], few: bool) -> Problem:
    while True:
        pair = lambda *choices: (chance.choice(choices), chance.choice(choices))  # noqa: E731
        problem = Problem(
            types=types,
            images=chance.choice((1, 2, 3)),
            channels=chance.choice((8, 16, 24, 32, 40, 64, 72)),
            size=pair(1, 2, 4, 5, 7, 9),
            outputs=chance.choice((1, 8, 31, 33, 64, 66)),
            kernel=chance.choice(((1, 1), (3, 3), (3, 3), (2, 2), (1, 3), (5, 2), (5, 5))),
            stride=pair(1, 1, 2, 3),
            padding=pair(0, 1, 1, 2),
            dilation=pair(1, 1, 2),
            open=chance.random() < 0.75,
            on_device=chance.random() < 0.5,
            splits=chance.choice((1, 1, 2, 3)),
            between=chance.choice((0, 0, 8)),
            bias=chance.random() < 0.5,
        )
        if 0 < problem.rows <= 130 and (problem.rows <= 16) == few:
            return problem


@pytest.mark.parametrize("architecture", [pytest.param(ARCHITECTURES[0], marks=pytest.mark.thorough), ARCHITECTURES[1]])
def test_random_convolutions(architecture, texts, layout, record_property) -> None:
    """Each kernel in turn, so that none is left out."""
    chance, text = random.Random(f"{SEED} ptx conv2d"), texts[architecture]
    numbers = np.random.default_rng(int(SEED))
    record_property("drawn", f"ptx by seed {SEED}")
    assert kernels(text["conv2d"]).keys() == {(*types, few) for types in TYPES for few in (False, True)}
    for round_ in range(4 if THOROUGH else 1):
        for *types, few in kernels(text["conv2d"]):
            problem = random_problem(chance, tuple(types), few)  # type: ignore[arg-type]
            try:
                said = wrong(problem, text, layout, numbers)
            except ptx.Fault as fault:
                said = str(fault)
            assert not said, f"{problem}, round {round_}: {said}"


# A piece of the text, its change, and the convolution that shows it.
SAME = ("bf16", "bf16", "bf16")
MANY = Problem(SAME, 2, 40, (5, 6), 33, (3, 3), padding=(1, 1))
FEW = Problem(("bf16", "bf16", "f32"), 1, 72, (4, 4), 33, (3, 3), padding=(1, 1))
CHANGES: dict[str, tuple[str, str, Problem]] = {
    "a copy too few is waited for": (r"cp\.async\.wait_group 2;", "cp.async.wait_group 3;", MANY),
    "padding is read, not zero": (r"(cp\.async\.cg\S+ \[\S+\], \[\S+\], 16), %\w+;", r"\1;", MANY),
    "pixels are not divided into lines": (r"div\.u32(\s+%\w+, %\w+), %\w+;", r"mov.u32\1;", MANY),
    "positions before the image are inside": (r"setp\.lt\.u32", "setp.lt.s32", FEW),
}


SAMPLE = drawn(f"changes of {__name__}", [*CHANGES], 2)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.thorough) for name in CHANGES]
)
def test_a_changed_text_is_found(name: str, texts, layout) -> None:
    """The convolution is right with the text as it is, and wrong or a fault with the change."""
    pattern, change, problem = CHANGES[name]
    text = texts["compute_90a"]
    changed, count = re.subn(pattern, change, text["conv2d"])
    assert count > 0, "the change finds no place"
    assert wrong(problem, text, layout, np.random.default_rng(1)) == ""
    try:
        said = wrong(problem, {**text, "conv2d": changed}, layout, np.random.default_rng(1))
    except ptx.Fault as fault:
        said = str(fault)
    assert said, "the convolution is as before"
