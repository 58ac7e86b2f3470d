"""Run the suite of methods and print its table, in markdown: methods against checks, and the lines of each method.

    python tools/method_table.py [results.xml]

`results.xml`: of a run of tests/methods/test_suite.py with --junitxml, where there is one already. A cell counts the
settings and bases on which a check passed; lines are those of the method's file that hold code: comments, docstrings
and blank lines are left out.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import sys
import tempfile
import tokenize
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

from method_cases import SETTINGS, documented_code  # noqa: E402

from taps_ext.methods import registered  # noqa: E402

SUITE = ROOT / "tests/methods/test_suite.py"
NAME = re.compile(r"test_(?P<check>\w+)\[(?P<rest>.*)\]$")


def lines_of(source: str) -> int:
    """How many lines hold code."""
    tree = ast.parse(source)
    docs: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docs |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code: set[int] = set()
    without = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in without:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docs)


def source_of(name: str) -> str:
    """Of a method's own file; of one that is a test's, of its class."""
    method = registered()[name]
    if method.__module__.startswith("taps_ext."):
        return Path(inspect.getfile(method)).read_text()
    number = method.__module__.partition("documented")[2]
    return documented_code(int(number)) if number else inspect.getsource(method)


def method_of(rest: str) -> str | None:
    """The method whose settings a test ran on, by its parameters."""
    names = [(case, method) for method, cases in SETTINGS.items() for case in cases if rest.endswith(case)]
    return max(names, key=lambda found: len(found[0]))[1] if names else None


def _cell(good: int, whole: int) -> str:
    return "-" if not whole else str(good) if good == whole else f"**{good} of {whole}**"


def table(results: Path) -> str:
    """Of a run's results."""
    passed: Counter[tuple[str, str]] = Counter()
    every: Counter[tuple[str, str]] = Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        found = NAME.match(case.attrib["name"])
        method = method_of(found["rest"]) if found else None
        if found and method:
            key = method, found["check"].replace("_", " ")
            every[key] += 1
            passed[key] += all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
    counts = Counter(check for _, check in every)  # a few are of some methods' own
    checks = [check for check in dict.fromkeys(check for _, check in every) if counts[check] > len(SETTINGS) / 2]
    rows = [["check", *SETTINGS], ["---", *["---:"] * len(SETTINGS)]]
    rows.append(["lines", *(str(lines_of(source_of(name))) for name in SETTINGS)])
    for check in checks:
        cells = [(passed[name, check], every[name, check]) for name in SETTINGS]
        rows.append([check, *(_cell(good, whole) for good, whole in cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    if len(sys.argv) > 1:
        print(table(Path(sys.argv[1])))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", str(SUITE)]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        print(table(results))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
