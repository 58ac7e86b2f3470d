"""`taps predict` for tasks whose outputs are maps: pictures over the images, and what is in them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files.images import geometry_of
from .common import emit, say, table
from .config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from ..store import TaskFile


def predict_maps(args: argparse.Namespace, config: Config, file: TaskFile, base: Any, notes: Mapping[str, Any]) -> int:
    """Write a picture of each image with the task's map over it, and say what the maps hold."""
    import torch
    import torch.nn.functional as F

    from .. import TaskModel
    from ..data.maps import decoded
    from ..data.source import apply_normalize
    from ..dense.tiles import tiled
    from ..plot.overlay import overlay

    geometry = geometry_of(file.extra, str(file.path))
    if geometry is None:
        raise ConfigError(f"{file.path}: expected a task file that says how its images are made")
    images = [decoded(Path(path).read_bytes(), path, geometry.channels) for path in args.images]
    names = _names(args.images, file.name)
    model = TaskModel(base).eval()
    device = torch.device(args.device or "cpu")
    model.to(device)
    task = model.load_task(file)
    size = geometry.height, geometry.width

    def run(batch: Tensor) -> Tensor:
        found: Tensor = model(apply_normalize(batch, geometry.normalize).to(device), task=task)
        return found.float().cpu()

    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with torch.no_grad():
        for path, name, image in zip(args.images, names, images, strict=True):
            if args.tiles is not None:
                outputs = tiled(run, image, size, args.tiles)
            else:
                whole = F.interpolate(image[None], size, mode="bilinear", antialias=True)
                outputs = F.interpolate(run(whole), image.shape[1:], mode="bilinear")[0]
            outputs = outputs - _shift(notes)
            written = folder / name
            _write(written, overlay(image, outputs, notes["kind"]))
            found.append({"image": path, "picture": str(written), **_summary(outputs, notes, file.labels)})
    if args.json:
        emit({"file": args.file, "task": task, "kind": notes["kind"], "predictions": found})
    else:
        rows = [(one["image"], one["picture"], _line(one)) for one in found]
        print(table(("image", "picture", f"{task}: {notes['kind']}"), rows))
        say(f"pictures are in {folder}")
    return 0


def _shift(notes: Mapping[str, Any]) -> float:
    """By how much a loss that weighs ones by w and zeros by 1 - w moves logits from those of chances."""
    weight = notes.get("weight")
    if not isinstance(weight, float) or not 0 < weight < 1:
        return 0.0
    return math.log(weight / (1 - weight))


def _names(images: list[str], task: str) -> list[str]:
    """Names of pictures. Raises ConfigError where two images would have one."""
    found = [f"{Path(path).stem}.{task}.png" for path in images]
    for path, name in zip(images, found, strict=True):
        if found.count(name) > 1:
            raise ConfigError(f"images: expected files of different names, got {path} and another {Path(path).stem}")
    return found


def _write(path: Path, picture: Tensor) -> None:
    from ..data.source import require

    require("PIL.Image", "pillow").fromarray(picture.numpy()).save(path)


def _summary(outputs: Tensor, notes: Mapping[str, Any], labels: list[str] | None) -> dict[str, Any]:
    """What a map holds: the share of each class, of pixels that are boundary, or the mean value."""
    kind = notes["kind"]
    if kind == "segmentation":
        names = [str(label) for label in range(len(outputs))] if labels is None else labels
        shares = outputs.argmax(0).flatten().bincount(minlength=len(outputs)).float() / outputs[0].numel()
        pairs = zip(names, shares.tolist(), strict=True)
        return {"shares": {name: share for name, share in sorted(pairs, key=lambda pair: -pair[1]) if share}}
    if kind in ("boundaries", "edges", "saliency"):
        return {"share": float((outputs[0] > 0).float().mean())}
    if kind == "normals":
        return {}
    limit = notes.get("limit", 1.0)
    scale = float(limit) if kind == "distance" and isinstance(limit, (int, float)) else 1.0  # pixels of the training
    return {"mean": scale * float(outputs[0].mean())}


def _line(found: Mapping[str, Any]) -> str:
    if "shares" in found:
        return "  ".join(f"{name} {100 * share:.1f} %" for name, share in list(found["shares"].items())[:4])
    if "share" in found:
        return f"{100 * found['share']:.1f} % of the pixels"
    return f"mean {found['mean']:.3f}" if "mean" in found else ""
