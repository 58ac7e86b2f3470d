"""The package's exceptions are one tree: one name each, one class to catch, and they travel between processes."""

from __future__ import annotations

import importlib
import pickle
import pkgutil

import pytest

import taps_ext
from taps_ext import store
from taps_ext.data import SourceError
from taps_ext.errors import GateError, TapsError, TaskFileError


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
