"""What the commands make of a configuration whose tasks are maps of images (`source = "dense:DIR"`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError, SourceError, suggestion

if TYPE_CHECKING:
    from torch import nn

    from ..data.dense import DenseSource, MapTask
    from ..dense import DenseBase
    from ..train import MultiTask, Task
    from .config import Config

SCHEME = "dense"
TASK_KEYS = ("kind", "map", "classes", "ignore", "limit", "scale", "decoder", "weights")
DATA_KEYS = ("scale", "flip")
BASE_KEYS = ("taps",)


class DenseTask(NamedTuple):
    """A task, and what makes its decoder over a base."""

    task: Task
    head: Callable[[Any], nn.Module]


def is_dense(spec: Any) -> bool:
    """True for a source of maps."""
    return isinstance(spec, str) and spec.partition(":")[0] == SCHEME


def all_dense(config: Config) -> bool:
    """Whether the configuration's tasks are maps. Raises ConfigError where some are and others are not."""
    found = {name: is_dense(task["source"]) for name, task in config.tasks.items()}
    if any(found.values()) and not all(found.values()):
        other = next(name for name, dense in found.items() if not dense)
        raise ConfigError(
            f"tasks.{other}.source: expected dense:DIR as other tasks have, got {config.tasks[other]['source']!r}; "
            "tasks of classes and of maps have bases of their own"
        )
    return any(found.values())


def wrapped(config: Config, backbone: nn.Module, taps: Any = None) -> DenseBase:
    """The base of dense tasks: the backbone with taps, those of `base.taps`, or `taps`, or the ones that are found."""
    from ..dense import DenseBase

    taps = config.base_section.get("taps", taps)
    if taps is not None and not isinstance(taps, list):
        raise ConfigError(f"base.taps: expected a list of modules' names, got {taps!r}")
    if config.base_section.get("head_module") is not None:
        raise ConfigError("base.head_module: expected none for dense tasks, whose decoders are their heads")
    return DenseBase(backbone, taps).eval()


def map_task_of(config: Config, name: str) -> MapTask:
    """What a task's section says of its maps. Raises ConfigError, naming the key."""
    from ..data.dense import MapTask

    section = config.task(name)
    if "kind" not in section:
        raise ConfigError(f"tasks.{name}.kind: expected what its maps are, such as 'segmentation', got none")
    settings = {key: section[key] for key in ("kind", "map", "limit", "scale") if key in section}
    ignore = section.get("ignore", [])
    if not isinstance(ignore, list):
        raise ConfigError(f"tasks.{name}.ignore: expected a list of labels, got {ignore!r}")
    try:
        classes = classes_of(config, name)
        return MapTask(**settings, ignore=tuple(ignore), classes=None if classes is None else len(classes))
    except SourceError as error:
        raise ConfigError(f"tasks.{name}.{error}") from None


def classes_of(config: Config, name: str) -> list[str] | None:
    """The names of a task's classes; numbers where the section says how many."""
    classes = config.task(name).get("classes")
    if type(classes) is int and 1 <= classes <= 255:
        return [str(label) for label in range(classes)]
    if classes is None or (isinstance(classes, list) and classes and all(isinstance(one, str) for one in classes)):
        return classes
    raise ConfigError(f"tasks.{name}.classes: expected names, or a number from 1 to 255, got {classes!r}")


def head_of(config: Config, name: str, outputs: int) -> Callable[[Any], nn.Module]:
    """What makes a task's decoder for a base: `decoder = "light"` (default), "concat", or a table with its settings."""
    from ..dense.decoders import KINDS

    section = config.task(name).get("decoder", "light")
    settings = dict(section) if isinstance(section, Mapping) else {"kind": section}
    kind = settings.pop("kind", "light")
    if not isinstance(kind, str) or kind not in KINDS:
        hint = suggestion(str(kind), KINDS)
        raise ConfigError(f"tasks.{name}.decoder: expected one of {sorted(KINDS)}, got {kind!r}{hint}")

    def make(base: Any) -> nn.Module:
        try:
            return KINDS[kind](base.channels, outputs, **settings)
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"tasks.{name}.decoder: {error}") from None

    return make


def sources(config: Config, names: list[str]) -> dict[str, DenseSource]:
    """The sources of tasks by spec, each opened once for all of its tasks."""
    from ..data.dense import open_dense

    by_spec: dict[str, dict[str, MapTask]] = {}
    for name in names:
        by_spec.setdefault(config.task(name)["source"], {})[name] = map_task_of(config, name)
    settings: dict[str, Any] = {
        key: config.data[key] for key in ("size", "scale", "flip", "channels") if key in config.data
    }
    size = settings.get("size")
    if type(size) is int:
        settings["size"] = (size, size)
    for key in ("size", "scale"):
        if isinstance(settings.get(key), list):
            settings[key] = tuple(settings[key])
        if key in settings and not isinstance(settings[key], tuple):
            raise ConfigError(f"data.{key}: expected two numbers, got {settings[key]!r}")
    try:
        return {
            spec: open_dense(spec, tasks, {**settings, "normalize": config.normalize})
            for spec, tasks in by_spec.items()
        }
    except SourceError as error:
        raise ConfigError(f"data: {error}") from None


def dense_tasks(config: Config, base: Any, names: list[str] | None = None) -> dict[str, DenseTask]:
    """The configuration's tasks, or some of them, whose images are read once for all.

    Args:
        base: the :class:`DenseBase` that they are for.

    Raises:
        ConfigError: what a section says that its kind has not.
    """
    from ..train import MultiTask
    from ..train.dense import map_task, outputs_of

    names = list(config.tasks) if names is None else names
    opened = sources(config, names)
    shared: dict[str, dict[str, MultiTask]] = {
        spec: {split: MultiTask(data) for split, data in source.splits().items()} for spec, source in opened.items()
    }
    found = {}
    for name in names:
        section, classes = config.task(name), classes_of(config, name)
        spec = section["source"]
        known = opened[spec].train.tasks[name]
        outputs = outputs_of(known, classes, name)
        task = map_task(
            name,
            known,
            classes,
            section.get("weights"),
            source=opened[spec],
            splits=shared[spec],
            taps=[tap.name for tap in base.taps],
        )
        found[name] = DenseTask(task, head_of(config, name, outputs))
    return found


def base_for(config: Config, notes: Mapping[str, Any] | None) -> Any:
    """The base of a task's file. `notes`: what the file says of its maps; None for a task of classes.

    Raises:
        ConfigError: a file of maps over a configuration of classes, or the reverse.
    """
    if config.tasks and config.dense != (notes is not None):
        has, wants = ("maps", "classes") if config.dense else ("classes", "maps")
        raise ConfigError(f"config: expected one of {wants}, as the task's file has, got one of {has}")
    built = config.base()
    return built if notes is None or config.tasks else wrapped(config, built, notes.get("taps") or None)


def shown(task: Task, values: Mapping[str, float]) -> str:
    """A task's first metric in a table: accuracies in per cent, others with their name."""
    key = next(iter(task.metrics))
    if key not in values:
        return ""
    return f"{100 * values[key]:.1f} %" if key == "accuracy" else f"{key} {values[key]:.4f}"
