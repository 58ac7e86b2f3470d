"""Packed Deltas on one core: packing and unpacking beside memcpy, and linear layers of few rows beside dense Deltas.

    python benchmarks/packed.py [--json FILE]

One run, one thread, the median of several turns in which everything is timed once. Memory is warm (its pages are there)
and cold to the caches. `memcpy` copies the fp32 Delta, which is what packing reads and unpacking writes. Below it: a
linear layer 4096 x 4096 in fp32, its Delta packed, dense in fp32 (as it is trained), dense in bf16, and merged into W.
Last, for the threshold in taps_ext/ops/unpack.py: layers of several sizes without W_t, over W_t and torch's product
behind it, both warm.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import milliseconds, write

import taps_ext
from taps_ext.ops.encode import encoded
from taps_ext.ops.unpack import ORDER, packed_linear, packed_weight

CODECS: dict[str, tuple[str, float | None]] = {
    "int8": ("int8", None),
    "int4": ("int4", None),
    "sign": ("sign", None),
    "bitmask:0.1": ("bitmask", 0.1),
    "bitmask": ("bitmask", None),  # of a Delta a tenth of which is not zero
}
ROWS = (1, 2, 4, 8, 16)
SIDE = 4096


def medians(calls: Mapping[str, Callable[[], object]], turns: int, cold: int = 128 << 20) -> dict[str, float]:
    """Milliseconds of each call; of one turn more the first warms up."""
    found = milliseconds(calls, turns + 1, cold=cold)
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def throughput(turns: int) -> list[dict[str, Any]]:
    """Rows of: codec, bytes a weight, pack and unpack as multiples of memcpy's rate."""
    delta = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 1e-3
    sparse = torch.where(torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(1)) < 0.1, delta, 0.0)
    weight, out = torch.randn(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    sources = {name: sparse if name == "bitmask" else delta for name in CODECS}
    made = {name: encoded(kind, sources[name], share) for name, (kind, share) in CODECS.items()}

    def unpack(name: str, of: Tensor) -> None:
        kind = CODECS[name][0]
        first, second = (made[name][part] for part in ORDER[kind])
        torch.ops.taps_ext.unpack(out, of, first, second, kind, None, True, 0.1)

    nothing = torch.full((SIDE, SIDE), -0.0)
    calls: dict[str, Callable[[], object]] = {"memcpy": lambda: out.copy_(delta)}
    for name, (kind, share) in CODECS.items():
        calls[f"pack {name}"] = lambda n=name, k=kind, s=share: encoded(k, sources[n], s)
        calls[f"unpack {name}"] = lambda n=name: unpack(n, weight)
        calls[f"delta {name}"] = lambda n=name: unpack(n, nothing)
    ms = medians(calls, turns)
    return [
        {
            "codec": name,
            "bytes_a_weight": sum(t.nbytes for t in made[name].values()) / delta.numel(),
            "pack_over_memcpy": ms["memcpy"] / ms[f"pack {name}"],
            "unpack_over_memcpy": ms["memcpy"] / ms[f"unpack {name}"],
            "pack_gb_s": delta.nbytes / 1e6 / ms[f"pack {name}"],
            "unpack_gb_s": delta.nbytes / 1e6 / ms[f"unpack {name}"],
            "memcpy_gb_s": delta.nbytes / 1e6 / ms["memcpy"],
        }
        for name in CODECS
    ]


def few_rows(turns: int) -> list[dict[str, Any]]:
    """Rows of: number of rows, and the time of each codec over that of a dense Delta and of a merged weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator) / SIDE**0.5
    delta = torch.randn(SIDE, SIDE, generator=generator) * 1e-3
    half, merged = delta.bfloat16(), weight + delta
    kinds = ("int4", "int8", "sign", "bitmask:0.1")
    made = {name: encoded(CODECS[name][0], delta, CODECS[name][1]) for name in kinds}
    table = []
    for rows in ROWS:
        x = torch.randn(rows, SIDE, generator=generator)
        calls: dict[str, Callable[[], object]] = {
            "fp32": lambda x=x: taps_ext.gated_linear(x, weight, delta, gate=True),
            "bf16": lambda x=x: taps_ext.gated_linear(x, weight, half, gate=True),
            "merged": lambda x=x: F.linear(x, merged),
        }
        for name in kinds:
            calls[name] = lambda x=x, n=name: packed_linear(x, weight, CODECS[n][0], made[n], None)
        ms = medians(calls, turns)
        ratios = {n: {of: ms[n] / ms[of] for of in ("fp32", "bf16", "merged")} for n in kinds}
        table.append({"rows": rows, "ms": ms, "over": ratios})
    return table


def roads(x: Tensor, weight: Tensor, kind: str, made: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Twenty products, without W_t and with it."""
    first, second = (made[part] for part in ORDER[kind])
    without = torch.ops.taps_ext.packed_linear
    return {
        "without": lambda: [without(x, weight, first, second, kind, None) for _ in range(20)],
        "with": lambda: [F.linear(x, packed_weight(weight, kind, made)) for _ in range(20)],
    }


def sizes(turns: int) -> list[dict[str, Any]]:
    """Rows of: a layer's size, rows of x, and for each codec the time without W_t over that with it."""
    table = []
    for outputs, inputs in ((64, 64), (128, 128), (256, 256), (384, 384), (512, 512), (768, 768), (1024, 1024)):
        weight, delta = torch.randn(outputs, inputs), torch.randn(outputs, inputs) * 1e-3
        for rows in (1, 4, 16):
            x, over = torch.randn(rows, inputs), {}
            for name in ("int8", "int4", "sign", "bitmask:0.1"):
                kind, share = CODECS[name]
                ms = medians(roads(x, weight, kind, encoded(kind, delta, share)), turns, cold=0)
                over[name] = ms["without"] / ms["with"]
            table.append({"outputs": outputs, "inputs": inputs, "rows": rows, "over": over})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with torch.no_grad():
        codecs, linear, small = throughput(args.turns), few_rows(args.turns), sizes(args.turns)
    print("| codec | bytes a weight | pack, of memcpy | unpack into W_t, of memcpy | pack GB/s | unpack GB/s |")
    print("|---|---|---|---|---|---|")
    for row in codecs:
        print(
            f"| {row['codec']} | {row['bytes_a_weight']:.3f} | {row['pack_over_memcpy']:.2f} | "
            f"{row['unpack_over_memcpy']:.2f} | {row['pack_gb_s']:.1f} | {row['unpack_gb_s']:.1f} |"
        )
    print(f"\nmemcpy: {codecs[0]['memcpy_gb_s']:.1f} GB/s\n")
    print("| rows | codec | time over a Delta in fp32 | in bf16 | over the merged weight |")
    print("|---|---|---|---|---|")
    for entry in linear:
        for name, over in entry["over"].items():
            print(f"| {entry['rows']} | {name} | {over['fp32']:.2f} | {over['bf16']:.2f} | {over['merged']:.2f} |")
    print(f"\n| layer | rows | {' | '.join(small[0]['over'])} |")
    print("|---" * (2 + len(small[0]["over"])) + "|")
    for entry in small:
        cells = " | ".join(f"{value:.2f}" for value in entry["over"].values())
        print(f"| {entry['outputs']} x {entry['inputs']} | {entry['rows']} | {cells} |")
    if args.json:
        write(args.json, {"codecs": codecs, "few_rows": linear, "sizes": small}, load)


if __name__ == "__main__":
    main()
