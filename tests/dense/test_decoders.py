"""Decoders: the paper's counts, the formula, and files that bring the decoder along."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taps_ext.model.mixing as mixing
from taps_ext import (
    FullConfig,
    JointTapsConfig,
    LoraConfig,
    ProbeConfig,
    RcmConfig,
    ScaleBiasConfig,
    SeparateLayersConfig,
    TapsConfig,
    TaskModel,
    store,
)
from taps_ext.dense import ConcatDecoder, DenseBase, LightDecoder, MapHead
from taps_ext.dense.decoders import build, described
from taps_ext.errors import ConfigError, TaskFileError
from taps_ext.methods import MethodConfig
from taps_ext.zoo import SmallResNet

SWIN_T = (192, 384, 768, 768)  # as MTLoRA's decoders are given them


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_papers_counts() -> None:
    with torch.device("meta"):
        made = {n: ConcatDecoder(SWIN_T, n) for n in (21, 7, 1, 3)}
    assert made[21].widths == (18, 36, 72, 144)
    assert made[21].hidden == 1080
    assert sum(count(one.reduce) for one in made.values()) == 183_168 * 4
    for outputs, one in made.items():
        assert count(one) == 294_840 + 1_081 * outputs + 183_168
    assert sum(map(count, made.values())) == 1_946_624


def test_the_papers_formula() -> None:
    torch.manual_seed(0)
    decoder = ConcatDecoder((3, 5), 2, widths=(2, 4), hidden=6).double().eval()
    for buffer in (decoder.norm.running_mean, decoder.norm.running_var):
        buffer.uniform_(0.5, 2)
    maps = [torch.randn(2, 3, 4, 6).double(), torch.randn(2, 5, 2, 3).double()]
    weights = [layer.weight[:, :, 0, 0] for layer in decoder.reduce]
    found = [torch.einsum("oc,bchw->bohw", w, m) for w, m in zip(weights, maps, strict=True)]
    joined = torch.cat([found[0], F.interpolate(found[1], (4, 6), mode="bilinear", align_corners=False)], 1)
    hidden = torch.einsum("oc,bchw->bohw", decoder.mix.weight[:, :, 0, 0], joined) + decoder.mix.bias.view(-1, 1, 1)
    scale = decoder.norm.weight / (decoder.norm.running_var + decoder.norm.eps).sqrt()
    hidden = (hidden - decoder.norm.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    hidden = (hidden + decoder.norm.bias.view(-1, 1, 1)).clamp(min=0)
    last = torch.einsum("oc,bchw->bohw", decoder.last.weight[:, :, 0, 0], hidden) + decoder.last.bias.view(-1, 1, 1)
    expected = F.interpolate(last, (16, 24), mode="bilinear", align_corners=False)
    # float64: sums of at most 6 products of values near 1 err by some 1e-15
    assert torch.allclose(decoder(maps, (16, 24)), expected, rtol=0, atol=1e-12)


def test_the_light_one_adds_up_from_the_coarsest() -> None:
    decoder = LightDecoder((3, 5), 2, width=4).double().eval()
    maps = [torch.randn(2, 3, 4, 6).double(), torch.randn(2, 5, 2, 3).double()]
    coarse = F.interpolate(decoder.reduce[1](maps[1]), (4, 6), mode="bilinear")
    total = decoder.smooth(decoder.reduce[0](maps[0]) + coarse)
    expected = F.interpolate(decoder.last(decoder.norm(total).relu()), (16, 24), mode="bilinear")
    assert torch.allclose(decoder(maps, (16, 24)), expected, rtol=0, atol=1e-12)  # as above
    with pytest.raises(ConfigError, match=r"expected maps .* of \[3, 5\] channels, got \[\[2, 5"):
        decoder(maps[::-1], (16, 24))


@pytest.mark.parametrize(
    "decoder", [ConcatDecoder((3, 5), 7, hidden=9), LightDecoder((3,), 2)], ids=["concat", "light"]
)
def test_a_description_makes_it_again(decoder) -> None:
    made = build(json.loads(json.dumps(described(decoder))))
    assert type(made) is type(decoder)
    assert {n: t.shape for n, t in made.state_dict().items()} == {n: t.shape for n, t in decoder.state_dict().items()}


def test_bad_descriptions() -> None:
    good = described(LightDecoder((3,), 2))
    for change, message in [
        ({"decoder": "heavy"}, "expected one of"),
        ({"outputs": 0}, "outputs: expected an int from 1"),
        ({"outputs": True}, "outputs: expected an int"),
        ({"channels": [3, 1 << 40]}, "channels: expected an int"),
        ({"channels": []}, "channels: expected a list"),
        ({"color": 3}, "unexpected keyword argument 'color'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build({**good, **change})
    missing = {name: fact for name, fact in good.items() if name != "width"}
    with pytest.raises(ConfigError, match="expected .*width"):
        build(missing)


def model_of(config=None) -> TaskModel:
    model = TaskModel(DenseBase(_backbone(), image=(3, 32, 32)), config or TapsConfig())
    model.add_task("roads", head=LightDecoder(model.base.channels, 5, width=6))
    model.add_task("depth", head=ConcatDecoder(model.base.channels, 1, widths=(3, 4)))
    with torch.no_grad():
        for name in model.tasks:
            for parameter in model.state(name).parameters():
                if parameter.numel() > 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("config", [TapsConfig(), FullConfig(), ProbeConfig()], ids=["taps", "full", "probe"])
def test_files_bring_their_decoder(config, tmp_path) -> None:
    model, x = model_of(config), torch.randn(2, 3, 24, 32)
    fresh = TaskModel(DenseBase(_backbone(), image=(3, 32, 32)), config)
    for name, outputs in (("roads", 5), ("depth", 1)):
        model.save_task(name, tmp_path / f"{name}.taps", labels=[str(i) for i in range(outputs)])
        fresh.load_task(tmp_path / f"{name}.taps")
        assert model(x, task=name).shape == (2, outputs, 24, 32)
        assert torch.equal(fresh.eval()(x, task=name), model(x, task=name))
    with pytest.raises(ConfigError, match="holds .*'light'.*got Linear"):
        fresh.load_task(tmp_path / "roads.taps", name="again", head=nn.Linear(2, 2))
    own = LightDecoder(fresh.base.channels, 5, width=6)
    fresh.load_task(tmp_path / "roads.taps", name="again", head=own)
    assert torch.equal(own.last.weight, model.state("roads").head.last.weight)


def _backbone() -> SmallResNet:
    torch.manual_seed(3)
    return SmallResNet(channels=3, widths=(4, 6, 8), blocks=1, stem_stride=2).eval()


def test_a_file_that_lies_about_its_decoder_is_refused(tmp_path) -> None:
    model = model_of()
    model.save_task("roads", tmp_path / "roads.taps")
    file = store.load(tmp_path / "roads.taps")
    spec = file.parts["decoder"].facts["module"]
    for change, message in [
        ({"outputs": 6}, r"decoder.last.bias.*expected shape .6., got .5."),
        ({"width": 1 << 19}, "decoder"),  # nothing is allocated before the tensors bear it out
        ({"decoder": "concat"}, "unexpected keyword argument 'width'"),
    ]:
        file.parts["decoder"].facts["module"] = {**spec, **change}
        store.save(tmp_path / "bad.taps", file)
        with pytest.raises(TaskFileError, match=message):
            model.load_task(tmp_path / "bad.taps", name="bad")


METHODS = {
    "scale-bias": ScaleBiasConfig(),
    "bitfit": MethodConfig.from_dict({"method": "bitfit"}),
    "lora": LoraConfig(rank=2),
    "rcm": RcmConfig(kernel_sizes="all"),
    "bottom": SeparateLayersConfig(bottom=2),
    "joint-taps": JointTapsConfig(),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_below_a_decoder(name: str, tmp_path) -> None:
    model = model_of(METHODS[name])
    x, y = torch.randn(4, 3, 32, 32), torch.randint(5, (4, 32, 32))
    optimizer = torch.optim.SGD(model.parameter_groups("roads", lr=0.05))
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model.train()(x, task="roads"), y)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = [p for n, p in model.state("roads").named_parameters() if "decoder" not in n and p.grad is not None]
    family = [p for held in model.families.values() for p in held.parameters() if p.grad is not None]
    assert any(p.grad.abs().sum() > 0 for p in (*trained, *family))
    for held in model.families:
        model.save_shared(held, tmp_path / "shared.taps")
    model.save_task("roads", tmp_path / "roads.taps")
    fresh = TaskModel(DenseBase(_backbone(), image=(3, 32, 32)))
    fresh.load_task(tmp_path / "roads.taps")
    assert torch.equal(fresh.eval()(x, task="roads"), model.eval()(x, task="roads"))


def test_merged_and_plain(tmp_path) -> None:
    model, x = model_of(FullConfig()), torch.randn(2, 3, 24, 32)
    expected = model(x, task="depth").detach()
    assert torch.equal(model.merge_and_unload("depth")(x), expected)


@pytest.mark.parametrize("road", ["layers", "tasks"])
@pytest.mark.parametrize("config", [TapsConfig(), ProbeConfig()], ids=["taps", "probe"])
def test_mixed_batches_of_decoders_of_several_sizes(road: str, config, monkeypatch) -> None:
    monkeypatch.setattr(mixing, "forced", road)
    model, x = model_of(config).double(), torch.randn(4, 3, 24, 32).double()
    with torch.no_grad():
        out = model(x, tasks=["roads", "depth", None, "roads"])
        assert out.road == road
        for name, rows in (("roads", [0, 3]), ("depth", [1]), (None, [2])):
            indices, found = out[name]
            assert indices.tolist() == rows
            # float64: sums of some hundred products of values near 1, cut otherwise
            assert torch.allclose(found, model(x[rows], task=name), rtol=0, atol=1e-10)


def test_heads_of_other_libraries() -> None:
    model = model_of()
    head = MapHead(nn.Conv2d(model.base.channels[-1], 3, 1))
    model.add_task("other", head=head)
    x = torch.randn(2, 3, 24, 32)
    expected = F.interpolate(head.module(model.features(x, task="other")[-1]), (24, 32), mode="bilinear")
    assert torch.equal(model(x, task="other"), expected)


def test_every_parameter_learns() -> None:
    model, x = model_of(FullConfig()).train(), torch.randn(2, 3, 32, 32)
    model(x, task="roads").square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.state("roads").parameters() if p.dim() > 1)
