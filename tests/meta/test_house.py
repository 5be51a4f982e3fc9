"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.meta.source import EVERYTHING, LIBRARY, ROOT, place, python_files, tree

FILE_LINES = 500
FUNCTION_LINES = 50
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"print", "eval", "exec", "recv_pyobj", "send_pyobj"}
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
LOG_NAMES = re.compile(r"^_?log(ger)?$", re.IGNORECASE)

# Written in pieces, so that this file does not find itself.
MACHINE_PATH = re.compile("/(" + "root|home|work|tmp/bash" + "_jobs)/")
UNFINISHED = re.compile("|".join([r"\bTO" + "DO\\b", r"\bFIX" + "ME\\b", r"\bXX" + "X\\b"]))

PAGES = sorted(
    path
    for pattern in ("*.md", "*.toml", "*.cfg", "*.txt", "Makefile", ".ci/*", ".gitignore")
    for path in ROOT.glob(pattern)
)
LIBRARY_FILES = python_files(*LIBRARY)
ALL_FILES = python_files(*EVERYTHING)


def called(node: ast.Call) -> str:
    """`print(...)` and `x.print(...)` -> `print`."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else ""


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


def eager_logging(path: Path) -> Iterator[str]:
    for node in calls(path):
        function = node.func
        if not (isinstance(function, ast.Attribute) and function.attr in LOG_METHODS and node.args):
            continue
        owner = function.value
        name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        text = node.args[1] if function.attr == "log" and len(node.args) > 1 else node.args[0]
        if LOG_NAMES.match(name) and not isinstance(text, ast.Constant | ast.Name):
            yield place(path, node)


def long_functions(path: Path) -> Iterator[str]:
    """Functions whose body, docstring not counted, is longer than allowed."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = node.body[0].end_lineno if ast.get_docstring(node, clean=False) else node.lineno
            lines = (node.end_lineno or 0) - (start or 0)
            if lines > FUNCTION_LINES:
                yield f"{place(path, node)}: {node.name} has {lines} lines"


def broad_excepts(path: Path) -> Iterator[str]:
    """Handlers that swallow anything; one that ends in `raise` only tidies up and is none."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler) and not _raises_again(node):
            kinds = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else {""}
            if kinds & {"", "Exception", "BaseException"}:
                yield place(path, node)


def _raises_again(node: ast.ExceptHandler) -> bool:
    last = node.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=place)
def test_the_library_does_not_print_pickle_or_evaluate(path: Path) -> None:
    bad = [place(path, node) for node in calls(path) if called(node) in FORBIDDEN_CALLS and _is_plain(node)]
    bad += [
        place(path, node)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom) and _modules(node) & FORBIDDEN_MODULES
    ]
    assert bad == []


def _is_plain(node: ast.Call) -> bool:
    """`exec` as a method is another thing; pyzmq's object calls are forbidden as methods too."""
    return isinstance(node.func, ast.Name) or called(node).endswith("_pyobj")


def _modules(node: ast.Import | ast.ImportFrom) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=place)
def test_logging_is_lazy(path: Path) -> None:
    assert list(eager_logging(path)) == []


@pytest.mark.parametrize("path", ALL_FILES, ids=place)
def test_a_file_has_at_most_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES, "a file with two jobs is two files"


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=place)
def test_a_function_has_at_most_50_lines(path: Path) -> None:
    assert list(long_functions(path)) == []


def test_broad_excepts_stand_in_two_places_only() -> None:
    """Round a user's handler, and at the top of the engine's loop."""
    found = [where for path in LIBRARY_FILES for where in broad_excepts(path)]
    assert len(found) <= 2, found
    assert [where for where in found if not where.startswith("fabric/engine/")] == []


@pytest.mark.parametrize("path", [*ALL_FILES, *PAGES], ids=place)
def test_no_file_names_a_machine_or_is_unfinished(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{place(path)}:{at}" for at, line in enumerate(lines, 1) if MACHINE_PATH.search(line)] == []
    assert [f"{place(path)}:{at}" for at, line in enumerate(lines, 1) if UNFINISHED.search(line)] == []


@pytest.mark.parametrize(
    "path", python_files("tests/unit", "tests/property", "tests/simulation", "tests/conformance"), ids=place
)
def test_a_test_does_not_sleep(path: Path) -> None:
    assert [place(path, node) for node in calls(path) if called(node) == "sleep"] == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (eager_logging, "log.info(f'{x}')"),
        (eager_logging, "self._logger.warning('%s' % x)"),
        (eager_logging, "log.log(10, 'a {}'.format(x))"),
        (broad_excepts, "try:\n    f()\nexcept:\n    g()"),
        (broad_excepts, "try:\n    f()\nexcept (ValueError, Exception):\n    g()"),
        (long_functions, "def f():\n" + "    x = 1\n" * 51),
    ],
)
def test_the_checks_find_what_they_look_for(check: object, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "tree", lambda _path: ast.parse(text))
    assert callable(check)
    assert len(list(check(ROOT / "fabric" / "sample.py"))) == 1


def test_an_except_that_raises_again_swallows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "try:\n    f()\nexcept BaseException:\n    g()\n    raise"
    monkeypatch.setitem(globals(), "tree", lambda _path: ast.parse(text))
    assert list(broad_excepts(ROOT / "fabric" / "sample.py")) == []
