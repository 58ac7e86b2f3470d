"""The Trainer: learning, penalty, budget, accumulation, selection, interruption and resumption."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, settle

from taps_ext import ConfigError, FullConfig, ProbeConfig, TapsConfig, TapsError, TaskModel, store
from taps_ext.store import TaskFileError
from taps_ext.store.errors import KindError, MetadataError, UnexpectedTensorError
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted
from taps_ext.train.task import Batches, as_dataset, split_off


def data(samples: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes that differ in which quadrant is bright."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(samples, 3, 8, 8, generator=generator)
    y = torch.arange(samples) % 4
    for i, k in enumerate(y.tolist()):
        x[i, :, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1
    return x, y


def build(config=None, seed: int = 0, dropout: float = 0.0) -> TaskModel:
    torch.manual_seed(seed)
    model = TaskModel(settle(TinyNet(dropout=dropout)), config or TapsConfig(lam=0.5))
    model.add_task("t", num_classes=4)
    return model


def fit(model: TaskModel, resume="auto", task: dict | None = None, **settings):
    config = TrainConfig(**{"epochs": 4, "batch_size": 16, "lr": 0.05, **settings})
    tasks = {"t": Task(**{"train": data(), "test": data(48, 1), **(task or {})})}
    return Trainer(model, tasks, config, quiet=True).fit(resume=resume)["t"]


def tensors(model: TaskModel) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state("t").state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("config", [TapsConfig(lam=0.1), FullConfig(), ProbeConfig()], ids=lambda c: c.method)
def test_learns(config, tmp_path) -> None:
    model = build(config)
    before = Trainer(model, {"t": Task(train=data())}, quiet=True).evaluate("t", data(48, 1))
    result = fit(model, epochs=8, out=str(tmp_path))
    floor = 0.4 if config.method == "probe" else 0.9
    assert before["accuracy"] < floor <= result.test["accuracy"]
    start, *lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (start["event"], start["epoch"]) == ("start", 0)
    assert [line["epoch"] for line in lines] == list(range(8)) and {"val_accuracy", "share"} <= lines[0].keys()
    assert Path(result.file).exists() and not list(tmp_path.glob("*.state"))
    other = TaskModel(build(config).unload())
    other.load_task(result.file)
    x = data()[0]
    assert torch.equal(other.eval()(x, task="t"), model.eval()(x, task="t"))


def test_one_step_by_hand() -> None:
    """One optimizer step equals torch's on gradients that averaging and the penalty define."""
    model = build(TapsConfig(lam=0.5))
    other = build(TapsConfig(lam=0.5))
    x, y = data(16)
    Trainer(
        model,
        {"t": Task(train=(x, y), val=(x, y))},
        TrainConfig(epochs=1, batch_size=16, warmup_epochs=0, lr=0.1, schedule="constant", select="last"),
        quiet=True,
    ).fit()
    optimizer = torch.optim.SGD(other.parameter_groups("t", lr=0.1), momentum=0.9)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    other.train()
    (F.cross_entropy(other(x[order], task="t"), y[order]) + other.sparsity_loss("t")).backward()
    optimizer.step()
    for name, tensor in tensors(other).items():
        assert torch.allclose(tensors(model)[name], tensor, rtol=1e-6, atol=1e-7), name


def test_accumulation_is_the_large_batch() -> None:
    """Without batch statistics 4 x 6 samples averaged are 24 samples, the penalty counted once."""
    results = []
    for batch, accumulate in ((24, 1), (6, 4)):
        model = build(TapsConfig(lam=0.5, norm="frozen"))
        fit(model, batch_size=batch, accumulate=accumulate, epochs=2, warmup_epochs=0, select="last")
        results.append(tensors(model))
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], rtol=1e-4, atol=1e-5), name


def test_uneven_last_chunk_is_weighted_by_samples() -> None:
    """87 samples: a last step of 15 in one batch and of 8 + 7 in two are the same step."""
    results = []
    for batch, accumulate in ((24, 1), (8, 3)):
        model = build(TapsConfig(lam=0.5, norm="frozen"))
        config = TrainConfig(epochs=1, batch_size=batch, accumulate=accumulate, warmup_epochs=0, lr=0.05, select="last")
        Trainer(model, {"t": Task(train=data(87), val=data(8))}, config, quiet=True).fit()
        results.append(tensors(model))
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], rtol=1e-4, atol=1e-5), name


