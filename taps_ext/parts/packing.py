"""Packing: what a codec makes of one layer's Delta, with the error that was measured, and the choice between codecs.

It needs no model: `taps pack` does the same to a file's tensors.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, suggestion
from ..ops.codec import CODECS
from ..ops.encode import encoded
from ..ops.unpack import unpacked
from ..store.record import Record

LOW_RANK = "lowrank"
NAMES = ("bitmask", "bitmask:SHARE", "int8", "int4", "sign", "lowrank:RANK")
SHARES = (0.5, 0.25, 0.1, 0.05, 0.02)  # that a budget may choose from
RANKS = (1, 2, 4, 8, 16, 32, 64)
MOST_AXES = 1024  # above so many of the smaller side a choice leaves low rank out: its cost grows with their cube


class Packed(NamedTuple):
    """How a layer's Delta was packed.

    Attributes:
        error: |Delta - packed| / |Delta|, Frobenius norms; 0.0 where nothing was lost.
        shape: of the weight, by which it is unpacked without a base.
        output_error: the same of what Delta adds to the layer's outputs on some data, where there was some.
    """

    error: float
    shape: tuple[int, ...]
    output_error: float | None = None

    def facts(self) -> dict[str, Any]:
        """As files hold it."""
        facts: dict[str, Any] = {"error": self.error, "shape": list(self.shape)}
        return facts if self.output_error is None else {**facts, "output_error": self.output_error}

    @classmethod
    def of(cls, record: Record) -> Packed:
        """What a record says. Raises MetadataError."""
        facts = record.fact("packed", dict)
        shape, errors = facts.get("shape"), {k: v for k, v in facts.items() if k != "shape"}
        good = "error" in errors and errors.keys() <= {"error", "output_error"}
        good = good and all(type(v) is float and 0.0 <= v < math.inf for v in errors.values())
        good = good and isinstance(shape, list) and 2 <= len(shape) <= 8
        if not good or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):  # type: ignore[union-attr]
            raise record.refuse(f"packed: expected a measured error and the weight's shape, got {str(facts)[:96]}")
        return cls(errors["error"], tuple(shape), errors.get("output_error"))  # type: ignore[arg-type]


class Encoded(NamedTuple):
    """A Delta as a codec made it: the change's kind, settings and tensors, and the relative error."""

    kind: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    error: float

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def decode(kind: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """The Delta of a packed change, float32 of the weight's shape. `scale`: of a low rank."""
    if kind == LOW_RANK:
        return (scale * (tensors["up"] @ tensors["down"])).view(shape)
    return unpacked(kind, tensors, shape)


def relative(delta: Tensor, kept: Tensor) -> float:
    """|delta - kept| / |delta| in float64; 0.0 where both are zero."""
    wide = delta.double()
    lost, size = float((wide - kept.double()).norm()), float(wide.norm())
    return lost / size if size else 0.0 if not lost else math.inf


# ------------------------------------------------------------------------------------------------ one codec


class Spec(NamedTuple):
    """A codec with its argument."""

    name: str
    argument: float | int | None = None


def parse(text: str) -> Spec:
    """A codec as users write it: one of :data:`NAMES`.

    Raises:
        ConfigError: another one; a share outside of (0, 1], a rank below 1.
    """
    name, colon, argument = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name not in (*CODECS, LOW_RANK):
        raise ConfigError(
            f"codec: expected one of {', '.join(NAMES)}, got {text!r}{suggestion(name, (*CODECS, LOW_RANK))}"
        )
    if name == LOW_RANK:
        if not re.fullmatch(r"[1-9][0-9]{0,5}", argument):
            raise ConfigError(f"codec: lowrank: expected a rank of 1 or more, as in lowrank:8, got {text!r}")
        return Spec(name, int(argument))
    if name != "bitmask" and colon:
        raise ConfigError(f"codec: {name}: expected no argument, got {text!r}")
    if not colon:
        return Spec(name)
    try:
        share = float(argument)
    except ValueError:
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"codec: bitmask: expected a share in (0, 1], as in bitmask:0.1, got {text!r}")
    return Spec(name, share)


def encode(spec: Spec, delta: Tensor, name: str) -> Encoded:
    """A Delta, float32 of a weight's shape, by one codec; `name`: of its layer, for messages.

    Raises:
        ConfigError: values that are not finite, or too large for the codec, naming the layer.
    """
    matrix = _matrix(delta, name)
    if spec.name == LOW_RANK:
        return _low_rank(matrix, [int(spec.argument or 1)], delta)[0]
    try:
        tensors = encoded(spec.name, matrix, spec.argument)
    except ValueError as problem:
        raise ConfigError(f"{name}: codec {spec.name}: {problem}") from None
    settings = {"kept": tensors["values"].numel()} if spec.name == "bitmask" else {}
    lossless = spec == Spec("bitmask")
    error = 0.0 if lossless else relative(delta, decode(spec.name, tensors, tuple(delta.shape)))
    return Encoded(spec.name, settings, tensors, error)


