"""From a spec such as `digits:rotated` or `npz:signs.npz` to a source."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ..errors import SourceError
from . import arrays, digits, folder, glyphs, photos, python
from .source import Options, Source, Statistics

Opener = Callable[[str, Options], Source]

_OPENERS: dict[str, Opener] = {
    "digits": digits.open_digits,
    "glyphs": glyphs.open_glyphs,
    "photos": photos.open_photos,
    "imagefolder": folder.open_folder,
    "npz": arrays.open_npz,
    "python": python.open_python,
}


def known_sources() -> dict[str, str]:
    """What each spec gives: the built-in ones by name, the open-ended ones with a placeholder in capitals."""
    return {
        **{f"digits:{task}": text for task, text in digits.TASKS.items()},
        **{f"glyphs:{task}": text for task, (_, text) in glyphs.TASKS.items()},
        **{f"photos:{task}": text for task, (_, text) in photos.TASKS.items()},
        "imagefolder:DIR": "image files, one folder per class; DIR/train, DIR/val, DIR/test where present",
        "npz:FILE": "arrays x_train y_train x_test y_test; npz:FILE?train=2000 takes a part",
        "python:MODULE.FUNCTION": "what your function returns",
    }


def open_source(
    spec: str,
    *,
    size: int | None = None,
    channels: int | None = None,
    seed: int = 0,
    normalize: Statistics | None = None,
) -> Source:
    """Open a data source.

    >>> source = open_source("digits:rotated", size=16, channels=3)
    >>> source.num_classes, source.shape
    (10, (3, 16, 16))

    Args:
        spec: one of `known_sources()`.
        size: side of the images in pixels; None takes the source's own (16; imagefolder 224; npz as stored).
        channels: 1 (grey) or 3 (RGB); None takes the source's own. RGB becomes luma, grey is repeated.
        seed: of what is random about training images (angles, places). The splits and the images of `val` and
            `test` never depend on it.
        normalize: (mean, std) per channel, applied to images in [0, 1]; None leaves them there.

    Returns:
        A `Source`; the same arguments give the same bytes.

    Raises:
        SourceError: an unknown spec, a bad argument, unusable files, or a missing optional dependency.
    """
    if not isinstance(spec, str):
        raise SourceError(f"source: expected a string such as 'digits:plain', got {type(spec).__name__}")
    options = Options(size=size, channels=channels, seed=seed, normalize=normalize)
    scheme, _, rest = spec.partition(":")
    opener = _OPENERS.get(scheme)
    built_in = scheme in ("digits", "glyphs", "photos")
    if opener is None or not rest or (built_in and spec not in known_sources()):
        raise SourceError(_unknown(spec))
    return opener(rest, options)


def _unknown(spec: str) -> str:
    known = list(known_sources())
    scheme, _, rest = spec.partition(":")
    near = difflib.get_close_matches(spec, known, 1, 0.6)
    if not near and scheme not in _OPENERS:
        near = [f"{name}:{rest}" for name in difflib.get_close_matches(scheme, list(_OPENERS), 1, 0.6)]
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown source {spec!r}; {hint}known: {', '.join(known)}"
