"""One task's run: epochs of steps, validation, the best epoch so far, and the state to resume from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..model import TaskModel
from .average import Average
from .budget import settle
from .callbacks import Told
from .checks import check_targets, checked_loss
from .config import TrainConfig
from .fetch import Batch, Epochs
from .guard import StepGuard
from .interrupt import Stop
from .log import Log
from .metrics import weight_of
from .precision import autocast
from .state import load_run, restore, save_run, snapshot
from .stepper import Own, Stepper
from .task import Task, augmented, outputs_of

NONE = Own()
Evaluate = Callable[[], dict[str, float]]


def groups_of(model: TaskModel, names: list[str], config: TrainConfig, whose: str) -> list[dict[str, Any]]:
    """What an optimizer of these tasks and of what they share is made of.

    Raises:
        ConfigError: nothing to train, of `whose`.
    """
    groups = model.parameter_groups(names, lr=config.lr, score_lr=config.score_lr, weight_decay=config.weight_decay)
    if not groups:
        raise ConfigError(f"{whose}: expected something to train, got neither gates, norms nor a head")
    return groups


def quality_of(task: Task, metrics: Mapping[str, float]) -> float:
    """What selects: the task's first metric, or the loss, so that more is better; -inf for NaN."""
    key = next(iter(task.metrics), "loss")
    quality = metrics[key] if task.metrics and task.maximize else -metrics[key]
    return -math.inf if math.isnan(quality) else quality


