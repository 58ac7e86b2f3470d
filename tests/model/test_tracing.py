"""Tracers that would keep one task's decisions, or the base alone, are refused; so are derivatives of backward."""

import io
import warnings

import pytest
import torch
from models import TinyNet, images, settle
from torch import nn

from taps_ext import LoraConfig, TapsConfig, TapsError, TaskModel, gated_conv2d, gated_linear
from taps_ext.model import gathering

WAY_OUT = r"trace or export merge_and_unload\(name\) instead, a plain model"


def adapted(config=None) -> TaskModel:
    model = TaskModel(settle(TinyNet()), config or TapsConfig()).eval()
    model.add_task("t", num_classes=3)
    model.set_task("t")
    with torch.no_grad():
        for parameter in model.state("t").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


class Around(nn.Module):
    """Calls a model from a module of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) * 2


TRACERS = {
    "fx": lambda model: torch.fx.symbolic_trace(model),
    "fx around": lambda model: torch.fx.symbolic_trace(Around(model)),
    "trace": lambda model: torch.jit.trace(model, (images(),)),
    "trace around": lambda model: torch.jit.trace(Around(model), (images(),)),
    "script": lambda model: torch.jit.script(model),
    "onnx": lambda model: torch.onnx.export(model, (images(),), io.BytesIO(), dynamo=False),
    "onnx of a task": lambda model: torch.onnx.export(model, (images(), {"task": "t"}), io.BytesIO(), dynamo=False),
    "export": lambda model: torch.export.export(model, (images(),)),
}


@pytest.mark.parametrize("warm", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_trace_of_a_task_model_is_refused(tracer: str, warm: bool) -> None:
    """Also where forwards before have entered every layer, after which one that enters none is believed."""
    if tracer.startswith("onnx"):
        pytest.importorskip("onnx")
    model = adapted()
    if warm:
        model.train()(images())
        model.eval()(images())
    with warnings.catch_warnings(), pytest.raises(TapsError, match=WAY_OUT):
        warnings.simplefilter("ignore")  # torch warns that TorchScript is old
        TRACERS[tracer](model)
    assert model(images()).shape == (3, 3)


@pytest.mark.parametrize("tracer", ["fx", "trace"])
def test_the_way_out_is_one(tracer: str) -> None:
    model, x = adapted(), images()
    want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = TRACERS[tracer](model.merge_and_unload("t"))
    # The same products of the same weights; an open layer without gradients is summed in another order.
    torch.testing.assert_close(traced(x), want, rtol=1e-4, atol=1e-5)


NOT_TWICE = r"cannot be differentiated again; torch\.func .* merge_and_unload\(name\)"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_gradient_penalty_is_refused(training: bool) -> None:
    model, x = adapted().train(training), images().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=NOT_TWICE):
        slope.square().sum().backward()


@pytest.mark.parametrize("layer", [gated_linear, gated_conv2d], ids=["linear", "conv2d"])
@pytest.mark.parametrize("gate", [True, False, None])
def test_a_slope_that_depends_on_a_weight_is_no_constant(layer, gate) -> None:
    """Where the gradient that comes in is a constant, as that of a sum is."""
    shape = (4, 3) if layer is gated_linear else (4, 3, 1, 1)
    x = torch.randn(5, 3, *shape[2:], requires_grad=True)
    delta, score = torch.randn(shape, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    output = layer(x, torch.randn(shape), delta, score, gate=gate)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=NOT_TWICE):
        slope.square().sum().backward()


def penalty(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The gradient of a gradient's square."""
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), x)[0]


@pytest.mark.parametrize("kind", ["low rank", "together"])
def test_a_gradient_penalty_that_is_not_refused_is_right(monkeypatch, kind: str) -> None:
    """Where layers are torch's own on a weight that was made before, and where a change is plain torch code."""
    monkeypatch.setattr(gathering, "forced", kind == "together")
    model, x = adapted(LoraConfig(rank=2) if kind == "low rank" else None).double(), images().double()
    found = penalty(model, x.requires_grad_())
    # Changes are float32: W + round(B A) on one side, products by B and A in float64 on the other.
    torch.testing.assert_close(found, penalty(model.merge_and_unload("t"), x), rtol=1e-5, atol=1e-7)
