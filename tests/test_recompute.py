"""Activation checkpointing: what backward recomputes is the forward that was, task and gates included."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import images, settle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taps_ext import FullConfig, GateError, TapsConfig, TapsError, TaskModel
from taps_ext.nn import frame


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """`reentrant`: None runs its blocks plainly, else which kind of checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.first, self.second = Block(), Block()
        self.fc = nn.Linear(6, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.stem(x))
        for block in (self.first, self.second):
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return {"logits": self.fc(x.mean(dim=(2, 3)))}


def two_tasks(base: nn.Module, gates: str = "host", config=None) -> TaskModel:
    model = TaskModel(base, TapsConfig(lam=0.5) if config is None else config, gates=gates)
    torch.manual_seed(1)
    for name in ("a", "b"):
        model.add_task(name, num_classes=4)
        with torch.no_grad():
            for layer, part in model.state(name).gated():
                part.delta.normal_(0, 0.1)
                if part.score is not None:
                    part.score.fill_(0.05 if (layer.startswith("first") == (name == "a")) else 0.15)
    return model.train()


def gradients(model: TaskModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


def plain_and_checkpointed(reentrant: bool, gates: str = "host", config=None) -> tuple[TaskModel, TaskModel]:
    torch.manual_seed(0)
    base = settle(Net())
    other = copy.deepcopy(base)
    other.reentrant = reentrant
    return two_tasks(base, gates, config), two_tasks(other, gates, config)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gates", ["host", "device"])
def test_gradients_are_those_without(reentrant: bool, gates: str) -> None:
    """Two tasks and the base in one loss, the active task changed before backward: every gradient bit for bit."""
    plain, checkpointed = plain_and_checkpointed(reentrant, gates)
    x = images(6)
    for model in (plain, checkpointed):
        loss = 0.0
        for name, scale in (("a", 1.0), (None, 0.5), ("b", 2.0)):
            loss = loss + scale * model(x.requires_grad_(), task=name)["logits"].square().sum()
        model.set_task("b")
        loss.backward()
    assert same(gradients(checkpointed), gradients(plain))
    used = {n for n, p in checkpointed.named_parameters() if p.grad is not None and "second" in n}
    assert any(n.endswith("delta") for n in used) and any(n.endswith("score") for n in used)


@pytest.mark.parametrize("reentrant", [False, True])
def test_full_config_too(reentrant: bool) -> None:
    plain, checkpointed = plain_and_checkpointed(reentrant, config=FullConfig())
    x = images(6)
    for model in (plain, checkpointed):
        model(x, task="a")["logits"].square().sum().backward()
    assert same(gradients(checkpointed), gradients(plain))


def test_a_whole_forward_remembers_the_task_that_was_active() -> None:
    plain, checkpointed = plain_and_checkpointed(False)
    checkpointed.base.reentrant = None
    x = images(6)
    plain(x, task="a")["logits"].square().sum().backward()
    checkpointed.set_task("a")
    loss = checkpoint(checkpointed, x, use_reentrant=False)["logits"].square().sum()
    checkpointed.set_task("b")
    loss.backward()
    assert same(gradients(checkpointed), gradients(plain))


def test_a_whole_forward_of_the_reentrant_kind_must_name_its_task() -> None:
    plain, checkpointed = plain_and_checkpointed(False)
    checkpointed.base.reentrant = None
    x = images(6)
    plain(x, task="a")["logits"].square().sum().backward()

    def logits(x: Tensor, **task: str) -> Tensor:
        return checkpointed(x, **task)["logits"]

    checkpointed.set_task("a")
    loss = checkpoint(logits, x.clone().requires_grad_(), use_reentrant=True).square().sum()
    with pytest.raises(TapsError, match="name it in the checkpointed call"):
        loss.backward()
    named: Callable[[Tensor], Tensor] = lambda x: logits(x, task="a")  # noqa: E731
    checkpointed.set_task("b")
    checkpoint(named, x.clone().requires_grad_(), use_reentrant=True).square().sum().backward()
    assert same(gradients(checkpointed), gradients(plain))


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_timm_checkpointing(reentrant: bool, monkeypatch) -> None:
    """timm's own switch; both models run their norms twice or once, so only a transformer is compared."""
    timm = pytest.importorskip("timm")
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant)
    torch.manual_seed(0)
    make = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    base = timm.models.vision_transformer.VisionTransformer(**make)
    other = copy.deepcopy(base)
    other.set_grad_checkpointing(True)
    plain, checkpointed = two_tasks(base), two_tasks(other)
    x = torch.randn(4, 3, 32, 32)
    found: list[frame.Call | None] = []
    lookup = frame.recomputed_call
    monkeypatch.setattr(frame, "recomputed_call", lambda owner=None: (found.append(lookup(owner)), found[-1])[1])
    for model in (plain, checkpointed):
        (model(x, task="a").square().sum() + model(x, task="b").square().sum()).backward()
    assert {call.task for call in found if call is not None} == {"a", "b"}
    assert same(gradients(checkpointed), gradients(plain))
