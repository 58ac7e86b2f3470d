"""A tiny text model of transformers, a tokenizer, and texts of letters: run as a program it trains
in the folder it is given, so that it can be killed.

    python texts.py FOLDER WORKERS STEPS     dies by SIGKILL in that training step
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorWithPadding, DistilBertConfig, DistilBertForSequenceClassification

from taps_ext import TapsConfig, Task, TaskModel, TrainConfig, Trainer
from taps_ext.train import Result

LETTERS = "abcdefghijklmnop"
SMALL = {"vocab_size": 20, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16}


def tokenizer() -> Any:
    """One token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"[PAD]": 0, "[UNK]": 1, **{letter: index + 2 for index, letter in enumerate(LETTERS)}}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


class Texts(Dataset):
    """{"input_ids", "attention_mask", "labels"} of words of several lengths, as lists: does it begin with an early
    letter? `turned`: how often a word is read from its end."""

    def __init__(self, samples: int = 64, seed: int = 0, turned: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 12, (samples,), generator=generator).tolist()
        drawn = [torch.randint(len(LETTERS), (length,), generator=generator).tolist() for length in lengths]
        self.words = ["".join(LETTERS[index] for index in word) for word in drawn]
        self.tokenizer, self.turned = tokenizer(), turned

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Any]:
        word = self.words[index]
        if self.turned and float(torch.rand(())) < self.turned:
            word = word[::-1]
        return {**self.tokenizer(word, return_token_type_ids=False), "labels": int(word[0] < "i")}


def model() -> TaskModel:
    torch.manual_seed(0)
    base = DistilBertForSequenceClassification(DistilBertConfig(**SMALL, num_labels=3))
    made = TaskModel(base, TapsConfig(lam=0.1))
    made.add_task("early", num_classes=2)
    return made


def fit(out: str | None, workers: int, loss: Any = None, **settings: Any) -> tuple[TaskModel, Result]:
    """Train on dictionaries from a shuffling DataLoader with workers and a padding collator."""
    how = {"batch_size": 16, "collate_fn": DataCollatorWithPadding(tokenizer()), "num_workers": workers}
    train, val = Texts(turned=0.5), Texts(32, seed=1)
    more = {} if loss is None else {"loss": loss}
    task = Task(
        train=DataLoader(train, shuffle=True, persistent_workers=workers > 0, **how),
        val=DataLoader(val, **how),
        test=DataLoader(val, **how),
        **more,
    )
    config = TrainConfig(**{"epochs": 3, "optimizer": "adamw", "lr": 1e-2, "warmup_epochs": 1, "out": out, **settings})
    made = model()
    return made, Trainer(made, {"early": task}, config, quiet=True).fit()["early"]


def main() -> None:
    out, workers, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    count = []
    forward = nn.Module.__call__

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(module, TaskModel) and module.training:
            count.append(1)
            if len(count) == steps:
                os.kill(os.getpid(), signal.SIGKILL)
        return forward(module, *args, **kwargs)

    nn.Module.__call__ = counted  # type: ignore[method-assign]
    fit(out, workers, save_every=0.0)


if __name__ == "__main__":
    main()
