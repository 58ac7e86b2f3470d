"""Trainer: adapts a TaskModel to its tasks, one after another or together."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .. import store
from ..errors import ConfigError, suggestion
from ..model import TaskModel
from ..model.state import Family
from ..store.names import file_name
from . import randomness
from .alone import alone
from .callbacks import Callback, RunInfo, Told, check_callbacks
from .checks import check_item, check_sample, check_targets
from .config import TrainConfig, check_device
from .fetch import Epochs
from .identity import describe
from .interrupt import Stop, TrainingInterrupted
from .joint import JointProgress, JointRun
from .loader import LoaderBatches, batches_of, identity_of, is_loader, splits
from .log import Log
from .metrics import Measured, described
from .multitask import labels_of
from .precision import autocast
from .result import Result
from .run import Evaluate, Progress, Run
from .state import advising, same_settings
from .stepper import Own
from .task import Task, accuracy, as_dataset, outputs_of, targets_of

MODES = ("incremental", "joint", "lean")
_ELSEWHERE = ("out", "device", "tensorboard", "save_every", "num_workers")  # settings that do not change a run
JOINT_STATE = "%joint.state"  # no task's file has such a name


def _identity(name: str, task: Task, split: str, config: TrainConfig) -> Any:
    """What tells one split from another, JSON-ready; None of one that the task lacks."""
    data = getattr(task, split)
    size = config.batch_size if split == "train" else config.eval_batch_size or config.batch_size
    if data is None:
        return None
    found = identity_of(data, f"tasks[{name!r}].{split}", size=size, workers=config.num_workers)
    return json.loads(json.dumps(found))


class Trainer:
    """Train the tasks of a model.

    Args:
        model: has every task already (`add_task`).
        tasks: task name -> its data, loss and metrics.
        config: settings shared by all tasks.
        quiet: print nothing.
        optimizer: instead of the config's `optimizer`, `momentum` and `betas`: `optimizer(groups) -> Optimizer`, called
            for each run with groups as `TaskModel.parameter_groups` gives them ("name", "params", "lr" and
            "weight_decay" of the config, which an argument of the optimizer's does not change; set `group["lr"]` for
            other rates). All parameters must be in it, in groups of their names, and `step()` must need no closure.
        scheduler: instead of the config's `schedule`, `step_epochs`, `step_gamma` and `lr_warmup`:
            `scheduler(optimizer) -> LRScheduler`, stepped once after every step of the optimizer (a step that is left
            out, as `TrainConfig.bad_steps` says, does not count). Its `state_dict()` holds numbers, text and tensors.
        callbacks: told of starts, steps, epochs and ends of runs; they may ask to stop (see `Callback`).

        Both factories are called once more where a run is resumed, and what was made is put back in its state; which
        functions they are belongs to the run's settings. They are called in every run of the Trainer's: one for each
        task, or one of a joint run and then one for each task that is trained on its own.

    Raises:
        ConfigError: a task that the model lacks; a budget or freeze_after without learned gates; label smoothing with
            a loss that is not `F.cross_entropy`; settings that a factory leaves without effect.
    """

    def __init__(
        self,
        model: TaskModel,
        tasks: Mapping[str, Task],
        config: TrainConfig | None = None,
        *,
        quiet: bool = False,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        config = TrainConfig() if config is None else config
        for argument, value, kind in (
            ("model", model, TaskModel),
            ("tasks", tasks, Mapping),
            ("config", config, TrainConfig),
        ):
            if not isinstance(value, kind):
                raise ConfigError(f"{argument}: expected a {kind.__name__}, got {type(value).__name__}")
        self.model, self.tasks, self.config, self.quiet = model, dict(tasks), config, quiet
        for name, task in self.tasks.items():
            if not isinstance(task, Task):
                raise ConfigError(f"tasks[{name!r}]: expected a Task, got {type(task).__name__}")
            state = model.state(name)
            if config.freeze_after is not None and not state.learned():
                raise ConfigError(f"freeze_after: task {name!r} has no learned gates that could rest")
            if config.budget is not None and (not state.learned() or not getattr(state.config, "lam", 0.0)):
                raise ConfigError(f"budget: task {name!r} has no learned gates with lam > 0 that could follow it")
            if config.label_smoothing and task.loss is not F.cross_entropy:
                raise ConfigError(
                    f"label_smoothing: expected 0 for task {name!r}, whose loss is not F.cross_entropy, "
                    f"got {config.label_smoothing}"
                )
            if isinstance(task.loss, nn.Module) and any(p.requires_grad for p in task.loss.parameters()):
                warnings.warn(
                    f"tasks[{name!r}].loss: {type(task.loss).__name__} has parameters, which are not trained: only the "
                    "task's are; call requires_grad_(False) on it where that is meant",
                    stacklevel=2,
                )
        self.own = Own(optimizer, scheduler)
        self.own.check(config)
        self.callbacks = check_callbacks(callbacks)
        self.reading: list[Epochs] = []
        self.out = None if config.out is None else Path(config.out)
        if config.device is not None:
            check_device(config.device)
            model.to(config.device)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def fit(self, mode: str = "incremental", resume: str | bool = "auto") -> dict[str, Result]:
        """Train the tasks: with `mode="incremental"` each on its own, in order; with `mode="joint"` all together, and
        with them what their families share, which is saved and frozen at the end of a run with `out`. With
        `mode="lean"` first what they share, their norms and heads, together, then what their gates let in, each task on
        its own: in memory this is one task's training. A task that a finished joint run did not have is trained on its
        frozen families alone.

        Args:
            resume: "auto" goes on where an interrupted run with the same settings stopped, if `out` holds one;
                True expects one; False starts over.

        Returns:
            task name -> :class:`Result`. The model is left with the selected epoch of each task.

        Raises:
            TrainingInterrupted: after Ctrl-C, a termination or a hang-up, once the state is written.
            DivergedError: too many steps in a row whose losses or gradients are not finite.
            TaskFileError: a damaged file of a finished task or family, or a damaged state.
            ConfigError: another run trains into `out`.

        A task that was finished before an interruption comes back from its file: outputs, reports and what is saved of
        it are those of a run that was not interrupted. Its closed Deltas are not in the file; they would be zeros if it
        were trained on, where a run that was not interrupted has what they were when they closed.
        """
        if mode not in MODES:
            raise ConfigError(f"mode: expected one of {list(MODES)}, got {mode!r}{suggestion(str(mode), MODES)}")
        if not self.tasks:
            raise ConfigError("tasks: expected at least one to train, got none")
        if mode == "lean" and not self._families():
            raise ConfigError("mode: expected 'joint' or 'incremental', since the tasks share nothing")
        if resume not in ("auto", True, False):
            raise ConfigError(f"resume: expected 'auto', True or False, got {resume!r}")
        idle = [key for key in ("mix", "loss_weights", "hierarchy") if getattr(self.config, key) is not None]
        if mode == "incremental" and idle:
            warnings.warn(
                f"{', '.join(idle)}: of joint training, without effect with mode='incremental'; did you mean "
                "fit('joint')?",
                stacklevel=2,
            )
        if self.out is not None:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise ConfigError(f"out: expected a folder, got {self.out}, which is or lies in a file") from None
        elif resume is True:
            raise ConfigError("resume: expected config.out to name the folder of an earlier run, got None")
        was_training = self.model.training
        results: dict[str, Result] = {}
        try:
            with alone(self.out), randomness.forked(self.device), Stop() as stop:
                together = mode != "incremental" and self._together(resume)
                if together:
                    results = self._fit_together(resume, stop, mode)
                for name, task in self.tasks.items() if not together or mode == "lean" else ():
                    if stop.asked:
                        raise TrainingInterrupted(f"stopped before task {name!r}; run it again to go on")
                    results[name] = self._fit_task(name, task, resume, stop, mode)
                if together and mode == "lean" and self.out is not None:
                    (self.out / JOINT_STATE).unlink(missing_ok=True)  # until here it held how tasks start
        finally:
            self.model.train(was_training)
        return results

    # -- one task

    def _settings(self, name: str, task: Task, mode: str = "incremental") -> dict[str, Any]:
        """What a run depends on, JSON-ready: a run goes on, or counts as done, only if all of it is the same."""
        state = self.model.state(name)
        plain = {key: value for key, value in self.config.to_dict().items() if key not in _ELSEWHERE}
        layers = {layer: [gate.learn, None if gate.learn else gate.known] for layer, _, gate in state.gated()}
        head = None if state.head is None else [[n, list(t.shape)] for n, t in state.head.state_dict().items()]
        data = {split: _identity(name, task, split, self.config) for split in ("train", "val")}
        functions = {
            "loss": describe(task.loss),
            "metrics": {key: described(metric) for key, metric in task.metrics.items()},
            "augment": describe(task.augment),
            "maximize": task.maximize,
            "labels": task.labels,
        }
        method = {f"method.{k}": v for k, v in state.config.to_dict().items()}
        settings = {**plain, **method, "task": name, "head": head, "gates": layers, **functions}
        settings |= {f"data.{split}": value for split, value in data.items()}
        made = {"optimizer": self.own.optimizer, "scheduler": self.own.scheduler}
        settings |= {key: describe(factory) for key, factory in made.items() if factory is not None}
        if task.batches_per_epoch is not None:
            settings["batches_per_epoch"] = task.batches_per_epoch
        if mode != "incremental":  # which 0.1's runs were
            settings["mode"] = mode
        found: dict[str, Any] = json.loads(json.dumps(settings))
        return found

    def _fit_task(self, name: str, task: Task, resume: str | bool, stop: Stop, mode: str) -> Result:
        config, settings = self.config, self._settings(name, task, mode)
        finished = self._finished(name, task, settings) if resume is not False else None
        if finished is not None:
            return finished
        family = self.model.state(name).family
        if family is not None and any(parameter.requires_grad for parameter in family.parameters()):
            raise ConfigError(
                f"mode: task {name!r} trains the family {family.name!r} with others; expected 'joint', or save_shared "
                "before, which freezes the family"
            )
        if family is not None and not family.digest and self.out is not None:  # now, not after the last epoch
            raise ConfigError(
                f"out: task {name!r} builds on the family {family.name!r}, which is in no file yet, so that its own "
                f"could not be written; call model.save_shared({family.name!r}, path) before, or train by mode 'joint'"
            )
        batches, evaluate = self._data(name, task)
        run = Run(self.model, name, task, config, batches, evaluate, self.own)
        try:
            return self._run(run, task, settings, resume, stop)
        finally:
            run.release()
            self._close()

    def _data(self, name: str, task: Task) -> tuple[Epochs, Evaluate]:
        """The training batches of a task, and its metrics on the validation split."""
        config, argument = self.config, f"tasks[{name!r}]"
        self._check_data(name, task)
        train, val = splits(task, argument, config.val_fraction, config.seed)
        self._check_penalty(name)
        batches = batches_of(
            train,
            f"{argument}.train",
            size=config.batch_size,
            seed=config.seed,
            workers=config.num_workers,
            train=True,
            length=task.batches_per_epoch,
        )
        held = self._to_evaluate(val, f"{argument}.val")
        self.reading += [batches, held]
        return batches, lambda: self.evaluate(name, held, task=task)

    def _close(self) -> None:
        """End the processes that read data."""
        while self.reading:
            self.reading.pop().close()

    def _to_evaluate(self, data: Any, argument: str) -> Epochs:
        """The batches of validation or test data."""
        config = self.config
        size = config.eval_batch_size or config.batch_size
        return batches_of(data, argument, size=size, workers=config.num_workers)

    # -- tasks together

    def _family_file(self, family: Family) -> Path:
        assert self.out is not None
        return self.out / file_name(family.name, ".shared.taps")

    def _families(self) -> list[Family]:
        """What the tasks are trained with, each family once."""
        found = [self.model.state(name).family for name in self.tasks]
        return list({family.name: family for family in found if family is not None}.values())

    def _together(self, resume: str | bool) -> bool:
        """Whether a joint run is to run, or to go on; False where one has finished, whose families are then loaded."""
        if self.out is None or resume is False or (self.out / JOINT_STATE).exists():
            return True
        families, files = self._families(), [file_name(name, ".result.json") for name in self.tasks]
        missing = [family for family in families if not self._family_file(family).exists()]
        if missing or not any((self.out / file).exists() for file in files):
            return True
        for family in families:
            if not family.digest:
                with advising(self._family_file(family)):
                    self.model.load_shared(self._family_file(family))
        return False

    def _fit_together(self, resume: str | bool, stop: Stop, mode: str) -> dict[str, Result]:
        """The joint run, or the first stage of a lean one, which has no results."""
        config, lean = self.config, mode == "lean"
        taken = {file_name(family.name, ".shared.taps") for family in self._families()} & {
            file_name(name, ".taps") for name in self.tasks
        }
        if taken:
            raise ConfigError(
                f"tasks: {min(taken).removesuffix('.taps')!r} is the name of a family's file; rename the task"
            )
        settings = {"mode": mode, "tasks": {n: self._settings(n, task, mode) for n, task in self.tasks.items()}}
        data = {name: self._data(name, task) for name, task in self.tasks.items()}
        batches, evaluate = ({name: pair[i] for name, pair in data.items()} for i in range(2))
        run = JointRun(self.model, self.tasks, config, batches, evaluate, shared_first=lean, own=self.own)  # type: ignore[arg-type]
        try:
            return self._run_together(run, settings, resume, stop, mode)
        finally:
            run.release()
            self._close()

    def _run_together(
        self, run: JointRun, settings: dict[str, Any], resume: str | bool, stop: Stop, mode: str
    ) -> dict[str, Result]:
        config, lean = self.config, mode == "lean"
        randomness.seed_all(config.seed)
        path = None if self.out is None else self.out / JOINT_STATE
        if path is not None and resume is False:
            self._begin_anew(path, self.tasks)
        parent = self.model.fingerprint()
        if path is not None and resume is not False and (path.exists() or resume is True):
            run.load(path, settings, parent)
        metrics = None if self.out is None else self.out / "metrics.jsonl"
        board = self.out / "tensorboard" / "joint" if self.out is not None and config.tensorboard else None
        total = run.steps_per_epoch * config.epochs
        run.stepper.check_length(total)
        with self._told(run, tuple(self.tasks), settings, total) as told:
            log = Log(metrics, run.name, total, first_epoch=run.progress.epoch, quiet=self.quiet, board=board)
            try:
                self._train(run, log, stop, path, settings, parent)
            finally:
                log.close()
            run.optimizer.zero_grad(set_to_none=True)
            run.keep_best()
            if lean:
                self._freeze_families()
                return {}
            results = {name: self._joint_result(name, run.progress) for name in self.tasks}
            if path is not None:
                self._freeze_families()
                for name, task in self.tasks.items():
                    self._keep(results[name], task, self._settings(name, task, mode))
                path.unlink(missing_ok=True)
            for name, task in self.tasks.items():
                told.results[name] = self._test(results[name], task, self._settings(name, task, mode))
        return told.results

    def _told(self, run: Run | JointRun, tasks: tuple[str, ...], settings: dict[str, Any], steps: int) -> Told:
        """The callbacks of a run, which tells them of its steps if there are any."""
        info = RunInfo(run.name, tasks, self.config, settings, run.progress.epoch, steps, self.out)
        told = Told(self.callbacks, info)
        run.told = told if self.callbacks else None
        return told

    def _freeze_families(self) -> None:
        """Save what the tasks share; from here on nothing trains it. Without a folder it is frozen alone."""
        for family in self._families():
            if not family.digest and self.out is not None:
                self.model.save_shared(family.name, self._family_file(family))
            family.requires_grad_(False)

    def _joint_result(self, name: str, progress: JointProgress) -> Result:
        assert progress.best is not None
        report = self.model.report(name)
        return Result(
            task=name,
            epoch=progress.best["epoch"],
            val=progress.best["val"][name],
            test={},
            share=report.share,
            layers_open=report.layers_open,
            within_budget=True,
            seconds=progress.seconds,
            history=progress.history,
        )

    def _check_penalty(self, name: str) -> None:
        """Say so where lambda or freeze_after would have no effect."""
        config, state = self.config, self.model.state(name)
        moving = config.epochs if config.rest_epoch is None else config.rest_epoch + 1
        if getattr(state.config, "lam", 0.0) and state.learned() and moving <= config.warmup_epochs:
            warnings.warn(
                f"task {name!r}: the penalty never acts: gates move for {moving} epochs, all of them warm-up "
                f"(warmup_epochs = {config.warmup_epochs})",
                stacklevel=5,
            )
        if config.freeze_after is not None and config.freeze_after > config.epochs:
            warnings.warn(
                f"task {name!r}: gates never rest: freeze_after = {config.freeze_after}, epochs = {config.epochs}",
                stacklevel=5,
            )

    def _run(self, run: Run, task: Task, settings: dict[str, Any], resume: str | bool, stop: Stop) -> Result:
        config, name = self.config, run.name
        randomness.seed_all(config.seed)
        path = None if self.out is None else self.out / file_name(name, ".state")
        if path is not None and resume is False:
            self._begin_anew(path, [name])
        parent = self.model.fingerprint(run.state.head_path)
        if path is not None and resume is not False and (path.exists() or resume is True):
            run.load(path, settings, parent)
        metrics = None if self.out is None else self.out / "metrics.jsonl"
        board = self.out / "tensorboard" / file_name(name) if self.out is not None and config.tensorboard else None
        first, total = run.progress.epoch, run.steps_per_epoch * config.epochs
        run.stepper.check_length(total)
        with self._told(run, (name,), settings, total) as told:
            log = Log(metrics, name, total, first_epoch=first, quiet=self.quiet, board=board)
            try:
                self._train(run, log, stop, path, settings, parent)
            finally:
                log.close()
            run.optimizer.zero_grad(set_to_none=True)
            run.keep_best()
            told.results[name] = self._finish(name, task, run.progress, settings, path)
        return told.results[name]

    def _train(
        self, run: Run | JointRun, log: Log, stop: Stop, path: Path | None, settings: dict[str, Any], parent: str
    ) -> None:
        """Epochs until the run is done, saved now and then, and where a stop is asked for."""
        if path is not None and not self.quiet:
            said = f"state saved every {self.config.save_every:g} s in {path}; Ctrl-C saves"
            print(f"{run.name}: {said}", file=sys.stderr)
        began = time.perf_counter()
        started, stop.due = began - run.progress.seconds, began + self.config.save_every
        if path is None:
            stop.due = math.inf
        while not run.done:
            complete = run.train_epoch(log, stop)
            run.progress.seconds = time.perf_counter() - started
            if complete:
                run.close_epoch(log)
                if run.told is not None and run.told.epoch(run.progress.history[-1]):
                    run.progress.stopped = True
            stopping = stop.asked and not run.done
            if path is not None and (stopping or run.done or stop.saving):
                run.save(path, settings, parent)
                stop.due = time.perf_counter() + self.config.save_every
            if stopping:
                raise TrainingInterrupted(self._stopped(run.name, path))

    def _check_data(self, name: str, task: Task) -> None:
        """Raise before the first step if samples or labels are not what the task's loss and head take."""
        outputs = getattr(self.model.state(name).head, "out_features", None)
        for split in ("train", "val", "test"):
            data, argument = getattr(task, split), f"tasks[{name!r}].{split}"
            if data is None:
                continue
            if is_loader(data):
                self._check_loader(data, argument, task if split == "train" else None)
                continue
            dataset = as_dataset(data, argument)
            labels = labels_of(dataset)
            check_sample(dataset if labels is None else labels.first(argument), argument, self.model.base)
            targets = targets_of(dataset)
            if targets is not None:
                check_targets(task, targets, outputs, argument)
        if task.labels is not None and isinstance(outputs, int) and len(task.labels) != outputs:
            raise ConfigError(f"tasks[{name!r}].labels: expected {outputs} names (the head), got {len(task.labels)}")

    def _check_loader(self, data: Any, argument: str, task: Task | None) -> None:
        """Look at the first batch of a `DataLoader`, as far as this process can read it without reading on. Training's
        is that of `task`."""
        config, length = self.config, None if task is None else task.batches_per_epoch
        how = {"size": config.batch_size, "seed": config.seed, "workers": config.num_workers}
        batches = batches_of(data, argument, train=task is not None, length=length, **how)
        if isinstance(batches, LoaderBatches) and batches.loader.worker_init_fn is None:
            check_item(batches.first(), argument, self.model.base, batch=True)

    def evaluate(self, name: str, data: Any, *, task: Task | None = None) -> dict[str, float]:
        """Loss and metrics of a task on whatever a `Task` takes as a split, or its batches. The mode is restored.

        Raises:
            ConfigError: an unknown task; a metric that is no number.
        """
        task = self.tasks.get(name) if task is None else task
        if task is None:
            raise ConfigError(f"task: expected one of {list(self.tasks)}, got {name!r}")
        batches = data if isinstance(data, Epochs) else self._to_evaluate(data, "data")
        amp, seen = self.config.amp, 0
        outputs_of_head = getattr(self.model.state(name).head, "out_features", None)
        device = self.device
        measured = Measured(task.loss, task.metrics, accuracy, device)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for inputs, targets in batches.epoch(0):
                    if not len(targets):  # none of the task's, in a batch of several tasks'
                        continue
                    with autocast(amp, device):
                        outputs = outputs_of(self.model, inputs, name, device)
                    outputs = outputs.float() if isinstance(outputs, Tensor) and amp else outputs
                    check_targets(task, targets, outputs_of_head, f"task {name!r}", outputs)
                    measured.update(outputs, targets.to(device))
                    seen += len(targets)
        finally:
            self.model.train(was_training)
            if batches is not data:
                batches.close()
        found = measured.compute()
        if not math.isfinite(found["loss"]):
            warnings.warn(
                f"task {name!r}: the loss on {seen} samples to evaluate is not finite; look for Inf or NaN in them, "
                "or for targets that are all ignored",
                stacklevel=2,
            )
        elif math.isnan(found[first := next(iter(task.metrics), "loss")]):
            warnings.warn(
                f"task {name!r}: metrics[{first!r}], by which an epoch is selected, is NaN on {seen} samples",
                stacklevel=2,
            )
        return found

    def _stopped(self, name: str, path: Path | None) -> str:
        if path is None:
            return f"training of {name!r} stopped; config.out is None, so nothing was saved"
        return f"training of {name!r} stopped and saved in {path}; run it again to go on"

    def _finish(self, name: str, task: Task, progress: Progress, settings: dict[str, Any], path: Path | None) -> Result:
        assert progress.best is not None
        within = bool(progress.best["rank"][0])
        if not within:
            warnings.warn(
                f"task {name!r}: no epoch met the budget {self.config.budget}; kept the sparsest",
                stacklevel=4,
            )
        report = self.model.report(name)
        result = Result(
            task=name,
            epoch=progress.best["epoch"],
            val=progress.best["val"],
            test={},
            share=report.share,
            layers_open=report.layers_open,
            within_budget=within,
            seconds=progress.seconds,
            history=progress.history,
        )
        if path is not None:
            self._keep(result, task, settings)  # whatever the test split holds, what was learned is on disk
            path.unlink(missing_ok=True)
        return self._test(result, task, settings)

    def _test(self, result: Result, task: Task, settings: dict[str, Any]) -> Result:
        """Measure the task on its test split, and say so in its files."""
        if task.test is not None:
            result.test = self.evaluate(result.task, task.test, task=task)
            if self.out is not None:
                self._keep(result, task, settings)
        return result

    def _keep(self, result: Result, task: Task, settings: dict[str, Any]) -> None:
        """Write a task's file and the marker that it is finished."""
        assert self.out is not None
        target = self.out / file_name(result.task, ".taps")
        finite = [{k: v if math.isfinite(v) else None for k, v in m.items()} for m in (result.val, result.test)]
        metrics = {"epoch": result.epoch, "val": finite[0], "test": finite[1]}
        self.model.save_task(result.task, target, labels=task.labels, metrics=metrics, preprocessing=task.preprocessing)
        result.file = str(target)
        tested = _identity(result.task, task, "test", self.config) if result.test else None
        text = json.dumps({"settings": settings, "tested": tested, "result": asdict(result)})
        store.write_text(self._marker(result.task), text)

    def _marker(self, name: str) -> Path:
        """The file that says that a task is finished."""
        assert self.out is not None
        return self.out / file_name(name, ".result.json")

    def _begin_anew(self, path: Path, names: Iterable[str]) -> None:
        """Drop the state and the markers of a run that this one replaces: killed before its own first state, it is not
        taken for the other."""
        for file in (path, *(self._marker(name) for name in names)):
            file.unlink(missing_ok=True)

    def _finished(self, name: str, task: Task, settings: dict[str, Any]) -> Result | None:
        """The result of a task that an earlier run with the same settings finished, loaded into the model."""
        if self.out is None:
            return None
        marker = self._marker(name)
        if not marker.exists():
            return None
        with advising(marker):
            record = json.loads(marker.read_text(encoding="utf-8"))
            before, tested, result = record["settings"], record["tested"], Result(**record["result"])
        same_settings(marker, before, settings)
        file = self.out / file_name(name, ".taps")
        if not file.exists():
            return None
        with advising(file):
            self.model.reload_task(name, file)
        if not self.quiet:
            print(f"{name}: trained before with the same settings, loaded from {file}", file=sys.stderr)
        result = replace(result, file=str(file))
        now = _identity(name, task, "test", self.config)
        if task.test is None:
            return replace(result, test={})
        return result if tested == now and now[2] is not None else self._test(result, task, settings)
