"""A timm model learns one task: three lines to adapt it, one call to train it, one file to keep.

    python examples/timm_model.py --model resnet50 --pretrained --data imagefolder:data/birds --size 224

Without arguments it trains a small untrained network on scikit-learn's handwritten digits.
"""

import argparse

import timm
import torch

import taps_ext
from taps_ext.data import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights (downloaded)")
    parser.add_argument("--data", default="digits:rotated", help="what taps_ext.data.open_source takes")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="runs/timm")
    args = parser.parse_args()

    torch.manual_seed(0)
    base = timm.create_model(args.model, pretrained=args.pretrained)
    normalize = (base.pretrained_cfg["mean"], base.pretrained_cfg["std"])  # of the images that it was trained on
    data = open_source(args.data, size=args.size, channels=3, normalize=normalize)

    model = taps_ext.TaskModel(base, taps_ext.TapsConfig(lam=0.5))
    model.add_task("mine", num_classes=data.num_classes)
    task = taps_ext.Task(
        train=data.train, val=data.val, test=data.test, labels=data.classes, preprocessing=data.preprocessing
    )

    config = taps_ext.TrainConfig(epochs=args.epochs, lr=0.02, warmup_epochs=1, out=args.out)
    result = taps_ext.Trainer(model, {"mine": task}, config).fit()["mine"]
    print(model.report("mine"))
    print(f"test accuracy {100 * result.test['accuracy']:.1f} %, kept in {result.file}")


if __name__ == "__main__":
    main()
