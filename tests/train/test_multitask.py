"""Several tasks on the same images, some of whose labels are missing."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_joint import config, model_of, same, values
from test_joint import tasks as plain
from torch import Tensor
from torch.utils.data import Dataset, Subset, get_worker_info

from taps_ext import ConfigError, JointTapsConfig, TapsConfig, TaskModel
from taps_ext.train import MultiTask, Task, TrainConfig, Trainer, TrainingInterrupted
from taps_ext.train.joint import JointRun
from taps_ext.train.multitask import LabelBatches, dataset_batches
from taps_ext.train.task import identity

SAMPLES = 32


class Items(Dataset):
    """Images with a label for "a" and "b"; `missing` says which have none, and how that is put."""

    def __init__(self, missing: dict[str, set[int]] | None = None, none: bool = False, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.y = {name: (torch.arange(SAMPLES) + shift) % 3 for shift, name in enumerate("ab")}
        self.x = (torch.randn(SAMPLES, 1, 6, 6, generator=generator) + self.y["a"][:, None, None, None]).to(dtype)
        self.missing, self.none = missing or {}, none
        self.read: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        self.read.append(index)
        gone = [name for name in "ab" if index in self.missing.get(name, ())]
        targets = {name: int(y[index]) for name, y in self.y.items() if name not in gone}
        return self.x[index], targets | ({name: None for name in gone} if self.none else {})


def jobs(items: Items, val: Items | None = None) -> dict[str, Task]:
    train, val = MultiTask(items), MultiTask(val or Items())
    return {name: Task(train=train.task(name), val=val.task(name)) for name in "ab"}


def apart(items: Items) -> dict[str, Task]:
    return {name: Task(train=(items.x, items.y[name]), val=(items.x, items.y[name])) for name in "ab"}


@pytest.mark.parametrize("mix", [None, "proportional", "round-robin"])
def test_with_all_labels_it_is_the_run_on_separate_datasets(mix: str | None) -> None:
    """To the bit, whichever way tasks go through the data."""
    one, other = model_of(), model_of()
    want = Trainer(one, apart(Items()), config(mix=mix), quiet=True).fit("joint")
    found = Trainer(other, jobs(Items()), config(mix=mix), quiet=True).fit("joint")
    assert same(values(one), values(other)) and want["a"].history == found["a"].history


def test_in_step_each_batch_is_read_once() -> None:
    items = Items()
    Trainer(model_of(), jobs(items), config(), quiet=True).fit("joint")
    assert len(items.read) == 3 * SAMPLES + 2 * 2  # each task looks twice at its first item
    assert sorted(items.read[-SAMPLES:]) == list(range(SAMPLES))


def run_of(model: TaskModel, tasks: dict[str, Task]) -> JointRun:
    trainer = Trainer(model, tasks, config(warmup_epochs=0, lr=0.05), quiet=True)
    made = {name: trainer._data(name, task) for name, task in tasks.items()}
    batches, evaluate = ({name: pair[i] for name, pair in made.items()} for i in range(2))
    model.train()
    return JointRun(model, tasks, trainer.config, batches, evaluate)


def step_of(model: TaskModel, tasks: dict[str, Task], names: tuple[str, ...] = ("a", "b")) -> JointRun:
    """A joint run after its first step."""
    run = run_of(model, tasks)
    run._step(names, run.steps_per_epoch)
    return run


@pytest.mark.parametrize("none", [False, True], ids=["absent", "None"])
def test_a_missing_label_is_as_if_the_batch_had_not_the_sample(none: bool) -> None:
    """Gradients, running statistics and the step, in float64 and to the bit, against a batch without the sample."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))[:8]  # the first batch
    gone = {int(order[1]), int(order[4]), int(order[6])}
    items = Items({"b": gone}, none, dtype=torch.float64)
    models = [model_of("ab", JointTapsConfig(lam=0.1)).double() for _ in range(2)]
    run = step_of(models[0], jobs(items, Items(dtype=torch.float64)))
    kept = [int(index) for index in order if int(index) not in gone]
    by_hand = {"a": (items.x[order], items.y["a"][order]), "b": (items.x[kept], items.y["b"][kept])}
    other = run_of(models[1], apart(items))
    for name in "ab":
        other.streams[name] = iter([by_hand[name]])
        other.progress.taken[name] = 4 * 7 + 1  # the stream at hand is read
    other._step(("a", "b"), other.steps_per_epoch)
    grads = [[None if p.grad is None else p.grad for p in r.stepper.parameters] for r in (run, other)]
    assert sum(grad is not None and bool(grad.any()) for grad in grads[0]) > 10
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))
    assert same(values(models[0]), values(models[1]))
    whole = step_of(model_of("ab", JointTapsConfig(lam=0.1)).double(), jobs(Items(dtype=torch.float64)))
    assert not same(values(whole.model), values(models[0]))  # the labels would have counted


