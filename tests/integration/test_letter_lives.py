"""Kill -9 while letters are redriven or given up: at each point, what the next lives know of them."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabric import Fabric, join
from fabric.engine.lettering import EndLetter, LetterKeeper
from fabric.storage.dead_letters import DeadLetterStore
from tests.harness.children import Parent, child
from tests.harness.faces import DEFAULT

pytestmark = pytest.mark.multiprocess
STEADY = replace(DEFAULT, liveness=replace(DEFAULT.liveness, marker_ms=50))
VALUES = ["in the handler", "not written", "written", "given up, not written", "given up"]


def die(*_: object) -> None:
    """Now, and without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str) -> None:
    """Let the storage thread kill this process when a letter is over: before that is written, or after."""
    if point.endswith("not written"):
        DeadLetterStore.end = die  # type: ignore[method-assign]
        return
    answer = LetterKeeper._answer

    def answer_or_die(keeper: LetterKeeper, wish: Any) -> None:
        die() if isinstance(wish, EndLetter) else answer(keeper, wish)

    LetterKeeper._answer = answer_or_die  # type: ignore[method-assign]


def live(parent: Parent, spec: str, state: str, point: str) -> None:
    """One life of rank 1. All values die until their letters are redriven; then this life dies at a point."""
    ran: list[Any] = []
    with join(STEADY, rank=1, world_size=2, rendezvous=spec, state_directory=state) as fabric:
        letters = fabric.dead_letters
        kept = [letter.value() for letter in letters]

        @fabric.on("t", attempts=2, start="retained")
        def handle(message: Any) -> None:
            ran.append(message.value)
            if message.value == "end":
                return
            if not message.redelivered:
                raise ValueError
            if message.value == point == "in the handler":
                die()

        fabric._engine.until(lambda: "end" in ran, 20)
        parent.say(
            kept=kept, ran=[value for value in ran if value != "end"], known=fabric.statistics().get("letters_known", 0)
        )
        parent.hear()
        fabric._engine.until(lambda: len(letters) == len(kept or VALUES), 20)
        chosen = next((letter for letter in letters if letter.value() == point), None)
        if chosen is None:
            return
        die_at(point) if point != "in the handler" else None
        letters.discard(chosen) if point.startswith("given up") else letters.redrive(chosen)
        parent.hear()


def test_a_letter_that_is_over_is_over_for_all_lives_wherever_one_is_killed(tmp_path: Path) -> None:
    spec, state = f"file://{tmp_path}/meet", tmp_path / "state"
    for directory in (tmp_path / "meet", state):
        directory.mkdir(mode=0o700)
    found = []

    def play(other: Any, point: str) -> None:
        found.append(other.hear())
        other.tell()
        assert other.exit_code() == (-signal.SIGKILL if point in VALUES else 0)

    arguments: dict[str, Any] = {"spec": spec, "state": str(state)}
    with (
        child(live, **arguments, point=VALUES[0]) as other,
        join(STEADY, rank=0, world_size=2, rendezvous=spec) as fabric,
    ):
        publisher = fabric.publisher("t")
        publisher.wait_for_subscribers(1)
        publisher.publish_many(VALUES, seeds=range(5))
        publisher.publish("end", seed=9)
        play(other, VALUES[0])
        for point in [*VALUES[1:], "a clean end", "another"]:
            with child(live, **arguments, point=point) as other:
                play(other, point)
    first, *rest = found
    assert sorted(set(first["ran"])) == sorted(VALUES)
    assert [life["ran"] for life in rest] == [[]] * 6, "no life handles again what an earlier one buried"
    assert [life["known"] for life in rest] == [5] * 6
    handled: list[str] = []
    for point, life in zip([*VALUES, VALUES[-1]], rest, strict=True):
        if point in ("not written", "written", "given up"):
            handled.append(point)
        assert sorted(life["kept"]) == sorted(set(VALUES) - set(handled)), point  # they died in any order


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


def alone(state: Path) -> Fabric:
    return join(STEADY, rank=0, world_size=1, state_directory=state)


def reject_some(state: Path, values: range, bad: set[int]) -> None:
    """A life that publishes on disk, and rejects some of what it gets; it acknowledges nothing else."""
    with alone(state) as fabric:
        inbox = fabric.subscribe("t", acknowledge="manual", name="worker", cursor={})
        publisher = fabric.publisher("t", policy="durable")
        publisher.publish_many(list(values), seeds=[value % 4 for value in values])
        for message in [inbox.receive() for _ in values]:
            if message.value in bad:
                message.reject("no")
        fabric._engine.until(lambda: len(fabric.dead_letters) == len(bad), 10)


