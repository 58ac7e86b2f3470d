"""A fine-tuned checkpoint and a task are the same thing twice: nothing is lost on the way, in either direction."""

import copy

import pytest
import torch
from torch import nn

import taps_ext
from taps_ext.errors import ConfigError
from taps_ext.files.checkpoint import exact_delta, same_bits
from taps_ext.zoo import SmallResNet


class Small(nn.Module):
    """Convolution, batch norm, attention, layer norm, a token, an integer buffer and a head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.LayerNorm(8)
        self.order = nn.Module()
        self.order.register_buffer("index", torch.arange(17))
        self.fc = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)[:, self.order.index]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(self.scale(x)[:, 0])


def fine_tuned(base: nn.Module, classes: int, *, same: tuple[str, ...] = ()) -> nn.Module:
    """A copy in which training has moved every tensor but those under `same`, with a head of its own."""
    torch.manual_seed(1)
    tuned = copy.deepcopy(base)
    tuned.fc = nn.Linear(tuned.fc.in_features, classes).to(next(base.parameters()).dtype)
    with torch.no_grad():
        for name, tensor in [*tuned.named_parameters(), *tuned.named_buffers()]:
            if not name.startswith(same) and tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.randn_like(tensor)).add_(1e-3 * torch.rand_like(tensor))
            elif name.endswith("num_batches_tracked"):
                tensor.add_(7)
    return tuned.eval()


def equal_states(first: dict, second: dict) -> bool:
    return list(first) == list(second) and all(same_bits(first[k], second[k]) for k in first)


def small_resnet() -> nn.Module:
    return SmallResNet(widths=(8, 16), blocks=1, channels=3)


def rebuilt(make, state: dict, dtype: torch.dtype) -> nn.Module:
    base = make().to(dtype).eval()
    base.load_state_dict(state)
    return base


@pytest.fixture
def slow_attention():
    """torch's fast path of attention rounds differently; a gated attention does not take it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "same"), [(Small, "attention.in_proj_weight"), (small_resnet, "stem.weight")])
def test_there_and_back(make, same, dtype, tmp_path, slow_attention) -> None:
    torch.manual_seed(0)
    base = make().to(dtype).eval()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    tuned = fine_tuned(base, classes=3, same=(same,))
    x = torch.randn(4, 3, 4, 4, dtype=dtype)
    with torch.no_grad():
        wanted = tuned(x)
    model = taps_ext.TaskModel(base)
    model.extract_task("t", tuned.state_dict())
    model.save_task("t", tmp_path / "t.taps")
    other = taps_ext.TaskModel(rebuilt(make, before, dtype))
    other.load_task(tmp_path / "t.taps")
    for one in (model.eval(), other.eval()):
        assert equal_states(one.task_state_dict("t"), tuned.state_dict())
        closed = [row.layer for row in one.report("t").rows if not row.open]
        assert closed == [same.rpartition(".")[0]]
        with torch.no_grad():
            assert same_bits(one(x, task="t"), wanted)
            one.merge_task("t")
            assert same_bits(one(x, task="t"), wanted)
            one.unmerge_task()
    with torch.no_grad():
        plain = other.merge_and_unload("t").eval()
        assert same_bits(plain(x), wanted) and equal_states(plain.state_dict(), tuned.state_dict())
    assert equal_states(model.unload().state_dict(), before)


def test_what_each_layer_holds() -> None:
    """Half precision is exact as W + Delta; in float32 a W_t far below W is not, and is held itself."""
    torch.manual_seed(0)
    w = torch.randn(64, 64)
    tiny = w * 1e-6
    assert exact_delta(w, w * 1.5) is not None  # W_t - W is a float32 for every element of this size
    assert exact_delta(w, tiny) is None
    assert exact_delta(w.bfloat16(), (w * 1.1).bfloat16()) is not None
    assert exact_delta(torch.zeros(3), torch.tensor([1.0, -2.0, -0.0])) is None  # 0 + -0 is 0, another bit
    base = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 4))
    with torch.no_grad():
        base[0].weight.copy_(w)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.copy_(tiny)
        tuned[1].weight.zero_()
    model = taps_ext.TaskModel(base, head_module="2")
    model.extract_task("t", tuned.state_dict())
    parts = {name: part for name, part, _ in model.state("t").gated()}
    assert [part.change.kind for part in parts.values()] == ["whole", "dense"]
    assert same_bits(parts["0"].change.weight, tiny) and same_bits(parts["1"].change.delta, -base[1].weight)
    report = model.report("t")
    assert report.share == 1.0 and report.rows[0].bytes == 64 * 64 * 4


