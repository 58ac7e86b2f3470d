"""Activation checkpointing: where what backward would recompute is not the forward that was, it is an error."""

from __future__ import annotations

import gc
import itertools
import threading

import pytest
import torch
from checkpointed import Net, gradients, plain_and_checkpointed, returning, same, two_tasks
from models import images, settle
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from taps_ext import GateError, TapsError
from taps_ext.routing import frame


@pytest.mark.parametrize("whole", [False, True])
def test_a_gate_that_changed_before_backward_is_an_error(whole: bool) -> None:
    _, model = plain_and_checkpointed(False)
    x = images(6)
    if whole:
        model.base.reentrant = None
        loss = checkpoint(model, x, task="a", use_reentrant=False)["logits"].sum()
    else:
        loss = model(x, task="a")["logits"].sum()
    model.set_gates("a", open=["stem"])
    with pytest.raises(GateError, match=r"second\.conv: its gate changed"):
        loss.backward()


@pytest.mark.parametrize(
    ("whole", "gates", "how"),
    [
        case
        for case in itertools.product([False, True], ["host", "device"], ["score", "set_gates", "merge"])
        if case != (False, "host", "score")  # the host's gate is that of the forward until the next one
        and case[::2] != (False, "merge")  # merging leaves the parts that the forward ran with as they are
    ],
)
def test_what_changed_before_a_reentrant_backward_is_an_error(whole: bool, gates: str, how: str) -> None:
    _, model = plain_and_checkpointed(True, gates)
    x = images(6).requires_grad_()
    if whole:
        model.base.reentrant = None
        model(x, task="a")  # gates seen before, and again after they changed
        with torch.no_grad():
            model.state("a").table["stem"].gate.score.fill_(0.05)
        loss = checkpoint(lambda x: model(x, task="a")["logits"], x, use_reentrant=True).square().sum()
    else:
        loss = model(x, task="a")["logits"].square().sum()
    if how == "score":
        with torch.no_grad():
            model.state("a").table["second.conv"].gate.score.fill_(0.05)
    elif how == "set_gates":
        model.set_gates("a", open=["stem"])
    else:
        model.eval()
        model.merge_task("a")
    with pytest.raises((GateError, TapsError), match="gate changed|is merged"):
        loss.backward()


@pytest.mark.parametrize("gates", ["host", "device"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_merging_before_a_backward_changes_nothing_of_it(reentrant: bool, gates: str) -> None:
    """What is recomputed is the forward's own parts, not the merged ones."""
    plain, checkpointed = plain_and_checkpointed(reentrant, gates)
    x = images(6)
    for model in (plain, checkpointed):
        loss = model(x.requires_grad_(), task="a")["logits"].square().sum()
        model.eval()
        model.merge_task("a")
        model(x, task="a")
        loss.backward()
    found = gradients(checkpointed)
    assert same(found, gradients(plain)) and any(name.endswith("second/conv.change.delta") for name in found)


def test_a_changed_gate_seen_by_a_later_forward_is_an_error_too() -> None:
    _, model = plain_and_checkpointed(True)
    model.base.reentrant = None
    x = images(6).requires_grad_()
    loss = checkpoint(lambda x: model(x, task="a")["logits"], x, use_reentrant=True).square().sum()
    model.set_gates("a", open=["stem"])
    with torch.no_grad():
        model(x, task="a")
    with pytest.raises(GateError, match="gate changed"):
        loss.backward()


class Hidden:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_a_forward_that_shows_no_tensor_is_never_taken_for_another() -> None:
    """Numbers of two threads overlap: another thread's forward must not be recomputed in its place."""
    model, other = returning(Hidden), plain_and_checkpointed(True)[1]
    waiting = {}
    for target in (other, model):  # forwards of task "b" in a thread of their own, waiting for their backward
        thread = threading.Thread(target=lambda t=target: waiting.update({t: t(images(6), task="b")}))
        thread.start()
        thread.join()
    with pytest.raises(TapsError, match="must return tensors"):
        model(images(6), task="a").logits.square().sum().backward()
    assert len(waiting) == 2 and not gradients(other)


@pytest.mark.parametrize("waiting", [False, True])
def test_another_threads_forward_is_never_recomputed_in_its_place(waiting: bool) -> None:
    """A graph whose call is gone, while another thread's call has the same numbers: an error, never a guess."""
    _, model = plain_and_checkpointed(False)
    kept: list[Tensor] = []
    errors: list[Exception] = []
    held = []

    def first() -> None:  # keeps what a block far below the output made, and nothing else
        hook = model.base.first.register_forward_hook(lambda _, __, out: kept.append(out))
        model(images(6), task="a")
        hook.remove()
        for thread in others:
            thread.start()
            thread.join()
        try:
            kept[0].square().sum().backward()
        except TapsError as error:
            errors.append(error)

    others = [threading.Thread(target=lambda: held.append(model(images(6), task="b")))] if waiting else []
    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    assert len(errors) == 1 and ("several threads" if waiting else "is not known") in str(errors[0])


@pytest.mark.parametrize("other", [False, True])
def test_a_changed_gate_is_seen_from_any_thread(other: bool) -> None:
    """Backward in a thread of its own; and nothing differentiable between the forward and the change."""
    _, model = plain_and_checkpointed(True)
    model.base.reentrant = None
    x = images(6).requires_grad_()
    out = checkpoint(lambda x: model(x, task="a")["logits"], x, use_reentrant=True)
    model.set_gates("a", open=["stem"])
    with torch.no_grad():
        model(x, task="a")
    errors: list[BaseException] = []

    def backward() -> None:
        try:
            out.backward(torch.ones_like(out))
        except GateError as error:
            errors.append(error)

    if other:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    else:
        backward()
    assert len(errors) == 1


def test_calls_hang_on_their_own_nodes_alone() -> None:
    """A graph from before the forward, kept for many steps, keeps no calls."""
    model = two_tasks(settle(Net()))
    kept = images(6).requires_grad_() * 2
    gc.collect()
    before = len(frame._calls)
    for _ in range(5):
        model(kept, task="a")["logits"].sum()
    gc.collect()
    assert len(frame._calls) == before


def test_without_a_known_forward_it_is_an_error() -> None:
    """The base called by itself has no call to find; nor has an output in which no tensor can be found."""
    _, model = plain_and_checkpointed(False)
    loss = model.base(images(6).requires_grad_())["logits"].sum()
    with pytest.raises(TapsError, match="call the base through TaskModel"):
        loss.backward()


def test_forwards_of_two_threads_are_not_mixed_up() -> None:
    """Each thread numbers its own graph: where two calls fit, it is an error, never a guess."""
    _, model = plain_and_checkpointed(False)
    losses = {}

    def forward(name: str) -> None:
        losses[name] = model(images(6), task=name)["logits"].sum()

    for name in ("a", "b"):
        thread = threading.Thread(target=forward, args=(name,))
        thread.start()
        thread.join()
    with pytest.raises(TapsError, match="several threads"):
        losses["a"].backward()


def test_calls_live_as_long_as_their_graph() -> None:
    _, model = plain_and_checkpointed(False)
    gc.collect()
    before = len(frame._calls)
    output = model(images(6), task="a")
    assert len(frame._calls) == before + 1
    with torch.no_grad():
        model(images(6), task="a")
    assert len(frame._calls) == before + 1
    del output
    assert len(frame._calls) == before
