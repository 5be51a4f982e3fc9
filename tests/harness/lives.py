"""A publisher and a subscriber of a durable topic that are killed and begin again, and the histories that they write.

Each appends what it did to a file of its own, with one write, when it is done: SIGKILL loses no write that was made.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fabric import FabricConfig, join
from fabric.config import Liveness, Spill
from tests.harness.children import Child, Parent, child
from tests.harness.waiting import until

__all__ = ["Round", "lines"]

TOPIC, SEEDS, BATCH = "work.items", 8, 50
CONFIG = FabricConfig(liveness=Liveness(heartbeat_ms=200, suspect_s=0.8), spill=Spill(segment_bytes=1 << 20))


def lines(path: Path) -> Iterator[Any]:
    """What was appended; half a line at the end was never said."""
    data = path.read_bytes() if path.exists() else b""
    return map(json.loads, data[: data.rfind(b"\n") + 1].splitlines())


def _append(path: Path, entry: object) -> None:
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)  # what the kill cut off
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(entry).encode() + b"\n")


def publish(parent: Parent, directory: str, total: int, sync: str) -> None:
    """Publish what no earlier life is known to have published, in batches: {"first": n, "sequences": [...]}."""
    where = Path(directory)
    journal = where / "published"
    done = sum(len(entry["sequences"]) for entry in lines(journal))
    fabric = join(CONFIG, rank=0, world_size=2, rendezvous=f"file://{where}/meeting", state_directory=where / "state")
    with fabric:
        publisher = fabric.publisher(TOPIC, policy="durable", sync=sync)
        life = fabric._engine.card.incarnation
        parent.say(life=life)
        if not done:  # what is published before anybody subscribed is owed to nobody
            publisher.wait_for_subscribers(1, timeout_s=60)
        while done < total:
            numbers = range(done, min(done + BATCH, total))
            sequences = publisher.publish_many([(life, n) for n in numbers], seeds=[n % SEEDS for n in numbers])
            _append(journal, {"life": life, "first": done, "sequences": sequences})
            done += len(numbers)
        parent.say(done=done)
        parent.hear()
        report = fabric.close(timeout_s=10)
    parent.say(balanced=report.balanced)


def subscribe(parent: Parent, directory: str, pace_s: float) -> None:
    """Handle what comes, and save the cursor with it: {"handled": [...], "cursor": {...}, "gaps": [...]}."""
    where = Path(directory)
    output = where / "handled"
    cursor = ([{}] + [entry["cursor"] for entry in lines(output)])[-1]
    fabric = join(CONFIG, rank=1, world_size=2, rendezvous=f"file://{where}/meeting", state_directory=where / "state")
    with fabric:
        inbox = fabric.subscribe(TOPIC, name="worker", cursor=cursor)
        parent.say(life=fabric._engine.card.incarnation)
        while not parent.spoke():
            handled = [
                (*message.value, message.seed, message.sequence, message.incarnation) for message in inbox.drain()
            ]
            if handled:
                cursor = inbox.cursor()
                _append(output, {"handled": handled, "cursor": cursor, "gaps": len(inbox.gaps)})
                inbox.commit(cursor)
            time.sleep(pace_s)
        parent.say(gaps=[str(gap) for gap in inbox.gaps])


@dataclass
class Round:
    """One publisher and one subscriber, `kills` deaths, and what has to be true in the end."""

    directory: Path
    seed: int
    total: int = 20_000
    kills: int = 3
    sync: str = "process"

    def play(self) -> dict[str, int]:
        """Kill and begin again until everything is published and handled; what happened."""
        rng = Random(self.seed)
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "state").mkdir(mode=0o700, exist_ok=True)
        lives = {"publisher": self._start("publisher"), "subscriber": self._start("subscriber")}
        counts = {"killed": 0}
        try:
            for _ in range(self.kills):
                self._let_some_pass(rng)
                for victim in rng.choice([["publisher"], ["subscriber"], ["publisher", "subscriber"]]):
                    lives[victim].__exit__(None, None, None)
                    counts["killed"] += 1
                    lives[victim] = self._start(victim)
            self._see_off(lives["publisher"], lives["subscriber"])
        finally:
            for one in lives.values():
                one.__exit__(None, None, None)
        return counts | self.judge()

    def _start(self, which: str) -> Child:
        if which == "publisher":
            return child(publish, directory=str(self.directory), total=self.total, sync=self.sync)
        return child(subscribe, directory=str(self.directory), pace_s=0.001)

    def _let_some_pass(self, rng: Random) -> None:
        """A moment of the stream; beginnings are moments, too."""
        if rng.random() < 0.3:
            time.sleep(rng.random())
            return
        some = rng.randrange(self.total // self.kills)
        before = self._size()
        until(lambda: self._size() - before >= 60 * some // BATCH or self._is_published(), timeout_s=30)

    def _size(self) -> int:
        journal = self.directory / "published"
        return journal.stat().st_size if journal.exists() else 0

    def _is_published(self) -> bool:
        return sum(len(entry["sequences"]) for entry in lines(self.directory / "published")) >= self.total

    def _see_off(self, publisher: Child, subscriber: Child) -> None:
        assert publisher.hear()["life"]
        assert publisher.hear(60)["done"] == self.total
        assert subscriber.hear()["life"]
        accepted = self._accepted()
        until(lambda: accepted <= self._handled().keys(), timeout_s=60, what="all that was accepted is handled")
        publisher.tell()
        assert publisher.hear(30)["balanced"], "its subscribers acknowledged everything"
        subscriber.tell()
        gaps = subscriber.hear()["gaps"]
        assert gaps == [], gaps

    def _accepted(self) -> set[tuple[int, int]]:
        return {
            (entry["life"], entry["first"] + index)
            for entry in lines(self.directory / "published")
            for index in range(len(entry["sequences"]))
        }

    def _handled(self) -> dict[tuple[int, int], int]:
        handled: dict[tuple[int, int], int] = {}
        for entry in lines(self.directory / "handled"):
            for life, number, *_ in entry["handled"]:
                handled[life, number] = handled.get((life, number), 0) + 1
        return handled

    def judge(self) -> dict[str, int]:
        """Everything that was accepted was handled exactly once and in order in its lane, and no gap was reported."""
        handled, accepted = self._handled(), self._accepted()
        assert set(handled.values()) == {1}, "handled twice"
        assert accepted <= handled.keys(), "accepted and not handled"
        unsure = handled.keys() - accepted  # its publisher was killed before it knew
        lanes: dict[int, list[tuple[int, int]]] = {}
        for entry in lines(self.directory / "handled"):
            assert entry["gaps"] == 0
            for life, _, seed, sequence, incarnation in entry["handled"]:
                assert life == incarnation
                lanes.setdefault(seed, []).append((life, sequence))
        for seed, order in lanes.items():
            assert order == sorted(order), f"lane {seed} is out of order"
            for life in {life for life, _ in order}:
                sequences = [sequence for other, sequence in order if other == life]
                assert sequences == list(range(len(sequences))), f"lane {seed} of {life} has a hole"
        assert len(unsure) <= BATCH * len({life for life, _ in handled})
        return {"accepted": len(accepted), "unsure": len(unsure), "lives": len({life for life, _ in handled})}