@pytest.mark.parametrize("how", ["receive", "drain", "many", "manual", "own"])
def test_a_subscription_does_not_hand_out_what_has_a_letter_of_an_earlier_life(state: Path, how: str) -> None:
    reject_some(state, range(100), {2, 3, 97})
    with alone(state) as fabric:
        how_acknowledged = "manual" if how == "manual" else "auto"
        ownership = "own" if how == "own" else "view"
        inbox = fabric.subscribe("t", acknowledge=how_acknowledged, ownership=ownership, name="worker", cursor={})
        seen: list[int] = []
        while len(seen) < 97:
            if how == "drain":
                seen += [message.value for message in inbox.drain()]
                fabric._engine.until(lambda: bool(inbox._inbox.items), 0.05)
            elif how == "many":
                seen += [message.value for message in inbox.receive_many(10)]
            else:
                message = inbox.receive()
                message.acknowledge()
                seen.append(message.value)
        assert sorted(seen) == [value for value in range(100) if value not in (2, 3, 97)]
        place = inbox.cursor()["rank-0/t"]
        assert place[1:] == [100, []], "what has a letter is settled like all else"
        assert fabric.statistics()["letters_known"] == 3
        totals = [row.totals for row in fabric.ledger().rows if row.subscriber == "rank-0"]
        assert (3, 97) in [(each.dead_lettered, each.handled) for each in totals]
        assert fabric.ledger().balanced
        assert [letter.value() for letter in fabric.dead_letters] == [2, 3, 97]


def test_a_letter_stays_until_a_cursor_that_names_it_is_committed(state: Path) -> None:
    """RULES D4: what was done with a letter is lost with what the application did not save."""
    reject_some(state, range(4), {1, 2})

    def redriven(fabric: Fabric, cursor: Any, wanted: set[int]) -> Any:
        inbox = fabric.subscribe("t", name="worker", cursor=cursor)
        assert {letter.value() for letter in fabric.dead_letters} == wanted
        fabric.dead_letters.redrive(fabric.dead_letters)
        seen = {message.value for message in (inbox.receive() for _ in range(2 + len(wanted)))}
        assert seen == {0, 3} | wanted
        return inbox

    with alone(state) as fabric:  # it does not save what it did
        inbox = redriven(fabric, {}, {1, 2})
        unsaved = inbox.cursor()
        assert sorted(unsaved["redriven"])[0][:2] == ["rank-0", "t"] and len(unsaved["redriven"]) == 2
        assert len(fabric.dead_letters) == 0
        assert fabric.dead_letters.redrive([]).queued == ()
        inbox.close()
        assert len(fabric.dead_letters) == 2, "whoever comes next has them again"
    with alone(state) as fabric:  # it saves, and ends before it can commit
        saved = json.loads(json.dumps(redriven(fabric, {}, {1, 2}).cursor()))
    with alone(state) as fabric:
        inbox = fabric.subscribe("t", name="worker", cursor=saved)
        assert len(fabric.dead_letters) == 0 and "redriven" not in inbox.cursor()
        assert list(inbox.drain()) == []


def test_a_committed_letter_is_over_at_once(state: Path) -> None:
    reject_some(state, range(3), {1})
    with alone(state) as fabric:
        inbox = fabric.subscribe("t", name="worker", cursor={})
        fabric.dead_letters.redrive(fabric.dead_letters)
        for _ in range(3):
            inbox.receive()
        cursor = inbox.cursor()
        inbox.commit(cursor)
        inbox.commit(cursor)
        assert "redriven" not in inbox.cursor()
        inbox.close()
        assert len(fabric.dead_letters) == 0


LARGE = np.arange(300_000)


def bury_large(parent: Parent, state: str) -> None:
    """A life with two letters whose values lie in the log; it does not end by itself."""
    with alone(Path(state)) as fabric:

        @fabric.on("t", attempts=1)
        def handle(message: Any) -> None:
            raise ValueError

        for seed in range(2):
            fabric.publish("t", LARGE + seed, seed=seed)
        fabric._engine.until(lambda: len(fabric.dead_letters) == 2, 20)
        parent.say(letters=[letter.cut for letter in fabric.dead_letters])
        parent.hear()


def test_a_large_value_outlives_a_kill_and_is_gone_once_it_is_handled(state: Path) -> None:
    with child(bury_large, state=str(state)) as victim:
        assert victim.hear()["letters"] == ["", ""]
        victim.signal(signal.SIGKILL)
        victim.exit_code()
    seen: list[Any] = []
    with alone(state) as fabric:
        assert [(letter.value() - LARGE).max() for letter in fabric.dead_letters] == [0, 1]
        fabric.on("t")(lambda message: seen.append(np.asarray(message.own())))
        report = fabric.dead_letters.redrive(fabric.dead_letters[1])
        assert (len(report.queued), report.refused) == (1, ())
        fabric._engine.until(lambda: bool(seen), 20)
        (value,) = seen
        assert (value == LARGE + 1).all()
    with alone(state) as fabric:
        assert [(letter.value() == LARGE).all() for letter in fabric.dead_letters] == [True]
        assert fabric.dead_letters.discard(fabric.dead_letters) == 1
    with alone(state) as fabric:
        assert len(fabric.dead_letters) == 0
        log: Any = fabric._engine.store._keeper._spill._log  # type: ignore[attr-defined]
        assert log.entries == 0, "what lies there of letters that are over is owed to nobody"
