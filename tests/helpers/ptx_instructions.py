"""What each PTX instruction does to a block of threads (ptx.py), after its opcode: `INSTRUCTIONS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_machine import CLUSTER_BARRIER, CLUSTER_BASE, STORED, TYPES, WARP, Array, Block, Copy, Fault

Run = Callable[[Block, "Array | None"], None]


def compiled(where: str, guard: str, opcode: str, operands: list[str]) -> Run:
    """What runs an instruction. Branches and barriers are the block's own."""
    head, *parts = opcode.split(".")
    if head in ("bra", "ret", "exit", "trap", "bar") or opcode in CLUSTER_BARRIER:
        if guard and head != "bra":
            raise Fault(f"{where}: @{guard} {opcode}: not run here")
        return lambda block, mask: None
    make = INSTRUCTIONS.get(head)
    if make is None or not {*parts} <= TYPES.keys() | MODIFIERS.get(head, {"rn"}):
        raise Fault(f"{where}: {opcode}: no such instruction here")
    run = make(parts, operands)
    if not guard:
        return run

    def guarded(block: Block, mask: Array | None) -> None:
        taken = block.value(guard.lstrip("!"), "pred") ^ guard.startswith("!")
        both = taken if mask is None else taken & mask
        if both.any():
            block.mask = None if both.all() else both
            run(block, block.mask)

    return guarded


def elementwise(function: Callable[..., Any]) -> Callable[[list[str], list[str]], Run]:
    """d = function(a, ...), all of the instruction's last type."""

    def make(parts: list[str], operands: list[str]) -> Run:
        kind = parts[-1]

        def run(block: Block, mask: Array | None) -> None:
            with np.errstate(all="ignore"):
                found = function(*(block.value(one, kind) for one in operands[1:]))
            block.put(operands[0], np.asarray(found).astype(TYPES[kind], copy=False), mask)

        return run

    return make


def _shifted(left: bool) -> Callable[[list[str], list[str]], Run]:
    def make(parts: list[str], operands: list[str]) -> Run:
        kind = parts[-1]
        bits = 8 * np.dtype(TYPES[kind]).itemsize

        def run(block: Block, mask: Array | None) -> None:
            value, by = block.value(operands[1], kind), block.value(operands[2], "u32")
            within = np.minimum(by, bits - 1).astype(value.dtype)
            found = value << within if left else value >> within
            if left or value.dtype.kind == "u":
                found = np.where(by >= bits, np.zeros((), value.dtype), found)
            block.put(operands[0], found, mask)

        return run

    return make


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _setp(parts: list[str], operands: list[str]) -> Run:
    if len(parts) != 2 or parts[0] not in _COMPARE or len(operands) != 3:
        raise Fault(f"setp.{'.'.join(parts)} {', '.join(operands)}: not run here")
    compare, kind = _COMPARE[parts[0]], parts[-1]

    def run(block: Block, mask: Array | None) -> None:
        first, second = block.value(operands[1], kind), block.value(operands[2], kind)
        found = compare(first, second)
        if kind[0] == "f":  # ordered: false where one is NaN
            found = found & ~np.isnan(first) & ~np.isnan(second)
        block.put(operands[0], found, mask)

    return run


def _selp(parts: list[str], operands: list[str]) -> Run:
    def run(block: Block, mask: Array | None) -> None:
        chosen = block.value(operands[3], "pred")
        block.put(
            operands[0],
            np.where(chosen, block.value(operands[1], parts[-1]), block.value(operands[2], parts[-1])),
            mask,
        )

    return run


def _mul(parts: list[str], operands: list[str]) -> Run:
    if parts[0] not in ("wide", "hi"):
        return elementwise(np.multiply)(parts, operands)
    kind, upper = parts[-1], parts[0] == "hi"
    bits = int(kind[1:])
    if 2 * bits > 64:
        raise Fault(f"mul.{'.'.join(parts)}: not run here")
    wide = f"{kind[0]}{2 * bits}"

    def run(block: Block, mask: Array | None) -> None:
        first, second = (block.value(one, kind).astype(TYPES[wide]) for one in operands[1:])
        product = first * second
        block.put(operands[0], (product >> bits).astype(TYPES[kind]) if upper else product, mask)

    return run


def _add(parts: list[str], operands: list[str]) -> Run:
    if parts[-1] in ("f16x2", "bf16x2"):
        return _pairs(lambda a, b: a + b, parts, operands)
    return elementwise(np.add)(parts, operands)


