"""Mistakes planted in the kernels, one at a time: each is found on the CPU, most with the line that shows it.

A small program is compiled with AddressSanitizer, once, with all of them in it, and run with each.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from host_build import CSRC, HOST, SANITIZERS, compiled, twin_runtime
from mistakes import CHOICE, MISTAKES, NUMBER, all_planted, first, planted
from stages import drawn, made_once

# The program takes a minute. `make kernels` plants some of them, `make sanitize` all.
SAMPLE = drawn("planted mistakes", [*MISTAKES], 60)


def build(folder: Path, headers: dict[str, str], runtime: list[Path]) -> None:
    """The program against these headers, and those of the kernels' that are not among them."""
    (folder / "cuda").mkdir()
    for name, text in headers.items():
        (folder / "cuda" / name).write_text(text, encoding="utf-8")
    (folder / "choice.h").write_text(CHOICE, encoding="utf-8")
    options = ["-std=c++17", f"-I{folder}", f"-I{HOST}", f"-I{CSRC}", "-include", folder / "choice.h", "-O0"]
    compiled(*options, *SANITIZERS, *runtime, HOST / "planted.cpp", "-o", folder / "planted")


@pytest.fixture
def said(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """What the program says with a mistake, or with none."""
    runtime = twin_runtime(tmp_path_factory, "sanitized")

    def said(name: str | None) -> tuple[int, str]:
        if name is not None and MISTAKES[name].constant:
            folder = tmp_path
            build(folder, planted(name), runtime)
        else:
            folder = made_once(tmp_path_factory, "planted", lambda part: build(part, all_planted(), runtime))
        done = subprocess.run(
            [str(folder / "planted")],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "TAPS_PLANTED": str(NUMBER.get(name, 0)), "TAPS_FIRST": first(name)},
        )
        return done.returncode, done.stdout + done.stderr

    return said


@pytest.mark.thorough
def test_nothing_planted(said) -> None:
    code, text = said(None)
    assert code == 0 and " 0 failed" in text, text[-3000:]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.thorough if name in SAMPLE else pytest.mark.sanitize) for name in MISTAKES],
)
def test_planted(name: str, said, record_property) -> None:
    record_property("drawn", f"planted: {name}")
    mistake = MISTAKES[name]
    code, text = said(name)
    assert code != 0 and re.search(mistake.said, text), text[-3000:]
    if mistake.shows:
        sources = planted(name)
        named = [sources[file].splitlines()[int(number) - 1] for file, number in re.findall(mistake.said, text)]
        assert any(piece in line for line in named for piece in mistake.shows), (named, text[-2000:])
