"""Patches between two states in bf16: bytes per changed element, and times beside a full copy and beside plain torch.

    python benchmarks/patch.py [--millions 128] [--json FILE]

One run, one thread, cold caches, the best of several turns that alternate. `copy` writes all of a new state into the
old one's memory (`copy_`, what `load_state_dict` does), `clone` into memory of its own. Plain torch finds with
`nonzero`, keeps int32 numbers, and writes with `index_put_`, without proving anything. The larger state has ten times
the elements, of which as many change.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from turns import fastest, write

from taps_ext import patch

LAYERS = 8
COLD = 96 << 20  # bytes written between two calls
State = dict[str, Tensor]


def make(millions: float, share: float, seed: int = 0) -> tuple[State, State]:
    """A state of equal layers, and another one in which about this share of elements has other bits."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(int(millions * 1e6 / LAYERS / 1024), 1)
    old, new = {}, {}
    for layer in range(LAYERS):
        bits = torch.randint(-(2**15), 2**15, (rows, 1024), dtype=torch.int16, generator=generator)
        other = bits.clone()
        at = torch.randint(0, bits.numel(), (round(share * bits.numel()),), generator=generator)
        other.view(-1)[at] ^= 1 + torch.randint(0, 63, (len(at),), dtype=torch.int16, generator=generator)
        old[f"layers.{layer}.weight"], new[f"layers.{layer}.weight"] = (t.view(torch.bfloat16) for t in (bits, other))
    return old, new


def plain_diff(old: State, new: State) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name in old:
        first, second = old[name].view(torch.int16).view(-1), new[name].view(torch.int16).view(-1)
        numbers = (first != second).nonzero().view(-1)
        found[name] = (numbers.int(), second[numbers])
    return found


def plain_apply(target: State, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (numbers, values) in found.items():
        target[name].view(torch.int16).view(-1).index_put_((numbers,), values)


def measure(millions: float, share: float, turns: int) -> dict[str, Any]:
    old, new = make(millions, share)
    target = {name: tensor.clone() for name, tensor in old.items()}
    made = patch.diff(old, new)
    blob, plain, state = made.to_bytes(), plain_diff(old, new), patch.State(target)
    back = patch.diff(new, old)
    elements = sum(len(numbers) for numbers, _ in plain.values())
    assert made.elements == elements and patch.parse(blob).after == made.after

    def reset() -> None:
        if state.digest != made.before:
            patch.apply(state, back)

    def copy(source: State) -> None:
        for name, tensor in target.items():
            tensor.copy_(source[name])

    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(old),
        "clone": lambda: [tensor.clone() for tensor in new.values()],
        "apply": lambda: patch.apply(state, made),
        "apply full": lambda: patch.apply(state, made, verify="full"),
        "read patch": lambda: patch.parse(blob),
        "plain apply": lambda: plain_apply(target, plain),
        "plain back": lambda: copy(old),
        "diff": lambda: patch.diff(old, new),
        "plain diff": lambda: plain_diff(old, new),
        "digest": lambda: patch.digest(old),
    }
    ready = dict.fromkeys(("copy", "apply", "apply full", "plain apply"), reset)
    times = fastest(calls, turns, ready=ready, cold=COLD)
    del times["plain back"]
    reset()
    patch.apply(state, made)
    assert all(torch.equal(target[n].view(torch.int16), new[n].view(torch.int16)) for n in new)
    return {
        "elements": sum(tensor.numel() for tensor in old.values()),
        "share": share,
        "changed": elements,
        "bytes_per_changed": round(made.nbytes / elements, 3),
        "file_bytes_per_changed": round(len(blob) / elements, 3),
        "ms": {name: round(value, 2) for name, value in times.items()},
        "apply_over_copy": round(times["apply"] / times["copy"], 3),
        "apply_over_clone": round(times["apply"] / times["clone"], 3),
        "apply_over_plain": round(times["apply"] / times["plain apply"], 3),
        "diff_over_plain": round(times["diff"] / times["plain diff"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=128, help="elements of the state (default: 128)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    cases = [(args.millions, 0.01), (args.millions, 0.03), (args.millions / 10, 0.01), (args.millions, 0.001)]
    rows = [measure(millions, share, args.turns) for millions, share in cases]
    for row in rows:
        print(json.dumps(row))
    ratio = rows[3]["ms"]["apply"] / rows[2]["ms"]["apply"]
    print(f"ten times the state, as many changes: apply takes {ratio:.2f} times as long")
    if args.json:
        write(args.json, {"rows": rows, "ten_times_the_state": round(ratio, 3)}, load)


if __name__ == "__main__":
    main()