def _fma(parts: list[str], operands: list[str]) -> Run:
    if parts[-1] in ("f16x2", "bf16x2"):  # fp64 holds their products, and here their sums
        return _pairs(lambda a, b, c: a * b + c, parts, operands)
    return elementwise(fused)(parts, operands)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c rounded once: of floats in fp64, of doubles with the product's own error (Dekker)."""
    if np.asarray(a).dtype == np.float32:
        product, other = np.asarray(a, np.float64) * b, np.asarray(c, np.float64)
        total = product + other
        lost = _two_sum(product, other, total)
        return _odd(total, lost).astype(np.float32)
    product = a * b
    split = float(2**27 + 1)
    high_a, high_b = a * split - (a * split - a), b * split - (b * split - b)
    error = ((high_a * high_b - product) + high_a * (b - high_b) + (a - high_a) * high_b) + (a - high_a) * (b - high_b)
    total = product + c
    return np.where(np.isfinite(total), total + (_two_sum(product, c, total) + error), total)


def _two_sum(a: Any, b: Any, total: Any) -> Any:
    """What a sum lost."""
    part = total - a
    return (a - (total - part)) + (b - part)


def _odd(total: Any, lost: Any) -> Any:
    """Rounded to odd: a second rounding then is as if it were the first."""
    bits = np.atleast_1d(np.asarray(total, np.float64)).view(np.int64).copy()
    lost = np.atleast_1d(lost)
    inexact = np.isfinite(lost) & (lost != 0) & (bits % 2 == 0)
    toward = np.where((lost > 0) == (bits >= 0), 1, -1)
    bits = np.where(inexact, bits + toward, bits)
    return bits.view(np.float64)


def bf16_to_float(bits: Any) -> Array:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: Any) -> Array:
    """Nearest, ties to even; every NaN is the device's."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def float_to_f16(values: Any) -> Array:
    with np.errstate(all="ignore"):
        bits = np.asarray(values, np.float32).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def _pairs(function: Callable[..., Any], parts: list[str], operands: list[str]) -> Run:
    """On both halves of words, in fp64, rounded to odd in fp32 and then to 16 bits: as one rounding."""
    brain = parts[-1] == "bf16x2"

    def half(word: Any, shift: int) -> Any:
        bits = (np.asarray(word) >> np.uint32(shift)).astype(np.uint16)
        return (bf16_to_float(bits) if brain else bits.view(np.float16)).astype(np.float64)

    def run(block: Block, mask: Array | None) -> None:
        words = [block.value(one, "u32") for one in operands[1:]]
        found = np.zeros(block.threads, np.uint32)
        with np.errstate(all="ignore"):
            for shift in (0, 16):
                exact = function(*(half(word, shift) for word in words))
                single = exact.astype(np.float32)
                bits = np.atleast_1d(single).view(np.int32).copy()
                lost = exact - single.astype(np.float64)
                inexact = np.isfinite(single) & (lost != 0) & (bits % 2 == 0)
                bits = np.where(inexact, bits + np.where((lost > 0) == (bits >= 0), 1, -1).astype(np.int32), bits)
                single = bits.astype(np.int32).view(np.float32)
                short = float_to_bf16(single) if brain else float_to_f16(single)
                found |= short.astype(np.uint32) << np.uint32(shift)
        block.put(operands[0], found, mask)

    return run


def _divided(a: Any, b: Any) -> Any:
    """Towards zero."""
    if np.asarray(a).dtype.kind == "f":
        return a / b
    if np.asarray(a).dtype.kind == "u":
        return a // b
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _rest(a: Any, b: Any) -> Any:
    return a - _divided(a, b) * b


def _cvt(parts: list[str], operands: list[str]) -> Run:
    to, source = parts[-2:]
    if source[0] == "f" and to[0] in "us":
        raise Fault(f"cvt.{'.'.join(parts)}: not run here")

    def run(block: Block, mask: Array | None) -> None:
        if to in ("bf16x2", "f16x2"):
            short = float_to_bf16 if to == "bf16x2" else float_to_f16
            high, low = (short(block.value(one, "f32")).astype(np.uint32) for one in operands[1:])
            found: Any = high << np.uint32(16) | low
        else:
            value = block.value(operands[1], source)
            with np.errstate(all="ignore"):
                if to in ("bf16", "f16"):
                    found = float_to_bf16(value) if to == "bf16" else float_to_f16(value)
                else:
                    found = value.astype(TYPES[to])
        block.put(operands[0], found, mask)

    return run


def _mov(parts: list[str], operands: list[str]) -> Run:
    kind = parts[-1]

    def run(block: Block, mask: Array | None) -> None:
        to, source = operands
        size = 1 if kind == "pred" else np.dtype(TYPES[kind]).itemsize
        if source.startswith("{"):
            words = source[1:-1].replace(" ", "").split(",")
            part = size // len(words)
            found: Any = np.zeros(block.threads, STORED[size])
            for i, word in enumerate(words):
                found |= block.value(word, f"u{8 * part}").astype(STORED[size]) << STORED[size](8 * part * i)
            block.put(to, found, mask)
        elif to.startswith("{"):
            words = to[1:-1].replace(" ", "").split(",")
            part = size // len(words)
            value = block.value(source, f"u{8 * size}")
            for i, word in enumerate(words):
                block.put(word, (value >> STORED[size](8 * part * i)).astype(STORED[part]), mask)
        else:
            block.put(to, block.value(source, kind), mask)

    return run


def _vector(operand: str) -> list[str]:
    return operand[1:-1].replace(" ", "").split(",") if operand.startswith("{") else [operand]


def _ld(parts: list[str], operands: list[str]) -> Run:
    names, size = _vector(operands[0]), np.dtype(TYPES[parts[-1]]).itemsize

    def run(block: Block, mask: Array | None) -> None:
        address = block.address(operands[1], mask)
        if parts[0] == "shared::cluster":
            raw = _of_cluster(block, address, size * len(names))
        else:
            raw = block.memory[parts[0]].load(address, size * len(names))
        for i, name in enumerate(names):
            values = np.ascontiguousarray(raw[:, i * size : (i + 1) * size]).view(TYPES[parts[-1]])[:, 0]
            block.put(name, _spread(values, mask), mask)

    return run


def _of_cluster(block: Block, address: Array, size: int) -> Array:
    """[lanes, size] bytes of the shared memory of a cluster's blocks: of that which mapa named, or of this one."""
    rank, found = address // CLUSTER_BASE - 1, np.zeros((len(address), size), np.uint8)
    for of in np.unique(rank):
        if of >= len(block.cluster):
            raise Fault(f"block {of} of a cluster of {len(block.cluster)}")
        other = block if of < 0 else block.cluster[of]
        if other.ended:
            raise Fault(f"the shared memory of block {of}, which has ended")
        found[rank == of] = other.memory["shared"].load(address[rank == of] % CLUSTER_BASE, size)
    return found


