"""JSON without JSON's loopholes: no duplicate keys, no NaN, no giant integers, no lone surrogates, bounded
size.

`json.loads` keeps the last of two equal keys, takes NaN, Infinity and 1e999, and recurses as deep as the text
says. Here the text is scanned once in C before it is parsed, so its depth and its number of values are known
first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from ..errors import TaskFileError
from .errors import DuplicateKeyError, HeaderError, LimitError, Path, show

MAX_DEPTH = 32
MAX_INT_DIGITS = 20  # any 64-bit integer, signed or not
_INT_END = 10**MAX_INT_DIGITS
MAX_RICH_STRINGS = 1 << 18  # 65,536 tensor digests, their names and more

_STRUCTURE = b'"[]{},:'
_NOT_STRUCTURE = bytes(b for b in range(256) if b not in _STRUCTURE)
_DIGITS = re.compile("[0-9]+")
_STRING = re.compile(rb'"[^"]*"?')
_STEP = bytes(2 if b in b"[{" else 0 if b in b"]}" else 1 for b in range(256))  # depth change, plus one
_BRACKETS = bytes.maketrans(b"{}", b"[]")


quoted: Callable[[str], str] = json.encoder.encode_basestring
"""What :func:`dumps` makes of a string."""


def dumps(value: object) -> str:
    """The canonical text of a JSON value: sorted keys, no spaces, characters not escaped unless they must
    be.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class Tokens:
    """How many JSON tokens several texts may have together."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    def take(self, count: int, *, path: Path, where: str) -> None:
        """Raise LimitError where a text's are too many."""
        self.used += count
        if self.used > self.most:
            others = "" if self.used == count else f", of which {self.used - count} in other entries"
            raise LimitError(path, f"{where}: at most {self.most} JSON tokens are read, got {self.used}{others}")


def scan(text: str, *, path: Path, where: str, max_tokens: Tokens) -> int:
    """Bounds nesting depth and value count of JSON text without parsing it; returns how many keys its objects have.

    All are exact up to the first syntax error, where the parser stops anyway. Raises LimitError.
    """
    data = text.encode("utf-8", "surrogatepass").replace(b"\\\\", b"").replace(b'\\"', b"")
    data = data.translate(None, _NOT_STRUCTURE).replace(b'""', b"")  # most strings are gone with this
    if data.count(b'"') > 2 * MAX_RICH_STRINGS:
        raise LimitError(path, f"{where}: more than {MAX_RICH_STRINGS} strings with brackets, colons or commas")
    tokens = _STRING.sub(b"", data)
    max_tokens.take(len(tokens), path=path, where=where)
    brackets = tokens.translate(_BRACKETS, b",:")
    for _ in range(MAX_DEPTH):  # each takes the innermost level away, in C
        brackets = brackets.replace(b"[]", b"")
    # Ends at the first excess: sums over a prefix that is already too deep need no further look.
    if brackets and any(depth > MAX_DEPTH for depth in accumulate(step - 1 for step in tokens.translate(_STEP))):
        raise LimitError(path, f"{where}: JSON nested deeper than {MAX_DEPTH} levels")
    return tokens.count(b":")


def _keys(value: Any, *, path: Path, where: str) -> int:
    """How many keys the objects in a JSON value have. Raises LimitError for an integer of too many digits."""
    count, level = 0, [value]
    while level:
        below: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is int:
                if not -_INT_END < item < _INT_END:
                    raise _too_many_digits(path, where, len(str(abs(item))))
            elif kind is dict:
                count += len(item)
                below += item.values()
            elif kind is list:
                below += item
        level = below
    return count


def _too_many_digits(path: Path, where: str, count: int) -> LimitError:
    return LimitError(path, f"{where}: an integer of {count} digits; at most {MAX_INT_DIGITS} are read")


def loads(text: str, *, path: Path, where: str, max_tokens: int | Tokens = 1 << 18) -> Any:
    """Parses JSON text. `where` names the place in the file for messages.

    Raises HeaderError (not JSON, NaN or Infinity, lone surrogate), DuplicateKeyError, LimitError (depth,
    number of values, integers of more than 20 digits).
    """
    tokens = max_tokens if isinstance(max_tokens, Tokens) else Tokens(max_tokens)
    keys = scan(text, path=path, where=where, max_tokens=tokens)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in items:
            if key in seen:
                raise DuplicateKeyError(path, f"{where}: the key {show(key)} occurs twice in one JSON object")
            seen.add(key)
        return dict(items)

    def real(digits: str) -> float:
        if len(digits) > 400 or not math.isfinite(number := float(digits)):
            raise HeaderError(path, f"{where}: expected finite numbers, got {show(digits)}")
        return number

    def constant(word: str) -> float:
        raise HeaderError(path, f"{where}: {word} is not JSON; expected finite numbers")

    try:
        value = json.loads(text, parse_float=real, parse_constant=constant)
        if _keys(value, path=path, where=where) != keys:  # to call `pairs` for each object would take longer than all
            json.loads(text, object_pairs_hook=pairs)
        text.encode("utf-8")
        if "\\u" in text:  # an escape can still spell half a surrogate pair
            dumps(value).encode("utf-8")
    except json.JSONDecodeError as error:
        raise HeaderError(path, f"{where}: not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeEncodeError:
        raise HeaderError(path, f"{where}: a lone surrogate; expected UTF-8 text") from None
    except TaskFileError:
        raise
    except ValueError:  # Python's own limit
        raise _too_many_digits(path, where, max(map(len, _DIGITS.findall(text)))) from None
    return value


def check(value: object, *, path: Path, where: str, depth: int = 0) -> None:
    """Raises HeaderError or LimitError unless `loads(dumps(value))` gives `value` back, types included."""
    if isinstance(value, (dict, list)) and depth >= MAX_DEPTH:
        raise LimitError(path, f"{where}: JSON nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise HeaderError(path, f"{where}: expected string keys, got {show(key)}")
            check(key, path=path, where=where, depth=depth + 1)
            check(item, path=path, where=f"{where}.{key}", depth=depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check(item, path=path, where=f"{where}[{index}]", depth=depth + 1)
    elif type(value) is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise HeaderError(path, f"{where}: a lone surrogate in {show(value)}; expected UTF-8 text") from None
    elif type(value) is int:
        if abs(value) >= _INT_END:
            raise LimitError(path, f"{where}: integers of at most {MAX_INT_DIGITS} digits are stored")
    elif type(value) is float:
        if not math.isfinite(value):
            raise HeaderError(path, f"{where}: expected a finite number, got {value}")
    elif value is not None and type(value) is not bool:
        raise HeaderError(
            path, f"{where}: expected dict, list, str, int, float, bool or None, got {type(value).__name__}"
        )
