"""Random small models: convolutions, norms, attention and weights that other code reads."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Attention(nn.Module):
    """Self-attention over `[B, L, D]`, with or without bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class ReadsItsWeight(nn.Module):
    """Hands its projection to a function, as torchvision's Swin does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.scale = nn.Linear(width, width), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(x, self.proj.weight, self.proj.bias)


class Same(nn.Conv2d):
    """A convolution that pads by itself, as timm's do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [1, 1, 1, 1]), self.weight, self.bias, 1, 0, 1, self.groups)


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


@st.composite
def image_part(draw, channels: int) -> tuple[nn.Module, int]:
    kind = draw(
        st.sampled_from(["conv", "conv", "strided", "depthwise", "same", "bn", "gn", "act", "residual", "drop"])
    )
    bias = draw(st.booleans())
    if kind == "conv":
        out, groups = 2 * draw(st.integers(1, 5)), draw(st.sampled_from([1, 2]))
        mode = draw(st.sampled_from(["zeros", "circular", "reflect"]))
        size = draw(st.sampled_from([1, 3]))
        padding = draw(st.sampled_from([size // 2, "same"]))
        return nn.Conv2d(channels, out, size, padding=padding, groups=groups, bias=bias, padding_mode=mode), out
    if kind == "strided":
        return nn.Conv2d(channels, 6, 3, 2, 2, dilation=draw(st.sampled_from([1, 2])), bias=bias), 6
    if kind == "depthwise":
        return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias), channels
    if kind == "same":
        return Same(channels, 4, 3, bias=bias), 4
    if kind == "residual":
        return Residual(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())), channels
    if kind == "bn":
        return nn.BatchNorm2d(channels, affine=draw(st.booleans())), channels
    other = {"gn": nn.GroupNorm(2, channels), "act": nn.GELU(), "drop": nn.Dropout(0.2)}
    return other[kind], channels


@st.composite
def token_part(draw, width: int) -> nn.Module:
    kind = draw(st.sampled_from(["linear", "attention", "encoder", "reads", "ln", "rms", "act"]))
    if kind == "attention":
        return Attention(width, draw(st.booleans()))
    if kind == "encoder":
        first = draw(st.booleans())
        return nn.TransformerEncoderLayer(width, 2, 2 * width, 0.1, batch_first=True, norm_first=first)
    other = {"linear": nn.Linear(width, width), "reads": ReadsItsWeight(width), "ln": nn.LayerNorm(width)}
    return {**other, "rms": nn.RMSNorm(width), "act": nn.SiLU()}[kind]


@st.composite
def bases(draw) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model, channels = nn.Sequential(), 2
    for _ in range(draw(st.integers(1, 4))):
        part, channels = draw(image_part(channels))
        model.append(part)
    model.append(Tokens())
    for _ in range(draw(st.integers(0, 3))):
        model.append(draw(token_part(channels)))
    model.append(Mean())
    if draw(st.booleans()):
        model.append(nn.BatchNorm1d(channels))
    model.append(nn.Linear(channels, 5))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model.train(draw(st.booleans()))
