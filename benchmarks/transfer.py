"""Transfer study: four pretrained bases, two tasks; accuracy against the share of weights, and which layers open.

    python benchmarks/pretrain.py resnet --out runs/bases      # and densenet, vit
    python benchmarks/transfer.py run   --bases runs/bases --results benchmarks/results/transfer.jsonl
    python benchmarks/transfer.py table --results benchmarks/results/transfer.jsonl
    python benchmarks/transfer.py plot  --results benchmarks/results/transfer.jsonl --png docs/transfer

Every run is as in study.py, on the bases that were trained here for 20 epochs. Lambda is chosen for each penalty, base
and task by the validation accuracy of one seed; the chosen one, the budgets and the baselines are run on five. `run`
appends a JSON line for each (base, task, seed, method) and skips those that are there, also those of the ResNet-20 in
study.py's own results (which do not name the layers that opened).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from small_bases import NAMES, load
from study import LAMBDAS, TASKS, cut_torn_line, interval, number, read, train
from study import load as load_task
from torch import nn

import taps_ext
from taps_ext.train import TrainConfig

BASES = ("resnet20", *NAMES)
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = {"resnet20": 30, **dict.fromkeys(NAMES, 20)}
STUDY = Path(__file__).parent / "results" / "study-resnet20.jsonl"
BUDGETS = (0.10, 0.25, 0.45)
PENALTIES = ("layer", "size")
Record = dict[str, Any]


def grid(penalty: str) -> list[str]:
    return [f"taps {lam:g} {penalty}" for lam in LAMBDAS]


FIXED = ("probe", "norms", "full", *(f"budget {100 * budget:.0f}" for budget in BUDGETS))


def config_of(method: str) -> tuple[taps_ext.MethodConfig, float | None]:
    """(settings, budget) of a method by its name."""
    kind, *rest = method.split()
    if kind == "probe":
        return taps_ext.ProbeConfig(), None
    if kind == "full":
        return taps_ext.FullConfig(), None
    if kind == "norms":  # every gate closed for good: affine parameters, running statistics and the head
        return taps_ext.TapsConfig(lam=0.0, overrides={"*": {"learn": False, "open": False}}), None
    if kind == "budget":
        return taps_ext.TapsConfig(lam=0.5, penalty="size"), float(rest[0]) / 100
    return taps_ext.TapsConfig(lam=float(rest[0]), penalty=rest[1]), None


def chosen(records: list[Record], base: str, task: str, penalty: str) -> str | None:
    """The lambda of the best validation accuracy on the first seed; of equals the one that opens less."""
    found = {r["method"]: r for r in records if (r["base"], r["task"], r["seed"]) == (base, task, SEEDS[0])}
    tried = [name for name in grid(penalty) if name in found]
    if len(tried) < len(LAMBDAS):
        return None
    return max(tried, key=lambda name: (found[name]["val"], -found[name]["share"]))


def wanted(records: list[Record], base: str, task: str) -> list[tuple[int, str]]:
    """(seed, method) of all runs that are known to be needed now, the first seed's first."""
    first = [(SEEDS[0], name) for name in (*FIXED, *grid("layer"), *grid("size"))]
    best = [name for penalty in PENALTIES if (name := chosen(records, base, task, penalty)) is not None]
    return first + [(seed, name) for seed in SEEDS[1:] for name in (*FIXED, *best)]


def digest(base: nn.Module) -> str:
    """Of a base's values: pretrained anew, on another machine, it is not the same to the bit."""
    found = hashlib.sha256()
    for name, tensor in base.state_dict().items():
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def check_digest(records: list[Record], record: Record) -> None:
    """Raise SystemExit if a seed's runs would begin at two bases: they are compared with each other."""
    key = ("base", "task", "seed")
    others = [r for r in records if all(r[k] == record[k] for k in key) and r.get("digest") != record["digest"]]
    if others and record["base"] != "resnet20":  # whose weights are given
        raise SystemExit(
            f"{record['base']} {record['task']}: seed {record['seed']} began at {others[0].get('digest')}, "
            f"this base is {record['digest']}; take that one, or drop those records"
        )


def one(records: list[Record], bases: Path, data: Path, base_name: str, task: str, seed: int, method: str) -> Record:
    """The record of one (base, task, seed, method). `records`: those that there are."""
    base, epochs = load(base_name, bases, data), EPOCHS[base_name]
    of_base = digest(base)
    check_digest(records, {"base": base_name, "task": task, "seed": seed, "digest": of_base})
    base = base.to(memory_format=torch.channels_last)
    config, budget = config_of(method)
    result, report = train(
        base, load_task(data, task), task, config, TrainConfig(epochs=epochs, seed=seed, budget=budget)
    )
    return {
        "base": base_name,
        "digest": of_base,
        "task": task,
        "seed": seed,
        "method": method,
        "val": result.val["accuracy"],
        "test": result.test["accuracy"],
        "share": result.share,
        "open": [row.layer for row in report.rows if row.open],
        "layers": [row.layer for row in report.rows],
        "epoch": result.epoch,
        "epochs": epochs,
        "within_budget": result.within_budget,
        "seconds": round(result.seconds, 1),
        "torch": torch.__version__,
    }


