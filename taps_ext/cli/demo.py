"""`taps demo`: see `taps_ext.demo`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from .common import count, emit, say, size, table

PURPOSE = "Adapt a small network to six tasks of real images by three methods, and prove the files."
EXAMPLE = "taps demo --out runs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="default: runs/demo")
    parser.add_argument("--seed", type=count(0), default=0, metavar="N", help="default: 0")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a few images, without meaning")


def run(args: argparse.Namespace) -> int:
    from ..demo.run import run as run_demo

    out = Path(args.out)
    report = run_demo(out, args.seed, args.quick, say)
    if args.json:
        emit(report)
    else:
        print(summary(report, out))
    return 0 if report["base_unchanged"] and report["bit_equal"] else 1


def summary(report: dict[str, Any], out: Path) -> str:
    """What the demo prints."""
    tasks, base = report["tasks"], report["base"]
    headers = ("task", "data", "probe", "fine-tuning", "TAPS", "layers open", "weights", "parameters", "file",
               "full copy", "reloaded")  # fmt: skip
    rows = [
        (
            name,
            task["source"],
            f"{100 * task['probe']:.1f} %",
            f"{100 * task['full']:.1f} %",
            f"{100 * task['taps']:.1f} %",
            f"{task['layers_open']} of {task['layers']}",
            f"{100 * task['share']:.1f} %",
            f"{task['parameters']:,}",
            size(task["bytes"]),
            size(task["full_bytes"]),
            "bit-equal" if task["bit_equal"] else "DIFFERS",
        )
        for name, task in tasks.items()
    ]
    total, copies = (sum(task[key] for task in tasks.values()) for key in ("bytes", "full_bytes"))
    lines = [
        f"\nbase: {base['source']}, {base['parameters']:,} parameters, {size(base['bytes'])}, test accuracy "
        f"{100 * base['accuracy']:.1f} %; TAPS with lambda {report['lam']}\n",
        table(headers, rows),
        f"\n{len(tasks)} TAPS files {size(total)}, {len(tasks)} fine-tuned copies {size(copies)}. "
        f"In a new process the base {'is unchanged' if report['base_unchanged'] else 'HAS CHANGED'} and "
        + ("every file gives the same bits." if report["bit_equal"] else "some files give OTHER outputs."),
    ]
    if report["quick"]:
        lines.append("This was a smoke run on a few images: the accuracies mean nothing.")
    lines.append(f"{report['seconds']['total']:.0f} s. See {out}/report.json and {out}/heatmap.png, or try")
    command = "taps" if shutil.which("taps") else f"{os.path.relpath(sys.executable)} -m taps_ext"
    lines.append(f"  {command} inspect {out}/taps/print.taps")
    if not report["quick"]:
        lines.append(f"  {command} eval {out}/taps/*.taps --config {out}/demo.toml")
    return "\n".join(lines)
