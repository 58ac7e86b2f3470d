"""Study: TAPS against fine-tuning and a probe on real data (ResNet-20 base; sign digits, handwritten characters).

    python benchmarks/study.py run   --data ../shared/data --results benchmarks/results/study-resnet20.jsonl
    python benchmarks/study.py table --results benchmarks/results/study-resnet20.jsonl
    python benchmarks/study.py plot  --results benchmarks/results/study-resnet20.jsonl --png docs/study-resnet20.png

`run` appends one JSON line for each (task, seed, method, epochs) and skips those that are there, so it can be stopped
and started at will. Every run: SGD .01, momentum .9, cosine, 30 epochs, batch 32; a tenth of the training data is held
out for choosing the epoch and lambda; the test split is read once, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from resnet20 import normalise, pretrained
from scipy.stats import t as student
from torch import nn

import taps_ext
from taps_ext.model.report import Report
from taps_ext.train import Result, Task, TrainConfig, Trainer

LAMBDAS = (0.25, 0.5, 1.0)
TASKS = ("signs", "omniglot")
SMALL = 0.45  # the share of weights that the goal allows


def methods() -> dict[str, taps_ext.MethodConfig]:
    """Name -> config, cheapest first."""
    found: dict[str, taps_ext.MethodConfig] = {
        "probe": taps_ext.ProbeConfig(),
        "full": taps_ext.FullConfig(),
        "taps 0": taps_ext.TapsConfig(lam=0.0),
    }
    for lam in (0.5, 1.0, 0.25):
        for penalty in ("layer", "size"):
            found[f"taps {lam:g} {penalty}"] = taps_ext.TapsConfig(lam=lam, penalty=penalty)
    return found


def load(folder: Path, task: str) -> dict[str, torch.Tensor]:
    """Normalised inputs and int64 targets of both splits."""
    with np.load(folder / f"{task}.npz", allow_pickle=False) as file:
        data = {key: torch.from_numpy(file[key]) for key in ("x_train", "y_train", "x_test", "y_test")}
    layout = torch.channels_last  # a sixth faster here
    return {k: normalise(v).to(memory_format=layout) if k[0] == "x" else v.long() for k, v in data.items()}


def run(folder: Path, results: Path, tasks: list[str], seeds: list[int], epochs: int, only: list[str]) -> None:
    cut_torn_line(results)
    done = {(r["task"], r["seed"], r["method"]) for r in read(results) if r["epochs"] == epochs}
    for seed in seeds:
        for task in tasks:
            for name, config in methods().items():
                if (task, seed, name) in done or (only and name not in only):
                    continue
                record = one(folder, task, seed, name, config, epochs)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(
                    task,
                    seed,
                    name,
                    f"{record['test']:.4f} share {record['share']:.3f} {record['seconds']:.0f} s",
                    flush=True,
                )


def train(
    base: nn.Module, data: dict[str, torch.Tensor], task: str, config: taps_ext.MethodConfig, settings: TrainConfig
) -> tuple[Result, Report]:
    """Train one task on a base and prove that the base's outputs are what they were."""
    probe = data["x_test"][:256]
    with torch.no_grad():
        before = base(probe)
    torch.manual_seed(settings.seed)
    model = taps_ext.TaskModel(base, config)
    model.add_task(task, num_classes=int(data["y_train"].max()) + 1)
    splits = Task(train=(data["x_train"], data["y_train"]), test=(data["x_test"], data["y_test"]))
    result = Trainer(model, {task: splits}, settings, quiet=True).fit()[task]
    report = model.report(task)
    with torch.no_grad():
        equal = torch.equal(model(probe, task=None), before) and torch.equal(model.unload().eval()(probe), before)
    if not equal:
        raise RuntimeError(f"{task}: the base's outputs changed")
    return result, report


def one(folder: Path, task: str, seed: int, name: str, config: Any, epochs: int) -> dict[str, Any]:
    """The record of one (task, seed, method)."""
    base = pretrained(folder / "resnet20-cifar10.safetensors").to(memory_format=torch.channels_last)
    result, _ = train(base, load(folder, task), task, config, TrainConfig(epochs=epochs, seed=seed))
    return {
        "task": task,
        "seed": seed,
        "method": name,
        "val": result.val["accuracy"],
        "test": result.test["accuracy"],
        "share": result.share,
        "layers_open": result.layers_open,
        "epoch": result.epoch,
        "last_val": result.history[-1]["val_accuracy"],
        "last_share": result.history[-1]["share"],
        "epochs": epochs,
        "seconds": round(result.seconds, 1),
        "base_bit_equal": True,
        "torch": torch.__version__,
    }


def read(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    lines = results.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]  # the last one may be torn


def cut_torn_line(results: Path) -> None:
    """Drop what a killed run left of its last line; the run is then repeated."""
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    if text and not text.endswith("\n"):
        results.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    t95 = float(student.ppf(0.975, len(values) - 1))
    return mean, t95 * statistics.stdev(values) / math.sqrt(len(values))


