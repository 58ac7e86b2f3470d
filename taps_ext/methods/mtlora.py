"""MTLoRA (arXiv 2403.20320): many tasks on one image, of which all but the last block of each stage runs once."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from ..base.blocks import HIDDEN, LAYERS, PROJECTION, Blocks, blocks_of, child_of, last_blocks
from ..base.scan import Scan, inside, match
from ..errors import ConfigError
from ..parts import DropoutLowRank, Gate, Layer, LowRank, Part, StreamLowRank, Streams, Whole
from .base import MethodConfig, number, register_method, tuple_of_str

_TABLE = "relative_position_bias_table"


@register_method("mtlora")
@dataclass(frozen=True, kw_only=True)
class MTLoraConfig(MethodConfig):
    """Settings of MTLoRA, for transformers whose blocks are named as timm's Swin, PVT and ViT have them.

    All tasks share, and train together, `scale * B A` on the linear layers of every block, the norms, the patch
    embedding, the tables of relative positions and the patch merging. A task has `task_scale * B_t A_t` on the output
    projection and both MLP layers of the last block of each stage, and its head. There it has a stream beside the
    shared one, `y_t = W x + b + task_scale * B_t A_t x_t`, which ends with the stage: the features that a `DenseBase`
    gives to decoders are the task's. Behind the last of these stages all that follows runs on the task's stream.
    `model.forward_tasks(x, tasks=[...])` runs several in one pass. At first B_t is zero: nothing is added, A_t has no
    gradient, and neither has B_t of fc1, whose results enter by that of fc2 alone.

    Attributes:
        rank, task_rank: of what tasks share, and of their own. scale, task_scale: as they are, not divided by a rank.
        dropout: of the inputs of A in training; a task layer that is given another one's stream has none.
        plus: True leaves patch merging to the base and gives it low-rank changes (MTLoRA+).
        merging: whether a stage's streams go through the patch merging that follows it, so that features can be taken
            behind it, as in the paper; None: where a `DenseBase` takes them there, or nothing says where they are
            taken.
        stages: how many equal groups of blocks are a stage where the base has none (ViT; by default 4), or globs of
            the blocks in which tasks have streams.
        shared_modules, task_modules: globs of the layers instead, the latter among those of the blocks with streams.
    """

    rank: int = 16
    task_rank: int = 4
    scale: float = 4.0
    task_scale: float = 4.0
    dropout: float = 0.05
    plus: bool = False
    merging: bool | None = None
    stages: int | tuple[str, ...] | None = None
    shared_modules: tuple[str, ...] | None = None
    task_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "task_rank"):
            rank = getattr(self, name)
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"{name}: expected an int >= 1, got {rank!r}")
        number(self.scale, "scale", 0.0, open_low=True)
        number(self.task_scale, "task_scale", 0.0, open_low=True)
        number(self.dropout, "dropout", 0.0, 1.0)
        if self.dropout == 1.0:
            raise ConfigError("dropout: expected a number in [0, 1), got 1.0")
        if not isinstance(self.plus, bool):
            raise ConfigError(f"plus: expected True or False, got {self.plus!r}")
        if self.merging is not None and not isinstance(self.merging, bool):
            raise ConfigError(f"merging: expected True, False or None, got {self.merging!r}")
        for name in ("shared_modules", "task_modules"):
            object.__setattr__(self, name, tuple_of_str(getattr(self, name), name))
        if isinstance(self.stages, bool) or (isinstance(self.stages, int) and self.stages < 1):
            raise ConfigError(f"stages: expected an int >= 1, globs of blocks, or None, got {self.stages!r}")
        if not isinstance(self.stages, int):
            object.__setattr__(self, "stages", tuple_of_str(self.stages, "stages"))

    # -- what tasks share

    def _blocks(self, base: Scan) -> Blocks:
        """Raises ConfigError where there are none."""
        found = blocks_of(base)
        if not found.stages:
            names = ", ".join(("attn.qkv", PROJECTION, *HIDDEN))
            raise ConfigError(
                f"{self.method}: expected a transformer whose blocks hold {names} (timm's Swin, Swin v2, PVT v2, ViT), "
                "found no such block; torchvision's Swin multiplies with the weights of its layers without calling "
                "them: take timm's"
            )
        return found

    def _low_rank(self, host: nn.Module) -> Part:
        if self.dropout:
            return Layer(
                Gate(learn=False), DropoutLowRank(host, rank=self.rank, scale=self.scale, dropout=self.dropout)
            )
        return Layer(Gate(learn=False), LowRank(host, rank=self.rank, scale=self.scale))

    @staticmethod
    def _trained(base: Scan, name: str) -> Part:
        host = base.gated[name]
        return Layer(Gate(learn=False), Whole(host), bias=base.bias(name, host))

    def shared(self, base: Scan) -> dict[str, Part]:
        """Low-rank changes of every block, and what is trained as it is."""
        blocks = self._blocks(base)
        usual = [f"{block}.{layer}" for block in blocks.names for layer in LAYERS if f"{block}.{layer}" in base.gated]
        chosen = (
            usual if self.shared_modules is None else match(self.shared_modules, list(base.gated), "shared_modules")
        )
        merging = [
            name
            for name in base.gated
            if blocks.inner(name)
            and not any(inside(name, outer) for outer in (*blocks.names, *blocks.embedding))
            and name not in chosen
        ]
        embedding = [name for name in base.gated if any(inside(name, outer) for outer in blocks.embedding)]
        low_rank = [*chosen, *(merging if self.plus else [])]
        whole = [name for name in (*embedding, *([] if self.plus else merging)) if name not in low_rank]
        return {
            **{name: self._low_rank(base.gated[name]) for name in base.gated if name in low_rank},
            **{name: self._trained(base, name) for name in whole},
            **base.own({name: host for name, host in base.norms.items() if blocks.inner(name)}),
            **base.own(
                {name: host for name, host in base.others.items() if blocks.inner(name)}, only=lambda key: key == _TABLE
            ),
        }

    # -- a task's own

    def parts(self, base: Scan) -> dict[str, Part]:
        """Task layers, and where their streams begin and end."""
        blocks = self._blocks(base)
        ends = last_blocks(base, blocks, self.stages, "stages")
        chosen = self._task_layers(base, ends)
        made: dict[str, Part] = {}
        used = self._used(ends, chosen)
        for block in used:
            layers = [name for name in base.gated if name in chosen and inside(name, block)]
            begins = self._streams(base, blocks, block, layers, last=block == used[-1], made=made)
            for name in layers:
                change = StreamLowRank(
                    base.gated[name],
                    rank=self.task_rank,
                    scale=self.task_scale,
                    dropout=self.dropout,
                    first=name == begins,
                )
                made[name] = Layer(Gate(learn=False), change)
        return made

    def begin(self, base: Scan, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> None:
        """Warn of task layers whose streams reach no head."""
        blocks = self._blocks(base)
        used = self._used(last_blocks(base, blocks, self.stages, "stages"), parts)
        unread = [
            block
            for block in used[:-1]
            if not any(inside(block, tap) or tap == self._merging(base, blocks, block) for tap in base.taps)
        ]
        if unread:
            warnings.warn(
                f"mtlora: the base takes no features behind {', '.join(unread)}, so that task layers there learn "
                f"nothing; name taps there (DenseBase), or leave them out: stages={used[-1:]}",
                stacklevel=4,  # the caller of add_task
            )

    @staticmethod
    def _used(ends: list[str], layers: Collection[str]) -> list[str]:
        """Those of these blocks that have task layers."""
        return [block for block in ends if any(name != block and inside(name, block) for name in layers)]

    def _merging(self, base: Scan, blocks: Blocks, block: str) -> str | None:
        """The patch merging that a block's streams go through, or None."""
        place = next(place for place, stage in enumerate(blocks.stages) if block in stage.blocks)
        stage = blocks.stages[place]
        if place + 1 == len(blocks.stages) or stage.blocks[-1] != block or stage.behind:
            return None
        following = blocks.stages[place + 1].before
        wanted = not base.taps or following in base.taps if self.merging is None else self.merging
        return following if wanted else None

    def _task_layers(self, base: Scan, ends: list[str]) -> set[str]:
        linear = {name: host for name, host in base.gated.items() if isinstance(host, nn.Linear)}
        if self.task_modules is None:
            wanted = [f"{block}.{layer}" for block in ends for layer in (PROJECTION, *HIDDEN)]
            return {name for name in wanted if name in linear}
        inner = [name for name in base.gated if any(inside(name, block) for block in ends)]
        try:
            chosen = match(self.task_modules, inner, "task_modules")
        except ConfigError as error:
            raise ConfigError(f"{error} of the blocks that end a stage ({', '.join(ends)})") from None
        for name in chosen:
            if name not in linear:
                kind = type(base.gated[name]).__name__
                raise ConfigError(f"task_modules: expected linear layers, {name} is a {kind}")
        return set(chosen)

    def _streams(
        self, base: Scan, blocks: Blocks, block: str, layers: list[str], *, last: bool, made: dict[str, Part]
    ) -> str | None:
        """Put where the streams of a block begin and end into `made`; returns the task layer that they begin at, or
        None where they begin before it."""
        stage = next(stage for stage in blocks.stages if block in stage.blocks)
        role = "last" if last else "block"
        if stage.behind and stage.module is not None:  # whose forward counts its rows before the blocks
            made[stage.module] = Streams(role)
            others = [*([] if stage.before is None else [stage.before]), *stage.blocks]
            made |= {name: Streams("same") for name in others if name != block}
        else:
            made[block] = Streams(role)
        if not last and (merging := self._merging(base, blocks, block)) is not None:
            made[merging] = Streams("merging")
        tensors = [name for name in base.order if (name in base.gated or name in base.norms) and inside(name, block)]
        first = child_of(tensors[0], block)
        heavy = list(dict.fromkeys(child_of(name, block) for name in base.gated if inside(name, block)))
        begun = child_of(layers[0], block)
        if begun == heavy[0]:
            made[first] = Streams("shared")
            return layers[0]
        # Before the first task layer all streams are the same: they run once, and what they give is everyone's.
        made[first] = Streams("shared")
        made |= {name: Streams("same") for name in heavy[: heavy.index(begun)]}
        if first != heavy[0]:
            made[heavy[0]] = Streams("widen")
        return None