def test_penalty_waits_for_the_warm_up() -> None:
    histories = {}
    for warmup in (0, 3):
        model = build(TapsConfig(lam=20.0))
        histories[warmup] = fit(model, epochs=3, warmup_epochs=warmup, lr=0.02, select="last").history
    assert histories[0][-1]["layers_open"] == 0
    assert all(entry["layers_open"] == 4 for entry in histories[3])


def test_selection_keeps_the_best_validation_epoch() -> None:
    result = fit(build(), epochs=6, lr=0.3, schedule="constant")
    settled = [entry for entry in result.history if entry["epoch"] >= 2]
    assert result.val["accuracy"] == max(entry["val_accuracy"] for entry in settled)
    model = build()
    result = fit(model, epochs=6, lr=0.3, schedule="constant")
    trainer = Trainer(model, {"t": Task(train=data())}, quiet=True)
    held = split_off(as_dataset(data(), "x"), 0.1, 0)[1]
    assert trainer.evaluate("t", held)["accuracy"] == result.val["accuracy"]


def test_same_seed_same_bits_and_the_global_generator_is_left_alone() -> None:
    runs = []
    for _ in range(2):
        model = build(dropout=0.3)
        torch.manual_seed(123)
        fit(model)
        assert torch.initial_seed() == 123 and torch.equal(torch.rand(1), torch.manual_seed(123) and torch.rand(1))
        runs.append(tensors(model))
    assert equal(*runs)
    model = build(dropout=0.3)
    fit(model, seed=1)
    assert not equal(runs[0], tensors(model))


def test_a_finished_task_is_not_trained_again(tmp_path) -> None:
    first = build()
    result = fit(first, out=str(tmp_path))
    stamp = Path(result.file).stat().st_mtime_ns
    second = TaskModel(first.unload(), TapsConfig(lam=0.5))
    second.add_task("t", num_classes=4)
    again = fit(second, out=str(tmp_path))
    assert again == result and Path(result.file).stat().st_mtime_ns == stamp
    assert second.report("t").share == result.share
    fit(second, out=str(tmp_path), resume=False)
    assert Path(result.file).stat().st_mtime_ns != stamp


def test_a_datasets_own_getitem_is_called() -> None:
    """Tensors that a class of the user's happens to hold are not taken behind its back."""

    class Shifted(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            calls.append(1)
            return x, y

    calls: list[int] = []
    fit(build(), epochs=1, task={"train": Shifted(*data()), "val": data(16), "test": None})
    assert len(calls) == 97  # one item is looked at beforehand
    x, y = data()
    assert fit(build(), epochs=1, task={"train": (x.numpy(), y.numpy())}).epoch == 0


def test_mistakes_are_found_before_the_first_step() -> None:
    def loss(outputs, targets):
        raise AssertionError("a step was taken")

    x, y = data()
    with pytest.raises(ConfigError, match=r"tasks\['t'\].val: expected labels from 0 to 3 .the head., got 9"):
        Trainer(build(), {"t": Task(train=(x, y), val=(x, y.clone().fill_(9)))}, quiet=True).fit()
    for arguments, message in [
        ({"labels": [0, 1]}, "labels: expected a list of strings"),
        ({"labels": "abcd"}, "labels: expected a list of strings, got 'abcd'"),
        ({"labels": ["a", "b", "a", "c"]}, "labels: expected different names, got 'a' twice"),
        ({"metrics": {"loss": lambda o, t: 0.0}}, "metrics: expected names other than 'loss'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Task(train=(x, y), **arguments)


def test_a_killed_run_leaves_a_state(tmp_path) -> None:
    """States are saved at the ends of epochs now and then."""
    calls = []

    def broken(outputs, targets):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no such metric")
        return 0.5

    with pytest.raises(RuntimeError, match="no such metric"):
        fit(build(), out=str(tmp_path), task={"metrics": {"m": broken}}, eval_batch_size=256, save_every=0.0)
    assert (tmp_path / "t.state").exists()
    resumed = fit(build(), out=str(tmp_path), task={"metrics": {"m": broken}}, eval_batch_size=256)
    assert len(resumed.history) == 4
    assert len(calls) == 3 + 2 + 1  # two epochs were kept, two are validated now, then the test split


def test_other_data_heads_and_names_are_other_runs(tmp_path) -> None:
    """A finished or interrupted run is taken up only for the same data, head, gates and task."""
    fit(build(), out=str(tmp_path))
    with pytest.raises(ConfigError, match="started with data.train"):
        fit(build(), out=str(tmp_path), task={"train": data(seed=9)})
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5))
    model.add_task("t", num_classes=6)
    with pytest.raises(ConfigError, match="started with head"):
        fit(model, out=str(tmp_path))
    model = build()
    model.set_gates("t", open=["conv1"])
    with pytest.raises(ConfigError, match="started with gates"):
        fit(model, out=str(tmp_path))
    (tmp_path / "t.result.json").write_text("{")
    with pytest.raises(ConfigError, match="t.result.json is damaged"):
        fit(build(), out=str(tmp_path))


def test_names_do_not_share_files(tmp_path) -> None:
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5))
    tasks = {}
    for name in ("a b", "a_b", "a%20b"):
        model.add_task(name, num_classes=4)
        tasks[name] = Task(train=data())
    results = Trainer(model, tasks, TrainConfig(epochs=1, out=str(tmp_path)), quiet=True).fit()
    assert len({r.file for r in results.values()}) == 3 == len(list(tmp_path.glob("*.taps")))


