"""Hooks on every module, as tools set them: they see base modules and a task's own, each with its own inputs."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch.nn.modules.module as every
from models import TinyNet, images, settle
from torch import Tensor, nn
from torch.nn.utils import prune

from taps_ext import (
    BitFitConfig,
    FullConfig,
    JointTapsConfig,
    LoraConfig,
    ProbeConfig,
    ResidualAdapterConfig,
    ScaleBiasConfig,
    SingularConfig,
    TapsConfig,
    TaskModel,
)
from taps_ext.model import gathering
from taps_ext.parts import Part, token
from taps_ext.parts.change import Change

CONFIGS = [
    TapsConfig(lam=0.5),
    TapsConfig(lam=0.5, gate_fraction=0.5),
    FullConfig(),
    ProbeConfig(),
    ScaleBiasConfig(),
    LoraConfig(rank=2),
    LoraConfig(rank=2, selective=True, lam=0.5),
    BitFitConfig(),
    ResidualAdapterConfig(),
    SingularConfig(),
    JointTapsConfig(lam=0.5),
]


def seen(model: TaskModel, *, train: bool, amp: bool) -> dict[str, list[tuple[str, ...]]]:
    """What global hooks get: for each module's name the types of its inputs; of hooks before, after and backward."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, list[tuple[str, ...]]] = {"pre": [], "after": [], "backward": []}

    def note(kind: str):
        def hook(module: nn.Module, args: object, *rest: object) -> None:
            assert not isinstance(module, (Part, Change)) and id(module) in names, type(module)
            assert isinstance(args, tuple) and all(isinstance(arg, Tensor) or arg is None for arg in args)
            found[kind].append((names[id(module)], type(module).__name__))

        return hook

    model.train(train)
    with ExitStack() as stack, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for kind, register in (
            ("pre", every.register_module_forward_pre_hook),
            ("after", every.register_module_forward_hook),
            ("backward", every.register_module_full_backward_hook),
        ):
            stack.callback(register(note(kind)).remove)
        output = model(images(4))
        if train:
            output.float().square().sum().backward()
    return found


def goes(config: object, road: str) -> bool:
    """Samples need gates that the host knows, and a series adapter does not fold."""
    sampled = getattr(config, "gate_fraction", 1.0) < 1.0
    return not (road == "device" and sampled) and not (
        road == "merged" and getattr(config, "method", "") == "residual-adapter"
    )


ROADS = [(c, road) for c in CONFIGS for road in ("host", "device", "together", "merged") if goes(c, road)]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of a module whose inputs require none
@pytest.mark.parametrize("config, road", ROADS, ids=lambda value: getattr(value, "method", value))
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "autocast"])
def test_base_modules_are_seen_with_their_own_inputs(config, amp: bool, road: str, monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(gathering, "forced", road == "together")
    model = TaskModel(settle(TinyNet()), config, gates="device" if road == "device" else "host")
    model.add_task("t", num_classes=2)
    model.set_task("t")
    if road == "merged":
        model.merge_task("t")
    layers = [f"base.{name}" for name, _ in TinyNet().named_modules() if name]
    for train in (False, True)[: 1 if road == "merged" else 2]:
        found = seen(model, train=train, amp=amp)
        own = [name for name, _ in found["pre"] if not name.startswith("base.") and name not in ("", "base")]
        assert [name for name, _ in found["pre"] if name in layers] == layers  # each once, in order
        assert sorted(found["pre"]) == sorted(found["after"])
        assert all("module" in name for name in own)  # heads and adapters, which are modules with inputs
        assert bool(found["backward"]) == train


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("train", [False, True])
def test_parts_with_hooks_of_their_own_stay_unseen(train: bool) -> None:
    """Pruning's, for one, which makes a Delta anew for each forward."""
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5), gates="device")
    model.add_task("t", num_classes=2)
    model.set_task("t")
    table, calls = model.state("t").table, []
    change = table["hidden"].change
    prune.custom_from_mask(change, "delta", torch.ones_like(change.delta).triu())
    table["conv1"].register_forward_pre_hook(lambda part, args, kwargs: calls.append("pre"), with_kwargs=True)
    table["conv1"].register_forward_hook(lambda part, args, output: calls.append("after") or output + 0)
    table["conv1"].register_forward_hook(lambda part, args, kwargs, output: calls.append("last"), with_kwargs=True)
    token.note()  # bindings are made anew
    layers = [f"base.{name}" for name, _ in TinyNet().named_modules() if name]
    found = seen(model, train=train, amp=False)
    assert [name for name, _ in found["pre"] if name in layers] == layers
    assert calls == ["pre", "after", "last"]
