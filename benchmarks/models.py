"""The model matrix: what a task over each model of the catalogue does, beside the plain model it should be.

    python benchmarks/models.py --json benchmarks/results/models.json [--only "timm:*" ...] [--again] [--docs PAGE]

Each model is built with random weights, wrapped with `TapsConfig(lam=0.5)` and given a task, and then must keep all of
these promises, each checked whether or not another one broke:

exact   in float64, random Deltas, all gates open: outputs are those of a plain model, built by the same function, into
        which W + Delta, the task's norms and its head are written by name (to 1e-9); so are all gradients (those of a
        Delta and a score to their rounding to float32); layers whose weights have a gradient there change the
        output when they are opened alone
closed  all gates closed, with NaN in every Delta: the plain model with the head, bit for bit
left    each parameter of more than a thousandth of the base's is gated, the task's own, or named in the report
files   two training steps, saved, loaded into a fresh base: outputs bit for bit; merged: those of layers that are not
        fused and of the plain model with the values written in, bit for bit; unmerged, unloaded: as before, bit for bit
full    one step of full fine-tuning in training mode: losses and all values of the plain model's step
base    without a task the base's own outputs, bit for bit

What a refusal asks for is then done, and all promises are checked again. Rows of the same code (a digest of the package
and of these files) are not measured again. The exit code is 1 if a model crashed or is wrong.
"""

from __future__ import annotations

import argparse
import ast
import copy
import fnmatch
import functools
import hashlib
import importlib.metadata
import json
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from model_catalogue import MODELS, Entry
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import taps_ext
from taps_ext import FullConfig, TapsConfig, TapsError, TaskModel
from taps_ext.parts.host import NORM_TYPES

CLASSES = 7
LAYERS = 40  # that are opened alone, evenly spread, of models that have more
ROUNDS = 4  # of doing what refusals ask for
SECONDS = 240  # a model that takes longer has crashed
ROOT = Path(__file__).resolve().parent.parent
EPS = torch.finfo(torch.float32).eps
OUTCOMES = ("works", "refused", "crashed", "wrong")


class Wrong(Exception):
    """A promise that a model broke without a word."""


def expect(holds: bool, promise: str) -> None:
    if not holds:
        raise Wrong(promise)


# -- running a model, whatever it takes and returns


def tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output, whatever holds them."""
    if is_dataclass(output) and not isinstance(output, (dict, type)):
        output = [getattr(output, field.name) for field in fields(output)]
    found = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() else []
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors(leaf)
    return found


def call(entry: Entry, model: nn.Module, **task: Any) -> list[Tensor]:
    """The model's outputs on the entry's inputs, in the default type; random draws (dropout) are the same each time."""
    given = entry.targets() if model.training and entry.targets else entry.inputs()
    dtype = torch.get_default_dtype()
    args, kwargs = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, given)
    torch.manual_seed(5)
    return tensors(model(*args, **kwargs, **task))


@torch.no_grad()
def infer(entry: Entry, model: nn.Module, **task: Any) -> list[Tensor]:
    found = call(entry, model, **task)
    expect(any(t.numel() for t in found), "the outputs hold values")
    return found


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def apart(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """How far two lists of outputs lie apart, for messages."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return f"shapes {[tuple(t.shape) for t in ours]} and {[tuple(t.shape) for t in theirs]}"
    errors = [error(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return f"off by {max(errors, default=0.0):.1e} of the largest value"


def error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest finite value of `b`."""
    a, b = a.detach().double(), b.detach().double()
    off = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).max().item()
    return off / (torch.where(b.isfinite(), b, 0).abs().max().item() or 1.0) if off else 0.0


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A scalar in which every value that can learn counts differently."""
    generator = torch.Generator().manual_seed(6)
    terms = []
    for output in outputs:
        if output.requires_grad and output.numel():
            weights = torch.rand(output.shape, generator=generator).to(output.dtype) - 0.2
            terms.append((output * weights).sum() / output.numel() ** 0.5)
    expect(bool(terms), "an output requires a gradient")
    return torch.stack([term.to(terms[0].dtype) for term in terms]).sum()


@contextmanager
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def unfused() -> Iterator[None]:
    """No layer is fused: sums are those of the stock ops on whole weights, as they are when merged; nor is attention,
    of which torch has another product for weights that nobody reads."""
    extension, fast = taps_ext.ops._C, torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if extension is not None:
        extension.force_path("rebuild")
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if extension is not None:
            extension.force_path(None)


# -- a model, its task, and the plain model that the task should be


@torch.no_grad()
def build(entry: Entry) -> nn.Module:
    """A model with random weights in which nothing is an identity or asleep by accident: vectors that are constant
    (norms, biases, scales of 1e-6) and weights that are zero get values of their own."""
    torch.manual_seed(0)
    model = entry.build().to(torch.get_default_dtype())
    if torch.get_default_dtype() == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    generator = torch.Generator().manual_seed(1)

    def random(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like.dtype) * (high - low) + low

    for key, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel() or parameter.min() != parameter.max():
            continue
        value = parameter.flatten()[0].item()
        if value != 0:
            parameter.copy_(random(parameter, 0.5, 1.5) * (value if abs(value) > 1e-3 else 0.5))
        elif parameter.dim() > 1:
            parameter.copy_(random(parameter, -0.1, 0.1))
        else:  # few ReLUs then sleep for every sample
            parameter.copy_(random(parameter, -0.1, 0.5 if key.endswith("bias") else 0.1))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(random(module.running_mean, -0.1, 0.1))
            module.running_var.copy_(random(module.running_var, 0.9, 1.1))
    return model.eval()


@functools.lru_cache(maxsize=2)
def _built(entry: Entry, dtype: torch.dtype) -> nn.Module:
    return build(entry)


def fresh(entry: Entry) -> nn.Module:
    """What :func:`build` makes, sooner."""
    return copy.deepcopy(_built(entry, torch.get_default_dtype()))


@dataclass(frozen=True)
class Remedy:
    """What refusals ask for: globs to exclude, to leave what cannot be gated to the base, the names of classifiers, a
    first forward in training mode."""

    exclude: tuple[str, ...] = ()
    unsupported: str = "raise"
    heads: tuple[str, ...] = ()
    train_first: bool = False

    def after(self, failed: dict[str, dict[str, str]]) -> Remedy:
        """With what these messages ask for."""
        exclude, unsupported, heads, first = list(self.exclude), self.unsupported, self.heads, self.train_first
        for failure in failed.values():
            message = failure["message"]
            if "unsupported='freeze'" in message:
                unsupported = "freeze"
            elif found := re.search(r"say head_module=(\[.*?\])", message):
                heads = tuple(ast.literal_eval(found[1]))
            elif "run one forward in train() mode first" in message and not self.train_first:
                first = True
            elif found := re.search(r"exclude_modules \((\[.*?\])\)", message):
                exclude += ast.literal_eval(found[1])
            elif found := re.search(r"never called forward on (.*?), so their", message):
                exclude += found[1].split(", ")
        return Remedy(tuple(dict.fromkeys(exclude)), unsupported, heads, first)


def wrap(entry: Entry, base: nn.Module, remedy: Remedy, method: Any = TapsConfig) -> TaskModel:
    settings = {"lam": 0.5} if method is TapsConfig else {}
    config = method(**settings, exclude_modules=list(remedy.exclude) or None)
    return TaskModel(base, config, unsupported=remedy.unsupported, head_module=list(remedy.heads) or None).eval()


def adapt(entry: Entry, base: nn.Module, remedy: Remedy, method: Any = TapsConfig) -> TaskModel:
    model = wrap(entry, base, remedy, method)
    torch.manual_seed(2)
    model.add_task("t", num_classes=None if entry.own_head or model._head is None else CLASSES)
    if remedy.train_first and method is TapsConfig:  # the step of check_full begins where the plain model's does
        call(entry, model.train(), task="t")
        model.eval()
    return model


@torch.no_grad()
def fill(model: TaskModel, scale: float) -> None:
    """Random Deltas, each `scale` times as large as its weight on average, and norms of the task's own."""
    generator = torch.Generator().manual_seed(3)
    named = dict(model.base.named_parameters(remove_duplicate=False))
    for name, part, _ in model.state("t").gated():
        delta = part.change.delta
        size = float(named[weight_of(name, named)].float().std(correction=0)) or 1.0
        delta.copy_(torch.randn(delta.shape, generator=generator) * scale * size)
    for _, part in own_parts(model):
        for parameter in part.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator).to(parameter.dtype))


