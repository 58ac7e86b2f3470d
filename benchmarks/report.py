"""docs/benchmarks.md and its picture, from the committed results: `make bench` ends with it.

python benchmarks/report.py --results benchmarks/results --docs docs --measured benchmarks/results/avx2 layers inference

A section for each machine, the last of the alphabet first: a folder of the results that holds all PARTS; those of MORE
are shown where they are. What is to be known of a machine is in its `machine.txt`; which commit a part was measured at,
in its `commits.json`, where --measured notes the present one. `beside.json` names its two commits itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import beside
import inference
import plumbing
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
MORE = {"plumbing": "calls"}

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

CALLS = """### What the package's own calls cost

Where kernels cost little: over the plain model, call by call in turns (`plumbing.py`), on one thread, where the plain
forward takes {microseconds:.0f} microseconds. "operator": without the plain functions that stand in for the operators
where a call allows it. A ResNet-50 has all layers open, two threads, no gradients, and its caches as the last forward
left them (warm) or full of other memory (cold).

{table}"""

BESIDE = """### Beside an earlier version

{new} over {old}, two checkouts in turns in one run (`beside.py`):
medians and quartiles of the ratios of {rounds} rounds or more. "stock" is torch alone in the same two processes, whose
ratio tells what the machine adds.

{tables}"""


def layers(found: dict[str, Any]) -> list[bench.Result]:
    """Results as `taps bench --json` wrote them."""
    keys = ("group", "layer", "rows", "path", "seconds", "limit")
    return [
        bench.Result(
            dtype=getattr(torch, row["dtype"]), ratios=tuple(row.get("ratios", ())), **{k: row[k] for k in keys}
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


def calls(found: dict[str, Any]) -> str:
    """What plumbing.py measured."""
    microseconds = found[plumbing.SMALL]["plain, microseconds"]
    return CALLS.format(microseconds=microseconds, table=plumbing.table(found))


def versions(found: dict[str, Any]) -> str:
    """What beside.py measured: layers by their groups and where the new one is slower, whole models in full."""
    rows = found["rows"]
    of_part = {part: [row for row in rows if row["part"] == part] for part in beside.PARTS}
    tables = [groups(of_part["layers"])] if of_part["layers"] else []
    tables += [beside.table(part, beside.ours(of_part[part]), rows) for part in beside.PARTS[1:] if of_part[part]]
    names = {
        side: f"commit {found[side]['commit'][:7]}{' with changes' if found[side]['changed'] else ''}"
        for side in ("new", "old")
    }
    return BESIDE.format(
        **{**names, "new": names["new"].capitalize()},
        rounds=found["settings"]["rounds"],
        tables="\n\n".join([*tables, beside.lists(rows)]),
    )


def groups(rows: list[dict[str, Any]]) -> str:
    """Ratios of layers' cases by group."""
    lines = ["| layers | cases | new / old: median | lowest | highest | stock, new / old: median | lowest | highest |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for group in dict.fromkeys(row["case"].partition(":")[0] for row in rows):
        own = [row for row in rows if row["case"].startswith(f"{group}:")]
        ratios = [[row["ratio"] for row in chosen] for chosen in (beside.ours(own), beside.stock(own))]
        cells = [f"{value:.3f}" for of in ratios for value in (statistics.median(of), min(of), max(of))]
        lines.append(f"| {group} | {len(ratios[0])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(folder: Path) -> str:
    """What was measured on one machine."""
    known = folder / "machine.txt"
    found, inferred, step = (json.loads((folder / f"{part}.json").read_text(encoding="utf-8")) for part in PARTS)
    machine, commits = found["machine"], json.loads((folder / COMMITS).read_text(encoding="utf-8"))
    text = SECTION.format(
        threads=machine["cpu"]["threads"],
        isa=machine["extension"]["isa"],
        torch=machine["torch"],
        known=known.read_text(encoding="utf-8").strip() if known.exists() else f"{machine['cpu']['model']}.",
        commits=", ".join(f"{commits[part]} ({name})" for part, name in {**PARTS, **MORE}.items() if part in commits),
        tables=bench.table(layers(found)),
        forwards=inference.table(inferred["rows"]),
        batch=step["batch"],
        steps="\n".join([HEADER, *(table(model, part["rows"]) for model, part in step["models"].items())]),
    )
    sections = [text]
    for part, of_part in (("plumbing", calls), ("beside", versions)):
        file = folder / f"{part}.json"
        if file.exists():
            sections.append(of_part(json.loads(file.read_text(encoding="utf-8"))))
    return "\n\n".join(sections)


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
