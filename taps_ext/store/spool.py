"""Tensors that wait on the disk until they are written: what is made layer by layer need not be in memory together."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor

from .descriptors import read_all, refused, write_all
from .durable import naming, target_of
from .errors import MissingFileError, Path, TruncatedFileError, show
from .format import DTYPE_NAMES, TensorInfo, count_bytes
from .record import OnDisk
from .tensors import check_storable, chunks, memory, swap_bytes, to_bytes


class Spool:
    """A file without a name, beside the one that is to be written: nobody else can reach it, and it is gone when the
    process is.

    Args:
        path: the file to be written, which errors name. What could not be written there is refused now, and not after
            the work.

    Raises:
        MissingFileError: no such folder. NotRegularFileError: a folder, say. BadPathError: no path. OSError: from the
            disk.
    """

    def __init__(self, path: Path) -> None:
        folder = os.path.dirname(target_of(path)[0])
        self.path, self._end = path, 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (closed by `close`)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFileError(path, f"no such folder: {folder}") from None
        except OSError as error:
            raise refused(path, error) from None

    def put(self, tensors: Mapping[str, Tensor]) -> OnDisk:
        """Write these; what comes back reads each where it is asked for, while the spool is open.

        Raises UnsupportedTensorError for what no task file holds, and OSError from the disk.
        """
        infos: dict[str, TensorInfo] = {}
        os.lseek(self._file.fileno(), self._end, os.SEEK_SET)  # a read may have left it elsewhere
        for name, tensor in tensors.items():
            tensor = check_storable(name, tensor, path=self.path)
            dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
            end = self._end + count_bytes(name, dtype, shape, path=self.path)
            data, owner = to_bytes(tensor)
            for piece in chunks(data):
                self._write(piece)
            del data, owner
            infos[name] = TensorInfo(name, dtype, shape, self._end, end)
            self._end = end
        return OnDisk(infos, lambda name: self._read(infos[name]))

    def _write(self, piece: memoryview) -> None:
        try:
            write_all(self._file.fileno(), piece)
        except OSError as error:
            raise naming(error, self.path) from None

    def _read(self, info: TensorInfo) -> Tensor:
        tensor = torch.empty(info.shape, dtype=info.torch_dtype, device="cpu")
        os.lseek(self._file.fileno(), info.begin, os.SEEK_SET)
        try:
            read_all(self._file.fileno(), memory(tensor), path=self.path)
        except TruncatedFileError:
            raise TruncatedFileError(self.path, f"tensor {show(info.name)}: lost before it was written") from None
        return swap_bytes(tensor) if sys.byteorder == "big" else tensor

    def close(self) -> None:
        """Let go of all tensors."""
        self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
