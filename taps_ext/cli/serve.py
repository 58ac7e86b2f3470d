"""`taps serve`: a folder of tasks behind HTTP."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .common import count, emit, nbytes, say
from .evaluate import config_from

if TYPE_CHECKING:
    from ..files.images import Geometry
    from .config import Config

PURPOSE = "Serve a folder of tasks over one base by HTTP."
EXAMPLE = "taps serve timm:resnet50 tasks --weights resnet50.safetensors --max-resident 2GB"
MORE = """
  curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg http://127.0.0.1:8000/tasks/birds/predict

Routes: POST /tasks/NAME/predict, GET /tasks, /tasks/NAME, /health, /metrics, /docs. SIGTERM and Ctrl-C let what was
asked be answered first. Needs the extra: pip install taps_ext[serve]"""
_GRACE = 30  # seconds that what was asked may take once the server stops


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 60:
        raise argparse.ArgumentTypeError(f"expected seconds from 0 to 60, got {text!r}")
    return value


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", metavar="BASE", help="CONFIG.toml, or timm:NAME, torchvision:NAME, python:MODULE.FUNCTION"
    )
    parser.add_argument("folder", metavar="FOLDER", help="of task files (taps folder)")
    parser.add_argument("--weights", metavar="FILE", help="the base's safetensors file, or an index or folder of some")
    parser.add_argument("--set", metavar="key=value", action="append", default=[], help="override; repeatable")
    parser.add_argument("--device", help="cpu (the default) or cuda[:N]")
    parser.add_argument(
        "--size", type=count(1), metavar="N", help="side of images, for tasks whose files do not say it"
    )
    parser.add_argument("--channels", type=count(1), metavar="N", help="1 (grey) or 3 (RGB), for the same")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free one; default: 8000")
    parser.add_argument("--max-resident", type=nbytes, metavar="BYTES", help="of tasks in memory, such as 2GB")
    parser.add_argument("--pin", metavar="NAME", action="append", default=[], help="keep this task loaded; repeatable")
    parser.add_argument("--pack", metavar="CODEC", help="hold Deltas packed, such as int8 (docs/packed.md)")
    parser.add_argument("--max-batch", type=count(1), default=64, metavar="N", help="samples of a forward; default: 64")
    parser.add_argument(
        "--max-delay", type=_seconds, default=0.005, metavar="S", help="seconds to wait for others; default: 0.005"
    )
    parser.add_argument(
        "--max-queue", type=count(1), default=1024, metavar="N", help="samples that wait; default: 1024"
    )
    parser.add_argument(
        "--max-body", type=nbytes, default=16 << 20, metavar="BYTES", help="of a request; default: 16 MiB"
    )


def _geometry(config: Config) -> Geometry | None:
    """Of images for tasks whose files say nothing, where the options or the configuration do."""
    from ..data.source import Options
    from ..files.images import Geometry

    size, channels = config.data.get("size"), config.data.get("channels")
    if size is None and channels is None:
        return None
    if size is None or channels is None:
        raise ConfigError(f"data: expected size and channels, or neither, got {size} and {channels}")
    Options(size, channels, normalize=config.normalize)  # refuses what is none
    return Geometry(channels, size, size, config.normalize)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"host: cannot listen on {host}:{port}: {error.strerror or error}") from None


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from ..serve.http import make_app
    except ImportError as error:
        raise ConfigError(f"serve: {error.name} is not installed: pip install taps_ext[serve]") from None
    from .. import TaskFolder, TaskModel
    from ..serve import Engine

    is_file = args.base.endswith(".toml")
    args.config, args.base = (args.base, None) if is_file else (None, args.base)
    config = config_from(args)
    if config.dense:
        raise ConfigError("config: expected tasks of classes, whose labels are served, got one of maps: taps predict")
    folder, geometry = TaskFolder(args.folder), _geometry(config)
    with _listen(args.host, args.port) as listening:
        model = TaskModel(config.base(), head_module=config.head_module, unsupported=config.unsupported).eval()
        if args.device is not None:
            model.to(args.device)
        engine = Engine(
            model,
            folder,
            max_resident_bytes=args.max_resident,
            pin=args.pin,
            max_batch=args.max_batch,
            max_delay=args.max_delay,
            max_queue=args.max_queue,
            pack=args.pack,
        )
        with engine:
            app = make_app(engine, max_body=args.max_body, geometry=geometry)
            settings = uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE,
            )
            host, port = listening.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            if args.json:
                emit({"url": url, "tasks": len(folder), "pinned": args.pin})
                sys.stdout.flush()  # whoever reads it waits for it
            say(f"serving {len(folder)} tasks on {url} (the API: {url}/docs)")
            _until_told(uvicorn.Server(settings), listening)
            say(f"stopped after {engine.stats()['answers']} answers")
    return 0


def _until_told(server: Any, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, which end the command as its wish."""
    told = (signal.SIGTERM, signal.SIGINT)
    before = {which: signal.signal(which, lambda *_: None) for which in told}  # uvicorn raises them anew at its end
    try:
        server.run(sockets=[listening])
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
