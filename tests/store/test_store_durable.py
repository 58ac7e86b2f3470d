"""Writing is atomic, durable and polite."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from store_files import example, tiny

from taps_ext import store
from taps_ext.store import io


@pytest.fixture
def umask() -> object:
    old = os.umask(0o027)
    yield
    os.umask(old)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_size_is_returned_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    assert store.save(path, example()) == path.stat().st_size
    assert os.listdir(tmp_path) == ["a.taps"]
    assert path.stat().st_nlink == 1


def test_a_new_file_follows_the_umask(umask: object, tmp_path: Path) -> None:
    store.save(tmp_path / "a.taps", tiny())
    assert mode_of(tmp_path / "a.taps") == 0o640


def test_an_existing_file_keeps_its_mode(umask: object, tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    path.write_bytes(b"old")
    path.chmod(0o600)
    store.save(path, tiny())
    assert mode_of(path) == 0o600
    assert store.load(path).parts.keys() == {"", "a"}


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link.taps"
    link.symlink_to("real/a.taps")
    store.save(link, tiny())
    assert link.is_symlink() and (real / "a.taps").is_file() and os.listdir(real) == ["a.taps"]
    assert store.load(link).digest == store.load(real / "a.taps").digest


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store.save("a.taps", tiny())
    assert store.read_header("a.taps").path == "a.taps"


FAILURES: list[tuple[str, type[BaseException]]] = [
    ("os.fsync", OSError),
    ("os.replace", OSError),
    ("os.lseek", OSError),
    ("header_digest", RuntimeError),
    ("to_bytes", KeyboardInterrupt),
]


@pytest.mark.parametrize(("where", "error"), FAILURES)
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failure_leaves_the_old_file_alone(
    where: str, error: type[BaseException], old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.taps"
    if old is not None:
        path.write_bytes(old)
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def fail(*_: object) -> None:
        raise error("no space left")

    def fail_on_words(*_: object, **__: object) -> None:
        fail()

    target = where.removeprefix("os.")
    monkeypatch.setattr(os if where.startswith("os.") else io, target, fail_on_words)
    with pytest.raises(error):
        store.save(path, example())
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ([] if old is None else ["a.taps"])
    assert old is None or path.read_bytes() == old
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_interrupted_in_the_third_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.taps"
    path.write_bytes(b"old")
    seen: list[list[str]] = []
    write: Callable[..., int] = os.write

    def interrupted(fd: int, data: memoryview) -> int:
        seen.append(os.listdir(tmp_path))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return write(fd, data)

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(path, example())
    monkeypatch.undo()
    assert len(seen[1]) == 2, "the temporary file is in the same folder"
    assert os.listdir(tmp_path) == ["a.taps"] and path.read_bytes() == b"old"


def test_the_order_of_durability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        events.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file")
        fsync(fd)

    def replaced(source: str, target: str) -> None:
        events.append("rename")
        assert os.path.dirname(source) == os.path.dirname(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    store.save(tmp_path / "a.taps", tiny())
    assert events == ["sync file", "rename", "sync folder"]
