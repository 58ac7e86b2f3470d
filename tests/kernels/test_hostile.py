"""Hostile calls of every operator end by a result or an exception: no signal, no call without end.

They run in forked children, many in one. Where a child dies, or a call takes longer than it may, the call is run alone,
and if it ends then, behind as few of its forerunners as it takes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import select
import signal
import time
import traceback
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hostile import Call, guarded
from stages import SEED, THOROUGH

from taps_ext import ops

if ops._C is None:
    pytest.skip("the extension is missing, and with it the operators", allow_module_level=True)

COUNT = 800 if THOROUGH else 150
FIRST = zlib.crc32(SEED.encode()) * 10_000  # other calls every day; what fails is named by its own number
TOGETHER = 50
SECONDS = 20.0  # of one call, on a machine that does much else
MEMORY = 4 << 30  # more than that no call may take


def child(seeds: Sequence[int], report: int) -> None:
    """Tells each call before it is made, and what came of it."""
    torch.set_num_threads(1)
    faulthandler.disable()  # pytest's: a test shows on purpose that a signal is seen
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what torch says of errors
    for seed in seeds:
        os.write(report, f"{seed}\n".encode())
        call = Call(seed).make()
        os.write(report, f"{str(call)[:2000]}\n".encode())
        os.write(report, b"result\n" if call.run() else b"error\n")


def run(seeds: Sequence[int]) -> tuple[int, str | None, list[str]]:
    """(calls that gave a result, what went wrong, what was told)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(seeds, writer)
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-2000:].encode())
        finally:
            os._exit(code)
    os.close(writer)
    told, wrong, last = b"", None, time.monotonic()
    while True:
        ready, _, _ = select.select([reader], [], [], 1.0)
        if ready:
            piece = os.read(reader, 1 << 16)
            if not piece:
                break
            told, last = told + piece, time.monotonic()
        elif time.monotonic() - last > SECONDS:
            wrong = f"took longer than {SECONDS:.0f} s"
            os.kill(pid, signal.SIGKILL)
            break
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if wrong is None and code != 0:
        wrong = f"died of {signal.Signals(-code).name}" if code < 0 else "could not be made"
    lines = told.decode().splitlines()
    return lines.count("result"), wrong, lines


def blame(seeds: Sequence[int], wrong: str, lines: list[str]) -> str:
    """The call that is to blame, alone or with the ones before it that it needs."""
    guilty = [int(line) for line in lines if line.isdigit()][-1]
    tellings = [line for line in lines if line.startswith(f"seed {guilty}:")]
    before = [seed for seed in seeds if seed < guilty]
    needed: Sequence[int] = []
    if run([guilty])[1] is None:
        least, most = 0, len(before)  # of the last ones before it
        while least < most:
            middle = (least + most) // 2
            if run([*before[len(before) - middle :], guilty])[1] is None:
                least = middle + 1
            else:
                most = middle
        needed = before[len(before) - least :]
    telling = tellings[0] if tellings else f"seed {guilty}: {lines[-5:]}"
    return f"{wrong}, after {list(needed)}: {telling}"


def test_what_ends_the_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it takes another call before it; and a tensor's end is the end of what may be read."""
    begun: list[int] = []

    def act(call: Call) -> bool:
        begun.append(call.seed)
        if call.seed == 2 or {4, 7} <= set(begun):
            tensor = guarded([3], torch.float32)
            ctypes.string_at(tensor.data_ptr() + tensor.nbytes - 1, 1)
            ctypes.string_at(tensor.data_ptr() + tensor.nbytes, 1)
        return True

    monkeypatch.setattr(Call, "run", act)
    gave, wrong, lines = run(range(5))
    assert gave == 2 and wrong == "died of SIGSEGV"
    assert blame(range(5), wrong, lines).startswith("died of SIGSEGV, after []: seed 2: ")
    gave, wrong, lines = run(range(3, 9))
    assert gave == 4 and wrong is not None
    assert blame(range(3, 9), wrong, lines).startswith("died of SIGSEGV, after [4, 5, 6]: seed 7: ")


@pytest.mark.timeout(3600)
def test_no_call_ends_the_process() -> None:
    results, found = 0, []
    for start in range(FIRST, FIRST + COUNT, TOGETHER):
        seeds: Sequence[int] = range(start, min(start + TOGETHER, FIRST + COUNT))
        while seeds:
            gave, wrong, lines = run(seeds)
            results += gave
            if wrong is None:
                break
            found.append(blame(seeds, wrong, lines))
            guilty = [int(line) for line in lines if line.isdigit()][-1]
            seeds = [seed for seed in seeds if seed > guilty]
            assert len(found) < 10, "\n".join(found)
    assert not found, "\n".join(found)
    assert COUNT // 5 < results < COUNT  # neither is everything refused, nor nothing
