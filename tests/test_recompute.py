"""Activation checkpointing: what backward recomputes is the forward that was, task and gates included."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
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
    """`frozen`: its norm's work is done without gradients. `drop`: of a dropout at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 1)
        self.drop, self.frozen = nn.Dropout(0.0), False

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.frozen):
            y = F.relu(self.norm(self.conv(x)))
        return x + self.drop(self.last(y))


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


@pytest.mark.parametrize(
    ("whole", "gates", "how"),
    [
        case
        for case in itertools.product([False, True], ["host", "device"], ["score", "set_gates", "merge"])
        if case != (False, "host", "score")  # the host's gate is that of the forward until the next one
    ],
)
def test_what_changed_before_a_reentrant_backward_is_an_error(whole: bool, gates: str, how: str) -> None:
    _, model = plain_and_checkpointed(True, gates)
    x = images(6).requires_grad_()
    if whole:
        model.base.reentrant = None
        model(x, task="a")  # gates seen before, and again after they changed
        with torch.no_grad():
            dict(model.state("a").gated())["stem"].score.fill_(0.05)
        loss = checkpoint(lambda x: model(x, task="a")["logits"], x, use_reentrant=True).square().sum()
    else:
        loss = model(x, task="a")["logits"].square().sum()
    if how == "score":
        with torch.no_grad():
            dict(model.state("a").gated())["second.conv"].score.fill_(0.05)
    elif how == "set_gates":
        model.set_gates("a", open=["stem"])
    else:
        model.eval()
        model.merge_task("a")
    with pytest.raises((GateError, TapsError), match="gate changed|is merged"):
        loss.backward()


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


@dataclasses.dataclass
class Output:
    logits: Tensor


class Hidden:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def returning(kind: type) -> TaskModel:
    class Wrapped(Net):
        def forward(self, x: Tensor):
            return kind(super().forward(x)["logits"])

    return two_tasks(settle(Wrapped(True)))


def test_outputs_of_other_types_are_found() -> None:
    torch.manual_seed(0)
    plain, model = two_tasks(settle(Net())), None
    torch.manual_seed(0)
    model = returning(Output)
    x = images(6)
    plain(x, task="a")["logits"].square().sum().backward()
    model(x, task="a").logits.square().sum().backward()
    assert same(gradients(model), gradients(plain))


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
    monkeypatch.setattr(frame, "recomputed_call", lambda module: (found.append(lookup(module)), found[-1])[1])
    for model in (plain, checkpointed):
        (model(x, task="a").square().sum() + model(x, task="b").square().sum()).backward()
    assert {call.task for call in found if call is not None} == {"a", "b"}
    assert same(gradients(checkpointed), gradients(plain))
