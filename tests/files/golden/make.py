"""Made the golden files, with version 0.1 (commit 6570971). Kept to say what they hold; they are never made again.

PYTHONPATH=<a checkout of 0.1> python tests/files/golden/make.py
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from bases import STATE, TASKS, base_of, data, values

import taps_ext
from taps_ext import FullConfig, ProbeConfig, TapsConfig, TaskModel, store
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted

HERE = Path(__file__).parent
CONFIGS = {
    "taps-conv": TapsConfig(lam=0.5, threshold=0.1, penalty="size"),
    "taps-transformer": TapsConfig(lam=0.25, others="task", exclude_modules=("down",)),
    "full-conv": FullConfig(),
    "full-transformer": FullConfig(),
    "probe-conv": ProbeConfig(),
    "probe-transformer": ProbeConfig(),
}
CLOSED = {"taps-conv": ["conv1", "depthwise"], "taps-transformer": ["attention", "up"]}
NOTES = {
    "labels": ["zero", "one", "two"],
    "metrics": {"val": {"accuracy": 0.75}, "epoch": 3},
    "preprocessing": {"size": 8, "mean": [0.5, 0.5, 0.5]},
}


def trained(model: TaskModel, name: str) -> None:
    """A few steps, so that Deltas, norms, statistics and the head are not what they began as."""
    optimizer = torch.optim.SGD(model.parameter_groups(name, lr=0.05), momentum=0.9)
    model.train()
    for step in range(4):
        x, y = data(16, 20 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x, task=name), y % 3).backward()
        optimizer.step()
    model.eval()


def digest(tensor: torch.Tensor) -> str:
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(head + flat).hexdigest()[:24]


def facts(record: store.TaskFile) -> dict:
    layers = {}
    for name, entry in record.layers.items():
        layers[name] = {
            "learn": entry.learn,
            "open": entry.open,
            "codec": entry.codec if entry.open else None,
            "score": None if entry.score is None else digest(entry.score),
            "delta": None if entry.delta is None else digest(entry.delta),
        }
    groups = {g: {n: digest(t) for n, t in getattr(record, g).items()} for g in ("norms", "values", "head")}
    keys = ("method", "parent", "name", "kind", "head_spec", "labels", "metrics")
    return {**{key: getattr(record, key) for key in keys}, "extra": dict(record.extra), "layers": layers, **groups}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    for name, kind in TASKS.items():
        base = base_of(kind)
        model = TaskModel(base)
        if name == "extracted":
            tuned = {n: t.clone() for n, t in base.state_dict().items()}
            for at, (key, tensor) in enumerate(tuned.items()):
                if tensor.is_floating_point() and not key.startswith(("conv2", "gn")):
                    tensor.mul_(1 + values(tuple(tensor.shape), 300 + at, 0.25)).add_(
                        values(tuple(tensor.shape), 400 + at, 2.0**-10)
                    )
            tuned["conv1.weight"].mul_(2.0**-30)  # so small beside W that no Delta gives it
            model.extract_task(name, tuned)
            own = [n for n, part in model.state(name).gated() if part.weight is not None]
            assert own, "no layer with a weight of its own"
        else:
            model.add_task(name, num_classes=3, config=CONFIGS[name])
            trained(model, name)
            with torch.no_grad():
                for layer, part in model.state(name).gated():
                    if layer in CLOSED.get(name, ()):
                        part.score.fill_(0.03)
                    elif part.score is not None:
                        part.score.fill_(0.17)
        notes = NOTES if name == "taps-conv" else {}
        model.eval()
        model.save_task(name, HERE / f"{name}.taps", **notes)
        found[name] = facts(store.load(HERE / f"{name}.taps"))
    model = TaskModel(base_of("conv"), TapsConfig(lam=0.5))
    model.add_task(STATE["task"], num_classes=4)
    with torch.no_grad():
        head = model.state(STATE["task"]).head
        head.weight.copy_(values((4, 12), 50))
        head.bias.copy_(values((4,), 51))
    (HERE / "run").mkdir(exist_ok=True)
    stop_after(model, HERE / "run")
    found["run"] = run_facts(store.load(HERE / "run" / f"{STATE['task']}.state"))
    (HERE / "facts.json").write_text(json.dumps(found, indent=1) + "\n")
    print(taps_ext.__version__, sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file()), "bytes")


def run_facts(record: store.TaskFile) -> dict:
    counters = json.loads(record.extra["train.counters"])
    counters["progress"]["seconds"] = 0.0
    return {"values": {n: digest(t) for n, t in record.values.items()}, "progress": counters["progress"]}


def stop_after(model: TaskModel, out: Path) -> None:
    """Train as Ctrl-C stops it after an epoch."""
    asked: list[int] = []
    trainer = Trainer(model, {STATE["task"]: golden_task()}, golden_config(out), quiet=True)
    evaluate = trainer.evaluate

    def evaluated(*args, **kwargs):
        asked.append(1)
        if len(asked) == STATE["stopped_after"]:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args, **kwargs)

    trainer.evaluate = evaluated
    try:
        trainer.fit()
    except TrainingInterrupted:
        return
    raise AssertionError("the run was not stopped")


def golden_task() -> Task:
    return Task(train=data(64, 60), val=data(16, 61))


def golden_config(out: Path) -> TrainConfig:
    return TrainConfig(epochs=STATE["epochs"], batch_size=16, lr=0.05, warmup_epochs=1, seed=3, out=str(out), ema=0.5)


if __name__ == "__main__":
    main()
