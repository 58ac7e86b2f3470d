"""Which tasks the steps of a joint run have: a pure function of the seed and the epoch, so that resuming needs no
state."""

from __future__ import annotations

import random
from collections.abc import Mapping

Steps = list[tuple[str, ...]]


def schedule(sizes: Mapping[str, int], mix: str | None, seed: int, epoch: int) -> Steps:
    """The tasks of each step of an epoch.

    Args:
        sizes: task -> its number of batches. mix: as `TrainConfig.mix`.
    """
    names = list(sizes)
    if mix in (None, "all"):
        return [tuple(names)] * max(sizes.values())
    total = sum(sizes.values())
    if mix == "round-robin":
        return [(names[step % len(names)],) for step in range(total)]
    chance = random.Random(f"{seed} {epoch} {mix}")
    if mix == "proportional":
        drawn = [name for name in names for _ in range(sizes[name])]
        chance.shuffle(drawn)
        return [(name,) for name in drawn]
    weights = [1.0 if mix == "uniform" else sizes[name] ** 0.5 for name in names]
    return [(name,) for name in chance.choices(names, weights, k=total)]
