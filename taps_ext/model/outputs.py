"""What a model's outputs say of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import ConfigError


def predictions(outputs: Any) -> Any:
    """What losses and metrics see: the model's outputs, or the `logits` of a transformers `ModelOutput`."""
    logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else outputs


def top_labels(chances: Tensor, labels: Sequence[str] | None, count: int, where: str) -> list[dict[str, Any]]:
    """The likeliest classes: `label` and `probability`, the likeliest first.

    Args:
        chances: `[C]`, probabilities. labels: their names, or None: numbers. count: at most so many.
        where: what the message begins with.

    Raises:
        ConfigError: another number of labels.
    """
    names = [str(i) for i in range(len(chances))] if labels is None else labels
    if len(names) != len(chances):
        raise ConfigError(f"{where}: names {len(names)} labels for {len(chances)} outputs")
    best = chances.topk(min(count, len(names)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [{"label": names[i], "probability": p} for p, i in pairs]
