"""Methods beside each other on pretrained ImageNet and CIFAR bases, joint beside incremental training, and the prior of
BoRA over small tasks.

    python benchmarks/compare_study.py run   --data ../shared/data --results benchmarks/results/compare.jsonl
    python benchmarks/compare_study.py steps --data ../shared/data --results benchmarks/results/compare.jsonl
    python benchmarks/compare_study.py table --results benchmarks/results/compare.jsonl
    python benchmarks/compare_study.py plot  --results benchmarks/results/compare.jsonl --docs docs

`run` appends one JSON line for each training run and skips those that are there, so it can be stopped and started at
will. Two processes of one thread each train side by side. Every run: SGD with momentum .9 and a cosine to zero, batches
of 32, a tenth of the training data held out, no augmentation, ten epochs (ResNet-20 on handwritten characters and on
its three tasks together: twenty). A method's rate is the best of three on the held-out part
of one task (signs), one seed and fewer epochs, and serves all of that base's tasks; a test split is read once, at the
end of a run. `steps` then times a step of each method in turns and wants a quiet machine.

Parts: `methods` (MobileNetV2 at 64 pixels on two tasks and at 96 on one, ResNet-20 on three), `joint` (ResNet-20, three
tasks), `prior` (ResNet-20, ten groups of handwritten characters as small tasks).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import forget_peak, resident
from real import base_of, task_of
from study import cut_torn_line, number, read

import taps_ext
from taps_ext.methods import MethodConfig, parse_methods, rcm
from taps_ext.plot import Point, tradeoff
from taps_ext.study.compare import RISING, Comparison, Row, interval, rise
from taps_ext.train import TrainConfig, Trainer

SEEDS = (0, 1, 2)
TRIAL_EPOCHS, EPOCHS = 4, 10
LONGER = 20  # epochs of ResNet-20 on handwritten characters, which most methods still learn at ten
CENTRE = 0.01  # of the three rates, for what trains whole weights
CENTRE_SMALL = 0.03  # and for what trains few values
WHOLE = ("taps", "full", "separate")
COMMON = ("probe", "scale-bias", "depthwise", "lora:8", "taps", "full")
MOBILENET = (*COMMON, "separate:bottom=0.2", "separate:top=0.2")
LARGE = ("probe", "scale-bias", "depthwise", "taps", "full")  # at 96 pixels
LAYERS = (1, 4, 7, 13)  # of the 19 convolutions of ResNet-20, from either end
MATCHED = ((7, 1), (13, 4))  # the most layers at the bottom that store less than so many at the top
CURVES = tuple(f"separate:{side}={count}" for count in LAYERS for side in ("bottom", "top"))
RESNET = ("probe", "scale-bias", "lora:8", "selective-lora:8", "rcm", "rcm:start=response", "taps", "full", *CURVES)
TASKS = {"mobilenet": ("signs", "omniglot"), "resnet": ("signs", "omniglot-1", "omniglot-2")}
JOINT = ("full", "lean", "incremental", "bottoms", "multi-head")
TAUS = ("0", "1", "10", "100", "1000", "inf")
LAM = 0.5


@dataclass(frozen=True)
class Job:
    """One training run. `part` is "trial", "methods", "joint" or "prior"."""

    part: str
    base: str
    size: int
    task: str
    method: str
    lr: float
    seed: int
    epochs: int

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(asdict(self).values())


def rates(method: str) -> list[float]:
    """The three that a method has."""
    centre = CENTRE if method.startswith(WHOLE) else CENTRE_SMALL
    return [centre, centre / 10**0.5, centre * 10**0.5]


# --- one run ------------------------------------------------------------------------------------


def config_of(job: Job) -> tuple[MethodConfig, str, TrainConfig]:
    """A run's method, the mode of `fit`, and its settings."""
    settings = TrainConfig(epochs=job.epochs, lr=job.lr, seed=job.seed, warmup_epochs=min(2, job.epochs - 1))
    if job.part == "joint":
        method, mode = {
            "full": (taps_ext.JointTapsConfig(lam=LAM), "joint"),
            "lean": (taps_ext.JointTapsConfig(lam=LAM), "lean"),
            "incremental": (taps_ext.TapsConfig(lam=LAM), "incremental"),
            "bottoms": (taps_ext.SeparateLayersConfig(bottom=7, joint=True), "joint"),
            "multi-head": (taps_ext.SeparateLayersConfig(bottom=0, joint=True), "joint"),
        }[job.method]
        return method, mode, settings
    if job.part == "prior":
        tied = replace(settings, hierarchy=float(job.method), select="last")
        return taps_ext.LoraConfig(rank=4), "joint", tied
    return parse_methods(job.method, LAM)[job.method], "incremental", settings


