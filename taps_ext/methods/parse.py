"""Methods as the command line names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError
from .base import MethodConfig


def _specs(text: str) -> Iterator[tuple[str, list[str]]]:
    for part in text.split(","):
        name, *arguments = part.strip().split(":")
        if "=" in name:
            raise ConfigError(
                f"methods: expected a method's name, got {name!r}; several settings stand behind colons, as in "
                "selective-lora:8:lam=0.1"
            )
        yield name, arguments


def parse_methods(text: str, lam: float = 0.5) -> dict[str, MethodConfig]:
    """Methods from a list such as "probe,scale-bias,separate:bottom=0.1,lora:8,selective-lora:8,taps,full".

    A name is a registered method's, "separate" (separate-layers; bottom or top below 1 is a fraction of the weights) or
    "selective-lora"; behind colons stand its settings as key=value; a bare number is the rank.

    Args:
        lam: of methods with learned gates, where nothing else is said.

    Raises:
        ConfigError: an unknown method or setting.
    """
    found = {}
    for name, arguments in _specs(text):
        settings: dict[str, Any] = {}
        for argument in arguments:
            key, equals, value = argument.partition("=")
            settings[key if equals else "rank"] = _value(value if equals else key, argument)
        method = {"separate": "separate-layers", "selective-lora": "lora"}.get(name, name)
        if name == "selective-lora":
            settings["selective"] = True
        if method in ("taps", "joint-taps") or settings.get("selective"):
            settings.setdefault("lam", lam)
        for side in ("bottom", "top") if method == "separate-layers" else ():
            if isinstance(settings.get(side), float):
                settings |= {"fraction": settings.pop(side), "side": side}
        label = ":".join([name, *arguments])
        if label in found:
            raise ConfigError(f"methods: expected different ones, got {label!r} twice")
        try:
            found[label] = MethodConfig.from_dict({"method": method, **settings})
        except ConfigError as error:
            raise ConfigError(f"methods: {label}: {error}") from None
    return found


def _value(text: str, argument: str) -> Any:
    if not text:
        raise ConfigError(f"methods: expected key=value, got {argument!r}")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text, text)
