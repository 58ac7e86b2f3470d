"""Methods beside each other on pretrained ImageNet and CIFAR bases, joint beside incremental training, and the prior of
BoRA over small tasks.

    python benchmarks/compare_study.py run   --data ../shared/data --results benchmarks/results/compare.jsonl
    python benchmarks/compare_study.py table --results benchmarks/results/compare.jsonl
    python benchmarks/compare_study.py plot  --results benchmarks/results/compare.jsonl --docs docs

`run` appends one JSON line for each training run and skips those that are there, so it can be stopped and started at
will. Two processes of one thread each train side by side. Every run: SGD with momentum .9 and a cosine to zero, batches
of 32, a tenth of the training data held out, no augmentation. A method's rate is the best of three on the held-out part
of one task (signs), one seed and fewer epochs, and serves all of that base's tasks; a test split is read once, at the
end of a run.

Parts: `methods` (MobileNetV2 at 64 pixels on two tasks and at 96 on one, ResNet-20 on three), `joint` (ResNet-20, three
tasks), `prior` (ResNet-20, ten groups of handwritten characters as small tasks).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from study import cut_torn_line, read
from torch import Tensor, nn

import taps_ext
from taps_ext.methods import MethodConfig, rcm
from taps_ext.study import parse_methods
from taps_ext.train import Task, TrainConfig, Trainer

SEEDS = (0, 1, 2)
TRIAL_EPOCHS, EPOCHS, PRIOR_EPOCHS = 4, 10, 15
CENTRE = 0.01  # of the three rates, for what trains whole weights
CENTRE_SMALL = 0.03  # and for what trains few values
WHOLE = ("taps", "full", "separate")
COMMON = ("probe", "scale-bias", "depthwise", "lora:8", "taps", "full")
MOBILENET = (*COMMON, *(f"separate:{side}={share}" for share in (0.2, 0.4) for side in ("bottom", "top")))
LARGE = ("probe", "scale-bias", "depthwise", "lora:8", "taps", "full")  # at 96 pixels
LAYERS = (1, 4, 7, 13)  # of the 19 convolutions of ResNet-20, from either end
RESNET = (
    *("probe", "scale-bias", "lora:8", "selective-lora:8", "rcm", "rcm:start=response", "taps", "full"),
    *(f"separate:{side}={count}" for count in LAYERS for side in ("bottom", "top")),
)
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


# --- data and bases -----------------------------------------------------------------------------


def images(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 `[N, H, W, 3]` or `[N, H, W]` as the ImageNet bases take it: float32 `[N, 3, size, size]`."""
    x = torch.from_numpy(pixels).float().div(255)
    x = x[..., None].expand(*x.shape, 3) if x.dim() == 3 else x
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((x - mean) / std).permute(0, 3, 1, 2)
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)