def _matrix(delta: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(delta).all()):
        raise ConfigError(f"{name}: expected finite values in a Delta to pack, got Inf or NaN")
    return delta.reshape(len(delta), math.prod(delta.shape[1:])).float().contiguous()


def _low_rank(matrix: Tensor, ranks: list[int], delta: Tensor) -> list[Encoded]:
    """The best of these ranks (Eckart and Young): singular values and vectors, their roots in both factors."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    made = []
    for rank in dict.fromkeys(min(rank, len(values)) for rank in ranks):
        if rank < 1:  # a weight without elements
            continue
        root = values[:rank].sqrt()
        tensors = {"down": (root[:, None] * right[:rank]).float(), "up": (left[:, :rank] * root).float()}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        error = relative(delta, decode(LOW_RANK, tensors, tuple(delta.shape)))
        made.append(Encoded(LOW_RANK, {"rank": rank, "scale": 1.0}, tensors, error))
    return made


# ------------------------------------------------------------------------------------------------ a choice


def candidates(delta: Tensor, name: str, max_error: float | None = None) -> Iterator[Encoded]:
    """Ways to pack a Delta that a choice is made of: for a bound, of shares and ranks the smallest that keep it; for a
    budget, steps of both."""
    matrix = _matrix(delta, name)
    for codec in ("bitmask", "int8", "int4", "sign"):
        yield encode(Spec(codec), delta, name)
    count = matrix.numel()
    if max_error is not None:
        squares = matrix.flatten().double().square().sort(descending=True).values
        kept = _first_within(squares, max_error)
        yield encode(Spec("bitmask", max(1, kept) / max(1, count)), delta, name)
    else:
        for share in SHARES:
            yield encode(Spec("bitmask", share), delta, name)
    if 0 < min(matrix.shape) <= MOST_AXES:
        ranks = list(RANKS)
        if max_error is not None:
            squares = torch.linalg.svdvals(matrix.double()).square()
            ranks = [max(1, _first_within(squares, max_error))]
        small = [rank for rank in ranks if rank * sum(matrix.shape) < count]
        yield from _low_rank(matrix, small, delta) if small else ()


def _first_within(squares: Tensor, bound: float) -> int:
    """How many of these squares, the largest first, leave no more than bound^2 of their sum."""
    rest = squares.flip(0).cumsum(0).flip(0)  # what is lost where as many as came before are kept
    return int((rest > (1 - 1e-6) * bound**2 * float(squares.sum())).sum())  # factors are rounded to float32


Measure = Callable[[Tensor], float]
"""The relative error of a Delta that stands for a layer's own."""


class Choice(NamedTuple):
    """One way to store a layer: packed, or as it is (None). `lost`: what decides, relative: the error of what it adds
    to the layer's outputs where there is data."""

    made: Encoded | None
    nbytes: int
    shape: tuple[int, ...]
    error: float = 0.0
    lost: float = 0.0
    output_error: float | None = None

    @property
    def codec(self) -> str:
        """As users write it; "dense" for a layer that is left as it is."""
        if self.made is None:
            return "dense"
        rank = self.made.settings.get("rank")
        return self.made.kind if rank is None else f"{self.made.kind}:{rank}"


class Rule(NamedTuple):
    """What decides how layers are packed: one codec, a bound for the relative error of each layer, bytes for all layers
    together, or nothing: then nothing is lost."""

    codec: Spec | None = None
    max_error: float | None = None
    budget: int | None = None

    @classmethod
    def of(cls, codec: str | None, max_error: float | None, budget: int | None) -> Rule:
        """Raises ConfigError: more than one, or values that make no sense."""
        if sum(given is not None for given in (codec, max_error, budget)) > 1:
            raise ConfigError("codec, max_error, budget: expected one of them at most, got more")
        number = isinstance(max_error, (int, float)) and not isinstance(max_error, bool)
        if max_error is not None and not (number and 0 <= max_error < math.inf):
            raise ConfigError(f"max_error: expected a number from 0 on, got {max_error!r}")
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ConfigError(f"budget: expected a number of bytes, got {budget!r}")
        return cls(None if codec is None else parse(codec), max_error, budget)

    @property
    def lossless(self) -> bool:
        """Whether nothing may be lost: the default, and a bitmask of all that is not zero."""
        return self in (Rule(), Rule(Spec("bitmask")))


def choose(
    rule: Rule, layers: Mapping[str, Callable[[], Tensor]], measures: Mapping[str, Measure] | None = None
) -> Iterator[tuple[str, Choice]]:
    """How each layer is packed, one at a time. No more of a layer than its choice is kept.

    Args:
        layers: what gives a layer's Delta, float32 of its weight's shape; a budget asks twice.
        measures: of layers whose error is that of their outputs.

    Raises:
        ConfigError: a Delta that a codec cannot hold, naming its layer; a budget that is too small.
    """
    measures = {} if measures is None else measures
    if rule.budget is None:
        for name, read in layers.items():
            yield name, _alone(rule, read(), name, measures.get(name))
        return
    every: dict[str, tuple[list[Choice], float]] = {}
    for name, read in layers.items():
        every[name] = _weighed(read(), name, measures.get(name), alike=bool(measures))
    for name, choice in _within_budget(every, rule.budget).items():
        made = choice.made and encode(_spec(choice.made, math.prod(choice.shape)), layers[name](), name)
        yield name, choice._replace(made=made)


