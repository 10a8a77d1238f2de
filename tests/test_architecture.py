"""Imports go one way, and reading and scoring never load the torch models' side."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ooc_influence

PACKAGE = Path(ooc_influence.__file__).parent
LEVELS = [
    {"_version", "errors", "options"},
    {"fingerprint", "memory", "process", "progress", "scratch"}, {"parallel"},
    {"store"}, {"checkpoint"}, {"corpus"}, {"linalg"}, {"compress"}, {"extract"}, {"hf"}, {"curvature"}, {"influence"},
    {"planning"}, {"evaluate"}, {"report"}, {"interchange"}, {"tracing"}, {"cli"}, {"__main__"},
]  # fmt: skip
OPTIONS = "options"  # its files name types of every level, for type checkers only: not looked at
LEVEL = {unit: level for level, units in enumerate(LEVELS) for unit in units}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "ooc_influence" and len(parts) > 1 else None


def imported_units(path: Path) -> set[str]:
    """Return the modules and packages at the top of ours that a file imports anywhere; see ``OPTIONS``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {unit_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(unit_of(node.module or ""))
    return found - {None}


def test_every_unit_has_a_level():
    units = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert units == set(LEVEL)


def test_imports_go_one_way():
    for path in FILES:
        unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        upwards = {other for other in imported_units(path) if LEVEL[other] > LEVEL[unit]}
        assert unit == OPTIONS or not upwards, f"{unit} imports {upwards}"


MODULES = {"ooc_influence." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
# modules that are not loaded with their package, because what they need is heavy or optional: imported when it is used
NOT_IN_THE_INTERFACE = {
    "ooc_influence.cli.main",  # the command
    "ooc_influence.linalg.device", "ooc_influence.linalg.device_signs", "ooc_influence.influence.rerank",
    "ooc_influence.influence.tokens", "ooc_influence.influence.online",  # torch
    "ooc_influence.report.server", "ooc_influence.report.live_query",  # a server; torch
}  # fmt: skip


def imported_modules(path: Path) -> set[str]:
    """Return the package's modules that a file imports anywhere: at its top, in functions, for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & set(MODULES)) | ({node.module} if names - set(MODULES) else set())
    return found & set(MODULES)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or not (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            start = stack.index(module)
            group = stack[start:]
            del stack[start:]
            if len(group) > 1 or module in graph[module]:
                found.append(sorted(group))

    for module in graph:
        if module not in number:
            visit(module)
    return found


def test_no_circles():
    """Nor any that imports in functions or for type checkers would close."""
    graph = {
        module: {other for other in imported_modules(path) if unit_of(module) != OPTIONS or unit_of(other) == OPTIONS}
        for module, path in MODULES.items()
    }
    assert not circles(graph)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_packages_are_imported_by_their_interface():
    deep = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module in MODULES and module.count(".") > 1 and module not in NOT_IN_THE_INTERFACE:
                package = unit_of(module)
                if path.relative_to(PACKAGE).parts[0] != package:
                    deep.add((str(path.relative_to(PACKAGE)), module.removeprefix("ooc_influence.")))
    assert not deep


def test_the_rule_can_fail(tmp_path):
    (tmp_path / "bad.py").write_text("from ooc_influence.cli.main import main\n")
    assert imported_units(tmp_path / "bad.py") == {"cli"}


def test_files_say_what_they_do():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text()))


def test_scoring_loads_no_model_side(pair):
    query, train = pair
    script = f"""
import sys
import ooc_influence as ooc
assert "numpy" not in sys.modules and "torch" not in sys.modules
train = ooc.GradientStore.open({str(train.path)!r})
ooc.fit_fisher(train)
ooc.top_influential({str(query.path)!r}, train, top=3)
ooc.influence_scores({str(query.path)!r}, train).compute()
ooc.self_influence(train)
models = ("torch", "transformers", "ooc_influence.extract", "ooc_influence.cli")
print([name for name in models if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there_and_documented():
    for name in ooc_influence.__all__:
        assert getattr(ooc_influence, name) is not None
        if name != "__version__":
            assert getattr(ooc_influence, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ooc_influence.nothing  # noqa: B018
