"""Device code on the CPU: the twin of the device primitives, its own misuse suite, and the conformance file.

The programs in tests/host are compiled here, once plainly and once with AddressSanitizer and UBSan.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "host"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
RUNTIME = ["fiber", "twin", "primitives"]
# How many problems each of them prints that it has checked, and how many with TAPS_THOROUGH (docs/kernels.md).
PROGRAMS = {
    "misuse": None,
    "conformance": None,
    "elementwise": (390, 390),
    "linear": (376, 5616),
    "linear_weight": (423, 1944),
}
FLAGS = {"plain": ["-O2"], "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]}


def compile_objects(folder: Path, kind: str, names: list[str]) -> list[Path]:
    assert COMPILER, "expected a C++ compiler (CXX, g++ or c++): building the package needs one too"
    options = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        f"-I{HERE}",
        f"-I{HERE.parents[2] / 'csrc'}",
        *FLAGS[kind],
    ]
    objects = [folder / f"{name}.o" for name in names]
    commands = [
        [COMPILER, *options, "-c", str(HERE / f"{n}.cpp"), "-o", str(o)] for n, o in zip(names, objects, strict=True)
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    return objects


@pytest.fixture(scope="module", params=FLAGS)
def twin(request, tmp_path_factory) -> tuple[str, Path, list[Path]]:
    """(kind, folder, object files) of the twin's runtime."""
    folder = tmp_path_factory.mktemp(f"twin_{request.param}")
    return request.param, folder, compile_objects(folder, request.param, RUNTIME)


@pytest.mark.timeout(7200 if "TAPS_THOROUGH" in os.environ else 900)
@pytest.mark.parametrize("program", PROGRAMS)
def test_host(program: str, twin) -> None:
    kind, folder, runtime = twin
    objects = [*runtime, *compile_objects(folder, kind, [program])]
    binary = folder / program
    link = subprocess.run(
        [COMPILER, *FLAGS[kind], *map(str, objects), "-o", str(binary)], capture_output=True, text=True, timeout=300
    )
    assert link.returncode == 0, link.stderr[-4000:]
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=7000)
    assert done.returncode == 0 and " 0 failed" in done.stdout, (done.stdout + done.stderr)[-4000:]
    problems = PROGRAMS[program]
    assert problems is None or f"{problems['TAPS_THOROUGH' in os.environ]} problems" in done.stdout, done.stdout
