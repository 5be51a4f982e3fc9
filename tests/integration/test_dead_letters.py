"""Dead letters on both faces: kept until they are handled or given up, in their place or late."""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fabric import DeadLetters, RedriveReport
from fabric.config import Handlers, Letters, Spill, Work
from fabric.errors import (
    ClosedError,
    LettersDamagedError,
    LetterStoreFullError,
    SchemaError,
    WaitTimeoutError,
    WrongProcessError,
)
from fabric.letters import LetterBase
from tests.harness.faces import DEFAULT, played


async def value_of(letter: LetterBase) -> Any:
    value = letter.value()  # type: ignore[attr-defined]
    return await value if inspect.isawaitable(value) else value


class Picky:
    """A handler that raises for some values until it is mended."""

    def __init__(self, *bad: object) -> None:
        self.bad, self.seen = set(bad), []  # type: ignore[var-annotated]

    def __call__(self, message: Any) -> None:
        if message.value in self.bad or "all" in self.bad:
            raise ValueError(f"{message.value} is bad")
        self.seen.append((message.seed, message.value, message.redelivered))


async def published(a: Any, topic: str, values: Any) -> None:
    """Publish (seed, value) pairs, and wait until all of them are settled."""
    publisher = a.publisher(topic)
    await publisher.wait_for_subscribers(1)
    for seed, value in values:
        await publisher.publish(value, seed=seed)
    await publisher.flush(timeout_s=20)


@played()
async def test_skipped_letters_come_again_late_and_marked(face: Any, a: Any, b: Any) -> None:
    picky = Picky(1, 4)
    b.on("jobs.**", attempts=1)(picky)
    await published(a, "jobs.a", [(value % 2, value) for value in range(6)])
    letters = b.dead_letters
    assert isinstance(letters, DeadLetters)
    assert [(letter.topic, letter.source, letter.seed, letter.sequence) for letter in letters] == [
        ("jobs.a", "rank-0", 1, 0),
        ("jobs.a", "rank-0", 0, 2),
    ]
    assert [(letter.reason, letter.detail, letter.attempts, letter.pattern) for letter in letters] == [
        ("handler_exhausted", f"ValueError: {value} is bad", 1, "jobs.**") for value in (1, 4)
    ]
    assert [await value_of(letter) for letter in letters] == [1, 4]
    metadata = letters[0].metadata()
    assert (await metadata if inspect.isawaitable(metadata) else metadata) == {}
    assert letters[-1] == list(letters)[1] and letters[0].buried_ns > 10**18

    report = letters.redrive(letters, dry_run=True)
    assert (report.dry_run, report.queued, report.refused, report.behind) == (True, tuple(letters), (), 0)
    picky.bad = {4}
    report = letters.redrive(letters)
    assert isinstance(report, RedriveReport) and len(report.queued) == 2
    await face.until(lambda: b.statistics().get("letters_died_again") == 1 and len(b.dead_letters) == 1)
    assert picky.seen[-1] == (1, 1, True)
    assert [(letter.sequence, letter.attempts) for letter in letters] == [(2, 2)]

    picky.bad = set()
    await face.until(lambda: letters.redrive(letters[0]).queued)
    await face.until(lambda: not len(letters))
    assert sorted(picky.seen) == [(value % 2, value, value in (1, 4)) for value in (0, 2, 4, 1, 3, 5)]
    assert b.statistics()["letters_redriven"] == 2


@played()
async def test_letters_are_selected_and_given_up(face: Any, a: Any, b: Any) -> None:
    picky = Picky("all")
    b.on("**", attempts=1)(picky)
    await published(a, "jobs.a", [(0, 1)])
    await published(a, "jobs.b", [(0, 2)])
    letters = b.dead_letters
    assert [letter.topic for letter in letters.select(topic="*.b")] == ["jobs.b"]
    assert len(letters.select(source="rank-0", reason="handler_exhausted")) == 2
    assert len(letters.select(reason="rejected")) == len(letters.select(source="rank-1")) == 0
    gone, kept = letters
    assert await value_of(gone) == 1
    assert letters.discard(letters.select(topic="jobs.a")) == 1
    assert letters.discard(gone) == 0
    assert list(letters) == [kept]
    with pytest.raises(LettersDamagedError, match="gone"):
        await value_of(gone)
    assert letters.redrive([gone, kept]).refused == ((gone, "it is gone"),)
    assert b.statistics()["letters_discarded"] == 1


