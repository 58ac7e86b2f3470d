"""What the suite of methods runs on: settings of every method, small bases, and methods that the package does not know.

A method that is registered gets an entry in `SETTINGS`, and the suite runs it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from models import settle
from random_models import bases
from stages import SEED, THOROUGH
from tolerance import bound
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taps_ext import (
    BitFitConfig,
    ConfigError,
    DepthwiseConfig,
    FullConfig,
    JointTapsConfig,
    LoraConfig,
    MethodConfig,
    MTLoraConfig,
    ProbeConfig,
    RcmConfig,
    ResidualAdapterConfig,
    ScaleBiasConfig,
    SeparateLayersConfig,
    SingularConfig,
    TapsConfig,
    TaskModel,
    UnsupportedModuleError,
    register_method,
)
from taps_ext.base.scan import Scan
from taps_ext.parts import Change, Dense, Gate, Layer, LowRank, Part, register_change

# ------------------------------------------------------------------------------------ methods of somebody else's


@register_change("mix")
class Mix(Change):
    """`W_t = (I + M) W` over a layer's outputs: a change of weights that is all defaults."""

    mix: nn.Parameter

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {"mix": (len(weight), len(weight))}

    def fold(self, weight: Tensor) -> Tensor:
        rows = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
        return (rows + self.mix.to(rows.dtype) @ rows).view(weight.shape).to(weight.dtype)


@register_change("curve")
class Curve(Change):
    """`y = W x + B tanh(A x)`: no weight gives it, so it does not fold."""

    down: nn.Parameter
    up: nn.Parameter

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {"down": (2, weight.shape[1]), "up": (len(weight), 2)}

    def start(self, weight: Tensor) -> None:
        self.down.normal_()

    def fold(self, weight: Tensor) -> Tensor:
        raise UnsupportedModuleError("a curve is no weight")

    def product(self, below: Any, input: Tensor, gate: Gate, bias: Tensor | None) -> Tensor:
        closed = below.product(input, bias)
        if gate.shut or self.owed:
            return closed
        down, up = self.down.to(input.dtype), self.up.to(input.dtype)
        return gate.select(closed + F.linear(torch.tanh(F.linear(input, down)), up), closed)


@register_method("mix")
@dataclass(frozen=True, kw_only=True)
class MixConfig(MethodConfig):
    """A Mix on every layer."""

    learn: bool = False

    def parts(self, base: Scan) -> dict[str, Part]:
        return {name: Layer(Gate(learn=self.learn), Mix(host)) for name, host in base.gated.items()}


@register_method("curve")
@dataclass(frozen=True, kw_only=True)
class CurveConfig(MethodConfig):
    """A Curve on every linear layer."""

    def parts(self, base: Scan) -> dict[str, Part]:
        linear = {name: host for name, host in base.gated.items() if isinstance(host, nn.Linear)}
        return {
            name: Layer(Gate(), Curve(host)) for name, host in linear.items() if not name.endswith(("out_proj", "proj"))
        }


