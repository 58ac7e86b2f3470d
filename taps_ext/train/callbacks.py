"""Callbacks: what the user wants to be told of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, suggestion
from .config import TrainConfig
from .randomness import forked
from .result import Result


@dataclass(frozen=True)
class RunInfo:
    """A run, as callbacks see it.

    Attributes:
        name: the task's, or "joint". tasks: what it trains. config: of the Trainer.
        settings: all that the run depends on, JSON-ready: data, methods, functions, config.
        epoch: where it starts (0), or goes on. steps: of the optimizer in all its epochs. out: its folder, or None.
    """

    name: str
    tasks: tuple[str, ...]
    config: TrainConfig
    settings: Mapping[str, Any]
    epoch: int
    steps: int
    out: Path | None


class Callback:
    """Told of every run of a Trainer's, in the process that trains; every method may be left out.

    A task that was finished before is not a run. What a callback raises ends the run as any error does. Callbacks do
    not belong to what a run depends on: a run may be resumed with others, and random numbers that they draw on the host
    are not the run's; a model that they leave in evaluation mode is trained on. One that goes on after it was killed
    tells again of the steps and epochs behind its last state.
    """

    def on_start(self, run: RunInfo) -> None:
        """A run starts or, with `run.epoch` > 0, goes on."""

    def on_step(self, run: RunInfo, step: int, values: Mapping[str, float]) -> None:
        """After step `step` (from 1; steps that were left out are counted and not told): "loss", of a joint run
        "<task>_loss" of the tasks that the step has, and "lr/<group>"."""

    def on_epoch(self, run: RunInfo, values: Mapping[str, Any]) -> bool | None:
        """After the validation of an epoch: what `metrics.jsonl` has of it, "epoch" (from 0) among it. True asks to
        stop: the run ends as after its last epoch, the best epoch so far is kept, and the run counts as finished."""

    def on_end(self, run: RunInfo, results: Mapping[str, Result]) -> None:
        """The run is over: results by task; none where it was stopped or has failed, and of the first stage of a lean
        run."""


HOOKS = ("on_start", "on_step", "on_epoch", "on_end")


class Told:
    """The callbacks of one run. As a context it tells them of the start and of the end, whatever that is."""

    def __init__(self, callbacks: Sequence[Callback], run: RunInfo) -> None:
        self.callbacks, self.run = callbacks, run
        self.results: dict[str, Result] = {}

    def __enter__(self) -> Told:
        self.started: list[Callback] = []
        try:
            with forked():
                for callback in self.callbacks:
                    callback.on_start(self.run)
                    self.started.append(callback)
        except BaseException:  # those that have started are told of the end
            self.__exit__(True)
            raise
        return self

    def step(self, step: int, values: Mapping[str, float]) -> None:
        with forked():
            for callback in self.callbacks:
                callback.on_step(self.run, step, values)

    def epoch(self, values: Mapping[str, Any]) -> bool:
        """True if one of them asks to stop; all are told."""
        with forked():
            return any([callback.on_epoch(self.run, dict(values)) for callback in self.callbacks])

    def __exit__(self, *error: Any) -> None:
        results = {} if error[0] is not None else self.results
        with forked(), ExitStack() as stack:  # what one of them raises does not keep the end from the others
            for callback in reversed(self.started):
                stack.callback(callback.on_end, self.run, results)


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Raise ConfigError unless these are callbacks."""
    if not isinstance(callbacks, (list, tuple)):
        raise ConfigError(f"callbacks: expected a list of Callback, got {type(callbacks).__name__}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            got = f"the class {callback.__name__}" if isinstance(callback, type) else type(callback).__name__
            raise ConfigError(f"callbacks: expected objects of taps_ext.train.Callback, got {got}")
        for name in dir(callback):
            if name.startswith("on_") and name not in HOOKS and callable(getattr(callback, name)):
                raise ConfigError(
                    f"callbacks: expected methods {list(HOOKS)} of {type(callback).__name__}, got {name!r}, which "
                    f"nothing calls{suggestion(name, HOOKS)}; a helper's name does not begin with on_"
                )
    return tuple(callbacks)
