"""Study of maps: what MTLoRA and others come to on CamVid's classes, boundaries and distances, at equal steps.

    python benchmarks/pretrain.py swin   --data ../shared/data --out runs/bases
    python benchmarks/dense_study.py plan  --data ../shared/data --bases runs/bases --results FILE
    python benchmarks/dense_study.py run   --data ../shared/data --bases runs/bases --results FILE
    python benchmarks/dense_study.py patch --data ../shared/data --results FILE
    python benchmarks/dense_study.py table --results FILE
    python benchmarks/dense_study.py plot  --results FILE --docs docs

Two bases: a small Swin pretrained on CIFAR-10 and ImageNet's MobileNetV2. Every run: three tasks on the
same images of 160 x 120 in one joint run, a light decoder for each, AdamW with a cosine to zero, batches of 8, images
enlarged by up to 1.5 and mirrored, the last epoch; the test split is read once, at its end. So all methods of a base
take the same number of steps, over the same images in the same order. A method's rate is the better one of two, by
`delta_m` between them on the validation split after a short run of the first seed. `run` appends one JSON line for each
run and skips those that are there; two processes of one thread each train side by side. `plan` times a few steps of
each method and says how long what is missing takes.

"single" and MobileNetV2's "full" are fine-tuning, each task its own network: what `delta_m` is against, as the mean
over seeds. The Swin's "full" is one network that all tasks train, with a decoder each.

`patch` brings ImageNet's classifier to segmentation and back: the values of the scale-and-bias task as a patch of the
classifier's own tensors, with which its backbone computes what the task does, and which leaves no bit behind.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_study import verdict
from memory import forget_peak, resident
from pretrain import BATCH as PRETRAIN_BATCH
from pretrain import SETTINGS as PRETRAIN
from real import MEAN, STD, base_of
from small_bases import SWIN_PIXELS, SWIN_TAPS, make, swin
from study import cut_torn_line, number, read
from torch import Tensor, nn

import taps_ext
from taps_ext import patch as patches
from taps_ext import store
from taps_ext.data.dense import MapTask, open_dense
from taps_ext.dense import DenseBase, LightDecoder, MeanIoU, delta_m
from taps_ext.methods import MethodConfig
from taps_ext.plot import Point, tradeoff
from taps_ext.study.compare import interval
from taps_ext.train import MultiTask, Task, TrainConfig, Trainer
from taps_ext.train.dense import map_task, outputs_of

SIZE = (120, 160)
BATCH = 8
EPOCHS = {"swin": 15, "mobilenet": 8}
TRIAL_EPOCHS = 3
LIMIT_HOURS = 4.0  # on two cores, with the pretraining
CLASSES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
VOID = 11
KINDS = {"classes": "segmentation", "outlines": "boundaries", "distance": "distance"}
METRIC = {"classes": "miou", "outlines": "f", "distance": "rmse"}
LARGER = {"classes": True, "outlines": True, "distance": False}
WEIGHTS = {"classes": 1.0, "outlines": 5.0, "distance": 2.0}  # of the losses
LAM = 0.3
METHODS: dict[str, dict[str, MethodConfig]] = {
    "swin": {
        "single": taps_ext.FullConfig(),
        "decoders": taps_ext.ProbeConfig(),
        "mtlora:16": taps_ext.MTLoraConfig(rank=16),
        "lora:16": taps_ext.LoraConfig(rank=16),
        "mtlora:4": taps_ext.MTLoraConfig(rank=4),
        "lora:4": taps_ext.LoraConfig(rank=4),
        "mtlora+:16": taps_ext.MTLoraConfig(rank=16, plus=True),
        "full": taps_ext.SeparateLayersConfig(bottom=0, joint=True),
        "joint-taps": taps_ext.JointTapsConfig(lam=LAM),
    },
    "mobilenet": {
        "full": taps_ext.FullConfig(),
        "decoders": taps_ext.ProbeConfig(),
        "scale-bias": taps_ext.ScaleBiasConfig(),
        "rcm": taps_ext.RcmConfig(),
        "taps": taps_ext.TapsConfig(lam=LAM),
    },
}
REFERENCE = {"swin": "single", "mobilenet": "full"}
RATE_OF = {"mtlora:4": "mtlora:16", "mtlora+:16": "mtlora:16", "lora:4": "lora:16"}  # tried once for all ranks
RATES = {"whole": (3e-4, 1e-3), "small": (1e-3, 4e-3)}
WHOLE = ("single", "full", "joint-taps", "taps")  # what trains whole weights
THREE_SEEDS = ("decoders", "mtlora:16", "mtlora:4", "lora:16", "lora:4")


@dataclass(frozen=True)
class Job:
    """One training run. `part` is "trial" or "final". images: of each split, None for all."""

    part: str
    base: str
    method: str
    lr: float
    seed: int
    epochs: int
    images: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(asdict(self).values())

    @property
    def folder(self) -> str:
        return f"{self.base}-{self.method.replace(':', '-')}-{self.seed}-{self.part}-{self.lr:g}"


@dataclass(frozen=True)
class Settings:
    """What a call of the script says of all of its jobs. epochs: None as each base has them."""

    data: Path
    bases: Path
    runs: Path
    images: int | None = None
    epochs: int | None = None
    methods: tuple[str, ...] = ()
    threads: int = 1


# --- one run ------------------------------------------------------------------------------------


def backbone_of(settings: Settings, name: str) -> nn.Module:
    """A pretrained backbone for images of `SIZE`, with its classifier."""
    if name == "mobilenet":
        return base_of(settings.data, "mobilenet")
    path = settings.bases / "swin.safetensors"
    if not path.exists():
        raise SystemExit(f"{path}: expected the pretrained base; python benchmarks/pretrain.py swin makes it")
    made = swin(SIZE, num_classes=10)
    made.load_state_dict(store.read_safetensors(path)[0])
    return made.eval()


def dense_base(settings: Settings, name: str) -> DenseBase:
    taps = SWIN_TAPS if name == "swin" else None
    return DenseBase(backbone_of(settings, name), taps).eval()


def tasks_of(settings: Settings, base: DenseBase, *, test: bool) -> tuple[dict[str, Task], dict[str, int]]:
    """CamVid's three tasks, and the outputs of their decoders."""
    maps = {
        name: MapTask(kind=kind, ignore=(VOID,), classes=len(CLASSES) if kind == "segmentation" else None)
        for name, kind in KINDS.items()
    }
    geometry = {"size": SIZE, "scale": (1.0, 1.5), "normalize": (MEAN, STD)}
    source = open_dense(f"dense:{settings.data / 'camvid.zip'}", maps, geometry)
    splits = {name: data for name, data in source.splits().items() if test or name != "test"}
    for data in splits.values():
        data.stems = data.stems[: settings.images]
    shared = {split: MultiTask(data) for split, data in splits.items()}
    named = {name: CLASSES if kind == "segmentation" else None for name, kind in KINDS.items()}
    taps = [tap.name for tap in base.taps]
    found = {name: map_task(name, maps[name], named[name], source=source, splits=shared, taps=taps) for name in KINDS}
    return found, {name: outputs_of(maps[name], named[name], name) for name in KINDS}


