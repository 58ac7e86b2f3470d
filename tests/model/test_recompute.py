"""Activation checkpointing: what backward recomputes is the forward that was, task and gates included."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable

import pytest
import torch
from checkpointed import Net, gradients, plain_and_checkpointed, returning, same, two_tasks
from models import images, settle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taps_ext import FullConfig, TapsError
from taps_ext.routing import frame


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_runs_without_gradients_is_the_tasks_too(reentrant: bool) -> None:
    plain, checkpointed = plain_and_checkpointed(reentrant)
    x = images(6)
    for model in (plain, checkpointed):
        model.base.first.frozen = model.base.second.frozen = True
        model(x, task="a")["logits"].square().sum().backward()
    assert same(gradients(checkpointed), gradients(plain))
    assert any("second/last" in name for name in gradients(plain))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_bare_base_is_recomputed_in_evaluation_mode(reentrant: bool, whole: bool) -> None:
    """Dropout rests although the model is in training mode; a task's does not."""
    plain, checkpointed = plain_and_checkpointed(reentrant)
    found, images6 = [], images(6)
    for model in (plain, checkpointed):
        for module in model.base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        x = images6.clone().requires_grad_()
        if whole and model is checkpointed:
            model.base.reentrant = None
            out = checkpoint(lambda x: checkpointed(x, task=None)["logits"], x, use_reentrant=reentrant)
        else:
            out = model(x, task=None)["logits"]
        out.square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)
    assert not torch.equal(plain(x, task="a")["logits"], plain(x, task="a")["logits"])


def test_another_thread_runs_the_base_meanwhile() -> None:
    """Recomputation in training mode in one thread, the bare base in evaluation mode in another."""
    inside, done = threading.Event(), threading.Event()

    class Wait(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread().name == "base":
                inside.set()
                assert done.wait(30)
            return x

    plain, checkpointed = plain_and_checkpointed(True)
    for model in (plain, checkpointed):
        model.base.second.drop.p = 0.5
    checkpointed.base.norm.register_forward_hook(lambda _, __, out: Wait()(out))
    x = images(6)
    torch.manual_seed(2)
    plain(x, task="a")["logits"].square().sum().backward()
    torch.manual_seed(2)
    loss = checkpointed(x.requires_grad_(), task="a")["logits"].square().sum()
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(checkpointed(x, task=None)), name="base")
    thread.start()
    assert inside.wait(30)
    loss.backward()
    done.set()
    thread.join()
    assert same(gradients(checkpointed), gradients(plain))
    assert torch.equal(outputs[0]["logits"], plain(x, task=None)["logits"])


@dataclasses.dataclass
class Output:
    logits: Tensor


def test_outputs_of_other_types_are_found() -> None:
    torch.manual_seed(0)
    plain, model = two_tasks(settle(Net())), None
    torch.manual_seed(0)
    model = returning(Output)
    x = images(6)
    plain(x, task="a")["logits"].square().sum().backward()
    model(x, task="a").logits.square().sum().backward()
    assert same(gradients(model), gradients(plain))


def test_a_view_that_is_written_to() -> None:
    class Flat(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)["logits"].view(-1)

    torch.manual_seed(0)
    plain, model = two_tasks(settle(Net())), None
    torch.manual_seed(0)
    model = two_tasks(settle(Flat(True)))
    x = images(6)
    (2 * plain(x, task="a")["logits"]).square().sum().backward()
    model(x, task="a").mul_(2).square().sum().backward()
    assert same(gradients(model), gradients(plain))


def test_under_compile() -> None:
    """A compiled model whose base falls back to eager code, and one that does not."""
    plain, checkpointed = plain_and_checkpointed(False)
    x = images(6)
    plain(x, task="a")["logits"].square().sum().backward()
    checkpointed.compile(backend="aot_eager")
    checkpointed(x, task="a")["logits"].square().sum().backward()
    got, want = gradients(checkpointed), gradients(plain)
    assert set(got) == set(want)
    for name in want:  # aot_eager runs the same kernels; sums of gradients may be taken in another order
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_the_compiled_base_rests_in_training_mode() -> None:
    model = plain_and_checkpointed(False)[0]
    for module in model.base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    x = images(6)
    want = model.eval()(x, task=None)["logits"]
    model.train().compile(backend="aot_eager")
    assert not torch.equal(model(x, task="a")["logits"], model(x, task="a")["logits"])
    for _ in range(2):
        assert torch.equal(model(x, task=None)["logits"], want)
        model(x, task="a")


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

    def looked_up(module: nn.Module, **how: bool) -> frame.Call | None:
        found.append(lookup(module, **how))
        return found[-1]

    monkeypatch.setattr(frame, "recomputed_call", looked_up)
    for model in (plain, checkpointed):
        (model(x, task="a").square().sum() + model(x, task="b").square().sum()).backward()
    assert {call.task for call in found if call is not None} == {"a", "b"}
    assert same(gradients(checkpointed), gradients(plain))
