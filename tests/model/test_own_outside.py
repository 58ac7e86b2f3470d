"""What is set, hooked, written and read from outside of a module while a task runs there, and bases that change."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from test_own_tensors import shaken, task_on
from torch import Tensor, nn
from torch.nn.utils import prune

from taps_ext import ConfigError, FullConfig, ProbeConfig, TapsConfig, TapsError, TaskModel, UnsupportedModuleError

TAPS = TapsConfig(lam=0.0)


class Scaled(nn.LayerNorm):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class Setter(nn.Module):
    """Sets on a child what its forward goes by, as Swin sets H and W of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = Scaled(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.factor = float(x.shape[0])
        return self.head(self.norm(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_parent_sets_in_forward_is_the_tasks(compiled) -> None:
    model = task_on(Setter(), TAPS).eval()
    run = torch.compile(model, backend="eager") if compiled else model
    for rows in (4, 7):
        x = torch.randn(rows, 8)
        assert torch.equal(run(x, task="t"), model(x, task=None))


class Frozen(nn.Module):
    """Keeps its normalisation in evaluation mode, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return self.head(self.norm(x))


def test_a_mode_that_a_parent_sets_in_forward_holds_at_once() -> None:
    model = task_on(Frozen(), TAPS).train()
    own = model.state("t").table["norm"]
    for _ in range(2):
        model.train()(torch.randn(5, 8), task="t")
    assert own.num_batches_tracked == 0 and own.running_mean.abs().sum() == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.random_unstructured(m, "weight", 0.5)]
)
def test_hooks_that_make_weights_make_the_tasks(norm) -> None:
    base = nn.Sequential(norm(nn.Embedding(9, 8)), nn.Linear(8, 3))
    ids = torch.randint(0, 9, (5,))
    model = task_on(base).eval()
    assert torch.equal(model(ids, task="t"), model(ids, task=None))
    model.train()(ids, task="t").square().sum().backward()
    missing = [name for name, p in model.state("t").named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("classes", [None, 3])
def test_hooks_of_the_head_run_once(tmp_path, classes) -> None:
    head = nn.Linear(8, 3)
    head.register_forward_hook(lambda module, inputs, output: output * 2)
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    base = nn.Sequential(nn.Linear(8, 8), head)
    x, fresh = torch.randn(5, 8), TaskModel(copy.deepcopy(base))
    model = shaken(task_on(base, TAPS, num_classes=classes)).eval()
    own = model.state("t").head
    with torch.no_grad():
        want = model(x, task="t")
        hidden = F.linear(x, base[0].weight + model.state("t").table["0"].change.delta, base[0].bias)
        torch.testing.assert_close(want, 2 * F.linear(hidden + 1, own.weight, own.bias))
        model.save_task("t", tmp_path / "t.taps")
        fresh.load_task(tmp_path / "t.taps")
        assert torch.equal(fresh.eval()(x, task="t"), want)
        assert torch.equal(model.merge_and_unload("t")(x), want)


class ReadsHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) + x @ F.normalize(self.head.weight).t() + self.head.bias


def test_a_head_that_is_read_is_the_tasks() -> None:
    model, x = TaskModel(ReadsHead(), ProbeConfig()), torch.randn(5, 8)
    model.add_task("t", num_classes=3)
    own = model.state("t").head
    hidden = model.base.body(x)
    want = own(hidden) + hidden @ F.normalize(own.weight).t() + own.bias
    torch.testing.assert_close(model(x, task="t"), want)
    model.add_task("other", head=nn.Sequential(nn.Linear(8, 3)))
    with pytest.raises(UnsupportedModuleError, match="head: expected one with 'weight'.*got a Sequential"):
        model(x, task="other")


class Writes(nn.Module):
    """Constrains a weight in its forward."""

    def __init__(self, write) -> None:
        super().__init__()
        self.body, self.head, self.write = nn.Linear(8, 8), nn.Linear(8, 3), write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.body)
        return self.head(self.body(x))


def renormalise(layer: nn.Linear) -> None:
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.3)


def add(layer: nn.Linear) -> None:
    weight = layer.weight
    weight += 1.0


WRITERS = {
    "clamp_": lambda layer: layer.weight.clamp_(-0.1, 0.1),
    "copy_": lambda layer: layer.weight.copy_(F.normalize(layer.weight)),
    "clamp": lambda layer: torch.clamp(layer.weight, -0.1, 0.1, out=layer.weight),
    "__setitem__": lambda layer: layer.weight.__setitem__(0, 0.0),
    "add_": add,
    "__set__": renormalise,
}


@pytest.mark.parametrize("name", WRITERS)
def test_writing_to_a_gated_weight_in_forward_is_refused(name, tmp_path) -> None:
    """Open, the write would be lost; closed, it lands in the base: found in training at once, or when saved."""
    model, x = task_on(Writes(WRITERS[name]), TAPS), torch.randn(5, 8)
    with pytest.raises(UnsupportedModuleError, match=rf"^body: its weight is written to .*\({name}\)"):
        model.train()(x, task="t")
    model.set_gates("t", open=[])
    with pytest.raises(TapsError, match="base's parameter body.weight"):
        model.eval()(x, task="t")
        model.save_task("t", tmp_path / "t.taps")
    assert not (tmp_path / "t.taps").exists()


class Constrained(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_a_refused_write_names_the_layers_that_are_alike() -> None:
    """Thirty blocks that write to their weights are excluded at once."""
    blocks = nn.Sequential(*[nn.Sequential(Constrained(8, 8), nn.Linear(8, 8)) for _ in range(3)])
    base = nn.Sequential(OrderedDict(layer1=blocks, head=nn.Linear(8, 3)))
    model, x = task_on(copy.deepcopy(base), TAPS), torch.randn(5, 8)
    with pytest.raises(UnsupportedModuleError, match=r"^layer1\.0\.0: .* exclude_modules \(\['layer1\.\*\.0'\]\)"):
        model.train()(x, task="t")
    model = task_on(base, TapsConfig(lam=0.5, exclude_modules=["layer1.*.0"]))
    assert {layer for layer, _, _ in model.state("t").gated()} == {f"layer1.{block}.1" for block in range(3)}


class Grows(nn.Module):
    """Makes a buffer when it first runs."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.body.register_buffer("mask", None)
        if own:
            self.scale = nn.Parameter(torch.ones(8))
            self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.body.mask is None:
            self.body.mask = torch.ones(8)
        if hasattr(self, "scale") and self.seen is None:
            self.seen = torch.ones(8)
        return self.head(self.body(x) * self.body.mask)


def test_a_buffer_that_a_forward_makes_is_not_lost_in_silence(tmp_path) -> None:
    model, x = task_on(Grows(False), TAPS), torch.randn(5, 8)
    with pytest.raises(TapsError, match=r"training gave the base the buffer body\.mask"):
        model.train()(x, task="t")
    with pytest.raises(TapsError, match=r"base's buffer body\.mask has appeared"):
        model.save_task("t", tmp_path / "t.taps")
    base = Grows(True)
    base.body.mask = torch.ones(8)
    model = task_on(base)
    model.eval()(x, task="t")
    with pytest.raises(TapsError, match="its buffer seen was None"):
        model.save_task("t", tmp_path / "t.taps")


@pytest.mark.parametrize("move", [lambda m: m.cpu(), lambda m: m.double(), lambda m: m])
def test_a_base_that_was_written_to_is_found_after_it_was_moved(move, tmp_path) -> None:
    model = task_on(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), TAPS)
    model.base[0].weight.data.mul_(2.0)
    move(model)
    with pytest.raises(TapsError, match=r"base's parameter 0\.weight has changed"):
        model.save_task("t", tmp_path / "t.taps")


def test_a_base_whose_values_were_put_back_is_the_base(tmp_path) -> None:
    model = task_on(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), TAPS)
    values = copy.deepcopy(model.base.state_dict())
    model.base[0].weight.data.mul_(2.0)
    with pytest.raises(TapsError, match="put its values back"):
        model.save_task("t", tmp_path / "t.taps")
    model.base.load_state_dict(values)
    model.save_task("t", tmp_path / "t.taps")


def test_a_base_that_was_loaded_is_the_base(tmp_path) -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))

    model, other, x = task_on(made(), TAPS), task_on(made(), TAPS), torch.randn(5, 8)
    model.load_state_dict(other.state_dict())
    model.save_task("t", tmp_path / "t.taps")
    model(x, task="t")
    model.base[0].weight.data.mul_(2.0)
    with pytest.raises(TapsError, match=r"base's parameter 0\.weight has changed"):
        model.save_task("t", tmp_path / "t.taps")


