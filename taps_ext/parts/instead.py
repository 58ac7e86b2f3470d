"""Instead: another module in the host's place, such as a task's own head."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dense import decoders
from ..errors import ConfigError, UnsupportedModuleError
from ..store.errors import DtypeMismatchError, ShapeMismatchError
from ..store.record import Record
from .bind import Bound
from .host import original_class
from .part import Below, Part, register_part, saved
from .streams import Heads


@register_part("instead")
class Instead(Part):
    """A task's own module, called in the place of the base's.

    Args:
        role: "head" for the task's head, of which there is one; "further head" for one in the place of another
            classifier of the base's; "other" for anything else.
    """

    stands_in = True

    def __init__(self, module: nn.Module, role: str = "other") -> None:
        super().__init__()
        self.module, self.role = module, role

    def forward(self, below: Below, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def product(self, below: Below, input: Tensor, bias: Tensor | None) -> Tensor:
        made: Tensor = self.module(input)
        return made

    def bind(self, host: nn.Module, *, stock: bool) -> Bound | None:
        road = self._in_place if stock else self._run
        return road, road

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _in_place(self, host: nn.Module, input: Tensor, sample: Any) -> Any:
        return self.module(input)

    def joins(self) -> Hashable | None:
        return (self.kind, self.role) if self.role == "head" else None

    @classmethod
    def joined(cls, parts: Sequence[Part], batch: int) -> Part:
        return Heads(parts, batch)

    @property
    def replacement(self) -> nn.Module:
        return self.module

    def reads(self, below: Below, key: str, enter: Callable[[str], None], *, fused: bool) -> Any:
        """The module's tensor in the place of the base's.

        Raises:
            UnsupportedModuleError: it has none of that name.
        """
        enter("")
        found = getattr(self.module, key, self)
        if found is self:
            raise UnsupportedModuleError(
                f"head: expected one with {key!r}, which the base reads outside of its head's forward, "
                f"got a {type(self.module).__name__}"
            )
        return found

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {"other" if self.role == "other" else "head": list(self.parameters())}

    def record(self, *, open: bool) -> Record:
        module = self.module
        spec: dict[str, Any] = {"type": "custom", "class": type(module).__qualname__}
        if type(module) is nn.Linear or original_class(module) is nn.Linear:
            kind = {"in": module.in_features, "out": module.out_features, "bias": module.bias is not None}
            spec = {"type": "linear", **kind}
        elif (described := decoders.described(module)) is not None:
            spec = {"type": "decoder", **described}
        tensors = saved({name: tensor.detach() for name, tensor in module.state_dict().items()})
        facts: dict[str, Any] = {"kind": self.kind, "module": spec}
        return Record(facts if self.role == "head" else {**facts, "role": self.role}, tensors)

    @classmethod
    def read(cls, record: Record, host: nn.Module, given: nn.Module | None = None) -> Instead:
        record.only("module", "role")
        role = record.facts.get("role", "head")
        if role not in ("head", "further head", "other"):
            raise record.refuse(f"role: expected 'further head', 'other' or none, got {role!r}")
        spec = record.fact("module", dict)
        kinds = {"in": int, "out": int, "bias": bool}
        linear = spec.get("type") == "linear" and all(type(spec.get(k)) is t for k, t in kinds.items())
        decoder = cls._decoder(record, spec) if spec.get("type") == "decoder" else None
        known = {"type", *kinds} if linear else {"type", "class"}
        if decoder is None and ((not linear and spec.get("type") != "custom") or spec.keys() != known):
            raise record.refuse(f"head: expected a linear or custom head, or a decoder, got {spec!r}")
        if decoder is not None:
            return cls(cls._decoded(record, decoder, host, given), role)
        if given is None and not linear:
            raise ConfigError(
                f"head: {record.path} holds a {spec.get('class')}; pass a module of that structure as head="
            )
        if given is None:
            module = cls._linear(record, spec, host)
        else:
            kind = type(given).__qualname__
            fits = type(given).forward is nn.Linear.forward if linear else kind == spec.get("class")
            if not fits:
                name = "Linear" if linear else spec.get("class")
                raise ConfigError(f"head: {record.path} holds a {name}, got a {kind}")
            module = given
        own = module.state_dict()
        module.load_state_dict(record.take({name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}))
        return cls(module, role)

    @staticmethod
    def _decoder(record: Record, spec: dict[str, Any]) -> nn.Module:
        """The decoder that a file describes, without memory for its tensors."""
        try:
            return decoders.build({name: fact for name, fact in spec.items() if name != "type"})
        except ConfigError as error:
            raise record.refuse(f"head: {error}") from None

    @staticmethod
    def _decoded(record: Record, decoder: nn.Module, host: nn.Module, given: nn.Module | None) -> nn.Module:
        """The same with the file's tensors, or `given`, if it is such a one, with them."""
        if given is not None and decoders.described(given) != decoders.described(decoder):
            raise ConfigError(
                f"head: {record.path} holds {decoders.described(decoder)}, got "
                f"{decoders.described(given) or type(given).__qualname__}"
            )
        held = [*host.parameters(), *host.buffers(), *(t for t in record.likes().values() if not t.is_meta)]
        like = next((tensor for tensor in held if tensor.is_floating_point()), None)
        stored = next((t.dtype for t in record.likes().values() if t.is_floating_point()), torch.float32)
        dtype = like.dtype if record.cast and like is not None else stored
        typed = decoder.to(dtype=dtype) if given is None else given
        own = typed.state_dict()
        values = record.take({name: (tensor.shape, tensor.dtype) for name, tensor in own.items()})
        if given is None:  # what was claimed is borne out: now there may be memory for it
            typed = typed.to_empty(device="cpu" if like is None else like.device)
        typed.load_state_dict(values)
        return typed

    @classmethod
    def typed_as_base(cls, record: Record) -> list[Tensor]:
        return list(record.likes().values())

    @staticmethod
    def _linear(record: Record, spec: dict[str, Any], host: nn.Module) -> nn.Module:
        shape, weight = [spec["out"], spec["in"]], record.likes().get("weight")
        if weight is None or list(weight.shape) != shape:  # before something of a size that a file claims is made
            got = None if weight is None else list(weight.shape)
            raise record.missing("weight", f"expected shape {shape}, got {got}")
        if not weight.is_floating_point():
            raise record.refuse(f"weight: expected floating-point values, got {weight.dtype}", DtypeMismatchError)
        if isinstance(host, nn.Linear) and host.in_features != spec["in"]:
            raise record.refuse(
                f"head: expected {host.in_features} inputs, as the base's has, got {spec['in']}", ShapeMismatchError
            )
        like = next(host.parameters(), weight)
        dtype = like.dtype if record.cast else weight.dtype
        return nn.utils.skip_init(
            nn.Linear, spec["in"], spec["out"], bias=spec["bias"], device=like.device, dtype=dtype
        )
