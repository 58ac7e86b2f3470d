"""The interpreter of PTX itself (tests/helpers/ptx.py) on kernels of a few lines: what is right, what is a fault."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import ptx
import pytest
from stages import SEED

HEAD = """.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 128 .b8 arena[];
.entry small(
	.param .u64 small_param_0
)
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .f32 	%f<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;

	ld.param.u64 	%rd1, [small_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
"""
TAIL = "\tst.global.u32 \t[%rd3], %r2;\n\tret;\n\n}\n"


def answers(body: str, given: Any = None) -> Any:
    """What each of 32 threads leaves in %r2; `given` are the words that it may load from [%rd3] before."""
    (kernel,) = ptx.parse(HEAD + "".join(f"\t{line}\n" for line in body.splitlines()) + TAIL).values()
    memory = ptx.Memory(1 << 12, ptx.GLOBAL_BASE, "global")
    at = memory.reserve(128) if given is None else memory.put(np.asarray(given, np.uint32))
    ptx.Block(kernel, memory, struct.pack("<Q", at), 32, (0, 0), (1, 1), 512).run()
    return memory.get(at, np.uint32, 32)


def test_numbers() -> None:
    lanes = np.arange(32, dtype=np.uint32)
    assert (answers("shl.b32 %r2, %r1, 31;") == lanes << np.uint32(31)).all()
    assert (answers("mov.u32 %r3, 32;\nshl.b32 %r2, %r1, %r3;") == 0).all()  # not modulo 32
    assert (answers("sub.s32 %r3, 0, %r1;\nshr.s32 %r2, %r3, 40;")[1:] == 0xFFFFFFFF).all()
    assert (answers("mov.b32 %r2, 0f3F800000;") == 0x3F800000).all()
    assert (answers("bfi.b32 %r2, %r1, 255, 4, 8;") == (lanes << np.uint32(4) | 0xF)).all()
    assert (answers("mul.hi.u32 %r2, %r1, -1;")[1:] == lanes[1:] - 1).all()  # of i * (2^32 - 1)
    assert (answers("mul.hi.s32 %r2, %r1, -1;")[1:] == 0xFFFFFFFF).all()
    assert (answers("popc.b32 %r2, %r1;") == [bin(i).count("1") for i in range(32)]).all()
    nan = "mov.f32 %f1, 0f7FC00000;\nmov.f32 %f2, 0f3F800000;\n"
    for compare in ("eq", "ne", "lt", "le", "gt", "ge"):
        assert (answers(f"{nan}setp.{compare}.f32 %p1, %f1, %f2;\nselp.b32 %r2, 1, 0, %p1;") == 0).all()
    assert (answers(f"{nan}min.f32 %f3, %f1, %f2;\nmov.b32 %r2, %f3;") == 0x3F800000).all()


def test_lanes() -> None:
    lanes = np.arange(32, dtype=np.uint32)
    swapped = answers(
        "mov.u32 %r3, 5;\nmov.u32 %r4, 31;\nmov.u32 %r5, -1;\nshfl.sync.bfly.b32 %r2|%p1, %r1, %r3, %r4, %r5;"
    )
    assert (swapped == lanes ^ 5).all()
    parted = "setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L1;\nmov.u32 %r2, 2;\nbra.uni $L2;\n$L1:\nmov.u32 %r2, 1;\n$L2:"
    assert (answers(parted) == np.where(lanes < 7, 1, 2)).all()
    stored = "shl.b32 %r3, %r1, 2;\nst.shared.u32 [%r3], %r1;\nbar.sync 0;\nsub.s32 %r4, 124, %r3;\n"
    assert (answers(stored + "ld.shared.u32 %r2, [%r4];") == lanes[::-1]).all()


@pytest.mark.parametrize(
    ("body", "said"),
    {
        "a register that no thread wrote": ("add.s32 %r2, %r7, 1;", "read before it was written"),
        "a register that some threads wrote": (
            "setp.lt.u32 %p1, %r1, 7;\n@%p1 mov.u32 %r7, 1;\nadd.s32 %r2, %r7, 1;",
            "read before it was written",
        ),
        "memory that nothing wrote": ("ld.global.u32 %r2, [%rd3];", "read before it was written"),
        "shared memory that nothing wrote": ("mov.u32 %r3, arena;\nld.shared.u32 %r2, [%r3];", "before it was written"),
        "beyond the end": ("add.s64 %rd3, %rd3, 4;\nmov.u32 %r2, 1;", "outside every allocation"),
        "misaligned": ("add.s64 %rd3, %rd3, 2;\nmov.u32 %r2, 1;", "misaligned"),
        "another rounding": ("mov.f32 %f1, 0f3F800000;\nadd.rz.f32 %f2, %f1, %f1;\nmov.b32 %r2, %f2;", "no such"),
        "the high half of a product of words of 64 bits": ("mul.hi.u64 %rd4, %rd2, %rd2;", "not run here"),
        "a comparison with a third": ("setp.lt.and.u32 %p1, %r1, 7, %p2;\nmov.u32 %r2, 1;", "no such|not run"),
        "a barrier for some": ("setp.lt.u32 %p1, %r1, 7;\n@%p1 bar.sync 0;\nmov.u32 %r2, 1;", "not run here"),
        "no end": ("$L1:\nadd.s32 %r1, %r1, 1;\nbra.uni $L1;\nmov.u32 %r2, 1;", "more than"),
        "a copy that nothing waits for": (
            "mov.u32 %r3, arena;\nmul.lo.s32 %r4, %r1, 4;\nadd.s32 %r3, %r3, %r4;\n"
            "cp.async.ca.shared.global [%r3], [%rd3], 4;\ncp.async.commit_group;\nmov.u32 %r2, 1;",
            "left in flight",
        ),
        "a copy read too early": (
            "mov.u32 %r3, arena;\nmul.lo.s32 %r4, %r1, 4;\nadd.s32 %r3, %r3, %r4;\n"
            "cp.async.ca.shared.global [%r3], [%rd3], 4;\ncp.async.commit_group;\nld.shared.u32 %r2, [%r3];",
            "before it was written",
        ),
    }.values(),
)
def test_faults(body: str, said: str) -> None:
    with pytest.raises(ptx.Fault, match=said):
        answers(body, np.arange(32) if "cp.async" in body else None)


ADDED = ["add.rn.bf16x2 %r2, %r3, %r4", "fma.rn.bf16x2 %r2, %r3, %r5, %r4", "add.rn.f16x2 %r2, %r3, %r4"]


@pytest.mark.parametrize("form", ADDED)
def test_pairs_are_added_as_fp32_sums_are_rounded(form: str) -> None:
    """Twice rounded is once rounded where the wider type has 2 p + 2 bits: words of all
    signs and exponents beside others within sixteen exponents."""
    brain = "bf16" in form
    chance = np.random.default_rng(int(SEED))
    body = f"ld.global.u32 %r3, [%rd3];\nmov.u32 %r5, {0x3F803F80};\nxor.b32 %r4, %r3, MASK;\n{form};"
    for _ in range(40):
        mask = int(chance.integers(0, 1 << 32)) & 0x8FFF8FFF  # within sixteen exponents, of either sign
        words = chance.integers(0, 1 << 32, 32).astype(np.uint32)
        got = answers(body.replace("MASK", str(mask)), words)
        for shift in (0, 16):
            halves = [(of >> np.uint32(shift)).astype(np.uint16) for of in (words, words ^ np.uint32(mask))]
            with np.errstate(all="ignore"):
                x, y = (ptx.bf16_to_float(h) if brain else h.view(np.float16).astype(np.float32) for h in halves)
                want = ptx.float_to_bf16(x + y) if brain else ptx.float_to_f16(x + y)
                there = ~np.isnan(x + y)
            assert ((got >> np.uint32(shift)).astype(np.uint16) == want)[there].all()


# Each of two blocks leaves its words, turned by its rank, and reads what the other has left.
EXCHANGED = """mov.u32 %r3, %cluster_ctarank;
mov.u32 %r4, %cluster_nctarank;
mad.lo.s32 %r5, %r3, 100, %r1;
shl.b32 %r6, %r1, 2;
st.shared.u32 [%r6], %r5;
{first}
sub.s32 %r7, 1, %r3;
mapa.shared::cluster.u32 %r8, %r6, %r7;
ld.shared::cluster.u32 %r2, [%r8];
{last}
shl.b32 %r6, %r3, 7;
cvt.u64.u32 %rd4, %r6;
add.s64 %rd3, %rd3, %rd4;"""
BOTH = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"


def exchanged(first: str = BOTH, last: str = BOTH, blocks: int = 2) -> Any:
    """What the blocks of a cluster leave in %r2, one behind the other."""
    body = EXCHANGED.format(first=first, last=last)
    (kernel,) = ptx.parse(HEAD + "".join(f"\t{line}\n" for line in body.splitlines()) + TAIL).values()
    memory = ptx.Memory(1 << 12, ptx.GLOBAL_BASE, "global")
    arguments = struct.pack("<Q", memory.reserve(128 * blocks))
    cluster = [ptx.Block(kernel, memory, arguments, 32, (0, rank), (1, blocks), 512) for rank in range(blocks)]
    ptx.run_together(cluster)
    return memory.get(struct.unpack("<Q", arguments)[0], np.uint32, 32 * blocks)


def test_blocks_of_a_cluster() -> None:
    lanes = np.arange(32)
    assert (exchanged() == [*(100 + lanes), *lanes]).all()
    half = "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra $L1;\n{body}\n$L1:"
    for first, last, blocks, said in (
        ("", BOTH, 2, "read before it was written"),
        (BOTH, "", 2, "which has ended"),
        (BOTH.split("\n")[1], BOTH, 2, "without an arrival"),
        (BOTH + "\n" + BOTH.split("\n")[0], BOTH, 2, "without a wait"),
        (BOTH, half.format(body=BOTH), 2, "a part of a warp"),
        (BOTH, "setp.eq.u32 %p1, %r3, 1;\n@%p1 bra $L1;\n" + BOTH + "\n$L1:", 2, "ended where others wait"),
        (BOTH, BOTH, 1, "block 1 of a cluster of 1"),
        (BOTH.replace("acquire", "relaxed"), BOTH, 2, "no such instruction"),
    ):
        with pytest.raises(ptx.Fault, match=said):
            exchanged(first, last, blocks)
