"""A file is loaded without hashing or scanning the base again, for as long as nobody writes to it."""

from __future__ import annotations

import copy

import pytest
import torch
from serving import answers, is_close, model, samples, write

from taps_ext import JointTapsConfig, TapsConfig, TaskModel, store
from taps_ext.base import guard, known
from taps_ext.errors import TapsError
from taps_ext.model.state import Family
from taps_ext.store.errors import ParentMismatchError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What looked at the whole base, in order."""
    found: list[str] = []

    def counted(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(*args: object, **words: object) -> object:
            found.append(name)
            return original(*args, **words)

        monkeypatch.setattr(module, name, call)

    counted(known, "base_fingerprint")
    counted(known, "scan")
    counted(guard.Guard, "note")
    counted(Family, "_content")
    return found


def test_a_second_load_looks_at_nothing(tmp_path, calls: list[str]) -> None:
    files = [write(tmp_path / f"{i}.taps", f"t{i}", i) for i in range(3)]
    made, x = model(), samples(2)
    calls.clear()
    made.load_task(files[0])
    assert sorted(calls) == ["base_fingerprint", "note", "scan"]
    for file in files[1:]:
        made.load_task(file)
    for name in made.tasks:  # nor when no task was left in between
        made.delete_task(name)
    for i, file in enumerate(files):
        made.load_task(file)
        want = answers([file], x)[0]
        calls.clear()
        with torch.no_grad():
            assert is_close(made(x, task=f"t{i}"), want)
        assert calls == []
    calls.clear()
    state = made.prepare_task(store.load(files[0]), codec="int8")
    made.install_task(state, "packed")
    assert calls == [] and made.report("packed").rows[0].change == "int8"


def test_whatever_torch_notes_is_looked_at(tmp_path, calls: list[str]) -> None:
    file, other = write(tmp_path / "t.taps", "t", 1), write(tmp_path / "u.taps", "u", 2)
    made = model()
    made.load_task(file)
    with torch.no_grad():
        made.base[0].weight.mul_(1.0)
    made.load_task(other)  # the same values
    with torch.no_grad():
        made.base[0].weight.mul_(2.0)
    for name in made.tasks:
        made.delete_task(name)
    with pytest.raises(ParentMismatchError):
        made.load_task(file)
    with torch.no_grad():
        made.base[0].weight.div_(2.0)
    made.load_task(file)
    made.save_task("t", tmp_path / "again.taps")  # the guard has noted the base that the task is for

    made.base[0].weight.data.mul_(2.0)  # which leaves no trace
    made.eval()
    with pytest.raises(ParentMismatchError):
        made.load_task(other)
    with pytest.raises(TapsError, match="has changed since the base was adapted"):
        made.save_task("t", tmp_path / "again.taps")


@pytest.mark.parametrize("change", ["cast", "state", "module", "copy"])
def test_moved_loaded_replaced_and_copied_bases_are_others(tmp_path, change: str) -> None:
    file, made = write(tmp_path / "t.taps", "t", 1), model()
    made.delete_task(made.load_task(file))
    if change == "cast":
        made.float()
    elif change == "state":
        made.load_state_dict({name: torch.ones_like(t) for name, t in made.state_dict().items()})
    elif change == "module":
        made.base[5] = torch.nn.Linear(32, 8).double()
    else:
        made = copy.deepcopy(made)
        made.base[0].weight.data.mul_(2.0)
    with pytest.raises(ParentMismatchError):
        made.load_task(file)


def test_a_family_is_hashed_when_it_comes_and_when_it_was_written_to(tmp_path, calls: list[str]) -> None:
    made = TaskModel(model().unload(), JointTapsConfig(lam=0.1)).eval()
    for name in ("t", "u"):
        made.add_task(name, num_classes=2)
    made.save_shared("joint-taps", tmp_path / "shared.taps")
    for name in ("t", "u"):
        made.save_task(name, tmp_path / f"{name}.taps")
    made = TaskModel(made.unload(), TapsConfig()).eval()
    made.load_task(tmp_path / "t.taps")
    calls.clear()
    made.load_task(tmp_path / "u.taps")
    assert calls == []
    family = made.families["joint-taps"]
    with pytest.raises(TapsError, match="'t' builds on"):
        made.delete_family("joint-taps")
    with torch.no_grad():
        next(family.parameters()).add_(1.0)
    made.delete_task("u")
    with pytest.raises(TapsError, match="has changed"):
        made.load_task(tmp_path / "u.taps")
    made.delete_task("t")
    made.delete_family("joint-taps")
    with pytest.raises(TapsError, match="expected one of"):
        made.delete_family("joint-taps")
    made.load_task(tmp_path / "u.taps")
