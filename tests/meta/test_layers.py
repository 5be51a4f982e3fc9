"""The floors of the house, read from the syntax tree: no import can hide from it, not even a lazy one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.meta.source import ROOT, imports, loaded_by_name, module_name, place, python_files, tree

# Rooms by floor, lowest first. A room imports only from floors below its own. setup.cfg has the same list.
FLOORS = (
    {"fabric.errors", "transports"},
    {"fabric.topics", "fabric.config"},
    {"fabric.payloads", "fabric.observe"},
    {"fabric.core", "fabric.storage", "fabric.rendezvous", "fabric.security"},
    {"fabric.message", "fabric.guards"},
    {"fabric.table"},
    {"fabric.engine"},
    {"fabric.subscription", "fabric.publisher", "fabric.requests", "fabric.letters"},
    {"fabric.member"},
    {"fabric.client", "fabric.entering"},
    {"fabric.joining"},
    {"fabric.aio"},
    {"fabric.services", "fabric.testing"},
    {"fabric.cli"},
)
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}

# Both stand on the finished house, so they may enter by the front door and use each other.
TOP = {"fabric.services", "fabric.testing", "fabric.cli"}

# `core` is pure: nothing here has a clock, a thread, a file, a socket or chance.
CORE_MAY_IMPORT = {
    "__future__",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "operator",
    "struct",
    "typing",
    "msgpack",
    "xxhash",
}
CORE_MAY_USE = ("fabric.core", "fabric.errors", "fabric.config", "fabric.topics")

TORCH_ROOMS = (
    "fabric.payloads.tensors",
    "fabric.payloads.staging",
    "fabric.rendezvous",
    "fabric.services",
    "fabric.testing.devices",
)

# All of it is about torch, so it imports torch at its top, and is itself imported late.
ALL_TORCH = {"fabric.payloads.tensors"}

FILES = python_files("fabric", "transports")


def room_of(module: str) -> str:
    """`fabric.core.wire` -> `fabric.core`; `transports.zeromq` -> `transports`; `fabric` -> `fabric`."""
    parts = module.split(".")
    return parts[0] if parts[0] == "transports" else ".".join(parts[:2])


def found_imports(path: Path) -> Iterator[tuple[str, ast.AST, bool]]:
    yield from imports(tree(path), name=module_name(path), package=path.name == "__init__.py")
    for name, node in loaded_by_name(tree(path)):
        yield name, node, False


def inside(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def by_the_front_door(name: str, node: ast.AST) -> bool:
    """`import fabric`, or a name that only `fabric/__init__.py` can have: `from fabric import join`."""
    if name == "fabric":
        return isinstance(node, ast.Import)
    return name.startswith("fabric.") and name.count(".") == 1 and name not in HEIGHT and not is_module(name)


def climbs(path: Path) -> Iterator[str]:
    """Imports of a room on the same floor or above."""
    here = room_of(module_name(path))
    if here == "fabric":
        return
    for name, node, _ in found_imports(path):
        there = room_of(name)
        if by_the_front_door(name, node):
            if here not in TOP:
                yield f"{place(path, node)}: {here} enters by the front door"
        elif there in HEIGHT and there != here and not (HEIGHT[there] < HEIGHT.get(here, 0) or {here, there} <= TOP):
            yield f"{place(path, node)}: {here} imports {there}"


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module_name(path)) for path in FILES} - {"fabric"}
    assert rooms <= set(HEIGHT), f"give these a floor here and in setup.cfg: {sorted(rooms - set(HEIGHT))}"


def test_the_import_linter_knows_the_same_rooms() -> None:
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    layers = text.split("layers =\n", 1)[1].split("\n\n", 1)[0]
    assert set(layers.replace("(", " ").replace(")", " ").replace("|", " ").replace(":", " ").split()) == set(HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_each_floor_imports_only_below_itself(path: Path) -> None:
    assert list(climbs(path)) == []


@pytest.mark.parametrize("path", python_files("transports"), ids=place)
def test_the_transports_know_nothing_of_the_fabric(path: Path) -> None:
    assert [place(path, node) for name, node, _ in found_imports(path) if name.split(".")[0] == "fabric"] == []


@pytest.mark.parametrize("path", python_files("fabric"), ids=place)
def test_zmq_stays_in_the_transports(path: Path) -> None:
    assert [place(path, node) for name, node, _ in found_imports(path) if name.split(".")[0] == "zmq"] == []


@pytest.mark.parametrize("path", FILES, ids=place)
def test_torch_is_imported_late_and_in_its_rooms_only(path: Path) -> None:
    torch = [(node, early) for name, node, early in found_imports(path) if name.split(".")[0] == "torch"]
    if not inside(module_name(path), TORCH_ROOMS):
        assert [place(path, node) for node, _ in torch] == []
    if module_name(path) not in ALL_TORCH:
        assert [place(path, node) for node, early in torch if early] == [], (
            "import it inside the function that needs it"
        )
    early = [place(path, node) for name, node, early in found_imports(path) if early and name in ALL_TORCH]
    assert early == [], "import this module inside the function that needs it"


@pytest.mark.parametrize("path", python_files("fabric/core"), ids=place)
def test_the_core_is_pure(path: Path) -> None:
    foreign = {
        name
        for name, _, _ in found_imports(path)
        if name.split(".")[0] not in CORE_MAY_IMPORT and not inside(name, CORE_MAY_USE)
    }
    assert foreign == set()


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("from fabric import errors, topics", None),
        ("import fabric", "enters by the front door"),
        ("def f():\n    from fabric import join", "enters by the front door"),
        ("import fabric.engine.loop", "imports fabric.engine"),
        ("from ..client import Fabric", "imports fabric.client"),
        ("import importlib\nimportlib.import_module('fabric.aio')", "imports fabric.aio"),
        ("from fabric.storage.spill import Spill", "imports fabric.storage"),
    ],
)
def test_the_climbing_imports_are_found(text: str, finding: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "tree", lambda _path: ast.parse(text))
    found = [line.split(": fabric.core ", 1)[1] for line in climbs(ROOT / "fabric" / "core" / "sample.py")]
    assert sorted(set(found)) == ([finding] if finding else [])


def test_a_lazy_import_does_not_hide_and_a_guarded_one_does_not_run() -> None:
    text = (
        "import a\n"
        "if TYPE_CHECKING:\n    import b\n"
        "try:\n    pass\nexcept ImportError:\n    import c\n"
        "class K:\n    import d\n    def f(self):\n        from . import e\n"
        "from ..x import y\n"
    )
    found = {name: early for name, _, early in imports(ast.parse(text), name="p.q.r", package=False)}
    assert found == {
        "a": True,
        "b": False,
        "c": True,
        "d": True,
        "p.q": False,
        "p.q.e": False,
        "p.x": True,
        "p.x.y": True,
    }