@played()
async def test_a_rejected_message_comes_again_into_the_inbox(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("jobs.*", acknowledge="manual")
    for value in range(4):
        await a.publish("jobs.a", value, metadata={"step": value})
    messages = [await inbox.receive() for _ in range(4)]
    messages[1].reject("no")
    messages[2].reject("not this one either")
    messages[3].acknowledge()
    await a.flush()
    letters = b.dead_letters
    assert [(letter.sequence, letter.reason, letter.detail) for letter in letters] == [
        (1, "rejected", "no"),
        (2, "rejected", "not this one either"),
    ]
    letters.redrive(letters)
    again = [await inbox.receive() for _ in range(2)]
    assert [(one.value, one.sequence, one.redelivered, one.metadata) for one in again] == [
        (1, 1, True, {"step": 1}),
        (2, 2, True, {"step": 2}),
    ]
    again[0].acknowledge()
    again[1].reject("still not")
    await face.until(lambda: [letter.detail for letter in letters] == ["still not"])
    letters.redrive(letters)
    assert (await inbox.receive()).value == 2
    assert [why for _, why in letters.redrive(letters).refused] == ["it is on its way already"]
    await inbox.close()
    assert [why for _, why in letters.redrive(letters).refused] == ["nobody here handles its pattern"]
    again[1].acknowledge()


@played()
async def test_an_inbox_that_acknowledges_by_itself_handles_a_letter_with_the_next(face: Any, a: Any, b: Any) -> None:
    manual = await b.subscribe("jobs.*", acknowledge="manual")
    await a.publish("jobs.a", 1)
    (await manual.receive()).reject("no")
    await a.flush()
    await manual.close()
    inbox = await b.subscribe("jobs.*")
    b.dead_letters.redrive(b.dead_letters)
    await a.publish("jobs.a", 2)
    messages = {message.value: message for message in [await inbox.receive(), await inbox.receive()]}
    assert (messages[1].redelivered, messages[2].redelivered) == (True, False)
    list(inbox.drain())
    await face.until(lambda: not len(b.dead_letters))


@played(config=replace(DEFAULT, letters=Letters(value_bytes_max=4_000_000)))
async def test_values_of_all_sizes_come_again_and_a_cut_one_does_not(face: Any, a: Any, b: Any) -> None:
    failing, seen = [True], []

    @b.on("t", attempts=1)
    async def handle(message: Any) -> None:
        if failing:
            raise ValueError
        seen.append((np.asarray(message.value).sum(), message.metadata))

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for size in (10, 100_000, 2_000_000, 5_000_000):
        await publisher.publish(np.ones(size, np.uint8), metadata={"size": size})
    await publisher.flush(timeout_s=20)
    small, large, spilled, cut = b.dead_letters
    for letter, size in ((large, 100_000), (spilled, 2_000_000)):
        assert (await value_of(letter)).sum() == size and letter.size > size and not letter.cut
    with pytest.raises(SchemaError, match=r"only 1048576 of .* larger than letters\.value_bytes_max"):
        await value_of(cut)
    failing.clear()
    report = b.dead_letters.redrive(b.dead_letters)
    assert (report.queued, report.refused) == ((small, large, spilled), ((cut, cut.cut),))
    await face.until(lambda: list(b.dead_letters) == [cut])
    assert seen == [(size, {"size": size}) for size in (10, 100_000, 2_000_000)]


FULL = replace(DEFAULT, letters=Letters(rows_max=2))


@played(config=FULL)
async def test_a_full_store_takes_none_and_only_the_lane_waits(face: Any, a: Any, b: Any) -> None:
    picky = Picky(0, 10, 20)
    b.on("t", attempts=1)(picky)
    with pytest.raises(WaitTimeoutError):
        publisher = a.publisher("t")
        await publisher.wait_for_subscribers(1)
        for value in (0, 10, 20, 21, 1, 11):
            await publisher.publish(value, seed=value // 10)
        await publisher.flush(timeout_s=0.5)
    await face.until(lambda: b.dead_letters.error is not None)
    assert isinstance(b.dead_letters.error, LetterStoreFullError)
    assert sorted(picky.seen) == [(0, 1, False), (1, 11, False)]
    assert [letter.seed for letter in b.dead_letters] == [0, 1]
    assert b.statistics()["letters_refused"] >= 1
    b.dead_letters.discard(b.dead_letters[0])
    await publisher.flush(timeout_s=20)
    assert [letter.seed for letter in b.dead_letters] == [1, 2]
    assert b.dead_letters.error is None
    assert picky.seen[-1] == (2, 21, False)


CROWDED = replace(DEFAULT, letters=Letters(rows_max=1, waiting_max=4))


@played(config=CROWDED)
async def test_a_full_store_bounds_what_waits_for_it_and_loses_nothing(face: Any, a: Any, b: Any) -> None:
    picky = Picky(0)
    b.on("t", attempts=1, exhausted="park")(picky)
    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for value in range(20):
        await publisher.publish(value, seed=0)
    for value in range(100, 105):
        await publisher.publish(value, seed=value)
    await face.until(lambda: len(picky.seen) == 5 and b.dead_letters.waiting == 2)
    await face.until(lambda: b.dead_letters.error is not None)
    assert (len(b.dead_letters), b.statistics()["letters_waiting"]) == (1, 2)
    assert sorted(value for _, value, _ in picky.seen) == list(range(100, 105)), "other lanes go on"
    picky.bad = set()
    b.dead_letters.redrive(b.dead_letters[0])
    await publisher.flush(timeout_s=20)
    await face.until(lambda: not len(b.dead_letters))
    assert [value for seed, value, _ in picky.seen if seed == 0] == list(range(20))
    assert (b.dead_letters.waiting, b.dead_letters.error) == (0, None)


@played(config=replace(DEFAULT, letters=Letters(rows_max=1, waiting_max=1)))
async def test_where_no_more_letters_may_wait_nothing_runs_that_could_become_one(face: Any, a: Any, b: Any) -> None:
    picky = Picky("all")
    b.on("t", attempts=1)(picky)
    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for value in range(6):
        await publisher.publish(value, seed=value)
    await face.until(lambda: b.dead_letters.error is not None)
    assert (len(b.dead_letters), b.dead_letters.waiting) == (1, 1)
    picky.bad = set()
    assert b.dead_letters.redrive(b.dead_letters).queued
    await face.until(lambda: len(picky.seen) == 5)
    await publisher.flush(timeout_s=20)
    assert [*sorted(value for _, value, _ in picky.seen), b.dead_letters[0].seed] == [0, 2, 3, 4, 5, 1]


@played(config=replace(DEFAULT, letters=Letters(rows_max=1)))
async def test_a_letter_comes_again_though_its_lane_waits_for_room(face: Any, a: Any, b: Any) -> None:
    picky = Picky(0, 1)
    b.on("t", attempts=1)(picky)
    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for value in range(3):
        await publisher.publish(value)
    await face.until(lambda: b.dead_letters.error is not None)
    picky.bad = set()
    b.dead_letters.redrive(b.dead_letters)
    await publisher.flush(timeout_s=20)
    assert [value for _, value, _ in picky.seen] == [0, 2]
    assert [letter.sequence for letter in b.dead_letters] == [1]


@played()
async def test_a_parked_lane_waits_and_comes_again_in_order(face: Any, a: Any, b: Any) -> None:
    picky = Picky(1)
    b.on("jobs.*", attempts=2, exhausted="park")(picky)
    await published(a, "jobs.a", [(seed, value) for value in range(5) for seed in (0, 1) if (seed, value) != (1, 1)])
    letters = b.dead_letters
    assert [(letter.seed, letter.sequence, letter.reason, letter.attempts) for letter in letters] == [
        (0, 1, "handler_exhausted", 2),
        (0, 2, "parked", 0),
        (0, 3, "parked", 0),
        (0, 4, "parked", 0),
    ]
    assert picky.seen == [(0, 0, False), *((1, value, False) for value in (0, 2, 3, 4))] or len(picky.seen) == 5
    report = letters.redrive(letters[1], dry_run=True)
    assert report.refused == ((letters[1], "an older letter of its lane goes first"),)
    report = letters.redrive(letters[0], dry_run=True)
    assert ([letter.sequence for letter in report.queued], report.behind) == ([1], 3)

    letters.redrive(letters[0])
    await face.until(lambda: b.statistics().get("letters_died_again") == 1)
    assert [(letter.sequence, letter.attempts) for letter in letters] == [(1, 4), (2, 0), (3, 0), (4, 0)]
    picky.bad = {3}
    await face.until(lambda: letters.redrive(letters[0]).queued)
    await face.until(lambda: b.statistics().get("letters_died_again") == 2)
    assert [(letter.sequence, letter.reason) for letter in letters] == [(3, "handler_exhausted"), (4, "parked")]
    await published(a, "jobs.a", [(0, 5)])
    picky.bad = set()
    await face.until(lambda: letters.redrive(letters).queued)
    await face.until(lambda: not len(letters))
    await published(a, "jobs.a", [(0, 6)])
    assert [value for seed, value, _ in picky.seen if seed == 0] == [0, 1, 2, 3, 4, 5, 6]
    assert not any(redelivered for *_, redelivered in picky.seen), "in its place, it is not late"


@played()
async def test_giving_up_the_oldest_letter_lets_its_lane_go_on(face: Any, a: Any, b: Any) -> None:
    picky = Picky(0)
    b.on("t", attempts=1, exhausted="park")(picky)
    await published(a, "t", [(0, value) for value in range(4)])
    assert b.dead_letters.discard(b.dead_letters[0]) == 1
    await face.until(lambda: not len(b.dead_letters))
    await published(a, "t", [(0, 4)])
    assert [value for _, value, _ in picky.seen] == [1, 2, 3, 4]


FUSED = replace(DEFAULT, letters=Letters(same_reason_max=3, pause_s=0.3))


@played(config=FUSED)
async def test_a_handler_for_which_all_dies_of_one_reason_pauses(face: Any, a: Any, b: Any) -> None:
    picky = Picky("all")
    b.on("t", attempts=1)(picky)
    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for value in range(20):
        await publisher.publish(value, seed=value)
    await face.until(lambda: b.statistics().get("handlers_paused"))
    assert len(b.dead_letters) <= 3
    picky.bad = set()
    await publisher.flush(timeout_s=20)
    assert len(b.dead_letters) + len(picky.seen) == 20 and len(b.dead_letters) <= 4


@played(config=replace(DEFAULT, letters=Letters(same_reason_max=3, pause_s=0.1)))
async def test_after_a_pause_one_message_decides_and_the_log_says_so(face: Any, a: Any, b: Any) -> None:
    records: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("fabric.handlers")
    log.addHandler(listener)
    running: list[int] = []
    failing = [True]

    @b.on("t", attempts=1)
    async def handle(message: Any) -> None:
        running.append(message.value)
        if failing:
            raise ValueError

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for value in range(60):
        if value == 3:
            await face.until(lambda: b.statistics().get("handlers_paused") == 1)
        await publisher.publish(value, seed=value)
    await face.until(lambda: b.statistics()["handlers_paused"] >= 3)
    paused = b.statistics()["handlers_paused"]
    assert len(running) <= 3 + paused, "of each pause one message is the probe"
    failing.clear()
    await publisher.flush(timeout_s=20)
    assert sorted(running) == list(range(60)), "each of them ran once"
    log.removeHandler(listener)
    texts = [record.getMessage() for record in records]
    assert any("die" in text and "ValueError: it pauses" in text for text in texts)
    assert any("it goes on" in text for text in texts)


@played()
async def test_two_handlers_of_one_pattern_have_letters_of_their_own(face: Any, a: Any, b: Any) -> None:
    first, second = Picky("all"), Picky("all")
    b.on("t", attempts=1)(first)
    b.on("t", attempts=1)(second)
    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(2)
    await publisher.publish(1)
    await publisher.flush()
    assert {letter.pattern for letter in b.dead_letters} == {"t", "t#2"}
    second.bad = set()
    b.dead_letters.redrive(b.dead_letters)
    await face.until(lambda: [letter.pattern for letter in b.dead_letters] == ["t"])
    assert (first.seen, second.seen) == ([], [(0, 1, True)])


@played()
async def test_a_gap_leaves_a_notice_and_no_letter(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    await a.publish("t", 1)
    await inbox.receive()
    from fabric.core.events import ReportGap

    with b._engine.lock:
        b._engine._report_gap(ReportGap(inbox._inbox.number, "rank-0", "t", 7, 5, None, "gap"))
    (notice,) = b.dead_letters.notices
    assert (notice.source, notice.topic, notice.first, notice.end, notice.reason) == ("rank-0", "t", 5, -1, "gap")
    assert (notice.subscription, len(b.dead_letters), inbox.gaps_total) == ("t", 0, 1)


def test_the_end_says_how_many_letters_are_discarded_and_leaves_no_file(tmp_path: Any, caplog: Any) -> None:
    from fabric import join

    config = replace(DEFAULT, spill=Spill(directory=tmp_path / "base"))
    with caplog.at_level(logging.WARNING, logger="fabric.storage"), join(config) as fabric:
        fabric.on("t", attempts=1)(Picky("all"))
        fabric.publish("t", 1)
        fabric.flush()
        fabric._engine.until(lambda: len(fabric.dead_letters) == 1, 10)
        (letter,) = fabric.dead_letters
        assert [name[:8] for name in os.listdir(tmp_path / "base")] == ["letters-"]
    assert "1 dead letters are discarded" in caplog.text
    assert os.listdir(tmp_path / "base") == []
    assert list(fabric.dead_letters) == [letter], "what was there last can still be looked at"
    for call in (
        letter.value,
        lambda: fabric.dead_letters.redrive(letter),
        lambda: fabric.dead_letters.discard(letter),
    ):
        with pytest.raises(ClosedError):
            call()


def test_a_forked_child_has_no_letters_to_redrive() -> None:
    from fabric import join

    with join(DEFAULT) as fabric:
        fabric.on("t", attempts=1)(Picky("all"))
        fabric.publish("t", 1)
        fabric._engine.until(lambda: len(fabric.dead_letters) == 1, 10)
        pid = os.fork()
        if not pid:
            try:
                fabric.dead_letters.redrive(fabric.dead_letters)
            except WrongProcessError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert fabric.dead_letters[0].value() == 1
        assert fabric.dead_letters.redrive(fabric.dead_letters).queued


STEPS = replace(DEFAULT, work=Work(handlers=Handlers.STEP))


@played(config=STEPS)
async def test_in_step_mode_letters_settle_and_come_again_while_handlers_are_served(face: Any, a: Any, b: Any) -> None:
    picky = Picky("all")
    b.on("t", attempts=1, exhausted="park")(picky)
    await b.serve(0.01)  # on a loop, what `on` began is confirmed by the next call
    for value in range(3):
        await a.publish("t", value)
    while len(b.dead_letters) < 3:
        await b.serve(0.02)
    picky.bad = set()
    b.dead_letters.redrive(b.dead_letters[0])
    assert picky.seen == [], "nobody serves"
    while len(b.dead_letters):
        await b.serve(0.02)
    assert [value for _, value, _ in picky.seen] == [0, 1, 2]
    served = face.later(b.serve(0.3))
    await a.flush()
    await served
