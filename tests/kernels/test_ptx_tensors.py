"""The kernels of W_t as a tensor, of packed Deltas and of <G, Delta> as nvcc emits them, run on the CPU (ptx.py)."""

from __future__ import annotations

import itertools
import random
import re
import struct
from typing import Any

import numpy as np
import ptx
import pytest
import torch
from ptx_files import CODES, HELD, Arguments, demangled, layout_of, needs_nvcc, number, stored, text_of
from stages import SEED, THOROUGH

from taps_ext.ops.codec import CODECS

pytestmark = needs_nvcc
THREADS, TILE = 256, 2048
ORDER = ("bitmask", "int8", "int4", "sign")  # Codec
TENSORS = {
    "bitmask": ("bitmap", "values"),
    "int8": ("codes", "scale"),
    "int4": ("codes", "scale"),
    "sign": ("signs", "scale"),
}


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return layout_of(tmp_path_factory)


def loaded(factory: pytest.TempPathFactory, name: str) -> dict[str, tuple[ptx.Kernel, int]]:
    """Kernels by name and type ("dot_flat<float") and their shared memory."""
    found = {}
    for full, kernel in demangled(ptx.parse(text_of(factory, name, "compute_90a"))).items():
        match = re.search(r"(\w+(?:<(?:float|double))?)(?:[<,> ]*?(\d+)u)?>?\(taps|(dot_finish)<(\d+)u>", full)
        assert match is not None, full
        found[match[1] or match[3]] = kernel, int(match[2] or match[4] or 0)
    return found


@pytest.fixture(scope="session")
def reconstruct(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ptx.Kernel, int]]:
    return loaded(tmp_path_factory, "reconstruct")


@pytest.fixture(scope="session")
def dots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ptx.Kernel, int]]:
    return loaded(tmp_path_factory, "dot")


@pytest.fixture(scope="session")
def settles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ptx.Kernel, int]]:
    return loaded(tmp_path_factory, "settle")


@pytest.fixture(scope="session")
def unpacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ptx.Kernel, int]]:
    return loaded(tmp_path_factory, "unpack")


def launch(kernel: tuple[ptx.Kernel, int], memory: ptx.Memory, arguments: bytes, blocks: int) -> None:
    for block in range(blocks):
        ptx.Block(kernel[0], memory, arguments, THREADS, (block, 0), (blocks, 1), kernel[1]).run()


def rebuild(
    arguments: Arguments, memory: ptx.Memory, chance: random.Random, count: int, held: dict[str, Any]
) -> tuple[int, str, bool, float]:
    """Out, weight, gate and scale of a rebuild; where the result is, its type, whether the gate is open, the scale."""
    kind = chance.choice(("f32", "bf16", "f16"))
    offset = chance.choice((0, 0, 1))
    at = memory.reserve(count * np.dtype(HELD[kind]).itemsize, offset=offset * np.dtype(HELD[kind]).itemsize)
    arguments.set("out", "Q", at)
    arguments.set("out_dtype", "B", CODES[kind])
    if "weight" in held:
        of_weight = held["weight_kind"]
        arguments.set("weight", "Q", memory.put(held["weight"], offset=offset * held["weight"].itemsize))
        arguments.set("weight_dtype", "B", CODES[of_weight])
    opened, scale = chance.random() < 0.75, chance.choice((1.0, 1.0, 0.37))
    on_device = chance.random() < 0.5
    arguments.set("gate.open", "?", opened != on_device)  # of two that contradict each other the score counts
    arguments.set("gate.threshold", "d", 0.1)
    if on_device:
        kind_of_score = chance.choice(("f32", "f64"))
        arguments.set("gate.score", "Q", memory.put(np.array([0.2 if opened else 0.05], HELD[kind_of_score])))
        arguments.set("gate.score_dtype", "B", CODES[kind_of_score])
    arguments.set("scale", "d", scale)
    return at, kind, opened, scale


def expected(weight: Any, delta: Any, kind: str, scale: float) -> Any:
    """In fp32, rounded once."""
    with np.errstate(all="ignore"):
        total = (weight + delta).astype(np.float32) if delta is not None else weight
        return stored(total if scale == 1 else total * np.float32(scale), kind)


def values(chance: np.random.Generator, shape: Any, kind: str) -> tuple[Any, Any]:
    """As they are held, and as fp32."""
    held = stored(chance.standard_normal(shape) * 10.0 ** chance.integers(-3, 3, shape), kind)
    return held, number(held, kind).astype(np.float32)


