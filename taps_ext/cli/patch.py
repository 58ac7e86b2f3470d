"""`taps patch`: the lossless difference of two checkpoints, and its application."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from .common import check_out, emit, size, table

if TYPE_CHECKING:
    from ..patch import Patch

PURPOSE = "Make, apply and check lossless sparse patches between checkpoints of safetensors files; no model is needed."
EXAMPLE = "taps patch diff step-1.safetensors step-2.safetensors -o step-2.tapspatch"
MORE = """
  taps patch apply step-1.safetensors step-2.tapspatch --out step-2.safetensors
  taps patch verify step-2.tapspatch step-1.safetensors

A checkpoint is a .safetensors file, a folder of them, or a .safetensors.index.json. What is applied is applied bit for
bit and wholly, or nothing changes. The format is in docs/patch.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, purpose: str, example: str) -> argparse.ArgumentParser:
        one = actions.add_parser(
            name,
            help=purpose,
            description=purpose,
            epilog=f"example:\n  taps patch {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        suppressed = argparse.SUPPRESS  # what was said before the action stays
        one.add_argument("--json", action="store_true", default=suppressed, help="print one JSON document on stdout")
        return one

    diff = action("diff", "Write what leads from one checkpoint to another.", "old.safetensors new/ -o new.tapspatch")
    diff.add_argument("old", metavar="OLD", help="the checkpoint that is there")
    diff.add_argument("new", metavar="NEW", help="the one to come")
    diff.add_argument("-o", "--out", metavar="FILE", required=True, help="the patch to write (.tapspatch)")

    apply = action("apply", "Bring a checkpoint to where the patches lead.", "model/ 1.tapspatch 2.tapspatch")
    apply.add_argument("checkpoint", metavar="CHECKPOINT", help="replaced, unless --out is given")
    apply.add_argument("patches", metavar="PATCH", nargs="+", help="patches, in their order, applied as one")
    apply.add_argument(
        "--out",
        metavar="PATH",
        help="the file, or for several files the new folder (of these files alone), to write instead",
    )
    apply.add_argument(
        "--verify",
        choices=("full", "touched"),
        default="full",
        help="prove all of the checkpoint, or only what is replaced (default: full)",
    )

    inspect = action("inspect", "Show what a patch changes.", "new.tapspatch")
    inspect.add_argument("patch", metavar="PATCH")

    verify = action(
        "verify",
        "Check a patch, and whether checkpoints are where it begins; exit code 0 only if all is so, else 1.",
        "new.tapspatch old.safetensors",
    )
    verify.add_argument("patch", metavar="PATCH")
    verify.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*")


def _facts(made: Patch, file: str) -> dict[str, Any]:
    changed = made.changed
    return {
        "file": file,
        "before": made.before,
        "after": made.after,
        "tensors": len(made.entries),
        "tensors_changed": len(changed),
        "tensors_removed": made.removed,
        "tensors_added": made.added,
        "elements_changed": made.elements,
        "bytes": made.nbytes,
    }


def _moved(removed: int, added: int) -> str:
    """ ", N removed, M added", of the tensors; nothing where the two states have the same ones."""
    return f", {removed} removed, {added} added" if removed or added else ""


def _row(name: str, entry: Any) -> dict[str, Any]:
    after = entry.after or entry.before
    kind = "changed"
    if not entry.in_place:
        kind = "added" if entry.before is None else "removed" if entry.after is None else "reshaped"
    return {
        "tensor": name,
        "change": kind,
        "dtype": after.dtype,
        "shape": list(after.shape),
        "elements": entry.elements,
        "coding": None if entry.part is None else entry.part.coding,
        "bytes": 0 if entry.part is None else len(entry.part.places) + len(entry.part.values),
    }


def _diff(args: argparse.Namespace) -> int:
    from .. import patch

    check_out(args.out, args.old, args.new)
    made = patch.diff(args.old, args.new, out=args.out)
    facts = _facts(made, args.out)
    if args.json:
        emit(facts)
    else:
        print(
            f"{args.out}: {facts['tensors_changed']} of {facts['tensors']} tensors{_moved(made.removed, made.added)}, "
            f"{made.elements:,} elements, {size(made.nbytes)}"
        )
    return 0


def _apply(args: argparse.Namespace) -> int:
    from .. import patch
    from ..store.shards import beside, folder_of, is_sharded

    if args.out is not None:
        check_out(args.out, *args.patches)
    done = patch.apply(args.checkpoint, args.patches, verify=args.verify, out=args.out)
    where = args.checkpoint if args.out is None else args.out
    left = []
    if args.out is not None and is_sharded(args.checkpoint):
        new = os.path.abspath(args.out)
        folder = os.path.abspath(folder_of(args.checkpoint))
        left = [name for name in beside(args.checkpoint) if os.path.join(folder, name) != new]
    if args.json:
        emit({"checkpoint": where, **done._asdict(), "not_copied": left})
    else:
        moved = _moved(done.removed, done.added)
        print(f"{where}: {done.tensors} tensors{moved}, {done.elements:,} elements written; now {done.after}")
        if left:
            more, verb = ("", "is") if len(left) == 1 else (f" and {len(left) - 1} more", "are")
            were = "was" if len(left) == 1 else "were"
            print(f"{left[0]}{more} {verb} not part of the checkpoint and {were} not copied")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from .. import patch

    made = patch.load(args.patch)
    rows = [_row(name, entry) for name, entry in made.changed.items()]
    if args.json:
        emit({**_facts(made, args.patch), "changes": rows})
        return 0
    moved = _moved(made.removed, made.added)
    print(f"{args.patch}: {len(rows)} of {len(made.entries)} tensors change{moved}, {made.elements:,} elements")
    print(f"before   {made.before}\nafter    {made.after}")
    if rows:
        cells = [
            (
                row["tensor"],
                row["change"],
                row["dtype"],
                "x".join(map(str, row["shape"])),
                f"{row['elements']:,}",
                row["coding"] or "",
                f"{row['bytes']:,}",
            )
            for row in rows
        ]
        print("\n" + table(("tensor", "change", "dtype", "shape", "elements", "coding", "bytes"), cells))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .. import patch
    from ..errors import TaskFileError

    results: list[dict[str, Any]] = []

    def checked(file: str, check: Any) -> Any:
        try:
            return check()
        except TaskFileError as error:
            results.append({"file": file, "ok": False, "reason": error.problem})
        except OSError as error:
            results.append({"file": file, "ok": False, "reason": error.strerror or str(error)})
        return None

    made = checked(args.patch, lambda: patch.load(args.patch))
    if made is not None:
        results.append({"ok": True, **_facts(made, args.patch)})
    for checkpoint in args.checkpoints if made is not None else []:
        digest = checked(checkpoint, lambda checkpoint=checkpoint: patch.digest(checkpoint))
        if digest is not None:
            at = {made.after: "after", made.before: "before"}.get(digest, "elsewhere")
            found: dict[str, Any] = {"file": checkpoint, "ok": digest == made.before, "digest": digest, "at": at}
            if not found["ok"]:
                found["reason"] = "the patch is applied already" if at == "after" else "not where the patch begins"
            results.append(found)
    if args.json:
        emit(results)
    else:
        for result in results:
            ok = "where the patch begins" if "at" in result else "sound"
            print(f"ok   {result['file']}: {ok}" if result["ok"] else f"BAD  {result['file']}: {result['reason']}")
    return 0 if all(result["ok"] for result in results) else 1


def run(args: argparse.Namespace) -> int:
    actions = {"diff": _diff, "apply": _apply, "inspect": _inspect, "verify": _verify}
    return actions[args.action](args)
