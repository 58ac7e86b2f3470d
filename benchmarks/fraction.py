"""Study of `gate_fraction`: does a task learn the same when closed layers estimate their score gradients?

    python benchmarks/fraction.py run   --bases runs/bases --results benchmarks/results/fraction.jsonl
    python benchmarks/fraction.py table --results benchmarks/results/fraction.jsonl

ResNet-20 and the small ViT of transfer.py, both tasks, f = 1, 1/4 and 1/8, five seeds; TAPS with lambda 0.5 and the
penalty by size, trained as in transfer.py. Decided before the first run: f is equivalent to 1 on a base and task where
the 90 % interval of the difference, paired by seed, lies within +- 0.7 points of test accuracy and within +- 5 points
of the share of weights that is open (two one-sided tests at 5 %). `run` appends a JSON line for each run and skips
those that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from small_bases import load
from study import TASKS, cut_torn_line, interval, number, read, train
from study import load as load_task
from transfer import EPOCHS, SEEDS, check_digest, digest

import taps_ext
from taps_ext.train import TrainConfig

BASES = ("resnet20", "vit")
FRACTIONS = (1.0, 0.25, 0.125)
LAMBDA, PENALTY = 0.5, "size"
POINTS, WEIGHTS = 0.7, 5.0  # margins of equivalence: per cent of the test images, of the weights
Record = dict[str, Any]


def one(records: list[Record], bases: Path, data: Path, base: str, task: str, seed: int, fraction: float) -> Record:
    """The record of one run. `records`: those that there are."""
    config = taps_ext.TapsConfig(lam=LAMBDA, penalty=PENALTY, gate_fraction=fraction)
    model = load(base, bases, data)
    of_base = digest(model)
    check_digest(records, {"base": base, "task": task, "seed": seed, "digest": of_base})
    model = model.to(memory_format=torch.channels_last)
    result, report = train(model, load_task(data, task), task, config, TrainConfig(epochs=EPOCHS[base], seed=seed))
    return {
        "base": base,
        "task": task,
        "seed": seed,
        "fraction": fraction,
        "digest": of_base,
        "val": result.val["accuracy"],
        "test": result.test["accuracy"],
        "share": result.share,
        "open": [row.layer for row in report.rows if row.open],
        "epoch": result.epoch,
        "last_val": result.history[-1]["val_accuracy"],
        "last_share": result.history[-1]["share"],
        "reopened": sum(entry["reopened"] for entry in result.history),
        "epochs": EPOCHS[base],
        "seconds": round(result.seconds, 1),
        "torch": torch.__version__,
    }


def run(args: argparse.Namespace) -> None:
    args.results.parent.mkdir(parents=True, exist_ok=True)
    cut_torn_line(args.results)
    records = read(args.results)
    done = {(r["base"], r["task"], r["seed"], r["fraction"]) for r in records}
    for seed in args.seeds:
        for base in args.only:
            for task in args.tasks:
                for fraction in FRACTIONS:
                    if (base, task, seed, fraction) in done:
                        continue
                    record = one(records, args.bases, args.data, base, task, seed, fraction)
                    records.append(record)
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    print(f"{base} {task} {seed} f {fraction}: {record['test']:.4f} {record['share']:.3f}", flush=True)


def paired(found: dict[float, dict[int, Record]], fraction: float, key: str) -> list[float]:
    """Differences to f = 1 in per cent, by seed."""
    exact, sampled = found[1.0], found.get(fraction, {})
    return [100 * (sampled[seed][key] - exact[seed][key]) for seed in sampled if seed in exact]


def equivalent(differences: list[float], margin: float) -> bool | None:
    """Whether the 90 % t-interval lies within the margin; None unless there are the five seeds."""
    if len(differences) != len(SEEDS):
        return None
    mean, half = ninety(differences)
    return abs(mean) + half <= margin


def ninety(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 90 % t-interval: both sides of it are tested at 5 %."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, float(student.ppf(0.95, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def groups(records: list[Record]) -> Iterator[tuple[str, str, dict[float, dict[int, Record]]]]:
    """(base, task, its records by f and seed), for those that have some."""
    for base in BASES:
        for task in TASKS:
            mine = [r for r in records if (r["base"], r["task"]) == (base, task) and r["seed"] in SEEDS]
            if mine:
                yield base, task, {f: {r["seed"]: r for r in mine if r["fraction"] == f} for f in FRACTIONS}


def compared(found: dict[float, dict[int, Record]], fraction: float, key: str) -> tuple[list[str], list[float]]:
    """Cells: the values' mean, the differences' mean; and the differences."""
    pairs = [] if fraction == 1.0 else paired(found, fraction, key)
    values = number(interval([100 * r[key] for r in found[fraction].values()]))
    return [values, number(ninety(pairs)) if pairs else ""], pairs


def table(records: list[Record]) -> str:
    """The results in Markdown: 95 % intervals of the values, 90 % ones of the differences.

    "not shown" is not "different": with five seeds a true equivalence may fail. No correction is made for the eight
    comparisons. The second table, of the last epoch instead of the one that validation chose, decides nothing.
    """
    lines = [
        "| base | task | f | seeds | test | minus f = 1 | weights open | minus f = 1 | gates reopened | equivalent |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    last = [
        "| base | task | f | last epoch: validation | minus f = 1 | weights open | minus f = 1 | epoch chosen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for base, task, found in groups(records):
        for fraction, group in found.items():
            if not group:
                continue
            name = [base, task, f"1/{round(1 / fraction)}" if fraction < 1 else "1"]
            tests, of_test = compared(found, fraction, "test")
            shares, of_share = compared(found, fraction, "share")
            verdict = [equivalent(of_test, POINTS), equivalent(of_share, WEIGHTS)]
            known = fraction < 1.0 and None not in verdict
            cells = [*name, str(len(group)), *tests, *shares]
            cells.append(f"{statistics.fmean(r['reopened'] for r in group.values()):.1f}")
            cells.append(("yes" if all(verdict) else "not shown") if known else "")
            lines.append(f"| {' | '.join(cells)} |")
            cells = [*name, *compared(found, fraction, "last_val")[0], *compared(found, fraction, "last_share")[0]]
            cells.append(", ".join(str(group[seed]["epoch"]) for seed in sorted(group)))
            last.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--bases", type=Path, default=Path("runs/bases"))
    parser.add_argument("--only", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.command == "run":
        torch.set_num_threads(args.threads)
        run(args)
    else:
        print(table(read(args.results)))


if __name__ == "__main__":
    main()
