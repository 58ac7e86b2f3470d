"""Files of strangers by the thousand, a million of each reader in `make fuzz`: read, or refused by an error that names
what is wrong; nothing else, and not late. A file is its number, so that any that fails can be made again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutants import Mutants
from stages import SEED, THOROUGH
from store_files import example, older_example, state, tiny
from torch import nn

import taps_ext
from taps_ext import TaskFileError, patch, store

PARSED = 1_000_000 if THOROUGH else 1500
LOADED = 20_000 if THOROUGH else 300
FIRST = int(SEED) * 10_000_000 if SEED.isdigit() else 0
LATE = 0.1  # seconds of the processor


def written(task: store.TaskFile, folder: Path) -> bytes:
    store.save(folder / "honest.taps", task)
    return (folder / "honest.taps").read_bytes()


def patches() -> list[bytes]:
    old = {"a": torch.arange(40, dtype=torch.int16), "b": torch.tensor(1.0), "c": torch.zeros(40, dtype=torch.bool)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["a"][torch.tensor([3, 30])] = 7
    new["b"] += 1
    new["c"][::2] = True
    return [patch.diff(old, new).to_bytes(), patch.diff(new, old).to_bytes()]


def many(mutants: Mutants, count: int, read: Callable[[bytes], object]) -> int:
    """How many of the first `count` were read; whatever is raised but a TaskFileError fails the test."""
    accepted = 0
    for number in range(FIRST, FIRST + count):
        blob = mutants.draw(number)
        begun = time.process_time()
        try:
            read(blob)
            accepted += 1
        except TaskFileError as error:
            text = str(error)
            assert len(error.problem) < 1000 and text.isprintable(), f"file {number}: {text[:200]}"
        except Exception as error:
            raise AssertionError(f"file {number}: {type(error).__name__}: {error}") from error
        assert time.process_time() - begun < LATE or not THOROUGH, f"file {number}"
    return accepted


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder in memory, where there is one."""
    return Path("/dev/shm") / f"taps-fuzz-{os.getpid()}" if os.access("/dev/shm", os.W_OK) else tmp_path / "shelf"


@pytest.fixture
def file(shelf: Path):
    shelf.mkdir()
    yield shelf / "stranger.taps"
    for path in shelf.iterdir():
        path.unlink()
    shelf.rmdir()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["task", "state", "patch", "safetensors"])
def test_parsed(kind: str, file: Path, tmp_path: Path, record_property) -> None:
    record_property("drawn", f"{kind} files from {FIRST}")
    if kind == "patch":
        mutants = Mutants(patches())
    elif kind == "state":
        mutants = Mutants([written(state(), tmp_path)])
    else:
        honest = [written(example(), tmp_path), written(tiny(), tmp_path), older_example().build()]
        golden = Path(__file__).parents[1] / "files/golden/packed"
        small = [path for path in sorted(golden.glob("*.taps")) if path.stat().st_size < 20_000]
        mutants = Mutants([*honest, *(path.read_bytes() for path in small)])

    def read(blob: bytes) -> object:
        if kind == "patch":
            return patch.parse(blob)
        file.write_bytes(blob)
        return store.read_safetensors(file) if kind == "safetensors" else store.load(file)

    accepted = many(mutants, PARSED, read)
    assert 0 < accepted < PARSED  # some changes mean nothing, most do


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 40), nn.Linear(40, 3))


def test_loaded(file: Path, tmp_path: Path, record_property) -> None:
    """Through `load_task`: what is refused leaves the model as it was, what is read runs."""
    record_property("drawn", f"loaded files from {FIRST}")
    blobs = []
    configs = (taps_ext.TapsConfig(lam=1.0), taps_ext.FullConfig(), taps_ext.LoraConfig(rank=2), taps_ext.RcmConfig())
    for config in configs:
        for codec in (None, "int8", "int4", "sign", "bitmask:0.3", "lowrank:1"):
            if codec is not None and not isinstance(config, taps_ext.FullConfig):
                continue
            model = taps_ext.TaskModel(base(), config).eval()
            model.add_task("a", num_classes=3)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter, std=0.1)
            if codec is not None:
                model.pack_task("a", codec=codec)
            model.save_task("a", tmp_path / "a.taps")
            blobs.append((tmp_path / "a.taps").read_bytes())
    model = taps_ext.TaskModel(base()).eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        before = model.base(x)

    def load(blob: bytes) -> object:
        file.write_bytes(blob)
        try:
            name = model.load_task(file, "stranger")
        except TaskFileError:
            assert not model.tasks
            raise
        with torch.no_grad():
            assert model(x, task="stranger").shape[0] == 2
        model.delete_task("stranger")
        return name

    accepted = many(Mutants(blobs), LOADED, load)
    assert 0 < accepted < LOADED
    with torch.no_grad():
        assert torch.equal(model.unload().eval()(x), before)


def large(folder: Path) -> bytes:
    """About 16 KiB of a task's file: dense, packed, a norm, a head."""
    model = taps_ext.TaskModel(base(), taps_ext.FullConfig()).eval()
    model.add_task("a", num_classes=60)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.pack_task("a", codec="bitmask:0.5")
    model.save_task("a", folder / "large.taps")
    return (folder / "large.taps").read_bytes()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["task", "patch"])
def test_every_bit_and_every_length_count(kind: str, file: Path, tmp_path: Path) -> None:
    """Of 16 KiB; in `make test` a hundredth of them."""
    if kind == "task":
        blob = large(tmp_path)
    else:
        old = {"a": torch.zeros(4000), "b": torch.zeros(3000, dtype=torch.int16)}
        new = {"a": torch.rand(4000).where(torch.rand(4000) < 0.8, 0.0), "b": torch.arange(3000, dtype=torch.int16)}
        blob = patch.diff(old, new).to_bytes()
    assert 12 << 10 < len(blob) < 24 << 10

    def refused(blob: bytes) -> bool:
        try:
            if kind == "patch":
                patch.parse(blob)
            else:
                file.write_bytes(blob)
                store.load(file)
        except TaskFileError:
            return True
        return False

    assert not refused(blob)
    every = 1 if THOROUGH else 97
    made = bytearray(blob)
    for bit in range(0, 8 * len(blob), every):
        made[bit // 8] ^= 1 << bit % 8
        assert refused(bytes(made)), f"bit {bit}"
        made[bit // 8] ^= 1 << bit % 8
    for length in range(0, len(blob), every):
        assert refused(blob[:length]), f"length {length}"
