"""`taps bench`: gated layers on this machine, beside the best alternatives."""

from __future__ import annotations

import argparse

from ..plot.canvas import check_picture
from .common import count, emit, say

PURPOSE = "Measure gated layers on this machine, beside the stock op and the best alternatives (two minutes)."
EXAMPLE = "taps bench --groups linear step --plot bench.png"
MORE = """

"/ stock" is the time over that of the stock op on a merged weight (for a training step: fine-tuning), "/ best
alternative" over that of what one would write without this package, "% of limit" the time that the bytes and operations
need at this machine's measured speeds over the time taken. Of several passes it shows medians, and in brackets the
lowest and highest "/ stock": some ops run at two speeds. Keep the machine quiet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--groups", nargs="+", metavar="GROUP", help="linear conv2d closed gradient call step (all)")
    parser.add_argument("--full", action="store_true", help="more shapes, types and layouts")
    parser.add_argument("--seconds", type=count(1), default=120, help="for all together, about (120)")
    parser.add_argument(
        "--passes", type=count(1), default=1, help="times that all is measured in them, for a spread (1)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N] (cpu)")
    parser.add_argument("--threads", type=count(1), help="CPU threads (torch's default)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios")


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import bench
    from ..errors import ConfigError
    from .config import check_device
    from .env import shareable_facts

    check_device(args.device)
    if args.device == "meta":
        raise ConfigError("device: expected one that computes, got 'meta'")
    if args.plot is not None:
        check_picture(args.plot)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    cases = bench.suite(args.groups, full=args.full, device=args.device)
    bench.keep_freed_memory()
    results = bench.run(
        cases,
        seconds=args.seconds,
        passes=args.passes,
        device=args.device,
        progress=lambda found: say(f"{found.name}: {found.ratio:.2f} of the stock op"),
    )
    if args.json:
        emit({"machine": shareable_facts(), "results": [result.to_dict() for result in results]})
    else:
        print(bench.table(results))
    if args.plot is not None:
        from ..plot.bench import bench_picture

        bench_picture(args.plot, results)
        say(f"wrote {args.plot}")
    return 0