def test_a_task_without_labels_in_a_batch_is_not_in_the_step() -> None:
    """Its values, statistics and optimizer state stay, and what is shared gets the other's gradient, not half of it. A
    single label is none: there are no statistics of it."""
    alone = model_of()
    step_of(alone, jobs(Items()), ("a",))
    first = int(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))[0])  # of the first batch
    for gone in (set(range(SAMPLES)) - {first}, set(range(SAMPLES)) - {(first + 1) % SAMPLES, first}):
        model = model_of()
        run = step_of(model, jobs(Items({"b": gone})))
        assert same(values(model), values(alone))
        assert run.progress.taken == {"a": 1, "b": 1} and "b" not in run.progress.seen
    both = model_of()
    step_of(both, jobs(Items()))
    assert not same(values(model), values(both))


def test_what_is_shared_gets_the_mean_over_the_tasks_of_the_step() -> None:
    """Of three tasks one has nothing that counts: the step is that of the two others, whose mean is over two."""
    three = plain("abc")
    nothing = replace(three["c"], train=(three["c"].train[0], torch.full_like(three["c"].train[1], -100)))
    one, other = model_of("abc"), model_of("abc")
    run = step_of(one, {**three, "c": nothing}, ("a", "b", "c"))
    step_of(other, {name: three[name] for name in "ab"})
    assert same(values(one), values(other)) and run.progress.taken == {"a": 1, "b": 1, "c": 1}
    all_of = model_of("abc")
    step_of(all_of, three, ("a", "b", "c"))
    assert not same(values(one), values(all_of))


def test_metrics_are_of_the_samples_that_have_a_label() -> None:
    items = Items({"b": set(range(10, SAMPLES))})
    model = model_of().eval()
    trainer = Trainer(model, jobs(Items()), config(), quiet=True)
    found = trainer.evaluate("b", MultiTask(items).task("b"))
    with torch.no_grad():
        outputs = model(items.x[:10], task="b")
    assert found["accuracy"] == (outputs.argmax(1) == items.y["b"][:10]).sum().item() / 10
    # batches of 8 and 2: means weighted and added, few roundings of 2^-24
    assert found["loss"] == pytest.approx(F.cross_entropy(outputs, items.y["b"][:10]).item(), rel=1e-6)


@pytest.mark.parametrize("mix", [None, "proportional"])
def test_it_resumes_bit_equal(mix: str | None, tmp_path) -> None:
    """Also with the validation split held out of the training data, and random numbers in the dataset."""

    class Noisy(Items):
        def __getitem__(self, index: int):
            x, targets = super().__getitem__(index)
            return x + 0.1 * torch.randn(()), targets

        def identity(self) -> str:
            return "noisy"

    def tasks(loss=F.cross_entropy) -> dict[str, Task]:
        whole = MultiTask(Noisy({"b": set(range(0, SAMPLES, 3)), "a": {1, 2, 3}}))
        return {name: Task(train=whole.task(name), loss=loss) for name in "ab"}

    taken: list[int] = []

    def stopping(outputs: Tensor, targets: Tensor) -> Tensor:
        taken.append(int(torch.is_grad_enabled()))
        if taken[-1] and sum(taken) in (3, 12):
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(outputs, targets)

    settings = {"mix": mix, "val_fraction": 0.2}
    whole, model = model_of(), model_of()
    Trainer(whole, tasks(), config(**settings), quiet=True).fit("joint")
    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            Trainer(model_of(), tasks(stopping), config(tmp_path, **settings), quiet=True).fit("joint")
    Trainer(model, tasks(stopping), config(tmp_path, **settings), quiet=True).fit("joint")
    assert same(values(whole), values(model))


