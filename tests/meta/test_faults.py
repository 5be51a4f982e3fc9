"""The fault catalogue of ARCHITECTURE.md is the truth: each row has its tests or a reason, each such test its row."""

from __future__ import annotations

import ast
import re
from collections import defaultdict

from tests.meta.source import ROOT, python_files, tree

ROWS = {*range(1, 42), *range(55, 72), 74, 75}
"""Those that must be there; others may."""
ROW = re.compile(r"^\| F(\d\d) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
FILE = re.compile(r"`([a-z0-9_]+/[a-z0-9_]+)`")
TEST = re.compile(r"test_f(\d\d)_")


def catalogue() -> list[tuple[int, str, str]]:
    """(row, fault, tests or reason), as they stand on the page."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = page.partition("### Fault catalogue")[2].partition("\n## ")[0]
    return [(int(number), fault, told) for number, fault, told in ROW.findall(section)]


def files_by_row() -> dict[int, set[str]]:
    """The files, as the page names them, with tests of each row."""
    found: dict[int, set[str]] = defaultdict(set)
    for path in python_files("tests"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (match := TEST.match(node.name)):
                found[int(match[1])].add(path.relative_to(ROOT / "tests").with_suffix("").as_posix())
    return found


def test_every_row_is_in_the_catalogue_once_and_in_order() -> None:
    rows = [row for row, _, _ in catalogue()]
    assert rows == sorted(set(rows))
    assert ROWS - set(rows) == set()


def test_the_catalogue_names_for_each_row_the_files_of_its_tests() -> None:
    named = {row: set(FILE.findall(told)) for row, _, told in catalogue()}
    assert {row: files for row, files in named.items() if files} == files_by_row()


def test_a_row_without_tests_says_what_has_to_come_first() -> None:
    missing = {row: told for row, _, told in catalogue() if not FILE.search(told)}
    assert {row: told for row, told in missing.items() if not told.startswith("with ")} == {}
