"""Patches of checkpoints: files and folders of them; old or new whatever happens, no litter after the next start."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from patch_states import copies, example, same
from safetensors.torch import load_file, save_file
from stages import THOROUGH
from torch import Tensor

from taps_ext import ConfigError, TaskFileError, patch, store
from taps_ext.patch import rewriting
from taps_ext.patch.errors import AlreadyAppliedError, BaseMismatchError, LinkedShardError, OtherTensorsError
from taps_ext.store import journal
from taps_ext.store.durable import Replacement
from taps_ext.store.errors import (
    DtypeMismatchError,
    DuplicateKeyError,
    HeaderError,
    LayoutError,
    MissingFileError,
    MissingTensorError,
    NotRegularFileError,
    TensorNameError,
    UnknownDtypeError,
)

State = dict[str, Tensor]


def states() -> tuple[State, State]:
    """The example without what safetensors' own writer does not know."""
    old, new = example()
    del old["wide"], new["wide"]
    return old, new


def write_shards(folder: Path, state: State, *, index: bool = True, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    files = [f"model-{1 + at:05}-of-{count:05}.safetensors" for at in range(count)]
    places = {name: files[at * count // len(names)] for at, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: state[n] for n in names if places[n] == file}, folder / file, {"format": "pt"})
    if index:
        total = sum(tensor.nbytes for tensor in state.values())
        content = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def read(path: Path) -> State:
    """By safetensors' own reader."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("verify", ["full", "touched", None])
def test_a_file(tmp_path: Path, verify: str | None) -> None:
    old, new = states()
    save_file(old, tmp_path / "old.safetensors", {"format": "pt", "note": "mine"})
    save_file(new, tmp_path / "new.safetensors")
    made = patch.diff(tmp_path / "old.safetensors", tmp_path / "new.safetensors", out=tmp_path / "p.tapspatch")
    assert made.to_bytes() == (tmp_path / "p.tapspatch").read_bytes() == patch.diff(old, new).to_bytes()
    inode = (tmp_path / "old.safetensors").stat()
    done = patch.apply(tmp_path / "old.safetensors", tmp_path / "p.tapspatch", verify=verify)
    assert same(read(tmp_path / "old.safetensors"), new) and (done.before, done.after) == (made.before, made.after)
    assert done.verified == (verify or "full") and (tmp_path / "old.safetensors").stat().st_mode == inode.st_mode
    header = json.loads((tmp_path / "old.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert header["__metadata__"] == {"format": "pt", "note": "mine"}
    assert sorted(os.listdir(tmp_path)) == ["new.safetensors", "old.safetensors", "p.tapspatch"]
    with pytest.raises(AlreadyAppliedError):
        patch.apply(tmp_path / "old.safetensors", tmp_path / "p.tapspatch", verify=verify)


def test_elsewhere_and_several_at_once(tmp_path: Path) -> None:
    old, new = states()
    last = {**new, "stays": new["stays"] + 1}
    save_file(old, tmp_path / "old.safetensors")
    before = (tmp_path / "old.safetensors").read_bytes()
    patch.diff(old, new, out=tmp_path / "1.tapspatch")
    patch.diff(new, last, out=tmp_path / "2.tapspatch")
    chain = [tmp_path / "1.tapspatch", str(tmp_path / "2.tapspatch")]
    patch.apply(tmp_path / "old.safetensors", chain, out=tmp_path / "made.safetensors")
    assert same(read(tmp_path / "made.safetensors"), last)
    assert (tmp_path / "old.safetensors").read_bytes() == before


def test_tensors_that_come_go_and_change_form(tmp_path: Path) -> None:
    old, new = states()
    new = {n: t for n, t in new.items() if n != "one"}
    new.update(two=torch.arange(7), gap=new["gap"].float(), stays=new["stays"].reshape(9))
    save_file(old, tmp_path / "old.safetensors", {"format": "pt"})
    made = patch.diff(tmp_path / "old.safetensors", new, out=tmp_path / "p.tapspatch")
    patch.apply(tmp_path / "old.safetensors", tmp_path / "p.tapspatch")
    assert same(read(tmp_path / "old.safetensors"), new)
    assert store.read_safetensors(tmp_path / "old.safetensors")[1] == {"format": "pt"}
    assert patch.digest(tmp_path / "old.safetensors") == made.after
    odd = {**old, "one": torch.tensor(5.0)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(BaseMismatchError, match="'one'"):
        patch.apply(tmp_path / "odd.safetensors", made)
    assert same(read(tmp_path / "odd.safetensors"), odd)
    with pytest.raises(OtherTensorsError, match="single file"):
        patch.apply(write_shards(tmp_path / "shards", old), made)


@pytest.mark.parametrize("by", ["folder", "index", "no index"])
def test_shards(tmp_path: Path, by: str) -> None:
    old, new = states()
    folder = write_shards(tmp_path / "model", old, index=by != "no index")
    (folder / "config.json").write_text("{}")
    target = folder / "model.safetensors.index.json" if by == "index" else folder
    made = patch.diff(target, write_shards(tmp_path / "new", new, count=2))
    assert made.to_bytes() == patch.diff(old, new).to_bytes()
    names = sorted(os.listdir(folder))
    patch.apply(target, made, out=tmp_path / "made")
    assert same(read(folder), old) and same(read(tmp_path / "made"), new)
    assert sorted(os.listdir(tmp_path / "made")) == [name for name in names if name != "config.json"]
    with pytest.raises(ConfigError, match="out: expected a new folder"):
        patch.apply(target, made, out=tmp_path / "made")
    patch.apply(target, made)
    assert same(read(folder), new) and sorted(os.listdir(folder)) == names
    with pytest.raises(AlreadyAppliedError):
        patch.apply(target, made)


def test_only_shards_that_change_are_written(tmp_path: Path) -> None:
    old, _ = states()
    new = {**old, "bit": old["bit"] + 1}
    folder = write_shards(tmp_path / "model", old)
    before = {p.name: p.stat().st_ino for p in folder.iterdir()}
    patch.apply(folder, patch.diff(old, new))
    after = {p.name: p.stat().st_ino for p in folder.iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["model-00001-of-00003.safetensors"]
    assert same(read(folder), new)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_what_is_replaced_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    old, new = states()
    made = patch.diff(old, new)
    for name in ("old", "there"):
        save_file(old, tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.safetensors").chmod(mode)
    folder = write_shards(tmp_path / "model", old)
    for file in folder.iterdir():
        file.chmod(mode)
    patch.apply(tmp_path / "old.safetensors", made, out=tmp_path / "there.safetensors")
    patch.apply(tmp_path / "old.safetensors", made)
    patch.apply(folder, made)
    for file in (tmp_path / "old.safetensors", tmp_path / "there.safetensors", *folder.iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == mode
    assert all(same(read(path), new) for path in (tmp_path / "old.safetensors", tmp_path / "there.safetensors", folder))


def test_out_is_not_what_is_patched(tmp_path: Path) -> None:
    old, new = states()
    made = patch.diff(old, new)
    file = tmp_path / "old.safetensors"
    save_file(old, file)
    (tmp_path / "link.safetensors").symlink_to(file)
    folder = write_shards(tmp_path / "model", old)
    before = snapshot(tmp_path)
    for target, out in (
        (file, file),
        (file, tmp_path / "model" / ".." / "old.safetensors"),
        (file, tmp_path / "link.safetensors"),
        (tmp_path / "link.safetensors", file),
        (folder, folder),
        (folder / "model.safetensors.index.json", folder),
    ):
        with pytest.raises(ConfigError, match="out: expected a place of its own.*leave --out away"):
            patch.apply(target, made, out=out)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("sharded", [False, True])
def test_another_base_changes_no_file(tmp_path: Path, sharded: bool) -> None:
    old, new = states()
    made = patch.diff(old, new)
    for odd, kind in (
        ({**old, "gap": old["gap"] + 1}, BaseMismatchError),
        ({**old, "stays": old["stays"] + 1}, BaseMismatchError),  # not touched: seen in full
        ({n: t for n, t in old.items() if n != "far"}, MissingTensorError),
        ({**old, "gap": old["gap"].half()}, DtypeMismatchError),
    ):
        folder = tmp_path / f"{len(os.listdir(tmp_path))}"
        write_shards(folder, odd, count=3 if sharded else 1)
        target = folder if sharded else folder / "model-00001-of-00001.safetensors"
        before = snapshot(folder)
        for out in (None, folder / ("made" if sharded else "made.safetensors")):
            with pytest.raises(kind):
                patch.apply(target, made, out=out)
        assert snapshot(folder) == before


def test_every_dtype_of_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import _TYPES  # type: ignore[attr-defined]

    old = {name: (torch.arange(64) % 2).to(torch.uint8).repeat(8).view(dtype) for name, dtype in _TYPES.items()}
    new = copies(old)
    for tensor in new.values():
        tensor.view(torch.uint8)[16] ^= 1
    save_file(old, tmp_path / "old.safetensors")
    patch.apply(tmp_path / "old.safetensors", patch.diff(tmp_path / "old.safetensors", new))
    assert same(read(tmp_path / "old.safetensors"), new)


def test_a_link_to_a_file_stays(tmp_path: Path) -> None:
    old, new = states()
    (tmp_path / "blobs").mkdir()
    save_file(old, tmp_path / "blobs" / "x")
    (tmp_path / "model.safetensors").symlink_to("blobs/x")
    patch.apply(tmp_path / "model.safetensors", patch.diff(old, new))
    assert (tmp_path / "model.safetensors").is_symlink() and same(read(tmp_path / "blobs" / "x"), new)
    folder = write_shards(tmp_path / "model", old)
    os.rename(folder / "model-00002-of-00003.safetensors", tmp_path / "elsewhere")
    (folder / "model-00002-of-00003.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LinkedShardError, match="use out"):
        patch.apply(folder, patch.diff(old, new))
    patch.apply(folder, patch.diff(old, new), out=tmp_path / "made")
    assert same(read(tmp_path / "made"), new) and same(read(folder), old)


def index_of(folder: Path, change: Callable[[dict[str, str]], object]) -> Path:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))
    return folder


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    old, new = states()
    made = patch.diff(old, new)
    cases: list[tuple[Path, type[Exception], str]] = []

    def folder(name: str) -> Path:
        return write_shards(tmp_path / name, old)

    cases.append((tmp_path / "none.safetensors", MissingFileError, "no such file"))
    cases.append((tmp_path / "none.safetensors.index.json", MissingFileError, "no such file"))
    (tmp_path / "empty").mkdir()
    cases.append((tmp_path / "empty", MissingFileError, "without a safetensors file"))
    os.mkfifo(tmp_path / "pipe.safetensors")
    cases.append((tmp_path / "pipe.safetensors", NotRegularFileError, "a pipe"))
    cases.append((index_of(folder("a"), lambda m: m.update(far="../x.safetensors")), TensorNameError, "'far'"))
    cases.append((index_of(folder("b"), lambda m: m.update(more=m["far"])), MissingTensorError, "'more'"))
    cases.append((index_of(folder("c"), lambda m: m.pop("far")), LayoutError, "'far'"))
    cases.append((index_of(folder("d"), lambda m: m.update(far=3)), TensorNameError, "'far'"))
    (folder("e") / "model.safetensors.index.json").write_text("[]")
    cases.append((tmp_path / "e", HeaderError, "weight_map"))
    (folder("f") / "model.safetensors.index.json").unlink()
    save_file({"far": old["far"]}, tmp_path / "f" / "more.safetensors")
    cases.append((tmp_path / "f", DuplicateKeyError, "'far'"))
    (folder("g") / "other.safetensors.index.json").write_text("{}")
    cases.append((tmp_path / "g", ConfigError, "expected one index"))
    save_file({"x": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "h.safetensors")
    raw = (tmp_path / "h.safetensors").read_bytes()
    (tmp_path / "h.safetensors").write_bytes(raw.replace(b'"U8"', b'"F4"'))
    cases.append((tmp_path / "h.safetensors", UnknownDtypeError, "'F4'"))
    for path, kind, words in cases:
        for call in (patch.digest, lambda p: patch.diff(p, old), lambda p: patch.apply(p, made)):
            with pytest.raises(kind, match=words) as stop:
                call(path)  # type: ignore[no-untyped-call, operator]
            assert len(str(stop.value)) < 2000


# -------------------------------------------------------------------------------------- failures and kills


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_failing_disk(tmp_path: Path, where: str, sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = states()
    folder = write_shards(tmp_path / "model", old, count=3 if sharded else 1)
    target = folder if sharded else folder / "model-00001-of-00001.safetensors"
    before = snapshot(folder)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, where, fail)
        with pytest.raises(OSError, match="No space left"):
            patch.apply(target, patch.diff(old, new))
    assert snapshot(folder) == before
    patch.apply(target, patch.diff(old, new))
    assert same(read(folder), new)


def test_a_file_that_is_written_to_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = states()
    save_file(old, tmp_path / "old.safetensors")
    check = rewriting._check_before

    def then_write(*args: object) -> None:
        check(*args)  # type: ignore[arg-type]
        raw = bytearray((tmp_path / "old.safetensors").read_bytes())
        raw[-1000] ^= 1
        with (tmp_path / "old.safetensors").open("rb+") as file:
            file.write(raw)

    monkeypatch.setattr(rewriting, "_check_before", then_write)
    with pytest.raises(BaseMismatchError):
        patch.apply(tmp_path / "old.safetensors", patch.diff(old, new))
    assert os.listdir(tmp_path) == ["old.safetensors"]


def test_litter_of_the_dead_goes_and_that_of_the_living_stays(tmp_path: Path) -> None:
    old, new = states()
    folder = write_shards(tmp_path / "model", old)
    for name in (".taps-0123456789abcdef.tmp", ".taps-0123456789abcdef.shard", ".taps-mine.tmp", ".taps-0.shard"):
        (folder / name).write_bytes(b"x")
    alive = Replacement(folder / "x")
    patch.apply(folder, patch.diff(old, new))
    left = {name for name in os.listdir(folder) if name.startswith(".")}
    assert left == {".taps-mine.tmp", ".taps-0.shard", os.path.basename(alive.temporary)}
    alive.drop()


def test_litter_of_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = states()
    folder, made = write_shards(tmp_path / "model", old), patch.diff(old, new)
    part = tmp_path / ".taps-made.part"
    part.mkdir()
    (part / "model-00001-of-00003.safetensors").write_bytes(b"half")
    with journal.held(str(part)), pytest.raises(ConfigError, match="nobody else is writing"):
        patch.apply(folder, made, out=tmp_path / "made")
    assert part.exists() and not (tmp_path / "made").exists()
    patch.apply(folder, made, out=tmp_path / "made")
    assert same(read(tmp_path / "made"), new) and not part.exists()
    with monkeypatch.context() as context:
        context.setattr(os, "rename", lambda *_: pytest.fail("stopped"))
        with pytest.raises(BaseException, match="stopped"):
            patch.apply(folder, made, out=tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["made", "model"]


def test_readers_share_a_folder(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model", states()[0])
    assert patch.diff(folder, folder).changed == {}


@pytest.mark.parametrize("after", range(4))
def test_a_commit_that_stopped_is_finished_by_whoever_opens(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the journal and that many renames."""
    old, new = states()
    folder = write_shards(tmp_path / "model", old)
    replace, done = os.replace, [-1]  # the journal's own comes first

    def stop(source: str, target: str) -> None:
        if done[0] == after:
            raise SystemExit
        replace(source, target)
        done[0] += 1

    def leave(self: Replacement) -> None:  # what a kill does not do
        self.close()

    with monkeypatch.context() as context:
        context.setattr(os, "replace", stop)
        context.setattr(Replacement, "drop", leave)
        if after == 3:
            context.setattr(os, "unlink", lambda path: stop("", ""))
        with pytest.raises(SystemExit):
            patch.apply(folder, patch.diff(old, new))
    assert (folder / journal.JOURNAL).exists()
    assert patch.digest(folder) == patch.digest(new) and same(read(folder), new)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"renames":{"a.shard":"../b"}}', '{"renames":{"../a.shard":"b"}}', '{"renames":{"a":"b"}}', "{"],
)
def test_a_journal_that_is_none(tmp_path: Path, text: str) -> None:
    folder = write_shards(tmp_path / "model", states()[0])
    (folder / journal.JOURNAL).write_text(text)
    before = snapshot(folder)
    with pytest.raises(HeaderError, match="journal"):
        patch.digest(folder)
    assert snapshot(folder) == before


def _apply_slowly(target: str, file: str, ready: object) -> None:
    ready.set()  # type: ignore[attr-defined]
    patch.apply(target, file)


@pytest.mark.parametrize("sharded", [False, True])
def test_kills(tmp_path: Path, sharded: bool) -> None:
    """Killed at any moment: old or new, and nothing else after the next start. Forked, so that it is quick."""
    generator = torch.Generator().manual_seed(0)
    old = {f"w{i}": torch.randn(40_000, generator=generator) for i in range(4)}
    new = {name: tensor.index_fill(0, torch.arange(0, 40_000, 97), 1.0) for name, tensor in old.items()}
    patch.diff(old, new, out=tmp_path / "there.tapspatch")
    patch.diff(new, old, out=tmp_path / "back.tapspatch")
    ends = {patch.digest(old): "there", patch.digest(new): "back"}
    folder = write_shards(tmp_path / "model", old, count=3 if sharded else 1)
    target = str(folder if sharded else folder / "model-00001-of-00001.safetensors")
    context, chance = multiprocessing.get_context("fork"), random.Random(0)
    took, killed, finished = 0.05, 0, 0
    for _ in range(150 if THOROUGH else 12):
        direction = ends[patch.digest(target)]
        ready = context.Event()
        process = context.Process(target=_apply_slowly, args=(target, str(tmp_path / f"{direction}.tapspatch"), ready))
        begun = time.perf_counter()
        process.start()
        ready.wait(30)
        process.join(chance.uniform(0, 1.2 * took))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            killed += 1
        process.join()
        if process.exitcode == 0:
            finished += 1
            took = min(took, time.perf_counter() - begun)
        assert patch.digest(target) in ends
        if not sharded:
            assert same(read(folder), old) or same(read(folder), new)
    patch.apply(target, tmp_path / f"{ends[patch.digest(target)]}.tapspatch")
    assert killed and not [name for name in os.listdir(folder) if name.startswith(".")]


def test_a_patch_file_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = states()
    path = tmp_path / "p.tapspatch"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            patch.diff(old, new, out=path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["p.tapspatch"]
    with pytest.raises(MissingFileError):
        patch.diff(old, new, out=tmp_path / "none" / "p.tapspatch")
    assert issubclass(MissingFileError, TaskFileError)