def test_an_interrupt_during_validation_is_not_lost(tmp_path) -> None:
    model = build()
    model.add_task("u", num_classes=4)
    calls = []

    def metric(outputs, targets):
        calls.append(1)
        if len(calls) == 2:  # the last epoch of the first task
            os.kill(os.getpid(), signal.SIGINT)
        return 0.5

    tasks = {"t": Task(train=data(), metrics={"m": metric}), "u": Task(train=data(), metrics={"m": metric})}
    with pytest.raises(TrainingInterrupted, match="stopped before task 'u'"):
        Trainer(model, tasks, TrainConfig(epochs=2, out=str(tmp_path)), quiet=True).fit()
    assert (tmp_path / "t.taps").exists() and not (tmp_path / "u.taps").exists()


def test_nan_metrics_do_not_win_and_the_mode_is_restored() -> None:
    values = iter([float("nan"), 0.5, 0.9, 0.2])
    model = build().eval()
    result = fit(model, warmup_epochs=0, task={"metrics": {"m": lambda o, t: next(values)}, "test": None})
    assert result.epoch == 2 and not model.training


def test_augmentation_draws_anew_for_every_batch() -> None:
    draws = []

    def augment(inputs, generator):
        draws.append(torch.rand(1, generator=generator).item())
        return inputs

    fit(build(), epochs=2, accumulate=3, task={"augment": augment})
    assert len(draws) == len(set(draws)) == 12


def test_resuming_with_other_settings_is_refused(tmp_path) -> None:
    def loss(outputs, targets):
        os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(outputs, targets)

    with pytest.raises(TrainingInterrupted):
        fit(build(), task={"loss": loss}, out=str(tmp_path))
    with pytest.raises(ConfigError, match="started with epochs = 4, got 5"):
        fit(build(), out=str(tmp_path), epochs=5)
    (state,) = tmp_path.glob("*.state")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(TaskFileError, match=r"\.state: .*; another out, or resume=False \(--restart\), starts over"):
        fit(build(), out=str(tmp_path))
    with pytest.raises(TrainingInterrupted, match="nothing was saved"):
        fit(build(), task={"loss": loss})


def _stopping(outputs, targets):
    os.kill(os.getpid(), signal.SIGINT)
    return F.cross_entropy(outputs, targets)


def _stopped(out: Path) -> Path:
    """The state of a run that was stopped in its first epoch."""
    with pytest.raises(TrainingInterrupted):
        fit(build(), task={"loss": _stopping}, out=str(out))
    return out / "t.state"


def test_the_state_is_a_file_of_its_own_kind(tmp_path) -> None:
    file = _stopped(tmp_path)
    record = store.load(file, kind="state")
    assert (record.kind, record.method, record.name, record.parts) == ("state", {}, "t", {})
    model = build()
    with pytest.raises(KindError, match="expected a task file, got a state file, which says where an unfinished"):
        model.load_task(file, "u")
    assert model.tasks == ["t"]


def test_what_is_no_state_is_not_resumed(tmp_path) -> None:
    file = _stopped(tmp_path)
    record = store.load(file)
    build().save_task("t", file)
    with pytest.raises(KindError, match="expected a state file, got a task file; another out, or resume=False"):
        fit(build(), task={"loss": _stopping}, out=str(tmp_path))
    record.values["more:a"] = torch.ones(1)
    store.save(file, record)
    with pytest.raises(UnexpectedTensorError, match="'more:a': expected one of part, optimizer, best, average, random"):
        fit(build(), task={"loss": _stopping}, out=str(tmp_path))
    del record.extra["train.numbers"]
    store.save(file, record)
    with pytest.raises(MetadataError, match=r"train\.numbers: expected a JSON object, got none"):
        fit(build(), task={"loss": _stopping}, out=str(tmp_path))