@register_method("family")
@dataclass(frozen=True, kw_only=True)
class FamilyConfig(MethodConfig):
    """A Delta that all tasks share on every layer (apart: on the upper half), and above it ("dense") a Delta behind a
    learned gate and norms, ("lowrank") a low-rank change, or ("apart") Deltas and norms on the lower half."""

    over: str = "dense"

    def parts(self, base: Scan) -> dict[str, Part]:
        half = len(base.gated) // 2
        if self.over == "lowrank":
            plain = {name: host for name, host in base.gated.items() if getattr(host, "groups", 1) == 1}
            return {name: Layer(Gate(learn=False), LowRank(host, rank=2)) for name, host in plain.items()}
        if self.over == "dense":
            layers: dict[str, Part] = {name: Layer(Gate(), Dense(host)) for name, host in base.gated.items()}
        else:
            lower = list(base.gated.items())[:half]
            layers = {name: Layer(Gate(learn=False), Dense(host)) for name, host in lower}
        return {**layers, **base.own(base.norms)}

    def shared(self, base: Scan) -> dict[str, Part]:
        layers = list(base.gated.items())[len(base.gated) // 2 if self.over == "apart" else 0 :]
        return {name: Layer(Gate(learn=False), Dense(host)) for name, host in layers}


# ------------------------------------------------------------------------------------ settings of every method


def documented_code(number: int = 0) -> str:
    """A method that docs/methods.md shows: the first, or the second, which shares."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    return page.split("```python\n")[1 + number].partition("```")[0]


def documented(number: int, config: str) -> type[MethodConfig]:
    """Its config, run as it stands on the page, in a module of its own."""
    module = ModuleType(f"documented{number}")
    sys.modules[module.__name__] = module  # where dataclasses look up annotations
    exec(compile(documented_code(number), "docs/methods.md", "exec"), module.__dict__)
    made: type[MethodConfig] = getattr(module, config)
    return made


Columns, Tied = documented(0, "ColumnsConfig"), documented(1, "TiedConfig")

SETTINGS: dict[str, dict[str, MethodConfig]] = {
    "taps": {
        "taps": TapsConfig(lam=0.1),
        "taps-all": TapsConfig(lam=0.1, others="task", penalty="size"),
        "taps-sampled": TapsConfig(lam=0.1, gate_fraction=0.5, norm="frozen"),
    },
    "joint-taps": {"joint-taps": JointTapsConfig(lam=0.1)},
    "full": {"full": FullConfig()},
    "probe": {"probe": ProbeConfig()},
    "scale-bias": {
        "scale-bias": ScaleBiasConfig(),
        "scale-bias-base": ScaleBiasConfig(statistics="base"),
        "scale-bias-depthwise": ScaleBiasConfig(depthwise=True),
        "scale-bias-no-head": ScaleBiasConfig(last_layer=False),
        "scale-bias-joint": ScaleBiasConfig(simultaneous=True),
    },
    "separate-layers": {
        "separate-bottom": SeparateLayersConfig(bottom=2),
        "separate-top": SeparateLayersConfig(fraction=0.7, side="top"),
        "separate-joint": SeparateLayersConfig(bottom=2, joint=True),
    },
    "depthwise": {"depthwise": DepthwiseConfig(), "depthwise-frozen": DepthwiseConfig(norm="frozen")},
    "lora": {
        "lora": LoraConfig(rank=2),
        "lora-selective": LoraConfig(rank=2, selective=True, lam=0.1, norm="task"),
    },
    "columns": {"columns": Columns()},
    "tied": {"tied": Tied(), "tied-sampled": Tied(fraction=0.5)},
    "bitfit": {"bitfit": BitFitConfig()},
    "rcm": {
        "rcm": RcmConfig(),
        "rcm-all": RcmConfig(kernel_sizes="all", normalise=False),
        "rcm-response": RcmConfig(start="response"),
    },
    "residual-adapter": {
        "adapter-parallel": ResidualAdapterConfig(),
        "adapter-series": ResidualAdapterConfig(mode="series"),
    },
    "singular": {"singular": SingularConfig(), "singular-frozen": SingularConfig(norm="frozen")},
    "mtlora": {
        "mtlora": MTLoraConfig(rank=2, task_rank=2, stages=1),
        "mtlora-folds": MTLoraConfig(rank=2, task_rank=2, dropout=0.0, stages=1, task_modules=("*.proj",)),
    },
    "mix": {"mix": MixConfig(), "mix-learned": MixConfig(learn=True)},
    "curve": {"curve": CurveConfig()},
    "family": {
        "family": FamilyConfig(),
        "family-lowrank": FamilyConfig(over="lowrank"),
        "family-apart": FamilyConfig(over="apart"),
    },
}
CASES = {name: config for cases in SETTINGS.values() for name, config in cases.items()}
FAMILIES = [
    name
    for name, config in CASES.items()
    if config.method in ("family", "joint-taps", "mtlora", "tied")
    or getattr(config, "joint", False)
    or getattr(config, "simultaneous", False)
]
UNFOLDABLE = {
    "curve": {"conv": "hidden", "vit": "block.fc1"},
    "mtlora": {"blocks": "blocks.1.mlp.fc1"},
}  # the first module that does not fold
# Products that are computed beside the one below: merged they are rounded otherwise.
BESIDE = {"lora", "lora-selective", "family-lowrank", "mtlora", "mtlora-folds"}
_NOT_IN_VIT = {"depthwise", "depthwise-frozen", "scale-bias-depthwise", "adapter-parallel"}

# ------------------------------------------------------------------------------------ bases


RANDOM = 4 if THOROUGH else 1  # how many random models


class Steps(nn.Sequential):
    """`reentrant`: None runs its modules plainly, else which kind of checkpointing each of them is run under."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for step in self:
            x = step(x) if self.reentrant is None else checkpoint(step, x, use_reentrant=self.reentrant)
        return x


class Embed(nn.Module):
    """Patches of an image behind a class token, with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class NamedBlock(nn.Module):
    """A block whose layers are called as timm's are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(8), Attention()
        self.norm2, self.mlp = nn.LayerNorm(8), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def conv() -> nn.Module:
    """Convolutions: plain, depthwise and grouped, batch norms, a linear layer, a head."""
    steps: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 8, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(8)}
    steps |= {"act": nn.ReLU(), "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8), "norm2": nn.BatchNorm2d(8)}
    steps |= {"grouped": nn.Conv2d(8, 12, 3, 2, groups=2), "norm3": nn.BatchNorm2d(12), "act3": nn.ReLU()}
    return Steps(OrderedDict(steps | {"pool": Mean(), "hidden": nn.Linear(12, 12), "fc": nn.Linear(12, 5)}))


def vit() -> nn.Module:
    """A vision transformer of one block."""
    steps = {"embed": Embed(), "block": Block(), "norm": nn.LayerNorm(8), "first": First(), "fc": nn.Linear(8, 5)}
    return Steps(OrderedDict(steps))


def blocks() -> nn.Module:
    """A vision transformer of two blocks that are called as timm's are."""
    steps: dict[str, nn.Module] = {"patch_embed": Embed(), "blocks": Steps(NamedBlock(), NamedBlock())}
    return Steps(OrderedDict(steps | {"norm": nn.LayerNorm(8), "first": First(), "fc": nn.Linear(8, 5)}))


def small() -> nn.Module:
    """A plain convolution, a depthwise one with its norm, a linear layer and a head."""
    steps = {
        "conv": nn.Conv2d(3, 3, 3),
        "depthwise": nn.Conv2d(3, 3, 3, groups=3),
        "norm": nn.BatchNorm2d(3),
        "pool": Mean(),
    }
    return Steps(OrderedDict(steps | {"hidden": nn.Linear(3, 3), "fc": nn.Linear(3, 5)}))


def _rich(base: nn.Module) -> bool:
    """A depthwise convolution, a plain one larger than 1 x 1, a norm and a bias, so that there is something to do for
    every method, and four layers beside the head."""
    found = [m for m in base.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.MultiheadAttention))]
    depthwise = [m for m in found if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    norms = [m for m in base.modules() if "Norm" in type(m).__name__ and any(True for _ in m.parameters())]
    plain = [m for m in found if isinstance(m, nn.Conv2d) and m.groups == 1 and m.kernel_size != (1, 1)]
    biases = [name for name, _ in base.named_parameters() if name.endswith("bias")]  # one is the head's
    return bool(depthwise and plain and norms) and len(biases) > 1 and len(found) > 4


@functools.cache
def _drawn() -> list[nn.Module]:
    """The largest of some random models, which are others every day."""
    found: list[nn.Module] = []
    quiet: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @settings(max_examples=150, phases=[Phase.generate], **quiet)
    @given(base=bases())
    def take(base: nn.Module) -> None:
        if _rich(base):
            found.append(Steps(*base))

    for attempt in itertools.count():
        seed(f"{SEED} {attempt}")(take)()
        if len(found) >= RANDOM:
            break
    return sorted(found, key=lambda base: sum(p.numel() for p in base.parameters()))[-RANDOM:]


def _random(index: int) -> nn.Module:
    return copy.deepcopy(_drawn()[index])


BASES: dict[str, Callable[[], nn.Module]] = {
    "conv": conv,
    "vit": vit,
    "blocks": blocks,
    **{f"random-{index}": functools.partial(_random, index) for index in range(RANDOM)},
    "small": small,
}
IN_BLOCKS = {"mtlora", "mtlora-folds"}  # those that are for such bases alone


def base_of(case: str, usual: str = "conv") -> str:
    """A base for a case, where one is enough."""
    return "blocks" if case in IN_BLOCKS else usual


def _fits(base: str, case: str) -> bool:
    if base == "blocks" or case in IN_BLOCKS:
        return base == "blocks" and case in IN_BLOCKS
    return not (base == "vit" and case in _NOT_IN_VIT) and not (base.startswith("random") and case in UNFOLDABLE)


RUNS = [
    (base, case)
    for base in list(BASES)[:-1]  # the last is for what takes long
    for case in CASES
    if _fits(base, case)
]


def make_base(name: str) -> nn.Module:
    """A base, frozen and in evaluation mode, the same at every call: torch picks some products by whether a weight
    requires a gradient."""
    if name.startswith("random"):
        _drawn()  # which has a seed of its own
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return settle(BASES[name]()).requires_grad_(False)


def images(name: str) -> Tensor:
    """A batch for a base, always the same."""
    channels = 2 if name.startswith("random") else 3
    return torch.randn(6, channels, 8, 8, generator=torch.Generator().manual_seed(5))


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

# ------------------------------------------------------------------------------------ models


def adapted(base: str, case: str, *, tasks: Sequence[str] = ("t", "other"), classes: int | None = 3) -> TaskModel:
    """A base with tasks of one method. `classes` None: with copies of the base's head."""
    config = CASES[case]
    model = TaskModel(make_base(base), config)
    torch.manual_seed(1)
    for name in tasks:
        model.add_task(name, num_classes=classes if config.own_head else None)
    return model


def close_some(model: TaskModel, task: str) -> None:
    """Every third learned gate."""
    with torch.no_grad():
        for index, (_, _, gate) in enumerate(model.state(task).learned()):
            gate.score.fill_(0.05 if index % 3 == 2 else 0.15)


def loss_of(model: TaskModel, x: Tensor, task: str) -> Tensor:
    """The same draws at every call: dropout, drop-path, sampled gates."""
    torch.manual_seed(7)
    return F.cross_entropy(model(x, task=task), LABELS)


def train(model: TaskModel, x: Tensor, task: str, steps: int = 3) -> list[float]:
    """The losses before each of some steps of gradient descent, and after them."""
    optimizer = torch.optim.SGD(model.parameter_groups(task, lr=0.02))
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, x, task)
        losses.append(loss.item())
        (loss + model.sparsity_loss(task)).backward()
        optimizer.step()
    losses.append(loss_of(model, x, task).item())
    return losses


