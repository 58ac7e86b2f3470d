"""Device code on the CPU: the twin of the device primitives, its own misuse suite, and the conformance file.

The programs in tests/kernels/host are compiled here, plainly and with AddressSanitizer and UBSan.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from host_build import FLAGS, compile_objects, compiled, run, twin_runtime
from stages import THOROUGH, drawn

# How many problems each of them prints that it has checked, and how many where it takes every shape (docs/kernels.md).
PROGRAMS = {
    "misuse": (None, None),
    "conformance": (None, None),
    "device_program": (42, 42),
    "adding": (None, None),
    "elementwise": (464, 464),
    "mixed": (180, 348),
    "unpack": (710, 710),
    "linear": (900, 7816),
    "linear_weight": (423, 1944),
    "rows": (1366, 9516),
    "conv2d": (375, 2733),
    "depthwise": (615, 7527),
}
# `make test` runs one of those that compile quickly. `make kernels` runs all with some shapes, half of them sanitized,
# others every day (every shape of one takes up to a quarter of an hour); `make sanitize` runs each with every shape.
(ONE,) = drawn("twin program", ["misuse", "conformance", "elementwise", "unpack"], 1)
PLAIN = drawn("plain twin programs", [*PROGRAMS], len(PROGRAMS) // 2)
CASES = [
    *([] if THOROUGH else [pytest.param(ONE, "plain", False)]),
    *(pytest.param(name, "plain", False, marks=pytest.mark.thorough) for name in PLAIN if THOROUGH),
    *(pytest.param(name, "sanitized", False, marks=pytest.mark.thorough) for name in PROGRAMS if name not in PLAIN),
    *(
        pytest.param(name, "sanitized", True, marks=pytest.mark.sanitize, id=f"{name}-sanitized-every-shape")
        for name, (some, every) in PROGRAMS.items()
        if some != every
    ),
]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "program, kind, every", [pytest.param(*c.values, marks=c.marks, id=c.id or "-".join(c.values[:2])) for c in CASES]
)
def test_program(program: str, kind: str, every: bool, tmp_path: Path, tmp_path_factory, record_property) -> None:
    record_property("drawn", f"twin program {program}, {kind}")
    objects = [*twin_runtime(tmp_path_factory, kind), *compile_objects(tmp_path, kind, [program])]
    compiled(*FLAGS[kind], *objects, "-o", tmp_path / program)
    output = run(tmp_path / program, *(["every"] if every else []), timeout=7000)
    assert re.search(r"\b0 failed", output), output[-4000:]
    problems = PROGRAMS[program][every]
    assert problems is None or f"\n{problems} problems" in output, output[-4000:]
