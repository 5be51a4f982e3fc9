"""The project's files as the meta tests read them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("fabric", "transports")
EVERYTHING = (*LIBRARY, "tests", "perf", "examples")


def python_files(*folders: str) -> list[Path]:
    """All python files below these folders, sorted; what an example or benchmark wrote is left out."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if not {"out", "results"} & set(path.relative_to(ROOT).parts))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """`fabric/core/wire.py` -> `fabric.core.wire`; a package's `__init__` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(path: Path, node: ast.AST | None = None) -> str:
    """Where something was found, as an editor opens it."""
    line = f":{node.lineno}" if node is not None and hasattr(node, "lineno") else ""
    return f"{path.relative_to(ROOT)}{line}"


def imports(module: ast.Module, *, name: str, package: bool) -> Iterator[tuple[str, ast.stmt, bool]]:
    """Each imported module's full name, the statement, and whether it runs when the file is imported.

    `from a import b` gives `a` and `a.b`: whether b is a module cannot be told from here. What stands under
    `if TYPE_CHECKING` never runs.
    """
    for node, at_import in _statements(module.body, at_import=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node, at_import
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, name, package)
            yield base, node, at_import
            for alias in node.names:
                yield f"{base}.{alias.name}", node, at_import


def loaded_by_name(module: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Modules that `import_module("a.b")` loads: an import like any other, only later."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node


def _base(node: ast.ImportFrom, name: str, package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    kept = parts[: len(parts) - node.level + (1 if package else 0)]
    return ".".join([*kept, node.module] if node.module else kept)


def _statements(body: list[ast.stmt], *, at_import: bool) -> Iterator[tuple[ast.stmt, bool]]:
    for node in body:
        yield node, at_import
        inner_runs = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                runs = inner_runs and not (guarded and field == "body")
                yield from _statements(_bodies(value), at_import=runs)


def _bodies(values: list[object]) -> list[ast.stmt]:
    """The statements in a field: its own, and those of except handlers and match cases."""
    found: list[ast.stmt] = []
    for value in values:
        if isinstance(value, ast.stmt):
            found.append(value)
        elif isinstance(value, ast.ExceptHandler | ast.match_case):
            found.extend(value.body)
    return found