def trained(base: str, case: str) -> TaskModel:
    """A model in evaluation mode whose task "t" has been trained, some of its layers closed."""
    model = adapted(base, case)
    close_some(model, "t")
    train(model, images(base), "t")
    return model.eval()


@torch.no_grad()
def output(model: nn.Module, x: Tensor, task: str | None = None) -> Tensor:
    """Of a TaskModel that of a task."""
    return model(x, task=task) if isinstance(model, TaskModel) else model(x)


def save(model: TaskModel, folder: Path, task: str = "t") -> Path:
    """A task's file, and its family's beside it."""
    family = model.state(task).family
    if family is not None and not family.digest:
        model.save_shared(family.name, folder / "family.taps")
    model.save_task(task, folder / "task.taps")
    return folder / "task.taps"


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)


def rounding(model: TaskModel, x: Tensor, task: str, dtype: torch.dtype) -> Tensor:
    """How far two runs of a task in `dtype` may be apart that round differently, for each output `[B, C]`.

    Every module errs by the rounding of its sums (`tolerance.bound`), independently of the others; to first order an
    error e in its result reaches an output y as <dy/de, e>. Samples do not meet in evaluation.
    """
    found: list[tuple[Tensor, float]] = []

    def note(module: nn.Module, args: Any, result: Any) -> None:
        result = result[0] if isinstance(result, tuple) else result
        weight = module._parameters.get("weight")  # the base's: about as large as the task's
        sums = isinstance(module, (nn.Linear, nn.Conv2d))
        if isinstance(module, nn.MultiheadAttention):  # three projections, scores, softmax, values, a projection
            error = 7**0.5 * bound(dtype, module.embed_dim + x.shape[1], result)
        elif sums:
            error = bound(dtype, weight[0].numel(), args[0], weight) + bound(dtype, 1, result)
        else:
            error = bound(dtype, 4, result)
        found.append((result, error))

    leaves = [m for m in model.base.modules() if isinstance(m, nn.MultiheadAttention) or not m._modules]
    head = model.state(task).head
    handles = [m.register_forward_hook(note) for m in leaves if m is not head]
    try:
        outputs = model(x.clone().requires_grad_(), task=task)
    finally:
        for handle in handles:
            handle.remove()
    places = [place for place, _ in found if place.requires_grad]
    errors = [error for place, error in found if place.requires_grad]
    squares = torch.zeros(outputs.shape)
    for index in range(outputs.shape[1]):
        reach = torch.autograd.grad(outputs[:, index].sum(), places, retain_graph=True, allow_unused=True)
        for error, one in zip(errors, reach, strict=True):
            if one is not None:
                rows = (error * one.float()).square().flatten(1).sum(dim=1)
                squares[:, index] += rows.view(-1, len(x)).sum(dim=0)  # of all streams of a sample
    return (2 * squares).sqrt()