def _alone(rule: Rule, delta: Tensor, name: str, measure: Measure | None) -> Choice:
    """A layer's choice where it depends on no other layer."""
    if rule.max_error is None:
        return _of_one(rule.codec or Spec("bitmask"), delta, name, measure)
    found = _choices(delta, name, rule.max_error, measure)
    return next(choice for choice in found if choice.lost <= rule.max_error)


def _weighed(delta: Tensor, name: str, measure: Measure | None, *, alike: bool) -> tuple[list[Choice], float]:
    """A layer's choices without their tensors, and how much its squared relative error counts: `alike` as any other
    layer's, else as much as its Delta is large, so that what counts is the error of all Deltas together."""
    found = [
        choice._replace(made=choice.made and choice.made._replace(tensors={}))
        for choice in _choices(delta, name, None, measure)
    ]
    return found, 1.0 if alike else float(delta.double().square().sum())


def _spec(made: Encoded, count: int) -> Spec:
    """What makes it again."""
    if made.kind == LOW_RANK:
        return Spec(LOW_RANK, made.settings["rank"])
    return Spec(made.kind, made.settings["kept"] / count if made.kind == "bitmask" and made.error else None)


def _choices(delta: Tensor, name: str, max_error: float | None, measure: Measure | None) -> list[Choice]:
    """All ways to store a layer that take fewer bytes than it does, the smallest first, and to leave it as it is."""
    plain = _plain(delta, measure)
    steps = max_error if measure is None else None  # what bounds Delta's error says little of the outputs'
    made = [encoded for encoded in candidates(delta, name, steps) if encoded.nbytes < plain.nbytes]
    found = [plain, *(_judged(encoded, delta, measure) for encoded in made)]
    return sorted(found, key=lambda choice: (choice.nbytes, choice.lost))


def _plain(delta: Tensor, measure: Measure | None) -> Choice:
    nbytes, output = delta.numel() * delta.element_size(), None if measure is None else 0.0
    return Choice(None, nbytes, tuple(delta.shape), output_error=output)


def _judged(made: Encoded, delta: Tensor, measure: Measure | None) -> Choice:
    shape = tuple(delta.shape)
    if measure is None:
        return Choice(made, made.nbytes, shape, made.error, made.error)
    output = measure(decode(made.kind, made.tensors, shape)) if made.error else 0.0
    return Choice(made, made.nbytes, shape, made.error, output, output)


def _of_one(spec: Spec, delta: Tensor, name: str, measure: Measure | None) -> Choice:
    """By one codec, or as it is where that takes no fewer bytes."""
    made, plain = encode(spec, delta, name), _plain(delta, measure)
    return _judged(made, delta, measure) if made.nbytes < plain.nbytes else plain


def _within_budget(layers: Mapping[str, tuple[list[Choice], float]], budget: int) -> dict[str, Choice]:
    """Of each layer's choices those that lose least together in `budget` bytes: from the smallest up, always the step
    that saves most squared error a byte (the lower hull of rate and error, whose steps are a Lagrangian's).

    Args:
        layers: the choices of a layer, and by how much its squared relative error counts.

    Raises:
        ConfigError: the smallest choices of all layers take more.
    """
    hulls = {name: _hull(found, weight) for name, (found, weight) in layers.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0][0].nbytes for hull in hulls.values())
    if left < 0:
        raise ConfigError(f"budget: expected at least {budget - left:,} bytes, the smallest that these layers take")
    steps = sorted(
        (-(before[1] - after[1]) / (after[0].nbytes - before[0].nbytes), name, index)
        for name, hull in hulls.items()
        for index, (before, after) in enumerate(itertools.pairwise(hull))
    )
    for _, name, index in steps:  # of one layer in their order, the hull being convex
        cost = hulls[name][index + 1][0].nbytes - hulls[name][index][0].nbytes
        if at[name] == index and cost <= left:
            at[name], left = index + 1, left - cost
    return {name: hull[at[name]][0] for name, hull in hulls.items()}


def _hull(found: list[Choice], weight: float) -> list[tuple[Choice, float]]:
    """The choices that a straight line of rate against squared error touches from below, the smallest first."""
    hull: list[tuple[Choice, float]] = []
    for choice in found:
        point = choice, weight * choice.lost**2
        if hull and point[1] >= hull[-1][1]:
            continue
        if hull and choice.nbytes == hull[-1][0].nbytes:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: tuple[Choice, float], other: tuple[Choice, float]) -> float:
    return (other[1] - one[1]) / (other[0].nbytes - one[0].nbytes)
