"""TensorBoard: the numbers of every epoch and the score of every gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError


class Board:
    """Scalars in a task's folder, by epoch: what `metrics.jsonl` has, and `scores/<layer>`.

    Args:
        first_epoch: where the run starts or goes on; what an earlier run wrote from there on is not shown any more.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, first_epoch: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("tensorboard: it is not installed: pip install taps_ext[tensorboard]") from None
        self.writer: Any = SummaryWriter(str(folder), purge_step=first_epoch)

    def epoch(self, values: dict[str, Any], scores: dict[str, float | None]) -> None:
        step = int(values["epoch"])
        numbers = {key: value for key, value in values.items() if key != "epoch"}
        numbers |= {f"scores/{layer}": score for layer, score in scores.items() if score is not None}
        for key, value in numbers.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
