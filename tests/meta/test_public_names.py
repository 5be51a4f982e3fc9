"""The public face is what `fabric.__all__` says: each name is documented, and used by a test or an example."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re

import pytest

import fabric
from tests.meta.source import EVERYTHING, ROOT, python_files, tree

NAMES = tuple(getattr(fabric, "__all__", ()))


@functools.cache
def used_names() -> frozenset[str]:
    """Every identifier in the tests and examples; this folder looks at the project from outside and does not count."""
    found: set[str] = set()
    for path in python_files("tests", "examples"):
        if "meta" in path.parts:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
    return frozenset(found)


@functools.cache
def documentation() -> str:
    pages = [ROOT / "README.md", ROOT / "ARCHITECTURE.md"]
    return "\n".join([fabric.__doc__ or "", *(page.read_text(encoding="utf-8") for page in pages if page.exists())])


def test_the_front_door_lists_its_names_once() -> None:
    assert NAMES, "fabric.__all__ is empty"
    assert len(set(NAMES)) == len(NAMES)
    assert [name for name in NAMES if not hasattr(fabric, name)] == []


def test_the_front_door_has_no_unlisted_name() -> None:
    """Rooms may be reached as `fabric.room`; anything else public is in `__all__`."""
    extra = {
        name
        for name, value in vars(fabric).items()
        if not (name.startswith("_") or inspect.ismodule(value) or name in NAMES or name == "annotations")
    }
    assert extra == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_exercised(name: str) -> None:
    assert name in used_names(), f"no test and no example uses fabric.{name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name: str) -> None:
    value = getattr(fabric, name)
    if inspect.isclass(value) or callable(value):
        assert inspect.getdoc(value), f"fabric.{name} has no docstring"
    assert re.search(rf"\b{re.escape(name)}\b", documentation()), (
        f"neither the map of the package nor a page has {name}"
    )


def test_a_public_method_is_documented() -> None:
    bare = [
        f"{name}.{member}"
        for name in NAMES
        if inspect.isclass(kind := getattr(fabric, name)) and kind.__module__.split(".")[0] == "fabric"
        for member, value in vars(kind).items()
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
        if not inspect.getdoc(value)
    ]
    assert bare == []


@pytest.mark.parametrize("path", python_files(*EVERYTHING), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_from_the_front_door_exists(path: object) -> None:
    wanted = {
        alias.name
        for node in ast.walk(tree(path))  # type: ignore[arg-type]
        if isinstance(node, ast.ImportFrom) and node.module == "fabric" and not node.level
        for alias in node.names
    }
    assert {name for name in wanted if name not in NAMES and not _is_room(name)} == set()


def _is_room(name: str) -> bool:
    try:
        importlib.import_module(f"fabric.{name}")
    except ImportError:
        return False
    return True
