"""Dead letters in the hands of who means no good, or of several at once."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from fabric.config import Letters
from fabric.errors import ConfigError
from tests.harness.faces import DEFAULT, played
from tests.integration.test_dead_letters import Picky


@played()
async def test_what_is_no_letter_of_this_member_is_refused(face: Any, a: Any, b: Any) -> None:
    for one in (a, b):
        one.on("t", attempts=1)(Picky("all"))
    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    await publisher.publish(1)
    await face.until(lambda: len(a.dead_letters) == len(b.dead_letters) == 1)
    assert a.dead_letters[0].number == b.dead_letters[0].number
    for wrong in (a.dead_letters, a.dead_letters[0], [a.dead_letters[0], b.dead_letters[0]], 1, None, "ab", [1]):
        for call in (b.dead_letters.redrive, b.dead_letters.discard):
            with pytest.raises(ConfigError, match="no dead letter"):
                call(wrong)
    assert len(a.dead_letters) == len(b.dead_letters) == 1
    assert b.dead_letters.redrive([]).queued == () and b.dead_letters.discard([]) == 0
    assert b.dead_letters.discard([b.dead_letters[0], b.dead_letters[0]]) == 1
    assert b.statistics()["letters_discarded"] == 1


@played()
async def test_what_is_acknowledged_after_its_subscription_closed_stays_a_letter(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t", acknowledge="manual")
    await a.publish("t", 1)
    (await inbox.receive()).reject("no")
    await face.until(lambda: len(b.dead_letters) == 1)
    b.dead_letters.redrive(b.dead_letters)
    message = await inbox.receive()
    await inbox.close()
    message.acknowledge()
    assert len(b.dead_letters) == 1
    again = await b.subscribe("t", acknowledge="manual")
    assert b.dead_letters.redrive(b.dead_letters).queued
    one = await again.receive()
    message.acknowledge()
    assert len(b.dead_letters) == 1, "the next one has it in hand"
    one.acknowledge()
    await face.until(lambda: not len(b.dead_letters))


def test_threads_that_redrive_and_give_up_at_once_agree_on_each_letter() -> None:
    from fabric import join

    many = 120
    with join(replace(DEFAULT, letters=Letters(same_reason_max=many + 1, redriven_at_once_max=8))) as fabric:
        ran: list[int] = []
        failing = [True]

        @fabric.on("t", attempts=1)
        def handle(message: Any) -> None:
            if failing:
                raise ValueError
            ran.append(message.value)
            report = fabric.dead_letters.redrive(letters_of[message.value])
            assert [why for _, why in report.refused] == ["it is on its way already"], "while its handler runs"
            assert fabric.dead_letters.discard(letters_of[message.value]) == 0

        for value in range(many):
            fabric.publish("t", value, seed=value)
        fabric._engine.until(lambda: len(fabric.dead_letters) == many, 20)
        letters_of = {letter.seed: letter for letter in fabric.dead_letters}
        failing.clear()
        letters = list(fabric.dead_letters)
        dry = fabric.dead_letters.redrive(letters, dry_run=True)
        assert (len(dry.queued), dry.refused, dry.behind) == (many, (), 0)
        queued: list[int] = []
        given_up: list[int] = []
        gate = threading.Barrier(4)

        def redrive() -> None:
            gate.wait()
            queued.extend(letter.seed for letter in fabric.dead_letters.redrive(letters).queued)

        def give_up() -> None:
            gate.wait()
            given_up.extend(letter.seed for letter in letters if fabric.dead_letters.discard(letter))

        threads = [threading.Thread(target=work) for work in (redrive, redrive, give_up, give_up)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(queued + given_up) == list(range(many))
        fabric._engine.until(lambda: not len(fabric.dead_letters), 20)
        assert sorted(ran) == sorted(queued)