def model_of(settings: Settings, job: Job, base: DenseBase, outputs: Mapping[str, int]) -> taps_ext.TaskModel:
    """The job's tasks on a base; the decoders of one seed are the same for every method."""
    model = taps_ext.TaskModel(base, METHODS[job.base][job.method])
    for name, count in outputs.items():
        torch.manual_seed(1000 * job.seed + len(name))
        decoder = LightDecoder(base.channels, count)
        model.add_task(name, head=decoder)
    return model


def train_config(job: Job) -> TrainConfig:
    return TrainConfig(
        epochs=job.epochs,
        batch_size=BATCH,
        optimizer="adamw",
        lr=job.lr,
        seed=job.seed,
        warmup_epochs=min(2, job.epochs - 1),
        lr_warmup=min(1.0, job.epochs / 4),
        loss_weights=WEIGHTS,
        select="last",
    )


def run(job: Job, settings: Settings) -> dict[str, Any]:
    """Train one job; its record. The files of its tasks stay in the folder of runs."""
    torch.set_num_threads(settings.threads)
    base = dense_base(settings, job.base)
    tasks, outputs = tasks_of(settings, base, test=job.part == "final")
    probe = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = base(probe)
    resting = forget_peak()
    model = model_of(settings, job, base, outputs)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    begun, cpu = time.perf_counter(), time.process_time()
    record: dict[str, Any] = asdict(job)
    try:
        results = Trainer(model, tasks, train_config(job), quiet=True).fit("joint")
    except taps_ext.DivergedError as error:
        return {**record, "val": None, "test": None, "failed": str(error)}
    record["seconds"] = round(time.perf_counter() - begun, 1)
    record["cpu_seconds"] = round(time.process_time() - cpu, 1)
    record |= {"peak_bytes": resident("VmHWM") - resting, "trained": trained}
    for split in ("val", "test"):
        found = {name: getattr(result, split).get(METRIC[name]) for name, result in results.items()}
        record[split] = None if None in found.values() else found
    first = next(iter(results.values()))  # one history of all
    keys = {name: f"{name}_val_{METRIC[name]}" for name in KINDS}
    record["history"] = {name: [round(entry[key], 4) for entry in first.history] for name, key in keys.items()}
    record["share"] = {name: round(result.share, 4) for name, result in results.items()}
    record |= saved(model, settings.runs / job.folder)
    with torch.no_grad():
        record["base_bit_equal"] = bool(torch.equal(model.unload().eval()(probe), before))
    return {**record, "threads": settings.threads, "torch": torch.__version__}