@torch.no_grad()
def gates(model: TaskModel, opened: set[str] | None) -> None:
    for name, part, _ in model.state("t").gated():
        part.gate.score.fill_(0.15 if opened is None or name in opened else 0.05)


def weight_of(name: str, named: Iterable[str]) -> str:
    """The base's name of the parameter that is gated under `name`."""
    return next(n for n in (name, f"{name}.weight", f"{name}.in_proj_weight", "weight") if n in named)


def own_parts(model: TaskModel) -> list[tuple[str, nn.Module]]:
    """What a task has of its own beside gated layers and its head."""
    state = model.state("t")
    return [(n, part) for n, part in state.table.items() if part.gate is None and part.replacement is None]


def heads_of(model: TaskModel) -> dict[str, nn.Module]:
    """The task's own heads, by the names of the base's."""
    return {n: part.replacement for n, part in model.state("t").table.items() if part.replacement is not None}


@torch.no_grad()
def plain_of(entry: Entry, model: TaskModel) -> tuple[nn.Module, dict[str, Any]]:
    """A plain model that is what the task should be, and by name what of the task stands for each parameter."""
    plain, state = fresh(entry), model.state("t")
    named = dict(plain.named_parameters(remove_duplicate=False))
    held = {**named, **dict(plain.named_buffers(remove_duplicate=False))}
    stands: dict[str, Any] = {}
    for name, part, _ in state.gated():
        full = weight_of(name, named)
        if part.gate.score is None or float(part.gate.score) >= state.config.threshold:
            parent, _, key = full.rpartition(".")
            new = nn.Parameter(named[full] + part.change.delta.to(named[full].dtype))
            plain.get_submodule(parent)._parameters[key] = named[full] = held[full] = (
                new  # also one of two that were tied
            )
        stands[full] = part
        if part.bias is not None:
            bias = full.removesuffix("weight") + "bias"
            held[bias].copy_(part.bias)
            stands[bias] = part.bias
    for name, part in own_parts(model):
        for key, tensor in (*part.named_parameters(), *part.named_buffers()):
            full = f"{name}.{key}" if name else key
            held[full].copy_(tensor)
            if full in named:
                stands[full] = tensor
    for path, head in heads_of(model).items():
        replace(plain, path, head)
        stands.update({f"{path}.{key}": parameter for key, parameter in head.named_parameters()})
    return plain, stands


def replace(plain: nn.Module, path: str, head: nn.Module) -> None:
    """Put a copy of a task's head in the place of the plain model's."""
    old = plain.get_submodule(path)
    names = [name for name, module in plain.named_modules(remove_duplicate=False) if module is old]
    head = copy.deepcopy(head).requires_grad_(True)
    for name in names:
        parent, _, key = name.rpartition(".")
        setattr(plain.get_submodule(parent), key, head)


