"""The choice of path: the same decisions as ever on a grid of problems, and a page that says what decides."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused import instructions

from taps_ext.ops import _C

if _C is None:
    pytest.skip("the extension is missing, and with it the choice", allow_module_level=True)

GOLDEN = Path(__file__).parent / "golden" / "choices.json"
# What torch's product and the kernels can be to each other.
USUAL: dict[str, Any] = {"stock": "usual", "narrow": False, "wide": False, "pairs": False}
KINDS: dict[str, dict[str, Any]] = {
    "fp32, eight lanes": USUAL,
    "fp32, sixteen lanes": {**USUAL, "wide": True},
    "fp32, sixteen lanes, torch at half the rate": {**USUAL, "wide": True, "stock": "halved"},
    "bf16 in pairs": {**USUAL, "wide": True, "pairs": True, "narrow": True},
    "bf16, emulated by torch, eight lanes": {**USUAL, "narrow": True, "stock": "emulated"},
    "bf16, emulated by torch, sixteen lanes": {**USUAL, "narrow": True, "stock": "emulated", "wide": True},
    "16 bits, unmatched": {**USUAL, "narrow": True},
    "16 bits, unmatched, sixteen lanes": {**USUAL, "narrow": True, "wide": True},
    "bf16 on a matrix unit": {**USUAL, "narrow": True, "stock": "matrix unit", "wide": True, "pairs": True},
    "16 bits on a matrix unit, no pairs": {**USUAL, "narrow": True, "stock": "matrix unit", "wide": True},
    "CUDA": {**USUAL, "narrow": True, "cuda": True},
}
ROWS = [
    0,
    1,
    2,
    3,
    4,
    5,
    16,
    31,
    32,
    33,
    63,
    64,
    65,
    128,
    129,
    255,
    256,
    257,
    399,
    400,
    401,
    511,
    512,
    513,
    1576,
    10**6,
]
OUTPUTS = [0, 1, 15, 16, 17, 64, 512, 1024, 4096]
INPUTS = [0, 1, 2, 127, 128, 129, 255, 256, 257, 383, 384, 385, 1023, 1024, 1025, 2047, 2048, 2049, 1 << 20]
PLACES = [0, 1, 9]


def problems(kind: str) -> Iterator[dict[str, Any]]:
    for rows, outputs, inputs, places in itertools.product(ROWS, OUTPUTS, INPUTS, PLACES):
        yield {**KINDS[kind], "rows": rows, "outputs": outputs, "inputs": inputs, "places": places}


def decisions(choose: Callable[..., str], kind: str) -> bytes:
    """One bit a problem: whether it is fused."""
    fused = [choose(open=True, fusable=True, **problem) == "fused" for problem in problems(kind)]
    return bytes(sum(bit << place for place, bit in enumerate(fused[at : at + 8])) for at in range(0, len(fused), 8))


@pytest.mark.parametrize("kind", KINDS)
def test_the_decisions_are_the_same_as_before(kind) -> None:
    """The file was written by the function that the rules replaced, on CUDA with 64 rows in place of 128.

    Large layers of 65 to 128 rows on CUDA are by the rule of wide tiles, convolutions by that of shallow ones, and a
    matrix unit fuses up to 15 rows instead of 32.
    """
    want = zlib.decompress(base64.b64decode(json.loads(GOLDEN.read_text(encoding="utf-8"))[kind]))
    if decisions(_C.choose, kind) != want:
        for index, problem in enumerate(problems(kind)):
            was = bool(want[index // 8] >> index % 8 & 1)
            assert (_C.choose(open=True, fusable=True, **problem) == "fused") is was, problem


def test_depthwise_convolutions_have_rules_of_their_own() -> None:
    facts: dict[str, Any] = {"open": True, "cuda": True, "fusable": True, "narrow": True, "outputs": 960}
    for places, rows, path in ((9, 10**8, "fused"), (25, 2048, "fused"), (49, 2049, "rebuild"), (81, 1, "rebuild")):
        assert _C.choose(**facts, inputs=places, places=places, rows=rows, depthwise=True) == path
    on_cpu = {**facts, "cuda": False}
    assert _C.choose(**on_cpu, inputs=9, places=9, rows=49, depthwise=True) == "rebuild"


def test_the_page_is_up_to_date() -> None:
    """docs/choose.md: `python tools/choose_table.py` writes it."""
    path = Path(__file__).parents[2] / "tools" / "choose_table.py"
    spec = importlib.util.spec_from_file_location("choose_table", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rules = _C.choose_rules()
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(rules)
    with pytest.raises(ValueError, match="evidence: expected"):
        tool.page([{**rules[0], "key": "a rumour"}])


def test_nothing_about_a_gpu_is_measured_yet() -> None:
    """And what is predicted says so, to the benchmark too."""
    rules = _C.choose_rules()
    assert all(rule["predicted"] for rule in rules if rule["cuda"])
    assert not all(rule["predicted"] for rule in rules)
    x, weight = torch.randn(2, 384), torch.randn(1024, 384)
    with torch.no_grad():
        torch.ops.taps_ext.gated_linear(x, weight, weight, None, None, True, 0.1)
        assert _C.taken_by_prediction() is False
        if "avx512bf16" in _C.isas():  # held off from it, the kernels have no instructions for what torch multiplies
            with instructions("avx512"):
                torch.ops.taps_ext.gated_linear(*[t.bfloat16() for t in (x, weight, weight)], None, None, True, 0.1)
            assert _C.taken_by_prediction() is True
