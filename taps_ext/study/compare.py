"""compare: which method for which budget, on data of one's own."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import nn

from ..errors import ConfigError
from ..methods import MethodConfig, parse_methods
from ..model import TaskModel
from ..profiling import estimate, operations
from ..train import Result, Task, TrainConfig, Trainer
from ..train.task import as_dataset, targets_of

__all__ = ["Comparison", "Row", "compare", "interval", "parse_methods", "rates"]

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_Z95 = 1.96  # behind them the quantile's expansion in 1 / degrees of freedom, right to 0.02
RISING = 0.005  # a first metric that rose by more than this in the last fifth of the epochs has not converged


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval (nan for one value)."""
    found = list(values)
    mean = sum(found) / len(found)
    if len(found) < 2:
        return mean, math.nan
    spread = math.sqrt(sum((value - mean) ** 2 for value in found) / (len(found) - 1))
    degrees = len(found) - 1
    quantile = _T95[degrees - 1] if degrees <= len(_T95) else _Z95 + (_Z95**3 + _Z95) / (4 * degrees)
    return mean, quantile * spread / math.sqrt(len(found))


@dataclass(frozen=True)
class Row:
    """One method on one task.

    Attributes:
        tests: the test split's first metric, one for each seed. test, half: their mean and the half-width of its 95 %
            interval (nan for one seed). val: the mean on the validation split.
        lr: the rate that did best on the validation split, of as many as every method had.
        parameters: values that the task adds. trained: those with a gradient. bytes: of its file.
        share: of the gated weights that are open. step: seconds of a step. peak: predicted bytes of a training step, or
            None where that cannot be predicted.
        converged: False where the validation metric still rose in the last fifth of the epochs.
        added: operations of one sample's forward that the task adds to a model that runs other tasks
            (:class:`taps_ext.Operations`), or None where they cannot be counted.
    """

    method: str
    task: str
    lr: float
    tests: tuple[float, ...]
    test: float
    half: float
    val: float
    parameters: int
    trained: int
    bytes: int
    share: float
    step: float
    peak: int | None
    converged: bool
    added: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        rows: one for each method and task. missing: runs that `max_minutes` cut, by method and task.
    """

    rows: list[Row]
    metric: str
    missing: list[tuple[str, str]] = field(default_factory=list)

    def means(self) -> list[tuple[str, float, float]]:
        """(method, mean file bytes, mean test metric) over the tasks, for methods that converged on all of them, the
        smallest files first."""
        tasks = {row.task for row in self.rows}
        found = []
        for method in dict.fromkeys(row.method for row in self.rows):
            rows = [row for row in self.rows if row.method == method]
            if {row.task for row in rows} == tasks and all(row.converged for row in rows):
                count = len(rows)
                found.append((method, sum(r.bytes for r in rows) / count, sum(r.test for r in rows) / count))
        return sorted(found, key=lambda entry: (entry[1], -entry[2]))

    def front(self) -> list[tuple[str, float, float]]:
        """Those of :meth:`means` that no other method beats with files as small."""
        front: list[tuple[str, float, float]] = []
        for entry in self.means():
            if not front or entry[2] > front[-1][2]:
                front.append(entry)
        return front

    @property
    def sentence(self) -> str:
        """Which method for which budget."""
        front = self.front()
        if not front:
            return "No method has converged on every task: train for more epochs."
        parts = [f"{method} from {_size(size)} a task ({100 * score:.1f} %)" for method, size, score in front]
        left = sorted({row.method for row in self.rows} - {method for method, _, _ in self.means()})
        note = f" Not converged on every task, and left out: {', '.join(left)}." if left else ""
        return f"By mean {self.metric} on the test splits: {'; '.join(parts)}.{note}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: rows, what is missing, the sentence."""
        rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in self.rows]
        return {"metric": self.metric, "rows": rows, "missing": self.missing, "sentence": self.sentence}

    def table(self) -> str:
        """A table in markdown, and the sentence."""
        lines = [
            f"| task | method | lr | test {self.metric} | parameters | file | weights open | added | step | peak |"
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|---|")
        for row in self.rows:
            half = "" if math.isnan(row.half) else f" ± {100 * row.half:.1f}"
            peak = "" if row.peak is None else _size(row.peak)
            added = "" if row.added is None else f"{row.added / 1e6:.1f} MFLOP"
            score = f"{100 * row.test:.1f}{half} %{'' if row.converged else ' (not converged)'}"
            lines.append(
                f"| {row.task} | {row.method} | {row.lr:.3g} | {score} | {row.parameters:,} | "
                f"{100 * row.share:.0f} % | {added} | {1e3 * row.step:.0f} ms | {peak} |"
            )
        cut = [f"Cut by the time that was given: {', '.join(f'{m} on {t}' for m, t in self.missing)}."]
        return "\n".join([*lines, "", self.sentence, *(cut if self.missing else [])])


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


class _Run(NamedTuple):
    method: str
    task: str
    lr: float
    seed: int


def rates(lr: float, trials: int) -> list[float]:
    """`trials` learning rates around `lr`, half a decade apart, the middle one first."""
    around = [lr * 10 ** (0.5 * (i - (trials - 1) // 2)) for i in range(trials)]
    return sorted(around, key=lambda rate: (abs(math.log(rate / lr)), rate))


def compare(
    base: nn.Module,
    tasks: Mapping[str, Task],
    methods: Mapping[str, MethodConfig],
    config: TrainConfig | None = None,
    *,
    seeds: int = 3,
    trials: int = 3,
    out: str | Path,
    max_minutes: float | None = None,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Train every task by every method, and say which method does for which budget.

    Each method has the same number of learning rates on the first seed (around `config.lr`), and the one with the best
    validation metric is trained with the other seeds. Test splits are looked at once, of those runs.

    Args:
        base: read, never changed. tasks: name -> data with a test split; the number of classes is that of their labels.
        methods: what the table calls them -> their settings.
        config: of all runs, but for lr, seed and out.
        seeds: runs for each method and task. trials: learning rates.
        out: a folder for all runs; what is there already is not trained again.
        max_minutes: no run is begun after this time; what is missing is named.
        tell: is told about each run.

    Raises:
        ConfigError: bad counts; a task without test split, labels or integer targets.
    """
    config = TrainConfig() if config is None else config
    for name, value in (("seeds", seeds), ("trials", trials)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: expected an int >= 1, got {value!r}")
    if not tasks or not methods:
        raise ConfigError("compare: expected tasks and methods, got none")
    classes = {name: _classes(name, task) for name, task in tasks.items()}
    metric = next(iter(next(iter(tasks.values())).metrics), "loss")
    grid = _Grid(base, tasks, classes, methods, config, Path(out), max_minutes, tell or (lambda line: None))
    rows, missing = [], []
    for task in tasks:
        for method in methods:
            row = grid.row(method, task, rates(config.lr, trials), seeds)
            if row is None:
                missing.append((method, task))
            else:
                rows.append(row)
    found = Comparison(rows, metric, missing)
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "comparison.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    return found


def _classes(name: str, task: Task) -> int:
    if not isinstance(task, Task) or task.test is None:
        raise ConfigError(f"tasks[{name!r}]: expected a Task with a test split")
    if task.labels is not None:
        return len(task.labels)
    targets = targets_of(as_dataset(task.train, f"tasks[{name!r}].train"))
    if targets is None:
        raise ConfigError(
            f"tasks[{name!r}]: expected labels, or integer targets in memory, that say how many classes are"
        )
    return int(targets.max()) + 1


class _Grid:
    def __init__(
        self,
        base: nn.Module,
        tasks: Mapping[str, Task],
        classes: Mapping[str, int],
        methods: Mapping[str, MethodConfig],
        config: TrainConfig,
        out: Path,
        max_minutes: float | None,
        tell: Callable[[str], None],
    ) -> None:
        self.base, self.tasks, self.classes, self.methods = base, tasks, classes, methods
        self.config, self.out, self.tell = config, out, tell
        self.until = None if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self.facts: dict[_Run, dict[str, Any]] = {}

    def row(self, method: str, task: str, lrs: list[float], seeds: int) -> Row | None:
        """None where time ran out first."""
        tried = [(lr, self.train(_Run(method, task, lr, 0), test=False)) for lr in lrs]
        if any(result is None for _, result in tried):
            return None
        known = self.tasks[task]
        lr = max(tried, key=lambda pair: _quality(known, pair[1]))[0]
        results = [self.train(_Run(method, task, lr, seed), test=True) for seed in range(seeds)]
        done = [result for result in results if result is not None]
        if not done:
            return None
        key, facts = next(iter(known.metrics), "loss"), self.facts[_Run(method, task, lr, 0)]
        mean, half = interval(result.test[key] for result in done)
        return Row(
            method=method,
            task=task,
            lr=lr,
            tests=tuple(result.test[key] for result in done),
            test=mean,
            half=half,
            val=sum(result.val[key] for result in done) / len(done),
            share=sum(result.share for result in done) / len(done),
            converged=all(_converged(known, result) for result in done),
            **facts,
        )

    def train(self, run: _Run, *, test: bool) -> Result | None:
        """One run, or what it came to before."""
        folder = self.out / quote(run.method, safe="") / quote(run.task, safe="") / f"lr-{run.lr:.4g}-seed-{run.seed}"
        finished = any(folder.glob("*.result.json")) if folder.exists() else False
        if not finished and self.until is not None and time.monotonic() > self.until:
            return None
        self.tell(f"{run.method} on {run.task}, lr {run.lr:.3g}, seed {run.seed}{' (done before)' if finished else ''}")
        config = replace(self.config, lr=run.lr, seed=run.seed, out=str(folder))
        task = self.tasks[run.task]
        with _model(self.base, self.methods[run.method]) as model:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.seed)
                model.add_task(run.task, num_classes=self.classes[run.task])
            trainer = Trainer(model, {run.task: task if test else replace(task, test=None)}, config, quiet=True)
            result = trainer.fit()[run.task]
            self.facts[run] = self._facts(model, run.task, result, folder)
        return result

    def _facts(self, model: TaskModel, name: str, result: Result, folder: Path) -> dict[str, Any]:
        task, state = self.tasks[name], model.state(name)
        data = as_dataset(task.train, f"tasks[{name!r}].train")
        steps = max(1, len(result.history)) * math.ceil(len(data) / self.config.batch_size)  # type: ignore[arg-type]
        inputs = data[0][0] if isinstance(data[0], (tuple, list)) else None
        peak = added = None
        if isinstance(inputs, torch.Tensor):
            batch = torch.empty(self.config.batch_size, *inputs.shape, dtype=inputs.dtype, device="meta")
            peak = estimate(model, [batch], task=name, optimizer=self.config.optimizer, amp=self.config.amp).peak
            added = operations(model, [batch[:1]], task=name).added
        return {
            "parameters": model.report(name).parameters,
            "trained": sum(p.numel() for p in state.parameters() if p.requires_grad),
            "bytes": next(folder.glob("*.taps")).stat().st_size,
            "step": result.seconds / steps,
            "peak": peak,
            "added": added,
        }


class _model:
    """A TaskModel on the base for the length of a run."""

    def __init__(self, base: nn.Module, config: MethodConfig) -> None:
        self.model = TaskModel(copy.deepcopy(base), config)

    def __enter__(self) -> TaskModel:
        return self.model

    def __exit__(self, *error: Any) -> None:
        self.model.unload()


def _quality(task: Task, result: Result | None) -> float:
    assert result is not None
    key = next(iter(task.metrics), "loss")
    return result.val[key] if task.metrics and task.maximize else -result.val[key]


def _converged(task: Task, result: Result) -> bool:
    """False where the validation metric rose by more than :data:`RISING` in the last fifth of the epochs."""
    key = f"val_{next(iter(task.metrics), 'loss')}"
    sign = 1.0 if task.metrics and task.maximize else -1.0
    values = [sign * entry[key] for entry in result.history]
    late = max(1, len(values) // 5)
    if len(values) <= late:
        return False
    return max(values[-late:]) - max(values[:-late]) <= RISING
