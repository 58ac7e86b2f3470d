"""The configuration of `taps train`, `eval` and `predict`: TOML plus `key=value`.

    [base]                          [method]                 [tasks.rotated]
    model = "timm:resnet18"         method = "taps"          source = "digits:rotated"
    weights = "resnet18.safetensors"  lam = 0.3
    num_classes = 1000                                       [tasks.letters]
    [data]                          [train]                  source = "glyphs:letters"
    size = 224                      epochs = 30              method = { lam = 0.1 }
    channels = 3                    lr = 0.01

Paths in the file are relative to it, paths in overrides to the working folder. Unknown keys are errors.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, suggestion
from . import dense
from .images import statistics

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import Source
    from ..methods import MethodConfig
    from ..train import TrainConfig

SECTIONS = ("imports", "base", "data", "method", "train", "tasks")
BASE_KEYS = ("model", "weights", "num_classes", "head_module", "unsupported", "seed", "args")
DATA_KEYS = ("size", "channels", "normalize", "seed")
TASK_KEYS = ("source", "method", "num_classes")


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ConfigError("config: reading TOML on Python 3.10 needs tomli: pip install tomli") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from None


def override(tree: dict[str, Any], text: str) -> None:
    """Apply one `key=value`, e.g. `train.lr=0.01`. A value that is not TOML is taken as a string.

    Raises:
        ConfigError: no `=`, a key that is not dotted names, or one that leads through a value.
    """
    key, equals, value = text.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"override: expected key=value such as train.lr=0.01, got {text!r}")
    parsed: Any = value
    with suppress(ConfigError):
        found = _toml(f"value = {value}")
        parsed = found["value"] if len(found) == 1 else value
    if names[0] not in SECTIONS:
        hint = suggestion(names[0], SECTIONS) if names[1:] else _dotted(names[0])
        raise ConfigError(f"override: unknown section {names[0]!r}{hint} in {text!r}")
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override: {key}: expected {name!r} to be a section, got a value")
    tree[names[-1]] = parsed


def _dotted(key: str) -> str:
    """Which keys of sections are meant by one that names none, as a hint: `" (did you mean 'train.lr'?)"`."""
    from ..methods.base import registered
    from ..train import TrainConfig

    methods = {field.name for config in registered().values() for field in fields(config)}
    known = {"train": {field.name for field in fields(TrainConfig)}, "method": {"method", *methods}}
    known |= {"base": {*BASE_KEYS, *dense.BASE_KEYS}, "data": {*DATA_KEYS, *dense.DATA_KEYS}}
    names = [name for section in known.values() for name in section]
    meant = key if key in names else next(iter(difflib.get_close_matches(key, sorted(set(names)), n=1)), None)
    found = [f"{section}.{meant}" for section in SECTIONS if meant in known.get(section, ())]
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else suggestion(key, SECTIONS)


def _keys(section: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: expected a section, got {section!r}")
    for key in section:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{suggestion(key, known)}; known: {list(known)}")


def _anchor(tree: dict[str, Any], folder: Path) -> None:
    """Make the paths that a file names absolute."""

    def absolute(path: Any) -> Any:
        return str((folder / path).resolve()) if isinstance(path, str) else path

    base, training, tasks = (tree.get(name) for name in ("base", "train", "tasks"))
    if isinstance(base, dict) and "weights" in base and base["weights"] != "random":
        base["weights"] = absolute(base["weights"])
    if isinstance(training, dict) and "out" in training:
        training["out"] = absolute(training["out"])
    for task in tasks.values() if isinstance(tasks, dict) else ():
        spec = task.get("source") if isinstance(task, dict) else None
        scheme, _, rest = spec.partition(":") if isinstance(spec, str) else ("", "", "")
        if scheme in ("npz", "imagefolder", dense.SCHEME):
            task["source"] = f"{scheme}:{absolute(rest)}"


class Config:
    """A checked configuration.

    Args:
        tree: the sections as read.
        stem: a short name of the run.

    Raises:
        ConfigError: an unknown section or key, or a value of the wrong kind.
    """

    def __init__(self, tree: dict[str, Any], stem: str = "run") -> None:
        _keys(tree, SECTIONS, "config")
        self.base_section: dict[str, Any] = tree.get("base", {})
        self.data: dict[str, Any] = tree.get("data", {})
        self.method = tree.get("method")
        self.train_section = tree.get("train", {})
        self.tasks: dict[str, Any] = tree.get("tasks", {})
        sections = self.tasks.values() if isinstance(self.tasks, dict) else ()
        maps = any(isinstance(task, dict) and dense.is_dense(task.get("source")) for task in sections)
        _keys(self.base_section, (*BASE_KEYS, *(dense.BASE_KEYS if maps else ())), "base")
        _keys(self.data, (*DATA_KEYS, *(dense.DATA_KEYS if maps else ())), "data")
        for name, section in (("method", self.method), ("train", self.train_section), ("tasks", self.tasks)):
            if section is not None and not isinstance(section, dict):
                raise ConfigError(f"{name}: expected a section, got {section!r}")
        for name, task in self.tasks.items():
            source = task.get("source") if isinstance(task, dict) else None
            keys = ("source", "method", *dense.TASK_KEYS) if dense.is_dense(source) else TASK_KEYS
            _keys(task, keys, f"tasks.{name}")
            if not isinstance(source, str):
                raise ConfigError(f"tasks.{name}.source: expected a source such as 'digits:rotated', got {source!r}")
        head_module = self.base_section.get("head_module")
        several = isinstance(head_module, list) and all(isinstance(name, str) for name in head_module)
        if head_module is not None and not isinstance(head_module, str) and not several:
            raise ConfigError(f"base.head_module: expected a module's name such as 'fc', got {head_module!r}")
        out = self.train_section.get("out")
        if out is not None and not isinstance(out, str):
            raise ConfigError(f"train.out: expected a folder, got {out!r}")
        self.stem = stem
        self._opened: dict[str, Source] = {}

    @property
    def head_module(self) -> str | list[str] | None:
        return self.base_section.get("head_module")

    @property
    def unsupported(self) -> str:
        """What to do about weights that cannot be gated: "raise" or "freeze"."""
        return str(self.base_section.get("unsupported", "raise"))

    @property
    def normalize(self) -> Any:
        """(mean, std) of the images, or None."""
        return statistics(self.data.get("normalize"), self.base_section)

    def base(self) -> nn.Module:
        """The base model, in evaluation mode; for tasks that are maps with its taps."""
        from .base import build_base

        maps = self.dense
        built = build_base({key: value for key, value in self.base_section.items() if key not in dense.BASE_KEYS})
        return dense.wrapped(self, built) if maps else built

    def training(self) -> TrainConfig:
        """The training settings; `out` defaults to runs/<name of the file>."""
        from ..train import TrainConfig

        settings = {"out": str(Path("runs") / self.stem), **self.train_section}
        try:
            config = TrainConfig.from_dict(settings)
        except TypeError as error:
            raise ConfigError(f"train: {error}") from None
        check_device(config.device)
        return config

    def method_of(self, task: str) -> MethodConfig:
        """A task's method: [method] with the task's own settings over it; another method stands alone."""
        from ..methods import MethodConfig

        own = self.tasks[task].get("method", {})
        if isinstance(own, str):
            own = {"method": own}
        if not isinstance(own, dict):
            raise ConfigError(f"tasks.{task}.method: expected a table such as {{ lam = 0.1 }}, got {own!r}")
        shared = self.method or {}
        same = own.get("method") in (None, shared.get("method"))
        settings = {**shared, **own} if same else own
        if "method" not in settings:
            raise ConfigError("method: expected a [method] section with method = 'taps' or another, got none")
        return MethodConfig.from_dict(settings)

    @property
    def dense(self) -> bool:
        """Whether the tasks are maps of images. Raises ConfigError where only some are."""
        return dense.all_dense(self)

    def task(self, name: str) -> dict[str, Any]:
        """A task's section. Raises ConfigError for an unknown name."""
        if name not in self.tasks:
            hint = suggestion(name, self.tasks)
            raise ConfigError(f"tasks: the configuration has {list(self.tasks)}, but no {name!r}{hint}")
        section: dict[str, Any] = self.tasks[name]
        return section

    def source(self, name: str, stored: Mapping[str, Any] | None = None) -> Source:
        """A task's data at the configured geometry, or at that of its file (:meth:`open`)."""
        return self.open(self.task(name)["source"], stored)

    def open(self, spec: str, stored: Mapping[str, Any] | None = None) -> Source:
        """Any source at the configured geometry; opened once.

        Args:
            stored: the geometry that a task file says its images had, which holds where the configuration is silent.
        """
        size, channels = self.data.get("size"), self.data.get("channels")
        if stored is None:
            return self._open(spec, size, channels, self.normalize)
        if size is None and stored["height"] == stored["width"]:
            size = stored["height"]
        channels = stored["channels"] if channels is None else channels
        source = self._open(spec, size, channels, self.normalize)
        as_trained = source.preprocessing["normalize"] == stored["normalize"]  # maybe by a function of the user's
        if as_trained or self.data.get("normalize") is not None:
            return source
        return self._open(spec, size, channels, stored["normalize"])

    def _open(self, spec: str, size: int | None, channels: int | None, normalize: Any) -> Source:
        from ..data import open_source

        key = f"{spec} {size} {channels} {normalize}"
        if key not in self._opened:
            seed = self.data.get("seed", self.train_section.get("seed", 0))
            self._opened[key] = open_source(spec, size=size, channels=channels, seed=seed, normalize=normalize)
        return self._opened[key]


