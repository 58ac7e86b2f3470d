"""ByResolution: one base at several input sizes, a task for each (K for the Price of 1, arXiv 1810.10703)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .task_model import TaskModel


def _size(key: Any) -> tuple[int, int]:
    """(height, width) of a key; an int is a square."""
    pair = key if isinstance(key, tuple) else (key, key)
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise ConfigError(f"tasks: expected sizes such as 64 or (64, 96), got {key!r}")
    return pair


class ByResolution(nn.Module):
    """Runs the task that its input's size asks for: `ByResolution(model, {64: "signs@64", 96: "signs@96"})`.

    A task for each resolution is a task like any other: it is trained, saved and loaded by its own name, and its norms
    have statistics of its own resolution. Whether the model trains is the model's mode, as ever.

    Args:
        model: whose tasks they are.
        tasks: input height and width (an int for a square) -> task.

    Raises:
        ConfigError: no sizes; a bad one; a task that the model has not.
    """

    def __init__(self, model: TaskModel, tasks: Mapping[int | tuple[int, int], str]) -> None:
        super().__init__()
        if not isinstance(model, TaskModel):
            raise ConfigError(f"model: expected a TaskModel, got {type(model).__name__}")
        if not isinstance(tasks, Mapping) or not tasks:
            raise ConfigError(f"tasks: expected {{size: task}}, got {tasks!r}")
        self.tasks: dict[tuple[int, int], str] = {}
        for key, name in tasks.items():
            model.state(name)
            if (size := _size(key)) in self.tasks:
                raise ConfigError(f"tasks: expected different sizes, got {size} twice")
            self.tasks[size] = name
        self.model = model
        self.training = model.training

    def task_of(self, images: Tensor) -> str:
        """The task for `images` `[..., height, width]`. Raises ConfigError for a size that has none."""
        size = tuple(images.shape[-2:])
        name = self.tasks.get(size)  # type: ignore[arg-type]
        if name is None:
            known = ", ".join(f"{height} x {width}" for height, width in self.tasks)
            raise ConfigError(f"input: expected images of {known}, got {' x '.join(map(str, size))}")
        return name

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's forward under the task of the images' size."""
        return self.model(images, *args, task=self.task_of(images), **kwargs)
