"""A static proof that no two threads of a kernel race, from the PTX that nvcc emits, by SentryWard (package index).

The verifier follows every thread of every block through one launch whose sizes it is given. Of each pair of accesses
to shared or global memory, one of them a write, it shows that barriers or the waits of cp.async order them, however
the threads are scheduled. What a launch names as an object overlaps no other object. Fences are not modelled, a gate
must be one that the host knows, and nothing is said of other sizes.

It reads our text with two changes, which leave every access, barrier and copy as it is:

- An address is an object's name to it, so that it cannot answer what the kernels ask of an address's bits (is it null,
  is it a multiple of 16?). So the arguments are there twice, with names and with numbers, and `or`, `and` and `setp`
  ask the numbers. What is added to an address, and what is read and written, stays the object's.
- It does not follow `bfi`, by which addresses in shared memory are put together, but it does shl, and, or.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ptx
import pytest

needs_verifier = pytest.mark.skipif(
    importlib.util.find_spec("sentryward") is None, reason="SentryWard was not found: pip install sentryward==0.1.1"
)
RACE_FREE, RACE = "race_free", "potential_race"
FORMS = {"u8": "B", "s8": "b", "u16": "H", "u32": "I", "s32": "i", "u64": "Q", "s64": "q", "f32": "f", "f64": "d"}


@dataclass(frozen=True)
class Launch:
    """A kernel's name, its arguments' bytes, and the places of the addresses among them: byte -> object."""

    kernel: str
    arguments: bytes
    pointers: Mapping[int, str]
    blocks: tuple[int, int]
    threads: int = 256
    shared: int = 0


@dataclass(frozen=True)
class Verdict:
    """A result of the verifier's list, which checks passed, why not more, and branches that it took without knowing."""

    result: str
    checks: Mapping[str, str]
    reasons: Sequence[str]
    guessed: Sequence[int]  # lines

    @property
    def race_free(self) -> bool:
        return self.result == RACE_FREE and self.checks["synchronization"] == self.checks["memory"] == "passed"

    @property
    def race(self) -> bool:
        """Found: all was followed to its end, and two accesses have no order."""
        return self.result == RACE and self.checks["memory"] == "failed"


def entry_of(text: str, kernel: str) -> str:
    """The file with one of its kernels alone."""
    first, at = text.index(".entry "), text.index(f".entry {kernel}(")
    return text[:first] + text[at : text.index("\n}\n", at) + 3]


def verdict(entry: str, launch: Launch, folder: Path, *, guess: bool = False, seconds: int = 400) -> Verdict:
    """Of one kernel and launch. With `guess` a branch that depends on data, and so is unknown, is not taken: what it
    skips is looked at, and has to be free of writes and barriers."""
    question = _question(entry, launch)
    text = _readable(entry)
    (folder / "kernel.ptx").write_text(text, encoding="utf-8")
    (folder / "launch.json").write_text(json.dumps({**question, "assumptions": {"representative_branches": guess}}))
    limits = ["--timeout", str(seconds), "--memory-limit-mib", "8192"]
    command = [sys.executable, "-m", "sentryward", "kernel.ptx", "--input", "launch.json", *limits]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds + 60)
    assert done.stdout, done.stderr[-2000:]
    said = json.loads(done.stdout)
    reasons = [f"{one.get('code')}: {one.get('message')}" for one in said.get("diagnostics", [])]
    assumed = said.get("frontend", {}).get("frontend_assumptions", {}).get("data_branch_decisions", [])
    guessed = [one["line"] for one in assumed]
    for line in guessed:
        _look_at_skipped(text.splitlines(), line)
    return Verdict(said["result"], said["checks"], reasons, guessed)


def _look_at_skipped(lines: Sequence[str], line: int) -> None:
    """What a branch in this line, counted from 1, skips goes straight to where it leads, without writes or barriers."""
    branch = re.search(r"bra\s+(\$\w+);", lines[line - 1])
    assert branch is not None, lines[line - 1]
    for one in lines[line:]:
        if end := re.match(r"\s*(?:bra\.uni\s+)?(\$\w+)[:;]", one):
            assert end[1] == branch[1], (lines[line - 1], one)
            return
        assert re.match(r"\s*($|//|(ld|mov|add|cvta?|shl|and|or|shr|setp)\.)", one), one


# --- what the verifier reads -------------------------------------------------------------------------------------


def _question(entry: str, launch: Launch) -> dict[str, Any]:
    """A launch's sizes, its arguments word by word, which of them are objects, and behind each struct its copy."""
    (kernel,) = ptx.parse(entry).values()
    arguments: list[dict[str, Any]] = []
    declarations: list[dict[str, Any]] = []

    def tell(parameter: str, at: int, place: int, kind: str) -> int:
        (value,) = struct.unpack_from("<" + FORMS[kind], launch.arguments, place)
        where = {"parameter": parameter, "offset": at}
        if value and place in launch.pointers:
            declarations.append({**where, "type": "pointer", "object": launch.pointers[place]})
        else:
            arguments.append({**where, "type": kind, "value": value})
        return value

    sizes = _structs(entry)
    for kind, parameter in re.findall(r"\.param \.(\w+) (\w+)\s*[,)]", entry):
        tell(parameter, 0, kernel.parameters[parameter], kind)
    for parameter, size in sizes.items():
        for at in range(0, size, 8):
            value = tell(parameter, at, kernel.parameters[parameter] + at, "u64")
            arguments.append({"parameter": parameter, "offset": at + size, "type": "u64", "value": value})
    return {
        "schema": "spverify.kernel-input/v1",
        "launch": {
            "grid_dim": [*launch.blocks, 1],
            "block_dim": [launch.threads, 1, 1],
            "dynamic_shared_bytes": launch.shared,
        },
        "arguments": arguments,
        "declarations": declarations,
    }


