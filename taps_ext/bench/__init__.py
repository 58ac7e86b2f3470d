"""Measure gated layers on this machine, beside the best that torch offers without them: `taps bench`.

results = taps_ext.bench.run(taps_ext.bench.suite(), seconds=120)
print(taps_ext.bench.table(results))
"""

from __future__ import annotations

from .cases import GROUPS, Case, suite
from .heap import keep_freed_memory
from .result import Result, table
from .timing import run

__all__ = ["GROUPS", "Case", "Result", "keep_freed_memory", "run", "suite", "table"]
