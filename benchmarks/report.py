"""docs/benchmarks.md and its picture, from the committed results: `make bench` ends with it.

python benchmarks/report.py --results benchmarks/results --docs docs

A section for each machine, the last of the alphabet first: a folder of the results that holds all parts. What is to be
known of a machine is in its `machine.txt`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import inference
import torch
from training_step import HEADER, table

from taps_ext import bench
from taps_ext.plot.bench import bench_picture

PAGE = """# Benchmarks

Written by `make bench` from `benchmarks/results`: medians of variants that take turns, as do their weights (128 MB of
them with their Deltas, at most 512: large layers come from memory). `taps bench` measures a part of it on your machine
in two minutes; the picture shows that part of the first section. The machines were shared: the same row measured twice
differs by up to 15 %. Freed memory stays with the process (`keep_freed_memory`): otherwise page faults of a large
result fall on one variant or another.

- **/ stock**: time over the stock op on a merged weight (gradients: a plain weight gradient; a step: fine-tuning).
- **/ best alternative**: time over the fastest of what one would write without this package.
- **% of limit**: what the bytes and operations need at this machine's measured copy bandwidth and matmul rate, over the
  time taken. Copying reads and writes, so that a kernel which only reads can pass 100; so can one that multiplies
  faster than torch's matrix product.
- **Delta too**: in bf16 as the weight; elsewhere Delta is in fp32.

![ratios](benchmarks.png)

{sections}
"""

PARTS = ("layers", "training-step", "inference")

SECTION = """## {threads} cores, {isa}

torch {torch}. {known}

{tables}

### A model's forward, its task not merged

Without gradients, over the merged copy (`inference.py`): all gates open; the pattern of the training step below; and
`W + Delta` on every call, as one would write it.

{forwards}

### A training step

Batch {batch}, SGD with momentum; each variant in processes of its own (`training_step.py`). Memory is the peak of the
process above what it had before the model was made. "pattern": ResNet-50 with the layers open that opened in the
authors' CUB run, ViT-S/16 with the attention of its last eight blocks open, 22 % of the weights; "1/8":
`gate_fraction`. "naive": `W + g * Delta` by autograd. "floor": the share of fine-tuning's products that a variant
cannot do without.

{steps}"""


def layers(found: dict[str, Any]) -> list[bench.Result]:
    """Results as `taps bench --json` wrote them."""
    keys = ("group", "layer", "rows", "path", "seconds", "limit")
    return [bench.Result(dtype=getattr(torch, row["dtype"]), **{k: row[k] for k in keys}) for row in found["results"]]


def section(folder: Path) -> str:
    """What was measured on one machine."""
    known = folder / "machine.txt"
    found, step, inferred = (json.loads((folder / f"{part}.json").read_text(encoding="utf-8")) for part in PARTS)
    machine = found["machine"]
    return SECTION.format(
        threads=machine["cpu"]["threads"],
        isa=machine["extension"]["isa"],
        torch=machine["torch"],
        known=known.read_text(encoding="utf-8").strip() if known.exists() else f"{machine['cpu']['model']}.",
        tables=bench.table(layers(found)),
        forwards=inference.table(inferred["rows"]),
        batch=step["batch"],
        steps="\n".join([HEADER, *(table(model, part["rows"]) for model, part in step["models"].items())]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    args = parser.parse_args()
    folders = []
    for folder in sorted((found.parent for found in args.results.glob("*/layers.json")), reverse=True):
        missing = [f"{part}.json" for part in PARTS if not (folder / f"{part}.json").exists()]
        if missing:
            print(f"{folder}: left out without {', '.join(missing)}; `make bench` measures it")
        else:
            folders.append(folder)
    sections = "\n\n".join(map(section, folders))
    (args.docs / "benchmarks.md").write_text(PAGE.format(sections=sections), encoding="utf-8")
    first = json.loads((folders[0] / "layers.json").read_text(encoding="utf-8"))
    part = {case.name for case in bench.suite()}
    bench_picture(args.docs / "benchmarks.png", [result for result in layers(first) if result.name in part])


if __name__ == "__main__":
    main()
