"""One forward of a base model with a task's parts, and what must hold before and after it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..base.caches import is_cache
from ..base.guard import tensors
from ..base.offload import check_present, offloaded, refusal
from ..errors import BypassedLayerError, ConfigError, TapsError
from ..parts.host import original_class
from ..parts.sampling import Sample, batch_size
from ..routing.frame import Call, Frame, enter, leave, sequence_number
from .entry import enter as enter_method
from .gathering import gathered
from .state import TaskState

if TYPE_CHECKING:
    from .task_model import TaskModel


@torch.compiler.disable(recursive=False)
def run_frame(
    model: TaskModel, task: str | None, frame: Frame, args: Any, kwargs: Any, entry: str | None = None
) -> Any:
    """Call the base, or its method `entry`, in a frame; where gradients may flow, remember it for recomputation."""
    remember = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # compiled graphs recompute themselves
    first = sequence_number() if remember else 0
    token = enter(frame)
    try:
        output = model.base(*args, **kwargs) if entry is None else getattr(model.base, entry)(*args, **kwargs)
    except TapsError:
        raise
    except Exception as error:
        if (tensor := offloaded(model.base)) is not None:
            raise refusal(tensor) from error
        raise
    finally:
        leave(token)
        if frame.ready is not None:
            frame.ready.release()
    if remember:
        Call(model, task, frame, first, output)
    return output


@torch.compiler.disable(recursive=False)
def run_base(model: TaskModel, args: Any, kwargs: Any, entry: str | None = None) -> Any:
    """The base, or its method `entry`, as it was before adapting, in evaluation mode."""
    if model.training:
        base = model._mirror.of(model.base)
        if entry is None:
            return base(*args, **kwargs)
        with model._mirror.handing_back():
            return enter_method(model, base, entry, lambda: getattr(base, entry)(*args, **kwargs))
    frame = Frame({}, set(), method=entry is not None)
    if entry is None:
        return run_frame(model, None, frame, args, kwargs)
    return enter_method(model, model.base, entry, lambda: run_frame(model, None, frame, args, kwargs, entry))


def prepared(
    model: TaskModel,
    name: str,
    state: TaskState,
    args: Any,
    kwargs: Any,
    entry: str | None = None,
    *,
    together: bool = True,
) -> Frame:
    """The frame of one task's forward.

    Args:
        args, kwargs: what the task's samples are found by. together: its W_t may be made at once, before the base runs.
    """
    if entry is None:
        _check_labels(model, name, state, args, kwargs)
    check_guard(model, name)
    bindings = state.catch_up()
    sample = _sample(model, name, state, args, kwargs)
    ready, bound = None, bindings.bound
    if together and (
        entry is None or model.training
    ):  # methods such as `generate` mostly turn gradients off themselves
        ready, bound = gathered(bindings.gathering, bindings.bound, sampled=sample is not None)
    return Frame(bindings.stacks, set(), sample, bound, bindings.settings, ready, entry is not None)


def check_guard(model: TaskModel, name: str) -> None:
    """Raise TapsError where something wrote to the base before a step of a task."""
    if model._guard.held is None:
        model._guard.note(model.base)
    elif model.training and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        problem = model._guard.written(model.base, model._head)
        if problem is not None:
            raise TapsError(f"task {name!r}: {problem}")


def run_task(model: TaskModel, name: str, state: TaskState, args: Any, kwargs: Any, entry: str | None = None) -> Any:
    """The base, or its method `entry`, with one task's parts. Raises as :meth:`TaskModel.forward` says, and for a
    method as :func:`.entry.enter`."""
    frame = prepared(model, name, state, args, kwargs, entry)
    run = functools.partial(run_frame, model, name, frame, args, kwargs)
    if entry is not None:
        state.check_hosts()
        output = enter_method(model, model.base, entry, lambda: run(entry))
    else:
        output = watched(model, [(name, state)], run)
    warn_of_sample(model, name, frame.sample)
    if entry is not None:  # which may run a part of the model: what it leaves out is no mistake
        return output
    check_seen(model, name, state, frame.entered)
    return output


def warn_of_sample(model: TaskModel, name: str, sample: Sample | None) -> None:
    """Say so where `gate_fraction` saved nothing."""
    if sample is not None and sample.batch == 1:
        warnings.warn(
            f"gate_fraction: expected several samples to draw from, got one in dimension {model.batch_dim} (batch_dim) "
            f"of the forward's tensors: score gradients of task {name!r} are exact, and nothing is saved",
            stacklevel=4,
        )
    elif sample is not None and sample.fits and not any(sample.fits):
        warnings.warn(
            f"gate_fraction: no closed layer of task {name!r} has an input made of the {sample.batch} samples that the "
            f"forward's tensors have in dimension {model.batch_dim} (batch_dim): score gradients are exact, and "
            "nothing is saved",
            stacklevel=4,
        )


def check_seen(model: TaskModel, name: str, state: TaskState, entered: set[str]) -> None:
    """Raise BypassedLayerError where a forward left out what the task has."""
    seen = state.seen.get(model.training)
    if seen is None or not entered.issuperset(seen):
        _check_entered(model, name, state, entered)
    if model.training and not state.entered.issuperset(state.modules_used):
        state.entered |= entered  # evaluation may leave out what training runs


def _check_entered(model: TaskModel, name: str, state: TaskState, entered: set[str]) -> None:
    """Raise where a part had no effect on a forward, unless it is known to be left out in this mode; later forwards
    that enter as much need no look."""
    state.check_hosts()
    missed = [module for module in state.required() if module not in entered]
    if not model.training and missed and state.entered.issuperset(missed):
        state.training_only.update(missed)
    missed = [module for module in missed if module not in state.entered and module not in state.training_only]
    if missed:
        raise BypassedLayerError(
            f"task {name!r}: the base model never called forward on {', '.join(missed)}, so their task tensors "
            "have no effect. If only training runs them (auxiliary heads), run one forward in train() mode first; else "
            "something reads these weights unseen. Do that, or name them in exclude_modules"
        )
    state.seen = {**state.seen, model.training: frozenset(entered)}


@torch.compiler.disable
def _sample(model: TaskModel, name: str, state: TaskState, args: Any, kwargs: Any) -> Sample | None:
    """What closed layers estimate their score gradients from in this forward; None for all of the batch."""
    if not state.config.samples or not model.training:  # without gradients too: reentrant checkpointing runs so first
        return None
    if torch._C._are_functorch_transforms_active():  # its derivatives are exact
        return None
    batch = batch_size(args, kwargs, model.batch_dim)
    try:
        return state.config.sample(state.table, batch, next(model.parameters()).device, gates=model.gates)
    except ConfigError as error:
        raise ConfigError(f"{error} (task {name!r}, batch_dim = {model.batch_dim})") from None


def watched(model: TaskModel, states: Sequence[tuple[str, TaskState]], run: Callable[[], Any]) -> Any:
    """Run a forward; the first one of these tasks in training mode has to prove that it leaves the base's tensors
    alone."""
    fresh = [(name, state) for name, state in states if model.training and not state.watched]
    if not fresh:
        return run()

    def versions() -> dict[str, tuple[torch.Tensor, int]]:
        return {name: (t, t._version) for name, t in tensors(model.base) if not t.is_inference()}

    name, before = fresh[0][0], versions()
    output = run()
    for tensor, now in versions().items():
        was = before.get(tensor)
        if was is not None and was[0] is now[0] and was[1] == now[1]:
            continue
        kind, _, short = tensor.partition(" ")
        if kind == "buffer" and is_cache(model.base, short, now[0]):
            continue
        if was is None:
            raise TapsError(
                f"task {name!r}: training gave the base the {tensor}, which a fresh base has not; run the base once "
                "before it is adapted"
            )
        check_present(model.base)
        raise TapsError(
            f"task {name!r}: training wrote to the base's {tensor}, which no task owns; "
            'give it to the task (others="task") or freeze the module that writes it'
        )
    for _, state in fresh:
        state.watched = True
    return output


@functools.lru_cache(maxsize=64)
def _place_of_labels(cls: Any) -> int | None:
    """Which of a forward's arguments by place is `labels`, or None."""
    names = list(inspect.signature(cls.forward).parameters)[1:]
    return names.index("labels") if "labels" in names else None


