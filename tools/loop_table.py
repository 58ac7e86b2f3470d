"""Instructions that a warp issues in one step of each product's main loop, from the machine code that ptxas made.

    python tools/loop_table.py build/linear.cubin          # of one or more cubins; needs nvdisasm

A step is one stage of the ring (csrc/cuda/tile.cuh). Counted is the way of nearly all of them: every mma of the loop,
the fetches of a whole stage in pieces of 16 bytes by a warp that fetches of every operand, and of all such ways through
the loop the shortest. Where gates are open and where they are closed there is a loop each; the longer one is the open
one.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FUNCTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_TARGET = re.compile(r"\((\.L_\w+)\)")


@dataclass
class Block:
    """Instructions without a branch among them; `next` are the blocks that may follow."""

    mnemonics: list[str]
    next: list[int]

    def count(self, mnemonic: str, modifier: str = "") -> int:
        return sum(name.split(".")[0] == mnemonic and modifier in name for name in self.mnemonics)


@dataclass(frozen=True)
class Loop:
    """One main loop: instructions a step, and those of them that are mma and copies."""

    function: str
    instructions: int
    mma: int
    copies: int


def disassembled(cubin: Path, nvdisasm: str) -> str:
    """The text of a cubin."""
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return done.stdout


def functions(text: str) -> dict[str, list[Block]]:
    """Function -> its blocks, in the order of the text."""
    found: dict[str, list[Block]] = {}
    lines: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            name = match[1]
        elif name:
            lines.setdefault(name, []).append(line)
    for name, own in lines.items():
        found[name] = _blocks(own)
    return found


def _blocks(lines: list[str]) -> list[Block]:
    blocks, targets, at = [Block([], [])], [[]], {}  # type: ignore[var-annotated]
    falls = [True]

    def begin() -> None:
        blocks.append(Block([], []))
        targets.append([])
        falls.append(True)

    for line in lines:
        if match := _LABEL.match(line):
            if blocks[-1].mnemonics:
                begin()
            at[match[1]] = len(blocks) - 1
        elif match := _INSTRUCTION.match(line):
            guard, mnemonic, rest = match.groups()
            blocks[-1].mnemonics.append(mnemonic)
            if mnemonic.split(".")[0] in ("BRA", "EXIT", "RET"):
                targets[-1] += _TARGET.findall(rest)
                falls[-1] = guard is not None or bool(re.search(r"U?P\w+,", rest))
                begin()
    for index, block in enumerate(blocks):
        block.next = [at[label] for label in targets[index] if label in at]
        if falls[index] and index + 1 < len(blocks):
            block.next.append(index + 1)
    return blocks


def loops(function: str, blocks: list[Block]) -> list[Loop]:
    """The loops of a function that multiply, innermost ones alone, longest first."""
    found = []
    for end, block in enumerate(blocks):
        for head in block.next:
            if head <= end and (body := _body(blocks, head, end)) and any(blocks[i].count("HMMA") for i in body):
                found.append((head, end, body))
    inner = [one for one in found if not any(other[2] < one[2] for other in found)]
    ways = [way for head, end, body in inner if (way := _way(function, blocks, head, end, body)) is not None]
    return sorted(ways, key=lambda loop: -loop.instructions)


def streams(function: str, blocks: list[Block]) -> list[Loop]:
    """The loops of one block that load pieces of 16 bytes and multiply without tensor cores, longest first.

    Here `mma` are fma, and `copies` the loads of what is read once.
    """
    ways = [
        Loop(function, len(block.mnemonics), block.count("FFMA"), block.count("LDG", ".EF.128"))
        for index, block in enumerate(blocks)
        if index in block.next and block.count("FFMA") and block.count("LDG", ".EF.128")
    ]
    return sorted(ways, key=lambda loop: -loop.instructions)


def _body(blocks: list[Block], head: int, end: int) -> frozenset[int]:
    """The blocks of the natural loop of a branch back from `end` to `head`; none where it is not one."""
    before: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        for after in block.next:
            before.setdefault(after, []).append(index)
    body, waiting = {head, end}, [end]
    while waiting:
        index = waiting.pop()
        if index == head:
            continue
        for one in before.get(index, []):
            if one not in body:
                body.add(one)
                waiting.append(one)
    return frozenset(body) if min(body) >= 0 and 0 not in body else frozenset()


def _way(function: str, blocks: list[Block], head: int, end: int, body: frozenset[int]) -> Loop | None:
    """The shortest way round with all of the loop's mma and with copies of whole stages."""
    sys.setrecursionlimit(10000)

    @cache
    def ways(index: int) -> frozenset[tuple[int, int, int]]:
        """Instructions, mma and copies to the end; ways with copies of other pieces are none of them."""
        block = blocks[index]
        own = len(block.mnemonics), block.count("HMMA"), block.count("LDGSTS")
        if own[2] > block.count("LDGSTS", ".128"):
            return frozenset()
        if index == end:
            return frozenset([own])
        found = {
            (own[0] + a, own[1] + b, own[2] + c)
            for after in block.next
            if after in body and after != head and after > index
            for a, b, c in ways(after)
        }
        best: dict[tuple[int, int], int] = {}
        for length, mma, copies in found:
            best[mma, copies] = min(length, best.get((mma, copies), length))
        return frozenset((length, *key) for key, length in best.items())

    if not (found := ways(head)):
        return None
    mma, copies = max((mma, copies) for _, mma, copies in found)
    if copies == 0:
        return None
    return Loop(function, *min(one for one in found if one[1:] == (mma, copies)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cubins", type=Path, nargs="+")
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"))
    args = parser.parse_args()
    if args.nvdisasm is None:
        parser.error("nvdisasm: expected it on the path or by --nvdisasm: pip install nvidia-cuda-nvdisasm")
    for cubin in args.cubins:
        for name, blocks in functions(disassembled(cubin, args.nvdisasm)).items():
            for loop in (*loops(name, blocks), *streams(name, blocks)):
                print(loop)


if __name__ == "__main__":
    main()
