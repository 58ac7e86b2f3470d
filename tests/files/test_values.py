"""What a file may hold: values that a trained task can have, of shapes that the base has. Its header must fit before
its payload is read."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peak import grown
from torch import nn

from taps_ext import GateError, TapsConfig, TapsError, TaskFileError, TaskModel, store
from taps_ext.store import io
from taps_ext.store.errors import (
    BadPathError,
    DtypeMismatchError,
    MetadataError,
    MissingTensorError,
    ShapeMismatchError,
    TensorValueError,
)


def model() -> TaskModel:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    made = TaskModel(nn.Sequential(*layers).eval(), TapsConfig(lam=0.1, others="task"))
    made.add_task("a", num_classes=3)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "a.taps"
    model().save_task("a", path, labels=["x", "y", "z"])
    return path


def edited(saved: Path, path: Path, change: Callable[[store.TaskFile], object]) -> Path:
    """A file with right digests whose content somebody changed."""
    file = store.load(saved)
    store.save(path, change(file) or file)  # type: ignore[arg-type]
    return path


def put(file: store.TaskFile, module: str, name: str, value: torch.Tensor) -> None:
    record = file.parts[module]
    file.parts[module] = dataclasses.replace(record, tensors={**record.tensors, name: value})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("module", "name"),
    [("0", "delta"), ("0", "bias"), ("1", "weight"), ("1", "running_mean"), ("1", "running_var"), ("5", "weight"),
     ("5", "bias")],
)  # fmt: skip
def test_no_value_of_a_file_is_inf_or_nan(saved, tmp_path, module: str, name: str, bad: float) -> None:
    """Not in what is saved, where nothing is written, and not in what is loaded."""
    made = model()
    tensor = dict(made.state("a").table[module].named_parameters()) | dict(
        made.state("a").table[module].named_buffers()
    )
    with torch.no_grad():
        next(value for key, value in tensor.items() if key.split(".")[-1] == name).view(-1)[1] = bad
    kind = GateError if name == "delta" else TapsError
    with pytest.raises(kind, match=rf"{module}: {name}: expected finite values in a task to save, got Inf or NaN"):
        made.save_task("a", tmp_path / "a.taps")
    assert not list(tmp_path.iterdir())

    def spoil(file: store.TaskFile) -> None:
        value = file.parts[module].tensors[name].clone()
        value.view(-1)[1] = bad
        put(file, module, name, value)

    fresh = model()
    with pytest.raises(TensorValueError, match=rf"tensor '{module}.{name}': expected finite values, got Inf or NaN"):
        fresh.load_task(edited(saved, tmp_path / "e.taps", spoil), "b")
    assert fresh.tasks == ["a"]


def test_masks_may_hold_inf(tmp_path) -> None:
    """A buffer of what is no norm is not a trained value: attention masks are of -inf."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("mask", torch.full((4,), -torch.inf))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.scale).where(self.mask.isinf(), self.mask)

    def build() -> TaskModel:
        torch.manual_seed(0)
        return TaskModel(
            nn.Sequential(nn.Linear(4, 4), Masked(), nn.Linear(4, 2)).eval(), TapsConfig(lam=0.1, others="task")
        )

    made = build()
    made.add_task("a", num_classes=2)
    made.save_task("a", tmp_path / "a.taps")
    again = build()
    again.load_task(tmp_path / "a.taps")
    x = torch.randn(3, 4)
    assert torch.equal(made(x, task="a"), again(x, task="a"))


def test_values_that_no_task_has(saved, tmp_path) -> None:
    head = {"type": "linear", "in": 4, "out": 3, "bias": True}

    def module(**more: object) -> Callable[[store.TaskFile], None]:
        def change(file: store.TaskFile) -> None:
            record = file.parts["5"]
            file.parts["5"] = dataclasses.replace(record, facts={**record.facts, "module": {**head, **more}})

        return change

    def wide(file: store.TaskFile) -> None:
        module(**{"in": 7})(file)
        put(file, "5", "weight", torch.zeros(3, 7))

    cases: list[tuple[Callable[[store.TaskFile], object], type[TaskFileError], str]] = [
        (lambda f: put(f, "1", "running_var", torch.tensor([1.0, -0.5, 1.0, 1.0])), TensorValueError,
         "tensor '1.running_var': expected variances, got -0.5"),
        (lambda f: dataclasses.replace(f, labels=["x", "y"]), MetadataError,
         r"taps.labels: expected 3 names \(the head\), got 2"),
        (wide, ShapeMismatchError, "head: expected 4 inputs, as the base's has, got 7"),
        (lambda f: put(f, "5", "weight", torch.zeros(3, 4, dtype=torch.int64)), DtypeMismatchError,
         "weight: expected floating-point values, got torch.int64"),
        (module(**{"in": 1 << 40}), MissingTensorError, "expected shape"),
        (module(**{"in": -4}), MissingTensorError, "expected shape"),
        (lambda f: dataclasses.replace(f, method={**f.method, "score_init": 1e300}), MetadataError,
         "score_init: expected a number in"),
        (lambda f: dataclasses.replace(f, extra={"training_only": "[" * 100_000}), MetadataError, "training_only"),
        (lambda f: dataclasses.replace(f, extra={"training_only": json.dumps(["k" * 100_000])}), MetadataError,
         "training_only"),
    ]  # fmt: skip
    for change, kind, message in cases:
        fresh = model()
        with pytest.raises(kind, match=message) as caught:
            fresh.load_task(edited(saved, tmp_path / "e.taps", change), "b")
        assert fresh.tasks == ["a"] and len(str(caught.value)) < 1000


