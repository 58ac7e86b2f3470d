"""What the papers' methods must be whatever they are trained on: identities between methods, and counts of real nets.

Which test holds which of them stands in docs/suite.md."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle
from torch import Tensor, nn

from taps_ext import (
    DepthwiseConfig,
    JointTapsConfig,
    MethodConfig,
    RcmConfig,
    ScaleBiasConfig,
    SeparateLayersConfig,
    TaskModel,
    store,
)

EPS = torch.finfo(torch.float64).eps


def net() -> TinyNet:
    torch.manual_seed(0)
    return settle(TinyNet()).requires_grad_(False)


def model_of(config: MethodConfig, tasks: str = "ab", *, num_classes: int | None = 4) -> TaskModel:
    model = TaskModel(net(), config)
    for task in tasks:
        torch.manual_seed(ord(task))
        model.add_task(task, num_classes=num_classes)
    return model


def test_the_tests_that_the_page_names_are_there() -> None:
    """Every line of the table in docs/suite.md names a test."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "suite.md").read_text(encoding="utf-8")
    lines = page.partition("| method | what holds |")[2].splitlines()[2:]
    assert len(lines) > 30
    for line in lines:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            assert f"\ndef {test}(" in (root / file).read_text(encoding="utf-8"), (file, test)


# ------------------------------------------------------------------------------------ K for the Price of 1


@pytest.mark.parametrize(
    ("make", "base", "scale_bias", "depthwise"),
    [
        ("torchvision:densenet121", 7_978_856, 83_648, None),
        ("torchvision:vit_b_16", 86_567_656, 38_400, None),
        ("timm:efficientnet_lite0", 4_652_008, 42_016, 182_016),
        ("torchvision:mobilenet_v2", 3_504_872, 34_112, 64_224),
    ],
)
def test_counts_of_patches(make: str, base: int, scale_bias: int, depthwise: int | None) -> None:
    library, name = make.split(":")
    found = pytest.importorskip(library)
    plain = found.create_model(name) if library == "timm" else getattr(found.models, name)()
    assert sum(p.numel() for p in plain.parameters()) == base
    model = TaskModel(plain)
    model.add_task("t", num_classes=1000, config=ScaleBiasConfig())
    assert model.report("t").norms == scale_bias and model.report("t").parameters == scale_bias + model.report("t").head
    if depthwise is not None:
        model.add_task("d", num_classes=2, config=DepthwiseConfig(norm="frozen"))
        report = model.report("d")
        assert report.open == sum(row.own for row in report.rows) == depthwise
        model.add_task("both", num_classes=2, config=ScaleBiasConfig(depthwise=True))
        assert model.report("both").parameters - model.report("both").head == depthwise + scale_bias
    if name == "mobilenet_v2":
        assert len(model.report("d").rows) == 17 and model.report("t").head == 1_281_000
        assert depthwise + scale_bias == 98_336


def test_theta_gets_the_sum_of_the_tasks_gradients_and_a_patch_its_own_rows() -> None:
    """Simultaneous training in float64, against autograd on plain copies of the net: theta's gradient is
    sum_t dL_t / dtheta, exactly: a gradient is rounded to a Delta's float32 once for each task, and two are added."""
    model = model_of(ScaleBiasConfig(simultaneous=True)).double()
    x = {task: images(dtype=torch.float64) for task in "ab"}
    expected: dict[str, Tensor] = {}
    patches: dict[str, dict[str, Tensor]] = {}
    for task in "ab":
        plain = model._plain_copy(task).requires_grad_().train()
        plain(x[task]).square().mean().backward()
        for name, p in plain.named_parameters():
            expected[name] = expected[name] + p.grad.float() if name in expected else p.grad.float()
        patches[task] = {name: p.grad for name, p in plain.named_parameters()}
    model.train()
    for task in "ab":
        model(x[task], task=task).square().mean().backward()
        if task == "a":
            assert all(p.grad is None for p in model.state("b").parameters())
    (family,) = model.families.values()
    layers = ["conv1", "conv2", "depthwise", "hidden"]
    assert list(family.table) == layers
    for name in layers:
        assert torch.equal(family.table[name].change.delta.grad, expected[f"{name}.weight"]), name
    for task, grads in patches.items():
        for name in ("bn1", "gn", "ln"):
            own = model.state(task).table[name]
            assert torch.equal(own.weight.grad, grads[f"{name}.weight"]) and own.weight.grad.any()
            assert torch.equal(own.bias.grad, grads[f"{name}.bias"])


# ------------------------------------------------------------------------------------ separate layers


@pytest.mark.parametrize("norm", ["with_layer", "frozen"])
def test_a_bottom_and_the_top_above_it_are_all_and_nothing_twice(norm: str) -> None:
    """Private sets of bottom = p and top = L - p, p from none to all: layers, their biases and norms."""
    model, last = TaskModel(net()), 4
    model.add_task("all", config=SeparateLayersConfig(bottom=last, norm=norm))
    every = set(model.state("all").table)
    for p in range(last + 1):
        sides = {
            "bottom": SeparateLayersConfig(bottom=p, norm=norm),
            "top": SeparateLayersConfig(top=last - p, norm=norm),
        }
        for task, config in sides.items():
            model.add_task(task, config=config)
        bottom, top = (set(model.state(task).table) - {"fc"} for task in sides)
        assert not bottom & top and bottom | top == every - {"fc"}
        assert model.report("bottom").open + model.report("top").open == model.report("all").open
        for task in sides:
            model.delete_task(task)


