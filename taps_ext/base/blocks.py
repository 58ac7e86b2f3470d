"""Blocks and stages of a transformer, by the names of its layers: timm's Swin, PVT and ViT, and what is named alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import ConfigError
from .scan import Scan, inside, match

PROJECTION = "attn.proj"
HIDDEN = ("mlp.fc1", "mlp.fc2")
INPUTS = ("attn.qkv", "attn.q", "attn.k", "attn.v", "attn.kv")
LAYERS = (*INPUTS, PROJECTION, *HIDDEN)
"""Of a block: the linear layers by their names in it."""

_EMBEDDING = "patch_embed"


class Stage(NamedTuple):
    """A run of blocks on features of one size.

    Attributes:
        blocks: their names, in order. module: the module that holds them and what is of this stage alone; None where
            the base has no stages of its own. before: what of it runs before the blocks (patch merging), with layers.
        behind: whether something with tensors runs behind them in it (a norm).
    """

    blocks: tuple[str, ...]
    module: str | None = None
    before: str | None = None
    behind: bool = False


class Blocks(NamedTuple):
    """What a base's names tell.

    Attributes:
        stages: in order. containers: what holds blocks, and in bases with stages what else is a stage's.
        embedding: the modules that make patches of an image.
    """

    stages: tuple[Stage, ...]
    containers: tuple[str, ...]
    embedding: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Of all blocks."""
        return [block for stage in self.stages for block in stage.blocks]

    def inner(self, name: str) -> bool:
        """Whether a module is of a stage or of the embedding, and not behind them (a last norm, a head)."""
        return any(inside(name, outer) for outer in (*self.containers, *self.embedding))


def child_of(name: str, parent: str) -> str:
    """The child of `parent` that `name` lies in, by its full name."""
    start = f"{parent}." if parent else ""
    return start + name.removeprefix(start).partition(".")[0]


def blocks_of(base: Scan) -> Blocks:
    """The blocks of a base: modules with the layers `attn.proj`, `mlp.fc1` and `mlp.fc2`. Where several modules hold
    some, each is a stage; else they are one."""
    layers = list(base.gated)
    found = [
        name.removesuffix(f".{PROJECTION}")
        for name in layers
        if name.endswith(f".{PROJECTION}")
        and all(f"{name.removesuffix(PROJECTION)}{hidden}" in base.gated for hidden in HIDDEN)
    ]
    holders: dict[str, list[str]] = {}
    for block in found:
        holders.setdefault(block.rpartition(".")[0], []).append(block)
    tensors = sorted([*layers, *base.norms], key=base.order.__getitem__)
    embedding = tuple(
        dict.fromkeys(
            ".".join(parts[: parts.index(_EMBEDDING) + 1])
            for name in tensors
            if _EMBEDDING in (parts := name.split("."))
        )
    )
    if len(holders) < 2:
        return Blocks(tuple(Stage(tuple(blocks)) for blocks in holders.values()), tuple(holders), embedding)
    stages = []
    for holder, blocks in holders.items():
        module = holder.rpartition(".")[0]
        others = [name for name in tensors if inside(name, module) and not inside(name, holder)]
        first, last = base.order[blocks[0]], base.order[blocks[-1]]
        before = [child_of(name, module) for name in others if base.order[name] < first]
        behind = any(base.order[name] > last for name in others)
        stages.append(Stage(tuple(blocks), module, before[0] if before else None, behind))
    return Blocks(tuple(stages), tuple(stage.module or "" for stage in stages), embedding)


def last_blocks(base: Scan, blocks: Blocks, stages: int | Sequence[str] | None, argument: str) -> list[str]:
    """The blocks that end a stage, in order.

    Args:
        stages: how many equal groups of blocks are one where the base has none of its own (by default 4, or as many as
            there are blocks); globs of blocks; None finds them.

    Raises:
        ConfigError: a number where the base has stages, or above that of its blocks; a pattern that matches none.
    """
    if stages is not None and not isinstance(stages, int):
        return match(stages, blocks.names, argument)
    if len(blocks.stages) > 1:
        if stages is not None and stages != len(blocks.stages):
            raise ConfigError(f"{argument}: the base has {len(blocks.stages)} stages of its own, got {stages}")
        return [stage.blocks[-1] for stage in blocks.stages]
    names = blocks.names
    count = min(4, len(names)) if stages is None else stages
    if count > len(names):
        raise ConfigError(f"{argument}: expected at most the {len(names)} blocks of the base, got {stages}")
    return [names[(place + 1) * len(names) // count - 1] for place in range(count)]
