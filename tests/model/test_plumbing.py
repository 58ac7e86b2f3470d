"""What one more gated layer costs in calls of our own: a forward asks nothing that was settled before."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import taps_ext
from taps_ext import TapsConfig, TaskModel
from taps_ext.model import gathering

PACKAGE = str(Path(taps_ext.__file__).parent)
MOST_CALLS, MOST_FILES = 8, 4
MOST_TOGETHER = 16  # where a training forward makes the weights of all layers at once


def own_calls(run: Callable[[], object]) -> Counter[tuple[str, str]]:
    """Python calls of the package's own functions, by file and name, on every thread of autograd's too."""
    found: Counter[tuple[str, str]] = Counter()

    def profile(frame, event: str, _) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found[frame.f_code.co_filename[len(PACKAGE) :], frame.f_code.co_name] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def model_of(layers: int, kind: str, is_open: bool) -> tuple[TaskModel, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        modules: list[nn.Module] = [nn.Linear(8, 8) for _ in range(layers)]
        x = torch.randn(3, 8)
    elif kind == "conv2d":
        modules = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers)]
        x = torch.randn(2, 4, 6, 6)
    else:
        modules = [nn.BatchNorm2d(4) for _ in range(layers)]
        x = torch.randn(2, 4, 6, 6)
    end = [nn.Linear(8, 2)] if kind == "linear" else [nn.Flatten(), nn.Linear(144, 2)]
    model = TaskModel(nn.Sequential(*modules, *end), TapsConfig(lam=1.0))
    model.add_task("t")
    model.set_task("t")
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_(0, 0.1)
            part.gate.score.fill_(0.3 if is_open else 0.0)
    return model, x


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "norm"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_calls_for_one_more_layer(kind: str, is_open: bool, training: bool) -> None:
    found = []
    for layers in (4, 5):
        model, x = model_of(layers, kind, is_open)
        model.train(training)

        def run(model: TaskModel = model, x: torch.Tensor = x) -> None:
            if not training:
                with torch.no_grad():
                    model(x)
                return
            model.zero_grad(set_to_none=True)
            with torch.autograd.set_multithreading_enabled(False):  # so that backward is seen
                model(x).sum().backward()

        run()
        run()  # warm: bindings are made
        found.append(own_calls(run))
    more = found[1] - found[0]
    assert sum(more.values()) <= MOST_CALLS and len({file for file, _ in more}) <= MOST_FILES, more
    assert any(name == "_backward" for _, name in more) == (training and kind != "norm")


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_calls_for_one_more_layer_of_many_at_once(kind: str, is_open: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "forced", True)
    found = []
    for layers in (4, 5):
        model, x = model_of(layers, kind, is_open)
        model.train()

        def run(model: TaskModel = model, x: torch.Tensor = x) -> None:
            model.zero_grad(set_to_none=True)
            with torch.autograd.set_multithreading_enabled(False):
                model(x).sum().backward()

        run()
        run()
        found.append(own_calls(run))
    more = found[1] - found[0]
    assert sum(more.values()) <= MOST_TOGETHER, more


def test_nothing_is_asked_of_all_layers_at_every_forward() -> None:
    """Calls that are not a layer's own do not grow with the number of layers but for the read of their scores."""
    fixed = []
    for layers in (2, 40):
        model, x = model_of(layers, "linear", True)
        model.eval()
        with torch.no_grad():
            model(x)
            found = own_calls(lambda model=model, x=x: model(x))
        fixed.append({call: count for call, count in found.items() if count < layers or layers == 2})
    assert sum(fixed[1].values()) <= sum(fixed[0].values())