def test_bf16_autocast_and_clipping_learn() -> None:
    model = build()
    assert fit(model, epochs=8, amp="bf16", clip_norm=1.0).test["accuracy"] > 0.8


def test_clipping_leaves_the_scores_alone() -> None:
    """A tiny clip norm freezes everything else; the scores still move by the penalty."""
    model = build(TapsConfig(lam=1.0))
    before = tensors(model)
    fit(model, epochs=1, clip_norm=1e-12, warmup_epochs=0, select="last", schedule="constant")
    for name, tensor in tensors(model).items():
        if name.endswith("score"):
            assert tensor < before[name]
        elif name.endswith("delta"):
            assert tensor.abs().max() < 1e-10


@pytest.mark.filterwarnings("ignore:.*the training loss is not finite")
def test_a_diverging_loss_is_an_error() -> None:
    with pytest.raises(TapsError, match="epoch 0, batch 3: the training loss is not finite; after 4 such"):
        fit(build(ProbeConfig()), task={"loss": lambda o, t: F.cross_entropy(o, t) * float("nan")})
    with pytest.raises(TapsError, match="epoch 0, batch 3: the training loss is not finite; after 4 such"):
        fit(build(), task={"loss": lambda o, t: F.cross_entropy(o, t) * float("nan")})


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"epochs": 0}, "epochs: expected an int >= 1"),
        ({"lr": -1.0}, "lr: expected a number"),
        ({"lr": math.nan}, "lr: expected a number"),
        ({"optimizer": "sdg"}, "optimizer: expected one of .*did you mean 'sgd'"),
        ({"budget": 1.5}, "budget"),
        ({"amp": "fp8"}, "amp"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": 3}, "betas"),
        ({"accumulate": True}, "accumulate"),
    ],
)
def test_bad_settings_are_named(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_bad_tasks_are_named() -> None:
    model = build()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()))
    for task, message in [
        (Task(train=loader), "got a DataLoader"),
        (Task(train=(torch.zeros(3), torch.zeros(2))), "equal length, got 3 and 2"),
        (Task(train=(torch.zeros(0, 3), torch.zeros(0))), "at least one sample"),
        (Task(train=5), "map-style dataset"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Trainer(model, {"t": task}, quiet=True).fit()
    with pytest.raises(ConfigError, match="expected a Task"):
        Trainer(model, {"t": data()})
    with pytest.raises(ConfigError, match="expected one of .*'t'"):
        Trainer(model, {"u": Task(train=data())})
    with pytest.raises(ConfigError, match="mode: expected one of .*, got 'jont' .did you mean 'joint'"):
        Trainer(model, {"t": Task(train=data())}).fit(mode="jont")
    with pytest.raises(ConfigError, match="budget: task 't' has no learned gates"):
        Trainer(build(ProbeConfig()), {"t": Task(train=data())}, TrainConfig(budget=0.5))
    with pytest.raises(ConfigError, match="unknown key 'epoch' .did you mean 'epochs'"):
        TrainConfig.from_dict({"epoch": 3})
    assert TrainConfig.from_dict(TrainConfig(lr=0.3).to_dict()) == TrainConfig(lr=0.3)


def test_splits_and_batches() -> None:
    x, y = data(100)
    rest, held = split_off(as_dataset((x, y), "train"), 0.2, 3)
    assert len(rest) == 80 and len(held) == 20 and not set(rest.indices) & set(held.indices)
    assert torch.bincount(y[torch.tensor(held.indices)]).tolist() == [5, 5, 5, 5]
    few = torch.tensor([0] * 100 + [1, 1, 2, 2])
    rest_few, held_few = split_off(as_dataset((torch.zeros(104, 1), few), "train"), 0.8, 3)
    assert all(set(few[torch.tensor(part.indices)].tolist()) == {0, 1, 2} for part in (rest_few, held_few))
    batches = Batches(rest, 16, 0, train=True)
    seen = torch.cat([t for _, t in batches.epoch(0)])
    assert len(batches) == 5 and sorted(seen.tolist()) == sorted(y[torch.tensor(rest.indices)].tolist())
    first = [t.tolist() for _, t in batches.epoch(2)]
    assert [t.tolist() for _, t in batches.epoch(2, skip=3)] == first[3:] and [
        t.tolist() for _, t in batches.epoch(3)
    ] != first
    lone = Batches(as_dataset((x[:33], y[:33]), "train"), 16, 0, train=True)
    assert len(lone) == 2 and sum(len(t) for _, t in lone.epoch(0)) == 32  # a batch of one has no statistics
    assert sum(len(t) for _, t in Batches(lone.data, 16, 0, train=False).epoch(0)) == 33