def test_a_layer_with_its_own_weight_is_a_layer(tmp_path) -> None:
    """It trains, closes and opens, moves, copies, and is refused with a learned gate."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.mul_(1e-6)
    x = torch.randn(5, 6)
    plain_base = copy.deepcopy(base)
    model = taps_ext.TaskModel(base)
    model.extract_task("t", tuned.state_dict())
    part = model.state("t").table["0"]
    loss, reference = model(x, task="t").square().sum(), tuned(x).square().sum()
    loss.backward()
    reference.backward()
    assert same_bits(part.change.weight.grad, tuned[0].weight.grad) and same_bits(loss, reference)
    names = {group["name"]: len(group["params"]) for group in model.parameter_groups(lr=0.1)}
    assert names == {"other": 2, "head": 2}  # bias and weight of layer 0; no Delta, no score
    assert [p.dim() for p in model.parameter_groups(lr=0.1)[0]["params"]] == [1, 2]  # as states of 0.1's runs have it
    model.set_gates("t", open=[])
    plain_base[2].load_state_dict(tuned[2].state_dict())
    assert part.change.weight.grad is None and not part.change.weight.requires_grad
    assert same_bits(model(x, task="t"), plain_base(x))
    model.set_gates("t", open=["0"])
    assert part.change.weight.requires_grad and same_bits(model(x, task="t"), tuned(x))
    assert same_bits(copy.deepcopy(model)(x, task="t"), tuned(x))
    model.to(torch.bfloat16)
    assert part.change.weight.dtype == torch.bfloat16
    assert same_bits(model(x.bfloat16(), task="t"), copy.deepcopy(tuned).bfloat16()(x.bfloat16()))
    with torch.no_grad():
        part.change.weight[0, 0] = torch.nan
    with pytest.raises(taps_ext.GateError, match="0: weight: expected finite"):
        model.save_task("t", tmp_path / "t.taps")


def test_wrapped_names_and_other_layouts() -> None:
    base = small_resnet().eval()
    tuned = fine_tuned(base, classes=4)
    state = {
        "module._orig_mod." + k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v
        for k, v in tuned.state_dict().items()
    }
    model = taps_ext.TaskModel(base).eval()
    model.extract_task("t", state)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert same_bits(model(x, task="t"), tuned(x))


def test_tied_modules_stay_tied() -> None:
    """One module under two names: both names of the plain checkpoint have the task's values."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.again(self.first(x)))

    base = Twice()
    tuned = fine_tuned(base, classes=2)
    model = taps_ext.TaskModel(base)
    model.extract_task("t", tuned.state_dict())
    x = torch.randn(3, 4)
    assert same_bits(model(x, task="t"), tuned(x)) and equal_states(model.task_state_dict("t"), tuned.state_dict())
    state = tuned.state_dict()
    state["again.bias"] = state["again.bias"] + 1
    with pytest.raises(ConfigError, match=r"again\.bias: expected the same values as first\.bias"):
        model.extract_task("u", state)
    assert model.tasks == ["t"]


def broken(change):
    state = fine_tuned(Small().eval(), classes=3).state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.running_mean"), r"has no 'norm\.running_mean' \(1 missing, 0 too many of 15 tensors\)"),
        (lambda s: s.update(extra=torch.zeros(1)), "holds 'extra', which the base has not"),
        (
            lambda s: s.update({"conv.weight": torch.zeros(8, 3, 1, 1)}),
            r"conv\.weight: expected torch.float32 \[8, 3, 3, 3\]",
        ),
        (lambda s: s.update({"conv.weight": s["conv.weight"].half()}), r"conv\.weight: .* got torch.float16"),
        (lambda s: s["conv.weight"].fill_(torch.nan), r"conv\.weight: expected finite values"),
        (lambda s: s["norm.weight"].fill_(torch.inf), r"norm\.weight: expected finite values"),
        (lambda s: s["fc.bias"].fill_(torch.nan), r"fc\.bias: expected finite values"),
        (lambda s: s.pop("fc.bias"), r"has no 'fc\.bias'"),
        (
            lambda s: s.update({"fc.weight": torch.zeros(3, 9)}),
            r"fc\.weight: expected torch.float32 \[3, 8\] as in the head",
        ),
        (lambda s: s.update({"module.conv.bias": s["conv.bias"]}), "is there twice"),
        (lambda s: s.update(epoch=3), "expected tensors by name, got int under 'epoch'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message) -> None:
    model = taps_ext.TaskModel(Small().eval())
    with pytest.raises(ConfigError, match=message):
        model.extract_task("t", broken(change))
    assert model.tasks == []


def test_arguments() -> None:
    base = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[2].weight.mul_(2)
    model = taps_ext.TaskModel(base)
    with pytest.raises(ConfigError, match="state_dict: expected a mapping"):
        model.extract_task("t", tuned)
    with pytest.raises(ConfigError, match="config: expected a FullConfig, got TapsConfig"):
        model.extract_task("t", tuned.state_dict(), config=taps_ext.TapsConfig(lam=1.0))
    model.extract_task("whole", tuned.state_dict())
    without = taps_ext.FullConfig(exclude_modules=["0"])
    model.extract_task("t", tuned.state_dict(), config=without)
    x = torch.randn(3, 2, 4)
    assert same_bits(model(x, task="t"), tuned(x))
    with torch.no_grad():
        tuned[0].weight.mul_(2)
    with pytest.raises(ConfigError, match=r"0\.weight: expected the base's values, since the task cannot hold it"):
        model.extract_task("u", tuned.state_dict(), config=without)


def test_what_cannot_be_gated_may_be_left_to_the_base() -> None:
    """A layer under weight norm, whose tensors the checkpoint has as the base has them."""
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.LSTMCell(4, 3), nn.Linear(3, 2))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[1].weight_hh.add_(1)
        tuned[1].bias_ih.add_(1)
    with pytest.raises(taps_ext.UnsupportedModuleError, match="0: expected a plain .*parametrised"):
        taps_ext.TaskModel(copy.deepcopy(base)).extract_task("t", tuned.state_dict())
    model = taps_ext.TaskModel(base, unsupported="freeze")
    model.extract_task("t", tuned.state_dict())
    assert [(row.layer, row.open) for row in model.report("t").rows] == [("1.weight_ih", False), ("1.weight_hh", True)]
    own = model.task_state_dict("t")
    assert all(torch.equal(own[name], value) for name, value in tuned.state_dict().items())
