"""The products of a gated linear layer as nvcc emits them, run on the CPU (tests/helpers/ptx.py).

Random shapes, types, alignments, splits and gates against whole numbers, which every order of sums gives exactly; and
changes of that text, each of which is found.
"""

from __future__ import annotations

import random
import re
import struct
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
KINDS = ("forward", "input", "weight")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts[str]:
    """Architecture -> linear.cu as PTX."""
    return Texts(lambda architecture: text_of(tmp_path_factory, "linear", architecture))


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Where the fields of the arguments are."""
    return layout_of(tmp_path_factory)


@cache
def kernels(text: str) -> dict[tuple[Any, ...], tuple[ptx.Kernel, int]]:
    """(kind, type, weight's, Delta's, tile) -> kernel and shared memory; ("add", type) -> the one of splits.

    Those whose blocks are clusters have "clustered" before all else.
    """
    found: dict[tuple[Any, ...], tuple[ptx.Kernel, int]] = {}
    short = {"taps::dev::bf16": "bf16", "taps::dev::f16": "f16", "float": "f32"}
    for name, kernel in demangled(ptx.parse(text)).items():
        shared = int(match[1]) if (match := re.search(r"(\d+)u>\(", name)) else 0
        types = [short[one] for one in re.findall(r", (taps::dev::b?f16|float)(?=[,>])", name)]
        if "WeightGradient" in name:
            found["weight", types[0], types[1]] = kernel, shared
        elif "Activation" in name:
            kind = "input" if re.search(r", true>, \d+u>\(", name) else "forward"
            rows, columns = re.findall(r"Shape<(\d+), (\d+),", name)[0]
            clustered = ("clustered",) if "clustered_product<" in name else ()
            found[(*clustered, kind, *types, (int(rows), int(columns)))] = kernel, shared
        elif without := re.search(r"Rows<(\d),", name):
            found[("forward", *types, (int(without[1]), 2))] = kernel, shared
        else:
            (one,) = re.findall(r"add_splits<taps::dev::(b?f16)>", name)
            found["add", one] = kernel, 0
    return found


@dataclass
class Problem:
    """A product. `offset`: elements that a matrix begins behind 16 bytes; `padding`: columns between its rows.

    `wide`: rows of the tiles of 128 columns, of a forward that has them. `clustered`: the blocks of a tile's splits add
    its sums themselves.
    """

    kind: str
    types: tuple[str, str, str]
    rows: int
    outputs: int
    inputs: int
    open: bool = True
    on_device: bool = False
    splits: int = 1
    offset: int = 0
    padding: int = 0
    bias: bool = False
    wide: int = 0
    clustered: bool = False

    @property
    def without_tiles(self) -> bool:
        return self.rows <= 4 and self.kind == "forward"

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns; without tiles those of a warp."""
        if self.wide:
            return self.wide, 128
        if self.without_tiles:
            return 1 if self.rows == 1 else 4, 2
        return (16, 32) if self.rows <= 16 and self.kind == "forward" else (64, 64)

    @property
    def depth(self) -> int:
        """Of a step, or what a slice without tiles has a multiple of."""
        if self.wide:
            return 16 if self.types[2] == "f32" else 32
        return 32 if self.tile[0] == 64 else 64

    @property
    def key(self) -> tuple[Any, ...]:
        compute, _, delta = self.types
        if self.kind == "weight":
            return "weight", compute, delta
        return (*(("clustered",) if self.in_cluster else ()), self.kind, *self.types, self.tile)

    @property
    def in_cluster(self) -> bool:
        return self.clustered and self.splits > 1 and self.kind != "weight" and not self.without_tiles


