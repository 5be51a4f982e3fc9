"""`import fabric` is light: whoever only passes it on pays for none of the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.meta.source import ROOT

HEAVY = ("torch", "asyncio", "prometheus_client", "lz4", "sqlite3", "multiprocessing")


def modules_after(statement: str) -> set[str]:
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50, check=True
    )
    loaded = json.loads(done.stdout)
    assert isinstance(loaded, list)
    return set(loaded)


@pytest.mark.multiprocess
@pytest.mark.parametrize("statement", ["import fabric", "from fabric import *", "import fabric.rendezvous"])
def test_importing_the_fabric_loads_nothing_heavy(statement: str) -> None:
    # numpy and zmq are dependencies that every member uses; what they load themselves is not ours to avoid.
    allowed = modules_after("import numpy, zmq")
    assert {name for name in modules_after(statement) - allowed if name.split(".")[0] in HEAVY} == set()
