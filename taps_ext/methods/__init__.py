"""The methods: one file each, a config that makes the parts a task has over a base model."""

from .base import MethodConfig, UnknownMethod, register_method, registered
from .bitfit import BitFitConfig
from .depthwise import DepthwiseConfig
from .full import FullConfig
from .joint_taps import JointTapsConfig
from .lora import LoraConfig
from .mtlora import MTLoraConfig
from .parse import parse_methods
from .probe import ProbeConfig
from .rcm import RcmConfig
from .residual_adapter import ResidualAdapterConfig
from .scale_bias import ScaleBiasConfig
from .separate_layers import SeparateLayersConfig
from .singular import SingularConfig
from .taps import TapsConfig

__all__ = [
    "BitFitConfig",
    "DepthwiseConfig",
    "FullConfig",
    "JointTapsConfig",
    "LoraConfig",
    "MTLoraConfig",
    "MethodConfig",
    "ProbeConfig",
    "RcmConfig",
    "ResidualAdapterConfig",
    "ScaleBiasConfig",
    "SeparateLayersConfig",
    "SingularConfig",
    "TapsConfig",
    "UnknownMethod",
    "parse_methods",
    "register_method",
    "registered",
]
