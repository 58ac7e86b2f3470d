"""The workspace in which weights are rebuilt: one is reused, closed layers take none, threads have their own."""

import threading

import torch
import torch.nn.functional as F
from test_extension import _C, OPEN, OPS, TAU, linear_case, seeded  # noqa: F401  (a fixture)
from test_extension_layers import MASKS


def test_one_workspace_is_reused():
    _C.workspace_clear()
    assert _C.workspace_bytes() == 0
    x, _, weight, delta, _ = linear_case((40,), 64, 128, torch.float32)  # more rows than are fused
    for _ in range(3):
        OPS.gated_linear(x, weight, delta, None, None, True, TAU)
        assert _C.workspace_bytes() == 64 * 128 * 4
    OPS.gated_linear(x, weight[:8], delta[:8], None, None, True, TAU)
    assert _C.workspace_bytes() == 64 * 128 * 4
    big = torch.randn(128, 128)
    g = torch.randn(40, 128)
    for mask in MASKS:  # rebuilding W_t and forming G take turns in one buffer, grown once
        OPS.gated_linear_backward(g, x, big, big, OPEN, True, TAU, mask, None, 1.0)
    assert _C.workspace_bytes() == 128 * 128 * 4
    _C.workspace_clear()
    assert _C.workspace_bytes() == 0


def test_closed_layers_take_no_workspace():
    _C.workspace_clear()
    x, _, weight, delta, bias = linear_case()
    OPS.gated_linear(x, weight, delta, OPEN, bias, False, TAU)
    OPS.gated_linear(x, weight, None, None, bias, None, TAU)
    assert _C.workspace_bytes() == 0


def test_threads_do_not_share_a_workspace():
    cases = [(torch.randn(40, 96), torch.randn(80, 96), torch.randn(80, 96)) for _ in range(4)]
    expected = [F.linear(x, weight + delta) for x, weight, delta in cases]
    wrong = []

    def work(case, want):
        for _ in range(200):
            if not torch.equal(OPS.gated_linear(*case, None, None, True, TAU), want):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_backward_outside_inference_mode_after_forward_inside():
    _C.workspace_clear()
    x, g, weight, delta, _ = linear_case()
    with torch.inference_mode():
        OPS.gated_linear(x, weight, delta, OPEN, None, True, TAU)
    got = OPS.gated_linear_backward(g, x, weight, delta, OPEN, True, TAU, [True, False, True, False, False], None, 1.0)
    torch.testing.assert_close(got[0], g @ (weight + delta))
