"""A dataset that is slow by waiting, in the Trainer and in a plain loop with the same DataLoader: epochs in turns.

    python benchmarks/data_path.py [--wait 0.01] [--samples 640] [--workers 4] [--epochs 3] [--bound 1.15]

Each sample waits, as one that comes over a network does, so that the ratio says what the Trainer adds to the waiting,
on a busy machine too. Both validate after every epoch. Three ways to the data: a DataLoader with workers that live on,
one whose workers end with each epoch, and a dataset that `TrainConfig.num_workers` read; each against the plain loop
that reads in the same way. Exits with 1 where a ratio is above the bound.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from taps_ext import FullConfig, Task, TaskModel, TrainConfig, Trainer


class Waiting(Dataset):
    def __init__(self, samples: int, wait: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(samples, 16, generator=generator), torch.arange(samples) % 4
        self.wait = wait

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.wait)
        return self.x[index], self.y[index]


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def loop(loaders: Callable[[], tuple[DataLoader, DataLoader]], epochs: int) -> float:
    """Seconds of a plain loop, with the end of its workers."""
    model = base()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    start = time.perf_counter()
    train, val = loaders()
    for _ in range(epochs):
        model.train()
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for x, y in val:
                F.cross_entropy(model(x), y).item()
    del train, val  # as the Trainer does, before its result is there
    return time.perf_counter() - start


def trainer(train: Any, val: Any, epochs: int, workers: int) -> float:
    """Seconds of `fit`."""
    model = TaskModel(base(), FullConfig())
    model.add_task("t")
    config = TrainConfig(epochs=epochs, batch_size=32, lr=0.01, num_workers=workers)
    made = Trainer(model, {"t": Task(train=train, val=val)}, config, quiet=True)
    start = time.perf_counter()
    made.fit()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wait", type=float, default=0.01, help="seconds a sample")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--bound", type=float, default=1.15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, val = Waiting(args.samples, args.wait), Waiting(args.samples // 8, args.wait)

    def loader(data: Dataset, shuffle: bool, keep: bool) -> DataLoader:
        workers = args.workers
        keep = keep and workers > 0
        return DataLoader(data, batch_size=32, shuffle=shuffle, num_workers=workers, persistent_workers=keep)

    waited = args.epochs * (len(train) + len(val)) * args.wait / max(1, args.workers)
    print(
        f"{args.epochs} epochs of {len(train)} + {len(val)} samples, {args.workers} workers: {waited:.2f} s of waiting"
    )
    worst = 0.0
    for name, keep, data in (
        ("DataLoader, persistent workers", True, True),
        ("DataLoader, workers of an epoch", False, True),
        ("dataset, TrainConfig.num_workers", False, False),
    ):

        def loaders(keep: bool = keep) -> tuple[DataLoader, DataLoader]:
            return loader(train, True, keep), loader(val, False, keep)

        plain = loop(loaders, args.epochs)
        splits = loaders() if data else (train, val)
        ours = trainer(*splits, args.epochs, args.workers)
        worst = max(worst, ours / plain)
        print(f"{name:34s} plain loop {plain:6.2f} s   Trainer {ours:6.2f} s   ratio {ours / plain:.3f}")
    if worst > args.bound:
        sys.exit(f"above {args.bound}: {worst:.3f}")


if __name__ == "__main__":
    main()