def test_what_does_not_fit_is_refused_by_its_header(saved, tmp_path, monkeypatch) -> None:
    """A Delta of 64 MiB on a layer of 108 weights: of the payload no byte is read, and memory does not grow by it."""
    path = edited(saved, tmp_path / "e.taps", lambda f: put(f, "0", "delta", torch.zeros(1 << 24)))
    read, sizes = io.read_all, []

    def counted(fd: int, view: memoryview, *, path: Path) -> None:
        sizes.append(len(view))
        read(fd, view, path=path)

    monkeypatch.setattr(io, "read_all", counted)
    fresh = model()

    def load() -> None:
        with pytest.raises(ShapeMismatchError, match=r"'0.delta': expected shape \[4, 3, 3, 3\], got \[16777216\]"):
            fresh.load_task(path, "b")

    assert grown(lambda: torch.ones(1 << 24)) > 60 << 20, "the measurement works"
    assert grown(load) < 16 << 20
    assert max(sizes) < 1 << 16
    with pytest.raises(ShapeMismatchError):
        fresh.reload_task("a", path)


def test_every_tensor_that_is_taken_is_proven(saved, tmp_path) -> None:
    """A flipped bit anywhere in the payload, found by the tensor that it is in."""
    content, header = bytearray(saved.read_bytes()), store.read_header(saved)
    data = len(content) - sum(info.nbytes for info in header.tensors.values())
    for info in header.tensors.values():
        flipped = bytearray(content)
        flipped[data + info.begin] ^= 4
        (tmp_path / "f.taps").write_bytes(flipped)
        fresh = model()
        with pytest.raises(TaskFileError):
            fresh.load_task(tmp_path / "f.taps", "b")
        assert fresh.tasks == ["a"]


@pytest.mark.parametrize("path", ["/" + "a" * 5000, "/tmp/" + "b" * 300, "a\0b", "\ud800.taps"])
def test_paths_that_lead_nowhere(path: str) -> None:
    for act in (lambda: model().load_task(path, "b"), lambda: model().save_task("a", path)):
        with pytest.raises(BadPathError, match="expected a path, got one with") as caught:
            act()
        assert len(str(caught.value)) < 600


def test_loops_of_links(tmp_path) -> None:
    os.symlink(tmp_path / "one", tmp_path / "two")
    os.symlink(tmp_path / "two", tmp_path / "one")
    for act in (lambda: model().load_task(tmp_path / "one", "b"), lambda: model().save_task("a", tmp_path / "one")):
        with pytest.raises(BadPathError, match="too many levels of symbolic links"):
            act()


def test_a_full_disk_names_the_file_and_keeps_the_old_one(saved, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.taps"
    path.write_bytes(saved.read_bytes())

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        model().save_task("a", path)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes() == saved.read_bytes() and [p.name for p in tmp_path.iterdir()] == ["a.taps"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_takes_no_files_is_named(saved, tmp_path, monkeypatch, number) -> None:
    path = tmp_path / "a.taps"
    path.write_bytes(saved.read_bytes())
    opened = os.open

    def refusing(name: str, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), name)
        return opened(name, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(OSError, match="expected a folder to make files in") as caught:
        model().save_task("a", path)
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path))
    assert path.read_bytes() == saved.read_bytes() and [p.name for p in tmp_path.iterdir()] == ["a.taps"]


def test_what_is_wrong_is_not_hidden_by_tidying_up(tmp_path, monkeypatch) -> None:
    """A file system that becomes read-only: the temporary file can be neither written nor removed."""

    def read_only(*args: object, **kwargs: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "write", read_only)
    monkeypatch.setattr(os, "unlink", read_only)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        model().save_task("a", tmp_path / "a.taps")
    assert caught.value.filename == str(tmp_path / "a.taps")
