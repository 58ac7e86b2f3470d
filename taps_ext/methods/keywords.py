"""Keywords: the base of settings that are given by name, whose misspelt names are errors with a suggestion."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from ..errors import ConfigError, suggestion

_Settings = TypeVar("_Settings", bound="Keywords")


class Keywords:
    """A class whose arguments come by keyword alone; what its `__init__` does not know is refused before that runs."""

    def __new__(cls: type[_Settings], *args: Any, **settings: Any) -> _Settings:
        """Raises ConfigError for an unknown keyword, and for arguments without one. Copies come without any."""
        taken = list(inspect.signature(cls.__init__).parameters.values())[1:]
        known = [p.name for p in taken]
        kinds = {p.kind for p in taken}
        if args and kinds == {inspect.Parameter.KEYWORD_ONLY}:
            raise ConfigError(
                f"{cls.__name__}: expected settings by keyword, such as {known[0]}=..., got {args[0]!r:.100}; "
                f"known: {known}"
            )
        for key in settings if inspect.Parameter.VAR_KEYWORD not in kinds else ():
            if key not in known:
                raise ConfigError(f"{cls.__name__}: unknown keyword {key!r}{suggestion(key, known)}; known: {known}")
        return super().__new__(cls)
