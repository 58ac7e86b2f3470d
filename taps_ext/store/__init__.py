"""The `.taps` file: format, parts, fingerprints, atomic writes. Knows tensors and bytes, not models."""

from ..errors import TaskFileError
from . import errors, names
from .compare import check_parent, check_tensors
from .durable import sync_folder, write_text
from .fingerprint import fingerprint, plain_name
from .format import FORMAT, TensorInfo
from .io import (
    FileHeader,
    TensorFile,
    Verification,
    copy,
    read,
    read_header,
    read_safetensors,
    sound,
    verify,
    write,
    write_safetensors,
)
from .metadata import Metadata
from .record import Record
from .spool import Spool
from .table import Claim, PartEntry
from .task_file import TaskFile, current_versions, load, opened, save
from .tensors import Later, Source, tensor_digest

__all__ = [
    "FORMAT",
    "Claim",
    "FileHeader",
    "Later",
    "Metadata",
    "PartEntry",
    "Record",
    "Source",
    "Spool",
    "TaskFile",
    "TaskFileError",
    "TensorFile",
    "TensorInfo",
    "Verification",
    "check_parent",
    "check_tensors",
    "copy",
    "current_versions",
    "errors",
    "fingerprint",
    "load",
    "names",
    "opened",
    "plain_name",
    "read",
    "read_header",
    "read_safetensors",
    "save",
    "sound",
    "sync_folder",
    "tensor_digest",
    "verify",
    "write",
    "write_safetensors",
    "write_text",
]
