"""The methods: one file each, a config that plans which parts a task adds to a base model."""

from .base import GateSpec, MethodConfig, Plan, register_method
from .full import FullConfig
from .probe import ProbeConfig
from .taps import TapsConfig

__all__ = ["FullConfig", "GateSpec", "MethodConfig", "Plan", "ProbeConfig", "TapsConfig", "register_method"]
