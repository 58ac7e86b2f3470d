"""The depthwise convolution as nvcc emits it, run on the CPU (tests/helpers/ptx.py), against whole numbers."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import ptx
import pytest
import torch
from ptx_files import CODES, HELD, Arguments, demangled, layout_of, needs_nvcc, number, stored, text_of
from stages import SEED, THOROUGH, drawn

pytestmark = needs_nvcc
THREADS, SHARED_OF_SETTLE = 256, 1088
PRODUCTS = ("forward", "input", "weight")
KERNELS = [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)]  # size, stride along rows
INSTANCES = [*itertools.product(PRODUCTS, KERNELS)]
TYPES = [("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32"), ("bf16", "f32", "f32"), ("f16", "f16", "f32")]
TYPES += [("f16", "f32", "f16"), ("f32", "f32", "f32")]


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return layout_of(tmp_path_factory)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_of(tmp_path_factory, "depthwise", "compute_90a")


@cache
def kernels(text: str) -> dict[tuple[Any, ...], tuple[ptx.Kernel, int]]:
    """(product, type, size, stride) -> kernel and shared memory; ("settle",) -> the second pass."""
    found: dict[tuple[Any, ...], tuple[ptx.Kernel, int]] = {}
    short = {"taps::dev::bf16": "bf16", "taps::dev::f16": "f16", "float": "f32"}
    for name, kernel in demangled(ptx.parse(text)).items():
        if match := re.search(r"depthwise_settle<(\d+)u>", name):
            found["settle",] = kernel, int(match[1])
            continue
        match = re.search(r"Depthwise(\w+)<([\w:]+), (\d), (\d)(?:, (\w+))?>, (\d+)u>", name)
        assert match is not None, name
        product = "weight" if match[1] == "Weight" else "input" if match[5] == "true" else "forward"
        found[product, short[match[2]], int(match[3]), int(match[4])] = kernel, int(match[6])
    return found


@dataclass
class Problem:
    """A product. `offset`: elements that images begin behind 16 bytes; `gap`: between two channels of a weight."""

    product: str
    types: tuple[str, str, str]
    batch: int
    channels: int
    size: tuple[int, int]
    kernel: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    open: bool = True
    on_device: bool = False
    vectors: int = 1
    splits: int = 1
    offset: int = 0
    gap: int = 0
    scale: float = 1.0

    @property
    def result_size(self) -> tuple[int, int]:
        height, width = (
            (n + 2 * pad - self.kernel) // step + 1
            for n, pad, step in zip(self.size, self.padding, self.stride, strict=True)
        )
        return height, width


def problem(chance: random.Random, product: str, kernel: tuple[int, int], types: tuple[str, str, str]) -> Problem:
    size, stride = kernel
    padding = chance.randrange(size), chance.randrange(size)
    height, width = (chance.randint(max(1, size - 2 * pad), 11) for pad in padding)
    channels = chance.choice((3, 8, 20, 24))
    p = Problem(product, types, chance.randint(1, 2), channels, (height, width), size, (1, stride), padding)
    p.stride = chance.randint(1, 2), stride
    p.open, p.on_device = chance.random() < 0.7, chance.random() < 0.5
    p.vectors, p.splits = chance.choice((1, 2, 4)), chance.choice((1, 2, 3, 40 if product == "weight" else 4))
    p.offset, p.gap = chance.choice((0, 0, 1)), chance.choice((0, 5))
    p.scale = chance.choice((1.0, 2.5)) if product == "weight" else 1.0
    return p


def strips(p: Problem) -> int:
    """As `strips_of` of depthwise.cuh."""
    pixels = {("weight", 7): 2, ("forward", 7): 3, ("input", 7): 3}.get((p.product, p.kernel), 4)
    if (p.product, p.kernel, p.stride[1]) == ("forward", 5, 2):
        pixels = 2
    height, width = p.size if p.product == "input" else p.result_size
    before = p.padding[1] % p.stride[1] if p.product == "input" else 0
    return p.batch * height * -(-(width + before) // pixels)


def wrong(p: Problem, layout: dict[str, int], text: str, chance: np.random.Generator) -> str:
    """What is wrong with a result; "" for nothing. Raises Fault."""
    memory, arguments = ptx.Memory(1 << 21, ptx.GLOBAL_BASE, "global"), Arguments(layout, "Depthwise")
    compute, of_weight, of_delta = p.types
    places = p.kernel * p.kernel

    def image(size: tuple[int, int], name: str) -> Any:
        """[B, H, W, C] of small whole numbers."""
        values = chance.integers(-4, 5, (p.batch, *size, p.channels)).astype(np.float64)
        held = stored(values, compute)
        arguments.set(name, "Q", memory.put(held, offset=p.offset * held.itemsize))
        return values

    def taps(name: str, kind: str, most: int, unit: int, known: bool) -> Any:
        """[C, K * K]; nothing may read one that is not known."""
        values = chance.integers(-most, most + 1, (p.channels, places)) / unit
        ld = places + p.gap
        filled = stored(np.full((p.channels, ld), np.nan), kind)
        filled[:, :places] = stored(values, kind)
        flat = filled.reshape(-1)[: (p.channels - 1) * ld + places]
        arguments.set(name, "Qq", memory.put(flat) if known else memory.reserve(flat.nbytes), ld)
        arguments.set(f"{name}_dtype", "B", CODES[kind])
        return number(filled, kind)[:, :places]

    x, dy = image(p.size, "x"), image(p.result_size, "dy")
    gradient = p.product == "weight"
    weight = taps("weight", of_weight, 8, 1, not gradient)
    delta = taps("delta", of_delta, 255, 512, p.open or gradient)  # 512ths, so that W + Delta is rounded
    bias = chance.integers(-8, 9, p.channels).astype(np.float64)
    arguments.set("bias", "Q", memory.put(stored(bias, compute)))
    arguments.set("compute", "B", CODES[compute])
    for name, value in (("rows", dy[..., 0].size), ("outputs", p.channels), ("inputs", places), ("batch", p.batch)):
        arguments.set(name, "q", value)
    for name, pair in (
        ("size", p.size),
        ("result_size", p.result_size),
        ("stride", p.stride),
        ("padding", p.padding),
    ):
        arguments.set(name, "2i", *pair)
    arguments.set("kernel", "i", p.kernel)
    arguments.set("vectors", "i", p.vectors)
    arguments.set("splits", "i", p.splits)
    arguments.set("depth_of_split", "q", -(-strips(p) // p.splits))
    arguments.set("scale", "d", p.scale)
    arguments.set("gate.open", "?", p.open != p.on_device)  # of two that contradict each other the score counts
    arguments.set("gate.threshold", "d", 0.1)
    if p.on_device:
        arguments.set("gate.score", "Q", memory.put(np.array([0.2 if p.open else 0.05], np.float32)))

    of_result = of_delta if gradient else compute
    height, width = p.size if p.product == "input" else p.result_size
    ld = places + p.gap
    count = (p.channels - 1) * ld + places if gradient else p.batch * height * width * p.channels
    itemsize = np.dtype(HELD[of_result]).itemsize
    result = memory.reserve(count * itemsize, offset=0 if gradient else p.offset * itemsize)
    arguments.set("result", "Q", result)
    arguments.set("ld_result", "q", ld)
    blocks = -(-p.channels * places // 8)
    score = 0
    if gradient:
        arguments.set("memory", "Q", memory.reserve(8 * blocks + 4 * p.splits * p.channels * places))
        score = struct.unpack_from("<Q", arguments.bytes, layout["Depthwise.memory"])[0]
        arguments.set("score_gradient", "Q", score)  # asks for the sums; the kernels write nothing there

    kernel, shared = kernels(text)[p.product, compute, p.kernel, p.stride[1]]
    of_block = p.vectors * (4 if compute == "f32" else 8)
    grid = -(-p.channels // of_block), p.splits
    for group in range(grid[0]):
        for split in range(grid[1]):
            ptx.Block(kernel, memory, bytes(arguments.bytes), THREADS, (group, split), grid, shared).run()
    if gradient:
        kernel, shared = kernels(text)["settle",]
        for block in range(blocks):
            ptx.Block(kernel, memory, bytes(arguments.bytes), THREADS, (block, 0), (blocks, 1), shared).run()

    wt = number(stored(weight + delta if p.open else weight, compute), compute)
    planes, of_dy = (torch.from_numpy(np.moveaxis(one, 3, 1).copy()) for one in (x, dy))
    filters = torch.from_numpy(wt).view(p.channels, 1, p.kernel, p.kernel)
    geometry = (p.stride, p.padding, (1, 1))
    if p.product == "forward":
        want = torch.conv2d(planes, filters, torch.from_numpy(bias), *geometry, p.channels).movedim(1, 3).numpy()
    else:
        both = torch.ops.aten.convolution_backward(
            of_dy, planes, filters, None, *geometry, False, [0, 0], p.channels, [True, True, False]
        )
        want = (both[0].movedim(1, 3) if p.product == "input" else both[1].flatten(1)).numpy()
    if gradient:
        sums = memory.get(score, np.float64, blocks)
        if sums.sum() != (want * delta).sum():  # products of whole numbers and 512ths: exact in any order
            return f"<G, Delta>: expected {(want * delta).sum()}, got {sums.sum()}"
        want = p.scale * want if p.open else np.zeros_like(want)
        rows = [memory.get(result + ld * itemsize * c, HELD[of_result], places) for c in range(p.channels)]
        got = number(np.stack(rows), of_result)
    else:
        got = number(memory.get(result, HELD[of_result], count), of_result).reshape(want.shape)
    rounded = number(stored(want, of_result), of_result)
    return "" if (got == rounded).all() else f"{int((got != rounded).sum())} of {got.size} elements"


def test_every_kernel_is_there(text) -> None:
    found = kernels(text)
    assert set(found) == {("settle",)} | {
        (product, kind, *kernel) for product in PRODUCTS for kind in ("bf16", "f16", "f32") for kernel in KERNELS
    }
    assert found["settle",][1] == SHARED_OF_SETTLE


CASES = {f"{product}-{size}x{size}-{step}": (product, (size, step)) for product, (size, step) in INSTANCES}
SAMPLE = drawn("depthwise PTX", [*CASES], 6)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "product, kernel",
    [
        pytest.param(*case, id=name, marks=() if name in SAMPLE else pytest.mark.thorough)
        for name, case in CASES.items()
    ],
)
def test_whole_numbers(product: str, kernel: tuple[int, int], text, layout, record_property) -> None:
    record_property("drawn", f"ptx of depthwise by seed {SEED}")
    chance, numbers = random.Random(f"{SEED} {product} {kernel}"), np.random.default_rng(int(SEED))
    kinds = TYPES if THOROUGH else chance.sample(TYPES, 1)
    for types in kinds:
        p = problem(chance, product, kernel, types)
        assert not (said := wrong(p, layout, text, numbers)), (said, p)


# What becomes of every such instruction of the text; the results of some problem then differ, or it is a fault.
CHANGES = {
    "words of a vector exchanged as they are read": (
        r"(ld\.global\.v4\.u32 \t\{%r\d+, )(%r\d+)(, )(%r\d+)",
        r"\1\4\3\2",
    ),
    "words of a vector exchanged as they are written": (
        r"(st\.global\.v4\.u32 \[%rd\d+\], \{)(%r\d+)(, )(%r\d+)",
        r"\1\4\3\2",
    ),
    "halves of a word exchanged": (r"(cvt\.rn\.bf16x2\.f32 %r\d+, )(%f\d+)(, )(%f\d+)", r"\1\4\3\2"),
    "Delta not added": (r"add\.f32 (\t%f\d+, %f\d+), %f\d+;", r"add.f32 \1, 0f00000000;"),
    "another block's pixels": (r"%ctaid\.y", "%ctaid.x"),
    "sums of one product alone": (r"fma\.rn\.f32 (\t%f\d+, %f\d+, %f\d+), %f\d+;", r"fma.rn.f32 \1, 0f00000000;"),
}


CHANGED = drawn("changes of the depthwise PTX", [*CHANGES], 1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CHANGED else pytest.mark.thorough) for name in CHANGES]
)
def test_changes_are_found(name: str, text, layout) -> None:
    pattern, by = CHANGES[name]
    changed, count = re.subn(pattern, by, text)
    assert count > 0
    p = Problem("forward", ("bf16", "bf16", "f32"), 2, 24, (5, 9), 3, (1, 1), (1, 1), vectors=2, splits=2)
    assert not wrong(p, layout, text, np.random.default_rng(1))
    with contextlib.suppress(ptx.Fault):
        assert wrong(p, layout, changed, np.random.default_rng(1))
