"""The first example of the README, with one, two and four ranks of torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta.readme import snippets
from tests.meta.source import ROOT

STEPS = 100
LINE = re.compile(r"rank-(\d+) layers\.encoder\.3\.health 17 (\d+) tensor\([0-9.e-]+\)")

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.torch]


def torchrun(script: Path, ranks: int, logs: Path) -> None:
    """Run a script with so many ranks; what each prints goes to a file of its own below `logs`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--redirects", "3", "--log-dir", str(logs), str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            told, _ = process.communicate(timeout=100)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    errors = "\n".join(path.read_text(encoding="utf-8") for path in logs.rglob("stderr.log"))
    assert process.returncode == 0, f"{told}\n{errors}"


def heard(logs: Path) -> dict[int, dict[int, list[int]]]:
    """{rank: {source rank: sequences in the order in which they were printed}}"""
    found: dict[int, dict[int, list[int]]] = {}
    for path in logs.rglob("stdout.log"):
        sources = found.setdefault(int(path.parent.name), {})
        for line in path.read_text(encoding="utf-8").splitlines():
            match = LINE.fullmatch(line)
            assert match, f"an unexpected line: {line!r}"
            sources.setdefault(int(match[1]), []).append(int(match[2]))
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_example_of_the_readme_runs_on_so_many_ranks(ranks: int, tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed", reason="torchrun comes with torch")
    script, logs = tmp_path / "example.py", tmp_path / "logs"
    first = snippets((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    script.write_text(first.program, encoding="utf-8")
    torchrun(script, ranks, logs)
    found = heard(logs)
    assert set(found) == set(range(ranks))
    for rank, sources in found.items():
        assert sources[rank][0] == 0, "a member hears itself from its first message on"
        assert set(sources) <= set(range(ranks))
        for sequences in sources.values():
            assert sequences == list(range(sequences[0], sequences[0] + len(sequences))), "in order, without a hole"
            assert sequences[-1] < STEPS


def test_the_first_example_is_the_one_of_the_package() -> None:
    """`examples/hello.py` is the same program with its own training step."""
    first = snippets((ROOT / "README.md").read_text(encoding="utf-8"))[0].code
    hello = (ROOT / "examples" / "hello.py").read_text(encoding="utf-8")
    wanted = [line.partition("  #")[0].rstrip() for line in first.splitlines() if line.strip()]
    there = {line.partition("  #")[0].rstrip() for line in hello.splitlines()}
    assert [line for line in wanted if line not in there] == []
