"""A Hugging Face image classifier learns two tasks with different labels, with activation checkpointing.

    python examples/transformers_model.py --from google/vit-base-patch16-224

`--from` takes whatever `from_pretrained` takes; without it a small untrained ViT is used.
"""

import argparse

import torch
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

import taps_ext
from taps_ext.data import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", help="name or folder of a pretrained ViT")
    parser.add_argument("--tasks", nargs="+", default=["digits:rotated", "digits:parity"])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", default="runs/transformers")
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.source:
        base = ViTForImageClassification.from_pretrained(args.source)
        images = AutoImageProcessor.from_pretrained(args.source)
        normalize = (images.image_mean, images.image_std)  # of the images that it was trained on
    else:
        normalize = None
        small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        base = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=10, **small))
    # Trades time for memory; the task that is recomputed in backward is the one that ran.
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": False})

    model = taps_ext.TaskModel(base, taps_ext.TapsConfig(lam=0.2))
    tasks = {}
    for spec in args.tasks:
        data = open_source(spec, size=base.config.image_size, channels=3, normalize=normalize)
        name = spec.rpartition(":")[2]
        model.add_task(name, num_classes=data.num_classes)
        tasks[name] = taps_ext.Task(
            train=data.train, val=data.val, test=data.test, labels=data.classes, preprocessing=data.preprocessing
        )

    config = taps_ext.TrainConfig(
        epochs=args.epochs, optimizer="adamw", lr=1e-3, score_lr=1e-2, warmup_epochs=1, out=args.out
    )
    for name, result in taps_ext.Trainer(model, tasks, config).fit().items():
        print(f"{name}: test accuracy {100 * result.test['accuracy']:.1f} %, {result.layers_open} layers open")
    output = model(torch.zeros(1, 3, base.config.image_size, base.config.image_size), task=name)
    print(f"{type(output).__name__} with logits {list(output.logits.shape)}")


if __name__ == "__main__":
    main()
