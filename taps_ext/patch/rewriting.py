"""Patching checkpoints: new files beside the old ones, proven as they are written, then put in their places."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack

from torch import Tensor

from ..errors import ConfigError
from ..store.descriptors import write_all
from ..store.durable import Replacement, sync_folder
from ..store.errors import Path, show
from ..store.format import TensorInfo, encode_header, plan_layout
from ..store.journal import ENDING, commit, held, unfinished
from ..store.shards import INDEX, Checkpoint, Shard, folder_of, is_sharded, opened
from ..store.tensors import memory
from . import kernels
from .applying import Applied, check_forms, mismatch
from .errors import BaseMismatchError, LinkedShardError, OtherTensorsError
from .format import Entry, Patch


def apply_files(target: Path, patch: Patch, verify: str, out: Path | None) -> Applied:
    """See `patch.apply`."""
    sharded = is_sharded(target)
    if out is not None:
        _check_out(target, out, sharded=sharded)
    with opened(target, write=sharded and out is None) as checkpoint:
        check_forms(patch, checkpoint.forms(), checkpoint.path)
        if sharded:
            _check_sharded(patch, checkpoint, in_place=out is None)
        _check_before(checkpoint, patch)
        if not sharded:
            _one_file(checkpoint.shards[0], patch, verify, os.fspath(target if out is None else out))
        elif out is None:
            _in_place(checkpoint, patch, verify)
        else:
            _new_folder(checkpoint, patch, verify, os.fspath(out))
    return Applied(patch.before, patch.after, len(patch.changed), patch.elements, verify, patch.removed, patch.added)


def _check_out(target: Path, out: Path, *, sharded: bool) -> None:
    """Raise ConfigError unless `out` can be what is written instead of `target`."""
    if (
        os.path.exists(out)
        and os.path.exists(target)
        and os.path.samefile(out, folder_of(target) if sharded else target)
    ):
        raise ConfigError(
            f"out: expected a place of its own, got {out}, which is what is patched; leave --out away (out=None) to "
            "replace it"
        )
    name = os.fspath(out)
    if not sharded and name.endswith((os.sep, os.altsep or os.sep)):
        raise ConfigError(f"out: expected a file for a checkpoint of one file, got {out}, which names a folder")
    if sharded and name.endswith((".safetensors", INDEX)):
        raise ConfigError(f"out: expected a new folder for a checkpoint of several files, got {out}, a file's name")
    if sharded and os.path.lexists(out):
        raise ConfigError(f"out: expected a new folder for a checkpoint of several files, got {out}, which is there")


def _check_sharded(patch: Patch, checkpoint: Checkpoint, *, in_place: bool) -> None:
    for name, entry in patch.changed.items():
        if not entry.in_place:
            word = "adds" if entry.before is None else "removes" if entry.after is None else "reshapes or retypes"
            raise OtherTensorsError(
                patch.path, f"tensor {show(name)}: the patch {word} it; expected a checkpoint of a single file for that"
            )
    for shard in checkpoint.shards if in_place else []:
        if os.path.islink(shard.path):
            raise LinkedShardError(shard.path, "expected a file, got a link: several are not replaced at once; use out")


def _check_before(checkpoint: Checkpoint, patch: Patch) -> None:
    """Raise AlreadyAppliedError or BaseMismatchError, before a byte is written, unless what changes is as it was."""
    wrong: dict[str, int] = {}
    for name, entry in patch.changed.items():
        if entry.before is None:
            continue
        if entry.part is None or not entry.in_place:  # goes, or comes back in another form
            if kernels.sum_of(checkpoint.read(name)) != entry.before.sum:
                raise _not_the_base(patch, name, checkpoint.tensors[name][0].path)
            continue
        replaced, _ = kernels.prepare(checkpoint.read(name), entry.numbers())
        if replaced != entry.part.replaced:
            wrong[name] = replaced
    if wrong:
        raise mismatch(patch, wrong, checkpoint.path)


def _not_the_base(patch: Patch, name: str, path: str) -> BaseMismatchError:
    return BaseMismatchError(path, f"tensor {show(name)}: is not the one that the patch begins with ({patch.before})")


def _one_file(shard: Shard, patch: Patch, verify: str, path: str) -> None:
    new = Replacement(path)
    try:
        _write(shard, patch, verify, new.fd)
        new.seal()
        new.rename()
    except BaseException:
        new.drop()
        raise
    sync_folder(new.folder)


def _in_place(checkpoint: Checkpoint, patch: Patch, verify: str) -> None:
    news: list[Replacement] = []
    changed = patch.changed.keys()
    try:
        for shard in checkpoint.shards:
            if changed & shard.header.tensors.keys():
                news.append(Replacement(shard.path, ENDING))
                _write(shard, patch, verify, news[-1].fd)
                news[-1].seal()
            elif verify == "full":
                _verify(shard, patch)
        if len(news) > 1:
            commit(folder_of(checkpoint.path), news)
        elif news:
            news[0].rename()
    except BaseException:
        for new in news:
            new.close() if unfinished(folder_of(checkpoint.path)) else new.drop()
        raise
    for new in news[:1]:
        sync_folder(new.folder)


def _new_folder(checkpoint: Checkpoint, patch: Patch, verify: str, out: str) -> None:
    """A folder that appears at once, with all files of the checkpoint."""
    out = os.path.abspath(out)
    part = os.path.join(os.path.dirname(out), f".taps-{os.path.basename(out)}.part")
    with ExitStack() as stack:
        if os.path.isdir(part):  # one that a killed process has left is not locked
            if not stack.enter_context(held(part, wait=False)):
                raise ConfigError(f"out: expected a folder that nobody else is writing, got {out}")
            shutil.rmtree(part)
        os.mkdir(part)
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        stack.enter_context(held(part))
        for shard in checkpoint.shards:
            with open(os.path.join(part, os.path.basename(shard.path)), "xb") as file:
                _write(shard, patch, verify, file.fileno())
                os.fsync(file.fileno())
        if checkpoint.listing is not None:
            copy = os.path.join(part, os.path.basename(checkpoint.listing))
            shutil.copyfile(checkpoint.listing, copy)
            with open(copy, "rb+") as file:
                os.fsync(file.fileno())
        sync_folder(part)
        os.rename(part, out)
    sync_folder(os.path.dirname(out))


def _verify(shard: Shard, patch: Patch) -> None:
    for name, info in shard.header.tensors.items():
        form = patch.entries[name].before
        assert form is not None
        if kernels.sum_of(shard.read(info)) != form.sum:
            raise _not_the_base(patch, name, shard.path)


def _write(shard: Shard, patch: Patch, verify: str, fd: int) -> None:
    """The file as the patch leaves it, tensor by tensor, each proven before its bytes go out."""
    header = shard.header
    plan: Mapping[str, TensorInfo] = header.tensors
    text = len(shard.text).to_bytes(8, "little") + shard.text
    if any(not entry.in_place for entry in patch.changed.values()):
        forms = {name: entry.after for name, entry in patch.entries.items() if entry.after is not None}
        plan = plan_layout({name: (form.dtype, form.shape) for name, form in forms.items()}, path=shard.path)
        text = encode_header(plan, header.metadata, path=shard.path)
    write_all(fd, memoryview(text))
    for name in plan:
        tensor = _tensor(shard, name, patch.entries[name], patch, verify)
        write_all(fd, memory(tensor))


def _tensor(shard: Shard, name: str, entry: Entry, patch: Patch, verify: str) -> Tensor:
    assert entry.after is not None
    if entry.part is not None and not entry.in_place:
        return entry.part.values
    tensor = shard.read(shard.header.tensors[name])
    if entry.part is not None:
        replaced, write = kernels.prepare(tensor, entry.numbers())
        if replaced != entry.part.replaced:  # read anew: somebody wrote to the file meanwhile
            raise _not_the_base(patch, name, shard.path)
        write()
    if verify == "full" and kernels.sum_of(tensor) != entry.after.sum:
        raise _not_the_base(patch, name, shard.path)
    return tensor
