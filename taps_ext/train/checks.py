"""What a task's data must be: said before training, or in the step that first sees otherwise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .task import Task, accuracy, pair_of
from .tokens import IGNORED, token_cross_entropy


def check_sample(data: Any, argument: str, base: nn.Module) -> None:
    """Raise ConfigError unless the first item of a dataset is a pair of an input (a tensor, or a dictionary of tensors)
    and a target, and the base's forward takes the dictionary's keys."""
    check_item(data[0], argument, base)


def check_item(item: Any, argument: str, base: nn.Module, *, batch: bool = False) -> None:
    """As :func:`check_sample`, of one item, or of what a `DataLoader` makes of several."""
    of = "a batch" if batch else "an item"
    item = pair_of(item, argument)
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"{len(item)} values" if isinstance(item, (tuple, list)) else type(item).__name__
        raise ConfigError(f"{argument}: expected items (input, target), got {got}")
    inputs, target = item
    named = isinstance(inputs, Mapping)
    for key, value in inputs.items() if isinstance(inputs, Mapping) else (("", inputs),):
        if not isinstance(value, (Tensor, np.ndarray)) and not (named and _number(value)):
            kind = f"{type(value).__module__.split('.')[0]} {type(value).__name__}"
            mend = "give the dataset a transform"
            if batch or named:
                under = f" of {key!r}" if named else ""
                mend = f"give the task a DataLoader with a collate_fn that makes tensors{under}, as transformers' do"
            raise ConfigError(f"{argument}: expected a tensor as the input of {of}, got {kind}; {mend}")
    if isinstance(inputs, Mapping):
        try:
            inspect.signature(base.forward).bind(**inputs)
        except TypeError as error:
            raise ConfigError(
                f"{argument}: expected inputs by the names that the base's forward takes, got {list(inputs)} ({error})"
            ) from None
    if not isinstance(target, (Tensor, np.ndarray, np.generic, int, float)):
        raise ConfigError(f"{argument}: expected a number or tensor as the target of {of}, got {target!r}")


def checked_loss(loss: Any, argument: str) -> Tensor:
    """The training loss of a batch. Raises ConfigError for what is no scalar, or does not depend on what is trained."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ConfigError(f"{argument}: expected a scalar tensor, a mean over the batch, got {got}")
    if not loss.requires_grad:
        off = "" if torch.is_grad_enabled() else ", gradients being switched off (torch.no_grad, inference_mode)"
        raise ConfigError(f"{argument}: expected a loss with a gradient, got one that depends on nothing trained{off}")
    return loss


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, np.generic))


def check_targets(task: Task, targets: Tensor, classes: int | None, argument: str, outputs: Any = None) -> None:
    """Raise ConfigError unless the task's loss and metrics take these targets, as far as they are known.

    Args:
        classes: outputs of the task's linear head (None: not known).
        outputs: the model's, where they are known already; only `[B, classes]` says what targets must be like.
    """
    check_shapes(task, targets, argument, outputs)
    _check_loss(task, targets, classes, argument, outputs)
    if targets.is_floating_point() and any(metric is accuracy for metric in task.metrics.values()):
        raise ConfigError(
            f"{argument}: expected int64 labels, of which accuracy can be told, got {targets.dtype} "
            f"{list(targets.shape)}; give the task metrics of its own, or metrics={{}} to select by the loss"
        )


# Losses of torch's that compare element by element, and what they are told is broadcast where shapes differ.
_ELEMENTWISE = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.poisson_nll_loss,
    F.kl_div,
    F.soft_margin_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
    nn.KLDivLoss,
    nn.SoftMarginLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
)


def check_shapes(task: Task, targets: Tensor, argument: str, outputs: Any) -> None:
    """Raise ConfigError where a loss that compares element by element is given targets of another shape than the
    outputs: `[N]` against `[N, 1]` would be broadcast to all pairs, `[N, N]`. A function of the user's may reshape."""
    loss: Any = task.loss.func if isinstance(task.loss, functools.partial) else task.loss
    known = loss if loss in _ELEMENTWISE else type(loss)
    if known not in _ELEMENTWISE or not isinstance(outputs, Tensor) or outputs.shape == targets.shape:
        return
    advice = "give targets of that shape"
    if outputs.numel() == targets.numel():
        advice += f", such as y.reshape({', '.join(map(str, (-1, *outputs.shape[1:])))})"
    raise ConfigError(
        f"{argument}: expected targets {list(outputs.shape)} like the outputs, which {known.__name__} compares element "
        f"by element, got {list(targets.shape)}; {advice}"
    )


def _check_loss(task: Task, targets: Tensor, classes: int | None, argument: str, outputs: Any) -> None:
    if task.loss not in (F.cross_entropy, token_cross_entropy) or classes is None or targets.is_cuda:
        return
    last = isinstance(outputs, Tensor) and outputs.dim() > 2 and outputs.shape[:-1] == targets.shape
    if last and task.loss is F.cross_entropy and outputs.shape[1] != classes == outputs.shape[-1]:
        raise ConfigError(
            f"{argument}: expected outputs [B, {classes}, ...] for F.cross_entropy, got {list(outputs.shape)}, classes "
            "last; give the task token_cross_entropy as its loss and token_accuracy as its metric (taps_ext.train)"
        )
    flat = isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] == classes
    got = f"{targets.dtype} {list(targets.shape)}"
    if targets.is_floating_point():
        if flat and tuple(targets.shape) != tuple(outputs.shape):
            raise ConfigError(f"{argument}: expected int64 labels [B] or probabilities [B, {classes}], got {got}")
        if classes == 1 or (targets.numel() and bool((targets < 0).any())):
            got = "a head of one output" if classes == 1 else f"values down to {float(targets.min()):.3g}"
            raise ConfigError(
                f"{argument}: expected probabilities of several classes for cross-entropy, got {got}; give the task "
                "another loss, such as F.mse_loss"
            )
        return
    if flat and (targets.dtype not in (torch.int64, torch.uint8) or targets.dim() != 1):
        raise ConfigError(f"{argument}: expected int64 labels [B], got {got}")
    kept = targets[targets != IGNORED]
    if kept.numel() and (int(kept.max()) >= classes or int(kept.min()) < 0):
        wrong = int(kept.max()) if int(kept.max()) >= classes else int(kept.min())
        raise ConfigError(f"{argument}: expected labels from 0 to {classes - 1} (the head), got {wrong}")