def saved(model: taps_ext.TaskModel, folder: Path) -> dict[str, int]:
    """Write the tasks and what they share; the values in them and the bytes of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    values = sum(model.report(name).parameters for name in model.tasks)
    shared = sum(p.numel() for family in model.families.values() for p in family.parameters())
    written = 0
    for family in list(model.families.values()):
        path = folder / f"{family.name}.shared.taps"
        model.save_shared(family.name, path)
        written += path.stat().st_size
    for name in model.tasks:
        model.save_task(name, folder / f"{name}.taps")
        written += (folder / f"{name}.taps").stat().st_size
    return {"parameters": values + shared, "shared": shared, "bytes": written}


# --- the grid -----------------------------------------------------------------------------------


def rates(method: str) -> tuple[float, float]:
    return RATES["whole" if method in WHOLE else "small"]


def grid(settings: Settings) -> list[tuple[str, str]]:
    """(base, method), of those that the call names."""
    every = [(base, method) for base, methods in METHODS.items() for method in methods]
    return [pair for pair in every if not settings.methods or ":".join(pair) in settings.methods]


def epochs_of(settings: Settings, base: str) -> int:
    return EPOCHS[base] if settings.epochs is None else settings.epochs


def tried_for(method: str) -> str:
    return RATE_OF.get(method, method)


def trials(settings: Settings) -> Iterator[Job]:
    epochs = TRIAL_EPOCHS if settings.epochs is None else settings.epochs
    for base, method in dict.fromkeys((base, tried_for(method)) for base, method in grid(settings)):
        for lr in rates(method):
            yield Job("trial", base, method, lr, 0, epochs, settings.images)


def chosen(records: list[dict[str, Any]], settings: Settings, base: str, method: str) -> float | None:
    """The rate with the better trial; None until both have been tried."""
    tried = [job for job in trials(settings) if (job.base, job.method) == (base, tried_for(method))]
    by_key = {key_of(record): record for record in records if record["part"] == "trial"}
    if any(job.key not in by_key for job in tried):
        return None
    good = [(job.lr, by_key[job.key]["val"]) for job in tried if by_key[job.key]["val"] is not None]
    if not good:
        return None
    best = good[0]
    for other in good[1:]:
        if delta_m(other[1], best[1], LARGER) > 0:
            best = other
    return best[0]


def finals(records: list[dict[str, Any]], settings: Settings) -> Iterator[Job]:
    """What can be trained once its rate is known, the first seed of everything first."""
    for seed in range(3):
        for base, method in grid(settings):
            lr = chosen(records, settings, base, method)
            if lr is not None and (seed < 2 or (base == "swin" and method in THREE_SEEDS)):
                yield Job("final", base, method, lr, seed, epochs_of(settings, base), settings.images)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in Job.__dataclass_fields__)


def waiting(results: Path, settings: Settings) -> Iterator[Job]:
    records = [record for record in read(results) if record["part"] in ("trial", "final")]
    done = {key_of(record) for record in records}
    for job in [*trials(settings), *finals(records, settings)]:
        if job.key not in done:
            yield job


def run_all(results: Path, settings: Settings, only: int | None, workers: int) -> None:
    """Train what is missing, or the first so many, `workers` runs at a time, each in a process of its own."""
    cut_torn_line(results)
    left = math.inf if only is None else only
    context = multiprocessing.get_context("spawn")
    running: dict[Future[dict[str, Any]], Job] = {}
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        while True:
            begun = {job.key for job in running.values()}
            for job in waiting(results, settings):
                if len(running) >= workers or left <= 0:
                    break
                if job.key not in begun:
                    left -= 1
                    running[pool.submit(run, job, settings)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, record = running.pop(future), future.result()
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                found = record["val"] if record["test"] is None else record["test"]
                print(job.part, job.base, job.method, job.lr, job.seed, found, record.get("cpu_seconds"), flush=True)


# --- how long it takes --------------------------------------------------------------------------


def plan(results: Path, settings: Settings, workers: int) -> str:
    """What is missing, and the hours that it takes by the processor's seconds of a step and of a batch of validation,
    on which what else the machine does has little say."""
    torch.set_num_threads(settings.threads)
    lines = ["| base | method | seconds a step | steps a run | runs missing | hours of a core |", "|---" * 6 + "|"]
    total = 0.0
    done = {key_of(record) for record in read(results) if record["part"] in ("trial", "final")}
    records = read(results)
    for base_name, method in grid(settings):
        jobs = [job for job in trials(settings) if (job.base, job.method) == (base_name, method)]
        lr = chosen(records, settings, base_name, method) or rates(method)[0]
        epochs = epochs_of(settings, base_name)
        seeds = 3 if base_name == "swin" and method in THREE_SEEDS else 2
        jobs += [Job("final", base_name, method, lr, seed, epochs, settings.images) for seed in range(seeds)]
        missing = [job for job in jobs if job.key not in done]
        if not missing:
            continue
        step, validated, steps, batches = timed(settings, missing[-1])
        hours = sum(job.epochs * (steps * step + batches * validated) for job in missing) / 3600
        total += hours
        cells = [f"{step:.2f}", f"{steps * missing[-1].epochs}", str(len(missing)), f"{hours:.2f}"]
        lines.append(f"| {base_name} | {method} | {' | '.join(cells)} |")
    made = (settings.bases / "swin.safetensors").exists()
    if not made:
        each = pretraining_step()
        hours = each * (50_000 // PRETRAIN_BATCH) * PRETRAIN["swin"]["epochs"] / 3600
        lines.append(f"| swin | pretraining | {each:.2f} | {50_000 // PRETRAIN_BATCH} an epoch | 1 | {hours:.2f} |")
        total += hours
    cores = workers * settings.threads
    says = "within" if total / cores <= LIMIT_HOURS else "more than"
    lines += ["", f"{total:.2f} hours of a core, {total / cores:.2f} on {cores}: {says} {LIMIT_HOURS:g} hours."]
    return "\n".join(lines)


def timed(settings: Settings, job: Job) -> tuple[float, float, int, int]:
    """The processor's seconds of a step and of a batch that is only looked at, the fastest of three; how many of them
    an epoch has."""
    base = dense_base(settings, job.base) if (settings.bases / "swin.safetensors").exists() else fresh(settings, job)
    tasks, outputs = tasks_of(settings, base, test=False)
    model = model_of(settings, job, base, outputs)
    model.train()
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-6))
    first = next(iter(tasks.values()))
    items = [first.train.whole.data[index] for index in range(min(BATCH, len(first.train)))]  # type: ignore[union-attr]
    steps, looked = [], []
    for _ in range(4):
        begun = time.process_time()
        images = torch.stack([image for image, _ in items])
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for name, output in model.forward_tasks(images, tasks=list(tasks)).items():
            total = total + tasks[name].loss(output, torch.stack([maps[name] for _, maps in items]))
        total.backward()
        optimizer.step()
        steps.append(time.process_time() - begun)
        begun = time.process_time()
        with torch.no_grad():
            model.forward_tasks(images, tasks=list(tasks))
        looked.append(time.process_time() - begun)
    begun = time.process_time()
    _ = [first.train.whole.data[index] for index in range(len(items))]  # type: ignore[union-attr]
    reading = time.process_time() - begun
    model.unload()
    counts = [-(-len(data) // BATCH) for data in (first.train, first.val)]
    return min(steps[1:]) + reading, min(looked[1:]) + reading, *counts


def fresh(settings: Settings, job: Job) -> DenseBase:
    """For times alone, a Swin that nothing has trained."""
    if job.base == "mobilenet":
        return dense_base(settings, job.base)
    return DenseBase(swin(SIZE, num_classes=10), SWIN_TAPS).eval()


def pretraining_step() -> float:
    """Seconds."""
    net, x = make("swin"), torch.randn(PRETRAIN_BATCH, 3, SWIN_PIXELS, SWIN_PIXELS)
    found = []
    for _ in range(3):
        begun = time.process_time()
        net(x).square().mean().backward()
        found.append(time.process_time() - begun)
    return min(found)


# --- a patch across problem types ---------------------------------------------------------------


@torch.no_grad()
def across(results: Path, settings: Settings) -> dict[str, Any]:
    """A classifier to segmentation and back, by the values of a scale-and-bias task; its record.

    Raises RuntimeError where the patched backbone is not the task, or a bit is left behind.
    """
    runs = by_method(results, settings).get("mobilenet", {}).get("scale-bias")
    if not runs:
        raise SystemExit(f"{results}: expected a run of mobilenet by scale-bias, found none")
    job = Job(**{name: runs[min(runs)][name] for name in Job.__dataclass_fields__})
    folder = settings.runs / job.folder
    base = dense_base(settings, "mobilenet")
    tasks, _ = tasks_of(settings, base, test=True)
    model = taps_ext.TaskModel(base, METHODS["mobilenet"]["scale-bias"])
    model.load_task(folder / "classes.taps")
    classifier = backbone_of(settings, "mobilenet")
    images = torch.stack([image for image, _ in itertools.islice(iter_items(tasks["classes"].test), 4)])
    before = classifier(images)
    old = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    adapted = {
        name.removeprefix("backbone."): tensor
        for name, tensor in model.task_state_dict("classes").items()
        if name.startswith("backbone.")
    }
    new = {name: adapted.get(name, tensor) for name, tensor in old.items()}
    there = patches.diff(old, new, out=folder / "to-classes.tapspatch")
    back = patches.diff(new, old, out=folder / "back.tapspatch")
    live = classifier.state_dict()
    patches.apply(live, there)
    moved = DenseBase(copy.deepcopy(classifier)).eval()
    moved.decoder = copy.deepcopy(model.state("classes").head).eval()
    model.eval()
    metric, equal = MeanIoU(len(CLASSES)), True
    for items in batches(iter_items(tasks["classes"].test)):
        x = torch.stack([image for image, _ in items])
        output = moved(x)
        equal = equal and torch.equal(output, model(x, task="classes"))
        metric.update(output, torch.stack([maps for _, maps in items]))
    changed = classifier(images)
    patches.apply(live, back)
    returned = torch.equal(classifier(images), before)
    same = all(torch.equal(tensor, old[name]) for name, tensor in classifier.state_dict().items())
    if not (equal and returned and same) or torch.equal(changed, before):
        raise RuntimeError(
            f"patch: expected the task's maps ({equal}), the classifier's outputs ({returned}) and tensors ({same})"
        )
    model.unload()
    return {
        "part": "patch",
        "base": "mobilenet",
        "images": job.images,
        "miou": metric.compute(),
        "elements": there.elements,
        "of": sum(tensor.numel() for tensor in old.values()),
        "bytes": {path.stem: path.stat().st_size for path in sorted(folder.glob("*.tapspatch"))},
        "decoder": sum(p.numel() for p in moved.decoder.parameters()),
        "maps_bit_equal": equal,
        "classifier_bit_equal": returned and same,
    }


def iter_items(data: Any) -> Iterator[tuple[Tensor, Any]]:
    for index in range(len(data)):
        yield data[index]


def batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    while some := list(itertools.islice(items, BATCH)):
        yield some


# --- what it says -------------------------------------------------------------------------------

Runs = dict[str, dict[str, dict[int, dict[str, Any]]]]


def by_method(results: Path, settings: Settings) -> Runs:
    """base -> method -> seed -> record, of final runs of this length that did not diverge."""
    found: Runs = {}
    for record in read(results):
        if record["part"] != "final" or record["test"] is None or record["images"] != settings.images:
            continue
        if record["epochs"] == epochs_of(settings, record["base"]):
            found.setdefault(record["base"], {}).setdefault(record["method"], {})[record["seed"]] = record
    return found


def deltas(runs: dict[str, dict[int, dict[str, Any]]], base: str) -> dict[str, dict[int, float]]:
    """method -> seed -> delta_m against the mean of fine-tuning each task; empty until that is there."""
    alone = runs.get(REFERENCE[base])
    if not alone:
        return {}
    reference = {name: statistics.fmean(record["test"][name] for record in alone.values()) for name in KINDS}
    return {
        method: {seed: delta_m(record["test"], reference, LARGER) for seed, record in sorted(seeds.items())}
        for method, seeds in runs.items()
    }


def tables(results: Path, settings: Settings) -> str:
    """All of it in Markdown."""
    lines: list[str] = []
    for base, runs in by_method(results, settings).items():
        title = {"swin": "The small Swin", "mobilenet": "MobileNetV2"}[base]
        lines += [f"## {title}", ""]
        lines += ["| method | rate | seeds | mIoU | boundary F | RMSE | delta_m | trained | stored | files | s |"]
        lines += ["|---" * 11 + "|"]
        apart = deltas(runs, base)
        for method in METHODS[base]:
            if method not in runs:
                continue
            found = list(runs[method].values())
            metrics = [interval(record["test"][name] for record in found) for name in KINDS]
            cells = [f"{mean:.4f}" if math.isnan(half) else f"{mean:.4f} ± {half:.4f}" for mean, half in metrics]
            delta = number(interval(apart[method].values())) if method in apart else ""
            sizes = [statistics.fmean(record[key] for record in found) for key in ("trained", "parameters", "bytes")]
            seconds = statistics.fmean(record["cpu_seconds"] for record in found)
            cells += [delta, f"{sizes[0]:,.0f}", f"{sizes[1]:,.0f}", f"{sizes[2] / 1e6:.2f} MB", f"{seconds:.0f}"]
            lines.append(f"| {method} | {found[0]['lr']:g} | {len(found)} | {' | '.join(cells)} |")
        lines += ["", *claims(apart), ""]
    for record in read(results):
        if record["part"] == "patch" and record["images"] == settings.images:
            size = ", ".join(f"{name} {count:,} bytes" for name, count in record["bytes"].items())
            lines.append(
                f"A classifier to segmentation and back: {record['elements']:,} of {record['of']:,} values change "
                f"({size}), a decoder of {record['decoder']:,} beside it, mIoU {record['miou']:.4f}; maps bit-equal to "
                f"the task's: {record['maps_bit_equal']}, the classifier's tensors and outputs after the return: "
                f"{record['classifier_bit_equal']}."
            )
    return "\n".join(lines)


def claims(apart: dict[str, dict[int, float]]) -> list[str]:
    """By how many points of delta_m one is above another, paired by seed, with 95 % intervals."""
    pairs = [(f"mtlora:{rank}", other) for rank in (16, 4) for other in ("lora:16", "lora:4", "decoders", "full")]
    pairs += [("mtlora+:16", "mtlora:16"), ("joint-taps", "mtlora:16"), ("rcm", "scale-bias"), ("taps", "scale-bias")]
    pairs += [("taps", "decoders"), ("scale-bias", "decoders"), ("taps", "rcm")]
    lines = []
    for one, other in pairs:
        seeds = sorted(apart.get(one, {}).keys() & apart.get(other, {}).keys())
        if seeds:
            lines.append(f"| {one} above {other} | {verdict([apart[one][s] - apart[other][s] for s in seeds])} |")
    return ["| claim | points of delta_m |", "|---|---|", *lines] if lines else []


def plot(results: Path, docs: Path, settings: Settings) -> None:
    """delta_m against trained parameters and against the bytes of all files, a panel for each base."""
    for name, key, label in (
        ("dense-trained.png", "trained", "trained parameters of three tasks"),
        ("dense-files.png", "bytes", "bytes of the files of three tasks"),
    ):
        panels = {}
        for base, runs in by_method(results, settings).items():
            apart = deltas(runs, base)
            panels[{"swin": "Swin of CIFAR-10", "mobilenet": "MobileNetV2"}[base]] = [
                Point(
                    method,
                    statistics.fmean(record[key] for record in runs[method].values()),
                    *interval(apart[method].values()),
                )
                for method in METHODS[base]
                if method in apart
            ]
        tradeoff(docs / name, panels, x=label, y="delta_m against fine-tuning each task, %", columns=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["plan", "run", "patch", "table", "plot"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--bases", type=Path, default=Path("runs/bases"))
    parser.add_argument("--runs", type=Path, default=Path("runs/dense-study"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--only", type=int, help="so many runs, the first that are missing")
    parser.add_argument("--methods", nargs="+", default=[], metavar="BASE:METHOD", help="these alone")
    parser.add_argument("--images", type=int, help="so many of each split, for a trial of the script")
    parser.add_argument("--epochs", type=int, help="instead of those of the study, likewise")
    args = parser.parse_args()
    if args.command in ("plan", "run", "patch") and not args.data.is_dir():
        parser.error(f"--data: no folder {args.data}")
    known = [f"{base}:{method}" for base, methods in METHODS.items() for method in methods]
    for method in args.methods:
        if method not in known:
            parser.error(f"--methods: expected some of {known}, got {method!r}")
    settings = Settings(
        args.data, args.bases, args.runs, args.images, args.epochs, tuple(args.methods), max(1, args.threads)
    )
    args.results.parent.mkdir(parents=True, exist_ok=True)
    actions = {
        "plan": lambda: print(plan(args.results, settings, args.workers)),
        "run": partial(run_all, args.results, settings, args.only, args.workers),
        "table": lambda: print(tables(args.results, settings)),
        "plot": partial(plot, args.results, args.docs, settings),
    }
    if args.command in actions:
        actions[args.command]()
        return
    cut_torn_line(args.results)
    record = across(args.results, settings)
    others = [one for one in read(args.results) if (one["part"], one["images"]) != ("patch", args.images)]
    draft = args.results.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(one) + "\n" for one in [*others, record]), encoding="utf-8")
    draft.replace(args.results)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