def test_reconstruct(reconstruct, layout, record_property) -> None:
    record_property("drawn", f"ptx of reconstruct by seed {SEED}")
    chance, numbers = random.Random(f"{SEED} reconstruct"), np.random.default_rng(int(SEED))
    shapes = [(1, 1), (1, 7), (3, 8), (5, 41), (64, 65), (33, 130)]
    for rows, columns in shapes * (4 if THOROUGH else 2):
        count, turned = rows * columns, chance.random() < 0.3
        memory, arguments = ptx.Memory(1 << 20, ptx.GLOBAL_BASE, "global"), Arguments(layout, "Reconstruct")
        kinds = [chance.choice(("f32", "bf16", "f16")) for _ in range(2)]
        weight, weight_number = values(numbers, (rows, columns), kinds[0])
        delta, delta_number = values(numbers, (rows, columns), kinds[1])
        laid = np.ascontiguousarray(weight.T) if turned else weight
        held = {} if chance.random() < 0.1 else {"weight": laid, "weight_kind": kinds[0]}
        at, kind, opened, scale = rebuild(arguments, memory, chance, count, held)
        first = weight_number if held else np.zeros_like(weight_number)
        if opened or chance.random() < 0.5:
            arguments.set("delta", "Q", memory.put(delta))
            arguments.set("delta_dtype", "B", CODES[kinds[1]])
        arguments.set("walk.numel", "q", count)
        if turned:
            arguments.set("walk.ndim", "i", 2)
            arguments.set("walk.sizes", "2q", rows, columns)
            for k, strides in enumerate(((columns, 1), (1, rows), (columns, 1))):
                struct.pack_into("<2q", arguments.bytes, layout["Reconstruct.walk.strides"] + 64 * k, *strides)
            launch(reconstruct["reconstruct_strided<float"], memory, bytes(arguments.bytes), 2)
        else:
            vectors = all(
                struct.unpack_from("<Q", arguments.bytes, layout[f"Reconstruct.{name}"])[0] % 16 == 0
                for name in ("out", "weight", "delta")
            )
            launch(reconstruct["reconstruct_flat<float"], memory, bytes(arguments.bytes) + bytes([vectors]), 2)
        got = memory.get(at, HELD[kind], count).reshape(rows, columns)
        want = expected(first, delta_number if opened else None, kind, scale)
        assert got.tobytes() == np.ascontiguousarray(want).tobytes(), (
            rows,
            columns,
            kinds,
            kind,
            opened,
            scale,
            turned,
        )


