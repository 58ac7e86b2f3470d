"""Small bases, pretrained here: a residual, a densely connected and an attention network for 32x32 images, and a
hierarchical transformer for maps of larger ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torchvision
from resnet20 import pretrained as resnet20
from torch import nn

from taps_ext import store
from taps_ext.zoo import SmallResNet

NAMES = ("resnet", "densenet", "vit")
"""Those of the transfer study."""
SWIN_PIXELS = 64
"""What the images of 32 are brought to for "swin", whose patches have 4 pixels."""
SWIN_TAPS = ("layers.0", "layers.1", "layers.2")
"""Behind the last block of each of its stages: 48, 96 and 192 channels at strides 4, 8 and 16."""


def make(name: str) -> nn.Module:
    """An untrained base for 10 classes: input `[B, 3, 32, 32]`, of "swin" `[B, 3, 64, 64]`.

    resnet     3 stages of 16, 32 and 64 channels with one block each (He et al. 2016): 0.08 M parameters
    densenet   3 dense blocks of 2, 4 and 8 layers, growth 16, bottlenecks (Huang et al. 2017): 0.10 M
    vit        patches of 4, width 64, 6 blocks of 2 heads, class token (Dosovitskiy et al. 2021): 0.31 M
    swin       for 64x64: patches of 4, 3 stages of 2 blocks, widths 48, 96 and 192, windows of 4 (Liu et al. 2021)
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
    if name == "swin":
        return swin((SWIN_PIXELS, SWIN_PIXELS), num_classes=10)
    raise ValueError(f"base: expected one of {(*NAMES, 'swin')}, got {name!r}")


def swin(size: tuple[int, int], **settings: Any) -> nn.Module:
    """The hierarchical transformer for images of (height, width); its parameters are the same for all sizes."""
    shape = {"patch_size": 4, "embed_dim": 48, "depths": (2, 2, 2), "num_heads": (3, 6, 12), "window_size": 4}
    # always_partition: a window is 4 x 4 also where a map is no larger, so that tables of positions are alike.
    given = {"always_partition": True, "drop_path_rate": 0.0, **settings}
    return timm.models.SwinTransformer(img_size=size, **shape, **given)


def load(name: str, folder: Path, data: Path) -> nn.Module:
    """A pretrained base in evaluation mode: one of ours from `folder`, or the given "resnet20" from `data`."""
    if name == "resnet20":
        return resnet20(data / "resnet20-cifar10.safetensors")
    base = make(name)
    base.load_state_dict(store.read_safetensors(folder / f"{name}.safetensors")[0])
    return base.eval()
