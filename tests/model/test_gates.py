"""Gates of a TaskModel: on the host and on the device, fixed and learned, in reports, penalties and compiled graphs."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import images
from test_model import tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from taps_ext import ConfigError, GateError, ProbeConfig, TapsConfig
from taps_ext.files.task import to_records
from taps_ext.nn import TapsConv2d, TapsLinear


def test_gates_follow_the_values_of_scores() -> None:
    """However they were written: in place, past autograd and version counters, as a new tensor, from one vector."""
    model = tiny().eval()
    model.add_task("t", num_classes=2)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_(0, 0.1)
    parts = {name: part for name, part, _ in model.state("t").gated()}
    x = images()

    def told() -> list[str]:
        """The gate that ran is that of a report, of a file's record and of a merged copy."""
        with torch.no_grad():
            output = model(x, task="t")
            plain = copy.deepcopy(model).merge_and_unload("t")
            assert torch.equal(output, plain(x))
        opened = [name for name, part in parts.items() if part.gate.known]
        assert opened == [row.layer for row in model.report("t").rows if row.open]
        state = model.state("t")
        records = to_records(state.table, state.open_layers())
        assert opened == [name for name in parts if records[name].facts["gate"]["open"]]
        assert opened == [name for name in parts if "delta" in records[name].tensors]
        return opened

    everything = ["conv1", "conv2", "depthwise", "hidden"]
    assert told() == everything
    with torch.no_grad():
        parts["conv1"].gate.score.fill_(0.0)
        parts["hidden"].gate.score.fill_(0.0)
    assert told() == ["conv2", "depthwise"]
    parts["conv1"].gate.score.data.fill_(0.5)
    parts["conv2"].gate.score.data = torch.tensor(0.05)
    assert told() == ["conv1", "depthwise"]
    parts["depthwise"].gate.score = torch.nn.Parameter(torch.tensor(0.01))
    assert told() == ["conv1"]
    scores = [part.gate.score for part in parts.values()]
    torch.nn.utils.vector_to_parameters(torch.tensor([0.0, 0.2, 0.2, 0.2]), scores)
    assert told() == everything[1:]
    average = torch.optim.swa_utils.AveragedModel(model)
    average.module.state("t").table["hidden"].gate.score.detach().zero_()
    with torch.no_grad():
        average(x, task="t")
    assert not average.module.state("t").table["hidden"].gate.known and told() == everything[1:]


def test_gates_are_those_of_the_scores_after_a_nan() -> None:
    """A forward that refused a NaN had taken the gates before it: scores that are put back are read again."""
    model = tiny().eval()
    model.add_task("t", num_classes=2)
    parts, x = {name: part for name, part, _ in model.state("t").gated()}, images()
    with torch.no_grad():
        model(x, task="t")
        scores = {name: part.gate.score.clone() for name, part in parts.items()}
        parts["conv1"].gate.score.fill_(0.0)
        parts["hidden"].gate.score.fill_(float("nan"))
        with pytest.raises(GateError, match="hidden: score"):
            model(x, task="t")
        for name, part in parts.items():
            part.gate.score.copy_(scores[name])
        model(x, task="t")
    assert all(part.gate.known for part in parts.values())


