"""Joint training against what it must be equal to: one network, one adapter, the minimum of the stated objective."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_joint import Net, config, data, model_of, net, same, tasks, values
from torch import Tensor, nn

from taps_ext import (
    FullConfig,
    JointTapsConfig,
    LoraConfig,
    MethodConfig,
    ScaleBiasConfig,
    SeparateLayersConfig,
    TaskModel,
)
from taps_ext.base.scan import Scan
from taps_ext.parts import Gate, Layer, LowRank, Part
from taps_ext.train import Trainer
from taps_ext.train.hierarchy import Hierarchy
from taps_ext.train.joint import JointRun

EPS = torch.finfo(torch.float32).eps

# ------------------------------------------------------------------------------------ separate layers


class Heads(nn.Module):
    """One network and a head for each task: what shared layers without any private ones are."""

    def __init__(self, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = net().requires_grad_(), nn.ModuleDict(heads)

    def forward(self, x: Tensor, task: str) -> Tensor:
        trunk: Net = self.trunk
        trunk.fc = self.heads[task]
        return trunk(x)


def test_without_private_layers_tasks_are_one_network_with_heads() -> None:
    """bottom = 0, a step in float64: the heads move alike bit for bit, the network within the float32 of its Deltas."""
    model = model_of("cd", SeparateLayersConfig(bottom=0, joint=True)).double()
    plain = Heads({name: copy.deepcopy(model.state(name).head) for name in "cd"}).double()
    run = run_of_pair(model, weight_decay=0.0)
    batches = {name: [t.double() if t.is_floating_point() else t for t in data(name)] for name in "cd"}
    step(run, batches)
    plain.train()
    for name, (x, y) in batches.items():
        F.cross_entropy(plain(x, name), y).backward()
    (family,) = model.families.values()
    with torch.no_grad():
        for name in "cd":
            for mine, theirs in zip(model.state(name).head.parameters(), plain.heads[name].parameters(), strict=True):
                assert torch.equal(mine, torch.add(theirs, theirs.grad, alpha=-0.1))
        for name in ("conv", "hidden"):
            weight = plain.trunk.get_submodule(name).weight
            moved = family.table[name].change.delta.double()
            assert moved.any()
            # the gradient, its half, its tenth and their difference are rounded once each
            assert float((moved + 0.05 * weight.grad).abs().max()) <= 4 * EPS * 0.1 * float(weight.grad.abs().max())
        for key in ("weight", "bias"):  # of norms, which are doubles
            own, theirs = getattr(family.table["norm"], key), getattr(plain.trunk.norm, key)
            assert torch.allclose(own, theirs - 0.05 * theirs.grad, rtol=4e-16, atol=4e-16)


def run_of_pair(model: TaskModel, **settings) -> JointRun:
    """Of "c" and "d", before its first step."""
    trainer = Trainer(model, tasks("cd"), config(**settings), quiet=True)
    made = {name: trainer._data(name, task) for name, task in trainer.tasks.items()}
    batches, evaluate = ({name: pair[i] for name, pair in made.items()} for i in range(2))
    return JointRun(model, trainer.tasks, config(**settings), batches, evaluate)


def step(run: JointRun, batches, names=("c", "d")) -> None:
    """One step on these batches, with the learning rate of the settings."""
    run.model.train()
    for name in names:
        run.streams[name] = iter([batches[name]])
        run.progress.taken[name] = run.sizes[name] * 7 + 1  # the stream at hand is read
    run.progress.steps = 0
    run._step(tuple(names), run.steps_per_epoch)


# ------------------------------------------------------------------------------------ joint TAPS


def test_closed_gates_are_the_network_of_the_first_stage() -> None:
    """After lean training's shared stage: whatever Deltas hold, closed they leave its outputs bit for bit."""
    model = model_of()
    trainer = Trainer(model, tasks(), config(), quiet=True)
    made = {name: trainer._data(name, task) for name, task in trainer.tasks.items()}
    batches, evaluate = ({name: pair[i] for name, pair in made.items()} for i in range(2))
    run = JointRun(model, trainer.tasks, config(), batches, evaluate, shared_first=True)
    model.train()
    for _ in range(4):
        run._step(("a", "b"), run.steps_per_epoch)
    run.release()
    model.eval()
    x = data("a")[0]
    (family,) = model.families.values()
    with torch.no_grad():
        assert all(part.change.delta.any() for _, part, _ in family.gated())
        want = {name: model(x, task=name) for name in "ab"}
        for name in "ab":
            for _, part, gate in model.state(name).gated():
                assert not part.change.delta.any()
                part.change.delta.normal_()
                gate.score.fill_(0.05)
        assert all(torch.equal(model(x, task=name), want[name]) for name in "ab")


# ------------------------------------------------------------------------------------ BoRA


class OneLora(MethodConfig):
    """One adapter for all tasks, which have heads alone."""

    method = "one-lora"

    def parts(self, base: Scan) -> dict[str, Part]:
        return {}

    def shared(self, base: Scan) -> dict[str, Part]:
        return {name: Layer(Gate(learn=False), LowRank(host, rank=2, scale=2.0)) for name, host in base.gated.items()}


