"""How a task's images become inputs, as its file keeps it under `preprocessing`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

_KEYS = {"channels", "height", "width", "normalize"}
_MORE = {"map"}  # of tasks whose outputs are maps: what they are of


def stored(extra: Mapping[str, str], path: str) -> dict[str, Any] | None:
    """What a file's entries say of its inputs; None where they say nothing, or hold a note of the user's own.

    Raises:
        ConfigError: no JSON.
    """
    text = extra.get("preprocessing")
    if text is None:
        return None
    try:
        found = json.loads(text)
        return dict(found) if set(found) - _MORE == _KEYS else None
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: preprocessing: expected JSON, got {text[:60]!r}") from error


@dataclass(frozen=True)
class Geometry:
    """Images `[channels, height, width]`, standardised by `normalize` = (mean, std) of values in [0, 1], or None."""

    channels: int
    height: int
    width: int
    normalize: tuple[Sequence[float], Sequence[float]] | None = None


def geometry_of(extra: Mapping[str, str], path: str) -> Geometry | None:
    """The same, checked: numbers that a file of somebody else's holds are to allocate nothing.

    Raises:
        ConfigError: naming what is no size or no statistics.
    """
    found = stored(extra, path)
    if found is None:
        return None
    for key in ("channels", "height", "width"):
        if type(found[key]) is not int or not 1 <= found[key] <= 1 << 16:
            raise ConfigError(f"{path}: preprocessing: {key}: expected an int from 1 to 65536, got {found[key]!r:.60}")
    normalize = found["normalize"]
    if normalize is not None:
        parts = normalize if isinstance(normalize, list) and len(normalize) == 2 else ()
        numbers = [part for part in parts if isinstance(part, list) and len(part) in (1, found["channels"])]
        right = len(numbers) == 2 and all(type(value) in (int, float) for part in numbers for value in part)
        if not right or not all(0 < value < float("inf") for value in numbers[1]):
            raise ConfigError(
                f"{path}: preprocessing: normalize: expected [mean, std] with 1 or {found['channels']} numbers each, "
                f"got {normalize!r:.60}"
            )
        normalize = tuple(numbers[0]), tuple(numbers[1])
    return Geometry(found["channels"], found["height"], found["width"], normalize)
