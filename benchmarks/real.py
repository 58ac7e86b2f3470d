"""The real data and pretrained bases of ../shared/data: what the studies train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import store
from taps_ext.train import Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of all three bases
BASES = ("resnet", "mobilenet", "vit")


def images(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 `[N, H, W, 3]` or `[N, H, W]` as the bases take it: float32 `[N, 3, size, size]`, channels_last."""
    x = torch.from_numpy(pixels).float().div(255)
    x = x[..., None].expand(*x.shape, 3) if x.dim() == 3 else x
    x = ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)


def arrays(folder: Path, task: str) -> dict[str, np.ndarray]:
    """Pixels and labels of "signs" or "omniglot"; "omniglot-1" and "omniglot-2" are the halves of its characters,
    "group-0" to "group-9" tenths of the first 240."""
    name, _, part = task.partition("-")
    file = "omniglot" if name == "group" else name
    with np.load(folder / f"{file}.npz", allow_pickle=False) as found:
        data = {key: found[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    if not part:
        return data
    width = 24 if name == "group" else 121
    first = width * (int(part) - (name != "group"))
    for split in ("train", "test"):
        chosen = (data[f"y_{split}"] >= first) & (data[f"y_{split}"] < first + width)
        data[f"x_{split}"] = data[f"x_{split}"][chosen]
        data[f"y_{split}"] = data[f"y_{split}"][chosen] - first
    return data


def task_of(folder: Path, name: str, size: int, *, test: bool = True) -> tuple[Task, int]:
    """A task's data, and its number of classes."""
    data = arrays(folder, name)
    splits = {s: (images(data[f"x_{s}"], size), torch.from_numpy(data[f"y_{s}"]).long()) for s in ("train", "test")}
    task = Task(train=splits["train"], test=splits["test"] if test else None)
    return task, int(data["y_train"].max()) + 1


def base_of(folder: Path, name: str, size: int = 0) -> nn.Module:
    """A pretrained base in evaluation mode: "resnet" (CIFAR-10), "mobilenet" (ImageNet), "vit" (derived from DINOv2,
    for images of `size` pixels, with a linear head of one class that a task replaces)."""
    if name == "resnet":
        from resnet20 import pretrained

        return pretrained(folder / "resnet20-cifar10.safetensors").to(memory_format=torch.channels_last)
    if name == "mobilenet":
        import torchvision

        net = torchvision.models.mobilenet_v2()
        net.load_state_dict(store.read_safetensors(folder / "mobilenet_v2-imagenet1k.safetensors")[0])
        return net.eval().to(memory_format=torch.channels_last)
    import timm
    from timm.layers import resample_abs_pos_embed

    tensors = store.read_safetensors(folder / "vit_small_patch14_dinov2-derived-fp16.safetensors")[0]
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    side = size // 14
    tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], (side, side), num_prefix_tokens=1)
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=1, img_size=size)
    lost = vit.load_state_dict(tensors, strict=False)
    if lost.unexpected_keys or sorted(lost.missing_keys) != ["head.bias", "head.weight"]:
        raise ValueError(f"{name}: missing {lost.missing_keys}, unexpected {lost.unexpected_keys}")
    return vit.eval()
