"""Instead: another module in the host's place, such as a task's own head."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, nn

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
        known = {"type", *kinds} if linear else {"type", "class"}
        if (not linear and spec.get("type") != "custom") or spec.keys() != known:
            raise record.refuse(f"head: expected a linear or custom head, got {spec!r}")
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
