"""Random small models, adapted, trained, saved, loaded and unloaded: every promise on every one.

500 of them in `make fuzz`. Outputs are compared bit for bit with models that are frozen as the adapted base is: torch
picks the product of a linear layer by whether its weight requires a gradient (`should_fold` in its matmul).
"""

from __future__ import annotations

import copy
import io
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from random_models import Attention, bases
from stages import THOROUGH
from torch import Tensor, nn

from taps_ext import FullConfig, ProbeConfig, TapsConfig, TaskModel

EXAMPLES = 500 if THOROUGH else 40


@st.composite
def configs(draw):
    kind = draw(st.sampled_from(["taps", "taps", "taps", "full", "probe"]))
    if kind != "taps":
        return {"full": FullConfig, "probe": ProbeConfig}[kind]()
    others = draw(st.sampled_from(["frozen", "task"]))
    norm = draw(st.sampled_from(["task", "frozen"]))
    return TapsConfig(lam=draw(st.sampled_from([0.0, 0.5, 40.0])), others=others, norm=norm)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)


def fused_paths(model: TaskModel) -> set[bool]:
    """Which paths its attention takes in evaluation: open ones the slow path, closed ones and encoder layers the fused.

    They round differently, and a merged copy can only be told to take one of them throughout. With device gates a
    closed one takes the slow path, merged the fused one.
    """
    opened = set(model.state("t").open_layers())
    paths = set()
    for name, module in model.base.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            paths.add(True)
        if isinstance(module, Attention):
            paths.add(not any(layer.startswith(name) for layer in opened))
    return paths


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    base=bases(),
    config=configs(),
    gates=st.sampled_from(["host", "device"]),
    adamw=st.booleans(),
    seed=st.integers(0, 1000),
    scores=st.lists(st.sampled_from([0.05, 0.15]), min_size=1, max_size=4),
)
def test_adapt_train_save_load_unload(base, config, gates, adamw, seed, scores) -> None:
    torch.manual_seed(seed)
    plain, modes = copy.deepcopy(base), [m.training for m in base.modules()]
    before, x = state_of(base), torch.randn(3, 2, 8, 8)
    plain.eval().requires_grad_(False)
    model = TaskModel(base, config, gates=gates).train()
    model.add_task("t", num_classes=3)
    with torch.no_grad():
        for index, (_, part, _) in enumerate(model.state("t").gated()):
            if part.change is not None:
                part.change.delta.normal_(0, 0.1)
            if part.gate.score is not None:
                part.gate.score.fill_(scores[index % len(scores)])
    groups = model.parameter_groups("t", lr=0.05)
    optimizer = torch.optim.AdamW(groups) if adamw else torch.optim.SGD(groups, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, task="t"), torch.tensor([0, 1, 2]))
        (loss + model.sparsity_loss("t")).backward()
        model.drop_closed_gradients("t")
        optimizer.step()
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        want = model(x, task="t")
        assert torch.isfinite(want).all()
        assert torch.equal(model(x, task=None), plain(x))
        model.save_task("t", Path(folder) / "t.taps")
        fresh = TaskModel(copy.deepcopy(plain), gates=gates).eval()
        fresh.load_task(Path(folder) / "t.taps", "again")
        assert torch.equal(fresh(x, task="again"), want)
        fused = fused_paths(model)
        model.merge_task("t")
        assert torch.equal(model(x, task="t"), want) or (gates == "device" and True in fused)
        model.unmerge_task()
        assert torch.equal(model(x, task="t"), want)
        merged = copy.deepcopy(model).merge_and_unload("t").requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(fused != {False})
        try:
            assert torch.equal(merged(x), want) or len(fused) > 1 or (gates == "device" and True in fused)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        again = io.BytesIO()
        torch.save(model, again)
        again.seek(0)
        assert torch.equal(torch.load(again, weights_only=False)(x, task="t"), want)
    assert model.unload() is base and equal(base.state_dict(), before)
    assert [m.training for m in base.modules()] == modes
    assert all(p.requires_grad for p in base.parameters())
    with torch.no_grad():
        assert torch.equal(base.eval().requires_grad_(False)(x), plain(x))