def test_where_values_are_dear_versions_are_followed(monkeypatch) -> None:
    """On a GPU: a forward looks where a version changed, by one copy; eval() and a report compare values, and warn once
    of a write that left no trace. The way to the values is the CPU's here."""
    model = tiny().eval()
    model.add_task("t", num_classes=2)
    state = model.state("t")
    monkeypatch.setattr(state, "_following", lambda: (state.learned(), False))
    copies = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(self.shape) or original(self))
    x, parts = images(), {name: part for name, part, _ in state.gated()}
    model(x, task="t")
    copies.clear()
    model(x, task="t")
    assert copies == []  # nothing changed: no copy
    with torch.no_grad():
        parts["conv1"].gate.score.fill_(0.0)
        parts["hidden"].gate.score.fill_(0.0)
    model(x, task="t")
    assert copies == [torch.Size([2])] and parts["conv1"].gate.known is False and parts["conv2"].gate.known is True
    parts["conv1"].gate.score.data.fill_(0.5)
    model(x, task="t")
    assert parts["conv1"].gate.known is False  # no trace to go by
    with pytest.warns(UserWarning, match=r"conv1: its score was written in a way that leaves no trace"):
        model.eval()
    assert parts["conv1"].gate.known is True
    parts["conv2"].gate.score.data.fill_(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert [row.layer for row in model.report("t").rows if row.open] == ["conv1", "depthwise"]
    assert parts["conv2"].gate.known is False
    parts["conv2"].gate.score.data.fill_(float("nan"))
    model.eval()
    with pytest.raises(GateError, match="conv2: score"):
        model.report("t")


@pytest.mark.parametrize("convolution", [False, True])
def test_layers_without_a_model_follow_their_scores(convolution: bool) -> None:
    """After `refresh_gate` too, in training and without gradients, compiled and under autocast."""
    torch.manual_seed(0)
    layer = TapsConv2d(3, 4, 3) if convolution else TapsLinear(3, 4)
    x = torch.randn(2, 3, 5, 5) if convolution else torch.randn(2, 3)
    stock = F.conv2d if convolution else F.linear
    with torch.no_grad():
        layer.delta.normal_()
        opened, closed = (stock(x, weight, layer.bias) for weight in (layer.weight + layer.delta, layer.weight))
    compiled = torch.compile(layer, backend="aot_eager")
    for refresh in (False, True):
        for value, want in ((0.5, opened), (0.0, closed), (0.5, opened)):
            layer.score.data.fill_(value)  # leaves no trace
            if refresh and value:
                assert layer.refresh_gate() is True
            for run in (layer, compiled, copy.deepcopy(layer)):
                assert torch.allclose(run(x), want, atol=1e-6)
                with torch.no_grad():
                    assert torch.allclose(run(x), want, atol=1e-6)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.allclose(layer(x).float(), want, atol=0.1)
    layer.score.data.fill_(float("nan"))
    with pytest.raises(GateError, match="score: expected a number, got NaN"):
        layer(x)


def test_what_a_cpu_found_is_not_asked_of_a_gpu() -> None:
    """Moved after a forward, scores are read as where they are now: a task's by versions, a layer's on the device.

    The device that no value can be read from is "meta" here.
    """
    model = tiny().eval()
    model.add_task("t", num_classes=2)
    model(images(), task="t")
    assert model.state("t")._following()[1] is True
    model.to("meta")
    assert model.state("t")._following()[1] is False
    assert not model.train().eval().training  # which on a GPU compares values, of which there are none here
    layer, x = TapsLinear(3, 4), torch.randn(2, 3)
    layer(x)
    assert layer.gate is True
    assert layer.to("meta")(x.to("meta")).shape == (2, 4) and layer.gate is None


def test_scores_among_fake_tensors() -> None:
    """No value is read: a model that has run knows its gates, a layer's operator asks for none."""
    model = tiny().eval()
    model.add_task("t", num_classes=2)
    model(images(), task="t")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(images()), task="t").shape == (3, 2)
    with FakeTensorMode():
        assert TapsLinear(3, 4)(torch.randn(2, 3)).shape == (2, 4)
        assert TapsConv2d(3, 4, 3)(torch.randn(2, 3, 5, 5)).shape == (2, 4, 3, 3)


def test_set_gates_and_freeze_gates() -> None:
    model = tiny()
    model.add_task("t", num_classes=2)
    with pytest.raises(ConfigError, match="open: pattern 'layer9.*' matches no layer"):
        model.set_gates("t", open=["layer9.*"])
    with pytest.raises(ConfigError, match="scores are learned"):
        model.set_gates("t", open=["conv1"], learn=True)
    with torch.no_grad():
        model.state("t").table["hidden"].gate.score.fill_(0.0)
    model.freeze_gates("t")
    assert {r.layer: (r.open, r.score) for r in model.report("t").rows}["hidden"] == (False, None)
    model.set_gates("t", open=["conv*"])
    assert [r.layer for r in model.report("t").rows if r.open] == ["conv1", "conv2"]
    names = [g["name"] for g in model.parameter_groups(lr=0.1)]
    assert "score" not in names
    assert not model.sparsity_loss("t").requires_grad
    probe = tiny(ProbeConfig())
    probe.add_task("t", num_classes=2)
    with pytest.raises(ConfigError, match="conv1 has no Delta under method 'probe'"):
        probe.set_gates("t", open=["conv1"])