def _structs(entry: str) -> dict[str, int]:
    """Parameters that are structs, and their sizes: whole words of eight bytes."""
    return {name: int(size) for name, size in re.findall(r"\.param \.align 8 \.b8 (\w+)\[(\d+)\]", entry)}


def _readable(entry: str) -> str:
    """The text with the two changes."""
    inserted, count = re.subn(r"bfi\.b32\s+(%r\d+), (%r\d+), (%r\d+), (\d+), (\d+);", _insert, entry)
    structs = _structs(entry)
    assert len(structs) <= 1
    for name, size in structs.items():
        inserted = _asking(inserted, name, size)
    assert _ACCESS.findall(inserted) == _ACCESS.findall(entry)
    return inserted.replace("\n{\n", "\n{\n\t.reg .b32 %insert<2>;\n", 1) if count else inserted


def _insert(found: re.Match[str]) -> str:
    """bfi of constant place and width: the low bits of one register in the place of another's."""
    to, low, rest, place, width = found[1], found[2], found[3], int(found[4]), int(found[5])
    mask = ((1 << width) - 1) << place
    return (
        f"shl.b32 %insert0, {low}, {place};\n\tand.b32 %insert0, %insert0, {mask};\n"
        f"\tand.b32 %insert1, {rest}, {~mask & 0xFFFFFFFF};\n\tor.b32 {to}, %insert0, %insert1;"
    )


def _asking(entry: str, struct: str, size: int) -> str:
    """What asks for bits of a struct's words asks its copy, `size` bytes behind it, of which no part is an object.

    A register %rd1 that was loaded from the struct, or is the sum of such a one and something, has a twin %ask1 that
    was loaded from the copy, if something asks for its bits. A single byte of the struct is always the copy's.
    """
    lines = entry.splitlines()
    written = [found[1] if (found := _WRITTEN.match(line)) else "" for line in lines]
    times = Counter(written)
    at = {register: index for index, register in enumerate(written) if times[register] == 1}
    twins: dict[str, bool] = {}

    def from_struct(register: str) -> bool:
        if register not in twins:
            twins[register] = False  # until it is known
            line = lines[at[register]] if register in at else ""
            if load := _LOAD.match(line):
                twins[register] = load["kind"] == "u64" and load["base"] in (struct, *at)
            elif total := _SUM.match(line):
                twins[register] = any([from_struct(one) for one in total.groups() if one.startswith("%")])
        return twins[register]

    def copied(load: re.Match[str], register: str) -> str:
        return f"\tld.param.{load['kind']} \t{register}, [{load['base']}+{int(load['at'] or 0) + size}];"

    def asking(operands: str) -> str:
        return re.sub(r"%rd(\d+)", lambda one: f"%ask{one[1]}" if from_struct(one[0]) else one[0], operands)

    asked = [index for index, line in enumerate(lines) if re.match(r"\s*(or|and|setp)\.", line)]
    for index in asked:
        to, operands = lines[index].split(",", 1)
        lines[index] = f"{to},{asking(operands)}"
    most = max((int(register[3:]) for register, has in twins.items() if has), default=0)
    for index, line in enumerate(lines):
        load = _LOAD.match(line)
        if load and load["kind"] == "u8" and load["base"] in (struct, *at):
            lines[index] = copied(load, load["register"])
        elif (register := written[index]) and twins.get(register):
            twin = register.replace("%rd", "%ask")
            if load:
                lines[index] += "\n" + copied(load, twin)
            elif index not in asked:
                name, operands = line.split(register + ",", 1)
                lines[index] += f"\n{name}{twin},{asking(operands)}"
    text = "\n".join(lines) + "\n"
    text = text.replace("\n{\n", f"\n{{\n\t.reg .b64 %ask<{most + 1}>;\n", 1)
    return text.replace(f"{struct}[{size}]", f"{struct}[{2 * size}]", 1)


_ACCESS = re.compile(r"\b(?:(?:ld|st)\.(?:global|shared)|bar|cp|ldmatrix)\b[^\n]*")
_WRITTEN = re.compile(r"\s*(?:@!?%p\d+ )?[a-z][\w.:]*\s+(%rd\d+),")
_LOAD = re.compile(r"\s*ld\.param\.(?P<kind>u64|u8)\s+(?P<register>%\w+), \[(?P<base>%?\w+?)(?:\+(?P<at>-?\d+))?\];")
_SUM = re.compile(r"\s*add\.s64\s+%rd\d+, (%rd\d+), (%rd\d+|-?\d+);")
