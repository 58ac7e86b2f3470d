"""compare: which method for which budget, on data of one's own."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import nn

from ..base.head import head_path
from ..base.scan import scan
from ..dense import delta_m
from ..errors import ConfigError, DivergedError
from ..methods import MethodConfig, parse_methods
from ..model import TaskModel
from ..plot.tradeoff import Point, front
from ..profiling import estimate, operations
from ..store import write_text
from ..train import Result, Task, TrainConfig, Trainer
from ..train.loader import batches_of, splits
from ..train.run import quality_of
from ..train.state import advising, same_settings
from ..train.task import as_dataset, targets_of

__all__ = ["Comparison", "Row", "compare", "interval", "parse_methods", "rates"]

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_Z95 = 1.96  # behind them the quantile's expansion in 1 / degrees of freedom, right to 0.02
Tell = Callable[[int, int, str], None]
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
        parameters: values that the task adds. trained: those with a gradient. bytes: of its file; means over the seeds.
        share: of the gated weights that are open.
        step: seconds of the run, its validation among them, over its batches, on the machine as it was.
        peak: predicted bytes of a training step, or None where that cannot be predicted.
        converged: False where the validation metric still rose by more than :data:`RISING` in the last fifth of the
            epochs, by the mean over the seeds, or where a seed's run diverged.
        added: operations of one sample's forward that the task adds to a model that runs other tasks
            (:class:`taps_ext.Operations`), or None where they cannot be counted.
        metric: the task's first; larger: whether more of it is better.
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
    metric: str = "accuracy"
    larger: bool = True


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Where the tasks' first metrics differ, or less of one is better, methods are compared by `delta_m`
    (:func:`taps_ext.dense.delta_m`) over the test splits, against fine-tuning where that is among them, else against
    the first method.

    Attributes:
        rows: one for each method and task. missing: what `max_minutes` cut, or left with fewer seeds, by method and
            task. diverged: those that came to losses that are not finite at every rate.
    """

    rows: list[Row]
    metric: str
    missing: list[tuple[str, str]] = field(default_factory=list)
    diverged: list[tuple[str, str]] = field(default_factory=list)

    def points(self) -> list[Point]:
        """Every method that was trained on all tasks: mean file bytes, mean test metric (or delta_m) in per cent with
        the half-width of its 95 % interval over the seeds (nan where tasks have not as many), and whether it converged
        on every task."""
        tasks = list(dict.fromkeys(row.task for row in self.rows))
        reference = self.reference
        found = []
        for method in dict.fromkeys(row.method for row in self.rows):
            rows = [row for row in self.rows if row.method == method]
            if len(rows) < len(tasks):
                continue
            size = sum(row.bytes for row in rows) / len(rows)
            mean, half = self._value([row.test for row in rows], rows, reference), math.nan
            if len({len(row.tests) for row in rows}) == 1:
                seeds = zip(*(row.tests for row in rows), strict=True)
                mean, half = interval(self._value(tests, rows, reference) for tests in seeds)
            found.append(Point(method, size, mean, half, all(row.converged for row in rows)))
        return found

    @property
    def reference(self) -> list[Row]:
        """What delta_m is taken against: the rows of fine-tuning, or of the first method on all tasks; none where means
        of the metric are compared."""
        tasks = {row.task for row in self.rows}
        if self.metric != "delta_m":
            return []
        by_method: dict[str, list[Row]] = {}
        for row in self.rows:
            by_method.setdefault(row.method, []).append(row)
        complete = [name for name, rows in by_method.items() if {row.task for row in rows} == tasks]
        return by_method[min(complete, key=lambda name: name != "full")] if complete else []

    @staticmethod
    def _value(tests: Sequence[float], rows: Sequence[Row], reference: Sequence[Row]) -> float:
        """The mean of these tests of a method's rows, or their delta_m, in per cent."""
        if not reference:
            return 100 * sum(tests) / len(tests)
        found = {row.task: test for row, test in zip(rows, tests, strict=True)}
        return delta_m(found, {row.task: row.test for row in reference}, {row.task: row.larger for row in reference})

    def front(self) -> list[Point]:
        """Those of :meth:`points` that converged and that no other one beats with files as small."""
        return front(self.points())

    @property
    def sentence(self) -> str:
        """Which method for which budget."""
        best = self.front()
        if not self.rows:
            return "No method has converged on every task: none was trained."
        if not best:
            return "No method has converged on every task: train for more epochs."
        parts = [f"{point.method} from {_size(point.size)} a task ({point.value:.1f} %)" for point in best]
        complete = {point.method for point in self.points() if point.converged}
        left = sorted({row.method for row in self.rows} - complete)
        note = f" Not trained or not converged on every task, and left out: {', '.join(left)}." if left else ""
        of = f"delta_m against {self.reference[0].method}" if self.metric == "delta_m" else f"mean {self.metric}"
        return f"By {of} on the test splits: {'; '.join(parts)}.{note}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: rows, what is missing, the sentence."""
        rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in self.rows]
        left = {"missing": self.missing, "diverged": self.diverged}
        return {"metric": self.metric, "rows": rows, **left, "sentence": self.sentence}

    def table(self) -> str:
        """A table in markdown, and the sentence."""
        head = "metric" if self.metric == "delta_m" else self.metric
        lines = [f"| task | method | lr | test {head} | parameters | file | weights open | added | step | peak |"]
        lines.append("|---|---|---|---|---|---|---|---|---|---|")
        for row in self.rows:
            scale, unit, digits = (1, f" {row.metric}", 4) if self.metric == "delta_m" else (100, " %", 1)
            half = "" if math.isnan(row.half) else f" ± {scale * row.half:.{digits}f}"
            peak = "" if row.peak is None else _size(row.peak)
            added = "" if row.added is None else f"{row.added / 1e6:.1f} MFLOP"
            score = f"{scale * row.test:.{digits}f}{half}{unit}{'' if row.converged else ' (not converged)'}"
            lines.append(
                f"| {row.task} | {row.method} | {row.lr:.3g} | {score} | {row.parameters:,} | {_size(row.bytes)} | "
                f"{100 * row.share:.0f} % | {added} | {1e3 * row.step:.0f} ms | {peak} |"
            )
        lines += ["", self.sentence]
        for what, pairs in (
            ("Cut by the time that was given", self.missing),
            ("Diverged at every rate", self.diverged),
        ):
            if pairs:
                lines.append(f"{what}: {', '.join(f'{method} on {task}' for method, task in pairs)}.")
        return "\n".join(lines)


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
    tell: Tell | None = None,
    heads: Mapping[str, Callable[[nn.Module], nn.Module]] | None = None,
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
        tell: is told about each run before it begins: how many are done, of how many, and which it is.
        heads: of tasks whose head is no linear layer (a decoder), what makes one for a copy of the base.

    Raises:
        ConfigError: bad counts; a task without test split, metric, labels or integer targets, or whose training data
            are no dataset; a method that shares parts between tasks; a run in `out` of other settings.
    """
    config = TrainConfig() if config is None else config
    for name, value in (("seeds", seeds), ("trials", trials)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: expected an int >= 1, got {value!r}")
    for argument, given in (("tasks", tasks), ("methods", methods)):
        if not isinstance(given, Mapping):
            raise ConfigError(f"{argument}: expected a mapping from names, got {type(given).__name__}")
    if not tasks or not methods:
        raise ConfigError("compare: expected tasks and methods, got none")
    for name, settings in methods.items():
        _trained_alone(base, name, settings)
    heads = dict(heads or {})
    classes = {name: None if name in heads else _classes(name, task) for name, task in tasks.items()}
    for name in heads:
        _checked(name, tasks[name])
    metric = _metric(tasks)
    grid = _Grid(
        base, tasks, classes, heads, methods, config, Path(out), max_minutes, tell or (lambda done, total, line: None)
    )
    grid.total = len(tasks) * len(methods) * (trials + seeds - 1)
    found = Comparison([], metric)
    for index, (task, method) in enumerate((task, method) for task in tasks for method in methods):
        grid.done = index * (trials + seeds - 1)
        row = grid.row(method, task, rates(config.lr, trials), seeds)
        if isinstance(row, Row):
            found.rows.append(row)
        elif row == "diverged":
            found.diverged.append((method, task))
    found.missing.extend(grid.missing)
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "comparison.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    return found


def _trained_alone(base: nn.Module, name: str, method: MethodConfig) -> None:
    """Raise ConfigError for a method whose tasks share parts: each task is trained on its own here."""
    if not isinstance(method, MethodConfig):
        raise ConfigError(f"methods[{name!r}]: expected a method config such as TapsConfig, got {method!r:.80}")
    if method.shared(scan(base, head_path(base), target=method.target_modules, exclude=method.exclude_modules)):
        raise ConfigError(
            f"methods[{name!r}]: expected one whose tasks share nothing, since each is trained on its own, got "
            f"{method.method!r}, which shares parts as it is set"
        )


def _checked(name: str, task: Task) -> None:
    if not isinstance(task, Task) or task.test is None:
        raise ConfigError(f"tasks[{name!r}]: expected a Task with a test split")


def _classes(name: str, task: Task) -> int:
    _checked(name, task)
    train = as_dataset(task.train, f"tasks[{name!r}].train")  # its samples are counted
    if task.labels is not None:
        return len(task.labels)
    targets = targets_of(train)
    if targets is None:
        raise ConfigError(
            f"tasks[{name!r}]: expected labels, or integer targets in memory, that say how many classes are"
        )
    return int(targets.max()) + 1


def _metric(tasks: Mapping[str, Task]) -> str:
    """What methods are compared by: the first metric of all tasks, or "delta_m" where these differ or less is better.

    Raises:
        ConfigError: a task without a metric.
    """
    for name, task in tasks.items():
        if not task.metrics:
            raise ConfigError(f"tasks[{name!r}]: expected a metric to compare methods by, got none")
    firsts = {next(iter(task.metrics)) for task in tasks.values()}
    alike = len(firsts) == 1 and all(task.maximize for task in tasks.values())
    return str(firsts.pop()) if alike else "delta_m"


class _Grid:
    def __init__(
        self,
        base: nn.Module,
        tasks: Mapping[str, Task],
        classes: Mapping[str, int | None],
        heads: Mapping[str, Callable[[nn.Module], nn.Module]],
        methods: Mapping[str, MethodConfig],
        config: TrainConfig,
        out: Path,
        max_minutes: float | None,
        tell: Tell,
    ) -> None:
        self.base, self.tasks, self.classes, self.heads, self.methods = base, tasks, classes, heads, methods
        self.config, self.out, self.tell = config, out, tell
        self.until = None if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self.facts: dict[_Run, dict[str, Any]] = {}
        self.missing: dict[tuple[str, str], None] = {}  # in order
        self.total = self.done = 0

    def row(self, method: str, task: str, lrs: list[float], seeds: int) -> Row | str:
        """A row, or why there is none: "missing" where time ran out first, "diverged" where every rate did."""
        known = self.tasks[task]
        tried = [(lr, self.train(_Run(method, task, lr, 0), test=False)) for lr in lrs]
        if any(result == "missing" for _, result in tried):
            return "missing"
        good = [(lr, result) for lr, result in tried if isinstance(result, Result)]
        if not good:
            return "diverged"
        lr = max(good, key=lambda pair: quality_of(known, pair[1].val))[0]
        results = [self.train(_Run(method, task, lr, seed), test=True) for seed in range(seeds)]
        done = [result for result in results if isinstance(result, Result)]
        if not done:
            return "missing"
        key = next(iter(known.metrics))
        ended = [seed for seed, result in enumerate(results) if isinstance(result, Result)]
        facts = [self.facts[_Run(method, task, lr, seed)] for seed in ended]  # gates open otherwise for each
        sizes = {
            name: round(sum(one[name] for one in facts) / len(facts)) for name in ("parameters", "trained", "bytes")
        }
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
            converged="diverged" not in results and sum(_rise(known, r) for r in done) / len(done) <= RISING,
            step=sum(one["step"] for one in facts) / len(facts),
            peak=facts[0]["peak"],
            added=facts[0]["added"],
            metric=key,
            larger=known.maximize,
            **sizes,
        )

    def train(self, run: _Run, *, test: bool) -> Result | str:
        """One run, or what it came to before: a result, "diverged", or "missing" where there is no time for it."""
        folder = self.out / quote(run.method, safe="") / quote(run.task, safe="") / f"lr-{run.lr:.4g}-seed-{run.seed}"
        diverged = folder / "diverged.json"
        finished = diverged.exists() or (folder.exists() and any(folder.glob("*.result.json")))
        if not finished and self.until is not None and time.monotonic() > self.until:
            self.missing[run.method, run.task] = None
            return "missing"
        if test is False or run.seed:  # the first seed of the chosen rate is a trial's run again
            line = f"{run.method} on {run.task}, lr {run.lr:.3g}, seed {run.seed}"
            self.tell(self.done, self.total, f"{line}{' (done before)' if finished else ''}")
            self.done += 1
        config = replace(self.config, lr=run.lr, seed=run.seed, out=str(folder))
        task = self.tasks[run.task]
        with _model(self.base, self.methods[run.method]) as model:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.seed)
                if run.task in self.heads:
                    model.add_task(run.task, head=self.heads[run.task](model.base))
                else:
                    model.add_task(run.task, num_classes=self.classes[run.task])
            trainer = Trainer(model, {run.task: task if test else replace(task, test=None)}, config, quiet=True)
            settings = trainer._settings(run.task, trainer.tasks[run.task])
            if diverged.exists():
                with advising(diverged):
                    before = json.loads(diverged.read_text(encoding="utf-8"))["settings"]
                same_settings(diverged, before, settings)
                return "diverged"
            try:
                result = trainer.fit()[run.task]
            except DivergedError as error:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(diverged, json.dumps({"error": str(error), "settings": settings}))
                return "diverged"
            self.facts[run] = self._facts(model, run.task, result, folder)
        return result

    def _facts(self, model: TaskModel, name: str, result: Result, folder: Path) -> dict[str, Any]:
        task, state = self.tasks[name], model.state(name)
        data = as_dataset(task.train, f"tasks[{name!r}].train")
        train, _ = splits(task, f"tasks[{name!r}]", self.config.val_fraction, self.config.seed)
        batches = batches_of(train, "train", size=self.config.batch_size, train=True)
        steps = max(1, len(result.history)) * len(batches)
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


def _rise(task: Task, result: Result) -> float:
    """By how much the first metric's best in the last fifth of the epochs is above its best before."""
    sign = 1 if task.maximize else -1
    return rise([sign * entry[f"val_{next(iter(task.metrics))}"] for entry in result.history])


def rise(values: Sequence[float]) -> float:
    """By how much the best of the last fifth is above the best before it; inf where there is nothing before."""
    late = max(1, len(values) // 5)
    return math.inf if len(values) <= late else max(values[-late:]) - max(values[:-late])