def test_workers_read_the_same() -> None:
    items = Items({"b": set(range(0, SAMPLES, 3))})
    found = []
    for workers in (0, 2):
        made = dataset_batches(MultiTask(items).task("b"), 8, 5, train=True, workers=workers)
        assert isinstance(made, LabelBatches)
        found.append([(x.clone(), y.clone()) for x, y in made.epoch(1)])
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


class Failing(Items):
    def __getitem__(self, index: int):
        if index == 20 and get_worker_info() is not None:
            raise OSError("cannot read image 20")
        return super().__getitem__(index)


@pytest.mark.parametrize("mix", [None, "round-robin"])
def test_an_error_in_a_worker_leaves_no_others(mix: str | None) -> None:
    """In step and apart, whoever holds the traceback; and the same objects can be read again."""
    tasks = jobs(Failing())
    trainer = Trainer(model_of(), tasks, config(mix=mix, num_workers=2), quiet=True)
    for _ in range(2):
        with pytest.raises(OSError, match="cannot read image 20") as held:
            trainer.fit("joint")
        assert held.tb and not multiprocessing.active_children()


def test_what_is_left_off_reading_leaves_no_workers() -> None:
    whole = MultiTask(Items({"b": {5}}))
    made = {name: dataset_batches(whole.task(name), 8, 0, train=True, workers=2) for name in "ab"}
    held = {name: made[name].epoch(0) for name in "aab"}
    next(held["a"]), next(held["a"]), next(held["b"])  # b is behind and reads for itself
    assert len(multiprocessing.active_children()) == 4
    for batches in made.values():
        batches.close()
    assert not multiprocessing.active_children()


def test_tasks_that_are_not_in_step_read_for_themselves() -> None:
    whole = MultiTask(Items({"b": {5}}))
    made = {name: dataset_batches(whole.task(name), 8, 0, train=True, workers=0) for name in "ab"}
    alone = dataset_batches(MultiTask(Items({"b": {5}})).task("b"), 8, 0, train=True, workers=0)
    want = [[y.tolist() for _, y in alone.epoch(e)] for e in range(2)]
    first = made["a"].epoch(0)
    next(first), next(first)
    assert [y.tolist() for _, y in made["b"].epoch(0)] == want[0]  # while a is in the middle of its epoch
    assert [y.tolist() for _, y in made["b"].epoch(1)] == want[1]
    assert [y.tolist() for _, y in made["b"].epoch(1, skip=2)] == want[1][2:]
    assert len(list(first)) == 2


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tasks\['b'\].train: expected items with a target of 'b', got none in 32"):
        Trainer(model_of(), jobs(Items({"b": set(range(SAMPLES))})), config(), quiet=True).fit("joint")
    pairs = [(torch.zeros(1, 6, 6), 0)] * 4
    with pytest.raises(ConfigError, match=r"expected items \(input, \{task: target\}\) .*, got 'targets of type int'"):
        MultiTask(pairs).task("a")[0]
    with pytest.raises(ConfigError, match="data: expected a map-style dataset or a pair of tensors, got int"):
        MultiTask(3)
    one, other = MultiTask(Items()).task("a"), MultiTask(Items()).task("b")
    assert one.identity() == MultiTask(Items()).task("a").identity() != other.identity()  # other labels, another run


def test_which_samples_are_taken_tells_runs_apart() -> None:
    """Of what a dataset says of itself and which of it are taken; of what says nothing, nothing."""

    def of(name: str, indices: range) -> Any:
        return identity(Subset(MultiTask(Items()).task(name), indices), "train")

    assert of("a", range(8)) == of("a", range(8))
    assert len({str(of(*which)) for which in (("a", range(8)), ("b", range(8)), ("a", range(8, 16)))}) == 3
    assert identity(Subset([(1, 2)] * 9, range(8)), "train") == ["Subset", 8, None]


def test_one_task_alone_is_trained_on_its_labels() -> None:
    model = model_of("a", TapsConfig(lam=0.1))
    settings = TrainConfig(epochs=2, batch_size=8, lr=0.1, warmup_epochs=1, accumulate=2)
    whole = MultiTask(Items({"a": {0, 1}}))
    result = Trainer(model, {"a": Task(train=whole.task("a"), val=whole.task("a"))}, settings, quiet=True).fit()["a"]
    assert len(result.history) == 2 and result.history[-1]["loss"] < result.history[0]["loss"]
