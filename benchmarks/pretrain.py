"""Pretrain the bases of the transfer study, and "swin" of the study of maps, on CIFAR-10 (50,000 JPEG images;
`../shared/data`).

    python benchmarks/pretrain.py resnet --data ../shared/data --out runs/bases

Random crops and flips; SGD with Nesterov momentum for the convolutional bases, AdamW for the transformers; cosine with
a short warm-up; float32. Writes NAME.safetensors and NAME.json (settings, and the accuracy on the test images of
`cifar10.npz`) at the end, and a checkpoint after every epoch, from which a stopped run goes on. A finished base is left
as it is.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from resnet20 import normalise
from small_bases import NAMES, SWIN_PIXELS, make
from torch import Tensor, nn

from taps_ext import store

SETTINGS: dict[str, dict[str, Any]] = {
    "resnet": {"epochs": 25, "lr": 0.1, "weight_decay": 5e-4},
    "densenet": {"epochs": 15, "lr": 0.1, "weight_decay": 5e-4},
    "vit": {"epochs": 30, "lr": 1e-3, "weight_decay": 0.05},
    "swin": {"epochs": 12, "lr": 1e-3, "weight_decay": 0.05},
}
BATCH = 128


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """uint8 `[50000, 32, 32, 3]` and classes."""
    with np.load(folder / "cifar10-train-jpeg.npz", allow_pickle=False) as file:
        data, offsets, labels = file["jpeg"].tobytes(), file["offsets"], file["labels"]
    decoded = [np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in itertools.pairwise(offsets)]
    return torch.from_numpy(np.stack(decoded)), torch.from_numpy(labels.astype(np.int64))


def augmented(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels and mirrored half of the time: `[B, 3, 32, 32]`."""
    padded = F.pad(batch, (4, 4, 4, 4))
    count = len(batch)
    move = torch.randint(0, 9, (2, count, 1), generator=generator) + torch.arange(32)
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirror, move[1].flip(-1), move[1])
    index = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, move[0][:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def sized(name: str, batch: Tensor) -> Tensor:
    """Images at the size that a base takes."""
    if name != "swin":
        return batch
    return F.interpolate(batch, (SWIN_PIXELS, SWIN_PIXELS), mode="bilinear", align_corners=False)


@torch.no_grad()
def accuracy(name: str, net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    found = torch.cat([net(sized(name, part)).argmax(1) for part in x.split(500)])
    return float((found == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*NAMES, "swin"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/bases"))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / f"{args.name}.safetensors").exists():
        print(f"{args.name}: already there")
        return
    settings = {**SETTINGS[args.name], **({} if args.epochs is None else {"epochs": args.epochs})}
    x, y = images(args.data)
    x = normalise(x)
    with np.load(args.data / "cifar10.npz", allow_pickle=False) as file:
        test = normalise(torch.from_numpy(file["x_test"])), torch.from_numpy(file["y_test"].astype(np.int64))
    torch.manual_seed(0)
    net = make(args.name).to(memory_format=torch.channels_last)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": settings["weight_decay"]},
        {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if args.name in ("vit", "swin"):
        optimizer = torch.optim.AdamW(groups, lr=settings["lr"])
    else:
        optimizer = torch.optim.SGD(groups, lr=settings["lr"], momentum=0.9, nesterov=True)
    steps = len(x) // BATCH
    total, warm = steps * settings["epochs"], steps
    checkpoint, first, seconds = args.out / f"{args.name}.checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["epoch"], saved["seconds"]
    for epoch in range(first, settings["epochs"]):
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(x), generator=generator)
        net.train()
        begun, losses = time.perf_counter(), 0.0
        for step in range(steps):
            done = epoch * steps + step
            scale = min(1.0, done / warm) * 0.5 * (1 + math.cos(math.pi * done / total))
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * scale
            index = order[step * BATCH : (step + 1) * BATCH]
            inputs = sized(args.name, augmented(x[index], generator)).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(inputs), y[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.item()
        seconds += time.perf_counter() - begun
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1, "seconds": seconds}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        found = accuracy(args.name, net, *test)
        print(f"{args.name} epoch {epoch + 1}: loss {losses / steps:.3f} test {found:.4f} {seconds:.0f} s", flush=True)
    store.write_safetensors(args.out / f"{args.name}.safetensors", net.state_dict(), {"format": "pt"})
    facts = {
        "base": args.name,
        "parameters": sum(p.numel() for p in net.parameters()),
        "test_accuracy": accuracy(args.name, net, *test),
        "seconds": round(seconds),
        "torch": torch.__version__,
        **settings,
    }
    (args.out / f"{args.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
