"""Weights of tasks' losses: fixed to the bit, trained by uncertainty, and by plug-ins."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from test_joint import config, model_of, run_of, same, tasks, values
from torch import Tensor

from taps_ext import ConfigError
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted, Uncertainty, Weighting, register_weighting
from taps_ext.train.weighting import WEIGHTINGS


@pytest.fixture(autouse=True)
def registered():
    """The registry is afterwards as it was before."""
    before = dict(WEIGHTINGS)
    yield
    WEIGHTINGS.clear()
    WEIGHTINGS.update(before)


def test_fixed_weights_are_what_a_plug_in_with_them_is() -> None:
    @register_weighting("two and a half")
    class Two(Weighting):
        def forward(self, task: str, loss: Tensor) -> Tensor:
            return loss * {"a": 2.5}.get(task, 1.0)

    one, other = model_of(), model_of()
    Trainer(one, tasks(), config(loss_weights={"a": 2.5}), quiet=True).fit("joint")
    Trainer(other, tasks(), config(loss_weights="two and a half"), quiet=True).fit("joint")
    assert same(values(one), values(other))
    plain = model_of()
    Trainer(plain, tasks(), config(), quiet=True).fit("joint")
    assert not same(values(one), values(plain))


def test_uncertainty_by_hand() -> None:
    """In float64: exp(-s) times each task's gradients, and -exp(-s) L + 1/2 of s; then a step without decay."""
    model = model_of().double()
    run = run_of(model, config(loss_weights="uncertainty", weight_decay=0.5))
    run.weighting.double()
    for s, start in zip(run.weighting.log_variances, (0.3, -0.7), strict=True):
        s.data.fill_(start)
    batches = {
        name: [t.double() if t.is_floating_point() else t for t in next(run.batches[name].epoch(0))] for name in "ab"
    }
    model.train()
    heads = {name: model.state(name).head.weight for name in "ab"}
    expected, losses = {}, {}
    for name, start in (("a", 0.3), ("b", -0.7)):
        loss = F.cross_entropy(model(batches[name][0], task=name), batches[name][1])
        (grad,) = torch.autograd.grad(loss, heads[name])
        expected[name], losses[name] = math.exp(-start) * grad, loss.item()
        run.streams[name] = iter([batches[name]])
        run.progress.taken[name] = run.sizes[name] * 7 + 1  # the stream at hand is read
    run._step(("a", "b"), run.steps_per_epoch)
    for (name, start), s in zip((("a", 0.3), ("b", -0.7)), run.weighting.log_variances, strict=True):
        # exp, a product and few sums: some eps of 2^-53 each
        assert torch.allclose(heads[name].grad, expected[name], rtol=1e-13, atol=1e-15)
        want = 0.5 - math.exp(-start) * losses[name]
        assert s.grad.item() == pytest.approx(want, rel=1e-12)
        assert s.item() == pytest.approx(start - 0.1 * want, rel=1e-12)  # lr 0.1, no decay
    assert [g["weight_decay"] for g in run.optimizer.param_groups if g["name"] == "weighting"] == [0.0]


def test_gradients_of_the_weights_do_not_count_in_the_norm() -> None:
    """At s = 0 a clipped step is the one without weights, to the bit, and s moves by all of its own gradient."""
    plain, other = model_of(), model_of()
    names, made = ("a", "b"), {}
    for model, settings in ((plain, {}), (other, {"loss_weights": "uncertainty"})):
        made[model] = run_of(model, config(clip_norm=1e-3, **settings))
        losses = made[model]._step(names, made[model].steps_per_epoch)
    assert same(values(plain), values(other))
    for name, s in zip(names, made[other].weighting.log_variances, strict=True):
        want = -0.1 * (0.5 - losses[name])  # lr 0.1; in float32 a product and two sums of numbers below 2
        assert abs(want) > 1e-3 and s.item() == pytest.approx(want, abs=3 * 2**-24)


def test_uncertainty_is_at_its_minimum_where_it_says() -> None:
    """Gradient descent on s for a loss of 0.8 that stays: s = log 1.6, where the derivative is 0."""
    weighting = Uncertainty(["a"]).double()
    (s,) = weighting.log_variances
    for _ in range(400):
        (grad,) = torch.autograd.grad(weighting("a", torch.tensor(0.8, dtype=torch.float64)), s)
        s.data -= 0.5 * grad  # contracts by 1 - 0.5 * 0.5 near the minimum: 400 steps leave nothing
    assert s.item() == pytest.approx(math.log(1.6), rel=1e-12)