def check_device(name: Any) -> None:
    """Raise ConfigError unless tensors can live on the device."""
    from ..train.config import check_device as check

    check(name)


def load_config(path: str | None, overrides: Sequence[str] = (), extra: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML file (None: start empty), then lay `extra` and the overrides over it.

    Raises:
        ConfigError: not TOML, unknown sections or keys, bad overrides. OSError: the file cannot be read.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        try:
            tree = _toml(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: expected a configuration (TOML in UTF-8), got other bytes") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        _anchor(tree, file.resolve().parent)
        for folder in (str(file.resolve().parent), str(Path.cwd())):
            if folder not in sys.path:  # python:MODULE.FUNCTION may name a module beside the configuration
                sys.path.append(folder)
    for section, values in (extra or {}).items():
        if not isinstance(tree.setdefault(section, {}), dict):
            raise ConfigError(f"{path}: {section}: expected a section, got {tree[section]!r}")
        tree[section].update(values)
    for text in overrides:
        override(tree, text)
    _import(tree.get("imports", []))
    return Config(tree, "run" if path is None else Path(path).stem)


def _import(names: Any) -> None:
    """Import the modules that register methods, kinds of changes or parts of the user's own."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"imports: expected a list of module names, got {names!r}")
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"imports: {name}: {error}; a module beside the configuration is found by its name"
            ) from None


def check_input(base: nn.Module, sample: Tensor, source: str) -> None:
    """Raise ConfigError unless the base takes images `[C, H, W]` such as `sample`."""
    import torch

    device = next(base.parameters()).device
    try:
        with torch.no_grad():
            base(torch.stack([sample, sample]).to(device))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"data: {source}: the base does not take images of shape {list(sample.shape)} ({reason}); "
            "set data.size and data.channels"
        ) from None
