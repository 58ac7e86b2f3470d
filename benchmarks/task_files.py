"""Retrain the eight task files on which storage is measured: real tasks on pretrained bases, TAPS and fine-tuning.

    python benchmarks/task_files.py --data ../shared/data --out runs/task-files

A file that is there already is not trained again. Prints each file's bytes, digest and test accuracy; trained on one
machine with as many threads, a file comes out the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from real import base_of, task_of

import taps_ext
from taps_ext.train import TrainConfig, Trainer

# Base, pixels, task, epochs. An epoch of the ViT is as much work as thirty of the MobileNetV2 at 64 pixels.
RUNS = (
    ("resnet", 32, "signs", 10),
    ("mobilenet", 64, "signs", 6),
    ("mobilenet", 64, "omniglot", 12),
    ("vit", 112, "signs", 3),
)
METHODS = {"taps": taps_ext.TapsConfig(lam=0.5), "full": taps_ext.FullConfig()}


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The head starts from nothing and may go faster."""
    for group in groups:
        if group["name"] == "head":
            group["lr"] = 1e-3
    return torch.optim.AdamW(groups)


def train(folder: Path, out: Path, base: str, size: int, task: str, epochs: int, method: str) -> Path:
    """Train one file where it is missing."""
    target = out / f"{base}-{task}-{method}"
    if not (target / f"{task}.taps").exists():
        data, classes = task_of(folder, task, size)
        model = taps_ext.TaskModel(base_of(folder, base, size), METHODS[method])
        torch.manual_seed(0)
        model.add_task(task, num_classes=classes)
        vit = base == "vit"
        rates = {"lr": 3e-5, "score_lr": 0.003} if vit else {}  # of larger ones this base unlearns what it knows
        settings = TrainConfig(epochs=epochs, warmup_epochs=1, out=str(target), **rates)
        Trainer(model, {task: data}, settings, optimizer=adamw if vit else None).fit()
        model.unload()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/task-files"))
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data: no folder {args.data}")
    started = time.perf_counter()
    for base, size, task, epochs in RUNS:
        for method in METHODS:
            target = train(args.data, args.out, base, size, task, epochs, method)
            content = (target / f"{task}.taps").read_bytes()
            result = json.loads((target / f"{task}.result.json").read_text(encoding="utf-8"))["result"]
            print(
                f"{target.name:26} {len(content):>11,} bytes  sha256 {hashlib.sha256(content).hexdigest()}  "
                f"test {100 * result['test']['accuracy']:.2f} %  open {100 * result['share']:.1f} %",
                flush=True,
            )
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
