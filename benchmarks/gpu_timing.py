"""Timing on a GPU: calls over rotating operands, so that nothing is in L2, replayed as one CUDA graph."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from taps_ext import ops
from taps_ext.extension import has_kernels

COLD_BYTES = 3 * 2**26  # operands of all calls together: three times the L2 of an H200


def median_us(call: Callable[[int], Any], calls: int, repeat: int = 15) -> float:
    """Median microseconds of `call(i)`, i = 0, 1, ..., calls - 1, in a graph that holds them all.

    Python and launches are outside: a replay before the timed one keeps the device busy while the host launches.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(calls, 3)):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def sets_for(nbytes: int) -> int:
    """How many sets of operands keep the cache cold, where a call reads at least `nbytes` of its set."""
    return min(64, max(4, -(-COLD_BYTES // max(nbytes, 1))))


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a 2 GiB copy."""
    a = torch.randn(2**29, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / (median_us(lambda i: b.copy_(a), 1) / 1e6)


def matmul_rate() -> float:
    """Operations a second of a bf16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / (median_us(lambda i: torch.mm(a, b, out=out), 2) / 1e6)


def check(parser: argparse.ArgumentParser, json: Path, device: str = "cuda") -> None:
    """End in a usage error, before anything is measured, where the result cannot be written or the device not used."""
    if not json.parent.is_dir():
        parser.error(f"--json: expected a file in a folder that is there, got {json}")
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    built = {} if ops._C is None else ops._C.build_info()["cuda"] or {}
    capability = torch.cuda.get_device_capability()
    if not has_kernels(built.get("architectures", ""), capability):
        parser.error("the extension has no kernels for compute capability {}.{}".format(*capability))
