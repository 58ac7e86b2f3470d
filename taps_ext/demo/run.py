"""The demo: the whole method on real images, from a base network to files that another process proves.

The images come with scikit-learn and matplotlib (see `taps_ext.demo.tasks`). Every choice of epoch is made on
the validation splits. The learning rates were chosen on them too, and LAM: the mean validation accuracy of the
six tasks is 92.6 % with fine-tuning, 91.9 % with LAM 0.5 and 91.5 % with 0.3 (seed 0). Test splits choose nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TapsError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import Source
    from ..methods import MethodConfig
    from ..model import TaskModel

MODEL = "python:taps_ext.zoo.small_resnet"
MODEL_ARGS = {"stem_stride": 2}
LAM = 0.5
BASE = {"epochs": 12, "batch_size": 32, "lr": 0.1, "weight_decay": 5e-4}
TRAIN = {"epochs": 10, "batch_size": 64, "warmup_epochs": 2}
RATES = {"probe": {"lr": 0.3}, "full": {"lr": 0.05}, "taps": {"lr": 0.05, "score_lr": 0.02}}
QUICK_EPOCHS = {"epochs": 2, "warmup_epochs": 1}
QUICK_SIZES = {"train": 128, "val": 64, "test": 96}


# ---------------------------------------------------------------------------------------------- pieces


def tensors(source: Source, split: str, quick: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of a split; a quick run takes a fixed few."""
    import torch

    data = source.splits()[split]
    x, y = data[torch.arange(len(data))]  # type: ignore[index]
    if quick:
        rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: QUICK_SIZES[split]]
        x, y = x[rows], y[rows]
    return x, y


def outputs(model: nn.Module, x: Tensor, **task: str) -> Tensor:
    """Logits in evaluation mode, in batches of a fixed size so that two processes compute alike."""
    import torch

    model.eval()
    with torch.no_grad():
        return torch.cat([model(part, **task) for part in x.split(256)])


def digest(logits: Tensor) -> str:
    """SHA-256 over the bytes of the logits."""
    from .. import store

    return store.tensor_digest(logits, name="logits", path="demo")


def fingerprint(base: nn.Module) -> str:
    """The identity of the whole base, its head included."""
    from ..base.fingerprint import base_fingerprint

    return base_fingerprint(base, None)


def make_base(num_classes: int) -> nn.Module:
    """The demo's network: 175 k parameters, 15 convolutions."""
    from ..zoo import small_resnet

    return small_resnet(num_classes, 1, **MODEL_ARGS)


def train_base(source: Source, seed: int, quick: bool) -> nn.Module:
    """Train the base by a plain loop: SGD, momentum, cosine."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(seed)
    model = make_base(source.num_classes)
    x, y = tensors(source, "train", quick)
    epochs, batch = (2 if quick else int(BASE["epochs"])), int(BASE["batch_size"])
    rate, decay = BASE["lr"], BASE["weight_decay"]
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
    steps = epochs * (len(y) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(batch)[: len(y) // batch]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def methods() -> dict[str, MethodConfig]:
    """The three methods that are compared."""
    from .. import FullConfig, ProbeConfig, TapsConfig

    return {"probe": ProbeConfig(), "full": FullConfig(), "taps": TapsConfig(lam=LAM)}


def changes(model: TaskModel, name: str) -> list[float | None]:
    """||W_t - W|| / ||W|| of each layer, None where it is closed."""
    state = model.state(name)
    opened = set(state.open_layers())
    found: list[float | None] = []
    for layer, part, _ in state.gated():
        weight: Any = model.base.get_submodule(layer).weight
        found.append(float((part.fold(weight) - weight).norm() / weight.norm()) if layer in opened else None)
    return found


def write_config(path: Path, seed: int, specs: dict[str, str], quick: bool) -> None:
    """A configuration that `taps eval`, `predict` and `train` accept for the files of this run."""
    settings = {**TRAIN, **RATES["taps"], **(QUICK_EPOCHS if quick else {}), "seed": seed, "out": "retrained"}
    lines = ["# Written by `taps demo`; paths are relative to this file.", "[base]"]
    lines += [f"model = {json.dumps(MODEL)}", 'weights = "base.safetensors"', "num_classes = 10"]
    lines += ["args = { " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in MODEL_ARGS.items()) + " }"]
    lines += ["", "[data]", "size = 16", "channels = 1"]
    lines += ["", "[method]", 'method = "taps"', f"lam = {LAM}"]
    lines += ["", "[train]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
    for name, spec in specs.items():
        lines += ["", f"[tasks.{name}]", f"source = {json.dumps(spec)}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- run


def adapt(
    model: TaskModel, sources: dict[str, Source], out: Path, seed: int, quick: bool, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Train every task with every method; returns results by task, and the logits' digest by file."""
    import torch

    from ..train import Task, TrainConfig, Trainer, TrainingInterrupted

    found: dict[str, dict[str, Any]] = {name: {} for name in sources}
    expected: dict[str, str] = {}
    for method, config in methods().items():
        folder = out / method
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        settings = TrainConfig.from_dict(
            {**TRAIN, **RATES[method], **(QUICK_EPOCHS if quick else {}), "seed": seed, "out": str(folder)}
        )
        for name, source in sources.items():
            torch.manual_seed(seed)
            model.add_task(name, num_classes=source.num_classes, config=config)
            parts = {split: tensors(source, split, quick) for split in ("train", "val", "test")}
            task = Task(
                train=parts["train"],
                val=parts["val"],
                test=parts["test"],
                labels=list(source.classes),
                preprocessing=source.preprocessing,
            )
            try:
                result = Trainer(model, {name: task}, settings, quiet=True).fit(resume=False)[name]
            except TrainingInterrupted:
                raise KeyboardInterrupt("demo stopped; the next one starts from the beginning") from None
            report = model.report(name)
            file = f"{method}/{name}.taps"
            expected[file] = digest(outputs(model, parts["test"][0], task=name))
            found[name][method] = {
                "val": result.val["accuracy"],
                "test": result.test["accuracy"],
                "epoch": result.epoch,
                "layers_open": report.layers_open,
                "layers": len(report.rows),
                "share": report.share,
                "parameters": report.parameters,
                "bytes": (out / file).stat().st_size,
                "file": file,
                "seconds": round(result.seconds, 2),
                "rows": [
                    {**asdict(row), "change": change}
                    for row, change in zip(report.rows, changes(model, name), strict=True)
                ],
            }
            model.delete_task(name)
            say(f"{method:>5} {name:<9} test {100 * result.test['accuracy']:5.1f} %, {result.seconds:.0f} s")
    return found, expected


