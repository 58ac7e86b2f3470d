"""The package's exceptions are one tree: one name each, one class to catch, and they travel between processes."""

from __future__ import annotations

import importlib
import pickle
import pkgutil

import pytest
import torch
from torch import nn

import taps_ext
from taps_ext import TaskModel, store
from taps_ext.base.ownership import check_state
from taps_ext.data import SourceError
from taps_ext.errors import ConfigError, GateError, TapsError, TaskFileError


def _defined() -> list[type[BaseException]]:
    """Every exception class that a module of the package defines."""
    modules = [m.name for m in pkgutil.walk_packages(taps_ext.__path__, "taps_ext.") if not m.name.endswith("__main__")]
    found = {
        value
        for name in modules
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__.startswith("taps_ext")
    }
    return sorted(found, key=lambda error: error.__qualname__)


ERRORS = _defined()


def test_all_are_found() -> None:
    assert {TapsError, TaskFileError, SourceError, GateError, store.errors.GateRecordError} <= {*ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_it_is_of_the_tree(error: type[BaseException]) -> None:
    assert issubclass(error, (TapsError, KeyboardInterrupt))


def test_no_two_share_a_name() -> None:
    names = [error.__name__ for error in ERRORS]
    assert len({*names}) == len(names)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_it_travels_between_processes(error: type[BaseException]) -> None:
    arguments = ("a.taps", "what is wrong") if issubclass(error, TaskFileError) else ("what is wrong",)
    made = error(*arguments)
    back = pickle.loads(pickle.dumps(made))
    assert type(back) is error and str(back) == str(made) and vars(back) == vars(made)


@pytest.mark.parametrize("error", [SourceError, TaskFileError, store.errors.GateRecordError])
def test_what_was_a_value_error_still_is(error: type[Exception]) -> None:
    assert issubclass(error, ValueError)


def test_a_path_is_shown_in_printable_characters() -> None:
    """A stranger names files too; the attribute is the path itself."""
    path = "a\x1b[2J\n\udcff.taps"
    error = TaskFileError(path, "what is wrong")
    assert str(error) == r"a\x1b[2J\n\udcff.taps: what is wrong" and error.path == path
    assert len(str(TaskFileError("\x1b" * 10_000, "x"))) <= 400 + len("...: x")
    assert str(TaskFileError(b"a.taps", "x")) == "a.taps: x"  # type: ignore[arg-type]


def test_a_checkpoints_names_are_shown_short() -> None:
    wanted, name = {"a": torch.zeros(1)}, "b\x1b" * 50_000
    for got in ({**wanted, name: torch.zeros(1)}, {name: torch.zeros(1)}):
        with pytest.raises(ConfigError) as caught:
            check_state(wanted, got, where="state_dict", what="base")
        assert len(str(caught.value)) < 500 and str(caught.value).isprintable()
    base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for state in (
        {name: 3},
        {name: torch.zeros(1), f"module.{name}": torch.zeros(1)},
        {**base.state_dict(), f"1.{name}": torch.tensor(torch.nan)},
    ):
        with pytest.raises(ConfigError) as caught:
            TaskModel(base).extract_task("t", state)
        assert len(str(caught.value)) < 500 and str(caught.value).isprintable()
