"""`taps unpack`: a packed task's file with Deltas again, which train."""

from __future__ import annotations

import argparse

from .common import check_out, emit, size

PURPOSE = "Write a packed task file with Deltas again, which train. What packing lost stays lost. Needs no base."
EXAMPLE = "taps unpack signs.int8.taps --out signs.taps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a packed task file (.taps)")
    parser.add_argument("--out", metavar="FILE", required=True, help="the task file to write")


def run(args: argparse.Namespace) -> int:
    from ..files.pack import unpack_file

    check_out(args.out, args.file)
    layers, written = unpack_file(args.file, args.out)
    if args.json:
        emit({"file": args.out, "layers": layers, "bytes": written})
    else:
        print(f"{args.out}: {len(layers)} layers unpacked, {size(written)}")
    return 0