def test_report_counts() -> None:
    model = tiny()
    model.add_task("t", num_classes=5)
    with torch.no_grad():
        model.state("t").table["conv2"].gate.score.fill_(0.0)
    report = model.report("t")
    sizes = {"conv1": 216, "conv2": 1152, "depthwise": 144, "hidden": 192}
    assert {r.layer: r.parameters for r in report.rows} == sizes
    assert report.gated == sum(sizes.values()) and report.open == report.gated - 1152
    assert report.norms == 2 * (8 + 16 + 12) and report.head == 12 * 5 + 5
    assert report.bytes == 4 * report.open and report.layers_open == 3
    assert json.loads(report.to_json())["share"] == report.open / report.gated
    assert re.search(r"conv2 +closed", str(report)) and "3 of 4 layers open" in str(report)


def test_sparsity_loss_values() -> None:
    """lam / L * sum w_i |s_i|; "size" weighs by parameters with mean 1; the gradient at 0 is 0."""
    for penalty in ("layer", "size"):
        model = tiny(TapsConfig(lam=2.0, penalty=penalty))
        model.add_task("t", num_classes=2)
        parts = {name: part for name, part, _ in model.state("t").gated()}
        with torch.no_grad():
            parts["conv1"].gate.score.fill_(0.0)
            parts["conv2"].gate.score.fill_(-0.3)
        sizes = torch.tensor([216.0, 1152.0, 144.0, 192.0])
        weights = sizes / sizes.mean() if penalty == "size" else torch.ones(4)
        scores = torch.tensor([0.0, 0.3, 0.15, 0.15])
        loss = model.sparsity_loss("t", scale=0.5)
        assert loss.item() == pytest.approx((0.5 * 2.0 / 4 * weights * scores).sum().item(), rel=1e-6)
        loss.backward()
        got = torch.tensor([p.gate.score.grad.item() for p in parts.values()])
        assert torch.allclose(got, 0.25 * weights * torch.tensor([0.0, -1.0, 1.0, 1.0]))


def test_weight_decay_only_where_it_belongs() -> None:
    model = tiny()
    model.add_task("t", num_classes=2)
    groups = model.parameter_groups(lr=0.1, score_lr=0.3, weight_decay=0.01)
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in groups} == {
        "delta": (0.1, 0.01),
        "score": (0.3, 0.0),
        "norm": (0.1, 0.0),
        "head": (0.1, 0.01),
    }


def test_frozen_layers_keep_no_input_for_backward() -> None:
    """With gates fixed closed and frozen norms nothing but the head is saved."""
    model = tiny(ProbeConfig())
    model.add_task("t", num_classes=2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model(images(), task="t").sum().backward()
    assert max(saved) <= 3 * 12


@pytest.mark.parametrize("gates", ["host", "device"])
def test_compiled_equals_eager(gates) -> None:
    """Forward and backward of a compiled model against eager; closing a gate is followed in both modes."""
    torch.manual_seed(0)
    model = tiny(gates=gates)
    model.add_task("t", num_classes=5)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_(0, 0.1)
        model.state("t").table["conv2"].gate.score.fill_(0.02)
    model.eval()
    x = images()
    compiled = torch.compile(model)
    for closing in (None, "hidden"):
        if closing is not None:
            with torch.no_grad():
                model.state("t").table[closing].gate.score.fill_(0.02)
        results = []
        for net in (model, compiled):
            model.zero_grad()
            out = net(x, task="t")
            out.square().sum().backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append((out.detach(), grads))
        (eager, eager_grads), (other, other_grads) = results
        # the compiler fuses the elementwise operations between the layers: float32 rounding of a few of them
        assert torch.allclose(eager, other, rtol=1e-4, atol=1e-5)
        assert eager_grads.keys() == other_grads.keys()
        for name, grad in eager_grads.items():
            assert torch.allclose(grad, other_grads[name], rtol=1e-3, atol=1e-4), name


def test_device_gates_do_not_recompile() -> None:
    import torch._dynamo.testing

    model = tiny(gates="device").eval()
    model.add_task("t", num_classes=5)
    x = images()
    model(x, task="t")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    compiled(x, task="t")
    frames = counter.frame_count
    for _, part, _ in model.state("t").gated():
        with torch.no_grad():
            part.gate.score.fill_(0.0)
        compiled(x, task="t")
    assert counter.frame_count == frames