def tasks_of(job: Job) -> list[str]:
    if job.part == "joint":
        return list(TASKS["resnet"])
    return [f"group-{i}" for i in range(10)] if job.part == "prior" else [job.task]


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Train one job; its record."""
    torch.set_num_threads(1)
    method, mode, settings = config_of(job)
    found = {name: task_of(folder, name, job.size, test=job.part != "trial") for name in tasks_of(job)}
    base = base_of(folder, job.base)
    probe = next(iter(found.values()))[0].train[0][:64]
    with torch.no_grad():
        before = base(probe)
    before_bytes = forget_peak()
    model = taps_ext.TaskModel(base, method)
    torch.manual_seed(job.seed)
    for name, (_, classes) in found.items():
        model.add_task(name, num_classes=classes)
    if isinstance(method, taps_ext.RcmConfig) and method.start == "response":
        some = next(iter(found.values()))[0].train[0][:512]
        rcm.initialise(model, rcm.response_basis(model, some.split(64)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    started = time.process_time()  # of one thread: another run beside it does not count
    trainer = Trainer(model, {name: task for name, (task, _) in found.items()}, settings, quiet=True)
    record: dict[str, Any] = asdict(job)
    try:
        results = trainer.fit(mode)
    except taps_ext.DivergedError as error:
        return {**record, "val": 0.0, "test": None, "failed": str(error)}
    record["cpu_seconds"] = round(time.process_time() - started, 1)
    record |= {"peak_bytes": resident("VmHWM") - before_bytes, "trained": trained, **stored(model, list(found))}
    for key in ("val", "test"):
        values = [getattr(result, key).get("accuracy") for result in results.values()]
        record[key] = values if len(values) > 1 else values[0]
    joint = mode == "joint"
    keys = [f"{name}_val_accuracy" if joint else "val_accuracy" for name in found]
    rises = [rise([entry[key] for entry in r.history]) for r, key in zip(results.values(), keys, strict=True)]
    record["rise"] = rises if len(rises) > 1 else rises[0]
    record["share"] = sum(r.share for r in results.values()) / len(results)
    with torch.no_grad():
        record["base_bit_equal"] = bool(torch.equal(model.unload().eval()(probe), before))
    return {**record, "torch": torch.__version__}


def stored(model: taps_ext.TaskModel, names: list[str]) -> dict[str, Any]:
    """Values and file bytes of all tasks, what they share among them."""
    values = sum(model.report(name).parameters for name in names)
    families = {f.name: f for name in names if (f := model.state(name).family) is not None}
    shared = sum(p.numel() for family in families.values() for p in family.parameters())
    with tempfile.TemporaryDirectory() as folder:
        for family in families.values():
            if not family.digest:
                model.save_shared(family.name, Path(folder) / f"{family.name}.shared.taps")
        for name in names:
            model.save_task(name, Path(folder) / f"{name}.taps")
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {"parameters": values + shared, "shared": shared, "bytes": size}


# --- the grid -----------------------------------------------------------------------------------


def bases() -> dict[str, tuple[int, tuple[str, ...]]]:
    """Base -> pixels of its trials and finals, methods."""
    return {"resnet": (32, RESNET), "mobilenet": (64, MOBILENET)}


def trials() -> Iterator[Job]:
    for base, (size, methods) in bases().items():
        for method in methods:
            for lr in rates(method):
                yield Job("trial", base, size, "signs", method, lr, 0, TRIAL_EPOCHS)


def chosen(records: list[dict[str, Any]], base: str, method: str) -> float | None:
    """The rate with the best trial, of equal ones the middle one; None until all have been tried."""
    found = {r["lr"]: r["val"] for r in records if (r["part"], r["base"], r["method"]) == ("trial", base, method)}
    tried = rates(method)
    return max(tried, key=lambda lr: found[lr]) if all(lr in found for lr in tried) else None


def epochs_of(base: str, task: str) -> int:
    """Epochs of a final run; "all" are the three tasks of ResNet-20."""
    return LONGER if base == "resnet" and task.startswith(("omniglot", "all")) else EPOCHS


def finals(records: list[dict[str, Any]]) -> Iterator[Job]:
    """What can be trained once its rate is known, the first seed of everything first."""
    joint_rate = {name: "taps" for name in JOINT} | {"bottoms": "separate:bottom=7", "multi-head": "full"}
    for seed in SEEDS:
        for base, (size, methods) in bases().items():
            for method in methods:
                lr = chosen(records, base, method)
                tasks = TASKS[base][:2] if method in CURVES else TASKS[base]
                for task in tasks if lr is not None else ():
                    yield Job("methods", base, size, task, method, lr, seed, epochs_of(base, task))
        for name in JOINT:
            if (lr := chosen(records, "resnet", joint_rate[name])) is not None:
                yield Job("joint", "resnet", 32, "all", name, lr, seed, epochs_of("resnet", "all"))
        if (lr := chosen(records, "resnet", "lora:8")) is not None:
            for tau in TAUS:
                yield Job("prior", "resnet", 32, "groups", tau, lr, seed, EPOCHS)
        for method in LARGE:
            if (lr := chosen(records, "mobilenet", method)) is not None:
                yield Job("methods", "mobilenet", 96, "signs", method, lr, seed, EPOCHS)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in Job.__dataclass_fields__)


def waiting(results: Path, only: list[str]) -> Iterator[Job]:
    records = read(results)
    done = {key_of(record) for record in records if record["part"] != "step"}
    for job in [*trials(), *finals(records)]:
        if job.key not in done and (not only or job.part in only or job.part == "trial"):
            yield job


def run_all(folder: Path, results: Path, only: list[str], workers: int, max_minutes: float | None) -> None:
    """Train what is missing, `workers` runs at a time, each in a process of its own."""
    cut_torn_line(results)
    until = math.inf if max_minutes is None else time.monotonic() + 60.0 * max_minutes
    context = multiprocessing.get_context("spawn")
    running: dict[Future[dict[str, Any]], Job] = {}
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        while True:
            begun = {job.key for job in running.values()}
            for job in waiting(results, only):
                if len(running) >= workers or time.monotonic() > until:
                    break
                if job.key not in begun:
                    running[pool.submit(run, job, folder)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, record = running.pop(future), future.result()
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                test = record["val"] if record["test"] is None else record["test"]
                found = (test, record.get("cpu_seconds"))
                print(job.part, job.base, job.size, job.task, job.method, job.lr, job.seed, *found)


# --- seconds and bytes of a step ----------------------------------------------------------------


def steps(folder: Path, results: Path, rounds: int) -> None:
    """Time a training step of every method, in turns, on a quiet machine; the peak is the predicted one."""
    records = [record for record in read(results) if record["part"] != "step"]
    sizes = {("resnet", 32): RESNET, ("mobilenet", 64): MOBILENET, ("mobilenet", 96): LARGE}
    found = []
    for (base, size), methods in sizes.items():
        task, classes = task_of(folder, "signs", size)
        x, y = task.train[0][:32], task.train[1][:32]
        models = {name: prepared(folder, base, name, classes) for name in methods}
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for turn in range(rounds + 1):
            for name, (model, optimizer) in models.items():
                started = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - started)
        for name, (model, _) in models.items():
            batch = torch.empty_like(x, device="meta")
            peak = taps_ext.estimate(model, [batch], task="signs", optimizer="sgd").peak
            added = taps_ext.operations(model, [batch[:1]], task="signs").added
            where = {"base": base, "size": size, "method": name}
            costs = {"seconds": statistics.median(seconds[name]), "peak": peak, "added": added}
            found.append({"part": "step", **where, **costs})
    lines = [json.dumps(record) + "\n" for record in [*records, *found]]
    draft = results.with_suffix(".tmp")
    draft.write_text("".join(lines), encoding="utf-8")
    draft.replace(results)


def prepared(folder: Path, base: str, name: str, classes: int) -> tuple[taps_ext.TaskModel, torch.optim.Optimizer]:
    """A task as it starts, all of its gates open, and an optimizer."""
    model = taps_ext.TaskModel(base_of(folder, base), parse_methods(name, LAM)[name])
    model.add_task("signs", num_classes=classes)
    model.set_task("signs")
    model.train()
    return model, torch.optim.SGD(model.parameter_groups("signs", lr=1e-4), momentum=0.9)


# --- what it says -------------------------------------------------------------------------------

By = dict[tuple[str, int, str, str], dict[int, dict[str, Any]]]


def by_method(results: Path) -> By:
    """(base, size, task, method) -> seed -> record, of runs that did not diverge."""
    found: By = {}
    for r in read(results):
        if r["part"] == "methods" and r["test"] is not None and r["epochs"] == epochs_of(r["base"], r["task"]):
            found.setdefault((r["base"], r["size"], r["task"], r["method"]), {})[r["seed"]] = r
    return found


def comparisons(results: Path) -> dict[str, Comparison]:
    """Title -> the rows of a base at a size."""
    costs = {(r["base"], r["size"], r["method"]): r for r in read(results) if r["part"] == "step"}
    found: dict[str, Comparison] = {}
    for (base, size, task, method), seeds in by_method(results).items():
        runs = [seeds[seed] for seed in sorted(seeds)]
        tests = tuple(run["test"] for run in runs)
        mean, half = interval(tests)
        cost = costs.get((base, size, method), {"seconds": math.nan, "peak": None, "added": None})
        row = Row(
            method=method,
            task=task,
            lr=runs[0]["lr"],
            tests=tests,
            test=mean,
            half=half,
            val=statistics.fmean(run["val"] for run in runs),
            parameters=round(statistics.fmean(run["parameters"] for run in runs)),
            trained=runs[0]["trained"],
            bytes=round(statistics.fmean(run["bytes"] for run in runs)),
            share=statistics.fmean(run["share"] for run in runs),
            step=cost["seconds"],
            peak=cost["peak"],
            added=cost["added"],
            converged=statistics.fmean(run["rise"] for run in runs) <= RISING,
        )
        title = {"resnet": "ResNet-20", "mobilenet": "MobileNetV2"}[base] + f", {size} pixels"
        found.setdefault(title, Comparison([], "accuracy")).rows.append(row)
    for comparison in found.values():
        comparison.rows.sort(key=lambda row: (row.task, row.bytes))
    return found


def paired(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> list[float]:
    """Points of test accuracy by which one method is above another, by seed."""
    return [100 * (one[seed]["test"] - other[seed]["test"]) for seed in sorted(set(one) & set(other))]


def verdict(values: list[float]) -> str:
    """Points, with their 95 % interval, and whether it holds zero."""
    mean, half = interval(values)
    if math.isnan(half):
        return f"{mean:+.1f} (one seed)"
    says = "held" if mean > half else "did not hold" if mean < -half else "open"
    return f"{mean:+.1f} ± {half:.1f}: {says}"


def claims(found: By) -> list[str]:
    """What the papers claim, here."""
    lines = ["| claim | where | points | ", "|---|---|---|"]
    places = list(dict.fromkeys(key[:3] for key in found))

    def line(claim: str, place: tuple[str, int, str], better: str, worse: str) -> None:
        one, other = found.get((*place, better)), found.get((*place, worse))
        if one and other and (values := paired(one, other)):
            lines.append(f"| {claim} | {place[0]} {place[1]}, {place[2]} | {verdict(values)} |")

    for place in places:
        probe, full = found.get((*place, "probe")), found.get((*place, "full"))
        for patch in ("scale-bias", "depthwise"):
            runs = found.get((*place, patch))
            if not (probe and full and runs):
                continue
            seeds = sorted(set(probe) & set(full) & set(runs))
            ends = {s: {"test": (probe[s]["test"] + full[s]["test"]) / 2} for s in seeds}
            gaps = [100 * (full[s]["test"] - probe[s]["test"]) for s in seeds]
            if not seeds or statistics.fmean(gaps) <= 0:
                continue  # there is no gap that could be closed
            closed = statistics.fmean(100 * (runs[s]["test"] - probe[s]["test"]) for s in seeds)
            share = 100 * closed / statistics.fmean(gaps)
            above = verdict(paired(runs, ends))  # by points, since a seed's own gap may be small
            name = f"{patch} closes most of the gap between probe and fine-tuning"
            lines.append(
                f"| {name} | {place[0]} {place[1]}, {place[2]} | {share:.0f} % of it; {above} above its half |"
            )
    for place in places:
        for ends in (0.2, *LAYERS):
            line(
                f"bottom above top, {ends} {'of the weights' if ends < 1 else 'layers'}",
                place,
                f"separate:bottom={ends}",
                f"separate:top={ends}",
            )
        for bottom, top in MATCHED:
            line(
                f"bottom {bottom} layers above top {top}, which store more",
                place,
                f"separate:bottom={bottom}",
                f"separate:top={top}",
            )
    for place in places:
        for other in ("probe", "scale-bias", "depthwise", "lora:8", "rcm", "full"):
            line(f"TAPS above {other}", place, "taps", other)
    for place in places:
        for other in ("lora:8", "full"):
            line(f"RCM above {other}", place, "rcm", other)
        for other in ("scale-bias", "depthwise", "lora:8", "full"):
            line(f"a fifth of the weights at the bottom above {other}", place, "separate:bottom=0.2", other)
        line("selective LoRA above LoRA", place, "selective-lora:8", "lora:8")
        line("RCM's response initialisation above none", place, "rcm:start=response", "rcm")
    return lines


def joint_table(results: Path) -> list[str]:
    """Joint beside incremental training."""
    lines = [
        "| training | " + " | ".join(TASKS["resnet"]) + " | mean | above incremental | "
        "values stored | shared | files | peak | s an epoch | s in all |"
    ]
    lines.append("|---" * 12 + "|")
    runs = [r for r in read(results) if r["part"] == "joint" and r["test"] is not None]
    runs = [r for r in runs if r["epochs"] == epochs_of(r["base"], r["task"])]
    means = {t: {r["seed"]: {"test": statistics.fmean(r["test"])} for r in runs if r["method"] == t} for t in JOINT}
    for name in JOINT:
        chosen = [r for r in runs if r["method"] == name]
        if not chosen:
            continue
        above = paired(means[name], means["incremental"])
        tasks = [interval(100 * r["test"][i] for r in chosen) for i in range(3)]
        mean = interval(100 * statistics.fmean(r["test"]) for r in chosen)
        seconds = statistics.fmean(r["cpu_seconds"] for r in chosen)
        passes = 2 * LONGER if name == "lean" else LONGER
        cells = [number(value) for value in (*tasks, mean)]
        cells.append("" if name == "incremental" or not above else number(interval(above)))
        cells += [f"{statistics.fmean(r['parameters'] for r in chosen):,.0f}", f"{chosen[0]['shared']:,}"]
        cells += [f"{statistics.fmean(r['bytes'] for r in chosen) / 1e6:.2f} MB"]
        cells += [f"{statistics.fmean(r['peak_bytes'] for r in chosen) / 1e6:.0f} MB"]
        label = "incremental (TAPS)" if name == "incremental" else name
        lines.append(f"| {label} | {' | '.join(cells)} | {seconds / passes:.1f} | {seconds:.0f} |")
    return lines


def prior_table(results: Path) -> list[str]:
    """BoRA's precision, and by how much each is above separate runs (tau = 0), paired by seed."""
    done = [r for r in read(results) if r["part"] == "prior" and r["test"] is not None]
    runs = {t: {r["seed"]: r for r in done if r["method"] == t} for t in TAUS}
    lines = ["| tau | mean test accuracy of ten tasks | above tau = 0 |", "|---|---|---|"]
    for tau, seeds in runs.items():
        if seeds:
            means = {seed: {"test": statistics.fmean(r["test"])} for seed, r in seeds.items()}
            apart = {seed: {"test": statistics.fmean(r["test"])} for seed, r in runs["0"].items()}
            above = "" if tau == "0" or not (values := paired(means, apart)) else number(interval(values))
            lines.append(f"| {tau} | {number(interval(100 * r['test'] for r in means.values()))} | {above} |")
    return lines


