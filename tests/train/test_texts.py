"""Text models of transformers in the Trainer: items and batches that are dictionaries, collators, labels of tokens."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from taps_ext import ConfigError, FullConfig, LoraConfig, Task, TaskModel, TrainConfig, Trainer
from taps_ext.train import token_accuracy, token_cross_entropy
from taps_ext.train.loader import batches_of

transformers = pytest.importorskip("transformers")
texts = pytest.importorskip("texts")

HELPERS = Path(texts.__file__).parent


def tensors(model: TaskModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state("early").state_dict().items()}


def test_killed_and_resumed_a_text_model_is_the_one_that_was_not(tmp_path) -> None:
    """SIGKILL in the second step of the last epoch, with workers, dictionaries, a padding collator, dropout and a
    dataset that draws random numbers: file, history and test are those of a run in one go, which none of them read."""
    paths = os.pathsep.join([str(HELPERS.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HELPERS / "texts.py"), str(tmp_path / "killed"), "2", "10"]
    killed = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    whole, reference = texts.fit(str(tmp_path / "whole"), 0)
    assert killed.wait(timeout=120) == -9
    assert [file.name for file in (tmp_path / "killed").glob("early*")] == ["early.state"]
    again, result = texts.fit(str(tmp_path / "killed"), 2, save_every=0.0)
    assert result.history == reference.history and len(result.history) == 3
    assert (result.epoch, result.val, result.test) == (reference.epoch, reference.val, reference.test)
    mine, theirs = tensors(again), tensors(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)
    files = [(tmp_path / folder / "early.taps").read_bytes() for folder in ("killed", "whole")]
    assert files[0] == files[1]


def test_stopped_within_an_epoch(tmp_path) -> None:
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.requires_grad:
            calls.append(1)
        if len(calls) == 7 and outputs.requires_grad:
            os.kill(os.getpid(), 2)
        return F.cross_entropy(outputs, targets)

    loss.__module__, loss.__qualname__ = F.cross_entropy.__module__, F.cross_entropy.__qualname__
    whole, reference = texts.fit(None, 0)
    with pytest.raises(KeyboardInterrupt):
        texts.fit(str(tmp_path), 2, loss)
    again, result = texts.fit(str(tmp_path), 2, loss)
    assert len(calls) == 12 and result.history == reference.history
    assert all(torch.equal(one, tensors(whole)[key]) for key, one in tensors(again).items())


def test_a_text_model_learns() -> None:
    assert texts.fit(None, 0, epochs=20)[1].test["accuracy"] > 0.9


# ------------------------------------------------------------------------------------------------ mappings


class Wrapped(Dataset):
    """The same items as tensors, in whatever mapping."""

    def __init__(self, wrap: Any, key: str = "labels", pair: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 18, (32, 6), generator=generator)
        self.wrap, self.key, self.pair = wrap, key, pair

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        item = {"input_ids": self.ids[index], "attention_mask": torch.ones(6, dtype=torch.int64)}
        label = int(self.ids[index].lt(10).sum() > 3)
        return (self.wrap(item), label) if self.pair else self.wrap({**item, self.key: label})


@pytest.mark.parametrize("wrap", [dict, UserDict, transformers.BatchEncoding], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("form", ["labels", "label", "target", "pair"])
def test_mappings_of_all_kinds_are_the_same_data(wrap, form) -> None:
    """Through a DataLoader and without one, with the target inside or beside."""
    found = []
    pair, key = form == "pair", "labels" if form == "pair" else form
    for data in (
        Wrapped(dict),
        Wrapped(wrap, key, pair),
        DataLoader(Wrapped(wrap, key, pair), batch_size=8),
        DataLoader(Wrapped(wrap, key, pair), batch_size=8, num_workers=1),
    ):
        made = texts.model().eval()
        trainer = Trainer(made, {"early": Task(train=data)}, TrainConfig(batch_size=8), quiet=True)
        found.append(trainer.evaluate("early", data))
    assert found[1:] == found[:1] * 3 and found[0]["loss"] > 0
    batch = next(batches_of(DataLoader(Wrapped(wrap, key, pair), batch_size=8), "train", size=1).epoch(0))
    assert set(batch[0]) == {"input_ids", "attention_mask"} and batch[1].shape == (8,)


def test_a_mapping_that_the_model_does_not_take() -> None:
    def collate(samples: list[Any]) -> Any:
        return {**default_collate(samples), "text": ["a word"] * len(samples)}

    for loader, message in [
        (
            DataLoader(Wrapped(dict), collate_fn=collate),
            "input of a batch, got builtins list; give the .* collate_fn",
        ),
        (
            DataLoader(Wrapped(dict, "answer")),
            r"expected one of \['labels', 'label', 'target'\] in a dictionary, got keys",
        ),
    ]:
        with pytest.raises(ConfigError, match=rf"tasks\['early'\].train: .*{message}"):
            Trainer(texts.model(), {"early": Task(train=loader, val=Wrapped(dict))}, quiet=True).fit()


# -------------------------------------------------------------------------------------------------- tokens


class Tagged(Dataset):
    """Which letters of a word are vowels: a label a token, as lists of several lengths."""

    def __init__(self, samples: int = 64, seed: int = 0) -> None:
        self.texts = texts.Texts(samples, seed)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.texts[index]
        return {**item, "labels": [int(letter in "aeio") for letter in self.texts.words[index]]}


def tagger() -> TaskModel:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(**texts.SMALL, num_labels=5)
    model = TaskModel(transformers.DistilBertForTokenClassification(config), LoraConfig(rank=4))
    model.add_task("vowels", num_classes=2)
    return model


def transposed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets)


def tagging(samples: int = 64, seed: int = 0, batch: int = 16) -> DataLoader:
    collate = transformers.DataCollatorForTokenClassification(texts.tokenizer())
    return DataLoader(Tagged(samples, seed), batch_size=batch, shuffle=seed == 0, collate_fn=collate)


@pytest.mark.parametrize("loss", [token_cross_entropy, transposed])
def test_labels_of_tokens(loss) -> None:
    """With the collator that pads them by -100."""
    task = Task(train=tagging(), val=tagging(32, 1), loss=loss, metrics={"accuracy": token_accuracy})
    config = TrainConfig(epochs=8, optimizer="adamw", lr=2e-2)
    assert Trainer(tagger(), {"vowels": task}, config, quiet=True).fit()["vowels"].val["accuracy"] > 0.95


def test_means_over_tokens_do_not_depend_on_the_batches() -> None:
    """In float64: loss and accuracy of batches of 1, 5 and 32 words are those of all tokens that count. Each is a sum
    of at most 400 terms, rounded to eps = 2^-53 once a term."""
    model = tagger().double().eval()
    task = Task(train=tagging(), loss=token_cross_entropy, metrics={"accuracy": token_accuracy})
    trainer = Trainer(model, {"vowels": task}, quiet=True)
    found = [trainer.evaluate("vowels", tagging(32, 1, batch)) for batch in (1, 5, 32)]
    losses, right = [], []
    with torch.no_grad():
        for item in (Tagged(32, 1)[index] for index in range(32)):
            ids, labels = torch.tensor([item["input_ids"]]), torch.tensor(item["labels"])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), task="vowels").logits[0]
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            right += (logits.argmax(-1) == labels).tolist()
    for values in found:
        assert values["loss"] == pytest.approx(sum(losses) / len(losses), rel=400 * 2**-53 * 8)
        assert values["accuracy"] == pytest.approx(sum(right) / len(right), rel=400 * 2**-53)


def test_losses_of_tokens_on_their_own() -> None:
    outputs = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (3, 4))
    targets[0, 2:] = targets[2, 1] = -100
    assert torch.allclose(token_cross_entropy(outputs, targets), transposed(outputs, targets), rtol=1e-14, atol=0)
    right = [(outputs[i, j].argmax() == targets[i, j]).item() for i in range(3) for j in range(4) if targets[i, j] >= 0]
    assert token_accuracy(outputs, targets) == sum(right) / len(right) and len(right) == 9
    nothing = torch.full((3, 4), -100)
    token_cross_entropy(outputs, nothing).backward()
    assert token_cross_entropy(outputs, nothing) == 0 and not outputs.grad.any()
    assert math.isnan(token_accuracy(outputs, nothing))
    for wrong in (outputs.transpose(1, 2), [outputs]):
        with pytest.raises(ConfigError, match=r"token_cross_entropy: expected outputs \[B, ..., C\] for targets \[3"):
            token_cross_entropy(wrong, targets)


def test_accumulated_tokens_are_one_large_batch() -> None:
    """In float64: the mean over the tokens of both batches, whose numbers differ. One step of size lr = 1; gradients
    are sums over at most 400 tokens and some dozens of products each, so that 1e-12 is hundreds of roundings."""
    made = []
    for batch, accumulate in ((32, 1), (8, 4)):
        model = tagger().double().eval()
        loader = DataLoader(
            Tagged(32), batch_size=batch, collate_fn=transformers.DataCollatorForTokenClassification(texts.tokenizer())
        )
        task = Task(train=loader, val=loader, loss=token_cross_entropy, metrics={})
        config = TrainConfig(epochs=1, accumulate=accumulate, lr=1.0, schedule="constant", momentum=0.0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        Trainer(model, {"vowels": task}, config, quiet=True).fit()
        made.append(model.state("vowels").state_dict())
    for key, value in made[0].items():
        assert torch.allclose(value, made[1][key], rtol=0, atol=1e-12 if value.dtype == torch.float64 else 1e-6), key


def test_the_default_loss_says_which_one_is_meant() -> None:
    task = Task(train=tagging(), val=tagging(32, 1))
    with pytest.raises(ConfigError, match=r"expected outputs \[B, 2, ...\] for F.cross_entropy.*token_cross_en"):
        Trainer(tagger(), {"vowels": task}, quiet=True).fit()
    worse = TaskModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), FullConfig())
    worse.add_task("t", num_classes=3)
    x, y = torch.randn(8, 5, 4), torch.randint(3, (8, 5)) + 1
    task = Task(train=(x, y), val=(x, y), loss=token_cross_entropy, metrics={})
    with pytest.raises(ConfigError, match=r"expected labels from 0 to 2 \(the head\), got 3"):
        Trainer(worse, {"t": task}, quiet=True).fit()
