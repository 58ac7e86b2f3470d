"""A small transformer learns to read, and then two tasks: which part of a library a text documents.

    python examples/text_transformer.py

The text is what every machine with this package's extras has: passages from the docstrings of numpy, torch,
scikit-learn and scipy. An encoder is trained from scratch to tell fourteen of their parts from each other; that is the
base. Two tasks tell apart four parts each that it has not seen, with a table of words of their own (others="task") and
layers that stay the base's where they need no change. Items are dictionaries of lists, which a DataLoader with a worker
and transformers' own collator pads batch by batch.
"""

import argparse
import ast
import importlib.util
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import taps_ext

BASE = {
    "numpy": ["lib", "ma", "_core"],
    "torch": ["nn", "distributions"],
    "sklearn": ["preprocessing", "svm", "neighbors", "decomposition"],
    "scipy": ["linalg", "interpolate", "spatial", "special", "ndimage"],
}
TASKS = {
    "sklearn": ["cluster", "linear_model", "metrics", "ensemble"],
    "scipy": ["stats", "signal", "sparse", "optimize"],
}
NAMES = re.compile(r"\b(numpy|np|torch|pytorch|sklearn|scikit|learn|scipy|sp)\b")
WORDS = 48


def passages(library: str, folder: str, most: int) -> list[str]:
    """Passages of forty-eight words from the docstrings in a library's folder, without the libraries' names."""
    spec = importlib.util.find_spec(library)
    root = Path(spec.submodule_search_locations[0]) / folder
    found: dict[str, None] = {}  # each once, in order
    for file in sorted(root.rglob("*.py")):
        if "test" in str(file.relative_to(root)):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                continue
            words = re.findall(r"[a-z]{2,}", NAMES.sub("", (ast.get_docstring(node) or "").lower()))
            for start in range(0, len(words) - WORDS + 1, WORDS):
                found[" ".join(words[start : start + WORDS])] = None
    chosen = list(found)
    random.Random(0).shuffle(chosen)
    return chosen[:most]


def labelled(groups: list[list[str]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(training, test) passages with the number of their group."""
    pairs = [(text, label) for label, texts in enumerate(groups) for text in texts]
    random.Random(1).shuffle(pairs)
    held = len(pairs) // 5
    return pairs[held:], pairs[:held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="of the base and of each task")
    parser.add_argument("--passages", type=int, default=300, help="at most, of each part")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", default="runs/text")
    args = parser.parse_args()
    torch.manual_seed(0)

    most = args.passages
    splits = {"base": labelled([passages(name, part, most) for name, parts in BASE.items() for part in parts])}
    for name, parts in TASKS.items():
        splits[name] = labelled([passages(name, part, most) for part in parts])

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    training = [text for train, _ in splits.values() for text, _ in train]
    words.train_from_iterator(
        training, trainers.WordLevelTrainer(vocab_size=4000, special_tokens=["[PAD]", "[UNK]", "[CLS]"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")

    def loader(pairs: list[tuple[str, int]], shuffle: bool = False) -> DataLoader:
        ids = [tokenizer("[CLS] " + text, truncation=True, max_length=64).input_ids for text, _ in pairs]
        items = [
            {"input_ids": found, "attention_mask": [1] * len(found), "labels": label}
            for found, (_, label) in zip(ids, pairs, strict=True)
        ]
        return DataLoader(
            items,  # type: ignore[arg-type]
            batch_size=32,
            shuffle=shuffle,
            collate_fn=DataCollatorWithPadding(tokenizer),
            num_workers=args.workers,
            persistent_workers=shuffle and args.workers > 0,
        )

    # The base: an ordinary training loop of an ordinary model.
    shape = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
    classes = sum(len(parts) for parts in BASE.values())
    base = DistilBertForSequenceClassification(
        DistilBertConfig(**shape, vocab_size=len(tokenizer), num_labels=classes, dropout=0.0, attention_dropout=0.0)
    )
    train, test = (loader(pairs, shuffle) for pairs, shuffle in zip(splits["base"], (True, False), strict=True))
    optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3)
    for _ in range(args.epochs):
        base.train()
        for batch in train:
            optimizer.zero_grad()
            base(**batch).loss.backward()
            optimizer.step()
    base.eval()
    with torch.no_grad():
        right = sum((base(**batch).logits.argmax(1) == batch["labels"]).sum().item() for batch in test)
    print(f"base: {100 * right / len(splits['base'][1]):.1f} % of unseen passages ascribed to one of {classes} parts")

    model = taps_ext.TaskModel(base, taps_ext.TapsConfig(lam=0.02, others="task"))
    tasks = {}
    for name, parts in TASKS.items():
        model.add_task(name, num_classes=len(parts))
        train, test = splits[name]
        held = len(train) // 8
        tasks[name] = taps_ext.Task(
            train=loader(train[held:], shuffle=True), val=loader(train[:held]), test=loader(test), labels=parts
        )
    config = taps_ext.TrainConfig(epochs=args.epochs, optimizer="adamw", lr=3e-3, warmup_epochs=1, out=args.out)
    for name, result in taps_ext.Trainer(model, tasks, config).fit().items():
        print(
            f"{name}: test accuracy {100 * result.test['accuracy']:.1f} % of {len(TASKS[name])} parts, "
            f"{100 * result.share:.0f} % of the weights open"
        )


if __name__ == "__main__":
    main()
