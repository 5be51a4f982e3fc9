from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fabric.errors import RendezvousError
from fabric.rendezvous import announce, find, runtime_directory, withdraw
from fabric.rendezvous import files as files_room
from fabric.rendezvous import runtime as runtime_room
from tests.harness.cards import a_card


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "runtime"


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_what_is_announced_is_found_until_it_is_withdrawn(directory: Path) -> None:
    cards = [a_card(0), a_card(1), a_card(None)]
    for card in reversed(cards):
        announce(card, directory=directory)
    assert find(directory=directory) == find("training", directory=directory) == cards
    withdraw(cards[1], directory=directory)
    withdraw(cards[1], directory=directory)
    assert find("training", directory=directory) == [cards[0], cards[2]]
    withdraw(cards[0], directory=directory)
    withdraw(cards[2], directory=directory)
    assert find(directory=directory) == []
    assert list((directory / "cards").iterdir()) == [], "the job's folder goes with its last card"


def test_nothing_is_found_where_nobody_announced(directory: Path) -> None:
    assert find(directory=directory) == find("training", directory=directory) == []


def test_jobs_and_hosts_are_told_apart(directory: Path) -> None:
    here, there, other = a_card(0), a_card(1, host="elsewhere"), a_card(0, job="another")
    for card in (here, there, other):
        announce(card, directory=directory)
    assert find(directory=directory) == [other, here, there]
    assert find("training", directory=directory) == [here, there]
    assert find("training", host="elsewhere", directory=directory) == [there]
    assert find(host=here.host, directory=directory) == [other, here]


def test_of_one_member_the_newest_incarnation_is_found(directory: Path) -> None:
    for incarnation in (2, 3, 1):
        announce(a_card(0, incarnation=incarnation), directory=directory)
    assert find(directory=directory) == [a_card(0, incarnation=3)]


def test_a_dead_member_is_ignored_and_swept(directory: Path) -> None:
    announce(a_card(0), directory=directory)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        killed = a_card(1, pid=child.pid)
        announce(killed, directory=directory)
        assert find(directory=directory) == [a_card(0), killed]
        child.kill()
    assert len(files(directory)) == 2
    assert find(directory=directory) == [a_card(0)]
    assert len(files(directory)) == 1


def test_a_card_whose_process_never_existed_is_kept_as_nobody_can_tell(directory: Path) -> None:
    unknown = a_card(1, pid=2**31 - 1)
    announce(unknown, directory=directory)
    assert find(directory=directory) == [unknown]


def test_cards_are_private_and_no_text_of_a_peer_becomes_a_path(directory: Path) -> None:
    nasty = a_card(0, job="../../etc", name="/etc/passwd")
    announce(nasty, directory=directory)
    assert find("../../etc", directory=directory) == [nasty]
    (path,) = files(directory)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [len(part) for part in path.relative_to(directory).parts] == [len("cards"), 16, 16 + len(".json")]
    for folder in (directory, directory / "cards", path.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("garbage", [b"", b"[]", b"{}", b'{"card":{}}', b"x" * 20_000, b"[" * 5000])
def test_a_malformed_card_is_skipped(directory: Path, garbage: bytes) -> None:
    announce(a_card(0), directory=directory)
    (path,) = files(directory)
    path.with_name("0123456789abcdef.json").write_bytes(garbage)
    assert find(directory=directory) == [a_card(0)]


def test_a_card_that_is_too_long_is_skipped_unread(directory: Path) -> None:
    announce(a_card(0), directory=directory)
    (path,) = files(directory)
    path.write_bytes(path.read_bytes() + b" " * 20_000)
    assert find(directory=directory) == []


def test_links_are_not_followed(directory: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    announce(a_card(1), directory=elsewhere)
    announce(a_card(0), directory=directory)
    (secret,) = files(elsewhere)
    (path,) = files(directory)
    path.with_name("0123456789abcdef.json").symlink_to(secret)
    (directory / "cards" / "fedcba9876543210").symlink_to(secret.parent)
    assert find(directory=directory) == [a_card(0)]


def test_a_full_directory_is_read_up_to_its_bound(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(5):
        announce(a_card(rank, 5), directory=directory)
    monkeypatch.setattr(runtime_room, "_CARDS_MAX", 3)
    assert len(find(directory=directory)) == 3


def test_the_runtime_directory_is_private_and_below_the_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_directory() == tmp_path / "tensor-fabric"
    assert stat.S_IMODE((tmp_path / "tensor-fabric").stat().st_mode) == 0o700
    announce(a_card(0))
    assert find() == [a_card(0)]
    withdraw(a_card(0))
    assert find() == []


@pytest.mark.parametrize("given", [None, "", "relative", "/nonexistent"])
def test_without_a_sessions_directory_the_temporary_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if given is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", given)
    assert runtime_directory() == tmp_path / f"tensor-fabric-{os.geteuid()}"


def test_a_runtime_directory_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "tensor-fabric").mkdir(mode=0o755)
    with pytest.raises(RendezvousError, match="no other may enter"):
        announce(a_card(0))
    (tmp_path / "tensor-fabric").rmdir()
    (tmp_path / "tensor-fabric").symlink_to(tmp_path)
    with pytest.raises(RendezvousError, match="no other may enter"):
        find()


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_room.os, "fsync", full)
    with pytest.raises(RendezvousError, match="No space left"):
        announce(a_card(0), directory=directory)
    assert files(directory) == []


def test_a_folder_that_is_tidied_away_meanwhile_is_made_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, tidied = files_room._write, []

    def tidy_first(path: Path, data: bytes) -> None:
        if not tidied:
            tidied.append(path)
            path.parent.rmdir()
        write(path, data)

    monkeypatch.setattr(files_room, "_write", tidy_first)
    announce(a_card(0), directory=directory)
    assert find(directory=directory) == [a_card(0)]


def test_a_folder_that_is_always_tidied_away_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path, _data: bytes) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(files_room, "_write", gone)
    with pytest.raises(RendezvousError, match="No such file"):
        announce(a_card(0), directory=directory)
