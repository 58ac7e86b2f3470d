"""Task adaptive parameter sharing for PyTorch (TAPS, arXiv 2203.16708)."""

from . import nn as nn  # not in __all__: `import *` must leave torch's alone
from . import patch as patch
from . import serve as serve
from .errors import (
    BaseAttributeError,
    BypassedLayerError,
    ConfigError,
    DivergedError,
    GateError,
    TapsError,
    TaskFileError,
    UnsupportedModuleError,
)
from .files.folder import TaskFolder
from .methods import (
    BitFitConfig,
    DepthwiseConfig,
    FullConfig,
    JointTapsConfig,
    LoraConfig,
    MethodConfig,
    MTLoraConfig,
    ProbeConfig,
    RcmConfig,
    ResidualAdapterConfig,
    ScaleBiasConfig,
    SeparateLayersConfig,
    SingularConfig,
    TapsConfig,
    register_method,
)
from .model import ByResolution, MixedOutput, Packing, Report, TaskModel, fold_norms
from .ops import gated_conv2d, gated_linear, mixed_conv2d, mixed_linear, mixed_lowrank
from .profiling import Memory, Operations, Profile, estimate, operations
from .profiling import profile as profile  # nor this: torch.profiler has one
from .study import Comparison, compare
from .train import Task, TrainConfig, Trainer
from .version import __version__ as __version__
from .workspace import workspace_bytes

__all__ = [
    "BaseAttributeError",
    "BitFitConfig",
    "ByResolution",
    "BypassedLayerError",
    "Comparison",
    "ConfigError",
    "DepthwiseConfig",
    "DivergedError",
    "FullConfig",
    "GateError",
    "JointTapsConfig",
    "LoraConfig",
    "MTLoraConfig",
    "Memory",
    "MethodConfig",
    "MixedOutput",
    "Operations",
    "Packing",
    "ProbeConfig",
    "Profile",
    "RcmConfig",
    "Report",
    "ResidualAdapterConfig",
    "ScaleBiasConfig",
    "SeparateLayersConfig",
    "SingularConfig",
    "TapsConfig",
    "TapsError",
    "Task",
    "TaskFileError",
    "TaskFolder",
    "TaskModel",
    "TrainConfig",
    "Trainer",
    "UnsupportedModuleError",
    "compare",
    "estimate",
    "fold_norms",
    "gated_conv2d",
    "gated_linear",
    "mixed_conv2d",
    "mixed_linear",
    "mixed_lowrank",
    "operations",
    "register_method",
    "workspace_bytes",
]
