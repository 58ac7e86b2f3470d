"""Two checkouts of this project measured beside each other, in turns in one run: is the new one slower, and where?

    python benchmarks/beside.py --old ../old [--parts layers forwards steps] [--json FILE]

`--old` is a checkout with its extension compiled; the new one is that of this file, or `--new`. Each has a process of
its own (beside_worker.py, of this checkout in both), with its package and its extension: both alive, one at work. Of
every case each is asked for a block of calls, first the old one and then the new, in the next round the other way
around. A ratio is new over old of the same round; given are the median and the quartiles over all rounds, since a
shared machine's speed changes within seconds. All cases are gone through in `--passes`, with new processes in each,
since where a process finds its memory makes a kernel fast or slow for as long as it lives.

layers: those of `taps bench --full`, open or closed as it has them. forwards: a ResNet-50 and a ViT-S/16 without
gradients, their task not merged, all gates open or closed. steps: their training step, all open or with the pattern of
training_step.py. "stock" is torch alone in the same processes, whose ratio tells what the machine adds; so does a run
with one checkout as both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = ("layers", "forwards", "steps")
STOCK = "stock"
BLOCK = 5e-3  # seconds that calls are put together to
BEFORE = 1e-3  # seconds of calls before a block, not timed, where a call is short
PAUSE = 1e-2  # seconds before a block: the other process's idle threads burn a core for up to 8 ms before they sleep
MOST = 51  # rounds of a pass
LARGE = 1_000_000  # weights
SLOWER, LOST = 1.02, 1.03  # ratios that are listed: of large layers, and of smaller ones


class Side:
    """A checkout's process."""

    def __init__(self, checkout: Path, part: str) -> None:
        self.checkout = checkout
        path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "beside_worker.py"), part],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def send(self, *request: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer that does not come is noticed
            self.process.stdin.write(json.dumps(request) + "\n")

    def answer(self) -> Any:
        """SystemExit when the process is gone, which has said why."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.checkout}: no answer came; the process ended with {self.close()}")
        return json.loads(line)

    def ask(self, *request: Any) -> Any:
        self.send(*request)
        return self.answer()

    def facts(self) -> dict[str, Any]:
        """SystemExit when the process has another checkout's package, or no extension."""
        found = self.ask("facts")
        for what in ("package", "extension"):
            if found[what] is None or not Path(found[what]).resolve().is_relative_to(self.checkout):
                raise SystemExit(f"{self.checkout}: expected its own {what}, got {found[what]}")
        return found["machine"]

    def close(self) -> int:
        """End the process, which waits for the next line; its exit status."""
        with suppress(BrokenPipeError):
            self.process.communicate()
        return self.process.wait()


def everyone(sides: dict[str, Side], *request: Any) -> dict[str, Any]:
    """The answers of both, which work at the same time."""
    for side in sides.values():
        side.send(*request)
    return {name: side.answer() for name, side in sides.items()}


def shared(found: dict[str, Iterable[str]]) -> list[str]:
    """What both have, in the new one's order; the rest is told of."""
    old, new = list(found["old"]), list(found["new"])
    for name in (*(n for n in old if n not in new), *(n for n in new if n not in old)):
        say(f"only one checkout has {name}")
    return [name for name in new if name in old]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


Times = dict[str, dict[str, list[float]]]  # of a case: variant, side, rounds


def rounds_of(sides: dict[str, Side], case: str, least: int, seconds: float) -> tuple[Times, dict[str, int]]:
    """Seconds of a call by variant, side and round, and the calls of a block by variant."""
    variants = shared(everyone(sides, "make", case))
    alone = {variant: min(side.ask("alone", variant) for side in sides.values()) for variant in variants}
    calls = {variant: max(1, round(BLOCK / took)) for variant, took in alone.items()}
    before = {variant: 0 if took > 4 * BLOCK else max(1, round(BEFORE / took)) for variant, took in alone.items()}
    times: Times = {variant: {name: [] for name in sides} for variant in variants}
    began = time.perf_counter()
    for index in range(MOST):
        if index >= least and time.perf_counter() - began > seconds:
            break
        for variant in variants:
            for name in sides if index % 2 == 0 else reversed(sides):
                time.sleep(PAUSE)
                times[variant][name].append(sides[name].ask("block", variant, calls[variant], before[variant]))
    return times, calls


def row(part: str, case: str, variant: str, weights: int, calls: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """All that came of one variant of a case."""
    ratios = [new / old for old, new in zip(times["old"], times["new"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return {
        "part": part,
        "case": case,
        "variant": variant,
        "weights": weights,
        "calls": calls,
        "old": statistics.median(times["old"]),
        "new": statistics.median(times["new"]),
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def measure(part: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a part, and what each side runs on."""
    least = math.ceil(args.rounds / args.passes)
    found: dict[str, list[Any]] = {}
    for index in range(args.passes):
        with ExitStack() as stack:
            sides = {name: Side(checkout, part) for name, checkout in (("old", args.old), ("new", args.new))}
            for side in sides.values():
                stack.callback(side.close)
            machine = {name: side.facts() for name, side in sides.items()}
            cases = everyone(sides, "cases")
            chosen = [name for name in shared(cases) if any(text in name for text in args.only)]
            for name in chosen:
                times, calls = rounds_of(sides, name, least, args.seconds / args.passes)
                found.setdefault(name, [cases["new"][name], calls, []])[2].append(times)
                ratios = (f"{variant} {row('', '', '', 0, 0, t)['ratio']:.3f}" for variant, t in times.items())
                say(f"{part}, pass {index + 1}: {name}: {', '.join(ratios)}")
    rows = []
    for name, (weights, calls, passes) in found.items():
        for variant in passes[0]:
            times = {side: [second for of_pass in passes for second in of_pass[variant][side]] for side in sides}
            rows.append(row(part, name, variant, weights, calls[variant], times))
    return rows, machine


# --- what it says ---------------------------------------------------------------------------------------------------

HEADER = """| {} | weights | old, ms | new, ms | new / old | stock, new / old |
|---|---|---|---|---|---|"""


def label(found: dict[str, Any]) -> str:
    """A row's name: layers have one variant each."""
    return found["case"] + ("" if found["variant"] == "taps" else f", {found['variant']}")


def spread(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['ratio']:.3f} ({low:.2f}-{high:.2f})"


def ours(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found for found in rows if found["variant"] != STOCK]


def stock(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found for found in rows if found["variant"] == STOCK]


def table(title: str, rows: Sequence[dict[str, Any]], all_rows: Sequence[dict[str, Any]]) -> str:
    """Rows in Markdown, each with what became of the stock op in the same turns."""
    by_case = {(found["part"], found["case"]): found for found in stock(all_rows)}
    lines = [HEADER.format(title)]
    for found in rows:
        of_stock = by_case.get((found["part"], found["case"]))
        lines.append(
            f"| {label(found)} | {found['weights']:,} | {1e3 * found['old']:.4g} | {1e3 * found['new']:.4g} "
            f"| {spread(found)} | {spread(of_stock) if of_stock else ''} |"
        )
    return "\n".join(lines)


def slower(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a million weights or more, beyond what the rounds vary by."""
    return [f for f in ours(rows) if f["weights"] >= LARGE and f["ratio"] > SLOWER and f["quartiles"][0] > 1.0]


def lost(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What layers of fewer weights lose, whatever the rounds vary by."""
    return [f for f in ours(rows) if f["weights"] < LARGE and f["ratio"] > LOST]


def lists(rows: Sequence[dict[str, Any]]) -> str:
    """Both lists in Markdown."""
    large = [found for found in ours(rows) if found["weights"] >= LARGE]
    parts = []
    for title, chosen, count in (
        (f"Slower at a million weights or more (above {SLOWER}, lower quartile above 1)", slower(rows), len(large)),
        (f"What small layers lose (below a million weights, above {LOST})", lost(rows), len(ours(rows)) - len(large)),
    ):
        parts.append(f"{title}: {len(chosen)} of {count}.")
        if chosen:
            parts.append(table("case", chosen, rows))
    return "\n\n".join(parts)


# --- the command ----------------------------------------------------------------------------------------------------


def commit(checkout: Path) -> dict[str, Any]:
    """Which commit is checked out (empty where git cannot say), and whether what is measured differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "taps_ext", "csrc")
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}


def write(file: Path, record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """JSON with a line for each row."""
    head = json.dumps(record, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(found) for found in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--new", type=Path, default=HERE.parent, metavar="CHECKOUT")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases that have one of these in them")
    parser.add_argument("--seconds", type=float, default=1.2, help="for each case, if its rounds take no longer (1.2)")
    parser.add_argument("--rounds", type=int, default=8, help="at least, of each case in all passes (8)")
    parser.add_argument("--passes", type=int, default=2, help="of all cases, with new processes in each (2)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.rounds < 1 or args.passes < 1:
        parser.error(f"--rounds, --passes: at least 1 was expected; got {args.rounds} and {args.passes}")
    args.old, args.new = args.old.resolve(), args.new.resolve()
    for checkout in (args.old, args.new):
        if not list(checkout.glob("taps_ext/_C.*.so")):
            parser.error(f"{checkout}: a checkout with its extension compiled was expected")
    record: dict[str, Any] = {"old": commit(args.old), "new": commit(args.new)}
    settings = {"seconds": args.seconds, "rounds": args.rounds, "passes": args.passes}
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for part in args.parts:
        found, machine = measure(part, args)
        rows += found
        print(f"\n{table(part, ours(found), found)}", flush=True)
        record["old"]["machine"] = machine["old"]
        record |= {"machine": machine["new"], "settings": settings, "took": round(time.perf_counter() - began)}
        if args.json:  # after each part: a part that fails costs no other
            write(args.json, record, rows)
    print(f"\n{lists(rows)}")


if __name__ == "__main__":
    main()