def tables(results: Path) -> str:
    """All of it in Markdown."""
    lines = []
    for title, comparison in comparisons(results).items():
        lines += [f"## {title}", "", comparison.table(), ""]
    lines += ["## The papers' claims, here", "", *claims(by_method(results)), ""]
    lines += ["## Joint and incremental training", "", *joint_table(results), ""]
    lines += ["## BoRA's prior", "", *prior_table(results), ""]
    return "\n".join(lines)


def plot(results: Path, docs: Path) -> None:
    """A panel for each base, size and task."""
    panels: dict[str, list[Point]] = {}
    for title, comparison in comparisons(results).items():
        for task in dict.fromkeys(row.task for row in comparison.rows):
            rows = [row for row in comparison.rows if row.task == task]
            panels[f"{title.removesuffix(' pixels')}, {task}"] = [
                Point(row.method, row.bytes, 100 * row.test, 100 * row.half, row.converged) for row in rows
            ]
    tradeoff(docs / "compare.png", panels, columns=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "steps", "table", "plot"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--only", nargs="*", default=[], choices=["methods", "joint", "prior"], help="parts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12, help="timed steps a method")
    parser.add_argument("--max-minutes", type=float, help="begin no run after this time")
    args = parser.parse_args()
    if args.command in ("run", "steps") and not args.data.is_dir():
        parser.error(f"--data: no folder {args.data}")
    if args.command == "run":
        args.results.parent.mkdir(parents=True, exist_ok=True)
        run_all(args.data, args.results, args.only, args.workers, args.max_minutes)
    elif args.command == "steps":
        steps(args.data, args.results, args.rounds)
    elif args.command == "plot":
        plot(args.results, args.docs)
    else:
        print(tables(args.results))


if __name__ == "__main__":
    main()
