"""MTLoRA (arXiv 2403.20320): what it computes, beside an independent formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import settle
from torch import Tensor, nn

from taps_ext import MTLoraConfig, TaskModel
from taps_ext.dense import DenseBase

swin = pytest.importorskip("timm.models.swin_transformer")

EPS = torch.finfo(torch.float32).eps
TAPS = ("layers.1.downsample", "layers.1")


class Decoder(nn.Module):
    """A linear layer for each map, all added up."""

    def __init__(self, channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(count, outputs) for count in channels])

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        return sum(layer(found.permute(0, 2, 3, 1)) for layer, found in zip(self.layers, maps, strict=True))


def backbone(**settings: Any) -> nn.Module:
    torch.manual_seed(3)
    given = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    given["drop_path_rate"] = 0.0  # of which the formula knows nothing
    return settle(swin.SwinTransformer(num_classes=3, **{**given, **settings})).requires_grad_(False)


def adapted(
    config: MTLoraConfig | None = None, tasks: Sequence[str] = ("a", "b", "c"), base: nn.Module | None = None
) -> TaskModel:
    """Tasks whose factors are all at work."""
    base = DenseBase(backbone(), TAPS) if base is None else base
    model = TaskModel(base, config or CONFIG)
    torch.manual_seed(1)
    for outputs, name in enumerate(tasks, 2):
        model.add_task(name, head=Decoder(base.channels, outputs))
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: TaskModel) -> None:
    torch.manual_seed(5)
    for held in (*model.families.values(), *(model.state(name) for name in model.tasks)):
        for parameter in held.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


CONFIG = MTLoraConfig(rank=3, task_rank=2, dropout=0.0)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


# ------------------------------------------------------------------------------------ the paper's recipe, by hand


class Recipe:
    """The network of the paper in float64, from plain tensors: Swin of two stages of two blocks, 16 pixels, patches of
    2, windows of 4, the second block of a stage shifted by 2 where the map is larger than a window."""

    def __init__(self, model: TaskModel, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self.base = {name.removeprefix("backbone."): t.double() for name, t in model.base.state_dict().items()}
        self.leaves: dict[Any, Tensor] = {}
        self.source: dict[Any, Tensor] = {}
        self.uses: dict[Any, list[Tensor]] = {}
        (family,) = model.families.values()
        for task, held in ((None, family), *((name, model.state(name)) for name in self.tasks)):
            for module, part in held.table.items():
                for name, parameter in part.named_parameters():
                    key = (task, module.removeprefix("backbone."), name)
                    self.source[key] = parameter
                    self.leaves[key] = parameter.detach().double().requires_grad_()

    def get(self, module: str, name: str) -> Tensor:
        """A tensor of the base, or what the tasks share in its place."""
        if (None, module, name) in self.leaves:
            return self.leaves[None, module, name]
        return self.leaves.get((None, module, f"change.{name}"), self.base[f"{module}.{name}"])

    def has(self, module: str, name: str) -> bool:
        return f"{module}.{name}" in self.base

    def norm(self, x: Tensor, module: str) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        eps = 1e-5
        return (x - mean) / (variance + eps).sqrt() * self.get(module, "weight") + self.get(module, "bias")

    def p(self, x: Tensor, module: str) -> Tensor:
        out = x @ self.get(module, "weight").T
        return out + self.get(module, "bias") if self.has(module, "bias") else out

    def add(self, task: str | None, module: str, x: Tensor) -> Tensor | float:
        if (task, module, "change.down") not in self.leaves:
            return 0.0
        down, up = (self.leaves[task, module, f"change.{name}"] * 1.0 for name in ("down", "up"))
        for name, factor in (("down", down), ("up", up)):
            factor.retain_grad()
            self.uses.setdefault((task, module, f"change.{name}"), []).append(factor)
        return 4.0 * (x @ down.T @ up.T)

    def layer(self, module: str, x: Tensor, of_tasks: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """y = p + 4 B A x, y_t = p + 4 B_t A_t x_t, x_t = x where there is no stream yet."""
        p = self.p(x, module)
        shared = p + self.add(None, module, x)
        return shared, {t: p + self.add(t, module, x if of_tasks is None else of_tasks[t]) for t in self.tasks}

    def attention(self, x: Tensor, block: str, shift: int, ends: bool) -> tuple[Tensor, dict[str, Tensor]]:
        count, height, width, dim = x.shape
        x = torch.roll(x, (-shift, -shift), (1, 2))
        windows = [
            x[:, i : i + 4, j : j + 4].reshape(count, 16, dim) for i in range(0, height, 4) for j in range(0, width, 4)
        ]
        place = torch.zeros(height, width)
        if shift:
            for i, rows in enumerate((slice(0, -4), slice(-4, -shift), slice(-shift, None))):
                for j, columns in enumerate((slice(0, -4), slice(-4, -shift), slice(-shift, None))):
                    place[rows, columns] = 3 * i + j
        regions = [place[i : i + 4, j : j + 4].flatten() for i in range(0, height, 4) for j in range(0, width, 4)]
        at = torch.tensor([(i, j) for i in range(4) for j in range(4)])
        offsets = at[:, None] - at[None] + 3
        bias = self.get(f"{block}.attn", "relative_position_bias_table")[offsets[..., 0] * 7 + offsets[..., 1]]
        shared, of_tasks = [], {t: [] for t in self.tasks}
        for window, region in zip(windows, regions, strict=True):
            q, k, v = self.layer(f"{block}.attn.qkv", window, None)[0].view(count, 16, 3, 2, dim // 2).unbind(2)
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / (dim // 2) ** 0.5 + bias.permute(2, 0, 1)
            scores = scores - 100.0 * (region[:, None] != region[None]).double()
            out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(count, 16, dim)
            y, others = self.layer(f"{block}.attn.proj", out, None)
            shared.append(y)
            for t in self.tasks:
                of_tasks[t].append(others[t])

        def back(pieces: list[Tensor]) -> Tensor:
            out = x.new_zeros(count, height, width, dim)
            grid = [(i, j) for i in range(0, height, 4) for j in range(0, width, 4)]
            for (i, j), piece in zip(grid, pieces, strict=True):
                out[:, i : i + 4, j : j + 4] = piece.view(count, 4, 4, dim)
            return torch.roll(out, (shift, shift), (1, 2))

        return back(shared), {t: back(of_tasks[t]) for t in self.tasks} if ends else {}

    def block(self, x: Tensor, block: str, shift: int, ends: bool) -> tuple[Tensor, dict[str, Tensor]]:
        made, others = self.attention(self.norm(x, f"{block}.norm1"), block, shift, ends)
        rest = {t: x + other for t, other in others.items()}
        x = x + made
        inner = {t: self.norm(other, f"{block}.norm2") for t, other in rest.items()}
        hidden, of_tasks = self.layer(f"{block}.mlp.fc1", self.norm(x, f"{block}.norm2"), inner if ends else None)
        gelu = lambda y: 0.5 * y * (1 + torch.erf(y / 2**0.5))  # noqa: E731
        inner = {t: gelu(of_tasks[t]) for t in rest}
        made, of_tasks = self.layer(f"{block}.mlp.fc2", gelu(hidden), inner if ends else None)
        return x + made, {t: rest[t] + of_tasks[t] for t in rest}

    def merge(self, x: Tensor) -> Tensor:
        quarters = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        # timm's order of a 2 x 2 patch: columns are the outer ones.
        merged = torch.cat(quarters, dim=-1)
        module = "layers.1.downsample"
        made = self.norm(merged, f"{module}.norm")
        return self.p(made, f"{module}.reduction") + self.add(None, f"{module}.reduction", made)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        count = len(images)
        patches = images.view(count, 3, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(count, 8, 8, 12)
        module = "patch_embed.proj"
        x = patches @ self.get(module, "weight").reshape(8, 12).T + self.get(module, "bias")
        x = self.norm(x, "patch_embed.norm")
        x, _ = self.block(x, "layers.0.blocks.0", 0, False)
        x, others = self.block(x, "layers.0.blocks.1", 2, True)
        first, x = {t: self.merge(other) for t, other in others.items()}, self.merge(x)
        x, _ = self.block(x, "layers.1.blocks.0", 0, False)
        x, last = self.block(x, "layers.1.blocks.1", 0, True)
        found = {}
        for t in self.tasks:
            of = lambda n, t=t: self.leaves[t, "decoder", f"module.layers.{n}"]  # noqa: E731
            found[t] = first[t] @ of("0.weight").T + of("0.bias") + last[t] @ of("1.weight").T + of("1.bias")
        return found


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    return sum(weight * out.square().mean() for weight, out in enumerate(outputs.values(), 1))


@pytest.mark.parametrize("plus", [False, True], ids=["", "plus"])
@pytest.mark.parametrize("together", [True, False], ids=["one-pass", "one-by-one"])
def test_equals_the_formula(plus: bool, together: bool) -> None:
    """Outputs, and the gradients of all that is trained and of the images. Parameters of changes are float32, and each
    is used once: its gradient is rounded once, by half an EPS. In patch merging there are two uses, each of which is
    rounded, and their sum. All else is float64, whose roundings in a network of some forty sums of up to 256 terms are
    far below 1e-10 of the largest."""
    model = adapted(MTLoraConfig(rank=3, task_rank=2, dropout=0.0, plus=plus)).double().train()
    recipe = Recipe(model, model.tasks)
    for tasks in [model.tasks] if together else [[task] for task in model.tasks]:
        x, again = IMAGES.double().requires_grad_(), IMAGES.double().requires_grad_()
        recipe.uses = {}
        want = {task: out for task, out in recipe(again).items() if task in tasks}
        for leaf in recipe.leaves.values():
            leaf.grad = None
        loss_of(want).backward()
        model.zero_grad()
        got = model.forward_tasks(x, tasks=tasks) if together else {t: model(x, task=t) for t in tasks}
        loss_of(got).backward()
        for task in tasks:
            assert (got[task] - want[task]).abs().max() <= 1e-12 * want[task].abs().max()
        assert (x.grad - again.grad).abs().max() <= 1e-10 * again.grad.abs().max()
        silent = set()
        for key, leaf in recipe.leaves.items():
            found = recipe.source[key].grad
            if leaf.grad is None:
                silent.add(key)
                assert found is None or not found.any(), key
                continue
            rounding = EPS / 2 * leaf.grad.abs() if found.dtype == torch.float32 else 0.0
            if "reduction" in key[1] and plus:
                rounding += EPS / 2 * sum(use.grad.abs() for use in recipe.uses[key] if use.grad is not None)
            assert ((found - leaf.grad).abs() <= rounding + 1e-10 * leaf.grad.abs().max()).all(), key
        # The last shared stream ends before its last layer adds to it, and other tasks have no part in a task's run.
        ending = {(None, "layers.1.blocks.1.mlp.fc2", f"change.{name}") for name in ("down", "up")}
        assert silent == ending | {key for key in recipe.leaves if key[0] is not None and key[0] not in tasks}
