"""A base in evaluation mode whatever its flags say: shallow copies of its modules that share all that they hold.

Flags sit on modules that all threads share, so the bare base of a model in training mode runs on its mirror: other
objects of the original classes, with `training` False, on the same tensors, settings and hooks. Activation
checkpointing then recomputes the mirror's modules, which are plain ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .host import MACHINERY, ROUTING, is_setting, original_class
from .rebind import rebind


class Mirror:
    """The mirror of one base, brought up to date before each use; its modules stay the same objects."""

    def __init__(self) -> None:
        self.clones: dict[int, nn.Module] = {}
        self.hosts: list[nn.Module] = []

    @torch.compiler.disable
    def of(self, base: nn.Module) -> nn.Module:
        """The mirror of `base` as it is now."""
        hosts = list(base.modules())
        if len(hosts) != len(self.hosts) or any(a is not b for a, b in zip(hosts, self.hosts, strict=True)):
            self.hosts, self.clones = hosts, {id(host): object.__new__(original_class(host)) for host in hosts}
        for host in hosts:
            values = self.clones[id(host)].__dict__
            for key in [key for key in values if key not in host.__dict__]:
                del values[key]
            for key, value in host.__dict__.items():
                if key == "_modules":
                    children = values.setdefault(key, {})
                    if list(children) != list(value):
                        children.clear()
                    children.update((name, self.clones.get(id(child), child)) for name, child in value.items())
                elif key == "_compiled_call_impl":
                    values[key] = None  # that of the base, with the base's flags
                elif key not in ROUTING:
                    values[key] = rebind(value, self.clones)
            values["training"] = False
        return self.clones[id(base)]

    @contextmanager
    def handing_back(self) -> Iterator[None]:
        """Settings that a method meanwhile gives mirrored modules are those of the base's."""
        before = [(host, self.clones[id(host)], dict(self.clones[id(host)].__dict__)) for host in self.hosts]
        yield
        hosts = {id(clone): host for host, clone, _ in before}
        for host, clone, was in before:
            for key, value in list(clone.__dict__.items()):
                if key not in MACHINERY and was.get(key, before) is not value and is_setting(value):
                    setattr(host, key, rebind(value, hosts))

    def __getstate__(self) -> dict[str, Any]:
        return {"clones": {}, "hosts": []}  # a copy makes its own
