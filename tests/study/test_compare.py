"""Comparing methods: the same trials for each, nothing trained twice, and a sentence that follows from the rows."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import TinyNet, settle
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from taps_ext import (
    Comparison,
    ConfigError,
    DivergedError,
    JointTapsConfig,
    LoraConfig,
    ProbeConfig,
    RcmConfig,
    SeparateLayersConfig,
    TapsConfig,
    compare,
)
from taps_ext.cli import main
from taps_ext.study.compare import Row, interval, parse_methods, rates, rise
from taps_ext.train import Task, TrainConfig, Trainer

module = importlib.import_module("taps_ext.study.compare")  # its function has its name


def data(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % 3
    return torch.randn(samples, 3, 8, 8, generator=generator) + y[:, None, None, None], y


def task() -> Task:
    return Task(train=data(48, 0), val=data(24, 1), test=data(24, 2))


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return settle(TinyNet())


CONFIG = TrainConfig(epochs=2, batch_size=16, lr=0.1, warmup_epochs=1)
METHODS = {"probe": ProbeConfig(), "taps": TapsConfig(lam=0.1)}


def row(method: str, test: float, size: int, *, task: str = "t", converged: bool = True) -> Row:
    return Row(
        method=method,
        task=task,
        lr=0.1,
        tests=(test,),
        test=test,
        half=math.nan,
        val=test,
        parameters=size // 4,
        trained=size // 4,
        bytes=size,
        share=0.0,
        step=0.01,
        peak=None,
        converged=converged,
    )


def test_every_method_has_the_same_trials_and_what_is_there_is_not_trained_again(tmp_path, monkeypatch) -> None:
    told: list[tuple[int, int, str]] = []
    model = base()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = compare(
        model, {"t": task()}, METHODS, CONFIG, seeds=2, trials=2, out=tmp_path, tell=lambda *run: told.append(run)
    )
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert [(r.method, r.task, len(r.tests)) for r in found.rows] == [("probe", "t", 2), ("taps", "t", 2)]
    assert [(done, total) for done, total, _ in told] == [(run, 6) for run in range(6)]
    assert sum(line.startswith("probe") for *_, line in told) == sum(line.startswith("taps") for *_, line in told) == 3
    assert not any("done before" in line for *_, line in told)
    for r in found.rows:
        folders = [tmp_path / r.method / "t" / f"lr-{r.lr:.4g}-seed-{seed}" for seed in range(2)]
        sizes = [next(folder.glob("*.taps")).stat().st_size for folder in folders]
        assert r.bytes == round(sum(sizes) / 2) and r.lr in rates(0.1, 2) and r.peak > 0 and r.step > 0
    assert found.rows[0].added == 2 * 12 * 3 < found.rows[1].added  # a head of one sample
    assert "| added |" in found.table() and "| 0.0 MFLOP |" in found.table()
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert stored == json.loads(json.dumps(found.to_dict()))

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "_run", never)
    again = compare(base(), {"t": task()}, METHODS, CONFIG, seeds=2, trials=2, out=tmp_path)
    assert [(r.tests, r.lr, r.bytes, r.val) for r in again.rows] == [
        (r.tests, r.lr, r.bytes, r.val) for r in found.rows
    ]


def test_time_that_runs_out_is_told(tmp_path) -> None:
    found = compare(base(), {"t": task()}, METHODS, CONFIG, seeds=1, trials=1, out=tmp_path, max_minutes=0.0)
    assert not found.rows and found.missing == [("probe", "t"), ("taps", "t")]
    assert "Cut by the time that was given: probe on t, taps on t." in found.table()
    assert found.sentence == "No method has converged on every task: none was trained."


@pytest.mark.parametrize(
    ("tasks", "methods", "message"),
    [
        ([task()], METHODS, "tasks: expected a mapping from names, got list"),
        ({"t": task()}, [ProbeConfig()], "methods: expected a mapping from names, got list"),
        (
            {"t": task()},
            {"taps": TapsConfig},
            r"methods\['taps'\]: expected a method config such as TapsConfig, got <cl",
        ),
        *(
            (
                {"t": task()},
                {"probe": ProbeConfig(), "late": config},
                r"methods\['late'\]: expected one whose tasks share",
            )
            for config in (
                JointTapsConfig(lam=0.1),
                RcmConfig(start="response"),
                SeparateLayersConfig(bottom=1, joint=True),
            )
        ),
        (
            {
                "t": Task(
                    train=DataLoader(TensorDataset(*data(48, 0)), 16),
                    val=data(24, 1),
                    test=data(24, 2),
                    labels=[*"abc"],
                )
            },
            METHODS,
            r"tasks\['t'\].train: expected a dataset or a pair of tensors, got a DataLoader",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_before_a_run(tasks, methods, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(base(), tasks, methods, CONFIG, seeds=1, trials=1, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_seeds_that_time_cuts_are_told(tmp_path, monkeypatch) -> None:
    """A row of fewer seeds than were asked for is one of what is missing; with more time it is complete."""
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def tell(done: int, total: int, line: str) -> None:
        clock[0] += 61.0 if done == 1 else 0.0  # the first of the two further seeds is the last that begins

    arguments = (base(), {"t": task()}, {"probe": ProbeConfig()}, CONFIG)
    found = compare(*arguments, seeds=3, trials=1, out=tmp_path, max_minutes=1.0, tell=tell)
    assert [len(r.tests) for r in found.rows] == [2] and found.missing == [("probe", "t")]
    found = compare(*arguments, seeds=3, trials=1, out=tmp_path)
    assert [len(r.tests) for r in found.rows] == [3] and not found.missing


def test_points_are_means_over_tasks_with_an_interval_over_seeds() -> None:
    """Seeds .5, .7 and .3, .5 of two tasks: means .4 and .6. Where a task has other seeds than the rest the mean is of
    all that there are, and what it is known to is not told."""
    rows = [
        replace(row("m", 0.6, 10, task="a"), tests=(0.5, 0.7)),
        replace(row("m", 0.4, 30, task="b"), tests=(0.3, 0.5)),
        replace(row("n", 0.6, 10, task="a"), tests=(0.5, 0.6, 0.7)),
        replace(row("n", 0.1, 10, task="b"), tests=(0.1,), converged=False),
    ]
    one, other = Comparison(rows, "accuracy").points()
    assert one[:3] == ("m", 20.0, pytest.approx(50.0)) and one.half == pytest.approx(interval([40.0, 60.0])[1])
    assert other.value == pytest.approx(35.0) and math.isnan(other.half) and not other.converged


def test_the_rate_is_chosen_by_validation_alone(tmp_path, monkeypatch) -> None:
    """The test split says the opposite, and is read once a seed; a rate whose validation is NaN is not chosen."""
    evaluate, read = Trainer.evaluate, []

    def measured(self: Trainer, name: str, split, *, task=None):
        found = evaluate(self, name, split, task=task)
        tests = split is self.tasks[name].test
        read.extend([self.config.lr] if tests else [])
        score = {0: math.nan, 1: 0.9, 2: 0.5}[order.index(self.config.lr)]
        return {**found, "accuracy": 1.0 - score if tests else score}

    order = rates(0.1, 3)
    monkeypatch.setattr(Trainer, "evaluate", measured)
    found = compare(base(), {"t": task()}, {"probe": ProbeConfig()}, CONFIG, seeds=2, trials=3, out=tmp_path)
    assert found.rows[0].lr == order[1] and found.rows[0].val == 0.9 and read == [order[1]] * 2


def test_a_seed_that_diverges_has_not_converged(tmp_path, monkeypatch) -> None:
    fit = Trainer.fit

    def diverge(self: Trainer, **settings):
        if self.config.seed == 1:
            raise DivergedError("not finite")
        return fit(self, **settings)

    monkeypatch.setattr(Trainer, "fit", diverge)
    monkeypatch.setattr(module, "_rise", lambda task, result: 0.0)
    found = compare(base(), {"t": task()}, {"probe": ProbeConfig()}, CONFIG, seeds=3, trials=1, out=tmp_path)
    assert [(len(r.tests), r.converged) for r in found.rows] == [(2, False)]
    assert not found.missing and not found.diverged


@pytest.mark.parametrize(("rises", "converged"), [((0.0, 0.009), True), ((0.002, 0.009), False)])
def test_convergence_is_the_mean_over_the_seeds(rises, converged: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_rise", lambda task, result: left.pop())
    left = list(rises)
    found = compare(base(), {"t": task()}, {"probe": ProbeConfig()}, CONFIG, seeds=2, trials=1, out=tmp_path)
    assert [r.converged for r in found.rows] == [converged] and not left


def test_the_sentence_follows_from_the_rows() -> None:
    """The front of mean accuracy over mean bytes, of methods that converged on every task."""
    rows = [
        *(row(method, test, size, task=t) for t in "ab" for method, test, size in
          (("probe", 0.5, 1000), ("worse", 0.4, 2000), ("lora", 0.8, 3000), ("full", 0.9, 9_000_000))),
        row("late", 0.99, 500, task="a", converged=False),
        row("late", 0.99, 500, task="b"),
        row("half", 0.99, 400, task="a"),
    ]  # fmt: skip
    found = Comparison(rows, "accuracy")
    assert [point.method for point in found.front()] == ["probe", "lora", "full"]
    assert found.sentence == (
        "By mean accuracy on the test splits: probe from 1.0 kB a task (50.0 %); lora from 3.0 kB a task (80.0 %); "
        "full from 9.00 MB a task (90.0 %). Not trained or not converged on every task, and left out: half, late."
    )
    assert found.table().count("\n|") == len(rows) + 1


def test_rates_that_diverge_are_passed_over(tmp_path, monkeypatch) -> None:
    """The largest of three rates comes to NaN; at every rate: said, not tried again, and no row."""
    fit = Trainer.fit

    def diverge(self: Trainer, **settings):
        if self.config.lr > limit:
            raise DivergedError("not finite")
        return fit(self, **settings)

    limit = 0.2
    monkeypatch.setattr(Trainer, "fit", diverge)
    arguments = (base(), {"t": task()}, {"probe": ProbeConfig()}, CONFIG)
    found = compare(*arguments, seeds=1, trials=3, out=tmp_path / "one")
    assert [r.lr < limit for r in found.rows] == [True] and not found.diverged
    limit = 0.0
    found = compare(*arguments, seeds=1, trials=2, out=tmp_path / "all")
    assert not found.rows and found.diverged == [("probe", "t")] and not found.missing
    assert "Diverged at every rate: probe on t." in found.table()
    limit = 1.0  # nothing is tried again
    assert compare(*arguments, seeds=1, trials=2, out=tmp_path / "all").diverged == [("probe", "t")]
    clipped = replace(CONFIG, clip_norm=1.0)  # of which nothing is known
    with pytest.raises(ConfigError, match=r"diverged.json was started with clip_norm = None, got 1.0"):
        compare(*arguments[:3], clipped, seeds=1, trials=2, out=tmp_path / "all")


def test_a_rise_is_told_from_the_last_fifth() -> None:
    assert rise([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(0.1)
    assert rise([0.1] * 8 + [0.05, 0.2]) == pytest.approx(0.1) and rise([0.5] * 8 + [0.1, 0.4]) < 0
    assert rise([0.5]) == math.inf


def test_intervals_and_rates() -> None:
    """Of 1, 2, 3: mean 2, deviation 1, t(2) = 4.303."""
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert math.isnan(interval([1.0])[1])
    assert rates(0.1, 1) == [0.1] and sorted(rates(0.1, 3)) == pytest.approx([0.1 / 10**0.5, 0.1, 0.1 * 10**0.5])
    assert rates(0.1, 3)[0] == 0.1 and len(set(rates(0.1, 4))) == 4


def test_methods_by_name() -> None:
    found = parse_methods("probe,separate:bottom=.1,separate:top=2,lora:4,selective-lora:8:alpha=8,taps:lam=0.3")
    assert found == {
        "probe": ProbeConfig(),
        "separate:bottom=.1": SeparateLayersConfig(fraction=0.1, side="bottom"),
        "separate:top=2": SeparateLayersConfig(top=2),
        "lora:4": LoraConfig(rank=4),
        "selective-lora:8:alpha=8": LoraConfig(rank=8, alpha=8, selective=True, lam=0.5),
        "taps:lam=0.3": TapsConfig(lam=0.3),
    }
    for text, message in {
        "prob": "methods: prob: method: expected one of .* got 'prob' .did you mean 'probe'",
        "lora:rnk=3": "methods: lora:rnk=3: lora: unknown key 'rnk' .did you mean 'rank'",
        "lora:rank=": "methods: expected key=value, got 'rank='",
        "probe,probe": "methods: expected different ones, got 'probe' twice",
        "selective-lora:8,lam=0.1": "methods: expected a method's name, got 'lam=0.1'; several settings stand behind",
        "lora:rank=x": "methods: lora:rank=x: rank: expected an int >= 1, got 'x'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_methods(text)


def test_mistakes_are_told(tmp_path) -> None:
    for settings, message in (
        ({"seeds": 0}, "seeds: expected an int >= 1, got 0"),
        ({"trials": True}, "trials: expected an int >= 1, got True"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(base(), {"t": task()}, METHODS, CONFIG, out=tmp_path, **settings)
    with pytest.raises(ConfigError, match=r"tasks\['t'\]: expected a Task with a test split"):
        compare(base(), {"t": Task(train=data(8, 0))}, METHODS, CONFIG, out=tmp_path)
    with pytest.raises(ConfigError, match=r"tasks\['t'\]: expected a metric to compare methods by, got none"):
        compare(base(), {"t": replace(task(), metrics={})}, METHODS, CONFIG, out=tmp_path)
    with pytest.raises(ConfigError, match="compare: expected tasks and methods, got none"):
        compare(base(), {"t": task()}, {}, CONFIG, out=tmp_path)


def test_tasks_of_different_metrics_are_compared_by_delta_m() -> None:
    facts = {"lr": 0.1, "half": math.nan, "val": 0.0, "trained": 1, "share": 1.0, "step": 0.1, "peak": None}
    facts |= {"converged": True, "parameters": 1}
    rows = [
        Row(method=m, task=t, test=value, tests=(value,), bytes=size, metric=name, larger=larger, **facts)
        for m, size, values in (("probe", 10, (0.45, 0.2)), ("full", 100, (0.5, 0.1)))
        for t, name, larger, value in zip("sd", ("miou", "rmse"), (True, False), values, strict=True)
    ]
    found = Comparison(rows, "delta_m")
    # of probe: -10 % of mIoU, and twice the error
    assert {point.method: round(point.value, 9) for point in found.points()} == {"probe": -55.0, "full": 0.0}
    assert "delta_m against full" in found.sentence
    assert "| d | probe | 0.1 | 0.2000 rmse |" in found.table()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the built-in sources need scikit-learn")
    file = tmp_path / "parity.toml"
    file.write_text(
        '[base]\nmodel = "python:taps_ext.zoo.small_resnet"\nnum_classes = 10\nargs = { stem_stride = 4, blocks = 1 }\n'
        "[data]\nsize = 16\nchannels = 1\n[train]\nepochs = 1\nbatch_size = 256\nwarmup_epochs = 0\n"
        '[tasks.parity]\nsource = "digits:parity"\n'
    )
    command = ["compare", str(file), "--methods", "probe,lora:2", "--seeds", "1", "--trials", "1"]
    assert main([*command, "--out", str(tmp_path / "out"), "--plot", str(tmp_path / "plot.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found["rows"]] == ["probe", "lora:2"] and (tmp_path / "plot.png").exists()
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "| parity | lora:2 |" in capsys.readouterr().out
    assert main([*command[:3], "prob", "--out", str(tmp_path / "out")]) == 2
