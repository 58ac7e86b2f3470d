"""The products of a mixed batch as nvcc emits them, run on the CPU (tests/helpers/ptx.py).

Random tasks, ids, types, alignments and gates against whole numbers, which every order of sums gives exactly: the order
of samples, y, dx, each task's gradient and score; and changes of that text, each of which is found.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import ptx
import pytest
from ptx_files import CODES, HELD, Arguments, demangled, layout_of, needs_nvcc, number, stored, text_of
from stages import SEED

pytestmark = [needs_nvcc, pytest.mark.thorough]
# The kernels are the same lines for both: `make kernels` runs the newer's text, `make sanitize` the older's.
ARCHITECTURES = [pytest.param("compute_80", marks=pytest.mark.sanitize), "compute_90a"]
TYPES = [("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32"), ("bf16", "f32", "f32")]
TYPES += [("f16", "f16", "f16"), ("f16", "f16", "f32"), ("f16", "f32", "f32")]
TILE = 64
STANDS = ("open", "read", "read closed", "closed", "joins")  # of a task to the base: as in host/mixed_case.h


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Of an architecture mixed.cu as PTX, compiled where it is asked for."""
    return cache(lambda name: text_of(tmp_path_factory, "mixed", name))


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Where the fields of the arguments are."""
    return layout_of(tmp_path_factory)


@cache
def kernels(text: str) -> dict[tuple[str, ...], tuple[ptx.Kernel, int]]:
    """("order",), ("scores",), ("spoil",) or (product, type, weight's, Delta's) -> kernel and shared memory."""
    found: dict[tuple[str, ...], tuple[ptx.Kernel, int]] = {}
    short = {"taps::dev::bf16": "bf16", "taps::dev::f16": "f16", "float": "f32"}
    for name, kernel in demangled(ptx.parse(text)).items():
        shared = int(match[1]) if (match := re.search(r"(\d+)u>\(", name)) else 0
        types = [short[one] for one in re.findall(r", (taps::dev::b?f16|float)(?=[,>])", name)]
        if "MixedActivation" in name:
            key = ("input" if re.search(r", true>, \d+u>\(", name) else "forward", *types)
        elif "MixedWeightGradient" in name:
            key = ("weight", *types)
        else:
            key = (next(one for one in ("order", "scores", "spoil") if one in name),)
        found[key] = kernel, shared
    return found


@dataclass
class Problem:
    """A batch. `offset`: elements that a matrix begins behind 16 bytes; `padding`: columns between its rows."""

    kind: str
    types: tuple[str, str, str]
    ids: list[int]
    tasks: list[str]
    each: int
    outputs: int
    inputs: int
    offset: int = 0
    padding: int = 0
    bias: bool = False
    step: int = 1

    @property
    def key(self) -> tuple[str, ...]:
        compute, _, delta = self.types
        return ("weight", compute, delta) if self.kind == "weight" else (self.kind, *self.types)

    def group(self, id_: int) -> int:
        if not -1 <= id_ < len(self.tasks):
            return len(self.tasks) + 1
        return 0 if id_ < 0 or self.tasks[id_] == "joins" else id_ + 1

    def opened(self, id_: int) -> bool:
        return id_ >= 0 and self.tasks[id_] in ("open", "read")


def wrong(p: Problem, text: str, layout: dict[str, int], chance: np.random.Generator) -> str:
    """What is wrong with the result; "" for nothing. Raises Fault."""
    memory, loaded = ptx.Memory(1 << 22, ptx.GLOBAL_BASE, "global"), kernels(text)
    batch = Arguments(layout, "MixedBatch")
    at_product, at_tasks = layout["MixedBatch.product"], layout["MixedBatch.tasks"]

    def field(name: str, form: str, *values: Any) -> None:
        struct.pack_into("<" + form, batch.bytes, at_product + layout[f"LinearProduct.{name}"], *values)

    def of_task(task: int, name: str, form: str, *values: Any) -> None:
        at = at_tasks + task * layout["MixedTask"] + layout[f"MixedTask.{name}"]
        struct.pack_into("<" + form, batch.bytes, at, *values)

    compute, of_weight, of_delta = p.types
    samples, count = len(p.ids), len(p.tasks)
    m, n, k = samples * p.each, p.outputs, p.inputs

    def matrix(rows: int, columns: int, kind: str, most: int, parts: int = 1, padding: int = 0) -> tuple[Any, int]:
        values = chance.integers(-most, most + 1, (rows, columns)) / parts
        ld = columns + padding
        filled = stored(np.full((rows, ld), np.nan), kind)
        filled[:, :columns] = stored(values, kind)
        flat = filled.reshape(-1)[: (rows - 1) * ld + columns]
        return values, memory.put(flat, offset=p.offset * flat.itemsize)

    for name, value in (("rows", m), ("outputs", n), ("inputs", k)):
        field(name, "q", value)
    for name, kind in (("compute", compute), ("weight_dtype", of_weight), ("delta_dtype", of_delta)):
        field(name, "B", CODES[kind])
    field("scale", "d", 1.0)
    x, at_x = matrix(m, k, compute, 2, padding=p.padding)
    dy, at_dy = matrix(m, n, compute, 2, padding=p.padding)
    weight, at_weight = matrix(n, k, of_weight, 8, padding=p.padding)
    field("x", "Qq", at_x, k + p.padding)
    field("dy", "Qq", at_dy, n + p.padding)
    field("weight", "Qq", at_weight, k + p.padding)
    bias: Any = 0.0
    if p.bias and p.kind == "forward":
        values, at = matrix(1, n, compute, 8)
        bias = values[0]
        field("bias", "Q", at)
    itemsize = np.dtype(HELD[of_delta]).itemsize
    deltas, gradients, scores = [], [], []
    for task, stand in enumerate(p.tasks):
        ld = k + p.padding
        reads = stand in ("open", "read") or (p.kind == "weight" and stand == "read closed")
        values, at = matrix(n, k, of_delta, 255, 512, p.padding) if reads else (np.zeros((n, k)), 0)
        if stand == "read closed" and not reads:  # nothing may read it
            at = memory.reserve(n * ld * itemsize)
        deltas.append(values)
        of_task(task, "delta", "Qq", at, ld)
        of_task(task, "gate.open", "?", stand in ("open", "read closed"))  # of two that differ the score counts
        of_task(task, "gate.threshold", "d", 0.1)
        of_task(task, "joins", "?", stand == "joins")
        if stand.startswith("read"):
            kind = "f64" if task % 2 else "f32"
            of_task(task, "gate.score", "Q", memory.put(stored([0.2 if stand == "read" else 0.05], kind)))
            of_task(task, "gate.score_dtype", "B", CODES[kind])
        gradients.append(memory.reserve(n * k * itemsize))
        scores.append(memory.reserve(8))
        if p.kind == "weight" and stand != "joins":
            of_task(task, "delta_gradient", "Qq", gradients[-1], k)
            if stand != "closed":
                of_task(task, "score_gradient", "Q", scores[-1])
                of_task(task, "score_dtype", "B", CODES["f64"])
    ids = np.full((samples, p.step), 1 << 50, np.int64)
    ids[:, 0] = p.ids
    slots = m // TILE + min(count + 2, samples)
    tiles_of_g = -(-n // TILE) * -(-k // TILE)
    places = {
        "order": memory.reserve(4 * samples),
        "starts": memory.reserve(4 * (count + 3)),
        "used": memory.reserve(4),
        "tiles": memory.reserve(16 * slots),
        "partials": memory.reserve(8 * max(count * tiles_of_g, 1)),
        "ids": memory.put(ids.reshape(-1)[: (samples - 1) * p.step + 1]),
    }
    for name, at in places.items():
        batch.set(name, "Q", at)
    for name, value in (("ids_step", p.step), ("samples", samples), ("each", p.each), ("all_tasks", count)):
        batch.set(name, "q", value)
    batch.set("count", "i", count)
    batch.set("slots", "I", slots)
    batch.set("tile", "i", TILE)
    result = memory.reserve(m * (n if p.kind == "forward" else k) * 2)
    field("result", "Q", result)
    columns = n if p.kind == "forward" else k
    field("ld_result", "q", columns)

    given = bytes(batch.bytes)
    order, shared = loaded[("order",)]
    ptx.Block(order, memory, given, 256, (0, 0), (1, 1), shared).run()
    groups = np.array([p.group(one) for one in p.ids])
    if (memory.get(places["order"], np.int32, samples) != np.argsort(groups, kind="stable")).any():
        return "another order"
    kernel, shared = loaded[p.key]
    threads = 128 if p.kind == "weight" else 256
    grid = (tiles_of_g, count) if p.kind == "weight" else (slots * -(-columns // TILE), 1)
    for y in range(grid[1]):
        for place in range(grid[0]):
            ptx.Block(kernel, memory, given, threads, (place, y), grid, shared).run()
    tasks_of_rows = np.repeat(p.ids, p.each)
    if p.kind == "weight":
        adding, shared = loaded[("scores",)]
        for task in range(count):
            arguments = given + struct.pack("<q", tiles_of_g)
            ptx.Block(adding, memory, arguments, 256, (task, 0), (count, 1), shared).run()
        for task, stand in enumerate(p.tasks):
            if stand == "joins":
                continue
            mine = tasks_of_rows == task
            g = dy[mine].T @ x[mine]
            want = g if p.opened(task) else 0.0 * g
            got = number(memory.get(gradients[task], HELD[of_delta], n * k), of_delta).reshape(n, k)
            if (got != number(stored(want, of_delta), of_delta)).any():
                return f"the gradient of task {task} is another"
            if stand != "closed":
                dot, right = float(memory.get(scores[task], np.float64, 1)[0]), float((g * deltas[task]).sum())
                if dot != right:
                    return f"<G, Delta> of task {task}: expected {right}, got {dot}"
        return ""
    want = np.full((m, columns), np.nan)
    for row, task in enumerate(tasks_of_rows):
        if p.group(task) > count:
            continue
        used = number(stored(weight + (deltas[task] if p.opened(task) else 0.0), compute), compute)
        want[row] = x[row] @ used.T + bias if p.kind == "forward" else dy[row] @ used
    got = number(memory.get(result, np.uint16, m * columns), compute).reshape(m, columns)
    expected = number(stored(want, compute), compute)
    bad = ~((got == expected) | (np.isnan(got) & np.isnan(expected)))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        return f"{int(bad.sum())} of {bad.size} wrong, at {place} expected {want[place]}, got {got[place]}"
    return ""


def random_problem(chance: random.Random, key: tuple[str, ...]) -> Problem:
    kind, compute, *rest = key
    types = (compute, *rest) if kind != "weight" else (compute, compute, rest[0])
    count, samples = chance.choice((1, 2, 5)), chance.choice((1, 4, 9, 20))
    return Problem(
        kind=kind,
        types=types,  # type: ignore[arg-type]
        ids=[chance.randrange(-2, count + 1) for _ in range(samples)],
        tasks=[chance.choice(STANDS) for _ in range(count)],
        each=chance.choice((1, 1, 2, 7)),
        outputs=chance.choice((1, 8, 31, 33, 64, 66)),
        inputs=chance.choice((2, 8, 30, 64, 65, 72, 130)),
        offset=chance.choice((0, 0, 0, 8, 1, 2)),
        padding=chance.choice((0, 0, 8, 1, 2)),
        bias=chance.random() < 0.5,
        step=chance.choice((1, 1, 3)),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_batches(architecture, texts, layout, record_property) -> None:
    """Each kernel in turn, so that none is left out."""
    chance, loaded = random.Random(f"{SEED} ptx mixed"), kernels(texts(architecture))
    numbers = np.random.default_rng(int(SEED))
    record_property("drawn", f"ptx by seed {SEED}")
    assert len(loaded) == 19
    for key in loaded:
        if len(key) == 1:
            continue
        problem = random_problem(chance, key)
        try:
            said = wrong(problem, texts(architecture), layout, numbers)
        except ptx.Fault as fault:
            said = str(fault)
        assert not said, f"{problem}: {said}"


def test_samples_of_no_task(texts, layout) -> None:
    memory, arguments = ptx.Memory(1 << 16, ptx.GLOBAL_BASE, "global"), Arguments(layout, "Spoil")
    before = np.ones((5, 300), np.uint16)
    at = memory.put(before)
    arguments.set("data", "Q", at)
    arguments.set("ids", "Q", memory.put(np.array([-1, 3, 2, -2, 1 << 40], np.int64)))
    for name, value in (("ids_step", 1), ("samples", 5), ("words", 300), ("all_tasks", 3)):
        arguments.set(name, "q", value)
    kernel, _ = kernels(texts("compute_90a"))[("spoil",)]
    for sample in range(5):
        ptx.Block(kernel, memory, bytes(arguments.bytes), 256, (sample, 0), (5, 1), 0).run()
    before[[1, 3, 4]] = 0xFFFF
    assert (memory.get(at, np.uint16, 1500).reshape(5, 300) == before).all()


# A piece of the text, its change, and the batch that shows it.
SAME, STAND = ("bf16", "bf16", "bf16"), ["open", "read closed", "read", "joins"]
IDS = [2, 0, -1, 5, 0, 3, 1, 2, -1, 0]
DEEP = Problem("forward", SAME, IDS, STAND, 3, 64, 320)
TAIL = Problem("forward", SAME, IDS, STAND, 3, 33, 72, padding=8)
BACK = Problem("input", ("f16", "f16", "f16"), IDS, STAND, 3, 70, 64)
GRADIENT = Problem("weight", SAME, IDS, STAND, 15, 64, 64)
CHANGES: dict[str, tuple[str, str, Problem]] = {
    "a copy too few is waited for": (r"cp\.async\.wait_group 2;", "cp.async.wait_group 3;", DEEP),
    "not transposed": (r"\.x4\.trans\.", ".x4.", BACK),
    "the rest of a piece is read, not zero": (r"(cp\.async\.cg\S+ \[\S+\], \[\S+\], 16), %\w+;", r"\1;", TAIL),
    "ids of 32 bits": (r"ld\.global(\S*)\.u64", r"ld.global\1.u32", DEEP),
    "samples are not divided": (r"div\.u32(\s+%\w+, %\w+), %\w+;", r"mov.u32\1;", DEEP),
    "another task's": (r"%ctaid\.y", "%ctaid.x", GRADIENT),
    "lanes add their own": (r"shfl\.sync\.bfly", "shfl.sync.idx", GRADIENT),
    "another block": (r"%ctaid\.x", "%ctaid.y", Problem("forward", SAME, IDS, STAND, 3, 130, 64)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_text_is_found(name: str, texts, layout) -> None:
    """The product is right with the text as it is, and wrong or a fault with the change."""
    pattern, change, problem = CHANGES[name]
    text = texts("compute_90a")
    changed, count = re.subn(pattern, change, text)
    assert count > 0, "the change finds no place"
    assert wrong(problem, text, layout, np.random.default_rng(1)) == ""
    try:
        said = wrong(problem, changed, layout, np.random.default_rng(1))
    except ptx.Fault as fault:
        said = str(fault)
    assert said, "the product is as before"