def _weights(model: TaskModel) -> int:
    """Of the base's convolutions."""
    return sum(module.weight.numel() for module in model.base.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("resnet34", ["1.084", "6.323", "38.37"]),
        ("resnet50", ["0.948", "6.117", "36.29"]),
        ("resnet18", ["1.405", "6.100", "24.88"]),
    ],
)
def test_shares_of_private_bottoms(name: str, shares: list[str]) -> None:
    models = pytest.importorskip("torchvision").models
    model = TaskModel(getattr(models, name)())
    layers = [n for n, m in model.base.named_modules() if isinstance(m, nn.Conv2d)]
    for count, share in enumerate(shares, 1):
        stages = ["conv1", *(f"layer{index + 1}" for index in range(count))]
        chosen = sum(layer.split(".")[0] in stages for layer in layers)
        model.add_task("t", num_classes=2, config=SeparateLayersConfig(bottom=chosen))
        digits = len(share) - 1 - share.index(".")
        assert f"{100 * model.report('t').open / _weights(model):.{digits}f}" == share
        model.delete_task("t")


def test_shares_of_private_tops() -> None:
    """A ResNet-50's last convolution alone is 4.47 % of all of its weights."""
    models = pytest.importorskip("torchvision").models
    model, found = TaskModel(models.resnet50()), []
    for top in (1, 2, 3, 6, 10):
        model.add_task("t", num_classes=2, config=SeparateLayersConfig(top=top))
        found.append(f"{100 * model.report('t').open / _weights(model):.2f}")
        model.delete_task("t")
    assert found == ["4.47", "14.53", "19.00", "38.00", "63.71"]


def test_files_hold_what_is_shared_and_what_is_private(tmp_path) -> None:
    """Total = shared + T * private, and four bytes a parameter: statistics, which are no parameters, beside them."""
    model = model_of(SeparateLayersConfig(bottom=2, joint=True), "abc")
    every = sum(p.numel() for p in model.base.parameters())
    private, shared = model.report("a").parameters, model.report("a").shared
    assert shared + private == every
    model.save_shared("separate-layers", tmp_path / "shared.taps")
    sizes = []
    for name in ("shared", *"abc"):
        if name != "shared":
            model.save_task(name, tmp_path / f"{name}.taps")
        tensors = store.read_header(tmp_path / f"{name}.taps").tensors
        sizes.append(sum(i.nbytes for n, i in tensors.items() if "running_" not in n and "num_batches" not in n) / 4)
    assert sizes == [shared, private, private, private]


# ------------------------------------------------------------------------------------ joint TAPS


def _dyadic(like: Tensor) -> Tensor:
    """Multiples of 1/256 in [-1, 1]: their sums are exact, in float32 and with the net's weights in float64."""
    return torch.randint(-256, 257, like.shape).to(like) / 256


def joint(tasks: str = "ab") -> TaskModel:
    """Joint TAPS with S and Deltas that are no zeros."""
    model = model_of(JointTapsConfig(lam=0.1), tasks).eval()
    with torch.no_grad():
        for held in (*model.families.values(), *(model.state(task) for task in tasks)):
            for _, part, _ in held.gated():
                part.change.delta.copy_(_dyadic(part.change.delta))
    return model


@torch.no_grad()
def test_a_constant_may_move_from_the_deltas_into_what_is_shared() -> None:
    """S + C and D_t - C: every W_t in float64 is the same, and so are the outputs, while every gate is open."""
    model, x = joint().double(), images(dtype=torch.float64)
    (family,) = model.families.values()
    before = {task: (model.task_state_dict(task), model(x, task=task)) for task in "ab"}
    for name, part, _ in family.gated():
        constant = _dyadic(part.change.delta)
        part.change.delta.add_(constant)
        for task in "ab":
            model.state(task).table[name].change.delta.sub_(constant)
    for task, (tensors, output) in before.items():
        now = model.task_state_dict(task)
        assert all(torch.equal(now[name], tensor) for name, tensor in tensors.items())
        assert torch.equal(model(x, task=task), output)
    model.set_gates("a", open=["conv1", "hidden"])  # and no longer where one is closed
    assert not torch.equal(model.task_state_dict("a")["conv2.weight"], before["a"][0]["conv2.weight"])


@torch.no_grad()
@pytest.mark.parametrize("closed", [["conv2"], ["conv1", "hidden"], ["conv1", "conv2", "depthwise", "hidden"]])
def test_closing_a_gate_drops_its_delta(closed: list[str]) -> None:
    """Bit for bit; with all gates closed the task is the shared net with its own norms and head."""
    model, x = joint(), images()
    dropped = copy.deepcopy(model)
    for name in closed:
        model.state("a").table[name].gate.score.fill_(0.05)
        dropped.state("a").table[name].change.delta.zero_()
    assert torch.equal(model(x, task="a"), dropped(x, task="a"))
    assert torch.equal(model(x, task="b"), dropped(x, task="b"))
    if len(closed) == 4:
        plain, (family,), own = net(), dropped.families.values(), dropped.state("a")
        for name, part, _ in family.gated():
            plain.get_submodule(name).weight += part.change.delta
        plain.fc.load_state_dict(own.head.state_dict())
        assert torch.equal(plain(x), model(x, task="a"))