def known(results: Path) -> list[Record]:
    """The records of this study, and those that study.py made of the ResNet-20."""
    fixed = {"base": "resnet20", "open": None, "layers": None}
    return [{**fixed, **r} for r in read(STUDY) if r["epochs"] == EPOCHS["resnet20"]] + read(results)


def run(args: argparse.Namespace) -> None:
    args.results.parent.mkdir(parents=True, exist_ok=True)
    cut_torn_line(args.results)
    for base in args.only:
        for task in args.tasks:
            while True:
                records = known(args.results)
                done = {(r["seed"], r["method"]) for r in records if (r["base"], r["task"]) == (base, task)}
                missing = [key for key in wanted(records, base, task) if key not in done and key[0] in args.seeds]
                if not missing:
                    break
                seed, method = missing[0]
                record = one(records, args.bases, args.data, base, task, seed, method)
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(
                    f"{base} {task} {seed} {method}: {record['test']:.4f} share {record['share']:.3f} "
                    f"{record['seconds']:.0f} s",
                    flush=True,
                )


def groups(records: list[Record], base: str, task: str) -> dict[str, dict[int, Record]]:
    """Method -> seed -> record, for the methods that are compared."""
    best = [name for penalty in PENALTIES if (name := chosen(records, base, task, penalty)) is not None]
    mine = [r for r in records if (r["base"], r["task"]) == (base, task)]
    found = {m: {r["seed"]: r for r in mine if r["method"] == m} for m in (*FIXED[:3], *best, *FIXED[3:])}
    return {method: group for method, group in found.items() if group}


def table(records: list[Record]) -> str:
    """The results in Markdown, per cent; the gap to fine-tuning is paired by seed."""
    lines = [
        "| base | task | method | seeds | test | below fine-tuning | weights open |",
        "|---|---|---|---|---|---|---|",
    ]
    for base in BASES:
        for task in TASKS:
            found = groups(records, base, task)
            full = found.get("full", {})
            for method, group in found.items():
                pairs = [100 * (full[seed]["test"] - r["test"]) for seed, r in group.items() if seed in full]
                gap = number(interval(pairs)) if pairs and method != "full" else ""
                test = number(interval([100 * r["test"] for r in group.values()]))
                share = 100 * statistics.fmean(r["share"] for r in group.values())
                lines.append(f"| {base} | {task} | {method} | {len(group)} | {test} | {gap} | {share:.1f} % |")
    return "\n".join(lines)


def plot(records: list[Record], stem: Path) -> None:
    """`<stem>-accuracy.png`: test accuracy against weights open; `<stem>-layers.png`: how often each layer opened."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bases = [base for base in BASES if any(r["base"] == base for r in records)]
    figure = Figure(figsize=(4.2 * len(bases), 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    for row, axes_row in zip(TASKS, figure.subplots(len(TASKS), len(bases), squeeze=False), strict=True):
        for base, axes in zip(bases, axes_row, strict=True):
            for method, group in groups(records, base, row).items():
                mean, half = interval([100 * r["test"] for r in group.values()])
                share = 100 * statistics.fmean(r["share"] for r in group.values())
                bar = [[0.0 if half != half else half]] * 2
                axes.errorbar([share], [mean], yerr=bar, fmt="o", capsize=3, label=f"{method} ({len(group)})")
            axes.set(title=f"{base}: {row}", xlabel="gated weights open, %", ylabel="test accuracy, %", xlim=(-4, 104))
            if axes.has_data():
                axes.legend(fontsize=7, loc="lower right", title="method (seeds)", title_fontsize=7)
            else:
                axes.set_axis_off()  # not run yet
    figure.savefig(stem.with_name(stem.name + "-accuracy.png"), dpi=120)

    figure = Figure(figsize=(4.2 * len(bases), 9.0), layout="constrained")
    FigureCanvasAgg(figure)
    for base, axes in zip(bases, figure.subplots(1, len(bases), squeeze=False)[0], strict=True):
        named = [r for r in records if r["base"] == base and r["layers"] and r["method"].startswith(("taps", "bud"))]
        columns = [(t, m, g) for t in TASKS for m, g in groups(named, base, t).items()]
        layers = named[0]["layers"] if named else []
        shares = [
            [statistics.fmean(layer in r["open"] for r in group.values()) for _, _, group in columns]
            for layer in layers
        ]
        if columns:
            axes.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(layers)), layers, fontsize=6)
        axes.set_xticks(range(len(columns)), [f"{t} {m}" for t, m, _ in columns], rotation=90, fontsize=6)
        axes.set_title(f"{base}: share of seeds in which a layer opened", fontsize=8)
    figure.savefig(stem.with_name(stem.name + "-layers.png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "plot"])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--bases", type=Path, default=Path("runs/bases"))
    parser.add_argument("--only", nargs="+", choices=BASES, default=list(BASES), help="bases")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--png", type=Path, default=Path("docs/transfer"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.command == "run":
        run(args)
    elif args.command == "plot":
        plot(known(args.results), args.png)
    else:
        print(table(known(args.results)))


if __name__ == "__main__":
    main()
