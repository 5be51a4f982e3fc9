from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fabric.errors import ConfigError
from fabric.rendezvous import Identity, open_rendezvous, read_identity
from fabric.rendezvous.identity import StoreAddress, read_store_address

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "2d23e2db",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TORCHRUN.items() if name not in names}


def test_torchrun_gives_rank_size_job_and_restarts() -> None:
    assert read_identity(environ=TORCHRUN) == Identity(1, 4, "2d23e2db", 2)
    assert read_store_address(TORCHRUN) == StoreAddress("localhost", 29500, agent_hosts=True, run_id="2d23e2db")


def test_without_a_launcher_the_world_is_one() -> None:
    assert read_identity(environ={}) == Identity(0, 1, f"alone-{os.getpid()}", 0)
    assert read_identity(environ={}, job="mine") == Identity(0, 1, "mine", 0)


def test_arguments_win_over_the_environment() -> None:
    assert read_identity(rank=0, world_size=2, job="mine", environ=TORCHRUN) == Identity(0, 2, "mine", 2)


@pytest.mark.parametrize("run_id", [{}, {"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": ""}])
def test_a_launcher_without_a_run_id_names_the_job_by_its_store(run_id: dict[str, str]) -> None:
    environ = without("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE") | run_id
    assert read_identity(environ=environ) == Identity(1, 4, "localhost:29500", 0)
    assert read_store_address(environ) == StoreAddress("localhost", 29500, agent_hosts=False, run_id="none")


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (("RANK",), "RANK is missing"),
        (("MASTER_PORT",), "MASTER_PORT is missing"),
        (("RANK", "WORLD_SIZE"), "RANK, WORLD_SIZE are missing"),
        (
            ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
            "WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing .*RANK is set",
        ),
    ],
)
def test_half_a_launcher_is_refused_by_what_is_missing(removed: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_identity(environ=without(*removed))


@pytest.mark.parametrize(("given", "missing"), [({"rank": 0}, "world_size"), ({"world_size": 2}, "rank")])
def test_rank_and_size_are_given_together(given: dict[str, int], missing: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_identity(environ={}, **given)
    assert caught.value.field == missing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "-1"),
        ("RANK", "4"),
        ("RANK", "one"),
        ("RANK", "1_0"),
        ("RANK", "\u0661"),
        ("RANK", " 1"),
        ("RANK", "9" * 5000),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "65537"),
        ("TORCHELASTIC_RESTART_COUNT", "x"),
        ("TORCHELASTIC_RUN_ID", "two\nlines"),
        ("TORCHELASTIC_RUN_ID", "x" * 256),
    ],
)
def test_an_impossible_variable_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError):
        read_identity(environ=TORCHRUN | {name: value})


@pytest.mark.parametrize(("name", "value"), [("MASTER_PORT", "65536"), ("MASTER_PORT", ""), ("MASTER_ADDR", "a\tb")])
def test_an_impossible_store_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError):
        read_store_address(TORCHRUN | {name: value})


@pytest.mark.parametrize("bad", [{"rank": 2}, {"rank": True}, {"world_size": 0}, {"job": ""}, {"restart_count": -1}])
def test_an_impossible_identity_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Identity(**({"rank": 0, "world_size": 2, "job": "j"} | bad))


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "store",
        "http://host",
        "file://host/dir",
        "file://relative",
        "file:///d?x=1",
        "file:///a%00b",
        "file://[",
        "memory://",
        "memory://" + "x" * 256,
        "memory://a\nb",
        "tcp://host",
        "tcp://:5",
        "tcp://host:0",
        "tcp://host:99999",
        "tcp://host:5/path",
        "tcp://[",
    ],
)
def test_a_malformed_place_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_rendezvous(spec, rank=0, world_size=2, job="j", ask=lambda *_: [])
    assert caught.value.field == "rendezvous"  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", ["memory://room", "file:///nowhere", "tcp://host:5"])
def test_a_place_without_a_launcher_needs_rank_and_size(spec: str) -> None:
    with pytest.raises(ConfigError, match="RANK, WORLD_SIZE are missing"):
        open_rendezvous(spec, ask=lambda *_: [])


def test_a_place_without_a_store_takes_rank_and_size_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    place = open_rendezvous("memory://room")
    assert place.identity == Identity(1, 3, "none", 0)
    place.close()


def test_a_store_that_nobody_named_is_refused_before_anything_is_contacted() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT are missing"):
        open_rendezvous(rank=0, world_size=2)


def test_a_directory_may_hold_spaces(tmp_path: Path) -> None:
    place = open_rendezvous(f"file://{tmp_path}/a%20b", rank=0, world_size=1, job="j")
    place.close()
    assert not (tmp_path / "a b").exists(), "nothing is touched before meeting"