class Keeps(nn.Module):
    """Keeps a list of weights beside its modules."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8))
        self.kept = [self.scale] if own else [self.body.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * self.kept[0].mean())


def test_weights_that_a_module_keeps_are_the_tasks_or_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match="^body: its weight is kept in the base.kept too"):
        task_on(Keeps(False))
    model = task_on(Keeps(True))
    model(torch.randn(5, 8), task="t").sum().backward()
    assert model.state("t").table[""].scale.grad.any() and model.base.scale.grad is None


class Caches(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.scale, self.kept = nn.Parameter(torch.ones(8)), kind()

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            made = self.scale.detach() * 2
            if isinstance(self.kept, list):
                self.kept.append(made)
            else:
                self.kept[0] = (made,)
        value = self.kept[0] if isinstance(self.kept, list) else self.kept[0][0]
        return x * value


@pytest.mark.parametrize("kind", [dict, OrderedDict, list])
def test_a_cache_of_any_kind_is_a_tasks_own(kind) -> None:
    model, x = shaken(task_on(nn.Sequential(Caches(kind), nn.Linear(8, 3)))).eval(), torch.randn(5, 8)
    own = model.state("t").table["0"].scale
    want = model.state("t").head(x * own.detach() * 2)
    torch.testing.assert_close(model(x, task="t"), want)
    torch.testing.assert_close(model(x, task=None), model.base[1](x * 2))


class Derives(nn.Module):
    """Drops what it derived from its weight when its mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.derived = nn.Parameter(torch.ones(8)), None

    def train(self, mode: bool = True) -> "Derives":
        self.derived = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.scale * 2
        if self.derived is None:
            self.derived = self.scale.detach() * 2
        return x * self.derived


