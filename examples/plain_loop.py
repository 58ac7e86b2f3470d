"""Your own training loop: autocast, accumulation, warm-up of the penalty, a file, and the plain model back."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import taps_ext
from taps_ext.data import open_source
from taps_ext.zoo import small_resnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="forwards under autocast")
    parser.add_argument("--out", default="runs/plain/rotated.taps")
    args = parser.parse_args()

    torch.manual_seed(0)
    data = open_source("digits:rotated")
    model = taps_ext.TaskModel(small_resnet(), taps_ext.TapsConfig(lam=0.5))
    model.add_task("rotated", num_classes=data.num_classes)
    optimizer = torch.optim.SGD(model.parameter_groups("rotated", lr=0.02), momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    loader = DataLoader(data.train, batch_size=32, shuffle=True)

    accumulate, warmup = 2, 2
    left_over = len(loader) % accumulate  # batches in an epoch's last step, if fewer
    for epoch in range(args.epochs):
        model.train()
        for step, (images, labels) in enumerate(loader, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits = model(images, task="rotated")
            together = left_over if step > len(loader) - left_over else accumulate
            (F.cross_entropy(logits.float(), labels) / together).backward()
            if step % accumulate == 0 or step == len(loader):
                # The penalty is added once for each step, and not at all while it warms up.
                model.sparsity_loss("rotated", scale=float(epoch >= warmup)).backward()
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        model.eval()
        with torch.no_grad():
            images, labels = next(iter(DataLoader(data.val, batch_size=1000)))
            accuracy = (model(images, task="rotated").argmax(dim=1) == labels).float().mean()
        report = model.report("rotated")
        print(f"epoch {epoch + 1}: validation {100 * accuracy:.1f} %, {100 * report.share:.0f} % of the weights open")

    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    model.save_task("rotated", args.out, labels=data.classes)
    with torch.no_grad():
        want = model(images, task="rotated")
        plain = model.merge_and_unload("rotated")  # an ordinary module; this package is no longer needed
        print(f"merged model equal: {torch.equal(plain(images), want)}; task kept in {args.out}")


if __name__ == "__main__":
    main()