def test_the_gradients_of_joint_taps() -> None:
    """With G_t = dL_t / dW_t in float64: dS = sum_t G_t, dD_t = g_t G_t, ds_t = <G_t, D_t> + lambda / L sign(s_t).

    A Delta's gradient is rounded to float32 once, and the two of S are added; <G, D> is a sum of K products in double
    precision, rounded to float32 once."""
    model = joint().double()
    x = {task: images(dtype=torch.float64) for task in "ab"}
    with torch.no_grad():
        model.state("a").table["conv2"].gate.score.fill_(0.05)
    grads = {}
    for task in "ab":
        plain = model._plain_copy(task).requires_grad_().train()
        plain(x[task]).square().mean().backward()
        grads[task] = {name: p.grad for name, p in plain.named_parameters()}
    model.train()
    for task in "ab":
        model(x[task], task=task).square().mean().backward()
        model.sparsity_loss(task).backward()
    (family,) = model.families.values()
    for name, part, _ in family.gated():
        key = f"{name}.weight"
        assert torch.equal(part.change.delta.grad, grads["a"][key].float() + grads["b"][key].float()), name
        for task in "ab":
            own = model.state(task).table[name]
            delta, gradient = own.change.delta.detach().double(), grads[task][key]
            opened = (task, name) != ("a", "conv2")
            assert (own.change.delta.grad is not None) == opened
            assert not opened or torch.equal(own.change.delta.grad, gradient.float())
            want = (gradient * delta).sum() + 0.1 / 4
            sums = delta.numel() * EPS * float((gradient * delta).abs().sum())
            rounded = 2 * torch.finfo(torch.float32).eps * (abs(float(want)) + 0.1 / 4)
            assert abs(float(own.gate.score.grad) - float(want)) <= sums + rounded, (task, name)


def test_what_joint_taps_holds() -> None:
    """Trained: 1 + T copies of the gated weights beside the base's; stored: 1 + the tasks' open shares."""
    model = joint()
    gated = model.report("a").gated
    (family,) = model.families.values()
    trained = [
        p
        for held in (family, model.state("a"), model.state("b"))
        for _, part, _ in held.gated()
        for p in part.changes()
    ]
    assert sum(p.numel() for p in trained) == 3 * gated
    model.set_gates("a", open=["conv2"])
    model.set_gates("b", open=[])
    stored = model.report("a").shared + sum(row.own for task in "ab" for row in model.report(task).rows)
    assert stored == gated + model.base.conv2.weight.numel()


# ------------------------------------------------------------------------------------ reparameterised convolutions


@pytest.mark.parametrize(
    ("name", "kernel_sizes", "ungrouped", "every", "percent"),
    [
        ("densenet121", "all", None, 1_357_824, 19.8),
        ("mobilenet_v2", "all", None, 6_385_504, 292.0),
        ("mobilenet_v2", "k>1", 1_024, None, None),
    ],
)
def test_counts_of_modulators(name, kernel_sizes, ungrouped, every, percent) -> None:
    models = pytest.importorskip("torchvision").models
    base = getattr(models, name)()
    groups = {n: m.groups for n, m in base.named_modules() if isinstance(m, nn.Conv2d)}
    model = TaskModel(base)
    weights = _weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are many
        model.add_task("t", num_classes=2, config=RcmConfig(kernel_sizes=kernel_sizes, normalise=False))
    report = model.report("t")
    rows = {row.layer: row.own for row in report.rows if row.change == "modulator"}
    if every is not None:
        assert sum(rows.values()) == every
        assert f"{100 * every / weights:.3g}" == f"{percent:.3g}"
    if ungrouped is not None:
        assert sum(own for layer, own in rows.items() if groups[layer] == 1) == ungrouped


def test_the_sign_of_a_norms_mean() -> None:
    """BN(z + b; mu) = BN(z; mu - b), in evaluation mode: what low-rank modulators restore a lost mean by."""
    torch.manual_seed(0)
    norm = settle(nn.Sequential(nn.BatchNorm2d(6)))[0].double().requires_grad_(False)
    z, b = torch.randn(4, 6, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    want = norm(z + b[:, None, None])

    def shifted(mean: Tensor) -> Tensor:
        return F.batch_norm(z, mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    scale = float(
        (norm.weight / norm.running_var.sqrt()).max()
    )  # of what is summed before the norm, in three roundings
    limit = 4 * EPS * (float(want.abs().max()) + scale * float(z.abs().max() + b.abs().max()))
    assert float((shifted(norm.running_mean - b) - want).abs().max()) <= limit
    assert float((shifted(norm.running_mean + b) - want).abs().max()) > 0.1