def _mapa(parts: list[str], operands: list[str]) -> Run:
    """An address of this block's shared memory as that of another block of the cluster."""

    def run(block: Block, mask: Array | None) -> None:
        own, rank = (block.value(one, "u32") for one in operands[1:])
        block.put(
            operands[0], np.broadcast_to(own + (rank + np.uint32(1)) * np.uint32(CLUSTER_BASE), block.threads), mask
        )

    return run


def _spread(values: Array, mask: Array | None) -> Array:
    """[threads] of the values of the mask's threads."""
    if mask is None:
        return values
    found = np.zeros(len(mask), values.dtype)
    found[mask] = values
    return found


def _st(parts: list[str], operands: list[str]) -> Run:
    names, kind = _vector(operands[1]), parts[-1]

    def run(block: Block, mask: Array | None) -> None:
        pieces = []
        for name in names:
            values = np.broadcast_to(block.value(name, kind), block.threads)
            values = values if mask is None else values[mask]
            pieces.append(np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1))
        block.memory[parts[0]].store(block.address(operands[0], mask), np.concatenate(pieces, axis=1))

    return run


def _cp(parts: list[str], operands: list[str]) -> Run:
    """cp.async: the bytes are there for the thread that waits for its group, and nobody reads them before."""

    def copy(block: Block, mask: Array | None) -> None:
        size = int(operands[2])
        lanes = np.arange(block.threads) if mask is None else np.flatnonzero(mask)
        read = (
            np.broadcast_to(block.value(operands[3], "u32"), block.threads)[lanes]
            if len(operands) > 3
            else np.full(len(lanes), size)
        )
        if (read > size).any():
            raise Fault(f"cp.async: more than {size} bytes to read")
        source = block.address(operands[1], mask)
        if (source % size).any():
            raise Fault(f"cp.async: a source off {size} bytes")
        shared, memory = block.memory["shared"], block.memory["global"]
        index = shared.places(block.address(operands[0], mask), size)
        values = np.zeros((len(lanes), size), np.uint8)
        for count in np.unique(read):
            if count:
                chosen = read == count
                places = source[chosen] - memory.base
                if (places < 0).any() or (places + count > len(memory.data)).any():
                    raise Fault("cp.async: outside every allocation")
                at = places[:, None] + np.arange(count)
                if not memory.written[at].all():
                    raise Fault("cp.async: outside every allocation, or never written")
                values[chosen, :count] = memory.data[at]
        shared.written[index] = False
        block.copies.append(Copy(lanes, index, values, block.committed[lanes].copy()))

    def commit(block: Block, mask: Array | None) -> None:
        block.committed[slice(None) if mask is None else mask] += 1

    def wait(block: Block, mask: Array | None) -> None:
        shared, left = block.memory["shared"], []
        limit = block.committed - int(operands[0])
        if mask is not None:
            limit = np.where(mask, limit, -1)
        for one in block.copies:
            landed = one.group < limit[one.lanes]
            index = one.index[landed]
            shared.data[index] = one.values[landed]
            shared.written[index] = True
            if not landed.all():
                stay = ~landed
                left.append(Copy(one.lanes[stay], one.index[stay], one.values[stay], one.group[stay]))
        block.copies = left

    return commit if "commit_group" in parts else wait if "wait_group" in parts else copy