def test_evaluation_after_training_derives_anew() -> None:
    model, x = task_on(nn.Sequential(Derives(), nn.Linear(8, 3))), torch.randn(5, 8)
    own = model.state("t").table["0"].scale
    for _ in range(2):
        model.eval()(x, task="t")
        with torch.no_grad():
            own.mul_(3.0)
        model.train()
        want = model(x, task="t")
        torch.testing.assert_close(model.eval()(x, task="t"), want)


def test_a_model_begins_in_its_bases_mode() -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    model = TaskModel(made().eval(), TAPS)
    model.add_task("t")
    before = copy.deepcopy(model.task_state_dict("t"))
    model(torch.randn(5, 8), task="t")
    assert not model.training and all(torch.equal(before[k], v) for k, v in model.task_state_dict("t").items())
    assert TaskModel(made(), TAPS).training


def test_a_registry_of_subclasses_does_not_hear_of_routing() -> None:
    known: dict[str, type] = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, *, key: str) -> None:
            known[key] = cls

    class Net(Registered, key="net"):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.head = nn.Parameter(torch.zeros(8)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.shift)

    task_on(Net())
    assert known == {"net": Net}


def test_bases_that_cannot_be_adapted_are_named() -> None:
    lazy = nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(8, 3))
    with pytest.raises(UnsupportedModuleError, match=r"0\.running_mean: expected initialised"):
        TaskModel(lazy, TAPS)
    pruned = nn.Sequential(nn.Linear(8, 8), prune.random_unstructured(nn.Linear(8, 3), "weight", 0.5))
    with pytest.raises(ConfigError, match="head: 1 cannot be copied .*; give num_classes or a head"):
        task_on(pruned, TAPS)
    with pytest.raises(UnsupportedModuleError, match=r"the base: a traced module that holds \['"):
        task_on(torch.fx.symbolic_trace(Keeps(True)), FullConfig(exclude_modules=["body"]))
    turned = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 3))
    turned[0].weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.complex64))
    with pytest.raises(UnsupportedModuleError, match="^0: holds complex parameters"):
        task_on(turned)
    clash = nn.Sequential(
        OrderedDict(
            [("a/b", nn.Linear(8, 8)), ("a", nn.Sequential(OrderedDict(b=nn.Linear(8, 8)))), ("fc", nn.Linear(8, 3))]
        )
    )
    with pytest.raises(UnsupportedModuleError, match=r"^a\.b: has the name of another module"):
        task_on(clash, TAPS)


def test_a_copy_of_an_adapted_base_is_nobodys() -> None:
    base, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.randn(5, 8)
    model = task_on(base, TAPS, num_classes=2)
    copied = copy.deepcopy(base)
    with pytest.raises(ConfigError, match="one that another TaskModel adapts"):
        TaskModel(nn.Sequential(base[0], nn.Linear(8, 2)), TAPS)
    other = task_on(copied, TAPS, num_classes=4).eval()
    assert other(x, task="t").shape == (5, 4) and torch.equal(other(x, task=None), model(x, task=None))
    assert all(
        type(module) is kind
        for module, kind in zip(other.unload(), (nn.Linear, nn.BatchNorm1d, nn.Linear), strict=True)
    )


class Fuses(nn.Module):
    """Makes one weight of two for evaluation, as RepVGG does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fused = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), None

    def train(self, mode: bool = True) -> "Fuses":
        self.fused = None if mode else (self.a.weight + self.b.weight).detach()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if self.fused is None else F.linear(x, self.fused)


def test_weights_that_are_fused_when_the_mode_changes_are_named() -> None:
    model, x = TaskModel(nn.Sequential(Fuses(), nn.Linear(8, 3)), TAPS), torch.randn(5, 8)
    model.add_task("t", config=TapsConfig(lam=0.0, exclude_modules=["0.*"]))
    torch.testing.assert_close(model.eval()(x, task="t"), model.train()(x, task="t"))
    model.add_task("u")
    with pytest.raises(UnsupportedModuleError, match=r"^0\.a: its weight is read when the model's mode changes"):
        model.eval()
    assert "_taps_gated" not in model.unload()[0].a.__dict__