def leave(plain: nn.Module, model: TaskModel, trained: set[str]) -> None:
    """Freeze all other parameters, those that were one tensor with a trained one for themselves, and norms that are not
    the task's, which stay in evaluation mode."""
    own = {name for name, _ in own_parts(model)}
    for name, module in plain.named_modules():
        if isinstance(module, NORM_TYPES) and name not in own:
            module.eval()
    for name, parameter in list(plain.named_parameters(remove_duplicate=False)):
        if name not in trained:
            module, _, key = name.rpartition(".")
            plain.get_submodule(module)._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=False)


def runs_of(entry: Entry, plain: nn.Module) -> Callable[[str], int]:
    """Counts how often a module's forward ran since; 1 for a weight that is used without one."""
    counts: Counter[str] = Counter()
    for name, module in plain.named_modules(remove_duplicate=False):
        module.register_forward_pre_hook(lambda module, args, name=name: counts.update([name]))
    return lambda parameter: max(1, counts[parameter.rpartition(".")[0]])


# -- the promises


def check_exact(entry: Entry, remedy: Remedy, row: dict[str, Any]) -> None:
    with in_double():
        model = adapt(entry, fresh(entry), remedy)
        fill(model, 0.1)
        plain, stands = plain_of(entry, model)
        if entry.targets:
            model.train()
            plain.train()
        runs = runs_of(entry, plain)
        ours, theirs = call(entry, model, task="t"), call(entry, plain)
        expect([t.shape for t in ours] == [t.shape for t in theirs], f"the outputs' shapes: {apart(ours, theirs)}")
        row["output_error"] = max(error(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel())
        expect(row["output_error"] <= 1e-9, f"outputs are those of W + Delta ({row['output_error']:.1e})")
        loss_of(ours).backward()
        loss_of(theirs).backward()
        asleep = check_gradients(plain, stands, runs, row)
        model.zero_grad()
        check_each_layer_counts(entry, model, asleep)


def check_gradients(
    plain: nn.Module, stands: dict[str, Any], runs: Callable[[str], int], row: dict[str, Any]
) -> set[str]:
    """Compare the gradients of all that stands for a parameter; returns the weights without one in the plain model."""
    named = dict(plain.named_parameters(remove_duplicate=False))
    asleep, worst = set(), 0.0
    # What mathematics makes zero (keys where all values are one) is the noise of sums in float64.
    noise = 1e-12 * max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None and p.numel())
    for full, mine in stands.items():
        want = named[full].grad
        gated = not isinstance(mine, Tensor)
        got = mine.change.delta.grad if gated else mine.grad
        if want is None or not want.numel() or float(want.abs().max()) <= noise:
            none = got is None or not got.numel() or float(got.abs().max()) <= 2 * noise
            expect(none, f"{full}: no gradient, as in the plain model")
            asleep |= {full} if gated else set()
            continue
        expect(got is not None, f"{full}: a gradient")
        off = max(0.0, error(got, want) - noise / float(want.abs().max()))
        if not gated:
            expect(off <= 1e-9, f"{full}: its gradient is the plain model's ({off:.1e})")
            continue
        # Each run's gradient is rounded to float32 once, as is each of their sums: at most 2 runs - 1 times half an
        # eps of a partial sum, of which none is taken to be above twice the whole.
        bound = 2 * runs(full) * EPS
        expect(off <= bound, f"{full}: dDelta is dW_t ({off:.1e}, bound {bound:.1e})")
        delta = mine.change.delta.detach().double()
        score, spread = float((want * delta).sum()), float(want.norm() * delta.norm()) or 1.0
        off_score = abs(float(mine.gate.score.grad) - score) / spread
        expect(off_score <= bound, f"{full}: ds is <dW_t, Delta> ({off_score:.1e}, bound {bound:.1e})")
        worst = max(worst, off)
    row["gradient_error"], row["asleep"] = worst, len(asleep)
    return asleep


