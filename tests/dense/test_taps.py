"""Feature taps: what is found in known models, how outputs become maps, what is refused."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taps_ext.dense import DenseBase, Tap, find_taps
from taps_ext.errors import ConfigError
from taps_ext.zoo import SmallResNet


def small(**settings) -> SmallResNet:
    torch.manual_seed(0)
    return SmallResNet(channels=3, widths=(4, 6, 8), blocks=1, stem_stride=2, **settings).eval()


def test_maps_are_what_the_modules_return() -> None:
    backbone = small()
    base = DenseBase(copy.deepcopy(backbone), image=(3, 32, 48))
    assert [tap[:4] for tap in base.taps] == [("stages.1", "nchw", 6, 4), ("stages.2", "nchw", 8, 8)]
    x = torch.randn(2, 3, 32, 48)
    stem = torch.relu(backbone.bn(backbone.stem(x)))
    middle = backbone.stages[1](backbone.stages[0](stem))
    maps = base.features(x)
    assert torch.equal(maps[0], middle)
    assert torch.equal(maps[1], backbone.stages[2](middle))
    assert torch.equal(base(x), maps[1])  # without a task: the last map


def test_an_output_that_is_changed_in_place_later_is_what_its_module_returned() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.second, self.last = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.act(self.norm(self.conv(x))))
            x += 1
            return self.last(x)

    torch.manual_seed(0)
    net = Changing().eval()
    base = DenseBase(copy.deepcopy(net), ["norm", "second", "last"], image=(3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    first = net.norm(net.conv(x))
    second = net.second(first.relu())
    for model in (base, copy.deepcopy(base)):
        found = model.features(x)
        assert torch.equal(found[0], first)
        assert torch.equal(found[1], second)
        assert torch.equal(found[2], net.last(second + 1))


def test_what_lies_behind_the_last_tap_is_gone() -> None:
    whole = small()
    base = DenseBase(whole, ["stages.0", "stages.1"], image=(3, 32, 32))
    names = [name for name, _ in base.named_parameters()]
    assert not any(name.startswith(("backbone.fc", "backbone.stages.2")) for name in names)
    assert base.features(torch.randn(1, 3, 32, 32))[1].shape == (1, 6, 8, 8)


@pytest.mark.parametrize("height, width", [(32, 32), (32, 64)])
def test_channels_last_and_tokens(height: int, width: int) -> None:
    class Stage(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(x, 4).permute(0, 2, 3, 1)

    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # two others, then row by row
            rows = x.permute(0, 3, 1, 2)[:, :, ::2, ::2].flatten(2).transpose(1, 2)
            return torch.cat([torch.full((len(x), 2, 3), 7.0), rows], 1)

    class Both(nn.Module):
        patch_size = 8

        def __init__(self) -> None:
            super().__init__()
            self.stage, self.tokens = Stage(), Tokens()

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens(self.stage(x))

    base = DenseBase(Both(), ["stage", "tokens"], image=(3, 32, 32))
    assert base.taps == (Tap("stage", "nhwc", 3, 4), Tap("tokens", "tokens", 3, 8, 2, (8, 8)))
    x = torch.randn(2, 3, height, width)
    expected = nn.functional.avg_pool2d(x, 4)
    maps = base.features(x)
    assert torch.equal(maps[0], expected)
    assert torch.equal(maps[1], expected[:, :, ::2, ::2])


# (model, image, the taps' names, channels, strides); sizes as the papers of the models have them
TIMM = {
    "mobilenetv2_100": (None, ["blocks.1", "blocks.2", "blocks.4", "blocks.6"], [24, 32, 96, 320], [4, 8, 16, 32]),
    "vit_small_patch14_dinov2": (112, ["blocks.2", "blocks.5", "blocks.8", "norm"], [384] * 4, [14] * 4),
    "pvt_v2_b0": (None, ["stages.0", "stages.1", "stages.2", "stages.3"], [32, 64, 160, 256], [4, 8, 16, 32]),
}


@pytest.mark.parametrize("name", list(TIMM))
def test_timm_models(name: str) -> None:
    timm = pytest.importorskip("timm")
    side, names, channels, strides = TIMM[name]
    sized = {} if side is None else {"img_size": side, "dynamic_img_size": True, "num_classes": 0}
    base = DenseBase(timm.create_model(name, **sized).eval())
    assert [tap.name for tap in base.taps] == names
    assert (list(base.channels), list(base.strides)) == (channels, strides)
    size = 56 if side else 64  # another than it was looked at
    with torch.no_grad():
        maps = base.features(torch.randn(1, 3, size, 2 * size))
    assert [list(m.shape[1:]) for m in maps] == [
        [c, size // s, 2 * size // s] for c, s in zip(channels, strides, strict=True)
    ]


def test_swin_is_channels_last() -> None:
    timm = pytest.importorskip("timm")
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24).eval()
    # What MTLoRA's decoders are given: a stage's output where it is made smaller, and the last stage's.
    paper = ["layers.1.downsample", "layers.2.downsample", "layers.3.downsample", "layers.3"]
    assert DenseBase(copy.deepcopy(swin)).channels == (24, 48, 96, 192)
    base = DenseBase(swin, paper)
    assert [tap.layout for tap in base.taps] == ["nhwc"] * 4
    assert (base.channels, base.strides) == ((48, 96, 192, 192), (8, 16, 32, 32))


@pytest.mark.parametrize("size", [(120, 160), (100, 36), (33, 65)])
def test_sides_that_no_stride_divides(size: tuple[int, int]) -> None:
    torchvision = pytest.importorskip("torchvision")
    base = DenseBase(torchvision.models.mobilenet_v2().eval(), image=(3, *size))
    assert base.tap_names == tuple(f"backbone.features.{index}" for index in (3, 6, 13, 18))
    assert base.strides == (4, 8, 16, 32)


def test_torchvision_mobilenet() -> None:
    torchvision = pytest.importorskip("torchvision")
    names = find_taps(torchvision.models.mobilenet_v2().eval())
    assert names == ["features.3", "features.6", "features.13", "features.18"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"taps": ["stages.7"]}, "taps: the backbone has no module 'stages.7'.*stages"),
        ({"taps": []}, "taps: expected at least one"),
        ({"taps": ["stem", "stem"]}, "taps: expected each module once, got 'stem'"),
        ({"taps": ["fc"]}, r"taps: expected 'fc' to return features .*got \[1, 10\]"),
        ({"layouts": {"stem": "nchw"}}, "layouts: 'stem' is no tap"),
        ({"layouts": {"stages.1": "chwn"}}, "layouts: expected one of .* got 'chwn'"),
        ({"image": (3, 32)}, r"image: expected \(channels, height, width\), got \(3, 32\)"),
    ],
    ids=["unknown", "none", "twice", "flat", "no-tap", "layout", "image"],
)
def test_bad_taps(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DenseBase(small(), **{"image": (3, 32, 32), **settings})


def test_a_cube_of_features_asks_for_its_layout() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4))
    with pytest.raises(ConfigError, match="layouts: expected 'nchw' or 'nhwc' for '0'"):
        DenseBase(backbone, ["0"], image=(3, 32, 32))
    assert DenseBase(backbone, ["0"], layouts={"0": "nhwc"}, image=(3, 32, 32)).taps[0].layout == "nhwc"


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="none are known for a Sequential; name modules"):
        find_taps(nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_threads_and_copies_take_their_own() -> None:
    base = DenseBase(small(), image=(3, 32, 32))
    twin = copy.deepcopy(base)
    with torch.no_grad():
        twin.backbone.stem.weight.mul_(2)
    found: dict[int, Tensor] = {}
    images = [torch.randn(1, 3, 32, 32) for _ in range(8)]

    def run(place: int) -> None:
        for _ in range(5):
            found[place] = (base if place % 2 else twin)(images[place]).detach()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(8):
        assert torch.equal(found[place], (base if place % 2 else twin)(images[place]))


def test_checkpointing_that_cuts_the_graph_is_refused() -> None:
    class Saving(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.reentrant = reentrant
            self.stem, self.stage = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.stage, self.stem(x), use_reentrant=self.reentrant)

    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(ConfigError, match="'stage' runs without gradients"):
        DenseBase(Saving(True), ["stage"], image=(3, 16, 16))(x)
    base = DenseBase(Saving(False), ["stage"], image=(3, 16, 16))
    base(x).sum().backward()
    assert base.backbone.stage.bias.grad.eq(16.0).all()  # once for each of 4 x 4 places
