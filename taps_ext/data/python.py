"""`python:MODULE.FUNCTION`: a source made by the user's own code."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import SourceError
from .arrays import source_from_arrays
from .source import NormalizedDataset, Options, SizedDataset, Source

FIELDS = ("train", "val", "test", "classes", "description", "licence", "normalize")


def find_function(path: str) -> Callable[..., Any]:
    """The callable at a dotted path, of a module that Python finds or of one in the current folder.

    The folder is asked last and stays on `sys.path`, since workers and pickled functions import the module again.

    Raises:
        SourceError: no dot in the path, the module does not import, or it has no such callable.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise SourceError(f"python:{path}: expected python:MODULE.FUNCTION")
    try:
        top, here = module_name.partition(".")[0], os.getcwd()
        if top not in sys.modules and importlib.util.find_spec(top) is None and here not in sys.path:
            sys.path.append(here)
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise SourceError(f"python:{path}: cannot import {module_name}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise SourceError(f"python:{path}: {module_name} has no function {name!r}")
    return function


def open_python(rest: str, options: Options) -> Source:
    """Call the function and make a source of what it returns.

    It is passed those of `size`, `channels` and `seed` that it names as parameters. It returns a `Source`; a
    dict of `Source` fields; a dict of arrays as in `npz:`; or a tuple (train, val, test) of datasets or of
    (x, y) arrays, where val may be None. Datasets yield (float32 [C, H, W], label) and must come out at the
    size and channels asked for; arrays are converted. Class names come from `classes`, for a tuple of
    datasets from `train.classes`, for arrays without them from the labels.

    Raises:
        SourceError: no such function, or its result is none of these. What the function raises is passed on.
    """
    spec = f"python:{rest}"
    function = find_function(rest)
    offered = {"size": options.size, "channels": options.channels, "seed": options.seed}
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    result = function(**{key: value for key, value in offered.items() if open_ended or key in parameters})

    if isinstance(result, tuple) and len(result) == 3:
        result = _from_tuple(result, spec)
    if isinstance(result, Mapping) and any(str(key).startswith(("x_", "y_")) for key in result):
        return source_from_arrays(spec, result, options, description=f"arrays from {rest}")
    if isinstance(result, Mapping):
        result = _from_fields(result, spec)
    if not isinstance(result, Source):
        expected = "a Source, a dict or a tuple (train, val, test)"
        raise SourceError(f"{spec}: expected {expected}, got {type(result).__name__}")
    return _check(dataclasses.replace(result, name=spec), options)


def _from_tuple(splits: tuple[Any, Any, Any], spec: str) -> dict[str, Any]:
    train, val, test = splits
    named = {"train": train, "test": test} if val is None else {"train": train, "val": val, "test": test}
    pairs = [isinstance(data, (tuple, list)) and len(data) == 2 for data in named.values()]
    if all(pairs):
        return {f"{axis}_{name}": data[i] for name, data in named.items() for i, axis in enumerate("xy")}
    if any(pairs):
        raise SourceError(f"{spec}: expected three datasets or three (x, y) pairs, got a mixture")
    classes = getattr(named.get("train"), "classes", None)
    if classes is None:
        raise SourceError(f"{spec}: class names are unknown; return a dict with train, val, test and classes")
    return {**named, "classes": classes}


def _from_fields(fields: Mapping[str, Any], spec: str) -> Source:
    unknown = sorted(str(key) for key in fields if key not in FIELDS)
    missing = [key for key in ("train", "test", "classes") if fields.get(key) is None]
    if unknown or missing:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise SourceError(f"{spec}: {problem}; expected the keys {', '.join(FIELDS)}")
    for split in ("train", "val", "test"):
        data = fields.get(split)
        if data is not None and not isinstance(data, SizedDataset):
            raise SourceError(f"{spec}: {split} is a {type(data).__name__}, expected a dataset with a length")
    classes = tuple(str(name) for name in fields["classes"])
    return Source(name=spec, **{"val": None, **fields, "classes": classes})


def _check(source: Source, options: Options) -> Source:
    """`source` if its images have the geometry asked for, with the normalisation asked for."""
    size, channels, normalize = options.size, options.channels, options.normalize
    for split, data in source.splits().items():
        first = data[0][0]
        if isinstance(first, Tensor) and not first.is_floating_point():
            raise SourceError(
                f"{source.name}: {split} images are {first.dtype}, expected float32 in [0, 1]; x.float() / 255 of uint8"
            )
        shape = tuple(getattr(first, "shape", ()))
        wanted = (channels or shape[0], size or shape[1], size or shape[2]) if len(shape) == 3 else None
        if shape != wanted:
            asked = f"[{channels or 'C'}, {size or 'H'}, {size or 'W'}]"
            raise SourceError(f"{source.name}: {split} images are {list(shape)}, expected {asked}")
    if normalize is None:
        return source
    if source.normalize is not None:
        raise SourceError(f"{source.name}: is already normalised by its function")
    wrapped: dict[str, SizedDataset] = {
        split: NormalizedDataset(data, normalize) for split, data in source.splits().items()
    }
    return dataclasses.replace(source, **wrapped, normalize=normalize)  # type: ignore[arg-type]
