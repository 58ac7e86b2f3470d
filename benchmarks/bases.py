"""Small bases for 32x32 images, pretrained here: a residual, a densely connected and an attention network."""

from __future__ import annotations

from pathlib import Path

import timm
import torchvision
from resnet20 import pretrained as resnet20
from torch import nn

from taps_ext import store
from taps_ext.zoo import SmallResNet

NAMES = ("resnet", "densenet", "vit")


def make(name: str) -> nn.Module:
    """An untrained base for 10 classes: input `[B, 3, 32, 32]`.

    resnet     3 stages of 16, 32 and 64 channels with one block each (He et al. 2016): 0.08 M parameters
    densenet   3 dense blocks of 2, 4 and 8 layers, growth 16, bottlenecks (Huang et al. 2017): 0.10 M
    vit        patches of 4, width 64, 6 blocks of 2 heads, class token (Dosovitskiy et al. 2021): 0.31 M
    """
    if name == "resnet":
        return SmallResNet(10, 3, widths=(16, 32, 64), blocks=1)
    if name == "densenet":
        net = torchvision.models.DenseNet(16, (2, 4, 8), 16, bn_size=2, num_classes=10)
        net.features.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        net.features.pool0 = nn.Identity()
        return net
    if name == "vit":
        sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 2, "num_classes": 10}
        return timm.models.VisionTransformer(**sizes)
    raise ValueError(f"base: expected one of {NAMES}, got {name!r}")


def load(name: str, folder: Path, data: Path) -> nn.Module:
    """A pretrained base in evaluation mode: one of ours from `folder`, or the given "resnet20" from `data`."""
    if name == "resnet20":
        return resnet20(data / "resnet20-cifar10.safetensors")
    base = make(name)
    base.load_state_dict(store.read_safetensors(folder / f"{name}.safetensors")[0])
    return base.eval()