# ------------------------------------------------------------------------------------ in another process


def leave_for_another(folder: Path) -> None:
    """For each run a trained task's file, its base and what it answers."""
    for index, (base, case) in enumerate(RUNS):
        own = folder / str(index)
        own.mkdir()
        try:
            model, x = trained(base, case), images(base)
            save(model, own)
            torch.save((make_base(base), x, output(model, x, "t")), own / "want.pt")
        except Exception as error:  # which is this run's result, and no other's
            (own / "error").write_text(repr(error))


def answer(folder: Path) -> None:
    """In the other process: write for each run "" or what is wrong."""
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_num_threads(1)
    found = []
    for index, _ in enumerate(RUNS):
        own = folder / str(index)
        try:
            if (own / "error").exists():
                raise ConfigError((own / "error").read_text())
            base, x, want = torch.load(own / "want.pt", weights_only=False)
            model = TaskModel(base).eval()
            model.load_task(own / "task.taps", "again")
            off = (output(model, x, "again") - want).abs().max().item()
            same = torch.equal(output(model, x, "again"), want)
            found.append("" if same else f"outputs differ by {off:.3g}")
        except Exception as error:
            found.append(repr(error))
    (folder / "found.json").write_text(json.dumps(found))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention's fused path rounds otherwise than its own, and is not taken under an open layer."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