class Case:
    """A problem in memory whose surroundings are NaN, and what comes of it."""

    def __init__(self, problem: Problem, layout: dict[str, int], chance: np.random.Generator) -> None:
        self.problem, self.chance = problem, chance
        self.memory = ptx.Memory(1 << 22, ptx.GLOBAL_BASE, "global")
        self.arguments = Arguments(layout, "LinearProduct")
        self.field = self.arguments.set

    def matrix(self, name: str, rows: int, columns: int, kind: str) -> Any:
        """Whole numbers, in an allocation of exactly their size.

        Of Delta 512ths, so that W + Delta is rounded, while sums of products are still exact in fp32.
        """
        p, most = self.problem, {"weight": 8, "delta": 255, "bias": 8}.get(name, 2)
        values = self.chance.integers(-most, most + 1, (rows, columns)) / (512 if name == "delta" else 1)
        ld = columns + p.padding
        filled = stored(np.full((rows, ld), np.nan), kind)
        filled[:, :columns] = stored(values, kind)
        flat = filled.reshape(-1)[: (rows - 1) * ld + columns]
        at = self.memory.put(flat, offset=p.offset * flat.itemsize)
        self.field(name, "Qq", at, ld) if name != "bias" else self.field(name, "Q", at)
        return values

    def wrong(self, kernels: dict[tuple[Any, ...], tuple[ptx.Kernel, int]]) -> str:
        """What is wrong with the result; "" for nothing. Raises Fault."""
        p = self.problem
        compute, of_weight, of_delta = p.types
        m, n, k = p.rows, p.outputs, p.inputs
        for name, value in (("rows", m), ("outputs", n), ("inputs", k)):
            self.field(name, "q", value)
        x, dy = self.matrix("x", m, k, compute), self.matrix("dy", m, n, compute)
        weight, delta = self.matrix("weight", n, k, of_weight), self.matrix("delta", n, k, of_delta)
        bias = self.matrix("bias", 1, n, compute)[0] if p.bias and p.kind == "forward" else 0.0
        for name, kind in (("compute", compute), ("weight_dtype", of_weight), ("delta_dtype", of_delta)):
            self.field(name, "B", CODES[kind])
        self.field("gate.open", "?", p.open != p.on_device)  # of two that contradict each other the score counts
        self.field("gate.threshold", "d", 0.1)
        if p.on_device:
            double = bool(self.chance.integers(2))
            score = np.array([0.2 if p.open else 0.05], np.float64 if double else np.float32)
            self.field("gate.score", "Q", self.memory.put(score))
            self.field("gate.score_dtype", "B", CODES["f64" if double else "f32"])
        if not p.open and p.kind != "weight":  # nothing may read it
            ld = k + p.padding
            unread = self.memory.reserve(ld * n * (4 if of_delta == "f32" else 2)) if p.on_device else 0
            self.field("delta", "Qq", unread, ld)
        rows, columns = (n, k) if p.kind == "weight" else (m, n if p.kind == "forward" else k)
        depth = {"forward": k, "input": n, "weight": m}[p.kind]
        of_result = of_delta if p.kind == "weight" else compute
        result = self.memory.reserve(
            rows * columns * np.dtype(np.float32 if of_result == "f32" else np.uint16).itemsize
        )
        self.field("result", "Q", result)
        self.field("ld_result", "q", columns)
        (tile_rows, tile_columns), tile_depth = p.tile, p.depth
        splits, slices = p.splits, 1
        if p.without_tiles:  # the block's warps share the depth, and no others
            splits, slices = 1, 1 << (p.splits - 1).bit_length()
            tile_columns *= 8 // slices
        tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
        scores = p.kind == "weight" and (p.open or p.on_device)
        memory = 0
        if not p.in_cluster:
            memory = self.memory.reserve(8 * tiles if p.kind == "weight" else 4 * splits * rows * columns)
        self.field("memory", "Q", memory)
        self.field("scale", "d", 2.0)
        if scores:
            self.field("score_gradient", "Q", self.memory.reserve(4))
        self.field("splits", "i", splits)
        self.field("slices", "i", slices)
        per_split = -(-depth // (tile_depth * splits * slices)) * tile_depth
        self.field("depth_of_split", "q", depth if p.kind == "weight" else per_split)
        kernel, shared = kernels[p.key]
        threads = 128 if p.kind == "weight" else 256
        for tile in range(tiles):
            blocks = [
                ptx.Block(
                    kernel, self.memory, bytes(self.arguments.bytes), threads, (tile, split), (tiles, splits), shared
                )
                for split in range(splits)
            ]
            for cluster in [blocks] if p.in_cluster else [[block] for block in blocks]:
                ptx.run_together(cluster)
        if splits > 1 and not p.in_cluster:
            adding, count = kernels["add", compute][0], -(-rows * columns // 256)
            arguments = bytes(self.arguments.bytes) + struct.pack("<2q", rows, columns)
            for block in range(count):
                ptx.Block(adding, self.memory, arguments, 256, (block, 0), (count, 1), 0).run()
        used = number(stored(weight + (delta if p.open else 0.0), compute), compute)
        gradient = dy.T @ x
        want = {
            "forward": lambda: x @ used.T + bias,
            "input": lambda: dy @ used,
            "weight": lambda: 2.0 * gradient if p.open else 0.0 * gradient,
        }[p.kind]()
        raw = self.memory.get(result, np.float32 if of_result == "f32" else np.uint16, rows * columns)
        got = number(raw, of_result).reshape(rows, columns)
        bad = got != number(stored(want, of_result), of_result)
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            return f"{int(bad.sum())} of {bad.size} wrong, at {place} expected {want[place]}, got {got[place]}"
        if scores:
            dot, right = float(self.memory.get(memory, np.float64, tiles).sum()), float((gradient * delta).sum())
            return "" if dot == right else f"<G, Delta>: expected {right}, got {dot}"
        return ""


def random_problem(chance: random.Random, clusters: bool) -> Problem:
    kind = chance.choice(KINDS)
    rows = chance.choice((1, 2, 3, 4, 7, 16, 17, 33, 64, 65, 130))
    return Problem(
        kind=kind,
        types=chance.choice(TYPES),
        rows=rows,
        outputs=chance.choice((1, 2, 8, 31, 32, 33, 64, 66, 97, 130)),
        inputs=chance.choice((1, 2, 8, 30, 64, 65, 72, 130, 257, 320, 520, 1032)),
        open=chance.random() < 0.75,
        on_device=chance.random() < 0.5,
        splits=1 if kind == "weight" else chance.choice((1, 1, 2, 3)),
        clustered=clusters and chance.random() < 0.5,
        offset=chance.choice((0, 0, 0, 8, 1, 2, 4)),
        padding=chance.choice((0, 0, 8, 1, 2)),
        bias=chance.random() < 0.5,
        wide=chance.choice((0, 64, 128)) if kind == "forward" and rows > 16 else 0,
    )


@pytest.mark.parametrize("architecture", [pytest.param(ARCHITECTURES[0], marks=pytest.mark.thorough), ARCHITECTURES[1]])
def test_random_products(architecture, texts, layout, record_property) -> None:
    """Each kernel in turn, so that none is left out; in `make test` some that are drawn."""
    chance, loaded = random.Random(f"{SEED} ptx"), kernels(texts[architecture])
    numbers = np.random.default_rng(int(SEED))
    record_property("drawn", f"ptx by seed {SEED}")
    assert len(loaded) == 78
    clusters = THOROUGH and architecture == "compute_90a"  # compute_80 has none: those kernels end in an error
    for round_ in range(4 if THOROUGH else 1):
        waiting = {key for key in loaded if key[0] != "add" and (clusters or key[0] != "clustered")}
        if not THOROUGH:
            waiting = set(drawn("kernels of the PTX", sorted(waiting, key=str), 16))
        while waiting:
            problem = random_problem(chance, clusters=clusters)
            if problem.key not in waiting:
                continue
            waiting.discard(problem.key)
            try:
                wrong = Case(problem, layout, numbers).wrong(loaded)
            except ptx.Fault as fault:
                wrong = str(fault)
            assert not wrong, f"{problem}, round {round_}: {wrong}"
    for kind in ("bf16", "f16"):  # what adds the splits
        split = Problem("forward", (kind, kind, "f32"), 9, 33, 130, splits=2, bias=True)
        assert Case(split, layout, numbers).wrong(loaded) == ""


def random_splits(chance: random.Random, rows: int) -> Problem:
    """A product of a few whole and broken tiles in splits of any number that a cluster may have."""
    kind = chance.choice(("forward", "input")) if rows > 16 else "forward"
    return Problem(
        kind=kind,
        types=chance.choice(TYPES),
        rows=rows,
        outputs=chance.choice((30, 32, 65, 130)),
        inputs=chance.choice((31, 64, 72, 130)) if kind == "input" else chance.choice((63, 130, 256, 520)),
        open=chance.random() < 0.75,
        on_device=chance.random() < 0.5,
        splits=chance.randint(2, 8),
        offset=chance.choice((0, 8, 1)),
        padding=chance.choice((0, 8, 1)),
        bias=chance.random() < 0.5,
        wide=chance.choice((0, 64, 128)) if kind == "forward" and rows > 16 else 0,
        clustered=True,
    )


@pytest.mark.parametrize("index", [pytest.param(n, marks=() if n == 0 else pytest.mark.thorough) for n in range(6)])
def test_clusters_add_splits(index: int, texts, layout) -> None:
    """Few rows, and more: splits that have less than their share of the depth, or none."""
    chance, loaded = random.Random(f"{SEED} clusters {index}"), kernels(texts["compute_90a"])
    numbers = np.random.default_rng(int(SEED) + index)
    for rows in (chance.randint(5, 16), chance.choice((17, 33, 64, 65, 130))):
        problem = random_splits(chance, rows)
        try:
            wrong = Case(problem, layout, numbers).wrong(loaded)
        except ptx.Fault as fault:
            wrong = str(fault)
        assert not wrong, f"{problem}: {wrong}"


def test_code_without_clusters_stops(texts, layout) -> None:
    """PTX of 8.0 runs on 9.0, too: there a cluster's kernel may not end without a result and without a word."""
    loaded = {key: one for key, one in kernels(texts["compute_80"]).items() if key[0] == "clustered"}
    assert len(loaded) == 30 and {key for key, (kernel, _) in loaded.items() if "trap" in str(kernel.code)} == {*loaded}
    with pytest.raises(ptx.Fault, match="the launch is ended"):
        Case(TOGETHER, layout, np.random.default_rng(1)).wrong(loaded)


# A piece of the text, its change, and the product that shows it.
DEEP = Problem("forward", ("bf16", "bf16", "bf16"), 40, 64, 320)
FEW = Problem("forward", ("bf16", "bf16", "f32"), 9, 64, 520)
WIDE = Problem("forward", ("bf16", "bf16", "bf16"), 70, 130, 320, wide=128)
SHORT = Problem("forward", ("bf16", "bf16", "bf16"), 40, 33, 72, padding=8)
BACK = Problem("input", ("f16", "f16", "f16"), 40, 70, 64)
THREE = Problem("forward", ("bf16", "bf16", "bf16"), 3, 5, 1032, splits=2)
ODD = Problem("forward", ("bf16", "bf16", "bf16"), 3, 5, 65)
TOGETHER = Problem("forward", ("bf16", "bf16", "f32"), 9, 33, 520, splits=3, bias=True, clustered=True)
GRADIENT = Problem("weight", ("bf16", "bf16", "bf16"), 40, 64, 64)
BARRIERS = r"(?:barrier\.cluster\.(?:arrive|wait)\.\w+\.aligned;\s+(?://[^\n]*\s+)*){2}"
FIRST_OF_CLUSTER = BARRIERS + r"(mov\.u32 %\w+, %cluster_nctarank;)"
LAST_OF_CLUSTER = r"(\n\$\w+:\s+(?://[^\n]*\s+)*bar\.warp\.sync\s+-1;\s+(?://[^\n]*\s+)*)" + BARRIERS
LESS = r"\1\n\tadd.s32 \2, \2, -1;"
CHANGES: dict[str, tuple[str, str, Problem]] = {
    "a copy too few is waited for": (r"cp\.async\.wait_group 2;", "cp.async.wait_group 3;", DEEP),
    "a copy too few is waited for, wide": (r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;", WIDE),
    "registers of A exchanged": (r"(mma\.sync\S+\s+\{[^}]*\}, \{%\w+, )(%\w+), (%\w+)(, %\w+\})", r"\1\3, \2\4", DEEP),
    "registers of B exchanged": (r"(mma\.sync\S+\s+\{[^}]*\}, \{[^}]*\}, \{)(%\w+), (%\w+)\}", r"\1\3, \2}", DEEP),
    "not transposed": (r"\.x4\.trans\.", ".x4.", BACK),
    "transposed": (r"\.x4\.shared", ".x4.trans.shared", DEEP),
    "the rest of a piece is read, not zero": (r"(cp\.async\.cg\S+ \[\S+\], \[\S+\], 16), %\w+;", r"\1;", SHORT),
    "another block": (r"%ctaid\.x", "%ctaid.y", Problem("forward", ("bf16", "bf16", "bf16"), 40, 130, 64)),
    "Delta subtracted by halves": (r"add\.rn\.bf16x2 (%\w+), (%\w+), (%\w+);", r"xor.b32 \1, \2, \3;", DEEP),
    "a wider store": (r"st\.global\.u16", "st.global.u32", SHORT),
    "the high half first": (r"cvt\.rn\.bf16x2\.f32 (%\w+), (%\w+), (%\w+);", r"cvt.rn.bf16x2.f32 \1, \3, \2;", FEW),
    "lanes add their own": (r"shfl\.sync\.bfly", "shfl.sync.idx", GRADIENT),
    "no tiles, lanes add their own": (r"shfl\.sync\.bfly", "shfl.sync.idx", THREE),
    "no tiles, Delta subtracted by halves": (r"add\.rn\.bf16x2 (%\w+), (%\w+), (%\w+);", r"xor.b32 \1, \2, \3;", THREE),
    "no tiles, wider loads": (r"ld\.global\.u16", "ld.global.u32", ODD),
    "the cluster's sums read before they are there": (FIRST_OF_CLUSTER, r"\1", TOGETHER),
    "a block ends while its sums are read": (LAST_OF_CLUSTER, r"\1", TOGETHER),
    "a block waits where it has not arrived": (r"barrier\.cluster\.arrive\S+;", "", TOGETHER),
    "the first block's sums for all": (r"(mapa\.\S+ %\w+, %\w+, )%\w+;", r"\g<1>0;", TOGETHER),
    "every block adds the same rows": (r"mov\.u32 (%\w+), %cluster_ctarank;", r"mov.u32 \1, 0;", TOGETHER),
    "a block of the cluster too few": (r"(mov\.u32 (%\w+), %cluster_nctarank;)", LESS, TOGETHER),
}


SAMPLE = drawn(f"changes of {__name__}", [*CHANGES], 2)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.thorough) for name in CHANGES]
)
def test_a_changed_text_is_found(name: str, texts, layout) -> None:
    """The product is right with the text as it is, and wrong or a fault with the change."""
    pattern, change, problem = CHANGES[name]
    text = texts["compute_90a"]
    changed, count = re.subn(pattern, change, text)
    assert count > 0, "the change finds no place"
    assert Case(problem, layout, np.random.default_rng(1)).wrong(kernels(text)) == ""
    try:
        wrong = Case(problem, layout, np.random.default_rng(1)).wrong(kernels(changed))
    except ptx.Fault as fault:
        wrong = str(fault)
    assert wrong, "the product is as before"