@register_weighting("test moving")
class Moving(Weighting):
    """Weights by the ratio of the last two losses, kept in buffers: no parameters."""

    def __init__(self, names) -> None:
        super().__init__(names)
        for name in names:
            self.register_buffer(f"last_{name}", torch.ones(2, dtype=torch.float64))

    def forward(self, task: str, loss: Tensor) -> Tensor:
        before, last = getattr(self, f"last_{task}").tolist()
        return loss * (last / before)

    def after(self, losses) -> None:
        for task, loss in losses.items():
            getattr(self, f"last_{task}").copy_(torch.tensor([getattr(self, f"last_{task}")[1], loss]))


MOVING = Moving


@pytest.mark.parametrize("name", ["uncertainty", "test moving"])
@pytest.mark.parametrize("mix", [None, "proportional"])
def test_weightings_resume_bit_equal(name: str, mix: str | None, tmp_path) -> None:
    WEIGHTINGS["test moving"] = MOVING
    taken: list[int] = []

    def stopping(outputs: Tensor, targets: Tensor) -> Tensor:
        taken.append(int(torch.is_grad_enabled()))
        if taken[-1] and sum(taken) in (3, 14):
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(outputs, targets)

    def fit(model, out=None, loss=F.cross_entropy):
        jobs = {n: Task(train=t.train, val=t.val, loss=loss) for n, t in tasks().items()}
        return Trainer(model, jobs, config(out, mix=mix, loss_weights=name, clip_norm=1.0), quiet=True).fit("joint")

    whole, model, plain = model_of(), model_of(), model_of()
    want = fit(whole)["a"].history
    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            fit(model_of(), tmp_path, stopping)
    found = fit(model, tmp_path, stopping)["a"].history
    assert same(values(whole), values(model)) and found == want
    if name == "uncertainty":
        recorded = [entry["a_log_variance"] for entry in found]
        assert len(set(recorded)) == 3 and all(recorded)
    Trainer(plain, tasks(), config(mix=mix, clip_norm=1.0), quiet=True).fit("joint")
    assert not same(values(plain), values(model))


def test_a_step_that_is_undone_leaves_a_weighting_as_it_was() -> None:
    WEIGHTINGS["test moving"] = MOVING
    bad: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        bad.append(1)
        return F.cross_entropy(outputs, targets) * (math.nan if len(bad) == 1 else 1.0)

    model = model_of()
    run = run_of(model, config(loss_weights="test moving"))
    run.tasks["a"] = Task(train=tasks()["a"].train, loss=loss)
    with pytest.warns(UserWarning, match="task 'a': the training loss is not finite"):
        assert run._step(("a", "b"), run.steps_per_epoch) == {}
    assert all(torch.equal(buffer, torch.ones(2)) for buffer in run.weighting.buffers())
    assert run._step(("a", "b"), run.steps_per_epoch).keys() == {"a", "b"}
    assert not any(torch.equal(buffer, torch.ones(2)) for buffer in run.weighting.buffers())


def test_gradients_of_weights_that_are_not_finite_are_named() -> None:
    @register_weighting("test broken")
    class Broken(Uncertainty):
        def forward(self, task: str, loss: Tensor) -> Tensor:
            return loss + (self.log_variances[0] - self.log_variances[0].detach()).abs().sqrt()  # slope Inf at 0

    run = run_of(model_of(), config(loss_weights="test broken"))
    with pytest.warns(UserWarning, match=r"the gradient of the loss weights: log_variances\.0 is not finite"):
        run._step(("a", "b"), run.steps_per_epoch)


def test_weightings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="loss_weights: expected one of .*'uncertainty'.*, got 'uncertanty'"):
        TrainConfig(loss_weights="uncertanty")
    with pytest.raises(
        ConfigError, match="loss_weights: expected task names and numbers, or a weighting's name, got 3"
    ):
        TrainConfig(loss_weights=3)
    assert TrainConfig.from_dict(TrainConfig(loss_weights="uncertainty").to_dict()).loss_weights == "uncertainty"
    with pytest.raises(ConfigError, match="register_weighting: expected a subclass of Weighting, got"):
        register_weighting("mine")(dict)
    with pytest.raises(ConfigError, match="register_weighting: 'uncertainty' is taps_ext.train.weighting.Uncertainty"):
        register_weighting("uncertainty")(MOVING)
    register_weighting("uncertainty")(Uncertainty)

    @register_weighting("test vector")
    class Vector(Weighting):
        def forward(self, task: str, loss: Tensor) -> Tensor:
            return loss.expand(2)

    with pytest.raises(ConfigError, match=r"loss_weights: expected Vector to return a scalar, got \[2\]"):
        Trainer(model_of(), tasks(), config(loss_weights="test vector"), quiet=True).fit("joint")


def test_one_epoch_is_selected_for_all() -> None:
    with pytest.raises(ConfigError, match='select: expected "best" or "last", got "best-each": tasks trained together'):
        TrainConfig(select="best-each")
