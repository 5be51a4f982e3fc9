"""Kill -9 and dead letters: what kills its process is counted, and nothing that was buried is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric import join
from fabric.config import Letters
from fabric.entering import Entry
from fabric.errors import LetterStoreLockedError
from fabric.payloads import decode
from fabric.storage.dead_letters import DeadLetterStore
from tests.harness.children import Parent, child
from tests.harness.faces import DEFAULT
from tests.harness.letters import LIMITS

pytestmark = pytest.mark.multiprocess
STEADY = replace(DEFAULT, liveness=replace(DEFAULT.liveness, marker_ms=50))


def live_once(parent: Parent, spec: str, where: str) -> None:
    """One life of rank 1: it handles what was published, until something kills it."""
    Entry.letters_directory = Path(where)
    with join(STEADY, rank=1, world_size=2, rendezvous=spec) as fabric:
        kept = [letter.sequence for letter in fabric.dead_letters]
        parent.say(kept=kept)  # now: the first message may end this life
        ran: list[tuple[Any, int]] = []

        @fabric.on("t", attempts=2, exhausted="park", start="retained")
        def handle(message: Any) -> None:
            ran.append((message.value, message.attempt))
            parent.say(ran=ran[-1])
            if message.value == "poison":
                os.kill(os.getpid(), signal.SIGKILL)
            if message.value == "bad":
                raise ValueError

        while True:
            asked = parent.hear()
            if asked.get("end"):
                break
            if "discard" in asked:
                fabric.dead_letters.discard(fabric.dead_letters[asked["discard"]])
            fabric._engine.until(lambda wanted=asked["letters"]: len(fabric.dead_letters) == wanted, 20)  # type: ignore[misc]
            letters = fabric.dead_letters
            parent.say(letters=[(one.sequence, one.attempts, one.reason, one.detail, one.value()) for one in letters])


def play_life(other: Any, told: dict[str, Any]) -> list[Any]:
    """What ran in a life that ends by a signal."""
    ran = []
    while True:
        try:
            heard = other.hear()
        except AssertionError:
            assert other.exit_code() == -signal.SIGKILL
            return ran
        told.update(heard)
        if "ran" in heard:
            ran.append(heard["ran"])


def hear_letters(other: Any) -> list[Any]:
    heard: dict[str, Any] = {}
    while "letters" not in heard:
        heard = other.hear()
    return heard["letters"]  # type: ignore[no-any-return]


def test_letters_outlive_their_process_and_one_that_kills_it_is_counted(tmp_path: Path) -> None:
    where, spec = tmp_path / "state", f"file://{tmp_path}/meet"
    (tmp_path / "meet").mkdir()
    arguments: dict[str, Any] = {"spec": spec, "where": str(where)}
    lives: list[list[Any]] = []
    with child(live_once, **arguments) as other, join(STEADY, rank=0, world_size=2, rendezvous=spec) as fabric:
        publisher = fabric.publisher("t")
        publisher.wait_for_subscribers(1)
        for value in ("bad", 0):
            publisher.publish(value, seed=0)
        other.tell(letters=2)
        assert len(hear_letters(other)) == 2
        with pytest.raises(LetterStoreLockedError):
            DeadLetterStore.open(where, LIMITS)
        for value in ("poison", 1, 2):
            publisher.publish(value, seed=1)
        lives.append(play_life(other, {}))
        with child(live_once, **arguments) as other:
            told: dict[str, Any] = {}
            lives.append(play_life(other, told))
            assert told["kept"] == [0, 1]
        assert lives == [[["poison", 1]], [["poison", 2]]], "what has a letter is not handled again"
        with child(live_once, **arguments) as other:
            other.tell(letters=5)
            assert [(sequence, *rest) for sequence, *rest, _, _ in hear_letters(other)] == [
                (0, 2, "handler_exhausted"),
                (1, 0, "parked"),
                (0, 2, "handler_exhausted"),
                (1, 0, "parked"),
                (2, 0, "parked"),
            ]
            publisher.flush(timeout_s=20)
            other.tell(discard=2, letters=2)  # the poison is given up: its lane goes on
            assert [value for *_, value in hear_letters(other)] == ["bad", 0]
            other.tell(discard=0, letters=0)
            assert hear_letters(other) == []
            publisher.publish("bad", seed=0)
            other.tell(letters=1)
            assert [value for *_, value in hear_letters(other)] == ["bad"]
            other.tell(end=True)
            assert other.exit_code() == 0
    store = DeadLetterStore.open(where, LIMITS)
    assert [letter.sequence for letter in store.letters() if letter.kind == "letter"] == [2]
    store.close()


MANY = 200


def redrive_many(parent: Parent, where: str) -> None:
    """Bury many, and let them come again; the test hears of each that is handled."""
    Entry.letters_directory = Path(where)
    failing = [True]
    with join(replace(STEADY, letters=Letters(same_reason_max=MANY + 1, redriven_at_once_max=16))) as fabric:

        @fabric.on("t", attempts=1)
        def handle(message: Any) -> None:
            if failing:
                raise ValueError
            parent.say(handled=message.value)

        for number in range(MANY):
            fabric.publish("t", number, seed=number % 8)
        fabric._engine.until(lambda: len(fabric.dead_letters) == MANY, 20)
        failing.clear()
        fabric.dead_letters.redrive(fabric.dead_letters)
        parent.hear()


def test_who_is_killed_while_letters_come_again_loses_none(tmp_path: Path) -> None:
    where = tmp_path / "state"
    handled = []
    with child(redrive_many, where=str(where)) as other:
        while len(handled) < MANY // 4:
            handled.append(other.hear()["handled"])
        other.signal(signal.SIGKILL)
        with contextlib.suppress(AssertionError):  # it says no more
            while True:
                handled.append(other.hear()["handled"])
        other.exit_code()
    store = DeadLetterStore.open(where, LIMITS)
    kept = [letter for letter in store.letters() if letter.kind == "letter"]
    left = [decode(letter.value_kind, memoryview(letter.value)) for letter in kept]
    store.close()
    assert set(handled) | set(left) == set(range(MANY)) and store.damages == 0
    assert len(handled) == len(set(handled)) and len(left) < MANY
    assert len(set(handled) & set(left)) <= 64, "only what was handled a moment ago is still there"
