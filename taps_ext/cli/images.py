"""How image files become a base's inputs: size, channels and normalisation."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files.images import stored
from .common import say

if TYPE_CHECKING:
    from ..store import TaskFile

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def statistics(setting: Any, base: Mapping[str, Any]) -> Any:
    """The (mean, std) that `data.normalize` asks for, or None for images in [0, 1].

    "base" (the default) is what a pretrained base of timm or torchvision was trained with, and nothing for any other;
    further "imagenet", "none", or the two lists themselves.
    """
    if setting is None or setting == "base":
        return _of_base(base)
    if isinstance(setting, str):
        if setting not in ("imagenet", "none"):
            raise ConfigError(f"data.normalize: expected 'base', 'imagenet', 'none' or [mean, std], got {setting!r}")
        return IMAGENET if setting == "imagenet" else None
    from ..data.source import check_normalize

    check_normalize(setting)
    return setting


def _of_base(base: Mapping[str, Any]) -> Any:
    scheme, _, name = str(base.get("model")).partition(":")
    if base.get("weights") == "random" or scheme not in ("timm", "torchvision"):
        return None
    try:
        library: Any = importlib.import_module(scheme)
        if scheme == "timm":
            found = library.get_pretrained_cfg(name)
        else:
            found = library.models.get_model_weights(name).DEFAULT.transforms()
    except (ImportError, ValueError, RuntimeError, AttributeError):  # building the base says what is wrong
        return None
    mean, std = getattr(found, "mean", None), getattr(found, "std", None)
    return None if mean is None or std is None else (tuple(mean), tuple(std))


def stored_geometry(file: TaskFile) -> dict[str, Any] | None:
    """What a task file says of its inputs, or None. Raises ConfigError if that is not what we write."""
    return stored(file.extra, file.path)


def map_notes(file: TaskFile) -> dict[str, Any] | None:
    """What a task file says of the maps that its task makes of images, or None for a task of classes.

    Raises:
        ConfigError: something that is not what we write.
    """
    found = (stored_geometry(file) or {}).get("map")
    if found is None:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise ConfigError(f"{file.path}: preprocessing: map: expected its kind, got {found!r:.60}")
    return found


def check_geometry(file: TaskFile, now: Mapping[str, Any]) -> None:
    """Raise ConfigError if images would be made otherwise than those that the task was trained on."""
    before = stored_geometry(file)
    if before is None:
        how = f"normalised by {now['normalize']}" if now["normalize"] else "not normalised"
        say(
            f"{file.path} does not say how its images were made: taken are {now['channels']} channels, "
            f"{now['height']} x {now['width']}, {how}"
        )
        return
    for key in ("channels", "height", "width", "normalize"):
        if before[key] != now[key]:
            raise ConfigError(f"data: {file.path} was trained on images with {key} {before[key]}, got {now[key]}")
