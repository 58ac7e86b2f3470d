"""Step: one training step, or one forward, of a task, as often as wanted and without a trace in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ConfigError, TapsError
from ..methods.base import one_of
from ..model import TaskModel
from ..model.outputs import predictions
from ..train.gradients import add_gradients
from ..train.precision import TYPES, autocast
from ..train.state import restore, snapshot
from ..train.stepper import on_cuda
from .memory import casts_kept

PHASES = ("train", "infer")
OPTIMIZERS = ("sgd", "adamw")


def _normal(tensor: Tensor) -> Tensor:
    """A leaf that wants a gradient where the tensor does; autograd takes no tensors of inference mode."""
    if not tensor.is_inference():
        return tensor.detach().requires_grad_(tensor.requires_grad)
    with torch.inference_mode(False):
        return tensor.clone()


class Step:
    """A step of `task` on `inputs` (the forward's positional arguments).

    phase: "train" is forward, mean loss, penalty, backward and an optimizer's step, gradients freed first; "infer" is a
    forward in evaluation mode without gradients. `loss(outputs)` is by default the cross-entropy of outputs
    `[B, classes]` to class 0, and the mean square of any other.
    """

    def __init__(
        self,
        model: TaskModel,
        inputs: Sequence[Any],
        task: str | None,
        phase: str,
        optimizer: str,
        amp: str | None,
        loss: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(model, TaskModel):
            raise ConfigError(f"model: expected a TaskModel, got {type(model).__name__}")
        one_of(phase, PHASES, "phase")
        one_of(optimizer, OPTIMIZERS, "optimizer")
        if amp is not None:
            one_of(amp, tuple(TYPES), "amp")
        if isinstance(inputs, (Tensor, str)) or not isinstance(inputs, Sequence):
            raise ConfigError(f"inputs: expected a tuple of the forward's arguments, got {type(inputs).__name__}")
        if not inputs:
            raise ConfigError("inputs: expected the forward's arguments, got none")
        if loss is not None and not callable(loss):
            raise ConfigError(f"loss: expected a function of the outputs, got {type(loss).__name__}")
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ConfigError("model: expected a base with parameters, got one without")
        if parameter.is_meta:
            raise ConfigError("model: expected weights on a device, got them on meta; build the model on the CPU")
        if torch.is_autocast_enabled(parameter.device.type):
            raise ConfigError(
                "amp: a step is profiled under the autocast that amp names; call it outside of torch.autocast, got "
                f"amp={amp!r} inside of {torch.get_autocast_dtype(parameter.device.type)}"
            )
        if task is None and phase == "train":
            raise ConfigError("task: expected the name of a task to train, got None; the base does not train")
        self.model, self.task, self.phase, self.amp, self.own_loss = model, task, phase, amp, loss
        self.inputs = tree_map(lambda v: _normal(v) if isinstance(v, Tensor) else v, tuple(inputs))
        self.device = parameter.device
        self.state = None if task is None else model.state(task)
        self.optimizer: torch.optim.Optimizer | None = None
        if phase == "train":
            assert task is not None
            groups = model.parameter_groups(task, lr=0.0)
            if not groups:
                raise ConfigError(f"task: {task!r} has nothing to train")
            known: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
            settings = {"momentum": 0.9} if optimizer == "sgd" else {}
            self.optimizer = known[optimizer](groups, fused=on_cuda(groups), **settings)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model in the phase's mode; afterwards values, casts, modes, gradients and random numbers are as they
        were."""
        modes = [(module, module.training) for module in self.model.modules()]
        kept = None if self.state is None else snapshot(self.state)
        grads = [(p, p.grad) for p in self.model.parameters()]
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.train(self.phase == "train")
        try:
            with torch.random.fork_rng(devices=devices), casts_kept(self.model):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, grad in grads:
                parameter.grad = grad
            if self.state is not None and kept is not None and self.phase == "train":
                restore(self.state, kept)

    def loss(self, outputs: Any) -> Tensor:
        if self.own_loss is not None:
            try:
                value = self.own_loss(outputs)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ConfigError(f"loss: raised {type(error).__name__}: {reason}") from error
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                got = f"one of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(f"loss: expected a scalar tensor with a gradient, got {got}")
            return value
        found = predictions(outputs)
        if not isinstance(found, Tensor):
            raise ConfigError(f"model: expected outputs with a tensor to train on, got {type(found).__name__}")
        if found.dim() == 2:
            return F.cross_entropy(found.float(), torch.zeros(len(found), dtype=torch.int64, device=found.device))
        return found.float().square().mean()

    def forward(self) -> Any:
        with torch.set_grad_enabled(self.phase == "train"), autocast(self.amp, self.device):
            return self.model(*self.inputs, task=self.task)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What goes wrong in a first step is the model's affair, or the inputs': say which they were."""
        try:
            yield
        except TapsError:
            raise
        except Exception as error:
            shapes = [list(tensor.shape) for tensor in self.input_tensors()]
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"inputs: the model cannot run on tensors of shape {shapes}: {reason}") from error

    def input_tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]

    def run(self, mark: Callable[[str], AbstractContextManager[Any]] = record_function) -> None:
        """The whole step; `mark` is entered with "taps:forward", "taps:backward" and "taps:optimizer"."""
        training = self.optimizer is not None
        with torch.inference_mode(False) if training else nullcontext(), torch.set_grad_enabled(training):
            if self.optimizer is None:
                with mark("taps:forward"):
                    self.forward()
                return
            assert self.task is not None
            self.optimizer.zero_grad(set_to_none=True)
            for tensor in self.input_tensors():
                tensor.grad = None
            with mark("taps:forward"):
                loss = self.loss(self.forward())
            with mark("taps:backward"):
                loss.backward()
                if (penalty := self.model.sparsity_loss(self.task)).requires_grad:
                    add_gradients(penalty, [p for g in self.optimizer.param_groups for p in g["params"]])
                del loss, penalty
            with mark("taps:optimizer"):
                self.optimizer.step()

    def gradients(self) -> list[Tensor | None]:
        return [leaf.grad for leaf in (*self.model.parameters(), *self.input_tensors())]

    def optimizer_state(self) -> list[Tensor]:
        if self.optimizer is None:
            return []
        return [value for own in self.optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
