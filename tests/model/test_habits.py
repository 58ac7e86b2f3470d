"""Habits and utilities that mean a whole model: they reach what the task has, or are refused before a run is lost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import TinyNet, images, settle
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, TensorDataset

from taps_ext import (
    FullConfig,
    JointTapsConfig,
    LoraConfig,
    ProbeConfig,
    TapsConfig,
    TapsError,
    TaskModel,
    UnsupportedModuleError,
)


def model_of(config=None) -> TaskModel:
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), config or TapsConfig(lam=0.5))
    model.add_task("t", num_classes=2)
    model.set_task("t")
    return model.train()


def values(base: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in base.state_dict().items()}


def same(base: nn.Module, held: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, held[name]) for name, tensor in base.state_dict().items())


def step(model: TaskModel, optimizer: torch.optim.Optimizer) -> None:
    model(images()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("config", [TapsConfig(lam=0.5), FullConfig(), ProbeConfig(), LoraConfig(rank=2)])
def test_requires_grad_and_all_parameters_train_the_task_alone(config, tmp_path) -> None:
    model, by_groups = model_of(config), model_of(config)
    before = values(model.base)
    assert model.requires_grad_(True) is model
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(by_groups.parameter_groups(lr=0.1))]
    for found, optimizer in zip((model, by_groups), optimizers, strict=True):
        torch.manual_seed(1)
        for _ in range(3):
            step(found, optimizer)
    assert same(model.base, before) and not any(p.requires_grad for p in model.base.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_groups.parameters(), strict=True))
    model.save_task("t", tmp_path / "t.taps")


def test_requires_grad_off_and_on_is_what_it_was(tmp_path) -> None:
    model = model_of()
    model.add_task("fixed", num_classes=2)
    model.set_gates("fixed", open=["conv1"])
    model.set_gates("fixed", open=["conv2"])
    model.add_task("packed", num_classes=2)
    with torch.no_grad():
        for _, part, _ in model.state("packed").gated():
            part.change.delta.normal_()
    model.pack_task("packed", codec="int8")
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())
    model.requires_grad_()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert len({*wanted.values()}) == 2


def test_a_family_in_a_file_stays_frozen(tmp_path) -> None:
    model = model_of(JointTapsConfig(lam=0.5))
    (family,) = model.families.values()
    model.requires_grad_(False).requires_grad_(True)
    assert all(p.requires_grad for p in family.parameters())
    model.save_shared(family.name, tmp_path / "shared.taps")
    model.requires_grad_(True)
    assert not any(p.requires_grad for p in family.parameters())


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_parameter_of_the_base_that_requires_gradients_is_refused_before_it_is_written(copied) -> None:
    model = copied(model_of())
    before = values(model.base)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TapsError, match=r"task 't': the base's parameter conv1.weight requires gradients.*groups"):
        step(model, optimizer)
    assert same(model.base, before)
    model.base.requires_grad_(False)
    step(model, optimizer)
    with torch.no_grad():
        model.eval()(images())


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy], ids=["model", "copy"])
@pytest.mark.parametrize("ran", [True, False], ids=["ran", "new"])
def test_a_write_to_the_base_is_found_in_the_next_step(copied, ran: bool) -> None:
    model = copied(model_of())
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1))
    if ran or copied is copy.deepcopy:  # a copy knows versions from its first step on
        step(model, optimizer)
    with torch.no_grad():
        model.base.conv2.weight.mul_(1.0)  # the same values
    step(model, optimizer)
    with torch.no_grad():
        model.base.fc.weight.add_(1.0)  # the base's head, which tasks replace
    step(model, optimizer)
    with torch.no_grad():
        model.base.conv2.weight.add_(1.0)
    for _ in range(2):
        with pytest.raises(TapsError, match="task 't': the base's parameter conv2.weight has changed"):
            step(model, optimizer)
    with torch.no_grad():
        model.base.conv2.weight.sub_(1.0)
    model.base.load_state_dict(TaskModel(settle(TinyNet())).base.state_dict())
    with pytest.raises(TapsError, match="has changed since"):
        step(model, optimizer)


def test_values_are_looked_at_once_for_each_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from taps_ext.base import guard

    model, looked = model_of(), []
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1))
    step(model, optimizer)
    digest = guard.digest
    monkeypatch.setattr(guard, "digest", lambda tensor: looked.append(tensor) or digest(tensor))
    with torch.no_grad():
        model.base.conv2.weight.mul_(1.0)
    for _ in range(3):
        step(model, optimizer)
    assert len(looked) == 1 and looked[0] is model.base.conv2.weight


def test_a_base_that_was_moved_or_loaded_is_taken_as_it_is(tmp_path) -> None:
    model = model_of()
    step(model, torch.optim.SGD(model.parameter_groups(lr=0.1)))
    model.double()
    model(images(dtype=torch.float64)).sum().backward()
    state = {name: tensor * 2 for name, tensor in model.state_dict().items() if name.startswith("base.")}
    model.load_state_dict(state, strict=False)
    model(images(dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize("averaged", [False, True], ids=["model", "average"])
@pytest.mark.parametrize("config", [TapsConfig(lam=0.5), FullConfig()])
def test_update_bn_gives_the_task_new_statistics(config, averaged: bool) -> None:
    """As it gives them to the plain model."""
    model = model_of(config)
    with torch.no_grad():
        model.state("t").table["conv1"].change.delta.normal_(0, 0.1)
    loader = DataLoader(TensorDataset(torch.randn(12, 3, 8, 8)), batch_size=4)
    plain, before = model._plain_copy("t").train(), values(model.base)
    own = swa_utils.AveragedModel(model).module if averaged else model
    bystander = own.state("t") if not averaged else model.state("t")
    held = values(bystander)
    swa_utils.update_bn(loader, own)
    swa_utils.update_bn(loader, plain)
    found, norm = own.state("t").table["bn1"], plain.bn1
    torch.testing.assert_close(found.running_mean, norm.running_mean)
    torch.testing.assert_close(found.running_var, norm.running_var)
    assert found.num_batches_tracked == 3 and own.base.bn1.momentum == 0.1
    assert same(own.base, before) and same(model.base, before)
    assert same(bystander, held) == averaged


@pytest.mark.parametrize(("config", "task"), [(ProbeConfig(), "t"), (TapsConfig(lam=0.5), None)])
def test_update_bn_without_statistics_of_the_tasks_is_refused(config, task: str | None) -> None:
    model = model_of(config)
    model.set_task(task)
    before = values(model.base)
    with pytest.raises(UnsupportedModuleError, match=r"bn1: reset_running_stats would write to the base.*use_task"):
        swa_utils.update_bn(DataLoader(TensorDataset(images()), batch_size=3), model)
    assert same(model.base, before)


def test_loops_that_reset_parameters_are_refused() -> None:
    model = model_of()
    before = values(model.base)
    for name, module in model.base.named_modules():
        if hasattr(module, "reset_parameters") and name != "fc":
            with pytest.raises(UnsupportedModuleError, match=f"{name}: reset_parameters would write to the base"):
                module.reset_parameters()
    assert same(model.base, before)
    model.state("t").head.reset_parameters()  # the task's own
    base = model.unload()
    base.conv1.reset_parameters()
    base.bn1.reset_running_stats()
    assert not torch.equal(base.conv1.weight, before["conv1.weight"]) and base.bn1.running_mean.eq(0).all()


def test_copies_of_the_base_are_plain_ones_again() -> None:
    model = model_of()
    copied = model._plain_copy("t")
    copied.conv1.reset_parameters()
    copied.bn1.reset_running_stats()
    twin = copy.deepcopy(model.base)
    assert all("_taps_owner" not in module.__dict__ for module in (*copied.modules(), *twin.modules()))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data.normal_()  # leaves no trace in versions


def test_apply_may_set_settings_and_not_the_base() -> None:
    model = model_of()

    def calmer(module: nn.Module) -> None:
        if isinstance(module, nn.Dropout):
            module.p = 0.25

    assert model.apply(calmer) is model and model.base.drop.p == 0.25
    with pytest.raises(TapsError, match="the base's parameter hidden.weight has changed"):
        model.apply(_init)
    fresh = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5))
    fresh.apply(_init)  # nothing builds on it yet
