"""A torchvision model with random transforms, label smoothing and averaged weights; pictures of the run.

python examples/torchvision_model.py --model resnet50 --weights DEFAULT --data imagefolder:data/birds --size 224
"""

import argparse
from pathlib import Path

import torch
import torchvision
from torchvision.transforms import v2

import taps_ext
from taps_ext import plot
from taps_ext.data import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", help="torchvision's name for pretrained weights (downloaded)")
    parser.add_argument("--data", default="digits:rotated", help="what taps_ext.data.open_source takes")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="runs/torchvision")
    args = parser.parse_args()

    torch.manual_seed(0)
    base = torchvision.models.get_model(args.model, weights=args.weights)
    # The images that the weights were trained on were normalised so.
    made = None if args.weights is None else torchvision.models.get_model_weights(args.model)[args.weights].transforms()
    normalize = None if made is None else (made.mean, made.std)
    data = open_source(args.data, size=args.size, channels=3, normalize=normalize)
    augment = v2.Compose([v2.RandomAffine(10, translate=(0.1, 0.1)), v2.RandomErasing(p=0.2)])

    model = taps_ext.TaskModel(base, taps_ext.TapsConfig(lam=0.5, penalty="size"))
    model.add_task("mine", num_classes=data.num_classes)
    splits = {"train": data.train, "val": data.val, "test": data.test}
    task = taps_ext.Task(**splits, labels=data.classes, augment=augment, preprocessing=data.preprocessing)
    config = taps_ext.TrainConfig(
        epochs=args.epochs, lr=0.02, warmup_epochs=1, label_smoothing=0.1, ema=0.99, patience=10, out=args.out
    )
    result = taps_ext.Trainer(model, {"mine": task}, config).fit()["mine"]

    folder = Path(args.out)
    plot.curves(folder / "curves.png", folder / "metrics.jsonl")
    plot.gates(folder / "gates.png", folder / "metrics.jsonl", "mine")
    print(f"test accuracy {100 * result.test['accuracy']:.1f} %, {100 * result.share:.1f} % of the weights open")
    print(f"pictures in {folder}/curves.png and {folder}/gates.png")


if __name__ == "__main__":
    main()