def prove(out: Path, expected: dict[str, str], quick: bool) -> dict[str, Any]:
    """Have a new process rebuild the base from its file and run every task file."""
    extent = "quick" if quick else "whole"
    command = [sys.executable, "-m", "taps_ext.demo.check", str(out), extent, *expected]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise TapsError(f"demo: the checking process failed: {last}")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def run(out: Path, seed: int, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """The demo; files, report and picture go to the folder `out`.

    Args:
        quick: a smoke run on a few images, without meaning. say: what is told on the way.

    Returns:
        What the report says. The number of threads is one meanwhile: images this small gain little from more, and sums
        then do not depend on how many there are.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(out, seed, quick, say)
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seed: int, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    import torch

    from .. import TaskModel, store
    from .tasks import TASKS, open_demo

    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    base_source, sources = open_demo(seed)
    base = train_base(base_source, seed, quick)
    x, y = tensors(base_source, "test", False)
    accuracy = float((outputs(base, x).argmax(1) == y).float().mean())
    base_bytes = store.write_safetensors(out / "base.safetensors", base.state_dict())
    parameters = sum(p.numel() for p in base.parameters())
    seconds = {"base": round(time.perf_counter() - started, 1)}
    say(f"base: {base_source.name}, test {100 * accuracy:.1f} %, {seconds['base']:.0f} s")
    write_config(out / "demo.toml", seed, {task.name: task.spec for task in TASKS}, quick)

    before = fingerprint(base)
    model = TaskModel(base)
    found, expected = adapt(model, sources, out, seed, quick, say)
    after = fingerprint(model.base)
    seconds["tasks"] = round(time.perf_counter() - started - seconds["base"], 1)
    answer = prove(out, expected, quick)
    same = {file: answer["files"][file] == wanted for file, wanted in expected.items()}
    unchanged = before == after == answer["fingerprint"]
    seconds["total"] = round(time.perf_counter() - started, 1)

    tasks: dict[str, dict[str, Any]] = {}
    for name, by_method in found.items():
        taps = by_method["taps"]
        tasks[name] = {
            "source": sources[name].name,
            "why": next(task.why for task in TASKS if task.name == name),
            **{method: entry["test"] for method, entry in by_method.items()},
            **{key: taps[key] for key in ("layers_open", "layers", "share", "parameters", "bytes", "file")},
            "full_bytes": by_method["full"]["bytes"],
            "bit_equal": all(same[entry["file"]] for entry in by_method.values()),
            "methods": by_method,
        }
    report = {
        "tasks": tasks,
        "base": {
            "source": base_source.name,
            "accuracy": accuracy,
            "parameters": parameters,
            "bytes": base_bytes,
            "file": "base.safetensors",
            "fingerprint": before,
        },
        "base_unchanged": unchanged,
        "bit_equal": all(same.values()),
        "lam": LAM,
        "settings": {"base": BASE, "train": TRAIN, "rates": RATES},
        "seed": seed,
        "quick": quick,
        "threads": torch.get_num_threads(),
        "versions": {**store.TaskFile(method={}, parent="").versions, "python": sys.version.split()[0]},
        "seconds": seconds,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(out / "heatmap.png", tasks)
    return report


def draw(path: Path, tasks: dict[str, dict[str, Any]]) -> None:
    """The heat map of the TAPS tasks."""
    from ..plot import heatmap

    by_task = {name: task["methods"]["taps"]["rows"] for name, task in tasks.items()}
    rows = next(iter(by_task.values()))
    heatmap(
        path,
        [row["layer"] for row in rows],
        {name: [row["change"] for row in own] for name, own in by_task.items()},
        notes={n: f"{100 * t['taps']:.1f} %\n{t['layers_open']}/{t['layers']} open" for n, t in tasks.items()},
        sizes=[row["parameters"] for row in rows],
        title=f"TAPS: layers that each task opened (lambda {LAM}), with test accuracy",
    )
