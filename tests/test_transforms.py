"""What torch does to whole models: functional_call, torch.func, compile, export, ONNX, DataParallel, quantisation."""

from __future__ import annotations

import io
import math

import pytest
import torch
from models import images, settle
from torch import Tensor, nn

from taps_ext import TapsConfig, TapsError, TaskModel, UnsupportedModuleError
from taps_ext.zoo import small_resnet


def adapted(gates: str = "host") -> TaskModel:
    torch.manual_seed(0)
    model = TaskModel(settle(small_resnet(5, 3, widths=(4, 8), blocks=1)), TapsConfig(lam=0.5), gates=gates).eval()
    model.add_task("a", num_classes=3)
    with torch.no_grad():
        for index, (_, part) in enumerate(model.state("a").gated()):
            part.delta.normal_(0, 0.1)
            part.score.fill_(0.05 if index % 3 == 1 else 0.15)
    return model


def test_functional_call_uses_the_tensors_it_is_given() -> None:
    model, x = adapted(), images()
    own = dict(model.named_parameters())
    deltas = [name for name in own if name.endswith("delta")]
    scores = [name for name in own if name.endswith("score")]
    before = model(x, task="a")
    given = {name: own[name].detach() * 2 for name in deltas} | {name: own[name].detach() - 1 for name in scores[:2]}
    got = torch.func.functional_call(model, given, (x,), {"task": "a"})
    assert torch.equal(model(x, task="a"), before) and not torch.equal(got, before)
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)
    assert torch.equal(model(x, task="a"), got)


@pytest.mark.parametrize("gates", ["host", "device"])
def test_torch_func_grad_is_backward(gates: str) -> None:
    model, x = adapted(gates), images()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,), {"task": "a"}).square().sum()

    got = torch.func.grad(loss)({name: p.detach() for name, p in trained.items()})
    model(x, task="a").square().sum().backward()
    model.drop_closed_gradients("a")
    for name, parameter in trained.items():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(got[name], want), name


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients() -> None:
    """vmap over grad: the mean of the samples' gradients is the gradient of the mean."""
    model, x = adapted(), images(4)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (sample[None],), {"task": "a"}).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    (model(x, task="a").square().sum() / len(x)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # Sums over the same products in another order, a few hundred terms each.
            torch.testing.assert_close(each[name].mean(dim=0), parameter.grad, rtol=1e-4, atol=1e-5)


def test_module_compile() -> None:
    model, x = adapted(), images()
    want = model(x, task="a")
    model.compile(backend="aot_eager")
    assert torch.equal(model(x, task="a"), want)


def test_the_merged_model_exports() -> None:
    x = images()
    model = adapted()
    with torch.no_grad():
        want = model(x, task="a")
    plain = model.merge_and_unload("a")
    program = torch.export.export(plain, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.export.load(file).module()(x), want)


def test_the_merged_model_runs_from_onnx(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    x = images()
    plain = adapted().merge_and_unload("a")
    torch.onnx.export(plain, (x,), str(tmp_path / "a.onnx"), dynamo=True, verbose=False)
    stored = onnx.load(str(tmp_path / "a.onnx"))
    (got,) = ReferenceEvaluator(stored).run(None, {stored.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        want = plain(x)
    # Two ways to sum six layers of at most 8 * 9 float32 products each: six standard deviations of their roundings.
    limit = 6 * math.sqrt(2 * 6 * 72) * torch.finfo(torch.float32).eps / 2 * float(want.abs().max())
    assert float((torch.from_numpy(got.copy()) - want).abs().max()) <= limit


def test_a_task_model_says_what_to_export_instead() -> None:
    with pytest.raises(TapsError, match="export merge_and_unload"):
        torch.export.export(adapted(), (images(),), {"task": "a"})


def test_data_parallel_is_refused_with_advice() -> None:
    with pytest.raises(TapsError, match="use DistributedDataParallel"):
        adapted()._replicate_for_data_parallel()


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_named_and_can_be_excluded() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    quantised = torch.ao.quantization.quantize_dynamic(base, {"0"}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModuleError, match="0: quantised Linear cannot be gated"):
        TaskModel(quantised, TapsConfig(lam=0.5)).add_task("a", num_classes=3)
    model = TaskModel(quantised, TapsConfig(lam=0.5, exclude_modules=["0"]))
    model.add_task("a", num_classes=3)
    assert model(torch.randn(2, 4), task="a").shape == (2, 3)


def test_weights_of_other_kinds_are_named() -> None:
    class Packed(Tensor):
        pass

    packed, whole = nn.Linear(4, 4), nn.Linear(4, 4)
    packed.weight = nn.Parameter(packed.weight.detach().as_subclass(Packed))
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    for layer, got in ((packed, "Packed of torch.float32"), (whole, "Tensor of torch.int8")):
        with pytest.raises(UnsupportedModuleError, match=f"0: expected a Linear with a plain .*{got}"):
            TaskModel(nn.Sequential(layer, nn.Linear(4, 2)), TapsConfig(lam=0.5)).add_task("a", num_classes=3)