def check_each_layer_counts(entry: Entry, model: TaskModel, asleep: set[str]) -> None:
    fill(model, 3.0)  # large enough to wake a ReLU that sleeps for every sample
    gates(model, set())
    closed = infer(entry, model, task="t")
    named = dict(model.base.named_parameters(remove_duplicate=False))
    names = [name for name, _, _ in model.state("t").gated() if weight_of(name, named) not in asleep]
    for name in names[:: -(-len(names) // LAYERS) or 1]:
        gates(model, {name})
        expect(not same(infer(entry, model, task="t"), closed), f"{name} opened alone changes the output")


def check_closed(entry: Entry, remedy: Remedy, row: dict[str, Any]) -> None:
    model = adapt(entry, fresh(entry), remedy)
    plain, _ = plain_of(entry, model)
    plain.eval().requires_grad_(False)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.fill_(float("nan"))
    gates(model, set())
    ours, theirs = infer(entry, model, task="t"), infer(entry, plain)
    expect(same(ours, theirs), f"all closed is the plain model with the head, bit for bit: {apart(ours, theirs)}")


def check_left(entry: Entry, remedy: Remedy, row: dict[str, Any]) -> None:
    base = fresh(entry)
    model = adapt(entry, base, remedy)
    report = model.report("t")
    _, stands = plain_of(entry, model)
    counted = {name: parameter.numel() for name, parameter in base.named_parameters()}
    total = sum(counted.values())
    heads = tuple(f"{path}." for path in heads_of(model))
    expect(report.base_parameters == total, "the report counts the base's parameters")
    row.update(parameters=total, gated=report.gated / total, layers=len(report.rows))
    row["left"] = sum(report.left.values()) / total
    by_id: dict[int, set[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), set()).add(name)
    for name, parameter in base.named_parameters():
        if 1000 * counted[name] <= total:
            continue
        names = by_id[id(parameter)]
        mine = any(n in stands or n.startswith(heads) for n in names)
        listed = any(n in report.left for n in names)
        expect(mine or listed, f"{name} ({counted[name]} values) is gated, the task's, or in the report")


def check_files(entry: Entry, remedy: Remedy, row: dict[str, Any]) -> None:
    base = fresh(entry)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapt(entry, base, remedy)
    fill(model, 0.02)
    model.train()
    optimizer = torch.optim.SGD(model.parameter_groups("t", lr=1e-3), momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        (loss_of(call(entry, model, task="t")) + model.sparsity_loss("t")).backward()
        optimizer.step()
    model.eval()
    want = infer(entry, model, task="t")
    with tempfile.TemporaryDirectory() as folder:
        row["bytes"] = model.save_task("t", Path(folder) / "t.taps")
        loaded = wrap(entry, build(entry), remedy)
        loaded.load_task(Path(folder) / "t.taps")
    got = infer(entry, loaded, task="t")
    expect(same(got, want), f"a file loaded into a fresh base gives the same outputs: {apart(got, want)}")
    with unfused():
        stock = infer(entry, model, task="t")
    plain, _ = plain_of(entry, model)
    with unfused():
        got = infer(entry, plain.eval().requires_grad_(False))
    expect(same(got, stock), f"W + Delta written into a plain model gives the same outputs: {apart(got, stock)}")
    model.merge_task("t")
    with unfused():
        got = infer(entry, model, task="t")
    expect(same(got, stock), f"merged, the outputs are the same: {apart(got, stock)}")
    model.unmerge_task()
    got = infer(entry, model, task="t")
    expect(same(got, want), f"merge, then unmerge, gives the same outputs: {apart(got, want)}")
    after = model.unload().state_dict()
    kept = list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    expect(kept, "unload gives the base's state_dict back")


def check_full(entry: Entry, remedy: Remedy, row: dict[str, Any]) -> None:
    rate = 1e-2
    with in_double():
        model = adapt(entry, fresh(entry), remedy, FullConfig)
        plain = fresh(entry)
        for path, head in heads_of(model).items():
            replace(plain, path, head)
        runs = runs_of(entry, plain)
        model.train()
        plain.train()
        if remedy != Remedy():
            leave(plain, model, set(plain_of(entry, model)[1]))
        losses = [loss_of(call(entry, model, task="t")), loss_of(call(entry, plain))]
        off = error(*losses)
        expect(off <= 1e-9, f"the loss is the plain model's ({off:.1e})")
        for loss, groups in zip(losses, (model.parameter_groups("t", lr=rate), plain.parameters()), strict=True):
            optimizer = torch.optim.SGD(groups, lr=rate)
            loss.backward()
            optimizer.step()
        named = dict(model.base.named_parameters(remove_duplicate=False))
        deltas = {weight_of(n, named) for n, _, _ in model.state("t").gated()}
        ours = model.merge_and_unload("t").state_dict()
        gradients = {name: p.grad for name, p in plain.named_parameters(remove_duplicate=False)}
        theirs = plain.state_dict()
        expect(list(ours) == list(theirs), f"the state's names: {sorted(ours.keys() ^ theirs.keys())}")
        for name, value in theirs.items():
            if not value.is_floating_point() or not value.numel():
                expect(torch.equal(ours[name], value), f"{name}: the plain model's after a step")
                continue
            bound = 1e-9 * float(value.abs().max())
            gradient = gradients.get(name)
            if name in deltas and gradient is not None:  # a Delta is -rate * dW_t, each in float32: as in check_exact
                bound += 2 * (runs(name) + 1) * EPS * rate * float(gradient.abs().max())
            moved = float((ours[name] - value).abs().max())
            expect(moved <= bound, f"{name}: the plain model's after a step (off by {moved:.1e}, bound {bound:.1e})")


def check_base(entry: Entry, remedy: Remedy, row: dict[str, Any]) -> None:
    plain = fresh(entry).requires_grad_(False)  # torch picks some products by that flag
    model = adapt(entry, fresh(entry), remedy)
    theirs = infer(entry, plain)
    for active in (None, "t"):
        model.set_task(active)
        ours = infer(entry, model, task=None)
        expect(same(ours, theirs), f"without a task the base, bit for bit: {apart(ours, theirs)}")


PROMISES: dict[str, Callable[[Entry, Remedy, dict[str, Any]], None]] = {
    "left": check_left,
    "exact": check_exact,
    "closed": check_closed,
    "files": check_files,
    "full": check_full,
    "base": check_base,
}


# -- rows


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(entry: Entry, remedy: Remedy, row: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Every promise; what became of those that were not kept."""
    failed = {}
    for promise, run in PROMISES.items():
        try:
            with limited(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(entry, remedy, row)
            continue
        except Wrong as broken:
            outcome, message = "wrong", str(broken)
        except TapsError as refusal:
            outcome, message = "refused", f"{type(refusal).__name__}: {refusal}"
        except Exception as crash:  # whatever a model does, the others still have their turn
            outcome, message = "crashed", f"{type(crash).__name__}: {crash}"
        failed[promise] = {"outcome": outcome, "message": message}
    return failed


def worst(failed: dict[str, dict[str, str]]) -> str:
    return max((failure["outcome"] for failure in failed.values()), key=OUTCOMES.index, default="works")


def check(entry: Entry) -> dict[str, Any]:
    """One model's row: `failed` has what became of each promise that was not kept, and of a model that is refused
    `remedied` what still fails where its user does what the refusal asks for."""
    started = time.perf_counter()
    row: dict[str, Any] = {"model": entry.name, "kind": entry.kind}
    row["failed"] = attempt(entry, Remedy(), row)
    row["outcome"] = worst(row["failed"])
    remedy, failed = Remedy(), row["failed"]
    while worst(failed) == "refused" and row.get("rounds", 0) < ROUNDS and (more := remedy.after(failed)) != remedy:
        remedy, row["rounds"] = more, row.get("rounds", 0) + 1
        failed = row["remedied"] = attempt(entry, remedy, row)
        row["outcome"] = max("refused", worst(failed), key=OUTCOMES.index)
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def code() -> str:
    """Of what a row's outcome depends on here: the package and these two files."""
    files = [*sorted((ROOT / "taps_ext").rglob("*.py")), *sorted(Path(__file__).parent.glob("model*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    share = f"{100 * row['gated']:.1f}" if "gated" in row else ""
    left = f"{100 * row['left']:.1f}" if "left" in row else ""
    size = f"{row['parameters'] / 1e3:,.0f}" if "parameters" in row else ""
    name, kind = row["model"], row["kind"]
    outcome = row["outcome"] + (f" ({', '.join(row['failed'])})" if row["failed"] else "")
    outcome += "; as it asks: works" if row.get("remedied") == {} else ""
    return f"| {name} | {kind} | {outcome} | {size} | {share} | {left} | {row['seconds']} |"


def failures(row: dict[str, Any]) -> list[str]:
    """What failed, each message once."""
    by_message: dict[tuple[str, str], list[str]] = {}
    again = {f"{promise} as asked": failure for promise, failure in row.get("remedied", {}).items()}
    for promise, failure in {**row["failed"], **again}.items():
        by_message.setdefault((failure["outcome"], failure["message"]), []).append(promise)
    found = []
    for (outcome, message), promises in by_message.items():
        message = " ".join(message.split()).replace("`", "'")
        message = message if len(message) <= 400 else message[:397] + "..."
        found += ["", f"- {row['model']}, {', '.join(promises)}, {outcome}: `{message}`"]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The whole page's table, what failed below it."""
    counts = Counter(row["outcome"] for row in rows)
    head = "| model | kind | outcome | thousand parameters | gated, % | left to the base, % | s |"
    found = [f"{len(rows)} models: " + ", ".join(f"{counts[key]} {key}" for key in OUTCOMES if counts[key]) + ".", ""]
    found += [head, "|---|---|---|---|---|---|---|", *map(line, rows)]
    for row in rows:
        found += failures(row)
    return "\n".join(found) + "\n"


def write_page(page: Path, rows: list[dict[str, Any]]) -> None:
    """Replace what stands on the page between its markers."""
    start, end = "<!-- table: make models -->\n", "<!-- end -->"
    before, _, rest = page.read_text().partition(start)
    page.write_text(before + start + table(rows) + end + rest.partition(end)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="globs of models")
    parser.add_argument("--again", action="store_true", help="measure rows of the same code again")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="the page whose table is written anew")
    args = parser.parse_args()
    chosen = [entry for entry in MODELS if any(fnmatch.fnmatchcase(entry.name, glob) for glob in args.only)]
    if not chosen:
        parser.error(f"--only: no model matches {args.only}")
    now = {"code": code(), **{name: importlib.metadata.version(name) for name in ("torch", "timm", "transformers")}}
    rows = {row["model"]: row for row in json.loads(args.json.read_text())} if args.json and args.json.exists() else {}
    for entry in chosen:
        old = rows.get(entry.name)
        if not args.again and old is not None and all(old.get(key) == value for key, value in now.items()):
            print(line(old), flush=True)
            continue
        rows[entry.name] = {**check(entry), **now}
        print(line(rows[entry.name]), flush=True)
        print(*filter(None, failures(rows[entry.name])), sep="\n", end="\n" if rows[entry.name]["failed"] else "")
        if args.json:
            kept = [rows[entry.name] for entry in MODELS if entry.name in rows]
            args.json.write_text(json.dumps(kept, indent=1) + "\n")
    kept = [rows[entry.name] for entry in MODELS if entry.name in rows]
    print("\n" + table(kept).split("\n", 1)[0])
    if args.docs:
        write_page(args.docs, kept)
    return int(any(rows[entry.name]["outcome"] in ("crashed", "wrong") for entry in chosen))


if __name__ == "__main__":
    sys.exit(main())
