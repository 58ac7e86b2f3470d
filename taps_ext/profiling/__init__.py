"""What a task costs to train or to run: each layer's time against the machine's limits, and memory by its purpose."""

from .dry_run import estimate
from .machine import Machine, measure
from .measured import Profile, profile
from .memory import Memory
from .operations import Operations, operations

__all__ = ["Machine", "Memory", "Operations", "Profile", "estimate", "measure", "operations", "profile"]
