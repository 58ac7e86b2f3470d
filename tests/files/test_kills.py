"""Killed while a file is written, at any moment: the path holds the old file or the new one, and the next writer leaves
nothing of the killed one behind. Forked from a process that is warm, so that a kill costs milliseconds.

`make fuzz` kills a thousand times each.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stages import SEED, THOROUGH
from torch import nn

import taps_ext
from taps_ext.files import pack
from taps_ext.parts.packing import Rule

KILLS = 1000 if THOROUGH else 25


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


@pytest.fixture(scope="module")
def models() -> list[taps_ext.TaskModel]:
    """Two models, each with a task that the other has not."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = taps_ext.TaskModel(base(), taps_ext.FullConfig())
        model.add_task("a", num_classes=4)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.01)
        found.append(model)
    return found


def save(models: list[taps_ext.TaskModel], which: int, folder: Path) -> None:
    models[which].save_task("a", folder / "a.taps")


def packed(models: list[taps_ext.TaskModel], which: int, folder: Path) -> None:
    pack.pack_file(folder.parent / f"{which}.taps", folder / "a.taps", Rule.of("int8", None, None))


def merge(models: list[taps_ext.TaskModel], which: int, folder: Path) -> None:
    taps_ext.TaskModel(base()).merge_file(folder.parent / f"{which}.taps", folder / "a.taps")


def extract(models: list[taps_ext.TaskModel], which: int, folder: Path) -> None:
    model = taps_ext.TaskModel(base(), taps_ext.FullConfig())
    model.extract_file("a", folder.parent / f"{which}.safetensors", folder / "a.taps")


def add(models: list[taps_ext.TaskModel], which: int, folder: Path) -> None:
    taps_ext.TaskFolder(folder).add(folder.parent / f"{which}.taps", "a", replace=True)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("write", [save, packed, merge, extract, add], ids=lambda write: write.__name__)
def test_a_kill_leaves_the_old_file_or_the_new(
    write: Callable[..., None], models: list[taps_ext.TaskModel], tmp_path: Path, record_property
) -> None:
    for which, model in enumerate(models):
        model.save_task("a", tmp_path / f"{which}.taps")
        taps_ext.store.write_safetensors(tmp_path / f"{which}.safetensors", model.task_state_dict("a"))
    folder = tmp_path / "folder"
    folder.mkdir()

    def written(which: int) -> tuple[str, float]:
        begun = time.perf_counter()
        write(models, which, folder)
        return digest(), time.perf_counter() - begun

    def digest() -> str:
        (path,) = [folder / name for name in os.listdir(folder) if name.endswith(".taps") and name[0] != "."]
        return hashlib.sha256(path.read_bytes()).hexdigest()

    ends = dict([written(0), written(1), written(0)])
    digests, took = list(ends), max(ends.values())
    chance = random.Random(f"{SEED} kills")
    record_property("drawn", f"{write.__name__} kills by seed {SEED}")
    context = multiprocessing.get_context("fork")
    killed = 0
    for turn in range(KILLS):
        process = context.Process(target=write, args=(models, turn % 2, folder))
        process.start()
        time.sleep(chance.uniform(0, 1.2 * took))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert digest() in digests, turn
        assert len([name for name in os.listdir(folder) if name.startswith(".taps-")]) <= 1  # the next one sweeps
    write(models, 0, folder)
    assert digest() == digests[0] and not [name for name in os.listdir(folder) if name.startswith(".taps-")]
    assert killed > KILLS // 4
