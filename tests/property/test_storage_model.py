"""The spill log against a dictionary: any order of appends, reads, releases, syncs, faults, deaths and reopenings."""

from __future__ import annotations

import contextlib
import errno
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fabric.errors import SpillError
from fabric.storage.spill import Entry, Span
from fabric.testing.disks import FakeDisk
from tests.harness.spills import Clock, burst, identities, named, opened, plain, small

FEEDS = st.integers(1, 3)
OPERATIONS = st.sampled_from(["write", "sync", "open", "allocate", "rename", "sync_directory", "truncate", "unlink"])
LIMITS = small(segment_bytes=512, bytes_max=8192, age_s=600)


class Log(RuleBasedStateMachine):
    """`model` holds what must be there; `durable` what must be there after a loss of power."""

    def __init__(self) -> None:
        super().__init__()
        self.disk, self.clock, self.identity = FakeDisk(), Clock(), identities()
        self.start = self.disk.copy()
        self.model: dict[tuple[int, int], Entry] = {}
        self.durable: dict[tuple[int, int], Entry] = {}
        self.below: dict[int, int] = {}
        self.next: dict[int, int] = {}
        self.life = 0
        self.hurt = False
        self.open()

    def open(self) -> None:
        self.life += 1
        options: dict[str, Any] = {"clock": self.clock, "identity": self.identity, "keep_unsynced": True}
        self.log = opened(self.disk, LIMITS, incarnation=self.life, **options)
        assert self.hurt or not [damage for damage in self.log.damage if not damage.torn]

    @rule(feed=FEEDS, sizes=st.lists(st.integers(0, 250), min_size=1, max_size=4), payload=st.binary(max_size=9))
    def append(self, feed: int, sizes: list[int], payload: bytes) -> None:
        first = self.next.get(feed, 0)
        group = [burst(first + 2 * at, 2, feed=feed, frame=bytes([at]) * size) for at, size in enumerate(sizes)]
        group[0] = group[0]._replace(payloads={first: payload} if payload else {})
        try:
            self.log.append([named(feed), *group])
        except SpillError:
            return
        self.next[feed] = group[-1].end
        self.model |= {(feed, entry.first): entry for entry in group}

    @rule()
    def sync(self) -> None:
        try:
            self.log.sync()
        except SpillError:
            return
        self.durable = dict(self.model)

    @rule(feed=FEEDS, share=st.floats(0, 1))
    def release(self, feed: int, share: float) -> None:
        below = int(self.next.get(feed, 0) * share)
        self.below[feed] = max(below, self.below.get(feed, 0))
        with contextlib.suppress(SpillError):
            self.log.release(feed, below)
        self.forget_released()

    def forget_released(self) -> None:
        for known in (self.model, self.durable):
            for key in [key for key, entry in known.items() if entry.end <= self.below.get(key[0], 0)]:
                del known[key]

    @rule(seconds=st.sampled_from([1, 61, 400]))
    def expire(self, seconds: int) -> None:
        self.clock.advance(seconds)
        try:
            lost = self.log.expire(self.clock.now_ns)
        except SpillError:
            return
        for span in lost:
            gone = [key for key, entry in self.model.items() if key[0] == span.feed and span.first <= key[1] < span.end]
            assert sum(self.model[key].records for key in gone) == span.end - span.first
            for key in gone:
                del self.model[key]
                self.durable.pop(key, None)

    @rule(operation=OPERATIONS, nth=st.integers(1, 3), code=st.sampled_from([errno.EIO, errno.ENOSPC]))
    def fail(self, operation: str, nth: int, code: int) -> None:
        self.disk.fail(operation, nth, code)

    @rule(most=st.sampled_from([None, 1, 60]))
    def shorten_writes(self, most: int | None) -> None:
        self.disk.write_most = most

    @rule(clean=st.booleans())
    def close(self, clean: bool) -> None:
        with contextlib.suppress(SpillError):
            self.log.close(clean=clean)
        self.reopen(self.model)

    @rule()
    def die(self) -> None:
        self.log.abandon()
        self.reopen(self.model)

    @precondition(lambda self: self.disk.steps)
    @rule(seed=st.randoms(use_true_random=False), filled=st.booleans())
    def lose_power(self, seed: Any, filled: bool) -> None:
        kept = [seed.random() < 0.5 for _ in self.disk.steps]
        self.log.abandon()
        self.disk = self.disk.crashed(len(kept), kept.__getitem__, filled=filled, start=self.start)
        self.start, before, self.hurt = self.disk.copy(), self.model, True
        self.life += 1
        self.log = opened(self.disk, LIMITS, incarnation=self.life, clock=self.clock, identity=self.identity)
        found = {(entry.feed, entry.first): plain(entry) for entry in self.log.recovered()}
        assert self.durable.items() <= found.items()
        for key, entry in found.items():
            assert key not in before or before[key] == entry
        self.log.close()
        self.reopen(found)

    def reopen(self, known: dict[tuple[int, int], Entry]) -> None:
        """The next life. Released bursts and parts of failed groups may be there again: true ones, so they stay."""
        self.disk._failures.clear()
        self.disk.write_most = None
        self.open()
        found = {(entry.feed, entry.first): plain(entry) for entry in self.log.recovered()}
        assert known.items() <= found.items()
        self.model, self.durable, self.below = found, dict(found), {}
        for feed, first in found:
            self.next[feed] = max(self.next.get(feed, 0), found[feed, first].end)

    @invariant()
    def what_is_there_is_what_was_appended(self) -> None:
        found = {(entry.feed, entry.first): plain(entry) for entry in self.log.recovered()}
        assert found == self.model
        assert self.log.entries == len(found)
        assert self.log.bytes == sum(
            len(self.disk.contents[inode]) for path, inode in self.disk.files.items() if not path.endswith("lock")
        )
        assert self.log.bytes <= LIMITS.bytes_max + 2048
        for (feed, first), entry in self.model.items():
            assert self.log.find(feed, entry.end - 1) == Span(feed, first, entry.end)

    def teardown(self) -> None:
        self.log.abandon()
        assert self.disk.opened == 0


Log.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLog = Log.TestCase
