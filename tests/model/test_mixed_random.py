"""Random batches of several tasks: sizes, orders, tasks of every method beside each other, open and closed layers, both
types, in evaluation and in training, on both roads. `make fuzz` draws ten thousand, `make test` a few.

Tasks of one TaskModel are of different methods and families. Outputs are of order one, sums have fewer than 1,000 terms
and pass through fewer than 10 layers, each of which at most doubles what reaches it: in float64 1e-10 is 50 times the
sum of such errors (as test_mixed.py), in fp32 the same sum is 10 * 1000 * 2 * 2**-24.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from method_cases import CASES, FAMILIES, images, make_base, without_fast_path
from stages import SEED, THOROUGH
from test_mixed import separate
from torch import Tensor

import taps_ext.model.mixing as mixing
from taps_ext import TaskModel

BOUNDS = {torch.float64: 1e-10, torch.float32: 10 * 1000 * 2 * 2.0**-24}
DRAWS = 2500 if THOROUGH else 12  # of each base and type
OF_CONV = ["taps", "taps-all", "full", "probe", "scale-bias", "scale-bias-joint", "separate-bottom", "separate-joint"]
OF_CONV += ["depthwise", "lora", "lora-selective", "bitfit", "rcm", "adapter-series", "singular", "joint-taps"]
OF_VIT = [case for case in OF_CONV if case not in ("depthwise", "rcm", "adapter-series")]
METHODS = {"conv": OF_CONV, "vit": OF_VIT}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    with without_fast_path():
        yield
    mixing.forced = None


def several(base: str, dtype: torch.dtype) -> TaskModel:
    """A task of each method, with heads of 3 to 5 outputs, none as it starts."""
    assert len({CASES[case].shared.__qualname__ for case in METHODS[base] if case in FAMILIES}) > 1
    model = TaskModel(make_base(base))
    torch.manual_seed(1)
    for index, case in enumerate(METHODS[base]):
        model.add_task(case, num_classes=3 + index % 3, config=CASES[case])
    with torch.no_grad():
        for name in model.tasks:
            for part in model.state(name).table.values():
                for role, parameters in part.roles().items():
                    for parameter in parameters if role != "score" else ():
                        parameter.add_(torch.randn(parameter.shape) * 0.05)
        for family in model.families.values():
            for parameter in family.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.to(dtype)


def set_some_gates(model: TaskModel, chance: random.Random) -> None:
    with torch.no_grad():
        for name in model.tasks:
            for _, _, gate in model.state(name).learned():
                gate.score.fill_(chance.choice((0.05, 0.15)))


def close(got: Tensor, want: Tensor, bound: float) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= bound * max(1.0, float(want.abs().max())))


def gradients(model: TaskModel, x: Tensor, outputs: list[Tensor]) -> dict[str, Tensor]:
    loss = torch.stack([(row + 1) * output.square().sum() for row, output in enumerate(outputs)]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
    model.zero_grad(set_to_none=True)
    return found  # type: ignore[return-value]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).partition(".")[2])
@pytest.mark.parametrize("base", METHODS)
def test_random_batches_are_separate_runs(base: str, dtype: torch.dtype, record_property) -> None:
    record_property("drawn", f"mixed batches by seed {SEED}")
    model, chance, bound = several(base, dtype), random.Random(f"{SEED} {base} {dtype}"), BOUNDS[dtype]
    of_norms = {name for name in model.tasks if base == "conv" and name not in ("probe", "lora", "bitfit")}
    for draw in range(DRAWS):
        set_some_gates(model, chance)
        present: list[str | None] = [*chance.sample(model.tasks, chance.randint(1, 6)), *[None] * chance.randint(0, 1)]
        size = chance.randint(1, 12)
        names = [chance.choice(present) for _ in range(size)]
        x = images(base)[torch.tensor([chance.randrange(6) for _ in range(size)])].to(dtype)
        x = x * (1 + 0.1 * torch.randn(size, 1, 1, 1, dtype=dtype))
        mixing.forced = chance.choice(("layers", "tasks", None))
        model.row_invariant = chance.random() < 0.2
        said = f"draw {draw}: {names}, road {mixing.forced}, row_invariant {model.row_invariant}"
        model.eval()
        with torch.no_grad():
            out, want = list(model(x, tasks=names)), separate(model, x, names)
        for got, one in zip(out, want, strict=True):
            assert torch.equal(got, one) if model.row_invariant else close(got, one, bound), said
        if draw % 4 or {name for name in of_norms if names.count(name) == 1}:
            continue  # in training a statistic of one sample's single pixel is refused
        model.train()
        mixed, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
        got_of = gradients(model, mixed, list(model(mixed, tasks=names)))
        want_of = gradients(model, alone, separate(model, alone, names))
        assert got_of.keys() == want_of.keys(), said
        largest = max(1.0, *(float(gradient.abs().max()) for gradient in want_of.values()))
        for name, gradient in want_of.items():
            assert (got_of[name] - gradient).abs().max() <= bound * largest, (name, said)
