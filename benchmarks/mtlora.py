"""MTLoRA's one pass of T tasks beside a loop over tasks in each layer, and beside T passes: time and memory.

    python benchmarks/mtlora.py --results benchmarks/results/avx2/mtlora.jsonl
    python benchmarks/mtlora.py --results benchmarks/results/avx2/mtlora.jsonl --table

timm's Swin-T at 224 pixels with batches of 4, and the small Swin of the study of maps at 120 x 160 with batches of 8,
in fp32; a decoder for each task, rank 16, rank 4 of a task's own, no dropout, so that all compute the same, which is
checked first: outputs, and the gradients of all low-rank factors.

    ours   model.forward_tasks(x, tasks=[...])
    a      hooks on the plain model: in a task layer the base's product once, then a Python loop over the tasks'
           low-rank products; elsewhere the streams are side by side, as ours are
    b      a pass for each task, and backward before the next one
    c      as the authors' code has it: the streams are a list, and all that follows the base's product is in a loop
           over the tasks (norm, activation, residual, patch merging; theirs has the way back from windows in it, too)

Phases: "forward" (evaluation, no gradients), "both" (forward and backward), "step" (AdamW on top). All take turns; a
ratio is the median over rounds of the ratio in a round, so that what else the machine does falls on all. The peak is
the growth of a process of its own for each variant, from when the model is built to its highest point in three steps
(gradients and AdamW's state among it); on a GPU what its allocator counts. Rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import forget_peak, resident
from small_bases import SWIN_TAPS, swin
from torch import Tensor, nn
from turns import milliseconds

import taps_ext
from taps_ext import ops
from taps_ext.dense import ConcatDecoder, DenseBase
from taps_ext.parts import LowRank, StreamLowRank

OUTPUTS = (11, 1, 1, 7, 21, 3, 1, 2)  # of the tasks' decoders
SIZES = {"swin_tiny": (4, (224, 224)), "swin_small": (8, (120, 160))}  # batch, pixels
PAPERS = ("layers.1.downsample", "layers.2.downsample", "layers.3.downsample", "layers.3")
TASKS = (2, 4, 8)
PHASES = ("forward", "both", "step")
VARIANTS = ("ours", "a", "b", "c")
RANK, TASK_RANK = 16, 4


def base_of(name: str, size: tuple[int, int]) -> DenseBase:
    torch.manual_seed(0)
    if name == "swin_small":
        return DenseBase(swin(size), SWIN_TAPS).eval()
    import timm

    made = timm.create_model("swin_tiny_patch4_window7_224", img_size=size, drop_path_rate=0.0)
    return DenseBase(made, PAPERS).eval()


def adapted(name: str, size: tuple[int, int], tasks: int) -> taps_ext.TaskModel:
    """Tasks whose low-rank factors are all at work."""
    model = taps_ext.TaskModel(base_of(name, size), taps_ext.MTLoraConfig(rank=RANK, task_rank=TASK_RANK, dropout=0.0))
    torch.manual_seed(1)
    for index in range(tasks):
        model.add_task(f"t{index}", head=ConcatDecoder(model.base.channels, OUTPUTS[index % len(OUTPUTS)]))
    with torch.no_grad():
        for held in (*model.families.values(), *(model.state(task) for task in model.tasks)):
            for _, part, _ in held.gated():
                if isinstance(part.change, (LowRank, StreamLowRank)):
                    part.change.up.normal_(std=0.02)
    return model


def factors(model: taps_ext.TaskModel) -> dict[tuple[str, str], tuple[nn.Parameter, nn.Parameter]]:
    """(task, or "" for what is shared, layer of the backbone) -> A, B."""
    held = {"": next(iter(model.families.values()))} | {task: model.state(task) for task in model.tasks}
    return {
        (task, layer.removeprefix("backbone.")): (part.change.down, part.change.up)
        for task, parts in held.items()
        for layer, part, _ in parts.gated()
        if isinstance(part.change, (LowRank, StreamLowRank))
    }


class Looped(nn.Module):
    """What one would write: a plain copy of the base with hooks, over copies of the tasks' tensors."""

    streams_in_layers = True

    def __init__(self, model: taps_ext.TaskModel, base: DenseBase) -> None:
        super().__init__()
        self.names = list(model.tasks)
        self.backbone = base.backbone.requires_grad_(False)
        self.taps = base.taps
        self.decoders = nn.ModuleDict({task: copy.deepcopy(model.state(task).head) for task in self.names})
        self.factors: dict[tuple[str, str], tuple[nn.Parameter, nn.Parameter]] = {}
        for place, (key, (down, up)) in enumerate(factors(model).items()):
            a, b = nn.Parameter(down.detach().clone()), nn.Parameter(up.detach().clone())
            self.register_parameter(f"down{place}", a)
            self.register_parameter(f"up{place}", b)
            self.factors[key] = (a, b)
        for name, parameter in self.backbone.named_parameters():  # what MTLoRA trains as it is
            if any(word in name for word in ("norm", "patch_embed", "relative_position_bias_table", "reduction")):
                parameter.requires_grad_()
        self.streams: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {}
        self._hook(dict(self.backbone.named_modules()))

    def _hook(self, modules: dict[str, nn.Module]) -> None:
        stages = [name for name in modules if name.startswith("layers.") and name.count(".") == 1]
        for layer in dict.fromkeys(layer for _, layer in self.factors):
            own, shared = self._own_pairs(layer), self.factors[("", layer)]
            if own and not self.streams_in_layers:
                continue
            if own and ".mlp." in layer:  # whose inputs are all streams; the base sees the shared one's rows
                modules[layer].register_forward_pre_hook(self._narrowing(layer))
                modules[layer].register_forward_hook(self._streams_hook(layer, shared, own))
            elif own:
                modules[layer].register_forward_hook(self._first_hook(shared, own))
            else:
                modules[layer].register_forward_hook(self._shared_hook(shared))
        for place, stage in enumerate(stages):
            blocks = [name for name in modules if name.startswith(f"{stage}.blocks.") and name.count(".") == 3]
            self._hook_last(modules, blocks[-1], stage)
            if place and f"{stage}.downsample" in {tap.name for tap in self.taps}:
                modules[f"{stage}.downsample"].register_forward_hook(self._merging(stages[place - 1], stage))

    def _own_pairs(self, layer: str) -> list[Any]:
        return [self.factors[task, layer] for task in self.names if (task, layer) in self.factors]

    def _hook_last(self, modules: dict[str, Any], last: str, stage: str) -> None:
        """The block in which tasks have streams."""
        modules[last].register_forward_pre_hook(lambda module, args: (self._widened(args[0]),))
        modules[f"{last}.norm1"].register_forward_pre_hook(lambda module, args: (self._own(args[0]),))
        modules[last].register_forward_hook(self._ending(stage))

    def _widened(self, x: Tensor) -> Tensor:
        return torch.cat([x] * (1 + len(self.names)))

    def _own(self, x: Tensor) -> Tensor:
        return x[: len(x) // (1 + len(self.names))]

    @staticmethod
    def _product(x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return 4.0 * F.linear(F.linear(x, pair[0]), pair[1])

    def _shared_hook(self, shared: Any) -> Callable[..., Tensor]:
        return lambda module, args, output: output + self._product(args[0], shared)

    def _first_hook(self, shared: Any, own: list[Any]) -> Callable[..., Tensor]:
        """A layer whose input is the shared stream's alone."""

        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            return torch.cat([output + self._product(args[0], pair) for pair in (shared, *own)])

        return hook

    def _narrowing(self, layer: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any) -> Any:
            self.streams[layer] = args[0]
            return (self._own(args[0]),)

        return hook

    def _streams_hook(self, layer: str, shared: Any, own: list[Any]) -> Callable[..., Tensor]:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            rows = self.streams.pop(layer).chunk(1 + len(own))
            return torch.cat([output + self._product(x, pair) for x, pair in zip(rows, (shared, *own), strict=True)])

        return hook

    def _ending(self, stage: str) -> Callable[..., Tensor]:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            shared = self._own(output)
            self.rows[stage] = [output[len(shared) :]]
            return shared

        return hook

    def _merging(self, before: str, stage: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            self.rows[f"{stage}.downsample"] = [module.forward(rows) for rows in self.rows.pop(before)]

        return hook

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.rows.clear()
        self.backbone(x)
        maps = []
        for tap in self.taps:  # all streams in one, or one for each task
            rows = self.rows[tap.name]
            each = rows if len(rows) > 1 else rows[0].chunk(len(self.names))
            maps.append([one.permute(0, 3, 1, 2) for one in each])
        self.rows.clear()
        size = (x.shape[2], x.shape[3])
        found = {}
        for place, task in enumerate(self.names):
            found[task] = self.decoders[task]([one[place] for one in maps], size)
        return found


class Listed(Looped):
    """The same with the streams in a list, as the authors' code has them."""

    streams_in_layers = False

    def _hook_last(self, modules: dict[str, Any], last: str, stage: str) -> None:
        block, names = modules[last], ("attn.proj", "mlp.fc1", "mlp.fc2")
        proj, fc1, fc2 = (modules[f"{last}.{name}"] for name in names)
        pairs = [(self.factors["", f"{last}.{name}"], *self._own_pairs(f"{last}.{name}")) for name in names]
        block.attn.proj = nn.Identity()  # which is done per pixel, and may as well be done behind the windows
        block.projection = proj

        def each(layer: Any, inputs: list[Tensor], pairs: Any) -> list[Tensor]:
            base = layer(inputs[0])
            return [base + self._product(x, pair) for x, pair in zip(inputs, pairs, strict=True)]

        def forward(x: Tensor) -> Tensor:
            core = block._attn(block.norm1(x))
            streams = [x + made for made in each(proj, [core] * len(pairs[0]), pairs[0])]
            hidden = [block.mlp.act(one) for one in each(fc1, [block.norm2(one) for one in streams], pairs[1])]
            ends = [x + made for x, made in zip(streams, each(fc2, hidden, pairs[2]), strict=True)]
            self.rows[stage] = ends[1:]
            return ends[0]

        block.forward = forward


class Variant:
    """One way to run all tasks on a batch: outputs, and a whole step of training."""

    def __init__(self, name: str, model: taps_ext.TaskModel, looped: Looped | None, x: Tensor) -> None:
        self.name, self.x, self.tasks = name, x, list(model.tasks)
        self.model: nn.Module = model if looped is None else looped
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.train = False

    def _mode(self, train: bool) -> None:
        """Once, and not within what is timed."""
        self.train = train
        self.model.train(train)

    def outputs(self) -> dict[str, Tensor]:
        if self.name == "ours":
            return self.model.forward_tasks(self.x, tasks=self.tasks)  # type: ignore[operator]
        if isinstance(self.model, Looped):
            return self.model(self.x)
        return {task: self.model(self.x, task=task) for task in self.tasks}

    def forward(self) -> None:
        with torch.no_grad():
            self.outputs()

    def both(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.name == "b":
            for task in self.tasks:
                self.model(self.x, task=task).square().mean().backward()
        else:
            torch.stack([out.square().mean() for out in self.outputs().values()]).sum().backward()

    def step(self) -> None:
        self.both()
        self.optimizer.step()

    def call(self, phase: str) -> Callable[[], None]:
        def done() -> None:
            getattr(self, phase)()
            if self.x.is_cuda:
                torch.cuda.synchronize()

        return done


def variant(name: str, model: taps_ext.TaskModel, case: str, x: Tensor) -> Variant:
    looped = None
    if name in ("a", "c"):
        looped = (Looped if name == "a" else Listed)(model, base_of(case, (x.shape[2], x.shape[3])).to(x.device))
    return Variant(name, model, looped, x)


def check(found: dict[str, Variant], model: taps_ext.TaskModel) -> None:
    """Raise RuntimeError unless all compute the same, outputs and gradients of the factors."""

    def same(what: str, got: Tensor, want: Tensor) -> None:
        # The same sums in another order: fp32 rounds each of some thousand terms, through two dozen layers.
        limit = 2e-3 * float(want.abs().max())
        if not bool(((got - want).abs() <= limit).all()):
            raise RuntimeError(f"mtlora: {what}: off by {float((got - want).abs().max())}, allowed {limit}")

    outputs, gradients = {}, {}
    for name, one in found.items():
        one._mode(False)
        with torch.no_grad():
            outputs[name] = one.outputs()
    for name, one in found.items():  # behind all outputs: training moves the statistics of decoders' norms
        one._mode(True)
        one.both()
        pairs = one.model.factors if isinstance(one.model, Looped) else factors(model)
        # What the shared stream has in the last block reaches no decoder: zeros, or no gradient.
        gradients[name] = {
            key: [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in pair]
            for key, pair in pairs.items()
        }
    for name in found:
        for task, want in outputs["ours"].items():
            same(f"{name}, output of {task}", outputs[name][task], want)
        for key, pair in gradients["ours"].items():
            for which, got, want in zip("AB", gradients[name][key], pair, strict=True):
                same(f"{name}, gradient of {which} at {key}", got, want)


def inputs(batch: int, size: tuple[int, int], device: str) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2)).to(device)


def measure(case: str, tasks: int, rounds: int, device: str, threads: int) -> dict[str, Any]:
    batch, size = SIZES[case]
    model = adapted(case, size, tasks).to(device)
    x = inputs(batch, size, device)
    found = {name: variant(name, model, case, x) for name in VARIANTS}
    check(found, model)
    times: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for phase in PHASES:
        for one in found.values():
            one._mode(phase != "forward")
        calls = {name: one.call(phase) for name, one in found.items()}
        milliseconds(calls, 1)
        each = milliseconds(calls, rounds)
        times[phase] = {name: round(statistics.median(found), 2) for name, found in each.items()}
        ratios[phase] = {
            name: round(statistics.median(a / b for a, b in zip(each[name], each["ours"], strict=True)), 3)
            for name in VARIANTS[1:]
        }
    peaks = {name: peak(case, tasks, name, device, threads) for name in VARIANTS}
    return {"model": case, "batch": batch, "size": list(size), "tasks": tasks, "ms": times, "ratio": ratios} | {
        "peak": peaks,
        "rounds": rounds,
    }


def peak(case: str, tasks: int, name: str, device: str, threads: int) -> int:
    """Bytes of one variant's training, in a process of its own."""
    command = [sys.executable, __file__, "--one", case, str(tasks), name, "--device", device, "--threads", str(threads)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"mtlora: {name}, {tasks} tasks: {done.stderr}")
    return int(done.stdout.splitlines()[-1])


def one(case: str, tasks: int, name: str, device: str) -> int:
    batch, size = SIZES[case]
    nn.Conv2d(3, 3, 3)(torch.randn(1, 3, 8, 8)).sum().backward()  # what the first backward loads
    model = adapted(case, size, tasks).to(device)
    made = variant(name, model, case, inputs(batch, size, device))
    made._mode(True)
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = forget_peak()
    for _ in range(3):
        made.step()
    return (torch.cuda.max_memory_allocated() if device != "cpu" else resident("VmHWM")) - before


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| model | tasks | phase | ours, ms | a / ours | b / ours | c / ours |", "|---" * 7 + "|"]
    for row in rows:
        for phase, times in row["ms"].items():
            ratio = row["ratio"][phase]
            where = f"{row['model']}, {row['size'][0]} x {row['size'][1]}, batch {row['batch']}"
            cells = [f"{times['ours']:.1f}", *(f"{ratio[name]:.2f}" for name in VARIANTS[1:])]
            lines.append(f"| {where} | {row['tasks']} | {phase} | {' | '.join(cells)} |")
    lines += ["", "| model | tasks | ours, MiB | a | b | c |", "|---" * 6 + "|"]
    for row in rows:
        cells = [f"{row['peak'][name] / 2**20:.0f}" for name in VARIANTS]
        lines.append("| " + " | ".join([row["model"], str(row["tasks"]), *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--tasks", nargs="+", type=int, default=list(TASKS))
    parser.add_argument("--only", type=int, help="so many cases, the first that are missing")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "TASKS", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.one:
        print(one(args.one[0], int(args.one[1]), args.one[2], args.device))
        return
    if args.results is None:
        parser.error("--results: expected the file for the rows")
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if args.table:
        print(table(rows))
        return
    known = {(row["model"], row["tasks"], row["device"]) for row in rows}
    cases = [(model, tasks) for tasks in args.tasks for model in args.models]
    missing = [case for case in cases if (*case, args.device) not in known][: args.only]
    isa = None if ops._C is None else ops._C.isa()
    for model, tasks in missing:
        load = round(os.getloadavg()[0], 2)
        row = measure(model, tasks, args.rounds, args.device, args.threads)
        row |= {"device": args.device, "threads": torch.get_num_threads(), "load": load}
        row |= {"isa": isa, "torch": torch.__version__}
        print(json.dumps(row), flush=True)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
