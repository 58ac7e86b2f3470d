"""`taps verify`: are task files what was written?"""

from __future__ import annotations

import argparse
from typing import Any

from .common import KINDS, emit

PURPOSE = "Check every digest of task files; exit code 0 only if all files are sound, else 1."
EXAMPLE = "taps verify runs/signs/*.taps"
LAST = "files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="task files (.taps), states of runs (.state)")


def check(file: str) -> dict[str, Any]:
    """One file: sound or not, and why not."""
    from .. import store

    header, problem = store.sound(file)
    if header is None:
        return {"file": file, "ok": False, "reason": problem}
    meta = header.metadata
    facts = {"kind": meta.kind, "task": meta.name, "tensors": len(header.tensors), "bytes": header.file_bytes}
    return {"file": file, "ok": True, **facts, "digest": header.digest}


def run(args: argparse.Namespace) -> int:
    results = [check(file) for file in args.files]
    if args.json:
        emit(results)
    else:
        for result in results:
            if result["ok"]:
                kind = "" if result["kind"] == "task" else f"{KINDS[result['kind']]}, "
                print(f"ok   {result['file']}: {kind}{result['tensors']} tensors, {result['bytes']:,} bytes")
            else:
                print(f"BAD  {result['file']}: {result['reason']}")
    return 0 if all(result["ok"] for result in results) else 1
