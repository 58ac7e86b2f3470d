"""Run every compiled op against plain torch on the CPU; the last line of output is a JSON summary.

Only the binary is loaded, not the package around it, so this runs under any torch it supports:

    python tests/abi/check.py        # checks the taps_ext that this Python finds
"""

import importlib.util
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F


def load_extension():
    folder = Path(importlib.util.find_spec("taps_ext").origin).parent
    (path,) = folder.glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, path


EXTENSION, PATH = load_extension()
OPS = torch.ops.taps_ext
SCORE, THRESHOLD = torch.tensor(0.2), 0.1


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def expected_gradients(function, x, weight, delta, bias, grad):
    """Gradients of y = function(x, weight + delta, bias) in the order that the ops return them."""
    x, merged, bias = (t.detach().requires_grad_() for t in (x, weight + delta, bias))
    function(x, merged, bias).backward(grad)
    g = merged.grad
    return x.grad, g, (g * delta).sum(), bias.grad, g


def check_build_info():
    info = EXTENSION.build_info()
    assert info["torch_target"] == "2.11", info
    assert info["isa"] in EXTENSION.isas()
    return info


def check_lists():
    assert list(OPS._probe_optional_list([torch.zeros(3), None, torch.zeros(2, 2)])) == [3, -1, 4]
    assert list(OPS._probe_packed([torch.zeros(3), torch.zeros(5, dtype=torch.uint8)], "bits")) == [4, 12, 5]


def check_reconstruct():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight, delta = torch.randn(9, 70), torch.randn(9, 70)
        out = torch.empty(9, 70, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)  # fp64 anywhere means fp64 arithmetic
        merged = (weight.to(wide) + delta.to(wide)).to(dtype)
        OPS.reconstruct(out, weight, delta, None, True, THRESHOLD)
        assert torch.equal(out, merged)
        OPS.reconstruct(out, weight, delta * float("nan"), SCORE, False, THRESHOLD)
        assert torch.equal(out, weight.to(dtype))
        OPS.reconstruct(out, weight, delta, SCORE, None, THRESHOLD)
        assert torch.equal(out, merged)


def check_linear():
    x, weight, delta, bias = torch.randn(2, 5, 7), torch.randn(4, 7), torch.randn(4, 7), torch.randn(4)
    grad = torch.randn(2, 5, 4)
    closed = OPS.gated_linear(x, weight, delta * float("inf"), SCORE, bias, False, THRESHOLD)
    assert torch.equal(closed, F.linear(x, weight, bias))
    for gate in (True, None):
        close(
            OPS.gated_linear(x, weight, delta, SCORE, bias, gate, THRESHOLD),
            F.linear(x, weight + delta, bias),
        )
        got = OPS.gated_linear_backward(grad, x, weight, delta, SCORE, gate, THRESHOLD, [True] * 5, None, 1.0)
        for a, b in zip(got, expected_gradients(F.linear, x, weight, delta, bias, grad), strict=True):
            close(a, b)
    rows = torch.tensor([1, 6])  # of the leading dimensions as one
    x = x.flatten(0, 1)[rows]
    got = OPS.gated_linear_backward(
        grad, x, weight, delta, SCORE, True, THRESHOLD, [False, True, True, False, False], rows, 2.0
    )
    want = expected_gradients(F.linear, x, weight, delta, bias, grad.flatten(0, 1)[rows])
    close(got[1], 2 * want[1])
    close(got[2], 2 * want[2])


def check_conv2d():
    geometry = ([2, 1], [1, 0], [1, 2], 2)
    x, weight, delta, bias = (
        torch.randn(3, 6, 9, 8),
        torch.randn(4, 3, 3, 3),
        torch.randn(4, 3, 3, 3),
        torch.randn(4),
    )

    def plain(x, weight, bias):
        return F.conv2d(x, weight, bias, *geometry)

    for layout in (torch.contiguous_format, torch.channels_last):
        x, weight, delta = (t.contiguous(memory_format=layout) for t in (x, weight, delta))
        out = plain(x, weight + delta, bias)
        grad = torch.randn_like(out)
        closed = OPS.gated_conv2d(x, weight, delta * float("nan"), SCORE, bias, *geometry, False, THRESHOLD)
        assert torch.equal(closed, plain(x, weight, bias))
        close(OPS.gated_conv2d(x, weight, delta, SCORE, bias, *geometry, None, THRESHOLD), out)
        want = expected_gradients(plain, x, weight, delta, bias, grad)
        for mask in ([True] * 5, [True, False, True, True, False], [False, False, True, False, False]):
            got = OPS.gated_conv2d_backward(
                grad, x, [9, 8], weight, delta, SCORE, True, THRESHOLD, *geometry, mask, None, 1.0
            )
            for asked, a, b in zip(mask, got, want, strict=True):
                close(a, b) if asked else close(a, torch.empty(0))
        data = OPS.gated_conv2d_backward(
            grad,
            None,
            [9, 8],
            weight,
            delta,
            SCORE,
            True,
            THRESHOLD,
            *geometry,
            [True] + [False] * 4,
            None,
            1.0,
        )
        close(data[0], want[0])


def check_errors():
    try:
        OPS.gated_linear(torch.randn(2, 3), torch.randn(4, 7), None, None, None, None, THRESHOLD)
    except RuntimeError as error:
        assert "input: expected shape [..., 7]" in str(error), error
    else:
        raise AssertionError("a wrong shape was accepted")


def check_workspace():
    assert EXTENSION.workspace_bytes() > 0
    EXTENSION.workspace_clear()
    assert EXTENSION.workspace_bytes() == 0


def main():
    torch.manual_seed(0)
    info = check_build_info()
    checks = [check_lists, check_reconstruct, check_linear, check_conv2d, check_errors, check_workspace]
    failures = []
    for check in checks:
        try:
            check()
        except Exception:
            failures.append(check.__name__)
            traceback.print_exc()
    row = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "built_against": info["torch_built_against"],
        "kernels": "CPU + CUDA" if info["cuda"] else "CPU",
        "isa": info["isa"],
        "checks": f"{len(checks) - len(failures)} of {len(checks)}",
        "failures": failures,
        "binary": str(PATH),
    }
    print(json.dumps(row))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
