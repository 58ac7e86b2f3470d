"""The `taps` command. Each command is a module with `PURPOSE`, `EXAMPLE`, `add_arguments` and `run`
(and `LAST`, the name of an argument that takes all further words; `MORE`, text for the end of the help).

Results go to stdout (with `--json`, one JSON document and nothing else), progress and errors to stderr. Exit
codes: 0 done, 1 a check failed, 2 a mistake in what was asked (one line says which), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import TapsError, suggestion
from ..store.compare import PARENT_ADVICE
from ..version import __version__
from . import (
    bench,
    compare,
    demo,
    diff,
    env,
    estimate,
    evaluate,
    extract,
    folder,
    inspect,
    merge,
    pack,
    patch,
    predict,
    profile,
    selftest,
    serve,
    train,
    unpack,
    verify,
)

COMMANDS: dict[str, Any] = {
    "demo": demo,
    "train": train,
    "compare": compare,
    "eval": evaluate,
    "predict": predict,
    "inspect": inspect,
    "verify": verify,
    "diff": diff,
    "pack": pack,
    "unpack": unpack,
    "extract": extract,
    "merge": merge,
    "patch": patch,
    "folder": folder,
    "serve": serve,
    "profile": profile,
    "estimate": estimate,
    "bench": bench,
    "env": env,
    "selftest": selftest,
}


_PARENT_ADVICE = (
    "name the architecture and weights that it was trained on (--config of its training, or --base and --weights), or, "
    "where tasks were trained together, put their shared file beside it"
)


class UsageError(TapsError):
    """The command line cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="taps",
        description="One frozen base model, many tasks: train, check and run files of gated weight deltas.",
        epilog="`taps COMMAND --help` shows the options and an example. A first try: taps demo. "
        "--out replaces a file that is there, once the new one is whole and on the disk, and never one that is read.",
    )
    parser.add_argument("--version", action="version", version=f"taps_ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.PURPOSE,
            description=module.PURPOSE,
            epilog=f"example:\n  {module.EXAMPLE}{getattr(module, 'MORE', '')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; what follows an option still belongs to the command's last argument.

    Raises:
        UsageError: it cannot be parsed.
    """
    args, rest = make_parser().parse_known_args(argv)
    last = getattr(COMMANDS[args.command], "LAST", None)
    unknown = [word for word in rest if last is None or word.startswith("-")]
    if unknown:
        raise UsageError(f"{args.command}: unrecognized argument {unknown[0]!r}")
    if last is not None:
        setattr(args, last, [*getattr(args, last), *rest])
    return args


def _explain(error: BaseException) -> str | None:
    """The one line that tells a user what was wrong, or None for an error that is a bug."""
    if isinstance(error, TapsError):
        text = str(error).replace(PARENT_ADVICE, _PARENT_ADVICE)
    elif isinstance(error, OSError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        text = where + (error.strerror or str(error))
    else:
        return None
    return " ".join(text.split())


def _fail(message: str) -> int:
    print(f"taps: error: {message}", file=sys.stderr)
    return 2


def _warn(message: Any, *_: Any, **__: Any) -> None:
    print(f"taps: warning: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        hint = suggestion(argv[0], COMMANDS)
        return _fail(f"command: expected one of {', '.join(COMMANDS)}, got {argv[0]!r}{hint}")
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            args = parse(argv)
            code: int = args.run(args)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of our output has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt as interrupt:
            print(f"taps: {str(interrupt) or 'interrupted'}", file=sys.stderr)
            return 130
        except Exception as error:
            message = _explain(error)
            if message is None:
                raise
            return _fail(message)
