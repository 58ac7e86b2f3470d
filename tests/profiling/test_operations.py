"""What a task's forward computes, and what of it no other task can share."""

from __future__ import annotations

import pytest
import torch
from method_cases import make_base
from torch import Tensor, nn

from taps_ext import (
    BitFitConfig,
    ConfigError,
    FullConfig,
    JointTapsConfig,
    LoraConfig,
    ProbeConfig,
    ScaleBiasConfig,
    SeparateLayersConfig,
    TapsConfig,
    TaskModel,
    operations,
    zoo,
)

SHAPE = (2, 3, 16, 16)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return zoo.small_resnet(num_classes=10, channels=3)


def products(base: nn.Module, x: Tensor) -> dict[str, int]:
    """Two for each multiply-add of the base's convolutions and linear layers, in the order of execution."""
    found: dict[str, int] = {}

    def count(name: str):
        def hook(module: nn.Module, args: object, y: Tensor) -> None:
            found[name] = 2 * y.numel() * module.weight[0].numel()

        return hook

    layers = [(n, m) for n, m in base.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(count(n)) for n, m in layers]
    with torch.no_grad():
        base.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


def added(model: TaskModel, config, **settings) -> tuple[int, int, str | None]:
    name = f"t{len(model.tasks)}"
    model.add_task(name, num_classes=10, config=config)
    for layer, score in settings.get("scores", {}).items():
        with torch.no_grad():
            model.state(name).table[layer].gate.score.fill_(score)
    found = operations(model, (torch.empty(SHAPE, device="meta"),), task=name)
    return found.forward, found.added, found.first


def test_what_a_task_adds() -> None:
    """By where its private layers, norms and heads begin."""
    base = resnet()
    each = products(base, torch.zeros(SHAPE))
    layers, whole = list(each), sum(each.values())
    model = TaskModel(base, head_module=layers[-1])
    frozen = {"norm": "frozen"}
    first, last, head = layers[0], layers[-2], layers[-1]
    assert added(model, SeparateLayersConfig(bottom=1, **frozen)) == (whole, whole, first)
    assert added(model, SeparateLayersConfig(top=1, **frozen)) == (whole, each[last] + each[head], last)
    assert added(model, ProbeConfig()) == (whole, each[head], head)
    assert added(model, FullConfig()) == (whole, whole, first)
    norm = next(n for n, m in base.named_modules() if isinstance(m, nn.BatchNorm2d))
    assert added(model, ScaleBiasConfig()) == (whole, whole - each[first], norm)
    assert added(model, ScaleBiasConfig())[2] == norm


@pytest.mark.parametrize("opened", [0, 3, -2])
def test_closed_gates_are_shared(opened: int) -> None:
    """TAPS without norms of its own adds what follows its first open gate, with them what follows its first norm."""
    base = resnet()
    each = products(base, torch.zeros(SHAPE))
    layers = list(each)
    model = TaskModel(base, head_module=layers[-1])
    scores = {layer: 0.15 if layer == layers[opened] else 0.05 for layer in layers[:-1]}
    rest = sum(each[layer] for layer in layers[opened:])
    for config in (TapsConfig(lam=0.1, norm="frozen"), JointTapsConfig(lam=0.1, norm="frozen")):
        assert added(model, config, scores=scores)[1:] == (rest, layers[opened])
    behind = rest if opened == 0 else sum(each.values()) - each[layers[0]]
    assert added(model, TapsConfig(lam=0.1), scores=scores)[1] == behind


def test_products_of_the_task_are_counted() -> None:
    """LoRA's run beside the base's; a bias is a difference, though it counts nothing itself."""
    base = resnet()
    each = products(base, torch.zeros(SHAPE))
    model = TaskModel(base, head_module=list(each)[-1])
    forward, more, first = added(model, LoraConfig(rank=2))
    assert forward == more > sum(each.values()) and first == next(iter(each))
    has_bias = TaskModel(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.Flatten(), nn.Linear(1024, 4))
    )
    assert added(has_bias, BitFitConfig())[2] == "0"


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_is_run_or_changed(mode: bool) -> None:
    base = resnet()
    model = TaskModel(base, ScaleBiasConfig()).train(mode)
    model.add_task("t", num_classes=4)
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    with model.use_task("t"):
        found = operations(model, (torch.zeros(SHAPE),))
    assert found.to_dict() == {"forward": found.forward, "added": found.added, "first": found.first}
    assert found.forward == 2 * operations(model, (torch.zeros(1, *SHAPE[1:]),), task="t").forward
    assert model.training is mode
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)


def test_attention_and_weights_that_are_read() -> None:
    """A task that opens one layer adds what follows it; its output projection's weight an attention reads at first."""
    model = TaskModel(make_base("vit"), TapsConfig(lam=0.1, norm="frozen"))
    layers, adds = ["block.fc2", "block.fc1", "block.attention.out_proj", "block.attention", "embed.conv"], []
    model.add_task("probe", num_classes=10, config=ProbeConfig())
    x = (torch.empty(2, 3, 8, 8, device="meta"),)
    head = operations(model, x, task="probe")
    assert head.added == 2 * 2 * 8 * 10 and head.first == "fc"
    for index, layer in enumerate(layers):
        model.add_task(f"t{index}", num_classes=10)
        with torch.no_grad():
            for other in layers:
                model.state(f"t{index}").table[other].gate.score.fill_(0.15 if other == layer else 0.05)
        found = operations(model, x, task=f"t{index}")
        assert found.first == layer and found.forward == head.forward
        adds.append(found.added)
    second, first, out, attention, whole = adds
    assert second == head.added + 2 * 2 * 5 * 16 * 8 and first == second + 2 * 2 * 5 * 8 * 16  # 2 images, 5 tokens
    # queries, keys and values, their products, and the projection
    assert out == attention == first + 2 * 2 * 5 * 8 * 24 + 2 * (2 * 2 * 5 * 5 * 8) + 2 * 2 * 5 * 8 * 8
    assert whole == head.forward == attention + 2 * 2 * 4 * 8 * 3 * 4 * 4


def test_a_base_without_a_difference() -> None:
    model = TaskModel(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(1024, 4, bias=False)))
    with pytest.warns(UserWarning, match="finds nothing to train"):
        model.add_task("t", config=ScaleBiasConfig(last_layer=False))
    found = operations(model, (torch.empty(SHAPE, device="meta"),), task="t")
    assert (found.added, found.first) == (0, None) and found.forward > 0


def test_mistakes_are_told() -> None:
    model = TaskModel(resnet(), ProbeConfig())
    model.add_task("t", num_classes=2)
    for call, message in (
        (lambda: operations(model, (torch.zeros(SHAPE),)), "task: expected the name of a task, none being active"),
        (lambda: operations(model, (torch.zeros(SHAPE),), task="u"), "task: expected one of"),
        (lambda: operations(model, torch.zeros(SHAPE), task="t"), "inputs: expected a tuple"),
        (lambda: operations(model.base, (torch.zeros(SHAPE),), task="t"), "model: expected a TaskModel"),
        (lambda: operations(model, (torch.zeros(2, 9, 4, 4),), task="t"), "inputs: the model cannot run"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
