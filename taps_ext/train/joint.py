"""A joint run: several tasks and what they have together, one optimizer, one best epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..model import TaskModel
from ..model.mixing import goes_by_layers
from ..model.state import Parts, TaskState
from .average import Average
from .callbacks import Told
from .checks import check_targets, checked_loss
from .config import TrainConfig
from .fetch import Batch, Epochs
from .guard import StepGuard
from .hierarchy import Hierarchy
from .interrupt import Stop
from .log import Log
from .metrics import weight_of
from .mixing import schedule
from .one_body import outputs_of_all
from .precision import autocast
from .run import NONE, Evaluate, groups_of, quality_of
from .state import load_run, restore, save_run, snapshot
from .stepper import Own, Stepper
from .task import Task, augmented, outputs_of
from .together import mixed_outputs_of, together
from .weighting import weighted, weighting_of


def _gated(state: TaskState) -> list[nn.Parameter]:
    """What the gates of a task let in, and their scores."""
    found = [parameter for _, part, _ in state.gated() for parameter in part.changes()]
    return found + [gate.score for _, _, gate in state.learned() if gate.score is not None]


@dataclass
class JointProgress:
    """Where a joint run stands: everything in it is saved and resumed."""

    epoch: int = 0
    step: int = 0  # within the epoch
    taken: dict[str, int] = field(default_factory=dict)  # task: batches since the start of the run
    losses: dict[str, float] = field(default_factory=dict)  # task: sum over the samples of the epoch
    seen: dict[str, float] = field(default_factory=dict)
    steps: int = 0  # of the optimizer, since the start
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    peak: list[Any] | None = None
    improved: int = 0
    stopped: bool = False  # a callback asked for it
    history: list[dict[str, Any]] = field(default_factory=list)


class Drawn(NamedTuple):
    """One batch of a task; `weight`: how much in it counts. `whole`: the inputs of all tasks' samples, and which of
    them are this task's, where they are the same for all."""

    inputs: Any
    targets: Any
    weight: float
    whole: tuple[Any, list[int]] | None = None


