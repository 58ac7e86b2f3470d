"""docs/benchmarks.md and its picture, from the committed results: `make bench` ends with it.

python benchmarks/report.py --results benchmarks/results --docs docs --measured benchmarks/results/avx2 layers inference

A section for each machine, the last of the alphabet first: a folder of the results that holds all parts. What is to be
known of a machine is in its `machine.txt`; which commit a part was measured at, in its `commits.json`, where --measured
notes the present one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
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
in two minutes; the picture shows that part of the first section. The machines were shared: small differences are not
the code's. Freed memory stays with the process (from commit 238b77f on): otherwise page faults of a large result fall
on one variant or another.

- **/ stock**: time over the stock op on a merged weight (gradients: a plain weight gradient; a step: fine-tuning).
  Where all was measured in several passes: the median, the lowest and the highest.
- **/ best alternative**: time over the fastest of what one would write without this package.
- **% of limit**: what the bytes and operations need at this machine's measured copy bandwidth and matmul rate, over the
  time taken. Copying reads and writes, so that a kernel which only reads can pass 100; so can one that multiplies
  faster than torch's matrix product.
- **Delta too**: in bf16 as the weight; elsewhere Delta is in fp32.

![ratios](benchmarks.png)

{sections}
"""

PARTS = {"layers": "layers", "inference": "forwards", "training-step": "training steps"}

COMMITS = "commits.json"

SECTION = """## {threads} cores, {isa}

torch {torch}. {known} Measured at {commits}.

{tables}

### A model's forward, its task not merged

Without gradients, over the merged copy (`inference.py`): all gates open; the pattern of the training step below; and
`W + Delta` on every call, as one would write it.

{forwards}

### A training step

Batch {batch}, SGD with momentum; each variant in processes of its own (`training_step.py`). Memory is the peak of the
process above what it had before the model was made. Times are over those of fine-tuning's steps just before and after,
medians and quartiles; where no quartiles are given, over fine-tuning's median in the same of three rounds. "pattern":
ResNet-50 with the layers open that opened in the authors' CUB run, ViT-S/16 with the attention of its last eight blocks
open, 22 % of the weights; "1/8": `gate_fraction`. "naive": `W + g * Delta` by autograd. "floor": the share of
fine-tuning's products that a variant cannot do without.

{steps}"""


def layers(found: dict[str, Any]) -> list[bench.Result]:
    """Results as `taps bench --json` wrote them."""
    keys = ("group", "layer", "rows", "path", "seconds", "limit")
    return [
        bench.Result(
            dtype=getattr(torch, row["dtype"]),
            ratios=tuple(row.get("ratios", ())),
            predicted=row.get("predicted", False),
            **{k: row[k] for k in keys},
        )
        for row in found["results"]
    ]


def note(folder: Path, parts: list[str]) -> None:
    """That parts were measured at the present commit."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    file = folder / COMMITS
    commits = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    commits |= dict.fromkeys(parts, commit.strip())
    file.write_text(json.dumps(commits, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def section(folder: Path) -> str:
    """What was measured on one machine."""
    known = folder / "machine.txt"
    found, inferred, step = (json.loads((folder / f"{part}.json").read_text(encoding="utf-8")) for part in PARTS)
    machine, commits = found["machine"], json.loads((folder / COMMITS).read_text(encoding="utf-8"))
    return SECTION.format(
        threads=machine["cpu"]["threads"],
        isa=machine["extension"]["isa"],
        torch=machine["torch"],
        known=known.read_text(encoding="utf-8").strip() if known.exists() else f"{machine['cpu']['model']}.",
        commits=", ".join(f"{commits[part]} ({name})" for part, name in PARTS.items()),
        tables=bench.table(layers(found)),
        forwards=inference.table(inferred["rows"]),
        batch=step["batch"],
        steps="\n".join([HEADER, *(table(model, part["rows"]) for model, part in step["models"].items())]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--measured", nargs="+", metavar=("FOLDER", "PART"), help="results that are new")
    args = parser.parse_args()
    if args.measured is not None:
        note(Path(args.measured[0]), args.measured[1:])
    folders = []
    for folder in sorted((found.parent for found in args.results.glob("*/layers.json")), reverse=True):
        files = (*(f"{part}.json" for part in PARTS), COMMITS)
        missing = [file for file in files if not (folder / file).exists()]
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
