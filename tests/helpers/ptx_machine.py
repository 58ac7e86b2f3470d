"""The machine that runs PTX (ptx.py): memory that knows its bounds, and a block of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TYPES: dict[str, Any] = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
STORED = {"pred": np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WARP, PARAM_BASE, GLOBAL_BASE = 32, 1 << 20, 1 << 32
CLUSTER_BASE = 1 << 24  # what mapa adds for each block of a cluster, the first included: shared memory is smaller
MOST_STEPS = 1 << 20  # of a block: kernels of these tests take some thousands


class Fault(Exception):
    """What a GPU would have done wrongly, or this cannot run."""


class Memory:
    """Bytes from an address on, of which only what was allocated may be touched, and only what was written be read."""

    def __init__(self, size: int, base: int, name: str) -> None:
        self.base, self.name, self.end = base, name, 0
        self.data = np.zeros(size, np.uint8)
        self.there = np.zeros(size, np.bool_)
        self.written = np.zeros(size, np.bool_)

    def put(self, values: Array, *, align: int = 256, offset: int = 0) -> int:
        """A copy of an array in an allocation of exactly its size, `offset` bytes behind an aligned address."""
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        at = self.reserve(len(raw), align=align, offset=offset)
        self.data[at - self.base :][: len(raw)] = raw
        self.written[at - self.base :][: len(raw)] = True
        return at

    def reserve(self, size: int, *, align: int = 256, offset: int = 0) -> int:
        """An allocation that nothing was written to."""
        at = (self.end + 64 + align - 1) // align * align + offset  # never beside the one before
        if at + size > len(self.data):
            raise MemoryError(f"{self.name}: {at + size} bytes")
        self.there[at : at + size] = True
        self.end = at + size
        return self.base + at

    def get(self, at: int, dtype: Any, count: int) -> Array:
        """What is there. Raises Fault for elements that nothing was written to."""
        size = count * np.dtype(dtype).itemsize
        places = slice(at - self.base, at - self.base + size)
        if not self.written[places].all():
            raise Fault(f"{self.name}: {int((~self.written[places]).sum())} bytes of a result were never written")
        return self.data[places].copy().view(dtype)

    def places(self, at: Array, size: int) -> Array:
        """[lanes, size] indices of bytes. Raises Fault for an address that is none."""
        if (at % size).any():
            raise Fault(f"{self.name}: {size} bytes at {hex(int(at[at % size != 0][0]))}: misaligned")
        first = at.astype(np.int64) - self.base
        inside = (first >= 0) & (first + size <= len(self.data))
        index = np.where(inside, first, 0)[:, None] + np.arange(size)
        good = inside & self.there[index].all(axis=1)
        if not good.all():
            raise Fault(f"{self.name}: {size} bytes at {hex(int(at[~good][0]))}: outside every allocation")
        return index

    def load(self, at: Array, size: int) -> Array:
        """[lanes, size] bytes."""
        index = self.places(at, size)
        if not self.written[index].all():
            lane = int(np.flatnonzero(~self.written[index].all(axis=1))[0])
            raise Fault(f"{self.name}: read before it was written, at {hex(int(at[lane]))}")
        return self.data[index]

    def store(self, at: Array, values: Array) -> None:
        index = self.places(at, values.shape[1])
        self.data[index] = values
        self.written[index] = True


@dataclass
class Copy:
    """An asynchronous copy: for each thread of `lanes` the places, the bytes, and the group that it belongs to."""

    lanes: Array
    index: Array
    values: Array
    group: Array


@dataclass
class Kernel:
    """An entry: its instructions, registers by name with their size, parameters with their offsets, and threads."""

    name: str
    code: list[tuple[str, str, list[str]]] = field(default_factory=list)  # guard, opcode, operands
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    bytes_of_parameters: int = 0
    shared: str = ""
    run: list[Callable[[Block, Array | None], None]] = field(default_factory=list)


CLUSTER_BARRIER = {"barrier.cluster.arrive.release.aligned": False, "barrier.cluster.wait.acquire.aligned": True}


class Block:
    """One block of a grid: registers and shared memory of its own. Alone it is a cluster of one.

    Args:
        arguments: the parameters' bytes. place, grid: of the block, (x, y). shared: bytes of dynamic shared memory.
    """

    def __init__(
        self, kernel: Kernel, memory: Memory, arguments: bytes, threads: int, place: tuple[int, int],
        grid: tuple[int, int], shared: int,
    ) -> None:  # fmt: skip
        if len(arguments) != kernel.bytes_of_parameters:
            raise Fault(
                f"{kernel.name}: expected {kernel.bytes_of_parameters} bytes of arguments, got {len(arguments)}"
            )
        self.kernel, self.threads, self.steps = kernel, threads, 0
        self.warps = threads // WARP
        self.memory = {
            "global": memory,
            "shared": Memory(max(shared, 1), 0, "shared"),
            "param": Memory(1 << 16, PARAM_BASE, "param"),
        }
        self.memory["shared"].there[:shared] = True
        parameters = np.frombuffer(arguments, np.uint8)
        self.memory["param"].data[: len(parameters)] = parameters
        self.memory["param"].there[: len(parameters)] = self.memory["param"].written[: len(parameters)] = True
        self.registers = {
            n: np.zeros(threads, STORED["pred"] if t is np.bool_ else STORED[np.dtype(t).itemsize])
            for n, t in kernel.registers.items()
        }
        self.known: dict[str, Any] = {}  # registers that were written: True, or for which threads
        self.mask: Array | None = None  # the threads that the instruction is for
        lanes = np.arange(threads, dtype=np.uint32)
        same = {
            "%ctaid.x": place[0],
            "%ctaid.y": place[1],
            "%nctaid.x": grid[0],
            "%nctaid.y": grid[1],
            "%ntid.x": threads,
        }
        self.special = {"%tid.x": lanes, **{n: np.full(threads, value, np.uint32) for n, value in same.items()}}
        self.ended = False
        self.join([self])
        self.committed = np.zeros(threads, np.int64)
        self.copies: list[Copy] = []
        self.at: Array | None = None  # the next instruction of each thread, where they differ
        self.all_at = 0
        self.waiting = np.zeros(threads, np.bool_)
        self.arrived, self.paused = np.zeros(threads, np.bool_), False  # at the cluster's barrier

    def join(self, cluster: list[Block]) -> None:
        """Makes this one of the blocks of a cluster, in the order of their ranks."""
        self.cluster = cluster
        for name, value in (("ctarank", cluster.index(self)), ("nctarank", len(cluster))):
            self.special[f"%cluster_{name}"] = np.full(self.threads, value, np.uint32)

    def run(self) -> None:
        """To the end of all threads. Raises Fault."""
        run_together([self])

    def advance(self) -> None:
        """To the end of all threads, or to where they wait for the cluster's other blocks."""
        end, self.paused = len(self.kernel.code), False
        while not self.paused:
            if self.at is None:
                if self.all_at >= end:
                    break
                self._step(None)
            else:
                ready = np.where(self.waiting, end, self.at)
                first = int(ready.min())
                if first >= end:
                    if not self.waiting.any():
                        break
                    raise Fault(f"{self.kernel.name}: {int(self.waiting.sum())} threads wait at a barrier for ever")
                self.all_at = first
                self._step(ready == first)
        if self.paused:
            return
        self.ended = True
        if self.copies:
            raise Fault(f"{self.kernel.name}: copies were left in flight")

    def _step(self, mask: Array | None) -> None:
        index = self.all_at
        self.steps, self.mask = self.steps + 1, mask
        if self.steps > MOST_STEPS:
            raise Fault(f"{self.kernel.name}: more than {MOST_STEPS} instructions")
        guard, opcode, operands = self.kernel.code[index]
        try:
            if opcode.startswith("bra"):
                self._branch(guard, operands[0], mask)
            elif opcode in ("ret", "exit"):
                self._go(np.full(self.threads, len(self.kernel.code)), mask)
            elif opcode == "trap":
                raise Fault("the launch is ended")
            elif opcode == "bar.warp.sync":
                self.whole_warps(mask)
                self._go(np.full(self.threads, index + 1) if mask is not None else index + 1, mask)
            elif opcode.startswith("bar."):
                self._barrier(operands, mask)
            elif opcode in CLUSTER_BARRIER:
                self._cluster_barrier(CLUSTER_BARRIER[opcode], mask)
            else:
                self.kernel.run[index](self, mask)
                self._go(np.full(self.threads, index + 1) if mask is not None else index + 1, mask)
        except Fault as fault:
            text = f"{guard and '@' + guard + ' '}{opcode} {', '.join(operands)}"
            raise Fault(f"{fault} in: {text}") from None

    def _go(self, to: Any, mask: Array | None) -> None:
        if mask is None:
            if isinstance(to, int):
                self.all_at = to
                return
            self.at = to.copy()
        else:
            assert self.at is not None
            self.at[mask] = to[mask]
        first = int(self.at[0])
        if not self.waiting.any() and (self.at == first).all():
            self.at, self.all_at = None, first

    def _branch(self, guard: str, label: str, mask: Array | None) -> None:
        to, after = self.kernel.labels[label], self.all_at + 1
        if not guard:
            self._go(to if mask is None else np.full(self.threads, to), mask)
            return
        taken = self.value(guard.lstrip("!"), "pred") ^ guard.startswith("!")
        if mask is None and taken.all():
            self._go(to, mask)
        elif mask is None and not taken.any():
            self._go(after, mask)
        else:
            self._go(np.where(taken, to, after), mask)

    def _barrier(self, operands: list[str], mask: Array | None) -> None:
        if operands != ["0"]:
            raise Fault("a barrier other than the block's")
        self._meet(mask)

    def _cluster_barrier(self, waits: bool, mask: Array | None) -> None:
        """Of arrivals and waits the threads of a warp take turns together."""
        self.whole_warps(mask)
        among = np.ones(self.threads, np.bool_) if mask is None else mask
        if (self.arrived[among] != waits).any():
            raise Fault("an arrival without a wait, or a wait without an arrival")
        self.arrived = self.arrived ^ among
        if waits:
            self.paused = self._meet(mask)
        else:
            self._go(np.full(self.threads, self.all_at + 1) if mask is not None else self.all_at + 1, mask)

    def _meet(self, mask: Array | None) -> bool:
        """Threads wait until all are here that have not ended. Whether they are."""
        if mask is None:
            self.all_at += 1
            return True
        assert self.at is not None
        self.waiting |= mask
        alive = self.at < len(self.kernel.code)
        if (self.waiting == alive).all():
            if len({*self.at[alive].tolist()}) > 1:
                raise Fault("threads wait at different barriers")
            self.waiting[:] = False
            self._go(np.where(alive, self.at + 1, self.at), np.ones(self.threads, np.bool_))
            return True
        return False

    # --- operands

    def value(self, operand: str, kind: str) -> Any:
        """An operand as the instruction's type reads it."""
        dtype = TYPES[kind]
        if operand in self.registers:
            known = self.known.get(operand, False)
            if known is not True and not np.all(known if self.mask is None else known & self.mask == self.mask):
                raise Fault(f"{operand} is read before it was written")
            stored = self.registers[operand]
            if dtype is np.bool_:
                return stored
            size = np.dtype(dtype).itemsize
            if stored.dtype.itemsize != size:  # the lower bytes of a wider register
                stored = stored.astype(STORED[size])
            return stored.view(dtype)
        if operand in self.special:
            return self.special[operand].view(dtype)
        return self.constant(operand, dtype)

    def constant(self, operand: str, dtype: Any) -> Any:
        if operand.startswith(("0f", "0d")):
            bits = np.array(int(operand[2:], 16), np.uint32 if operand[1] == "f" else np.uint64)
            if np.dtype(dtype).itemsize != bits.itemsize:
                raise Fault(f"{operand} for a {np.dtype(dtype)}")
            return bits.view(dtype)
        if operand == self.kernel.shared:
            return np.array(0, dtype)
        if operand in self.kernel.parameters:
            return np.array(PARAM_BASE + self.kernel.parameters[operand], dtype)
        if operand.endswith("U"):
            operand = operand[:-1]
        number = int(operand, 0)
        if dtype is np.bool_:
            return np.array(number != 0)
        if np.dtype(dtype).kind == "f":
            return np.array(number, dtype)
        width = 8 * np.dtype(dtype).itemsize
        return np.array(number % (1 << width), STORED[width // 8]).view(dtype)

    def put(self, operand: str, values: Any, mask: Array | None) -> None:
        """A result, for the threads of the mask. A narrower one is extended by its own sign."""
        if operand == "_":
            return
        register = self.registers[operand]
        values = np.asarray(values)
        if register.dtype == np.bool_:
            values = values.astype(np.bool_)
        elif values.dtype.itemsize != register.dtype.itemsize:
            if values.dtype.kind == "f":
                raise Fault(f"a {values.dtype} for {operand}")
            wide = np.dtype(f"{'i' if values.dtype.kind == 'i' else 'u'}{register.dtype.itemsize}")
            values = values.astype(wide).view(register.dtype)
        else:
            values = values.view(register.dtype)
        if mask is None:
            register[:] = values
        else:
            np.copyto(register, values, where=mask)
            mask = mask | self.known.get(operand, False)
        self.known[operand] = True if mask is None or mask.all() else mask

    def address(self, operand: str, mask: Array | None) -> Array:
        """Of "[base+offset]", for the threads of the mask."""
        base, _, offset = operand[1:-1].partition("+")
        first = np.broadcast_to(self.value(base, self.width_of(base)), self.threads).astype(np.int64)
        found = first + int(offset or 0)
        return found if mask is None else found[mask]

    def width_of(self, operand: str) -> str:
        register = self.registers.get(operand)
        return "u32" if register is not None and register.dtype.itemsize == 4 else "u64"

    def whole_warps(self, mask: Array | None) -> Array:
        """The warps that take part. Raises Fault where a warp does so in part."""
        if mask is None:
            return np.arange(self.warps)
        each = mask.reshape(self.warps, WARP)
        if (each.any(axis=1) != each.all(axis=1)).any():
            raise Fault("a part of a warp")
        return np.flatnonzero(each.any(axis=1))

    def by_warp(self, values: Any, warps: Array) -> Array:
        """[warps, 32] of a value of each thread."""
        return np.broadcast_to(values, self.threads).reshape(self.warps, WARP)[warps]

    def to_threads(self, values: Array, warps: Array) -> Array:
        """[threads] of [warps, 32]."""
        found = np.zeros((self.warps, WARP), values.dtype)
        found[warps] = values
        return found.reshape(-1)


def run_together(blocks: list[Block]) -> None:
    """The blocks of a cluster, each in its turn to its end or to the next barrier of all. Raises Fault."""
    for block in blocks:
        block.join(blocks)
    while True:
        alive = [block for block in blocks if not block.ended]
        for block in alive:
            block.advance()
        if all(block.ended for block in alive):
            return
        if not all(block.paused for block in alive):
            raise Fault(f"{blocks[0].kernel.name}: a block ended where others wait for it")
