"""TrainConfig: the settings of a training run, with an exact JSON round trip."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, suggestion
from ..methods.base import number, one_of
from ..methods.keywords import Keywords
from .weighting import WEIGHTINGS

MIXES = ("all", "proportional", "uniform", "temperature", "round-robin")


def device_named(name: Any) -> torch.device:
    """The device of that name, which need not be on this machine.

    Raises:
        ConfigError: no device has it.
    """
    if isinstance(name, (str, torch.device)):
        with suppress(RuntimeError):
            return torch.device(name)
    raise ConfigError(f"device: expected cpu or cuda[:N], got {name!r}")


def check_device(name: Any) -> None:
    """Raise ConfigError unless tensors can live on the device (None: wherever they are)."""
    if name is None:
        return
    device = device_named(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"device: {str(name)!r} is not usable here: {reason}") from None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Keywords):
    """How to train. All tasks of one `fit` share it. A misspelt keyword is a ConfigError with a suggestion.

    Attributes:
        epochs, batch_size: passes over the training data, samples in one forward.
        eval_batch_size: samples in one forward of validation and test (None: batch_size).
        optimizer: "sgd" (with momentum) or "adamw" (with betas).
        lr, score_lr: learning rates of everything and of the scores (None: lr).
        schedule: "cosine" to zero over the run, "step" (times step_gamma every step_epochs), "constant".
        weight_decay: on open Deltas and heads only.
        warmup_epochs: whole epochs without the sparsity penalty.
        budget: the share of the gated weights that may be open, or None. It steers the penalty until gates rest; then
            the layers with the largest scores that fit are opened, and all others closed.
        freeze_after: epochs after which gates rest: closed layers that the host knows then cost what the base's do, and
            keep nothing for backward. None: never, or with a budget after half of the epochs. A budget's gates rest
            in the last epoch at the latest, and not before the first epoch with a penalty has ended.
        accumulate: forwards averaged into one step; gates are fixed and the penalty added once in each step.
        amp: "bf16" or "fp16" runs forwards under autocast; None does not. With "fp16" losses are scaled
            (`torch.amp.GradScaler`): a step whose gradients overflow is left out and halves the scale, down to 1, which
            is no bad step; at a scale of 1 it is one. Gradients are unscaled before they are clipped.
        clip_norm: bound on the global gradient norm of everything but the scores (and trained loss weights).
        label_smoothing: of the training loss, in [0, 1), where that is `F.cross_entropy`.
        ema: decay of a moving average of all that is trained but the scores, in [0, 1); validated and kept are the
            averages, while gates come from the live scores. None keeps the live values.
        patience: stop after this many epochs, counted from the end of the warm-up (with a budget, from where gates
            rest), without a better one; None trains all epochs.
        mix: of joint training, which tasks a step has. None or "all": a batch of each, an epoch being one pass over the
            task with most batches, while smaller ones start again. One task a step, an epoch having as many steps as
            all tasks have batches: "proportional" (each batch of each once, shuffled), "uniform" (drawn alike),
            "temperature" (drawn in proportion to the square root of the number of batches), "round-robin".
        loss_weights: of joint training, task -> factor of its loss (default 1), or the name of a weighting:
            "uncertainty" (`taps_ext.train.Uncertainty`: trained log-variances), or one of your own
            (`taps_ext.train.register_weighting`).
        hierarchy: of joint training, the precision tau of a Gaussian prior over the tasks' changes and norms, whose
            mean is that of the tasks (BoRA, arXiv 2407.15857). After each step every value that was trained moves to
            (value + lr * tau * mean) / (1 + lr * tau): the step of the penalty tau / 2 * sum of squared distances,
            solved exactly, so that one lr serves every tau. 0 trains tasks apart, inf keeps them equal; they start
            equal.
        bad_steps: a step whose loss or gradients are not finite changes nothing and is named in a warning; after more
            than this many in a row (None: 3) the run stops. 0 stops at the first.
        lr_warmup: epochs (a fraction will do) over which learning rates rise from zero, before the schedule's factor.
        save_every: seconds between two states on disk, each written after a step or at the end of an epoch, for runs
            that are killed. A run that is stopped (Ctrl-C, SIGTERM, a hang-up) saves in any case.
        num_workers: processes that read samples, for data that is not held in memory; 0 reads in this one.
        seed: of batch order, validation split, augmentation and dropout (heads are drawn by `add_task`).
        val_fraction: share of the training data held out where a task brings no validation split.
        select: "best" keeps the epoch with the best validation metric (within the budget), "last" the last. Of joint
            training it is one epoch for all tasks, the best by the mean of their first metrics: what they share is of
            one epoch, and a task's own values of another epoch were never trained over it.
        device: where to train; None leaves the model where it is.
        tensorboard: also write events for TensorBoard, under `out`/tensorboard.
        out: folder for metrics, task files and the state to resume from; None writes nothing.
    """

    epochs: int = 30
    batch_size: int = 32
    eval_batch_size: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.01
    score_lr: float | None = None
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    step_epochs: int = 10
    step_gamma: float = 0.1
    weight_decay: float = 0.0
    warmup_epochs: int = 2
    budget: float | None = None
    freeze_after: int | None = None
    accumulate: int = 1
    amp: str | None = None
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    patience: int | None = None
    mix: str | None = None
    loss_weights: Mapping[str, float] | str | None = None
    hierarchy: float | None = None
    bad_steps: int | None = None
    lr_warmup: float | None = None
    save_every: float = 60.0
    num_workers: int = 0
    seed: int = 0
    val_fraction: float = 0.1
    select: str = "best"
    device: str | None = None
    tensorboard: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("epochs", 1),
            ("batch_size", 1),
            ("eval_batch_size", 1),
            ("accumulate", 1),
            ("step_epochs", 1),
            ("warmup_epochs", 0),
            ("patience", 1),
            ("freeze_after", 1),
            ("bad_steps", 0),
            ("num_workers", 0),
        ):
            value = getattr(self, name)
            if name in ("patience", "freeze_after", "eval_batch_size", "bad_steps") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}: expected an int >= {low}, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: expected an int in [0, 2**63), got {self.seed!r}")
        for name in ("lr", "score_lr", "clip_norm"):
            if name == "lr" or getattr(self, name) is not None:
                number(getattr(self, name), name, 0.0, open_low=True)
        for name in ("label_smoothing", "ema"):
            value = getattr(self, name)
            if value is not None:
                number(value, name, 0.0, 1.0)
            if value == 1:
                raise ConfigError(f"{name}: expected a number below 1, got {value!r}")
        for name in ("momentum", "weight_decay"):
            number(getattr(self, name), name, 0.0, 1.0)
        number(self.save_every, "save_every", 0.0)
        if self.lr_warmup is not None:
            number(self.lr_warmup, "lr_warmup", 0.0)
        number(self.step_gamma, "step_gamma", 0.0, 1.0, open_low=True)
        number(self.val_fraction, "val_fraction", 0.0, 0.9)
        if self.budget is not None:
            number(self.budget, "budget", 0.0, 1.0)
        betas = tuple(self.betas) if isinstance(self.betas, (list, tuple)) else ()
        if len(betas) != 2:
            raise ConfigError(f"betas: expected two numbers, got {self.betas!r}")
        for beta in betas:
            number(beta, "betas", 0.0, 1.0)
            if beta == 1:
                raise ConfigError(f"betas: expected numbers below 1, got {self.betas!r}")
        object.__setattr__(self, "betas", betas)
        if self.device is not None:
            if device_named(self.device).type == "meta":
                raise ConfigError("device: expected one that computes, got 'meta'")
            object.__setattr__(self, "device", str(self.device))  # JSON has no devices
        if self.out is not None and not isinstance(self.out, (str, os.PathLike)):
            raise ConfigError(f"out: expected a folder's path or None, got {self.out!r}")
        if not isinstance(self.tensorboard, bool):
            raise ConfigError(f"tensorboard: expected True or False, got {self.tensorboard!r}")
        if self.tensorboard and self.out is None:
            raise ConfigError("tensorboard: expected out to name the folder for its events, got None")
        one_of(self.optimizer, ("sgd", "adamw"), "optimizer")
        one_of(self.schedule, ("cosine", "step", "constant"), "schedule")
        if self.select == "best-each":
            raise ConfigError(
                'select: expected "best" or "last", got "best-each": tasks trained together share values of one epoch; '
                'tasks that share nothing are selected each for itself with mode="incremental"'
            )
        one_of(self.select, ("best", "last"), "select")
        if self.mix is not None:
            one_of(self.mix, MIXES, "mix")
        if isinstance(self.loss_weights, str):
            one_of(self.loss_weights, tuple(sorted(WEIGHTINGS)), "loss_weights")
        elif self.loss_weights is not None:
            if not isinstance(self.loss_weights, Mapping):
                raise ConfigError(
                    f"loss_weights: expected task names and numbers, or a weighting's name, got {self.loss_weights!r}"
                )
            for task, weight in self.loss_weights.items():
                number(weight, f"loss_weights[{task!r}]", 0.0)
            object.__setattr__(self, "loss_weights", dict(self.loss_weights))
        if self.hierarchy is not None and self.hierarchy != math.inf:
            number(self.hierarchy, "hierarchy", 0.0)
        if self.amp is not None:
            one_of(self.amp, ("bf16", "fp16"), "amp")

    @property
    def rest_epoch(self) -> int | None:
        """The last epoch (from 0) in which gates move, or None if they always do."""
        after = self.freeze_after
        if self.budget is None:
            return None if after is None else after - 1
        after = math.ceil(self.epochs / 2) if after is None else after
        return max(0, min(self.epochs, max(after, self.warmup_epochs + 1)) - 1)

    def lr_scale(self, step: int, steps_per_epoch: int) -> float:
        """The schedule's factor for optimizer step `step` (from 0), a warm-up's among it; a pure function, so resuming
        needs no state."""
        rising = (self.lr_warmup or 0.0) * steps_per_epoch
        return self._scheduled(step, steps_per_epoch) * (1.0 if step + 1 >= rising else (step + 1) / rising)

    def _scheduled(self, step: int, steps_per_epoch: int) -> float:
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * step / (self.epochs * steps_per_epoch)))
        if self.schedule == "step":
            return float(self.step_gamma ** (step // (self.step_epochs * steps_per_epoch)))
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings; :meth:`from_dict` is the inverse."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """Inverse of :meth:`to_dict`. Unknown keys are errors with a suggestion."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in settings:
            if key not in known:
                raise ConfigError(f"train: unknown key {key!r}{suggestion(key, known)}; known: {known}")
        return cls(**settings)
