"""`taps predict`: what a task makes of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .common import count, emit, table
from .config import Config, check_input
from .dense import base_for
from .evaluate import add_base_arguments, config_from
from .images import map_notes, stored_geometry
from .maps import predict_maps

if TYPE_CHECKING:
    from ..store import TaskFile

PURPOSE = "Classify images with a task file, or make maps of them; prints labels and shares."
EXAMPLE = "taps predict runs/signs/signs.taps --config signs.toml photo.jpg --top 5"
LAST = "images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a task file (.taps)")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files that Pillow reads")
    add_base_arguments(parser)
    parser.add_argument("--top", type=count(1), default=3, metavar="N", help="labels to print (default: 3)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="predictions",
        help="of tasks whose outputs are maps: pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--tiles",
        type=count(0),
        metavar="N",
        help="of such tasks: images in tiles of the training's size that share at least N pixels, instead of whole "
        "ones brought to it",
    )


def _geometry(config: Config, file: TaskFile) -> tuple[int, int, Any]:
    """(size, channels, statistics) of the task's images, from the file, its data, or the configuration."""
    stored, name = stored_geometry(file), file.name
    if stored is None and name in config.tasks:
        stored = config.source(name).preprocessing
    if stored is None:
        size, channels = config.data.get("size"), config.data.get("channels")
        if size is None or channels is None:
            raise ConfigError(f"data: expected size and channels, since the configuration has no task {name!r}")
        return size, channels, config.normalize
    if stored["height"] != stored["width"]:
        got = [stored["channels"], stored["height"], stored["width"]]
        raise ConfigError(f"tasks.{name}: expected square images to predict on, got {got}")
    if config.data.get("normalize") is not None:
        asked = config.normalize
        if (None if asked is None else [list(part) for part in asked]) != stored["normalize"]:
            raise ConfigError(f"data.normalize: {file.path} was trained with {stored['normalize']}, got {asked}")
    for key, kept in (("size", "height"), ("channels", "channels")):
        if config.data.get(key) not in (None, stored[kept]):
            asked, trained = config.data[key], stored[kept]
            raise ConfigError(f"data.{key}: {file.path} was trained with {trained}, got {asked}")
    return stored["height"], stored["channels"], stored["normalize"]


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import TaskModel, store
    from ..data.folder import read_image
    from ..data.source import Options, apply_normalize
    from ..model.outputs import predictions, top_labels

    config = config_from(args)
    task = store.load(args.file, kind="task")
    notes = map_notes(task)
    if notes is not None:
        return predict_maps(args, config, task, base_for(config, notes), notes)
    if args.tiles is not None:
        raise ConfigError("tiles: expected a task whose outputs are maps, got one of classes")
    size, channels, normalize = _geometry(config, task)
    options = Options(size, channels, normalize=normalize)
    images = [apply_normalize(read_image(Path(file), size, channels), options.normalize) for file in args.images]
    base = config.base()
    model = TaskModel(base, head_module=config.head_module).eval()
    if args.device is not None:
        model.to(args.device)
    check_input(base, images[0], args.images[0])
    name = model.load_task(task)
    with torch.no_grad():
        stacked = torch.stack(images).to(args.device or "cpu")
        batches = [predictions(model(batch, task=name)) for batch in stacked.split(64)]
        chances = torch.cat(batches).float().softmax(dim=-1).cpu()
    found = []
    for file, row in zip(args.images, chances, strict=True):
        top = top_labels(row, task.labels or None, args.top, args.file)
        found.append({"image": file, "label": top[0]["label"], "top": top})
    if args.json:
        emit({"file": args.file, "task": name, "predictions": found})
    else:
        rows = [
            (f["image"], "  ".join(f"{t['label']} {100 * t['probability']:.1f} %" for t in f["top"])) for f in found
        ]
        print(table(("image", f"{name}: labels"), rows))
    return 0
