"""taps bench: what it measures is what it says, in the order and number that make medians comparable."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_close, bound

import taps_ext
from taps_ext import ConfigError, bench, ops
from taps_ext.bench import cases, timing
from taps_ext.bench.result import combined
from taps_ext.profiling import Machine

if not ops.HAS_EXTENSION:
    pytest.skip("the extension is missing, and with it what is measured", allow_module_level=True)


def small(case: bench.Case) -> bool:
    """Cases that are made and run in a moment."""
    return case.moved < 2**27 and case.operations < 2**29 and case.group != "step"


def outputs(case: bench.Case, turn: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with torch.set_grad_enabled(case.gradients):
        return {name: run(turn) for name, run in case.make().items()}


@pytest.mark.parametrize("group", ["linear", "conv2d", "closed"])
def test_every_variant_computes_the_same(group) -> None:
    """With the weights of each turn, so that no variant measures other work than ours."""
    chosen = [case for case in bench.suite([group], full=True) if small(case)]
    assert len(chosen) > (0 if group == "closed" else 5)
    for case in chosen[:: max(1, len(chosen) // 8)]:
        for turn in (0, 5):
            found = outputs(case, turn)
            exact = found["stock"].double()
            for name, output in found.items():
                # Sums of `depth` terms in fp32, each step rounded at the size that the sum has by then; W_t, and both
                # products of "two products", rounded to the type. To forget Delta, as large as W, would be an error of
                # most of it.
                depth = case.operations / (2 * exact.numel())
                relative = 4 * torch.finfo(case.dtype).eps + depth**0.5 * torch.finfo(torch.float32).eps
                assert relative < 0.05
                assert (output.double() - exact).abs().max() <= relative * exact.abs().max(), (case.layer, name)


def test_gradients_and_calls_are_run() -> None:
    for case in bench.suite(["gradient", "call"]):
        if case.rows > 256:
            continue
        with torch.set_grad_enabled(case.gradients):
            for run in case.make().values():
                run(0)
                run(1)


def test_gradients_are_those_of_the_product() -> None:
    """Of both variants, against float64."""
    torch.manual_seed(0)
    case = next(case for case in bench.suite(["gradient"]) if case.rows == 256 and "open" in case.layer)
    variants = case.make()
    torch.manual_seed(0)
    x, dy = torch.randn(256, 768), torch.randn(256, 3072)
    _, deltas, *_ = cases._layer((3072, 768), torch.float32, torch.device("cpu"), torch.contiguous_format)
    exact = dy.double().t() @ x.double()
    taps, other = variants["taps"](3), variants["product and dot"](3)
    for gradient, score in (taps[1:3], other):
        assert_close(gradient, exact, torch.float32, 256, x, dy)
        # A sum over all weights of such elements, each times one of Delta's; accumulated in fp32 by torch.dot.
        terms = exact.numel()
        allowed = bound(torch.float32, 256, x, dy, outer=terms) + bound(torch.float32, terms, exact, deltas[3])
        assert abs(score.item() - (exact * deltas[3].double()).sum().item()) <= allowed


def test_a_step_is_one_of_a_task(monkeypatch) -> None:
    """Closed layers are closed and get no gradient of Delta; the penalty reaches every score."""
    made = []
    plain = taps_ext.TaskModel
    monkeypatch.setattr(taps_ext, "TaskModel", lambda *args: made.append(plain(*args)) or made[-1])
    found = bench.suite(["step"])
    for case in found:
        for run in case.make().values():
            run(0)
        closed = "closed" in case.layer
        parts = [part for _, part, _ in made[-1].state("task").learned()]
        assert len(parts) > 10 and all(part.gate.known is not closed for part in parts)
        assert all((part.change.delta.grad is None) == closed and part.gate.score.grad.abs() > 0 for part in parts)
    assert len(found) == len(made) == 3


def test_variants_take_turns() -> None:
    order = []
    runs = {name: (lambda i, name=name: order.append((name, i)) or time.sleep(3e-4)) for name in "abc"}
    times = timing.interleaved(runs, 0.0, torch.device("cpu"))
    assert set(times) == set("abc") and all(3e-4 <= value < 1 for value in times.values())
    for name in "abc":  # each goes through the weights in its own time
        turns = [turn for owner, turn in order if owner == name]
        assert turns == list(range(turns[0], turns[0] + len(turns)))
    rounds = "".join(name for name, _ in order)[-3 * timing.LEAST :]
    assert rounds == "abcbcacababcbca"


def test_short_runs_are_repeated(monkeypatch) -> None:
    """As often as fill one sample, by a clock that no other work on the machine moves."""
    now, calls = [0.0], []

    def lasting(seconds: float) -> Callable[[int], None]:
        def run(turn: int) -> None:
            calls.append(seconds)
            now[0] += seconds

        return run

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    lengths = (timing.SAMPLE / 4000, timing.SAMPLE / 40, timing.SAMPLE, 3 * timing.SAMPLE)
    times = timing.interleaved({str(length): lasting(length) for length in lengths}, 0.0, torch.device("cpu"))
    for length, repeats in zip(lengths, (1000, 40, 1, 1), strict=True):
        assert calls.count(length) == 4 + timing.LEAST * repeats
        assert times[str(length)] == pytest.approx(length, rel=1e-6)


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


def test_a_path_picked_by_a_prediction_says_so() -> None:
    for predicted, cell in ((True, "| fused (predicted) |"), (False, "| fused |")):
        seconds = {"taps": 1.0, "stock": 2.0}
        result = bench.Result("linear", "768 -> 768", 8, torch.float32, "fused", seconds, None, predicted=predicted)
        assert cell in bench.table([result]) and result.to_dict()["predicted"] is predicted


def test_passes_are_combined_by_shares() -> None:
    """A slow minute slows stock and ours alike; the second of three passes was one."""
    times = [{"stock": 2.0, "taps": 3.0, "other": 1.0}, {"stock": 8.0, "taps": 8.0, "other": 8.0}]
    times += [{"stock": 1.0, "taps": 2.0, "other": 2.0}]
    passes = [bench.Result("linear", "x", 1, torch.float32, "fused", seconds, 1.0) for seconds in times]
    found = combined(passes)
    assert found.ratios == (1.0, 1.5, 2.0) and found.ratio == 1.5 and found.against == 1.5
    assert found.seconds == {"stock": 2.0, "taps": 3.0, "other": 2.0}
    assert "| 1.50 (1.00-2.00) |" in bench.table([found])
    assert combined(passes[:1]) is passes[0]


def test_all_cases_are_measured_before_any_again() -> None:
    order: list[str] = []

    def case(name: str) -> bench.Case:
        def make():
            order.append(name)
            return {"taps": lambda i: None, "stock": lambda i: None}

        return bench.Case("linear", name, 1, torch.float32, make)

    shown: list[str] = []
    results = bench.run([case("a"), case("b")], seconds=0.1, passes=3, progress=lambda found: shown.append(found.layer))
    assert order == ["a", "b"] * 3 and shown == ["a", "b"] and [len(found.ratios) for found in results] == [3, 3]
    with pytest.raises(ConfigError, match="passes: expected at least one, got 0"):
        bench.run([case("a")], passes=0)


def test_the_limit_is_the_roofline() -> None:
    case = bench.Case(
        "linear", "x", 1, torch.float32, lambda: {"taps": lambda i: None, "stock": lambda i: None}, 10, 40
    )
    result = timing._measured(case, Machine(bandwidth=5.0, rate=10.0), 0.0, torch.device("cpu"))
    assert result.limit == 4.0 and result.against is None


def test_variants_read_weights_of_their_own() -> None:
    """Each picks by the numbers of its calls, which no other variant has at the time."""
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    variants = {name: calls.append for name, calls in seen.items()}
    timing.interleaved(variants, 0.0, torch.device("cpu"))
    for name, calls in seen.items():
        assert calls == list(range(calls[0], calls[0] + len(calls)))
        assert not any(set(calls) & set(others) for other, others in seen.items() if other != name)


def test_unknown_groups_are_named() -> None:
    with pytest.raises(ConfigError, match="groups: expected some of linear, .*, got 'conv3d'"):
        bench.suite(["conv3d"])


def test_freed_memory_is_kept() -> None:
    """In a process of its own, for whose life it is: the page faults of a result that comes and goes."""
    pytest.importorskip("resource")
    code = """if True:
        import resource, torch
        from taps_ext.bench import keep_freed_memory
        def faults(mib):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(mib << 18).fill_(1.0)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(keep_freed_memory(), *(min(faults(mib) for _ in range(8)) for mib in (3, 64)))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if found[0] == "False":
        pytest.skip("not glibc")
    assert [int(count) < 10 for count in found[1:]] == [True, True]  # 768 and 16,384 pages


def test_the_command(call, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    kept = []
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: kept.append(True))  # not for the rest of the tests
    picture = tmp_path / "bench.png"
    code, out, err = call("bench", "--groups", "call", "--seconds", 1, "--threads", 1, "--plot", picture, "--json")
    found = json.loads(out)
    assert kept == [True]
    assert code == 0 and picture.read_bytes()[:4] == b"\x89PNG" and err.count("of the stock op") == 4
    assert {row["group"] for row in found["results"]} == {"call"} and found["machine"]["torch"] == torch.__version__
    assert "isa" in found["machine"]["extension"] and "file" not in found["machine"]["extension"]
    code, out, _ = call("bench", "--groups", "call", "--seconds", 1, "--passes", 2)
    assert code == 0 and "### call" in out and "64 x 64, open, both ways" in out
    code, _, err = call("bench", "--groups", "everything")
    assert code == 2 and "groups: expected some of" in err
    monkeypatch.setattr(ops, "_C", None)
    code, _, err = call("bench", "--groups", "call")
    assert code == 2 and "the compiled extension" in err