class JointRun:
    """The training of several tasks together.

    A step adds up the means of its tasks' losses, on a GPU in one pass of the base, and divides the gradients of what
    they share by their number; a task that a step has not is not touched by it.

    Args:
        batches: of the training splits. evaluate: metrics of each task, as it is now, on its validation split.
        shared_first: train what the tasks share, their norms and heads, and leave what their gates let in for later.

    Raises:
        ConfigError: nothing to train; settings that joint training has not.
    """

    name = "joint"

    def __init__(
        self,
        model: TaskModel,
        tasks: Mapping[str, Task],
        config: TrainConfig,
        batches: Mapping[str, Epochs],
        evaluate: Mapping[str, Evaluate],
        *,
        shared_first: bool = False,
        own: Own = NONE,
    ) -> None:
        self.model, self.tasks, self.config, self.batches, self.evaluate = model, tasks, config, batches, evaluate
        for name in ("budget", "freeze_after"):
            if getattr(config, name) is not None:
                raise ConfigError(f'{name}: expected None with mode="joint", got {getattr(config, name)}')
        if config.accumulate != 1:
            raise ConfigError(f'accumulate: expected 1 with mode="joint", got {config.accumulate}')
        self.device = next(model.parameters()).device
        self.weighting = weighting_of(config.loss_weights, list(tasks)).to(self.device)
        self.states = {name: model.state(name) for name in tasks}
        families = [state.family for state in self.states.values() if state.family is not None]
        self.families = {family.name: family for family in families if not family.digest}
        self.parts: dict[str, Parts] = {
            **{f"shared/{name}": family for name, family in self.families.items()},
            **{f"task/{name}": state for name, state in self.states.items()},
        }
        self.shared_first = shared_first
        later = [(p, p.requires_grad) for state in self.states.values() for p in _gated(state)] if shared_first else []
        self.later = later
        for parameter, _ in later:
            parameter.requires_grad_(False)
        self.shared = [p for family in self.families.values() for p in family.parameters()]
        weights = [p for p in self.weighting.parameters() if p.requires_grad]
        try:
            self.tied = None if config.hierarchy is None else Hierarchy(self.states, config.hierarchy)
            groups = groups_of(model, list(tasks), config, "tasks")
            if weights:
                groups.append({"name": "weighting", "params": weights, "lr": config.lr, "weight_decay": 0.0})
            self.stepper = Stepper(groups, config, own, self.device)
        except BaseException:
            self.release()  # else the next run would take it for what the user froze
            raise
        self.optimizer = self.stepper.optimizer
        named = {key.replace("/", " ", 1): held for key, held in self.parts.items()}
        self.guard = StepGuard({**named, "the loss weights": self.weighting}, config.bad_steps)
        self.averages = (
            {k: Average(held, config.ema) for k, held in self.parts.items()} if config.ema is not None else {}
        )
        self.told: Told | None = None
        self.progress, self.best = JointProgress(), self._snapshot()
        self.sizes = {name: len(found) for name, found in batches.items()}
        self.streams: dict[str, Iterator[Batch]] = {}

    def _snapshot(self) -> dict[str, Tensor]:
        """Copies of all that is trained, by "<task or family>|<tensor>"."""
        return {f"{key}|{name}": t for key, held in self.parts.items() for name, t in snapshot(held).items()}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        for key, held in self.parts.items():
            restore(held, {n.removeprefix(f"{key}|"): t for n, t in tensors.items() if n.startswith(f"{key}|")})

    @property
    def steps_per_epoch(self) -> int:
        return len(schedule(self.sizes, self.config.mix, self.config.seed, 0))

    @property
    def done(self) -> bool:
        """True after the last epoch, where a callback asked to stop, or where `patience` epochs brought nothing better
        than the best before them."""
        progress, patience = self.progress, self.config.patience
        if progress.epoch >= self.config.epochs or progress.stopped:
            return True
        return patience is not None and progress.peak is not None and progress.epoch - 1 - progress.improved >= patience

    # -- steps

    def train_epoch(self, log: Log, stop: Stop) -> bool:
        """Train to the end of the epoch; False if a stop was asked for first, or after a step a state was due."""
        progress, config = self.progress, self.config
        first = progress.step
        self.model.train()
        steps = schedule(self.sizes, config.mix, config.seed, progress.epoch)
        while progress.step < len(steps):
            if stop.asked or (stop.saving and progress.step > first):
                return False
            losses = self._step(steps[progress.step], len(steps))
            progress.step += 1
            progress.steps += 1
            log.step(progress.steps)
            if self.told is not None and losses:
                named = {f"{name}_loss": loss for name, loss in losses.items()}
                self.told.step(progress.steps, {**named, **self.stepper.rates_now()})
                if not self.model.training:  # a callback looked at the model, and left it so
                    self.model.train()
        return True

    def _step(self, names: tuple[str, ...], steps_per_epoch: int) -> dict[str, float]:
        """Take a step; the losses of its tasks, none if it was left out."""
        config, optimizer = self.config, self.optimizer
        self.stepper.rates(self.progress.steps, steps_per_epoch)
        optimizer.zero_grad(set_to_none=True)
        self.guard.before()
        found = self._gradients(names)
        for name in names:
            self.progress.taken[name] = self.progress.taken.get(name, 0) + 1
        losses = {name: pair for name, pair in found.items() if pair is not None}
        names = tuple(losses)
        if not losses:
            return {}
        if self._bad({name: loss for name, (loss, _) in losses.items()}):
            return {}
        for name, (loss, seen) in losses.items():
            self.progress.losses[name] = self.progress.losses.get(name, 0.0) + loss * seen
            self.progress.seen[name] = self.progress.seen.get(name, 0) + seen
        if len(names) > 1:
            for parameter in self.shared:
                if parameter.grad is not None:
                    parameter.grad.div_(len(names))
        self.stepper.clip()
        if self.model.gates == "device":
            self.model.drop_closed_gradients(names)
        self.stepper.step()
        if self.tied is not None:
            self.tied.step(names, config.lr * config.lr_scale(self.progress.steps, steps_per_epoch))
        for average in self.averages.values():
            average.update()
        told = {name: loss for name, (loss, _) in losses.items()}
        self.weighting.after(told)
        return told

    def _bad(self, losses: Mapping[str, float]) -> bool:
        """True for a step that is not finite, which is undone; in silence where a smaller scale of fp16 will do. Raises
        DivergedError where too many in a row were bad."""
        progress = self.progress
        wrong = next((name for name, loss in losses.items() if not math.isfinite(loss)), None)
        problem = None if wrong is None else f"task {wrong!r}: the training loss is not finite"
        if problem is None:
            self.stepper.scaler.unscale()
            if (parameter := self.guard.bad_parameter()) is not None:
                if self.stepper.scaler.backed_off():
                    self.guard.leave_out(self.stepper.parameters)
                    return True
                problem = f"the gradient of {parameter} is not finite, though the losses are"
        if problem is None:
            self.guard.good()
            return False
        self.guard.undo(f"epoch {progress.epoch}, step {progress.step}: {problem}", self.stepper.parameters)
        return True

    def _gradients(self, names: tuple[str, ...]) -> dict[str, tuple[float, float] | None]:
        """Those of the mean loss over one batch of each task, and of its penalty; by task the loss and what it is the
        mean of: samples, or their parts that count. None where nothing counts: then the step has not got the task."""
        drawn = {name: self._draw(name) for name in names}
        batches = {name: batch for name, batch in drawn.items() if batch is not None}
        found: dict[str, tuple[float, float] | None] = dict.fromkeys(names)
        if (one := self._one_body(batches)) is not None:
            self.stepper.backward(torch.stack([weighted(self.weighting, n, loss) for n, loss in one.items()]).sum())
            return found | {name: (float(loss.detach()), batches[name].weight) for name, loss in one.items()}
        inputs = {name: batch.inputs for name, batch in batches.items()}
        joined = together(inputs, self.model.batch_dim) if self._mixes(batches) else None
        if joined is not None:
            losses = self._mixed_losses(batches, *joined)
            self.stepper.backward(torch.stack([weighted(self.weighting, n, loss) for n, loss in losses.items()]).sum())
            found |= {name: (float(loss.detach()), batches[name].weight) for name, loss in losses.items()}
        for name, batch in batches.items():
            if joined is None:
                loss = self._loss(name, batch)
                found[name] = float(loss.detach()), batch.weight
                self.stepper.backward(weighted(self.weighting, name, loss))
            if self.progress.epoch >= self.config.warmup_epochs and not self.shared_first:
                penalty = self.model.sparsity_loss(name)
                if penalty.requires_grad:
                    self.stepper.add(penalty)
        return found

    def _one_body(self, batches: Mapping[str, Drawn]) -> dict[str, Tensor] | None:
        """The losses of tasks on the same samples, by one run of the backbone; None where it takes several."""
        wholes = {name: batch.whole for name, batch in batches.items()}
        with autocast(self.config.amp, self.device):
            outputs = outputs_of_all(self.model, wholes, {name: self.states[name] for name in batches}, self.device)
            if outputs is None:
                return None
            return {name: self._loss_of(name, outputs[name], batch.targets) for name, batch in batches.items()}

    def _mixes(self, batches: Mapping[str, Drawn]) -> bool:
        """One pass for all tasks, where that is what a batch of several takes; else one after another takes less
        memory, since each backward frees what its forward kept."""
        return len(batches) > 1 and goes_by_layers(self.model)

    def _draw(self, name: str) -> Drawn | None:
        """The next batch of a task, or None where nothing in it counts."""
        task, taken = self.tasks[name], self.progress.taken.get(name, 0)
        lap, batch = divmod(taken, self.sizes[name])
        if name not in self.streams or batch == 0:
            self.streams[name] = self.batches[name].epoch(lap, skip=batch)
        inputs, targets = next(self.streams[name])
        weight = weight_of(task.loss, targets)
        if not weight:
            return None
        whole = self.batches[name].whole if task.augment is None else None
        seed = hash((self.config.seed, lap, batch)) % 2**63
        return Drawn(augmented(task.augment, inputs, seed), targets, weight, whole)

    def _loss(self, name: str, batch: Drawn) -> Tensor:
        with autocast(self.config.amp, self.device):
            return self._loss_of(name, outputs_of(self.model, batch.inputs, name, self.device), batch.targets)

    def _mixed_losses(self, batches: Mapping[str, Drawn], inputs: Any, tasks: list[str]) -> dict[str, Tensor]:
        with autocast(self.config.amp, self.device):
            outputs = mixed_outputs_of(self.model, inputs, tasks, self.device)
            return {name: self._loss_of(name, outputs[name], batch.targets) for name, batch in batches.items()}

    def _loss_of(self, name: str, outputs: Any, targets: Any) -> Tensor:
        config, task = self.config, self.tasks[name]
        if isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16):
            outputs = outputs.float()
        check_targets(
            task, targets, getattr(self.states[name].head, "out_features", None), f"tasks[{name!r}].train", outputs
        )
        if config.label_smoothing:
            return F.cross_entropy(outputs, targets.to(self.device), label_smoothing=config.label_smoothing)
        return checked_loss(task.loss(outputs, targets.to(self.device)), f"tasks[{name!r}].loss")

    # -- epochs

    def close_epoch(self, log: Log) -> None:
        """Validate every task, and keep all tensors if this epoch is the best yet: by the mean of the tasks' first
        metrics, then by the mean share of open weights."""
        config, progress = self.config, self.progress
        idle = [name for name in self.tasks if not progress.seen.get(name)]
        if idle and config.mix in (None, "all"):  # else a task may not be drawn
            warnings.warn(
                f"epoch {progress.epoch} took no step of {idle}: no target of theirs counted, or all were left out",
                stacklevel=4,
            )
        with ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.used())
            metrics = {name: self.evaluate[name]() for name in self.tasks}
            shares = {name: self.model.report(name).share for name in self.tasks}
            entry: dict[str, Any] = {"epoch": progress.epoch}
            for name, found in metrics.items():
                entry[f"{name}_loss"] = progress.losses.get(name, 0.0) / (progress.seen.get(name) or 1)
                entry |= {f"{name}_val_{key}": value for key, value in found.items()}
                entry[f"{name}_share"] = shares[name]
            entry |= self.weighting.values()
            log.event("epoch", {}, **entry)
            progress.history.append(entry)
            quality = [quality_of(self.tasks[name], found) for name, found in metrics.items()]
            rank = [sum(quality) / len(quality), -sum(shares.values()) / len(shares)]
            learned = any(state.learned() for state in self.states.values())
            settled = progress.epoch >= config.warmup_epochs or not learned or config.epochs <= config.warmup_epochs
            if settled and (progress.peak is None or rank > progress.peak):
                progress.peak, progress.improved = rank, progress.epoch
            best = progress.best
            better = best is None or rank >= best["rank"] or not best["settled"]
            if config.select == "last" or (settled and better) or best is None:
                progress.best = {"rank": rank, "settled": settled, "epoch": progress.epoch, "val": metrics}
                self.best = self._snapshot()
        progress.epoch, progress.step, progress.losses, progress.seen = progress.epoch + 1, 0, {}, {}

    def keep_best(self) -> None:
        """Leave everything as it was in the selected epoch."""
        self._restore(self.best)

    def release(self) -> None:
        """Leave what was to be trained later as it was found."""
        for parameter, trained in self.later:
            parameter.requires_grad_(trained)

    # -- the state on disk

    def save(self, path: Path, settings: dict[str, Any], parent: str) -> None:
        counters: dict[str, Any] = {"progress": asdict(self.progress), "settings": settings, "bad": self.guard.bad}
        average = {f"{key}|{n}": t for key, held in self.averages.items() for n, t in held.values.items()}
        counters["average_steps"] = {key: held.steps for key, held in self.averages.items()}
        kept = {"best": self.best, "average": average, "weighting": dict(self.weighting.state_dict())}
        save_run(path, self._snapshot(), self.stepper, kept, counters, parent, "")

    def load(self, path: Path, settings: dict[str, Any], parent: str) -> None:
        """Go on where :meth:`save` stopped. Raises as `state.load_run` says."""
        kept, counters = load_run(path, self._restore, self.stepper, parent, settings)
        self.progress, self.best = JointProgress(**counters["progress"]), kept["best"]
        self.weighting.load_state_dict(kept["weighting"])
        self.guard.bad = counters.get("bad", 0)  # of which earlier states say nothing
        self.streams = {}
        for key, held in self.averages.items():
            values = {n.removeprefix(f"{key}|"): t for n, t in kept["average"].items() if n.startswith(f"{key}|")}
            held.load(values, counters["average_steps"][key])
