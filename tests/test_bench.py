"""taps bench: what it measures is what it says, in the order and number that make medians comparable."""

import itertools
import json
import time

import pytest
import torch

from taps_ext import ConfigError, bench, ops
from taps_ext.bench import timing
from taps_ext.profiling import Machine

if not ops.HAS_EXTENSION:
    pytest.skip("the extension is missing, and with it what is measured", allow_module_level=True)


def small(case: bench.Case) -> bool:
    """Cases that are made and run in a moment."""
    return case.moved < 2**27 and case.operations < 2**29 and case.group != "step"


def outputs(case: bench.Case, turn: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: run(turn) for name, run in case.make().items()}


@pytest.mark.parametrize("group", ["linear", "conv2d", "closed"])
def test_every_variant_computes_the_same(group) -> None:
    """With the weights of each turn, so that no variant measures other work than ours."""
    cases = [case for case in bench.suite([group], full=True) if small(case)]
    assert len(cases) > (0 if group == "closed" else 5)
    for case in cases[:: max(1, len(cases) // 8)]:
        for turn in (0, 5):
            found = outputs(case, turn)
            exact = found["stock"].double()
            for name, output in found.items():
                # Sums of `depth` terms in fp32, each step rounded at the size that the sum has by then; W_t, and both
                # products of "two products", rounded to the type.
                depth = case.operations / (2 * exact.numel())
                relative = 4 * torch.finfo(case.dtype).eps + depth**0.5 * torch.finfo(torch.float32).eps
                assert (output.double() - exact).abs().max() <= relative * exact.abs().max(), (case.layer, name)


def test_gradients_and_calls_are_run() -> None:
    for case in bench.suite(["gradient", "call"]):
        if case.rows > 256:
            continue
        for run in case.make().values():
            run(0)
            run(1)


def test_gradients_are_what_autograd_gives() -> None:
    case = next(case for case in bench.suite(["gradient"]) if case.rows == 256 and "open" in case.layer)
    torch.manual_seed(0)
    variants = case.make()
    taps, (gradient, score) = variants["taps"](3), variants["product and sum"](3)
    torch.testing.assert_close(taps[1], gradient)
    torch.testing.assert_close(taps[2], score, rtol=1e-3, atol=1e-2)


def test_steps_leave_closed_layers_closed() -> None:
    cases = bench.suite(["step"])
    assert len(cases) == 3
    for run in cases[-1].make().values():
        run(0)


def test_variants_take_turns() -> None:
    order = []
    runs = {name: (lambda i, name=name: order.append((name, i)) or time.sleep(3e-4)) for name in "abc"}
    times = timing.interleaved(runs, 0.0, torch.device("cpu"))
    assert set(times) == set("abc") and all(3e-4 <= value < 1 for value in times.values())
    assert [turn for _, turn in order] == list(range(len(order)))  # every call has cold weights of its own
    rounds = [name for name, _ in order][-3 * timing.LEAST :]
    assert rounds == list(itertools.chain.from_iterable(["abc"] * timing.LEAST))


def test_short_runs_are_repeated() -> None:
    count = []
    timing.interleaved({"short": count.append}, 0.0, torch.device("cpu"))
    assert len(count) > 100 * timing.LEAST


def test_results_say_what_was_measured() -> None:
    case = next(c for c in bench.suite(["linear"]) if c.rows == 8 and "1024" in c.layer and c.dtype == torch.float32)
    state = torch.get_rng_state()
    (result,) = bench.run([case], seconds=0.1)
    assert torch.equal(state, torch.get_rng_state())
    assert result.path == "fused" and result.alternative in ("add + op", "two products")
    assert result.ratio == result.seconds["taps"] / result.seconds["stock"]
    assert result.against == result.seconds["taps"] / min(result.seconds["add + op"], result.seconds["two products"])
    assert 0.0 < result.share < 3.0
    found = json.loads(json.dumps(result.to_dict()))
    assert found["dtype"] == "float32" and found["ratio"] == result.ratio
    assert "| 1024 x 1024 | 8 | float32 | fused |" in bench.table([result])


def test_the_limit_is_the_roofline() -> None:
    case = bench.Case(
        "linear", "x", 1, torch.float32, lambda: {"taps": lambda i: None, "stock": lambda i: None}, 10, 40
    )
    result = timing._measured(case, Machine(bandwidth=5.0, rate=10.0), 0.0, torch.device("cpu"))
    assert result.limit == 4.0 and result.against is None


def test_unknown_groups_are_named() -> None:
    with pytest.raises(ConfigError, match="groups: expected some of linear, .*, got 'conv3d'"):
        bench.suite(["conv3d"])


def test_the_command(call, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bench.png"
    code, out, err = call("bench", "--groups", "call", "--seconds", 1, "--threads", 1, "--plot", picture, "--json")
    found = json.loads(out)
    assert code == 0 and picture.read_bytes()[:4] == b"\x89PNG" and err.count("of the stock op") == 4
    assert {row["group"] for row in found["results"]} == {"call"} and found["machine"]["torch"] == torch.__version__
    code, out, _ = call("bench", "--groups", "call", "--seconds", 1)
    assert code == 0 and "### call" in out and "64 x 64, open, both ways" in out
    code, _, err = call("bench", "--groups", "everything")
    assert code == 2 and "groups: expected some of" in err
    monkeypatch.setattr(ops, "_C", None)
    code, _, err = call("bench", "--groups", "call")
    assert code == 2 and "the compiled extension" in err