def grouped(results: Path, task: str, epochs: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Method -> seed -> record, for the methods that have been run on a task."""
    rows = [r for r in read(results) if r["task"] == task and r["epochs"] == epochs]
    groups = {m: {r["seed"]: r for r in rows if r["method"] == m} for m in methods()}
    return {m: group for m, group in groups.items() if group}


def chosen(groups: dict[str, dict[int, dict[str, Any]]], limit: float = 1.0) -> str | None:
    """The setting with the best mean validation accuracy among those that open at most `limit` of the weights.

    Compared over the seeds that all settings have; where two are equal the smaller share wins.
    """
    learned = {m: group for m, group in groups.items() if m.startswith("taps") and m != "taps 0"}
    if not learned:
        return None
    shared = set.intersection(*(set(group) for group in learned.values()))

    def mean(method: str, key: str) -> float:
        return statistics.fmean(learned[method][seed][key] for seed in shared)

    allowed = [m for m in learned if shared and mean(m, "share") <= limit]
    return max(allowed, key=lambda m: (round(mean(m, "val"), 6), -mean(m, "share")), default=None)


def table(results: Path, epochs: int) -> str:
    """The results in Markdown. `val` and `test` in per cent, the gap to fine-tuning paired by seed."""
    lines = [
        "| task | method | seeds | validation | test | below fine-tuning | weights open | layers open |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        groups = grouped(results, task, epochs)
        best, small = chosen(groups), chosen(groups, SMALL)
        for method, group in groups.items():
            val, test = (interval([100 * r[k] for r in group.values()]) for k in ("val", "test"))
            full = groups.get("full", {})
            pairs = [100 * (full[seed]["test"] - r["test"]) for seed, r in group.items() if seed in full]
            gap = interval(pairs) if pairs and method != "full" else None
            share, layers = (statistics.fmean(r[k] for r in group.values()) for k in ("share", "layers_open"))
            marks = [
                text for text, m in (("chosen", best), (f"chosen at <= {100 * SMALL:.0f} %", small)) if m == method
            ]
            mark = f" **({', '.join(marks)})**" if marks else ""
            lines.append(
                f"| {task} | {method}{mark} | {len(group)} | {number(val)} | {number(test)} "
                f"| {'' if gap is None else number(gap)} | {100 * share:.1f} % | {layers:.1f} |"
            )
    return "\n".join(lines)


def number(value: tuple[float, float]) -> str:
    mean, half = value
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def plot(results: Path, path: Path, epochs: int) -> None:
    """Test accuracy against the share of weights open, mean and 95 % interval, one panel for each task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        groups = grouped(results, task, epochs)
        for penalty, marker in (("layer", "o"), ("size", "s")):
            found = [(lam, groups[name]) for lam in LAMBDAS if (name := f"taps {lam:g} {penalty}") in groups]
            if not found:
                continue
            shares = [100 * statistics.fmean(r["share"] for r in group.values()) for _, group in found]
            means = [interval([100 * r["test"] for r in group.values()]) for _, group in found]
            axes.errorbar(
                shares,
                [m for m, _ in means],
                yerr=[0.0 if math.isnan(half) else half for _, half in means],
                fmt=f"{marker}-",
                capsize=3,
                label=f'TAPS, penalty="{penalty}"',
            )
            for (lam, _), x, (y, _) in zip(found, shares, means, strict=True):
                axes.annotate(f"λ {lam:g}", (x, y), textcoords="offset points", xytext=(4, -11), fontsize=8)
        if "full" in groups:
            mean, half = interval([100 * r["test"] for r in groups["full"].values()])
            axes.axhline(mean, color="black", lw=1, label="fine-tuning")
            if not math.isnan(half):
                axes.axhspan(mean - half, mean + half, color="black", alpha=0.08, lw=0)
            axes.axhline(mean - 1.0, color="black", lw=0.8, ls=":", label="one point below")
        axes.axvline(100 * SMALL, color="grey", lw=0.8, ls="--")
        if not groups:
            axes.set_title(f"{task} (not run)")
            continue
        counts = sorted({len(group) for group in groups.values()})
        axes.set_title(f"{task} ({' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds)")
        axes.set_xlabel("gated weights open, %")
        axes.set_ylabel("test accuracy, %")
        axes.set_xlim(0, 103)
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "plot"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--only", nargs="*", default=[], help="names of methods")
    parser.add_argument("--png", type=Path, default=Path("docs/study-resnet20.png"))
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.command == "run":
        if not args.data.is_dir():
            parser.error(f"--data: no folder {args.data}; it must hold the files that docs/study.md names")
        args.results.parent.mkdir(parents=True, exist_ok=True)
        run(args.data, args.results, args.tasks, args.seeds, args.epochs, args.only)
    elif args.command == "plot":
        plot(args.results, args.png, args.epochs)
    else:
        print(table(args.results, args.epochs))


if __name__ == "__main__":
    main()
