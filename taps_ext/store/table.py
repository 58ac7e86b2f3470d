"""The table of parts: what a task or shared file says of each base module that it touches, whatever the kind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .errors import GateRecordError, LimitError, MetadataError, Path, show
from .format import MAX_TASK_TENSORS, check_name

SCORE = "score"
"""The tensor of a part that has a learned gate: float32, shape [], finite."""


class PartEntry(NamedTuple):
    """One part: its facts (a JSON object) and the sorted names of its tensors."""

    facts: dict[str, Any]
    tensors: tuple[str, ...]


class Claim(NamedTuple):
    """What a stored tensor is: the tensor of a module's part, or a state's value (which has the module ""). `score`: it
    is the score of a learned gate.
    """

    module: str
    tensor: str
    score: bool = False


def place(claims: dict[str, Claim], stored: str, claim: Claim) -> None:
    """Add a claim under its stored name, with "~" appended for as long as an earlier claim has that name."""
    while stored in claims:
        stored += "~"
    claims[stored] = claim


def claims_of(parts: Mapping[str, PartEntry]) -> dict[str, Claim]:
    """Which tensors a file of these parts holds: stored name -> claim, exactly one each.

    The tensor `t` of the module `m` is stored as `m:t`. Where two meet ("a" with "b:c", "a:b" with "c"), the later one
    in the order of modules and names gets "~" appended: reader and writer agree because both derive the names from the
    table, never the table from the names.
    """
    claims: dict[str, Claim] = {}
    for module in sorted(parts):
        facts, names = parts[module]
        gated = facts.get("gate") is not None
        for name in names:
            place(claims, f"{module}:{name}", Claim(module, name, gated and name == SCORE))
    return claims


def check_parts(parts: Mapping[str, PartEntry], *, path: Path) -> None:
    """Raises MetadataError, GateRecordError, TensorNameError or LimitError unless names are names, facts name a kind,
    and a gate in them agrees with the tensors. Whether facts are JSON is the caller's to check.
    """
    if sum(len(entry.tensors) for entry in parts.values()) > MAX_TASK_TENSORS:
        raise LimitError(path, f"taps.parts: more than {MAX_TASK_TENSORS} tensors")
    if len(parts) > MAX_TASK_TENSORS:
        raise LimitError(path, f"taps.parts: {len(parts)} parts, at most {MAX_TASK_TENSORS} allowed")
    for module, (facts, names) in parts.items():
        if module != "":  # the base itself may have a part
            check_name(module, path=path, what="module")
        if not isinstance(facts, dict):
            raise MetadataError(path, f"part {show(module)}: facts: expected a JSON object, got {show(facts)}")
        kind = facts.get("kind")
        if not isinstance(kind, str) or not kind:
            raise MetadataError(path, f"part {show(module)}: facts: expected the part's kind, got {show(kind)}")
        check_names(names, "part", path=path, module=module)
        if facts.get("gate") is not None:
            _check_gate(module, facts["gate"], SCORE in names, path=path)


def check_names(names: Iterable[str], where: str, *, path: Path, module: str | None = None) -> None:
    """Raises TensorNameError or LimitError for what is no name, MetadataError unless they are sorted and distinct."""
    names = tuple(names)
    for name in names:
        check_name(name, path=path)
    for first, second in itertools.pairwise(names):
        if first >= second:
            of = "" if module is None else f" {show(module)}"
            raise MetadataError(
                path, f"{where}{of}: expected sorted, distinct names, got {show(first)} before {show(second)}"
            )


def is_strings(value: object) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_gate(module: str, gate: Any, scored: bool, *, path: Path) -> None:
    if not (
        isinstance(gate, dict)
        and gate.keys() == {"learn", "open", "threshold"}
        and type(gate["learn"]) is type(gate["open"]) is bool
        and type(gate["threshold"]) is float
        and 0.0 < gate["threshold"] < math.inf
    ):
        raise MetadataError(
            path,
            f"part {show(module)}: gate: expected booleans learn and open and a threshold above 0, got {show(gate)}",
        )
    if gate["learn"] != scored:
        problem = "learned, so a score is expected, got none" if gate["learn"] else "fixed, so no score is expected"
        raise GateRecordError(path, f"part {show(module)}: the gate is {problem}")