def test_foreach(reconstruct, layout, record_property) -> None:
    """Tensors of a list by one launch, a block to each piece of 16,384 elements."""
    record_property("drawn", f"ptx of foreach by seed {SEED}")
    chance, numbers = random.Random(f"{SEED} foreach"), np.random.default_rng(int(SEED))
    memory, arguments = ptx.Memory(1 << 22, ptx.GLOBAL_BASE, "global"), Arguments(layout, "ForeachReconstruct")
    found, end = [], 0
    for index, count in enumerate((1, 130, 16384, 16385, 40000)):
        item = Arguments(layout, "Rebuild")
        kinds = [chance.choice(("f32", "bf16", "f16")) for _ in range(2)]
        weight, weight_number = values(numbers, count, kinds[0])
        delta, delta_number = values(numbers, count, kinds[1])
        at, kind, opened, scale = rebuild(item, memory, chance, count, {"weight": weight, "weight_kind": kinds[0]})
        item.set("delta", "Q", memory.put(delta))
        item.set("delta_dtype", "B", CODES[kinds[1]])
        end += -(-count // 16384)
        size = layout["Rebuild"]
        arguments.bytes[index * size : (index + 1) * size] = item.bytes
        struct.pack_into("<q", arguments.bytes, layout["ForeachReconstruct.numel"] + 8 * index, count)
        struct.pack_into("<i", arguments.bytes, layout["ForeachReconstruct.end"] + 4 * index, end)
        found.append((at, count, kind, expected(weight_number, delta_number if opened else None, kind, scale)))
    arguments.set("count", "i", len(found))
    launch(reconstruct["foreach_chunks<float"], memory, bytes(arguments.bytes), end)
    for at, count, kind, want in found:
        assert memory.get(at, HELD[kind], count).tobytes() == want.tobytes(), (count, kind)


@pytest.mark.parametrize("codec", ORDER)
def test_unpack(codec: str, unpacks, layout, record_property) -> None:
    record_property("drawn", f"ptx of unpack by seed {SEED}")
    chance, numbers = random.Random(f"{SEED} {codec}"), np.random.default_rng(int(SEED))
    shapes = [(1, 1), (3, 5), (7, 9), (33, 31), (40, 130), (45, 137)]
    for rows, columns in shapes * (4 if THOROUGH else 1):
        count = rows * columns
        memory, arguments = ptx.Memory(1 << 20, ptx.GLOBAL_BASE, "global"), Arguments(layout, "Unpack")
        delta = torch.from_numpy(numbers.standard_normal((rows, columns)).astype(np.float32))
        if codec == "bitmask":
            delta[torch.rand(rows, columns, generator=torch.Generator().manual_seed(count)) < 0.7] = 0
        packed = CODECS[codec].encode(delta)
        kind = chance.choice(("f32", "bf16", "f16"))
        weight, weight_number = values(numbers, (rows, columns), kind)
        held = {} if chance.random() < 0.1 else {"weight": weight, "weight_kind": kind}
        at, out_kind, opened, scale = rebuild(arguments, memory, chance, count, held)
        first, second = (packed[name] for name in TENSORS[codec])
        raw = [np.frombuffer(one.contiguous().view(torch.uint8).numpy().tobytes(), np.uint8) for one in (first, second)]
        arguments.set("delta.codec", "b", ORDER.index(codec))
        arguments.set("delta.codes", "Q", memory.put(raw[0]))
        arguments.set("delta.values", "Q", memory.put(raw[1]))
        arguments.set("delta.rows", "q", rows)
        arguments.set("delta.columns", "q", columns)
        vectors = all(
            struct.unpack_from("<Q", arguments.bytes, layout[f"Unpack.{name}"])[0] % 16 == 0
            for name in ("out", "weight")
        )
        whole = bytes([vectors])
        if codec == "bitmask":
            arguments.set("delta.kept", "q", second.numel())
            arguments.set("chunk", "q", TILE)
            chunks = -(-count // TILE)
            arguments.set("counts", "Q", memory.reserve(8 * max(1, chunks - 1)))
            if chunks > 1:
                launch(unpacks["count_bitmask"], memory, bytes(arguments.bytes), chunks - 1)
            launch(unpacks["unpack_bitmask<float"], memory, bytes(arguments.bytes) + whole, chunks)
        else:
            launch(unpacks["unpack_codes<float"], memory, bytes(arguments.bytes) + whole, 2)
        got = memory.get(at, HELD[out_kind], count).reshape(rows, columns)
        base = weight_number if held else np.zeros_like(weight_number)
        decoded = CODECS[codec].decode(packed, rows, columns).numpy().reshape(rows, columns)
        want = expected(base, decoded if opened else None, out_kind, scale)
        assert got.tobytes() == np.ascontiguousarray(want).tobytes(), (rows, columns, kind, out_kind, opened, scale)


def test_dot(dots, layout, record_property) -> None:
    """Whole numbers, so that the order of sums shows in nothing."""
    record_property("drawn", f"ptx of dot by seed {SEED}")
    chance, numbers = random.Random(f"{SEED} dot"), np.random.default_rng(int(SEED))
    shapes = [(1, 1), (1, 7), (3, 8), (64, 65), (40, 500)]
    for (rows, columns), turned in itertools.product(shapes, (False, True)):
        count = rows * columns
        memory, arguments = ptx.Memory(1 << 20, ptx.GLOBAL_BASE, "global"), Arguments(layout, "Dot")
        kinds = [chance.choice(("f32", "bf16", "f16", "f64")) for _ in range(2)]
        a, b = (numbers.integers(-8, 9, (rows, columns)).astype(np.float64) for _ in range(2))
        vectors = True
        for name, of, kind in (("a", a, kinds[0]), ("b", b.T if turned else b, kinds[1])):
            held = stored(np.ascontiguousarray(of), kind)
            at = memory.put(held, offset=held.itemsize * chance.choice((0, 0, 1)))
            vectors = vectors and at % 16 == 0
            arguments.set(name, "Q", at)
            arguments.set(f"{name}_dtype", "B", CODES[kind])
        arguments.set("walk.numel", "q", count)
        arguments.set("walk.ndim", "i", 2 if turned else 1)
        arguments.set("walk.sizes", "2q", rows if turned else count, columns)
        for k, strides in enumerate(((columns, 1), (1, rows)) if turned else ((1, 0), (1, 0))):
            struct.pack_into("<2q", arguments.bytes, layout["Dot.walk.strides"] + 64 * k, *strides)
        rows_per_chunk = max(1, 16384 // columns)
        chunks = -(-rows // rows_per_chunk) if turned else -(-count // 16384)
        partials, result = memory.reserve(8 * chunks), memory.reserve(4)
        arguments.set("partials", "Q", partials)
        if turned:
            tail = struct.pack("<q", -(-count // chunks))
            launch(dots["dot_strided"], memory, bytes(arguments.bytes) + tail, chunks)
        else:
            kernel = "dot_flat<double" if "f64" in kinds else "dot_flat<float"
            launch(dots[kernel], memory, bytes(arguments.bytes) + bytes([vectors]), chunks)
        finish = struct.pack("<QqdQB", partials, chunks, 0.5, result, CODES["f32"])
        launch(dots["dot_finish"], memory, finish, 1)
        got = float(memory.get(result, np.float32, 1)[0])
        assert got == 0.5 * float((a * b).sum()), (rows, columns, kinds, turned)


def test_settle(settles, layout, record_property) -> None:
    """From gradients of W_t to those of Deltas and scores. Whole numbers: the order of sums shows in nothing."""
    record_property("drawn", f"ptx of settle by seed {SEED}")
    chance, numbers = random.Random(f"{SEED} settle"), np.random.default_rng(int(SEED))
    for double in (False, True):
        memory, arguments = ptx.Memory(1 << 22, ptx.GLOBAL_BASE, "global"), Arguments(layout, "ForeachSettle")
        kinds = ("f32", "bf16", "f16") if not double else ("f64",)
        found, end = [], 0
        for index, count in enumerate((1, 130, 16384, 16385, 40000, 77, 8)):
            item, offset = Arguments(layout, "Settle"), chance.choice((0, 0, 1))
            kind, delta_kind = chance.choice(kinds), chance.choice(kinds)
            gradient, delta = (numbers.integers(-8, 9, count).astype(np.float64) for _ in range(2))
            opened, want_delta = index % 3 != 1, index != 5
            want_score = index != 2
            if opened or want_score:
                held = stored(gradient, kind)
            else:
                held = (
                    np.full(count, -1, np.int64).view(np.float64) if kind == "f64" else stored(gradient * np.nan, kind)
                )
            if index in (1, 4):  # G lies as with channels last
                inner, outer = (5, 13) if index == 1 else (8, 500)
                held = np.ascontiguousarray(held.reshape(-1, outer, inner).swapaxes(1, 2)).reshape(-1)
                item.set("outer", "I", outer)
                item.set("inner", "I", inner)
            item.set("gradient", "Q", memory.put(held, offset=held.itemsize * offset))
            item.set("gradient_dtype", "B", CODES[kind])
            item.set("delta_dtype", "B", CODES[delta_kind])
            size_of = np.dtype(HELD.get(delta_kind, np.float64)).itemsize
            to = memory.reserve(count * size_of, offset=size_of * chance.choice((0, 0, 1)))
            if want_delta:
                item.set("delta_gradient", "Q", to)
            score_kind = chance.choice(("f32", "f64"))
            score_to = memory.reserve(8)
            if want_score:
                of_delta = stored(delta, delta_kind)
                item.set("delta", "Q", memory.put(of_delta, offset=of_delta.itemsize * offset))
                item.set("score_gradient", "Q", score_to)
                item.set("score_dtype", "B", CODES[score_kind])
            on_device = chance.random() < 0.5
            item.set("gate.open", "?", opened != on_device)
            item.set("gate.threshold", "d", 0.1)
            if on_device:
                item.set("gate.score", "Q", memory.put(np.array([0.2 if opened else 0.05], np.float32)))
                item.set("gate.score_dtype", "B", CODES["f32"])
            end += -(-count // 16384)
            size = layout["Settle"]
            arguments.bytes[index * size : (index + 1) * size] = item.bytes
            struct.pack_into("<q", arguments.bytes, layout["ForeachSettle.numel"] + 8 * index, count)
            struct.pack_into("<i", arguments.bytes, layout["ForeachSettle.end"] + 4 * index, end)
            want = stored(gradient if opened else np.zeros(count), delta_kind)
            found.append((to if want_delta else None, delta_kind, want))
            found.append((score_to if want_score else None, score_kind, stored([(gradient * delta).sum()], score_kind)))
        arguments.set("count", "i", len(found) // 2)
        arguments.set("partials", "Q", memory.reserve(8 * end))
        launch(settles[f"settle_chunks<{'double' if double else 'float'}"], memory, bytes(arguments.bytes), end)
        launch(settles["settle_scores"], memory, bytes(arguments.bytes), len(found) // 2)
        for at, kind, want in found:
            if at is not None:
                got = memory.get(at, HELD.get(kind, np.float64), len(want))
                assert got.tobytes() == np.ascontiguousarray(want).tobytes(), (kind, len(want))