def test_tied_values_are_one_adapter() -> None:
    """tau = inf, from one adapter: the mean of what each task would do is what one adapter does that gets the mean of
    their gradients, in a first step and in one with momentum. Either way it is a handful of roundings in float32 of a
    value w and of lr * v, v = g_1 + 0.9 g_0: two sums of two, their halves, a product, a difference."""
    tied, one = model_of("cd", LoraConfig(rank=2, alpha=4.0)), model_of("cd", OneLora())
    (family,) = one.families.values()
    runs = [run_of_pair(model, hierarchy=tau) for model, tau in ((tied, math.inf), (one, None))]
    batches = {name: list(data(name)) for name in "cd"}
    gradients: dict[str, float] = {}

    def pairs():
        for name, part, _ in family.gated():
            for key, shared in part.change.named_parameters():
                yield f"{name}.{key}", shared, [getattr(tied.state(t).table[name].change, key) for t in "cd"]

    for first in (True, False):
        with torch.no_grad():
            for _, shared, owns in pairs():
                if first:
                    shared.normal_(std=0.1)
                for own in owns:
                    own.copy_(shared)
        for run in runs:
            step(run, batches)
        for name, shared, (mine, other) in pairs():
            assert torch.equal(mine, other) and bool(shared.grad.any())
            largest = [float(own.grad.abs().max()) for own in (mine, other)]
            gradients[name] = sum(largest) + 0.9 * gradients.get(name, 0.0)
            limit = 4 * EPS * (float(shared.detach().abs().max()) + 0.1 * gradients[name])
            assert float((mine - shared).detach().abs().max()) <= limit, name


@pytest.mark.parametrize("tau", [0.3, 4.0])
def test_steps_find_the_minimum_of_the_objective(tau: float) -> None:
    """sum_d |theta_d - c_d|^2 / 2 + tau / 2 * sum_d |theta_d - Theta|^2, Theta being the mean, in float64: autograd's
    gradients are (theta_d - c_d) + tau (theta_d - Theta), that of Theta tau * sum_d (Theta - theta_d) = 0 at the mean;
    gradient steps with the prior's end at (c_d + tau c) / (1 + tau), where both are zero."""
    model = model_of("cd", ScaleBiasConfig()).double()
    prior = Hierarchy({name: model.state(name) for name in "cd"}, tau)
    target = [[torch.randn_like(p) for p in group] for group in prior.groups]
    for _ in range(400):  # contracts by 1 - lr or more each: 0.9^400 is 5e-19
        for group, wanted in zip(prior.groups, target, strict=True):
            for p, c in zip(group, wanted, strict=True):
                p.grad = p.detach() - c
                p.data -= 0.1 * p.grad
        prior.step("cd", 0.1)
    for group, wanted in zip(prior.groups, target, strict=True):
        assert group[0].dtype == torch.float64
        mean = torch.stack(wanted).mean(0)
        for p, c in zip(group, wanted, strict=True):
            assert torch.allclose(p, (c + tau * mean) / (1 + tau), rtol=0, atol=1e-14)  # some 20 eps of values below 5
        theta = [p.detach().clone().requires_grad_() for p in group]
        centre = torch.stack(theta).mean(0).detach().requires_grad_()
        loss = sum((t - c).square().sum() / 2 for t, c in zip(theta, wanted, strict=True))
        (loss + tau / 2 * sum((t - centre).square().sum() for t in theta)).backward()
        for t, c in zip(theta, wanted, strict=True):
            assert torch.allclose(t.grad, (t - c) + tau * (t - centre), rtol=0, atol=1e-14)
            assert float(t.grad.abs().max()) <= 1e-13 * (1 + tau)
        assert float(centre.grad.abs().max()) <= 1e-13 * (1 + tau)


@pytest.mark.parametrize("tau", [0.0, 2.0, math.inf])
def test_one_task_is_plain_lora_whatever_the_prior(tau: float) -> None:
    prior, plain = (model_of("c", LoraConfig(rank=2)) for _ in range(2))
    Trainer(prior, tasks("c"), config(hierarchy=tau, select="last"), quiet=True).fit("joint")
    Trainer(plain, tasks("c"), config(select="last"), quiet=True).fit("incremental")
    assert same(values(prior), values(plain))


@pytest.mark.parametrize("tau", [0.5, math.inf])
@pytest.mark.parametrize("method", [LoraConfig(rank=2), FullConfig(), JointTapsConfig(lam=0.1)], ids=lambda m: m.method)
def test_a_prior_knows_no_order_of_tasks(tau: float, method: MethodConfig) -> None:
    """Of two that start alike, bit for bit: a mean of two is one sum, which commutes."""
    found = []
    for order in ("cd", "dc"):
        model = TaskModel(net(), method)
        for name in order:
            torch.manual_seed(1)
            model.add_task(name, num_classes=3)
        Trainer(model, tasks(order), config(hierarchy=tau, select="last"), quiet=True).fit("joint")
        found.append(values(model))
    assert same(found[0], {key: found[1][key] for key in found[0]})