@dataclass
class Progress:
    """Where a run stands: everything in it is saved and resumed."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    pressure: float = 1.0
    held: bool = False  # gates rest
    open: list[str] | None = None  # layers that were open in the last step
    reopened: int = 0
    loss: float = 0.0
    seen: float = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    peak: list[Any] | None = None
    improved: int = 0
    stopped: bool = False  # a callback asked for it
    history: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """The training of one task.

    Args:
        batches: of the training split.
        evaluate: metrics of the task, as it is now, on the validation split.
        own: the user's own optimizer and scheduler.

    Raises:
        ConfigError: nothing to train; an optimizer or scheduler that cannot be used.
    """

    def __init__(
        self,
        model: TaskModel,
        name: str,
        task: Task,
        config: TrainConfig,
        batches: Epochs,
        evaluate: Evaluate,
        own: Own = NONE,
    ) -> None:
        self.model, self.name, self.task, self.config = model, name, task, config
        self.batches, self.evaluate = batches, evaluate
        self.state = model.state(name)
        self.device = next(model.parameters()).device
        self.loss = self._training_loss()
        self.outputs: int | None = getattr(self.state.head, "out_features", None)
        self.stepper = Stepper(groups_of(model, [name], config, f"task {name!r}"), config, own, self.device)
        self.optimizer = self.stepper.optimizer
        self.told: Told | None = None
        self.stream: Iterator[Batch] | None = None  # what is left of the epoch
        self.guard = StepGuard({f"task {name!r}": self.state}, config.bad_steps)
        self.average = None if config.ema is None else Average(self.state, config.ema)
        self.progress, self.best = Progress(), snapshot(self.state)
        learned = [gate.score for _, _, gate in self.state.learned() if gate.score is not None]
        self.scores = [(score, score.requires_grad) for score in learned]

    def _training_loss(self) -> Callable[[Any, Any], Tensor]:
        smoothing = self.config.label_smoothing
        if not smoothing:
            return self.task.loss
        return lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=smoothing)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.batches) / self.config.accumulate)

    @property
    def done(self) -> bool:
        """True after the last epoch, where a callback asked to stop, or where `patience` epochs brought nothing better
        than the best before them."""
        progress, patience = self.progress, self.config.patience
        if progress.epoch >= self.config.epochs or progress.stopped:
            return True
        if self.config.budget is not None and not progress.held:
            return False  # the choice is still to be made
        return patience is not None and progress.peak is not None and progress.epoch - 1 - progress.improved >= patience

    # -- epochs

    def train_epoch(self, log: Log, stop: Stop) -> bool:
        """Train to the end of the epoch; False if a stop was asked for first, or after a step a state was due."""
        config, progress, optimizer = self.config, self.progress, self.optimizer
        first = progress.batch
        self.model.train()
        running = torch.tensor(progress.loss, dtype=torch.float64, device=self.device)
        if self.stream is None:  # it lasts over states that are saved: streams would be read again from their beginning
            self.stream = self.batches.epoch(progress.epoch, skip=progress.batch)
        while progress.batch < len(self.batches):
            if stop.asked or (stop.saving and progress.batch > first):  # before the next samples draw random numbers
                progress.loss = running.item()
                return False
            chunk = list(islice(self.stream, config.accumulate))
            self.stepper.rates(progress.step, self.steps_per_epoch)
            optimizer.zero_grad(set_to_none=True)
            self.guard.before()
            loss, seen = self._gradients(chunk)
            if not seen or self._bad(loss, len(chunk)):
                progress.batch += len(chunk)
                progress.step += 1
                continue
            running += loss
            progress.seen += seen
            self.stepper.clip()
            if self.model.gates == "device":
                self.model.drop_closed_gradients(self.name)
            if not progress.held:
                self._count_reopened()
            self.stepper.step()
            if self.average is not None:
                self.average.update()
            progress.batch += len(chunk)
            progress.step += 1
            log.step(progress.step)
            if self.told is not None:
                self.told.step(progress.step, {"loss": loss.item() / seen, **self.stepper.rates_now()})
                if not self.model.training:  # a callback looked at the model, and left it so
                    self.model.train()
        progress.loss, self.stream = running.item(), None
        return True

    def _bad(self, loss: Tensor, batches: int) -> bool:
        """True for a step that is not finite, which is undone; in silence where a smaller scale of fp16 will do.

        Raises:
            DivergedError: too many in a row were bad.
        """
        progress, wrong = self.progress, None
        if not math.isfinite(loss.item()):
            wrong = "the training loss is not finite"
        else:
            self.stepper.scaler.unscale()
            if (parameter := self.guard.bad_parameter()) is not None:
                if self.stepper.scaler.backed_off():
                    self.guard.leave_out(self.stepper.parameters)
                    return True
                wrong = f"the gradient of {parameter} is not finite, though the loss is"
        if wrong is None:
            self.guard.good()
            return False
        last = progress.batch + batches - 1
        which = f"batch {progress.batch}" if batches == 1 else f"batches {progress.batch} to {last}"
        self.guard.undo(f"task {self.name!r}: epoch {progress.epoch}, {which}: {wrong}", self.stepper.parameters)
        return True

    def _gradients(self, chunk: list[tuple[Any, Any]]) -> tuple[Tensor, float]:
        """Gradients of the mean loss over some batches and of the penalty; returns the sum of the losses, and how many
        samples it is over, or their parts that count. Where nothing counts there are none."""
        config, progress = self.config, self.progress
        weights = [weight_of(self.task.loss, targets) for _, targets in chunk]
        samples = sum(weights)
        total = torch.zeros([], dtype=torch.float64, device=self.device)
        for index, (inputs, targets) in enumerate(chunk):
            if not weights[index]:
                continue
            seed = hash((config.seed, progress.epoch, progress.batch + index)) % 2**63
            loss = self._loss(augmented(self.task.augment, inputs, seed), targets)
            self.stepper.backward(loss * (weights[index] / samples))
            total += loss.detach().double() * weights[index]
        penalty = 0.0 if progress.epoch < config.warmup_epochs or progress.held else progress.pressure
        if samples and penalty and (sparsity := self.model.sparsity_loss(self.name, penalty)).requires_grad:
            self.stepper.add(sparsity)
        return total, samples

    def _loss(self, inputs: Any, targets: Any) -> Tensor:
        with autocast(self.config.amp, self.device):
            outputs = outputs_of(self.model, inputs, self.name, self.device)
            if isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16):
                outputs = outputs.float()
            check_targets(self.task, targets, self.outputs, f"tasks[{self.name!r}].train", outputs)
            return checked_loss(self.loss(outputs, targets.to(self.device)), f"tasks[{self.name!r}].loss")

    def close_epoch(self, log: Log) -> None:
        """Validate, steer the penalty, and keep the tensors if this epoch is the best yet."""
        config, state, progress = self.config, self.state, self.progress
        if not progress.seen:
            warnings.warn(
                f"task {self.name!r}: epoch {progress.epoch} took no step: no target counted, or all were left out",
                stacklevel=4,
            )
        self._steer()
        with nullcontext() if self.average is None else self.average.used():
            metrics = self.evaluate()
            report = self.model.report(self.name)
            entry = {
                "epoch": progress.epoch,
                "loss": progress.loss / (progress.seen or 1),
                **{f"val_{key}": value for key, value in metrics.items()},
                "share": report.share,
                "layers_open": report.layers_open,
                "reopened": progress.reopened if self.model.gates == "host" else None,
            }
            detail = {
                "scores": {row.layer: row.score for row in report.rows},
                "open": [row.layer for row in report.rows if row.open],
            }
            log.event("epoch", detail, **entry)
            progress.history.append(entry)
            within = config.budget is None or report.share <= config.budget
            rank = self._rank(metrics, report.share, within)
            settled = (
                progress.epoch >= config.warmup_epochs or not state.learned() or config.epochs <= config.warmup_epochs
            )
            if settled and (progress.peak is None or rank > progress.peak):
                progress.peak, progress.improved = rank, progress.epoch
            best = progress.best
            better = best is None or rank >= best["rank"] or not best["settled"]
            if config.select == "last" or (settled and better) or best is None:
                progress.best = {"rank": rank, "settled": settled, "epoch": progress.epoch, "val": metrics}
                self.best = snapshot(state)
        progress.epoch, progress.batch, progress.loss, progress.seen = progress.epoch + 1, 0, 0.0, 0
        progress.reopened = 0

    def _steer(self) -> None:
        """At the end of an epoch: move the penalty towards the budget, choose what stays open, let gates rest."""
        config, progress = self.config, self.progress
        if progress.held:
            return
        resting = config.rest_epoch is not None and progress.epoch >= config.rest_epoch
        if config.budget is not None:
            report = self.model.report(self.name)
            if progress.epoch >= config.warmup_epochs:
                progress.pressure *= math.exp(max(-0.5, min(0.5, 2.0 * (report.share - config.budget))))
            if resting:
                settle(self.state, report, config.budget)
                progress.improved = progress.epoch  # patience is counted from here
        if resting:
            self.rest()

    def rest(self) -> None:
        """Let gates rest from here on: what stays open has the rest of the run to make up for what closed."""
        self.progress.held = True
        for score, _ in self.scores:
            score.requires_grad_(False)
            score.grad = None

    def release(self) -> None:
        """Leave the scores as they were found."""
        for score, learns in self.scores:
            score.requires_grad_(learns)

    def _count_reopened(self) -> None:
        """Note which gates the host saw closed in the step before and open in this one."""
        now = [name for name, _, gate in self.state.learned() if gate.known]
        before = self.progress.open
        if before is not None:
            self.progress.reopened += len(set(now) - set(before))
        self.progress.open = now

    def _rank(self, metrics: dict[str, float], share: float, within: bool) -> list[Any]:
        """The best epoch has the largest: within the budget, then by the first metric (or the share), then sparser."""
        quality = quality_of(self.task, metrics)
        return [within, quality if within else -share, -share]

    # -- the state on disk

    def save(self, path: Path, settings: dict[str, Any], parent: str) -> None:
        counters: dict[str, Any] = {"progress": asdict(self.progress), "settings": settings, "bad": self.guard.bad}
        average = {} if self.average is None else self.average.values
        if self.average is not None:
            counters["average_steps"] = self.average.steps
        kept = {"best": self.best, "average": average}
        save_run(path, snapshot(self.state), self.stepper, kept, counters, parent, self.name)

    def load(self, path: Path, settings: dict[str, Any], parent: str) -> None:
        """Go on where :meth:`save` stopped. Raises as `state.load_run` says."""
        kept, counters = load_run(path, lambda parts: restore(self.state, parts), self.stepper, parent, settings)
        self.progress, self.best, self.stream = Progress(**counters["progress"]), kept["best"], None
        self.guard.bad = counters.get("bad", 0)  # of which earlier states say nothing
        if self.progress.held:
            self.rest()
        if self.average is not None:
            self.average.load(kept["average"], counters["average_steps"])

    def keep_best(self) -> None:
        """Leave the task as it was in the selected epoch."""
        restore(self.state, self.best)
