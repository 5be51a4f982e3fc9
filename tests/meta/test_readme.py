"""What the README says works: its examples run, and the commands that it names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta.readme import Snippet, commands, snippets
from tests.meta.source import ROOT

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""

SAMPLE = """\
Run `make demo`, or `cd x && make test`; make sure that it works.

<!-- runnable
x = 1
-->
```python
print(x)
```

```python
never_run()
```

<!-- runnable -->
```python
print(2)
```
"""


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_marked_examples_and_named_commands_are_found() -> None:
    assert snippets(SAMPLE) == [Snippet(7, "x = 1", "print(x)\n"), Snippet(16, "", "print(2)\n")]
    assert commands(SAMPLE) == {"demo", "test"}


def test_the_readme_has_an_example_that_runs() -> None:
    assert snippets(TEXT), "mark an example of README.md as runnable"


@pytest.mark.multiprocess
@pytest.mark.parametrize("snippet", snippets(TEXT), ids=lambda snippet: f"README.md:{snippet.line}")
def test_an_example_of_the_readme_runs(snippet: Snippet, tmp_path: Path) -> None:
    if "torch" in snippet.program:
        pytest.importorskip("torch", reason="this example needs torch, which is an extra")
    (tmp_path / "example.py").write_text(snippet.program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_commands_that_a_page_names_exist(page: str) -> None:
    named = commands((ROOT / page).read_text(encoding="utf-8"))
    assert named, f"{page} names no command"
    assert named <= targets()


def test_each_target_of_the_makefile_uses_the_one_environment() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    ours = targets() - {"help", "clean"}
    assert {name for name in ours if not re.search(rf"^{name}: \$\(STAMP\)", text, re.MULTILINE)} == set()


def test_the_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    wanted = {re.split(r"[<>=]", name, maxsplit=1)[0] for name in [*project["dependencies"], *extras]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split("==")[0] for line in lines if "==" in line} == wanted
    assert "torch==2.13.0" in lines
