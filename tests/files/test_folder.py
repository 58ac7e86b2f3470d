"""A folder of tasks: by name, whole or not at all, for the cost of one whatever lies beside it."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from taps_ext import ConfigError, JointTapsConfig, TapsConfig, TaskFileError, TaskFolder, TaskModel, store
from taps_ext.cli import main


def model(config: TapsConfig | None = None) -> TaskModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).eval()
    return TaskModel(base, config or TapsConfig(lam=0.1))


def write(path: Path, name: str, seed: int = 0) -> Path:
    made = model()
    torch.manual_seed(seed)
    made.add_task(name, num_classes=3)
    made.save_task(name, path)
    return path


def test_tasks_are_kept_by_name(tmp_path) -> None:
    folder = TaskFolder(tmp_path / "tasks", create=True)
    names = ["birds", "a:b", "ä%20", ".hidden", "%shared-x"]
    for seed, name in enumerate(names):
        assert folder.add(write(tmp_path / "one.taps", name, seed)) == name
    assert list(TaskFolder(folder.path)) == sorted(names) and len(folder) == 5
    assert all(name in folder for name in names) and "other" not in folder and 3 not in folder
    x = torch.randn(3, 4)
    for seed, name in enumerate(names):
        made = model()
        made.load_task(folder.file(name), shared=folder.shared(name))
        torch.manual_seed(seed)
        made.add_task("again", num_classes=3)
        assert torch.equal(made(x, task=name), made(x, task="again"))
    assert folder.add(tmp_path / "one.taps", "more") == "more" and "more" in folder
    folder.remove("more")
    assert "more" not in folder and folder.verify() == {file: None for file in os.listdir(folder.path)}


def test_names_too_long_for_a_file(tmp_path) -> None:
    folder, names = TaskFolder(tmp_path / "tasks", create=True), ["birds", "\u9ce5" * 60, "\u9ce5" * 61]
    for seed, name in enumerate(names):
        assert folder.add(write(tmp_path / "one.taps", name, seed)) == name
    assert list(folder) == sorted(names) and len(folder) == 3 and all(name in folder for name in names)
    assert [folder.header(name).metadata.name for name in names] == names
    with pytest.raises(ConfigError, match="already; replace=True"):
        folder.add(tmp_path / "one.taps")
    with pytest.raises(ConfigError, match="name: expected one that is shorter, or the file's own, got"):
        folder.add(tmp_path / "one.taps", "x" * 300)
    folder.remove(names[1])
    assert list(folder) == [names[0], names[2]] and names[1] not in folder
    folder.file(names[2]).write_bytes(b"damaged")
    assert list(folder) == sorted([names[0], folder.file(names[2]).stem])


def test_a_taken_name_is_refused_and_nothing_is_lost(tmp_path) -> None:
    folder = TaskFolder(tmp_path / "tasks", create=True)
    folder.add(write(tmp_path / "one.taps", "birds", 0))
    before = folder.file("birds").read_bytes()
    other = write(tmp_path / "two.taps", "birds", 1)
    with pytest.raises(ConfigError, match="name: 'birds' is in .* already; replace=True replaces it"):
        folder.add(other)
    assert folder.file("birds").read_bytes() == before != other.read_bytes()
    folder.add(other, replace=True)
    assert folder.file("birds").read_bytes() == other.read_bytes() and os.listdir(folder.path) == ["birds.taps"]


def test_damaged_files_stay_outside(tmp_path) -> None:
    folder = TaskFolder(tmp_path / "tasks", create=True)
    path = write(tmp_path / "one.taps", "birds")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TaskFileError, match=r"one.taps: tensor .* not those that were written"):
        folder.add(path)
    path.write_bytes(content[:100])
    with pytest.raises(TaskFileError, match="one.taps"):
        folder.add(path)
    assert not os.listdir(folder.path)
    folder.add(write(path, "birds"))
    with folder.file("birds").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert "not those that were written" in (folder.verify()["birds.taps"] or "")


def test_states_stay_outside(tmp_path) -> None:
    """And so does what only a state may be."""
    folder, path = TaskFolder(tmp_path / "tasks", create=True), tmp_path / "a.state"
    few = {"a": torch.zeros(1)}
    many = {f"t{i}": torch.zeros(0) for i in range(10_000)}
    for values, error, problem in (
        (few, ConfigError, "expected a task's or a family's, got a state"),
        (many, TaskFileError, "a.state: 10000 tensors in a task's header, at most 8192 allowed"),
    ):
        store.save(path, store.TaskFile(kind="state", parent="sha256:" + "0" * 64, values=values))
        with pytest.raises(error, match=problem):
            folder.add(path)
    assert not os.listdir(folder.path)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch) -> None:
    folder, file = TaskFolder(tmp_path / "tasks", create=True), write(tmp_path / "one.taps", "birds")

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        folder.add(file)
    assert caught.value.filename == str(folder.path / "birds.taps") and not os.listdir(folder.path)


def test_mistakes_are_told(tmp_path) -> None:
    with pytest.raises(ConfigError, match="path: expected a folder, got .*none; create=True makes it"):
        TaskFolder(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="path: expected a folder, got"):
        TaskFolder(tmp_path / "file", create=True)
    folder = TaskFolder(tmp_path / "tasks", create=True)
    folder.add(write(tmp_path / "one.taps", "birds"))
    with pytest.raises(ConfigError, match="name: no task 'brids' in .* .did you mean 'birds'"):
        folder.file("brids")
    for name in ("", 3):
        with pytest.raises(ConfigError, match="name: expected a task's name"):
            folder.file(name)  # type: ignore[arg-type]


JOINT = JointTapsConfig(lam=0.1)


def with_family(tmp_path: Path) -> tuple[TaskModel, TaskFolder]:
    """A model whose task "a" stands on a family, the files of both, and a folder for them."""
    made = model(JOINT)
    made.add_task("a", num_classes=3)
    (family,) = made.families
    made.save_shared(family, tmp_path / "family.taps")
    made.save_task("a", tmp_path / "a.taps")
    return made, TaskFolder(tmp_path / "tasks", create=True)


def test_families_lie_beside_their_tasks(tmp_path) -> None:
    made, folder = with_family(tmp_path)
    assert folder.add(tmp_path / "family.taps") == "" == folder.add(tmp_path / "family.taps")
    folder.add(tmp_path / "a.taps")
    assert list(folder) == ["a"] and folder.shared("a") is not None
    fresh = model(JOINT)
    fresh.load_task(folder.file("a"), shared=folder.shared("a"))
    x = torch.randn(2, 4)
    assert torch.equal(fresh(x, task="a"), made(x, task="a"))
    with pytest.raises(ConfigError, match="name: expected None for a family's file"):
        folder.add(tmp_path / "family.taps", "b")


def _add(folder: Path, file: Path, done: multiprocessing.SimpleQueue) -> None:
    try:
        TaskFolder(folder).add(file)
        done.put("added")
    except ConfigError:
        done.put("refused")


def test_of_two_writers_one_is_refused(tmp_path) -> None:
    """Ten times; what is there is one of the two files, whole."""
    files = [write(tmp_path / f"{seed}.taps", "birds", seed) for seed in range(2)]
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        folder = TaskFolder(tmp_path / f"tasks {attempt}", create=True)
        done = context.SimpleQueue()
        writers = [context.Process(target=_add, args=(folder.path, file, done)) for file in files]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert sorted(done.get() for _ in writers) == ["added", "refused"]
        assert folder.file("birds").read_bytes() in [file.read_bytes() for file in files]
        assert os.listdir(folder.path) == ["birds.taps"]


class Calls:
    """What is asked of the system while it is watched: calls by name, and bytes read."""

    NAMES = ("open", "stat", "lstat", "listdir", "scandir", "readv")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts, self.opened, self.read = dict.fromkeys(self.NAMES, 0), [], 0
        for name in self.NAMES:
            monkeypatch.setattr(os, name, functools.partial(self._call, name, getattr(os, name)))

    def _call(self, name: str, function: Callable[..., object], *args: object, **words: object) -> object:
        self.counts[name] += 1
        found = function(*args, **words)
        if name == "open":
            self.opened.append(str(args[0]))
        if name == "readv":
            self.read += found  # type: ignore[operator]
        return found


def crowd(path: Path, content: bytes, count: int) -> TaskFolder:
    path.mkdir()
    for index in range(count):
        (path / f"task {index}.taps").write_bytes(content)
    return TaskFolder(path)


def used(path: Path) -> tuple[dict[str, int], int, int, int]:
    """The calls of opening a folder, finding a task in it and loading that, the bytes read, what it allocates, and the
    size of the file."""
    made = model()
    with pytest.MonkeyPatch.context() as context:
        tracemalloc.start()
        calls = Calls(context)
        folder = TaskFolder(path)
        assert not calls.opened and calls.counts["listdir"] == calls.counts["scandir"] == 0
        assert "task 7" in folder and folder.summary("task 7")["task"] == "task 7"
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        header = calls.read
        assert calls.opened == [str(folder.file("task 7"))]
        made.load_task(folder.file("task 7"), "t")
    assert calls.opened == 2 * [str(folder.file("task 7"))]
    return calls.counts, calls.read - header, held, folder.file("task 7").stat().st_size


def test_a_thousand_tasks_cost_what_ten_do(tmp_path) -> None:
    """The same calls, to the last one; a task's file is read once, and no other one."""
    content = write(tmp_path / "one.taps", "birds").read_bytes()
    few, many = (crowd(tmp_path / f"{count} tasks", content, count).path for count in (10, 1000))
    used(few)  # what is made once
    (calls, read, held, size), (calls_of_many, read_of_many, held_of_many, _) = used(few), used(many)
    assert calls == calls_of_many and sum(calls.values()) < 60
    assert read == read_of_many == size
    assert held_of_many < held + 4096