def arrays(folder: Path, task: str) -> dict[str, np.ndarray]:
    """Pixels and labels of a task: "omniglot-1" and "omniglot-2" are its characters' halves, "group-3" the fourth tenth
    of the first 240."""
    name, _, part = task.partition("-")
    file = "omniglot" if name == "group" else name
    with np.load(folder / f"{file}.npz", allow_pickle=False) as found:
        data = {key: found[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    if not part:
        return data
    if name == "group":
        first, last = 24 * int(part), 24 * int(part) + 24
    else:
        first, last = (0, 121) if part == "1" else (121, 242)
    for split in ("train", "test"):
        chosen = (data[f"y_{split}"] >= first) & (data[f"y_{split}"] < last)
        data[f"x_{split}"] = data[f"x_{split}"][chosen]
        data[f"y_{split}"] = data[f"y_{split}"][chosen] - first
    return data


def task_of(folder: Path, name: str, size: int, *, test: bool) -> tuple[Task, int]:
    """A task's data and its number of classes."""
    data = arrays(folder, name)
    splits = {s: (images(data[f"x_{s}"], size), torch.from_numpy(data[f"y_{s}"]).long()) for s in ("train", "test")}
    task = Task(train=splits["train"], test=splits["test"] if test else None)
    return task, int(data["y_train"].max()) + 1


def base_of(folder: Path, name: str) -> nn.Module:
    """A pretrained base in evaluation mode."""
    if name == "resnet":
        from resnet20 import pretrained

        return pretrained(folder / "resnet20-cifar10.safetensors").to(memory_format=torch.channels_last)
    import torchvision

    net = torchvision.models.mobilenet_v2()
    net.load_state_dict(taps_ext.store.read_safetensors(folder / "mobilenet_v2-imagenet1k.safetensors")[0])
    return net.eval().to(memory_format=torch.channels_last)


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


def rise(history: list[dict[str, Any]], key: str) -> float:
    """By how much the validation accuracy of the last fifth of the epochs is above what was reached before."""
    values, late = [entry[key] for entry in history], max(1, len(history) // 5)
    return float(max(values[-late:]) - max(values[:-late]))


def resident(key: str) -> int:
    """Bytes that the kernel counts for this process: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> int:
    """Let "VmHWM" start from here; returns "VmRSS"."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Train one job; its record."""
    os.nice(max(0, 10 - os.nice(0)))
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
    started = time.perf_counter()
    trainer = Trainer(model, {name: task for name, (task, _) in found.items()}, settings, quiet=True)
    record: dict[str, Any] = asdict(job)
    try:
        results = trainer.fit(mode)
    except taps_ext.DivergedError as error:
        return {**record, "val": 0.0, "test": None, "failed": str(error)}
    record["seconds"] = round(time.perf_counter() - started, 1)
    record |= {"peak_bytes": resident("VmHWM") - before_bytes, "trained": trained, **stored(model, list(found))}
    for key in ("val", "test"):
        values = [getattr(result, key).get("accuracy") for result in results.values()]
        record[key] = values if len(values) > 1 else values[0]
    joint = mode == "joint"
    keys = [f"{name}_val_accuracy" if joint else "val_accuracy" for name in found]
    rises = [rise(r.history, key) for r, key in zip(results.values(), keys, strict=True)]
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


def finals(records: list[dict[str, Any]]) -> Iterator[Job]:
    """What can be trained once its rate is known, the first seed of everything first."""
    joint_rate = {name: "taps" for name in JOINT} | {"bottoms": "separate:bottom=7", "multi-head": "full"}
    for seed in SEEDS:
        for base, (size, methods) in bases().items():
            for method in methods:
                lr = chosen(records, base, method)
                for task in TASKS[base] if lr is not None else ():
                    yield Job("methods", base, size, task, method, lr, seed, EPOCHS)
        for name in JOINT:
            if (lr := chosen(records, "resnet", joint_rate[name])) is not None:
                yield Job("joint", "resnet", 32, "all", name, lr, seed, EPOCHS)
        if (lr := chosen(records, "resnet", "lora:8")) is not None:
            for tau in TAUS:
                yield Job("prior", "resnet", 32, "groups", tau, lr, seed, PRIOR_EPOCHS)
        for method in LARGE:
            if (lr := chosen(records, "mobilenet", method)) is not None:
                yield Job("methods", "mobilenet", 96, "signs", method, lr, seed, EPOCHS)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in Job.__dataclass_fields__)


def waiting(results: Path, only: list[str]) -> Iterator[Job]:
    records = read(results)
    done = {key_of(record) for record in records}
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
                print(job.part, job.base, job.size, job.task, job.method, job.lr, job.seed, test, record.get("seconds"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], choices=["methods", "joint", "prior"], help="parts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-minutes", type=float, help="begin no run after this time")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data: no folder {args.data}")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    run_all(args.data, args.results, args.only, args.workers, args.max_minutes)


if __name__ == "__main__":
    main()
