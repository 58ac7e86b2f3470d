"""Tasks that are added, replaced and removed under traffic: each answer is wholly the old state's or the new one's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peak import resident
from serving import answers, folder_of, is_close, model, samples, write

from taps_ext import ConfigError, TaskFileError, TaskFolder
from taps_ext.files.folder import NameTakenError
from taps_ext.serve import Engine, TaskTooLargeError, UnknownTaskError
from taps_ext.serve.building import bytes_of


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    return folder_of(tmp_path, 3)


def test_what_is_added_is_answered_by_when_add_returns(folder: TaskFolder, tmp_path: Path) -> None:
    x, file = samples(4), write(tmp_path / "new.taps", "new", 77)
    want = answers([file, folder.file("t1")], x)
    with Engine(model(), folder) as engine:
        with pytest.raises(UnknownTaskError):
            engine.predict(x, "new")
        assert engine.add(file) == "new" and engine.resident == ["new"]
        assert is_close(engine.predict(x, "new"), want[0])
        with pytest.raises(NameTakenError):
            engine.add(file)
        assert engine.add(file, "t1", replace=True) == "t1"
        assert is_close(engine.predict(x, "t1"), want[0])
        engine.remove("new")
        with pytest.raises(UnknownTaskError):
            engine.predict(x, "new")
        for call in (engine.remove, engine.reload):
            with pytest.raises(ConfigError, match="no task 'new'"):
                call("new")
        assert engine.resident == ["t1"] and "new" not in folder
        assert engine.add(file, "again") == "again"  # after another of that name
        assert is_close(engine.predict(x, "again"), want[0])
    assert len(engine.model.tasks) == 0


def test_what_is_refused_changes_nothing(folder: TaskFolder, tmp_path: Path) -> None:
    x, before = samples(4), folder.file("t1").read_bytes()
    want = answers([folder.file("t1")], x)[0]
    damaged = tmp_path / "damaged.taps"
    damaged.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    limit = bytes_of(_state_of(folder.file("t1"))) + 10
    wide = write(tmp_path / "wide.taps", "t1", 5, classes=500)
    with Engine(model(), folder, max_resident_bytes=limit) as engine:
        engine.predict(x, "t1")
        with pytest.raises(TaskFileError):
            engine.add(damaged, "t1", replace=True)
        with pytest.raises(TaskTooLargeError):
            engine.add(wide, replace=True)
        assert folder.file("t1").read_bytes() == before
        assert is_close(engine.predict(x, "t1"), want)
        assert engine.stats()["loads"] == 1 and len(engine.model.tasks) == 1
        engine.add(write(tmp_path / "other.taps", "t1", 6), replace=True)  # the old one goes first: no room for both
        assert is_close(engine.predict(x, "t1"), answers([tmp_path / "other.taps"], x)[0])
        assert len(engine.model.tasks) == 1


def _state_of(file: Path) -> torch.nn.Module:
    alone = model()
    return alone.state(alone.load_task(file))


def test_files_that_others_write_are_served_after_reload(folder: TaskFolder, tmp_path: Path) -> None:
    x = samples(4)
    old, new = answers([folder.file("t1"), write(tmp_path / "n.taps", "t1", 50)], x)
    with Engine(model(), folder) as engine:
        assert is_close(engine.predict(x, "t1"), old)
        folder.add(tmp_path / "n.taps", replace=True)
        assert is_close(engine.predict(x, "t1"), old)
        engine.reload("t1")
        assert is_close(engine.predict(x, "t1"), new)
        folder.file("t1").write_bytes(b"no")
        with pytest.raises(TaskFileError):
            engine.reload("t1")
        assert is_close(engine.predict(x, "t1"), new)
        folder.add(tmp_path / "n.taps", "t9")
        assert is_close(engine.predict(x, "t9"), new)  # which is there without a word


def traffic(
    path: Path, *, seconds: float, threads: int, tasks: int, versions: int, engine: dict[str, object]
) -> dict[str, Any]:
    """Threads that ask, and one that adds, replaces and removes, for so long; every answer is checked.

    Returns the statistics, the process's memory at each second, and how many changes there were.
    """
    files = {
        (t, v): write(path / f"{t}-{v}.taps", f"t{t}", 1000 * t + v) for t in range(tasks) for v in range(versions)
    }
    x = samples(5)
    outputs = dict(zip(files, answers(list(files.values()), x), strict=True))
    folder = TaskFolder(path / "folder", create=True)
    for t in range(tasks):
        folder.add(files[t, 0])
    # Of each task the versions that may answer: what was there when the request was made, and what has come since.
    # None: there was no such task.
    history: list[list[int | None]] = [[0] for _ in range(tasks)]
    settled = [0] * tasks  # the place in the history of what surely holds
    stop, checked, problems = threading.Event(), [0] * threads, list[str]()

    def ask(thread: int, served: Engine) -> None:
        generator = torch.Generator().manual_seed(thread)
        while not stop.is_set():
            t, row = (int(torch.randint(high, [], generator=generator)) for high in (tasks, len(x)))
            begin = settled[t]
            try:
                got = served.predict(x[row], f"t{t}")
                found = [v for v in range(versions) if is_close(got, outputs[t, v][row])]
                one: int | None = found[0] if len(found) == 1 else -1
            except UnknownTaskError:
                one = None
            allowed = history[t][begin:]
            if one not in allowed:
                problems.append(f"task {t}: {one} is none of {allowed}")
            checked[thread] += 1

    def change(served: Engine) -> None:
        generator = torch.Generator().manual_seed(99)
        while not stop.is_set():
            t, v, what = (int(torch.randint(high, [], generator=generator)) for high in (tasks, versions, 5))
            there = history[t][-1] is not None
            remove = what == 0 and there
            history[t].append(None if remove else v)
            if remove:
                served.remove(f"t{t}")
            elif what == 1 and there:
                folder.add(files[t, v], replace=True)
                # A state that went from memory meanwhile has been loaded anew: both are right until this returns.
                served.reload(f"t{t}")
            else:
                served.add(files[t, v], replace=True)
            settled[t] = len(history[t]) - 1

    with Engine(model(), folder, **engine) as served:  # type: ignore[arg-type]
        with ThreadPoolExecutor(threads + 1) as pool:
            running = [pool.submit(ask, i, served) for i in range(threads)] + [pool.submit(change, served)]
            end, memory = time.monotonic() + seconds, list[int]()
            while (left := end - time.monotonic()) > 0 and not problems:
                time.sleep(min(left, 1.0))
                memory.append(resident("VmRSS"))
            stop.set()
            for future in running:
                future.result(60)
        assert problems == [], problems[:5]
        assert min(checked) > 0 and sum(map(len, history)) > 2 * tasks
        stats = served.stats()
        assert stats["requests"] == sum(checked) == stats["answers"] + stats["errors"].get("UnknownTaskError", 0)
        assert set(stats["errors"]) <= {"UnknownTaskError"} and stats["queued_samples"] == 0
        until_idle(served)
    return {**stats, "memory": memory, "changes": sum(map(len, history)) - tasks}


def until_idle(served: Engine) -> None:
    """Each state in the model is that of an entry, once replaced ones are gone."""
    for _ in range(500):
        if len(served.model.tasks) == len(served.resident) == served.stats()["resident_tasks"]:
            return
        time.sleep(0.01)
    raise AssertionError(f"{served.model.tasks} are in the model, and {served.resident} in use")


@pytest.mark.parametrize("room", [pytest.param("all", marks=pytest.mark.thorough), "some"])
def test_replaced_under_traffic(tmp_path: Path, room: str) -> None:
    """With room for all, and for two of four, so that they come and go meanwhile."""
    one = bytes_of(_state_of(write(tmp_path / "one.taps", "one", 0)))
    words = {} if room == "all" else {"max_resident_bytes": 2 * one + one // 2, "max_delay": 0.001}
    stats = traffic(tmp_path, seconds=2.0, threads=8, tasks=4, versions=5, engine=words)
    assert (stats["evictions"] == 0) == (room == "all")


def test_many_forwards_of_users_beside_each_other(tmp_path: Path) -> None:
    """The engine's own batches are one thread's; `model(x, task=...)` in others meets no task but its own."""
    folder, x = folder_of(tmp_path, 4), samples(5)
    files = [folder.file(f"t{i}") for i in range(4)]
    want, served = answers(files, x), model()
    names = [served.load_task(file, f"own {i}") for i, file in enumerate(files)]
    wrong: list[int] = []

    def ask(i: int, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for row in range(60):
            with torch.no_grad():
                got = run(x[row % 5 : row % 5 + 1])
            if not is_close(got, want[i][row % 5 : row % 5 + 1]):
                wrong.append(i)

    with Engine(served, folder, max_delay=0.001) as engine, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(ask, i, lambda x, i=i: served(x, task=names[i])) for i in range(4)]
        jobs += [pool.submit(ask, i, lambda x, i=i: engine.predict(x, f"t{i}")) for i in range(4)]
        for job in jobs:
            job.result(60)
    assert wrong == []


def test_a_folder_of_its_own_goes_on_after_the_engine(folder: TaskFolder, tmp_path: Path) -> None:
    with Engine(model(), folder.path) as engine:
        engine.add(write(tmp_path / "n.taps", "n", 3))
    assert list(folder) == ["n", "t0", "t1", "t2"] and not any(folder.verify().values())
