"""What was found of a base, kept while torch notes no change in it: a thousand tasks may be loaded for one look.

Kept are the fingerprint, scans and the guard's digests. A change is another module, another tensor in one's place, a
version that went up, a flag. A write that leaves no trace in versions (`.data`) is not seen here: who loads files to
serve them relies on that nobody writes so. The TaskModel forgets at every `train()` and `eval()`, when it is moved, and
when a state is loaded; saving a task compares values as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .fingerprint import base_fingerprint
from .guard import Guard, Held
from .scan import Reach, Scan, scan

T = TypeVar("T")

_MOST = 64  # answers; configs that name other layers ask for other scans


def _modules(base: nn.Module) -> list[nn.Module]:
    return list(base.modules())


def _has_no_versions(held: Held) -> bool:
    return any(version < 0 for _, version, _ in held.stamps.values())


class Known:
    """Answers about one base, dropped when something in it has changed."""

    def __init__(self) -> None:
        self._held: Held | None = None
        self._modules: list[nn.Module] = []
        self._found: dict[Hashable, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return Known().__dict__  # a copy's base is another

    def forget(self) -> None:
        """The base is about to change, or may have."""
        self._held, self._modules, self._found = None, [], {}

    @torch.compiler.disable
    def _get(self, base: nn.Module, key: Hashable, make: Callable[[], T]) -> T:
        held, modules = Held(base), _modules(base)
        same = self._held is not None and self._held.stamps == held.stamps
        if not same or len(modules) != len(self._modules) or any(map(_differ, modules, self._modules)):
            self.forget()
        if key in self._found:
            return cast("T", self._found[key])
        found = make()
        if not _has_no_versions(held) and Held(base).stamps == held.stamps:  # inference tensors tell no writes
            if len(self._found) >= _MOST:
                self._found = {}
            self._held, self._modules = held, modules
            self._found[key] = found
        return found

    def fingerprint(self, base: nn.Module, head: str | None) -> str:
        """As :func:`.fingerprint.base_fingerprint`."""
        return self._get(base, ("fingerprint", head), lambda: base_fingerprint(base, head))

    def scan(
        self,
        base: nn.Module,
        head: str | None,
        *,
        target: Sequence[str] | None,
        exclude: Sequence[str] | None,
        heads: Sequence[str],
        reach: Reach,
        freeze_unsupported: bool,
    ) -> Scan:
        """As :func:`.scan.scan`; the answer is shared, to be read."""
        asked = {"target": target, "exclude": exclude, "heads": heads}
        names = tuple(None if given is None else tuple(given) for given in asked.values())

        def make() -> Scan:
            return scan(base, head, **asked, reach=reach, freeze_unsupported=freeze_unsupported)  # type: ignore[arg-type]

        return self._get(base, ("scan", head, *names, reach, freeze_unsupported), make)

    def guard(self, base: nn.Module) -> Guard:
        """One that has noted the base."""

        def make() -> Guard:
            made = Guard()
            made.note(base)
            return made

        return self._get(base, ("guard",), make)


def _differ(one: nn.Module, other: nn.Module) -> bool:
    return one is not other
