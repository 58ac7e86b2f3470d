"""Calls of the operators that nobody should make, each from a seed: mostly right, with a few things wrong.

Whatever an operator makes of them it must end soon, by a result or an exception, and leave the process alive. Half of
the tensors end where a page without access begins, so that a read beyond them ends the process.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taps_ext import ops
from taps_ext.ops.codec import CODECS
from taps_ext.ops.unpack import ORDER

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KINDS = [F32, F32, F32, BF16, BF16, F16, F64]
OTHER_KINDS = [*KINDS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
HUGE = [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -1, -(2**63)]
NUMBERS = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e308, 5e-324]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(shape: list[int], kind: torch.dtype) -> Tensor:
    """A tensor whose last byte is the last of its page; the next page must not be touched. Never freed."""
    count = math.prod(shape) * kind.itemsize
    pages = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
    start = _libc.mmap(None, pages + mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)  # private, anonymous
    assert start is not None and start != ctypes.c_void_p(-1).value
    assert _libc.mprotect(start + pages, mmap.PAGESIZE, 0) == 0
    if count == 0:
        return torch.empty(shape, dtype=kind)
    memory = (ctypes.c_byte * count).from_address(start + pages - count)
    return torch.frombuffer(memory, dtype=torch.uint8).view(kind).view(shape)


class Call:
    """A call that is made from its seed; `make()` builds its arguments, `run()` calls and reads what comes."""

    def __init__(self, seed: int) -> None:
        self.seed, self.chance = seed, random.Random(seed)
        self.name = ""
        self.arguments: dict[str, Any] = {}
        self.path = self.chance.choice([None, None, "fused", "rebuild"])
        self.isa = self.chance.choice(ops._C.isas())

    # ------------------------------------------------------------------------------------ what would be right

    def tensor(self, shape: list[int], kind: torch.dtype) -> Tensor:
        tensor = guarded(shape, kind) if self.chance.random() < 0.5 else torch.empty(shape, dtype=kind)
        return tensor.copy_(torch.randn(shape))

    def parts(self, shape: list[int]) -> dict[str, Any]:
        """Weight, Delta, score, gate and threshold."""
        kind = self.chance.choice(KINDS)
        weight_kind, delta_kind = self.chance.choice([(kind, kind), (kind, F32), (F32, F32)])
        self.kind = kind
        score = self.tensor([self.chance.choice([1, 1])], self.chance.choice([F32, F64])).fill_(
            self.chance.choice([0.05, 0.15])
        )
        return {
            "weight": self.tensor(shape, weight_kind),
            "delta": self.tensor(shape, delta_kind),
            "score": score,
            "gate": self.chance.choice([True, True, False, None]),
            "threshold": 0.1,
        }

    def sampled(self, limit: int) -> dict[str, Any]:
        if self.chance.random() < 0.5 or limit == 0:
            return {"rows": None, "row_scale": 1.0}
        picked = [self.chance.randrange(limit) for _ in range(self.chance.randrange(limit + 1))]
        return {"rows": torch.tensor(picked, dtype=torch.int64), "row_scale": 2.0}

    def reconstruct(self) -> None:
        shape = [self.size() for _ in range(self.chance.randrange(1, 5))]
        parts = self.parts(shape)
        out = self.tensor(shape, self.chance.choice(KINDS))
        if self.chance.random() < 0.2:
            out = self.reach_into(self.chance.choice([parts["weight"], parts["delta"]]), shape)
        self.name, self.arguments = "reconstruct", {"out": out, **parts}

    def foreach_reconstruct(self) -> None:
        lists: dict[str, list[Any]] = {key: [] for key in ("outs", "weights", "deltas", "scores", "gates")}
        for _ in range(self.chance.randrange(4)):
            self.reconstruct()
            one = self.arguments
            if self.chance.random() < 0.5:
                self.harm(one, ["out", "weight", "delta", "score"])
            for key in ("out", "weight", "delta", "score"):
                lists[f"{key}s"].append(one[key])
            lists["gates"].append({True: 1, False: 0, None: -1}[one["gate"]])
        if lists["outs"] and self.chance.random() < 0.2:
            lists[self.chance.choice(list(lists))].pop()
        self.name, self.arguments = "foreach_reconstruct", {**lists, "threshold": 0.1}

    def foreach_settle(self) -> None:
        names = ("delta_gradient", "score_gradient", "gradient", "delta", "score")
        lists: dict[str, list[Any]] = {f"{key}s": [] for key in names}
        gates = []
        for _ in range(self.chance.randrange(4)):
            shape = [self.size() for _ in range(self.chance.randrange(1, 5))]
            parts = self.parts(shape)
            gradient, delta, score = parts["weight"], parts["delta"], parts["score"]
            out = self.tensor(shape, delta.dtype)
            if self.chance.random() < 0.3:
                out = self.chance.choice([gradient, delta, out[:0], self.reach_into(gradient, shape)])
            of_score = score.clone() if self.chance.random() < 0.7 else score[:0]
            one = dict(zip(names, (out, of_score, gradient, delta, score), strict=True))
            if self.chance.random() < 0.5:
                self.harm(one, list(names))
            for key in names:
                lists[f"{key}s"].append(one[key])
            gates.append({True: 1, False: 0, None: -1}[parts["gate"]])
        if gates and self.chance.random() < 0.2:
            lists[self.chance.choice(list(lists))].pop()
        self.name, self.arguments = "foreach_settle", {**lists, "gates": gates, "threshold": 0.1}

    def unpack(self) -> None:
        shape = [self.size() for _ in range(self.chance.randrange(1, 5))]
        parts = self.parts(shape)
        kind = self.chance.choice(list(CODECS))
        made = CODECS[kind].encode(parts["delta"].float().reshape(shape[0], math.prod(shape[1:])))  # type: ignore[attr-defined]
        codes, values = (guarded(list(made[name].shape), made[name].dtype).copy_(made[name]) for name in ORDER[kind])
        if codes.numel() and self.chance.random() < 0.3:  # bits that ask for more values, or fewer
            codes[self.chance.randrange(codes.numel())] = self.chance.randrange(127)
        out = self.tensor(shape, self.chance.choice(KINDS))
        if self.chance.random() < 0.2:
            out = self.reach_into(self.chance.choice([parts["weight"], values]), shape)
        first = {"out": out, "weight": parts["weight"], "codes": codes, "values": values}
        codec = kind if self.chance.random() < 0.9 else self.chance.choice([*CODECS, "int2", ""])
        rest = {name: parts[name] for name in ("score", "gate", "threshold")}
        self.name, self.arguments = "unpack", {**first, "codec": codec, **rest}

    def packed_linear(self) -> None:
        leading = [self.chance.randrange(1, 4) for _ in range(self.chance.randrange(3))]
        n, k = self.size(), 64 * self.chance.randrange(4)
        kind, bias_or_not = self.chance.choice([F32, BF16]), self.chance.random() < 0.5
        codec = self.chance.choice(list(CODECS))
        made = CODECS[codec].encode(torch.randn(n, k))  # type: ignore[attr-defined]
        codes, values = (guarded(list(made[name].shape), made[name].dtype).copy_(made[name]) for name in ORDER[codec])
        if codes.numel() and self.chance.random() < 0.3:
            codes[self.chance.randrange(codes.numel())] = self.chance.randrange(127)
        x, weight = self.tensor([*leading, k], kind), self.tensor([n, k], kind)
        bias = self.tensor([n], kind) if bias_or_not else None
        first = {"input": x, "weight": weight, "codes": codes, "values": values}
        self.name, self.arguments = "packed_linear", {**first, "codec": codec, "bias": bias}

    def linear(self, backward: bool) -> None:
        leading = [self.size() for _ in range(self.chance.randrange(4))]
        n, k = self.size(), self.size()
        parts = self.parts([n, k])
        rows = self.sampled(math.prod(leading))
        x = self.tensor([*leading, k], self.kind)
        if not backward:
            bias = self.chance.choice([None, self.tensor([n], self.kind)])
            made = {"input": x, **parts, **rows, "training": self.chance.random() < 0.3}
            self.name, self.arguments = "gated_linear", ordered(made, "score", bias=bias)
            return
        if rows["rows"] is not None:
            x = self.tensor([len(rows["rows"]), k], self.kind)
        made = {"grad_output": self.tensor([*leading, n], self.kind), "input": x, **parts}
        self.name, self.arguments = "gated_linear_backward", {**made, "output_mask": self.mask(), **rows}

    def conv2d(self, backward: bool) -> None:
        groups = self.chance.choice([1, 1, 2, 3])
        batch, o, c = self.chance.randrange(3), self.size() * groups, self.size()
        kernel, size = ([self.chance.randrange(1, most) for _ in range(2)] for most in (4, 9))
        geometry = {
            "stride": [self.chance.randrange(1, 3) for _ in range(2)],
            "padding": [self.chance.randrange(3) for _ in range(2)],
            "dilation": [self.chance.randrange(1, 3) for _ in range(2)],
            "groups": groups,
        }
        span = [
            s + 2 * p - d * (k - 1) - 1
            for s, p, d, k in zip(size, geometry["padding"], geometry["dilation"], kernel, strict=True)
        ]
        result = [max(0, part // step + 1) for part, step in zip(span, geometry["stride"], strict=True)]
        parts = self.parts([o, c, *kernel])
        leading = [batch] if self.chance.random() < 0.8 else []
        rows = self.sampled(batch if leading else 0)
        x = self.tensor([*leading, c * groups, *size], self.kind)
        if not backward:
            bias = self.chance.choice([None, self.tensor([o], self.kind)])
            made = ordered({"input": x, **parts}, "score", bias=bias, **geometry)
            made |= {**rows, "training": self.chance.random() < 0.3}
            self.name, self.arguments = "gated_conv2d", made
            return
        if rows["rows"] is not None:
            x = self.tensor([len(rows["rows"]), c * groups, *size], self.kind)
        made = {"grad_output": self.tensor([*leading, o, *result], self.kind), "input": x, "input_size": list(size)}
        self.name = "gated_conv2d_backward"
        self.arguments = {**made, **parts, **geometry, "output_mask": self.mask(), **rows}

    def of_tasks(self, shape: list[int], samples: int) -> dict[str, Any]:
        """Weight, Deltas, scores, ids and gates of a mixed batch."""
        first = self.parts(shape)
        made: dict[str, Any] = {"weight": first["weight"], "deltas": [], "scores": [], "gates": []}
        kind, count = self.kind, self.chance.randrange(4)
        for _ in range(count):
            one = self.parts(shape)
            delta = one["delta"].to(first["delta"].dtype)
            made["deltas"].append(self.chance.choice([delta, delta, delta, None]))
            made["scores"].append(one["score"])
            made["gates"].append({True: 1, False: 0, None: -1}[one["gate"]])
        self.kind = kind
        ids = [self.chance.randrange(-1, count) for _ in range(samples)]
        made["task_ids"] = torch.tensor(ids, dtype=torch.int64)
        return made

    def mixed_masks(self, made: dict[str, Any]) -> dict[str, list[bool]]:
        there = [delta is not None for delta in made["deltas"]]
        names = ("delta_mask", "score_mask")
        return {
            "input_bias_weight": self.mask()[:3],
            **{n: [t and self.chance.random() < 0.6 for t in there] for n in names},
        }

    def mixed_linear(self, backward: bool) -> None:
        samples, per, n, k = self.chance.randrange(6), self.chance.choice([1, 1, 2, 30]), self.size(), self.size()
        made = self.of_tasks([n, k], samples)
        ids, weight = made.pop("task_ids"), made.pop("weight")
        x = self.tensor([samples, per, k], self.kind)
        gates = made.pop("gates")
        rest = {"gates": gates, "threshold": 0.1}
        if not backward:
            bias = self.chance.choice([None, self.tensor([n], self.kind)])
            self.name = "mixed_linear"
            first = {"input": x, "weight": weight, **made, "task_ids": ids, "bias": bias}
            self.arguments = {**first, **rest, "training": self.chance.random() < 0.3}
            return
        self.name, first = (
            "mixed_linear_backward",
            {"grad_output": self.tensor([samples, per, n], self.kind), "input": x},
        )
        self.arguments = {**first, "weight": weight, **made, "task_ids": ids, **rest, **self.mixed_masks(made)}

    def mixed_conv2d(self, backward: bool) -> None:
        samples, per, o, c = self.chance.randrange(5), self.chance.choice([1, 2]), self.size(), self.size()
        kernel, size = [self.chance.randrange(1, 4) for _ in range(2)], [self.chance.randrange(4, 9) for _ in range(2)]
        made = self.of_tasks([o, c, *kernel], samples)
        ids, weight, gates = made.pop("task_ids"), made.pop("weight"), made.pop("gates")
        geometry = {"stride": [1, 2], "padding": [1, 0], "dilation": [1, 1], "groups": 1}
        x = self.tensor([samples * per, c, *size], self.kind)
        rest = {**geometry, "gates": gates, "threshold": 0.1}
        if not backward:
            bias = self.chance.choice([None, self.tensor([o], self.kind)])
            self.name = "mixed_conv2d"
            first = {"input": x, "weight": weight, **made, "task_ids": ids, "bias": bias}
            self.arguments = {**first, **rest, "training": self.chance.random() < 0.3}
            return
        result = [size[0] + 2 - kernel[0] + 1, (size[1] - kernel[1]) // 2 + 1]
        grad = self.tensor([samples * per, o, *result], self.kind)
        first = {"grad_output": grad, "input": x, "input_size": size, "weight": weight, **made, "task_ids": ids}
        self.name, self.arguments = "mixed_conv2d_backward", {**first, **rest, **self.mixed_masks(made)}

    def mixed_lowrank(self, backward: bool) -> None:
        samples, per, n, k = self.chance.randrange(6), self.chance.choice([1, 2, 30]), self.size(), self.size()
        kind, count = self.chance.choice(KINDS), self.chance.randrange(1, 4)
        ranks = [self.chance.choice([0, 1, 2, 8]) for _ in range(count)]
        a: list[Any] = [self.tensor([rank, k], kind) for rank in ranks]
        b: list[Any] = [self.tensor([n, rank], kind) for rank in ranks]
        if self.chance.random() < 0.3:
            a[-1] = b[-1] = None
        ids = torch.tensor([self.chance.randrange(-1, count) for _ in range(samples)], dtype=torch.int64)
        made = {"input": self.tensor([samples, per, k], kind), "a": a, "b": b, "task_ids": ids, "scales": [2.0] * count}
        self.name, self.arguments = "mixed_lowrank", made
        if backward:
            there = [one is not None for one in a]
            masks = {"input_mask": True, "a_mask": there, "b_mask": there}
            self.name += "_backward"
            self.arguments = {"grad_output": self.tensor([samples, per, n], kind), **made, **masks}

    def plain(self, convolution: bool) -> None:
        """A function of the extension, which is called with whatever Python has."""
        (self.conv2d if convolution else self.linear)(False)
        made = {key: self.arguments[key] for key in ("input", "weight", "delta", "score", "bias")}
        if convolution:
            made |= {key: self.arguments[key] for key in ("stride", "padding", "dilation", "groups")}
        made |= {"gate": self.arguments["gate"] is not False, "training": self.arguments["training"]}
        self.name, self.arguments = "_C.conv2d" if convolution else "_C.linear", {**made, "outermost": True}

    def size(self) -> int:
        return self.chance.choice([0, 1, 1, 2, 3, 5, 8, 17, 33, 70])

    def mask(self) -> list[bool]:
        return [self.chance.random() < 0.6 for _ in range(5)]

    # ------------------------------------------------------------------------------------------ what is wrong

    def reach_into(self, other: Tensor, shape: list[int]) -> Tensor:
        """A tensor of this shape somewhere in another one's memory."""
        flat = other.reshape(-1)
        count = math.prod(shape)
        start = self.chance.randrange(flat.numel() - count + 1) if flat.numel() >= count else 0
        return flat[start : start + count].view(shape) if flat.numel() >= count else other

    def harmed(self, tensor: Tensor, huge: int = 2**40) -> Any:
        """The tensor with one thing about it changed; `huge`, what one size may grow to."""
        shape, dims = list(tensor.shape), tensor.dim()
        dim = self.chance.randrange(dims) if dims else 0
        own = tensor.clone()
        at = self.chance.randrange(5)

        def resized(count: int) -> Tensor:
            whole = torch.zeros(own.numel() + at, dtype=own.dtype)
            view = whole[at:].view(shape)
            whole.untyped_storage().resize_(count)
            return view

        def sized(size: int) -> Tensor:
            return torch.zeros([*shape[:dim], size, *shape[dim + 1 :]], dtype=own.dtype) if dims else own[None]

        def inference() -> Tensor:
            with torch.inference_mode():
                return own.clone()

        turns: list[Callable[[], Any]] = [
            lambda: own.to(self.chance.choice(OTHER_KINDS)),
            lambda: sized(shape[dim] + 1 if dims else 1),
            lambda: sized(0),
            lambda: sized(max(0, shape[dim] - 1) if dims else 1),
            lambda: own[None],
            lambda: own.flatten(),
            lambda: own.to("meta"),
            lambda: resized(0),
            lambda: resized(0),
            lambda: resized(max(0, own.numel() - 1) * own.itemsize // 2),
            lambda: own.as_strided(shape, [0] * dims) if own.numel() else own,
            lambda: own.narrow(dim, 0, 1).expand(shape) if own.numel() and dims else own,
            lambda: (
                own.narrow(dim, 0, 1).expand([*shape[:dim], huge, *shape[dim + 1 :]]) if own.numel() and dims else own
            ),
            lambda: own.transpose(0, dim).contiguous().transpose(0, dim) if dims else own,
            lambda: torch.stack((own, own), -1)[..., 1],
            lambda: torch._neg_view(own) if own.is_floating_point() else own,
            lambda: own.to(torch.complex64).conj(),
            lambda: own.to(torch.complex64).conj().imag,
            lambda: own.requires_grad_() if own.is_floating_point() else own,
            inference,
            lambda: own.fill_(self.chance.choice([math.nan, math.inf])) if own.is_floating_point() else own,
            lambda: own.to_sparse() if dims else None,
            lambda: torch._efficientzerotensor(shape, dtype=own.dtype),
            lambda: own.as_subclass(torch.nn.Parameter),
            lambda: None,
            lambda: self.chance.choice([3, "x", [own], object()]),
        ]
        return self.chance.choice(turns)()

    def harmed_rows(self, rows: Tensor) -> Any:
        long = torch.int64
        turns: list[Callable[[], Any]] = [
            lambda: torch.tensor(0).expand(2**40),
            lambda: torch.tensor([-1]),
            lambda: torch.tensor([self.chance.choice([10**6, 2**62, -(2**63)])]),
            lambda: rows.to(torch.int32),
            lambda: rows[None],
            lambda: torch.zeros((), dtype=long),
            lambda: torch.zeros(0, dtype=long),
            lambda: torch.stack((rows, rows), -1)[..., 0],
            lambda: rows.flip(0),
        ]
        return self.chance.choice(turns)() if self.chance.random() < 0.7 else self.harmed(rows)

    def harm(self, arguments: dict[str, Any], names: list[str]) -> None:
        name = self.chance.choice(names)
        value = arguments[name]
        if name == "task_ids":
            arguments[name] = self.harmed_rows(value)
        elif name == "rows":
            arguments[name] = self.harmed_rows(torch.zeros(2, dtype=torch.int64) if value is None else value)
        elif isinstance(value, Tensor):
            others = [other for other in arguments.values() if isinstance(other, Tensor)]
            if self.chance.random() < 0.1:
                arguments[name] = self.chance.choice(others)
            else:
                # To add up so many rows is work that was asked for.
                arguments[name] = self.harmed(value, 7 if name == "grad_output" else 2**40)
        elif isinstance(value, bool) or value is None:
            arguments[name] = self.chance.choice([True, False, None])
        elif isinstance(value, int):
            arguments[name] = self.chance.choice([0, 2, 7, *HUGE])
        elif isinstance(value, float):
            arguments[name] = self.chance.choice(NUMBERS)
        elif isinstance(value, list) and value:
            changed = list(value)
            if self.chance.random() < 0.3:
                changed = changed[:-1] if self.chance.random() < 0.5 else [*changed, changed[0]]
            elif isinstance(changed[0], Tensor) and self.name.startswith("mixed"):  # others are harmed as they are made
                changed[self.chance.randrange(len(changed))] = self.harmed(changed[0], 7)
            elif isinstance(changed[0], int):
                changed[self.chance.randrange(len(changed))] = self.chance.choice([0, 3, *HUGE])
            arguments[name] = changed

    def make(self) -> Call:
        torch.manual_seed(self.seed)
        kinds: list[Callable[[], None]] = [
            self.reconstruct,
            self.foreach_reconstruct,
            self.foreach_settle,
            self.unpack,
            self.packed_linear,
            lambda: self.linear(False),
            lambda: self.linear(True),
            lambda: self.conv2d(False),
            lambda: self.conv2d(True),
            lambda: self.mixed_linear(False),
            lambda: self.mixed_linear(True),
            lambda: self.mixed_conv2d(False),
            lambda: self.mixed_conv2d(True),
            lambda: self.mixed_lowrank(self.chance.random() < 0.5),
            lambda: self.plain(False),
            lambda: self.plain(True),
        ]
        self.chance.choice(kinds)()
        for name in self.chance.sample(list(self.arguments), self.chance.choice([0, 1, 1, 1, 2, 2, 3])):
            self.harm(self.arguments, [name])
        return self

    # ---------------------------------------------------------------------------------------------- the call

    def run(self) -> bool:
        """Whether it gave a result."""
        ops._C.force_path(self.path)
        ops._C.force_isa(self.isa)
        home, name = (ops._C, self.name[3:]) if self.name.startswith("_C") else (torch.ops.taps_ext, self.name)
        try:
            made = getattr(home, name)(*self.arguments.values())
        except Exception:
            return False
        found = made if isinstance(made, tuple) else (made,)
        for result in [one for some in found for one in (some if isinstance(some, list) else [some])]:
            if isinstance(result, Tensor) and result.device.type == "cpu":
                result.detach().double().sum().item()
        return made is not None or "reconstruct" in self.name or self.name == "unpack"

    def __str__(self) -> str:
        def told(value: Any) -> str:
            if isinstance(value, list):
                return f"[{', '.join(map(told, value))}]"
            if not isinstance(value, Tensor):
                return repr(value)
            facts = [str(value.dtype)[6:], str(list(value.shape))]
            if value.layout is torch.strided:
                facts += [f"strides {list(value.stride())}", f"offset {value.storage_offset()}"]
            marks = {"meta": value.is_meta, "neg": value.is_neg(), "inference": value.is_inference()}
            return " ".join([*facts, *(mark for mark, holds in marks.items() if holds)])

        arguments = ", ".join(f"{name}={told(value)}" for name, value in self.arguments.items())
        return f"seed {self.seed}: {self.name}({arguments}) on {self.isa}, path {self.path}"


def ordered(arguments: dict[str, Any], after: str, **more: Any) -> dict[str, Any]:
    """With `more` right behind one of the arguments."""
    result: dict[str, Any] = {}
    for key, value in arguments.items():
        result[key] = value
        if key == after:
            result |= more
    return result
