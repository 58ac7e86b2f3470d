"""Closed Deltas rest in a step in which only the device knows the gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle
from torch.utils._python_dispatch import TorchDispatchMode

from taps_ext import ConfigError, TapsConfig, TaskModel

MAKERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "plain sgd": lambda groups: torch.optim.SGD(groups),
    "adamw": torch.optim.AdamW,
    "adam, foreach": lambda groups: torch.optim.Adam(groups, foreach=True, amsgrad=True),
}
Y = torch.arange(4)


def build(gates: str = "device") -> TaskModel:
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0), gates=gates)
    model.add_task("t", num_classes=5)
    return model.train()


def score(model: TaskModel, layer: str, value: float) -> None:
    with torch.no_grad():
        model.state("t").table[layer].gate.score.fill_(value)


class NoReads(TorchDispatchMode):
    """Refuses to give the host a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_that_asks_nothing_is_one_that_drops_gradients(name) -> None:
    """To the bit, in every Delta and all of the optimizer's state, while gates close and open again."""
    models = [build(), build()]
    optimizers = [MAKERS[name](m.parameter_groups(lr=0.01, weight_decay=0.1)) for m in models]
    for step in range(9):
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            torch.manual_seed(step)  # the same images for both
            score(model, "conv2", 0.05 if 3 <= step < 6 else 0.2)
            score(model, "hidden", 0.05 if step == 4 else 0.2)
            optimizer.zero_grad()
            F.cross_entropy(model(images(4), task="t"), Y).backward()
            if index:
                model.drop_closed_gradients()
                optimizer.step()
                continue
            resting = model.state("t").table["conv2"].change.delta.clone()
            with model.resting(optimizer):
                optimizer.step()
            assert torch.equal(model.state("t").table["conv2"].change.delta, resting) is (3 <= step < 6)
    for (key, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(one, other), key
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_the_host_is_told_nothing() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.01, weight_decay=0.1), momentum=0.9)
    F.cross_entropy(model(images(4), task="t"), Y).backward()
    with NoReads(), model.resting(optimizer):
        optimizer.step()
    with pytest.raises(AssertionError), NoReads():
        model.drop_closed_gradients()


def test_where_the_host_knows_gradients_are_dropped() -> None:
    model = build("host")
    score(model, "conv2", 0.05)
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.01, weight_decay=0.1), momentum=0.9)
    F.cross_entropy(model(images(4), task="t"), Y).backward()
    delta = model.state("t").table["conv2"].change.delta
    delta.grad = torch.zeros_like(delta)
    with model.resting(optimizer, "t"):
        optimizer.step()
    assert delta.grad is None and not optimizer.state.get(delta)


def test_state_that_no_device_can_choose_is_refused(monkeypatch) -> None:
    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["n"] = self.state[parameter].get("n", 0) + 1

    model = build()
    optimizer = Counts(model.parameter_groups(lr=0.01))
    F.cross_entropy(model(images(4), task="t"), Y).backward()
    with model.resting(optimizer):
        optimizer.step()
    with pytest.raises(ConfigError, match="state of Counts on cpu.*'n' as a int.*capturable"), model.resting(optimizer):
        optimizer.step()
    delta = model.state("t").table["conv2"].change.delta
    optimizer.state[delta] = {"step": torch.zeros([], device="meta")}
    with pytest.raises(ConfigError, match="'step' as a tensor on meta"), model.resting(optimizer):
        optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    fresh = torch.optim.SGD(model.parameter_groups(lr=0.01), momentum=0.9)
    with pytest.raises(ConfigError, match="'momentum_buffer' in a captured step"), model.resting(fresh):
        fresh.step()
