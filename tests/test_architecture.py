"""How the package hangs together: rooms that import downward, parts that are spoken to in their own words."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

import taps_ext

PACKAGE = Path(taps_ext.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A data path from the top to the bottom (DESIGN, section 5); rooms in one line do not know each other. "" is the
# package's face, of which those above are users.
ROOMS = [
    {"__main__"},
    {"cli"},
    {"demo", "bench"},
    {"", "zoo"},
    {"study"},
    {"profiling"},
    {"train", "serve"},
    {"plot", "data", "nn"},
    {"model"},
    {"files"},
    {"methods"},
    {"base"},
    {"routing"},
    {"parts"},
    {"dense"},
    {"workspace", "patch"},
    {"store", "ops"},
    {"reference"},
    {"extension"},
    {"errors", "version"},
]
HEIGHT = {room: len(ROOMS) - level for level, rooms in enumerate(ROOMS) for room in rooms}
UPWARD = {("demo.check", "cli.config")}  # the demo's second process reads its config as `taps` does
KINDS = {"Layer", "Own", "Instead", "Installed", "Dense", "Whole", "LowRank", "Rows"}
# Who may ask what kind a part is, and who may know of a Delta.
OF_PARTS = ("parts", "ops", "reference.py")
DELTA = {"nn/layers.py", "bench/cases.py"}  # a drop-in layer's own, and the naive module that is the baseline


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def room_of(module: str) -> str:
    return module.split(".")[0]


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """What runs when a module is imported, blocks for type checkers left out."""
    found: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.If):
            typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            found += _statements([*([] if typing else node.body), *node.orelse])
        elif isinstance(node, (ast.Try, ast.With)):
            inner = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            found += _statements(inner + [one for handler in getattr(node, "handlers", []) for one in handler.body])
        else:
            found.append(node)
    return found


def targets(file: Path, node: ast.AST) -> set[str]:
    """The modules of the package that an import names."""
    if isinstance(node, ast.Import):
        full = [alias.name for alias in node.names if alias.name.split(".")[0] == "taps_ext"]
        return {name.partition(".")[2] for name in full}
    if not isinstance(node, ast.ImportFrom):
        return set()
    if node.level:
        here = list(file.relative_to(PACKAGE).parent.parts)
        origin = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
    elif (node.module or "").split(".")[0] == "taps_ext":
        origin = (node.module or "").split(".")[1:]
    else:
        return set()
    start = ".".join(part for part in origin if part)
    inner = {f"{start}.{alias.name}".lstrip(".") for alias in node.names}
    return {name if name in MODULES else start for name in inner}


def imports(file: Path, *, everywhere: bool = False) -> set[str]:
    """The package's modules that a file imports: at its own level, or anywhere but for type checkers."""
    tree = ast.parse(file.read_text())
    nodes = _statements(tree.body)
    found = {target for node in nodes for target in targets(file, node)}
    if everywhere:
        inner = [one for node in nodes if not isinstance(node, (ast.Import, ast.ImportFrom)) for one in ast.walk(node)]
        found |= {target for node in inner for target in targets(file, node)}
    return found - {module_of(file)}


def test_imports_are_no_circle() -> None:
    graph = {module: imports(file) for module, file in MODULES.items()}
    assert sum(map(len, graph.values())) > 300  # they were found
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for target in sorted(graph[module]):
                visit(target)
            done.add(path.pop())

    for module in graph:
        visit(module)


def test_few_modules_lie_outside_of_the_rooms() -> None:
    loose = sorted(file.name for file in PACKAGE.glob("*.py"))
    assert len(loose) <= 8, loose


def test_every_room_has_its_place() -> None:
    assert {room_of(module) for module in MODULES} == HEIGHT.keys()


@pytest.mark.parametrize("module", list(MODULES))
def test_rooms_import_downward(module: str) -> None:
    """Also inside of functions."""
    room = room_of(module)
    for target in imports(MODULES[module], everywhere=True) - {upper for lower, upper in UPWARD if lower == module}:
        other = room_of(target)
        assert other == room or HEIGHT[other] < HEIGHT[room], f"{module} imports {target or 'the package'}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nobody_asks_what_kind_a_part_is(file: Path) -> None:
    """No isinstance, issubclass, type() or match on a kind of part or change, and no Delta by name."""
    if name_of(file).split("/")[0] in OF_PARTS:
        return
    tree = ast.parse(file.read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and "parts" in f"{node.module}".split(".")
        for alias in node.names
        if alias.name in KINDS
    }
    for node in ast.walk(tree):
        where = f"{name_of(file)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "delta" or name_of(file) in DELTA, f"{where}: .delta"
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        asked = call and node.func.id in ("isinstance", "issubclass")
        if asked or isinstance(node, (ast.Compare, ast.MatchClass)):
            named = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} & imported
            named |= {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)} & KINDS
            assert not named, f"{where}: asks for {', '.join(named)}"


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by it: of two it collects one, and ends with an error of the other."""
    found = sorted(file.name for file in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, following in itertools.pairwise(found) if name == following] == []