def _ldmatrix(parts: list[str], operands: list[str]) -> Run:
    names, transposed = _vector(operands[0]), "trans" in parts
    group, pair = np.arange(WARP) // 4, 2 * (np.arange(WARP) % 4)

    def run(block: Block, mask: Array | None) -> None:
        warps = block.whole_warps(mask)
        addresses = block.by_warp(block.address(operands[1], None), warps)[:, : 8 * len(names)]
        rows = block.memory["shared"].load(addresses.reshape(-1), 16).reshape(-1).view(np.uint16)
        matrices = rows.reshape(len(warps), len(names), 8, 8).astype(np.uint32)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        for i, name in enumerate(names):
            low, high = matrices[:, i, group, pair], matrices[:, i, group, pair + 1]
            block.put(name, block.to_threads(low | high << np.uint32(16), warps), mask)

    return run


def _mma(parts: list[str], operands: list[str]) -> Run:
    """m16n8k16, 16-bit operands, fp32 sums; the sum here in fp64, rounded once."""
    if parts[2:5] != ["m16n8k16", "row", "col"]:
        raise Fault(f"mma.{'.'.join(parts)}: another shape")
    brain = parts[6] == "bf16"
    to, first, second, third = (_vector(one) for one in operands)
    group, pair = np.arange(WARP) // 4, 2 * (np.arange(WARP) % 4)

    def halves(block: Block, name: str, warps: Array) -> tuple[Array, Array]:
        word = block.by_warp(block.value(name, "u32"), warps)
        bits = [(word >> np.uint32(shift)).astype(np.uint16) for shift in (0, 16)]
        low, high = (bf16_to_float(one) if brain else one.view(np.float16) for one in bits)
        return low.astype(np.float64), high.astype(np.float64)

    def run(block: Block, mask: Array | None) -> None:
        warps = block.whole_warps(mask)
        a, b = np.zeros((len(warps), 16, 16)), np.zeros((len(warps), 16, 8))
        c = np.zeros((len(warps), 16, 8))
        for i, name in enumerate(first):
            row, column = group + 8 * (i % 2), pair + 8 * (i // 2)
            a[:, row, column], a[:, row, column + 1] = halves(block, name, warps)
        for i, name in enumerate(second):
            b[:, pair + 8 * i, group], b[:, pair + 1 + 8 * i, group] = halves(block, name, warps)
        for i, name in enumerate(third):
            c[:, group + 8 * (i // 2), pair + i % 2] = block.by_warp(block.value(name, "f32"), warps)
        with np.errstate(all="ignore"):
            found = (c + a @ b).astype(np.float32)
        for i, name in enumerate(to):
            block.put(name, block.to_threads(found[:, group + 8 * (i // 2), pair + i % 2], warps), mask)

    return run


def _shfl(parts: list[str], operands: list[str]) -> Run:
    mode = parts[1]
    lanes = np.arange(WARP)
    # The predicate behind "|" says whether the lane is one of the warp's.
    to, *rest = operands
    valid, (value, by, clamp, members) = (rest[0], rest[1:]) if len(rest) == 5 else (None, rest)

    def run(block: Block, mask: Array | None) -> None:
        took = slice(None) if mask is None else mask  # other warps may be elsewhere
        said = (np.broadcast_to(block.value(one, "u32"), block.threads)[took] for one in (members, clamp))
        if not all((got == want).all() for got, want in zip(said, (0xFFFFFFFF, 31), strict=True)):
            raise Fault("shfl: other than of whole warps")
        warps = block.whole_warps(mask)
        words = block.by_warp(block.value(value, "u32"), warps)
        distance = block.by_warp(block.value(by, "u32"), warps).astype(np.int64)
        source = {"bfly": lanes ^ distance, "down": lanes + distance, "idx": distance}[mode]
        inside = (source >= 0) & (source < WARP)
        source = np.where(inside, source, lanes)
        block.put(to, block.to_threads(np.take_along_axis(words, source, axis=1), warps), mask)
        if valid is not None:
            block.put(valid, block.to_threads(inside, warps), mask)

    return run


def _vote(parts: list[str], operands: list[str]) -> Run:
    if parts[1] != "ballot":
        raise Fault(f"vote.{'.'.join(parts)}")

    def run(block: Block, mask: Array | None) -> None:
        warps = block.whole_warps(mask)
        each = block.by_warp(block.value(operands[1], "pred"), warps).astype(np.uint32)
        bits = (each << np.arange(WARP, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        block.put(operands[0], block.to_threads(np.repeat(bits[:, None], WARP, axis=1), warps), mask)

    return run


def _bfi(parts: list[str], operands: list[str]) -> Run:
    def run(block: Block, mask: Array | None) -> None:
        field_, into = block.value(operands[1], "u32"), block.value(operands[2], "u32")
        position, length = (int(block.constant(one, np.uint32)) for one in operands[3:5])
        bits = np.uint32((((1 << length) - 1) << position) & 0xFFFFFFFF)
        block.put(operands[0], into & ~bits | field_ << np.uint32(position) & bits, mask)

    return run


def _popc(parts: list[str], operands: list[str]) -> Run:
    def run(block: Block, mask: Array | None) -> None:
        value = np.atleast_1d(block.value(operands[1], "u32"))
        block.put(operands[0], np.unpackbits(value.view(np.uint8)).reshape(-1, 32).sum(axis=1).astype(np.uint32), mask)

    return run


# What may stand in an opcode beside types; with any other the result would be another one.
MODIFIERS: dict[str, set[str]] = {
    "mul": {"rn", "lo", "hi", "wide"},
    "mad": {"lo"},
    "add": {"rn", "f16x2", "bf16x2"},
    "fma": {"rn", "f16x2", "bf16x2"},
    "cvt": {"rn", "f16x2", "bf16x2", "bf16"},
    "cvta": {"to", "global"},
    "ld": {"global", "shared", "shared::cluster", "param", "cs", "v2", "v4"},
    "st": {"global", "shared", "v2", "v4"},
    "cp": {"async", "cg", "ca", "shared", "global", "commit_group", "wait_group"},
    "mapa": {"shared::cluster"},
    "setp": {"eq", "ne", "lt", "le", "gt", "ge"},
    "ldmatrix": {"sync", "aligned", "m8n8", "x4", "trans", "shared"},
    "mma": {"sync", "aligned", "m16n8k16", "row", "col", "bf16"},
    "shfl": {"sync", "bfly", "down", "idx"},
    "vote": {"sync", "ballot"},
}
INSTRUCTIONS: dict[str, Callable[[list[str], list[str]], Run]] = {
    "mov": _mov, "cvta": lambda parts, operands: _mov(["u64"], operands), "ld": _ld, "st": _st, "cp": _cp, "cvt": _cvt,
    "add": _add, "sub": elementwise(np.subtract), "mul": _mul, "fma": _fma, "div": elementwise(_divided),
    "mad": elementwise(lambda a, b, c: a * b + c), "rem": elementwise(_rest), "min": elementwise(np.fmin),
    "max": elementwise(np.fmax), "neg": elementwise(np.negative), "not": elementwise(np.invert),
    "and": elementwise(np.bitwise_and), "or": elementwise(np.bitwise_or), "xor": elementwise(np.bitwise_xor),
    "shl": _shifted(True), "shr": _shifted(False), "setp": _setp, "selp": _selp, "bfi": _bfi, "popc": _popc,
    "mapa": _mapa, "ldmatrix": _ldmatrix, "mma": _mma, "shfl": _shfl, "vote": _vote,
}  # fmt: skip
