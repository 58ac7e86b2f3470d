"""A folder of small tasks to serve, and what each of them is to answer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from taps_ext import TapsConfig, TaskFolder, TaskModel

SIDE = 8
GEOMETRY = {"channels": 3, "height": SIDE, "width": SIDE, "normalize": [[0.5], [0.25]]}
# In float64 a batch is summed in another order than a sample alone: sums of at most 27 products of values near one, in
# three layers, err by 1e-14; two states of a task differ by 1e-2 and more.
CLOSE = 1e-10


def base() -> nn.Module:
    """The base that all of them are for, in float64; `taps serve` finds it by this function's name."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()


def model() -> TaskModel:
    return TaskModel(base(), TapsConfig(lam=0.1)).eval()


def write(path: Path, name: str, seed: int, *, images: bool = True, classes: int = 4) -> Path:
    """The file of a task that the seed tells from others."""
    made = model()
    made.add_task(name, num_classes=classes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in made.state(name).named_parameters():
            if not key.endswith("score"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    labels = [f"{name} {i}" for i in range(classes)]
    made.save_task(name, path, labels=labels, preprocessing=GEOMETRY if images else None)
    return path


def folder_of(path: Path, count: int, *, images: bool = True) -> TaskFolder:
    """Tasks `t0`, `t1`, ... whose seeds are their numbers."""
    folder = TaskFolder(path / "folder", create=True)
    for i in range(count):
        folder.add(write(path / "made.taps", f"t{i}", i, images=images))
    return folder


def samples(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


def answers(files: list[Path], x: Tensor) -> list[Tensor]:
    """What each of the files makes of `x`, one after another, without an engine."""
    alone = model()
    found = []
    for i, file in enumerate(files):
        name = alone.load_task(file, f"answer {i}")
        with torch.no_grad():
            found.append(torch.cat([alone(x[j : j + 1], task=name) for j in range(len(x))]))
        alone.delete_task(name)
    return found


def is_close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= CLOSE)