def test_a_packed_task_is_read_once(tmp_path, monkeypatch) -> None:
    """Its bytes are hashed and used as they come."""
    made = model()
    made.add_task("a", num_classes=3)
    made.set_gates("a", open=["*"])
    made.pack_task("a", codec="int8")
    size = made.save_task("a", tmp_path / "a.taps")
    calls = Calls(monkeypatch)
    model().load_task(tmp_path / "a.taps")
    assert calls.opened == [str(tmp_path / "a.taps")] and calls.read == size


def test_a_family_is_found_by_its_name_among_many(tmp_path, monkeypatch) -> None:
    """No task's file is read for it."""
    _, folder = with_family(tmp_path)
    for file in ("family", "a"):
        folder.add(tmp_path / f"{file}.taps")
    for index in range(20):
        (folder.path / f"!{index}.taps").write_bytes((tmp_path / "a.taps").read_bytes())
    fresh, calls = model(JOINT), Calls(monkeypatch)
    fresh.load_task(folder.file("a"))
    assert fresh.tasks == ["a"] and {Path(path).name[:8] for path in calls.opened} == {"a.taps", "%shared-"}


def test_the_command(tmp_path, capsys) -> None:
    files = [str(write(tmp_path / f"{name}.taps", name)) for name in ("birds", "cars")]
    folder = str(tmp_path / "tasks")
    assert main(["folder", "add", folder, *files]) == 0
    assert "birds" in capsys.readouterr().out
    assert main(["folder", "list", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["method"]) for row in found] == [("birds", "taps"), ("cars", "taps")]
    assert main(["folder", "add", folder, files[0]]) == 2
    assert "already; --replace replaces it" in capsys.readouterr().err
    assert main(["folder", "remove", folder, "cars"]) == 0 and main(["folder", "verify", folder]) == 0
    assert "ok   birds.taps" in capsys.readouterr().out
    whole = Path(folder, "birds.taps").read_bytes()
    Path(folder, "ants.taps").write_bytes(whole[: len(whole) // 2])
    assert main(["folder", "list", folder]) == 1
    shown = capsys.readouterr().out
    assert "birds    taps" in shown and "BAD  ants: cut short" in shown
    assert main(["folder", "list", folder, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in rows] == ["birds", "ants"] and "cut short" in rows[1]["problem"]
    Path(folder, "birds.taps").write_bytes(b"no file of ours")
    assert main(["folder", "verify", folder]) == 1
    assert main(["folder", "list", str(tmp_path / "none")]) == 2
