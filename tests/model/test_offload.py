"""Offloaded bases: weights that hooks bring when a module runs, as accelerate's cpu_offload and disk_offload do."""

from __future__ import annotations

import functools

import pytest
import torch
from models import TinyNet, images, settle
from torch import Tensor, nn

from taps_ext import FullConfig, TapsConfig, TaskModel, UnsupportedModuleError

REMEDY = r"{}: is on the device 'meta', and a hook is to bring its values.*take the hooks away.*before it is wrapped"


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=getattr(module, name).requires_grad)


def _kept(module: nn.Module) -> dict[str, Tensor]:
    held = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor.detach().clone() for name, tensor in held if tensor is not None}


def by_forwards(base: nn.Module) -> nn.Module:
    """A forward in the place of each module's own."""
    for module in base.modules():
        kept = _kept(module)
        if not kept:
            continue
        taken = {name: torch.empty_like(tensor, device="meta") for name, tensor in kept.items()}

        def forward(module: nn.Module, old, kept, taken, *args: Tensor) -> Tensor:
            for name, tensor in kept.items():
                _put(module, name, tensor)
            output = old(*args)
            for name, tensor in taken.items():
                _put(module, name, tensor)
            return output

        module.forward = functools.partial(forward, module, module.forward, kept, taken)
        for name, tensor in taken.items():
            _put(module, name, tensor)
    return base


def by_hooks(base: nn.Module) -> nn.Module:
    """Hooks before and after each module's forward; buffers stay."""
    for module in base.modules():
        kept = {name: tensor for name, tensor in _kept(module).items() if name in module._parameters}
        taken = {name: torch.empty_like(tensor, device="meta") for name, tensor in kept.items()}

        def fill(module: nn.Module, *_: object, values: dict[str, Tensor]) -> None:
            for name, value in values.items():
                module._parameters[name] = nn.Parameter(value, requires_grad=False)

        if kept:
            module.register_forward_pre_hook(functools.partial(fill, values=kept))
            module.register_forward_hook(functools.partial(fill, values=taken))
            fill(module, values=taken)
    return base


def whole(base: nn.Module) -> nn.Module:
    """One hook on the base that brings everything."""
    kept = {name: tensor.detach() for name, tensor in base.named_parameters()}
    taken = {name: torch.empty_like(tensor, device="meta") for name, tensor in kept.items()}

    def fill(module: nn.Module, *_: object, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            parent, _, key = name.rpartition(".")
            module.get_submodule(parent)._parameters[key] = nn.Parameter(value, requires_grad=False)

    base.register_forward_pre_hook(functools.partial(fill, values=kept))
    base.register_forward_hook(functools.partial(fill, values=taken))
    fill(base, values=taken)
    return base


@pytest.mark.parametrize("offload", [by_forwards, by_hooks, whole])
def test_an_offloaded_base_is_refused_when_it_is_wrapped(offload) -> None:
    base = offload(settle(TinyNet()))
    with torch.no_grad():
        base(images())  # it does run
    with pytest.raises(UnsupportedModuleError, match=REMEDY.format("conv1.weight")):
        TaskModel(base, TapsConfig(lam=0.5))


@pytest.mark.parametrize("offload", [by_forwards, by_hooks])
@pytest.mark.parametrize("config", [TapsConfig(lam=0.5), FullConfig()])
def test_a_base_that_is_offloaded_later_is_named_by_what_needs_it(offload, config, tmp_path) -> None:
    model = TaskModel(settle(TinyNet()), config)
    model.add_task("t", num_classes=2)
    model.save_task("t", tmp_path / "t.taps")
    offload(model.base)
    refused = pytest.raises(UnsupportedModuleError, match=REMEDY.format("conv1.weight"))
    for action in (
        lambda: model.add_task("u", num_classes=2),
        lambda: model.load_task(tmp_path / "t.taps", "u"),
        lambda: model.save_task("t", tmp_path / "u.taps"),
        lambda: model.merge_task("t"),
        lambda: model.task_state_dict("t"),
        lambda: model.train()(images(), task="t"),
    ):
        with refused:
            action()
    assert model.tasks == ["t"] and not (tmp_path / "u.taps").exists()


def test_a_base_without_values_and_hooks_is_for_dry_runs() -> None:
    with torch.device("meta"):
        base = TinyNet()
    assert TaskModel(base, FullConfig()).base is base


def test_other_errors_stay_what_they_are() -> None:
    model = TaskModel(settle(TinyNet()), FullConfig())
    model.add_task("t", num_classes=2)
    with pytest.raises(RuntimeError, match="expected shape"):
        model(torch.randn(2, 5, 8, 8), task="t")
