"""What was found of a base, kept while torch notes no change in it: a thousand tasks may be loaded for one look.

Kept are the fingerprint, scans and the guard's digests. A change is another module, another tensor in one's place, a
version that went up, a flag. A write that leaves no trace in versions (`.data`) is not seen here: who loads files to
serve them relies on that nobody writes so. The TaskModel forgets at every `train()` and `eval()`, when it is moved, and
when a state is loaded; saving a task compares values as ever.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from .fingerprint import base_fingerprint
from .guard import Guard, Held
from .scan import Reach, Scan, scan

T = TypeVar("T")

_MOST = 64  # answers; configs that name other layers ask for other scans


class _State(NamedTuple):
    """A base at one moment, and what was found of it then."""

    held: Held | None
    modules: list[nn.Module]
    found: dict[Hashable, Any]

    def same(self, other: _State) -> bool:
        if self.held is None or other.held is None or self.held.stamps != other.held.stamps:
            return False
        return len(self.modules) == len(other.modules) and all(map(operator.is_, self.modules, other.modules))

    @property
    def has_versions(self) -> bool:
        """False for a base with tensors made in inference mode, which tell no writes."""
        return self.held is not None and all(version >= 0 for _, version, _ in self.held.stamps.values())


class Known:
    """Answers about one base, dropped when something in it has changed."""

    def __init__(self) -> None:
        self._state = _State(None, [], {})  # swapped whole: several threads may ask

    def __getstate__(self) -> dict[str, Any]:
        return Known().__dict__  # a copy's base is another

    def forget(self) -> None:
        """The base is about to change, or may have."""
        self._state = _State(None, [], {})

    @torch.compiler.disable
    def _get(self, base: nn.Module, key: Hashable, make: Callable[[], T]) -> T:
        now, state = _State(Held(base), list(base.modules()), {}), self._state
        if not now.same(state):
            state = now
        if key in state.found:
            return cast("T", state.found[key])
        found = make()
        if now.has_versions and now.same(_State(Held(base), list(base.modules()), {})):
            if len(state.found) >= _MOST:
                state = now
            state.found[key] = found
            self._state = state
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