# The losses of transformers whose classes are the words of the vocabulary, by the name that a model has for its own;
# None is the one of causal language models.
_OF_VOCABULARY = ("ForCausalLM", "ForMaskedLM", None)


def _check_labels(model: TaskModel, name: str, state: TaskState, args: Any, kwargs: Any) -> None:
    """transformers' models compute a loss from `labels` with the base's number of classes, not the task's."""
    base, own = model.base, getattr(state.head, "out_features", None)
    config = getattr(base, "config", None)
    if config is None or own is None:
        return
    kind: Any = original_class(base)
    place = _place_of_labels(kind)
    if kwargs.get("labels") is None and (place is None or len(args) <= place):
        return
    assert state.head_path is not None
    keys = ("num_labels", "vocab_size") if getattr(base, "loss_type", "") in _OF_VOCABULARY else ("num_labels",)
    counts = [getattr(config, key, None) for key in keys]
    # Of a config's numbers the loss goes by the one that the base's head has: language models have `num_labels`, too.
    classes = getattr(base.get_submodule(state.head_path), "out_features", getattr(config, "num_labels", None))
    if isinstance(classes, int) and classes in counts and own != classes:
        raise ConfigError(
            f"labels: the base computes its loss over {classes} classes and task {name!r} has {own}; leave labels "
            "out and compute the loss from the output's logits"
        )
