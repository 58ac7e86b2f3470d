"""PTX, the text that nvcc emits for a GPU's own compiler, run on the CPU: one block at a time, its threads as lanes of
numpy arrays; the blocks of a cluster in turns, from one barrier of all to the next.

The twin runs the kernels' C++; this runs what became of it, inline assembly and operand order included. Every access
is checked for alignment and against the allocations' exact bounds. Faults are a register or a byte of shared memory
that is read before it was written, a copy that is read before its group was waited for, and one that is left in flight;
shared memory of a block that has ended.
Threads that part ways run one group at a time, those that are furthest behind first, until they meet. What two threads
do in one instruction has no order here, so that this finds no races: the twin does.

Written after NVIDIA's "Parallel Thread Execution ISA". Only what our kernels use is there: all else is a fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from ptx_instructions import bf16_to_float, compiled, float_to_bf16, float_to_f16
from ptx_machine import GLOBAL_BASE, TYPES, Block, Fault, Kernel, Memory, run_together

__all__ = [
    "GLOBAL_BASE",
    "Block",
    "Fault",
    "Kernel",
    "Memory",
    "bf16_to_float",
    "float_to_bf16",
    "float_to_f16",
    "parse",
    "run_together",
]

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{\n(.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?")
_RANGE = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>")
_NAMED = re.compile(r"\.reg\s+\.(\w+)\s+([\w%, ]+)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a file, by their (mangled) names."""
    text = re.sub(r"//[^\n]*", "", text)
    shared = re.search(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", text)
    found = {}
    for name, parameters, _, body in _ENTRY.findall(text):
        kernel = Kernel(name, shared=shared[1] if shared else "")
        for align, kind, parameter, count in _PARAMETER.findall(parameters):
            size = np.dtype(TYPES[kind]).itemsize
            step = int(align or size)
            at = (kernel.bytes_of_parameters + step - 1) // step * step
            kernel.parameters[parameter] = at
            kernel.bytes_of_parameters = at + size * int(count or 1)
        for statement in _statements(body):
            _read(kernel, statement)
        kernel.run = [compiled(kernel.name, *one) for one in kernel.code]
        found[name] = kernel
    return found


def _statements(body: str) -> Iterator[str]:
    """Statements without the braces that only limit names; labels end in a colon."""
    for line in body.splitlines():
        rest = line.strip()
        if label := re.match(r"(\$\w+):", rest):
            yield label[0]
            continue
        rest = re.sub(r"^\{\s*(?=[.a-z]|$)", "", rest)  # a scope begins; a vector has a register behind its brace
        rest = re.sub(r";\s*\}$", ";", rest)
        for one in rest.split(";"):
            if one.strip() not in ("", "}"):
                yield one.strip()


def _read(kernel: Kernel, statement: str) -> None:
    if statement.endswith(":"):
        kernel.labels[statement[:-1]] = len(kernel.code)
    elif match := _RANGE.match(statement):
        for index in range(int(match[3])):
            kernel.registers[f"{match[2]}{index}"] = TYPES[match[1]]
    elif match := _NAMED.match(statement):
        for name in match[2].split(","):
            kernel.registers[name.strip()] = TYPES[match[1]]
    elif not statement.startswith("."):
        match = re.match(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", statement, re.DOTALL)
        assert match is not None
        kernel.code.append((match[1] or "", match[2], _OPERAND.findall(match[3].replace("|", ", "))))
