"""The publisher of the model: numbers, retention, ancestry, registrations, and how a life ends."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.model.network import Actor, Address, World
from tests.model.words import NONE, Key, Record, Row, size


class Feed:
    """What is kept of one life's feed: offsets first..end-1, less the unreadable ones.

    Below `stored`: on disk, survives a kill. Below `synced`: survives a loss of power. `exact`: `end` is known to be
    where the feed ended. `listed`: the disk knows that it exists.
    """

    def __init__(self, incarnation: int, *, listed: bool) -> None:
        self.incarnation, self.listed, self.exact = incarnation, listed, True
        self.records: dict[int, Record] = {}
        self.first = self.end = self.stored = self.synced = 0


class Kept(NamedTuple):
    """A registration as the disk has it."""

    session: int
    named: bool
    positions: dict[int, int]


class Directory:
    """The state directory of one member: what a restart finds."""

    def __init__(self, number: int) -> None:
        self.number, self.incarnation, self.since = number, 0, 0
        self.feeds: dict[int, Feed] = {}
        self.registered: dict[str, Kept] = {}


class Registration:
    """Who is owed what. `positions`: of each feed that it is owed; `unproven`: those that it has not acknowledged."""

    def __init__(self, session: int, *, named: bool, since: int = 0, present: bool = True) -> None:
        self.session, self.named, self.since, self.present = session, named, since, present
        self.positions: dict[int, int] = {}
        self.unproven: set[int] = set()


class Publisher(Actor):
    """One life of the publishing process.

    Incarnation: max(stored + 1, clock), on disk before anything is sent. Retention: one log, oldest first, for all
    subscribers. Full: release what all acknowledged; else spill; else drop the oldest for everybody; else refuse, and
    then nothing was taken. Registrations are on disk before they are confirmed; acknowledgements are not: after a
    restart the position that was saved last counts again. Past feeds are served until all who are owed them are done.
    """

    def __init__(self, world: World, directory: Directory) -> None:
        super().__init__(world, "P")
        self.directory, self.feeds = directory, directory.feeds
        self.fenced = False
        self.lanes: dict[int, tuple[int, int]] = {}
        self.listeners: set[Address] = set()
        self.sessions: dict[str, int] = {}
        self.heard: dict[str, float] = {}
        self.registrations: dict[str, Registration] = {}

    def start(self) -> None:
        directory = self.directory
        for feed in list(directory.feeds.values()):
            feed.synced = feed.stored  # recovery syncs what it keeps
            if not feed.listed:
                self.forget_feed(feed)
        empty = [feed for feed in directory.feeds.values() if not feed.records]
        for feed in empty[: -self.options.feeds_kept]:
            self.forget_feed(feed)
        self.life = directory.incarnation = self.next_incarnation()
        self.feed = directory.feeds[self.life] = Feed(self.life, listed=self.options.level != "memory")
        self.up = True
        for name, kept in self.recall().items():
            restored = Registration(kept.session, named=kept.named, since=directory.since, present=False)
            restored.positions = dict(kept.positions)
            self.registrations[name], self.heard[name] = restored, self.network.now
            self.enrol(restored, self.starts(restored, None, "live", from_start=True))
            restored.unproven.clear()

    def forget_feed(self, feed: Feed) -> None:
        del self.feeds[feed.incarnation]
        self.check.inexact.add(feed.incarnation)

    def next_incarnation(self) -> int:
        return max(self.directory.incarnation + 1, int(self.network.now * 1e6))

    def recall(self) -> dict[str, Kept]:
        return self.directory.registered

    # How it ends.

    def stop(self, how: str) -> None:
        """`clean` writes what is owed, as far as the disk takes it; `kill` loses memory; `power` what is not synced."""
        feed, is_kept = self.feed, how == "clean" and self.write_rest()
        for name, registration in self.registrations.items() if how == "clean" else ():
            if registration.present:
                self.send((name, registration.session), "bye", self.goodbyes(registration, is_kept))
        self.up = False
        kept = feed.synced if how == "power" else feed.stored
        for offset in [offset for offset in feed.records if offset >= kept]:
            self.check.removed((feed.incarnation, offset), how)
            del feed.records[offset]
        feed.exact = self.is_exact(how)
        if how != "clean":  # nothing but the log tells where it ended
            feed.end, feed.first = kept, min(feed.first, kept)
        self.check.stopped(feed, how, is_kept)

    def write_rest(self) -> bool:
        """Whether the next life has all that is still owed: then somebody may wait for it."""
        feed = self.feed
        while max(feed.stored, feed.first) < feed.end and (self.on_disk() < self.options.disk or self.release()):
            if self.on_disk() < self.options.disk:
                self.spill()
        unwritten = [key for key in self.owed_of(feed) if key[1] >= feed.stored]
        return self.options.level != "memory" or (not unwritten and feed.listed)

    def owed_of(self, feed: Feed) -> list[Key]:
        keys = [(feed.incarnation, offset) for offset in feed.records]
        return [key for key in keys if not self.is_acknowledged(key)]

    def goodbyes(self, registration: Registration, is_kept: bool) -> list[tuple[int, int, bool]]:
        return [(self.life, self.feed.end, is_kept)] if self.life in registration.positions else []

    def is_exact(self, how: str) -> bool:
        return how == "clean" or self.options.level == "power" or (self.options.level == "process" and how == "kill")

    # Publishing.

    def publish(self, lanes: list[int]) -> list[Record]:
        burst = [] if self.fenced else [record for record in map(self.append, lanes) if record]
        for listener in sorted(self.listeners) if burst else ():
            self.send(listener, "data", self.life, burst)
        return burst

    def append(self, lane: int) -> Record | None:
        if not self.make_room():
            self.counts["publish refused"] += 1
        elif not self.network.calm and self.world.rng.random() < self.options.append_failure:
            self.counts["append failed"] += 1
        else:
            return self.number(lane)
        return None

    def number(self, lane: int) -> Record:
        feed, level = self.feed, self.options.level
        sequence, previous = self.lanes.get(lane, (0, NONE))
        record = Record(self.life, feed.end, lane, sequence, previous, self.world.rng.random())
        self.lanes[lane] = (sequence + 1, record.offset)
        feed.records[record.offset] = record
        feed.end += 1
        feed.stored = feed.stored if level == "memory" else feed.end
        feed.synced = feed.end if level == "power" else feed.synced
        self.check.published(record)
        return record

    # Retention.

    def in_memory(self) -> int:
        return self.feed.end - max(self.feed.stored, self.feed.first)

    def on_disk(self) -> int:
        return sum(len(feed.records) for feed in self.feeds.values()) - self.in_memory()

    def make_room(self) -> bool:
        while self.is_full():
            if self.release():
                continue
            if self.can_spill():
                self.spill()
            elif self.options.when_full != "drop_oldest" or not self.drop_oldest():
                return False
        return True

    def is_full(self) -> bool:
        if self.options.level == "memory":
            return self.in_memory() >= self.options.memory
        return self.on_disk() >= self.options.disk

    def can_spill(self) -> bool:
        spills = self.options.level == "memory" and self.options.when_full == "spill"
        return spills and self.on_disk() < self.options.disk

    def spill(self) -> None:
        self.feed.stored = max(self.feed.stored, self.feed.first) + 1
        self.feed.listed = True
        self.counts["spilled"] += 1

    def oldest(self) -> tuple[Feed, int] | None:
        for feed in self.feeds.values():
            while feed.first < feed.end and feed.first not in feed.records:
                feed.first += 1
            if feed.records:
                return feed, feed.first
        return None

    def release(self) -> bool:
        found = self.oldest()
        if found is None or not self.is_acknowledged((found[0].incarnation, found[1])):
            return False
        self.remove(*found, "acknowledged")
        return True

    def is_acknowledged(self, key: Key) -> bool:
        return all(one.positions.get(key[0], key[1] + 1) > key[1] for one in self.registrations.values())

    def drop_oldest(self) -> bool:
        found = self.oldest()
        if found is None:
            return False
        self.remove(*found, "drop_oldest")
        self.counts["dropped oldest"] += 1
        return True

    def remove(self, feed: Feed, offset: int, cause: str) -> None:
        self.check.removed((feed.incarnation, offset), cause, self)
        del feed.records[offset]
        feed.first = offset + 1

    # Registrations.

    def receive(self, source: Address, kind: str, body: tuple[Any, ...]) -> None:
        name, session = source
        if session < self.sessions.get(name, 0):
            return
        if session > self.sessions.get(name, 0):
            self.meet(name, session)
        self.heard[name] = self.network.now
        super().receive(source, kind, body)
        if not self.is_open(source) and kind in ("pull", "join", "status", "acknowledge"):
            self.send(source, "unknown")  # this peer has to say who it is and where it stands

    def meet(self, name: str, session: int) -> None:
        """A new session. What had no name ended with the one before; what has one rests, and stays owed."""
        self.sessions[name] = session
        self.listeners = {listener for listener in self.listeners if listener[0] != name}
        registration = self.registrations.get(name)
        if registration is None:
            return
        if not registration.named and registration.session < session:
            del self.registrations[name]
        elif registration.session < session:
            registration.present = False

    def is_open(self, source: Address) -> bool:
        registration = self.registrations.get(source[0])
        return registration is not None and registration.present and registration.session == source[1]

    def on_register(self, source: Address, named: bool, start: str, from_start: bool, stated: Key | None) -> None:
        """The first of a session fixes where it begins in each feed; a repeated one gets the same answer."""
        name, session = source
        if not self.is_open(source):
            is_known = name in self.registrations
            registration = self.registrations.setdefault(name, Registration(session, named=named))
            registration.session, registration.present = session, True
            self.begin(name, registration, self.starts(registration, stated, start, from_start=from_start))
            self.check.registered(self, name, session, stated, is_known)
        self.tell(source)

    def begin(self, name: str, registration: Registration, starts: dict[int, int]) -> None:
        self.enrol(registration, starts)
        self.save()

    def enrol(self, registration: Registration, starts: dict[int, int]) -> None:
        """What it is owed from now on; that includes all that this life and later ones publish."""
        registration.since = self.since(registration)
        registration.positions.clear()
        registration.unproven.clear()
        for incarnation, join in starts.items():
            feed = self.feeds[incarnation]
            if incarnation == self.life or not feed.exact or join < feed.end:
                registration.positions[incarnation] = min(join, feed.end)
                registration.unproven.add(incarnation)

    def since(self, registration: Registration) -> int:
        return self.life

    def starts(self, one: Registration, stated: Key | None, start: str, *, from_start: bool) -> dict[int, int]:
        """Where a new session begins in each feed: what it states counts, even if it is less than we knew (S2).

        Who stands in a life that we do not know has nothing of the later ones that we know.
        """
        if stated is not None:
            later = {other: one.positions.get(other, 0) for other in self.feeds if other > stated[0]}
            return ({stated[0]: stated[1]} if stated[0] in self.feeds else {}) | later
        if one.since:
            owed = [other for other in self.feeds if other in one.positions or other >= one.since]
            return {other: one.positions.get(other, 0) for other in owed}
        return {self.life: 0 if from_start else self.feed.first if start == "retained" else self.feed.end}

    def save(self) -> None:
        """On disk before anybody is told (P3)."""
        self.directory.since = self.life
        self.directory.registered = {
            name: Kept(one.session, one.named, dict(one.positions)) for name, one in self.registrations.items()
        }

    def tell(self, source: Address, incarnations: set[int] | None = None) -> None:
        registration = self.registrations[source[0]]
        owed = sorted(registration.positions if incarnations is None else incarnations)
        most = self.world.rng.choice([1, 2, 100])
        for begin in range(0, len(owed) or 1, most):
            rows = [self.row(registration, incarnation) for incarnation in owed[begin : begin + most]]
            self.send(source, "registered", len(registration.positions), rows)

    def row(self, registration: Registration, incarnation: int) -> Row:
        feed, join = self.feeds[incarnation], registration.positions[incarnation]
        ending = self.ending(feed) if incarnation < self.life else 0
        return Row(incarnation, join, feed.first, feed.end, self.before(registration, incarnation), ending)

    def ending(self, feed: Feed) -> int:
        return 1 if feed.exact else 2

    def before(self, registration: Registration, incarnation: int) -> int:
        return max((other for other in registration.positions if other < incarnation), default=0)

    def on_acknowledge(self, source: Address, entries: list[Key]) -> None:
        """Cumulative: positions are only raised. Of a past feed a subscriber may have more than we."""
        if not self.is_open(source):
            return
        registration = self.registrations[source[0]]
        for incarnation, floor in entries:
            registration.unproven.discard(incarnation)
            feed = self.feeds.get(incarnation)
            if feed is None or incarnation not in registration.positions:
                continue
            known = registration.positions[incarnation]
            registration.positions[incarnation] = max(known, min(floor, feed.end))
            if incarnation < self.life and floor >= feed.end:
                del registration.positions[incarnation]
            self.check.acknowledged(self, source, (incarnation, floor))

    # Time.

    def tick(self) -> None:
        self.heartbeat()
        if self.world.rng.random() < 0.1:
            self.save()
        for name in [name for name in self.registrations if self.network.now - self.heard[name] > self.options.expiry]:
            del self.registrations[name]
            self.save()
            self.check.expired(self, name)

    def heartbeat(self) -> None:
        """Lists a feed to a peer until it is acknowledged to its end: no number of lost heartbeats hides a tail."""
        for source in self.world.addresses():
            if not self.is_open(source):
                self.send(source, "hello")
                continue
            registration = self.registrations[source[0]]
            listed = [
                (one, self.feeds[one].end) for one, at in registration.positions.items() if self.is_behind(one, at)
            ]
            if listed:
                self.send(source, "mark", listed)
            if registration.unproven & registration.positions.keys():
                self.tell(source, registration.unproven & registration.positions.keys())

    def is_behind(self, incarnation: int, position: int) -> bool:
        return incarnation < self.life or position < self.feeds[incarnation].end

    # Control.

    def on_join(self, source: Address, nonce: int) -> None:
        self.listeners.add(source)
        self.send(source, "marker", nonce)  # over the push link: that proves it

    def on_leave(self, source: Address) -> None:
        self.listeners.discard(source)

    def on_pull(self, source: Address, incarnation: int, offsets: list[int], credit: int) -> None:
        """Data within the credit, at least one record; then what is available: first, end, what is lost between."""
        feed = self.feeds.get(incarnation)
        if feed is None:
            return
        answer = self.within([feed.records[offset] for offset in offsets if offset in feed.records], credit)
        self.check.answered(answer, credit)
        for start in range(0, len(answer), self.options.burst):
            self.send(source, "repair", incarnation, answer[start : start + self.options.burst])
        lost = [offset for offset in offsets if feed.first <= offset < feed.end and offset not in feed.records]
        self.send(source, "available", incarnation, feed.first, feed.end, lost)

    def within(self, records: list[Record], credit: int) -> list[Record]:
        return [one for index, one in enumerate(records) if not index or size(records[: index + 1]) <= credit]

    def on_status(self, source: Address, incarnation: int) -> None:
        """Where a feed of an earlier life ended; one that we do not know has no end and is inexact."""
        if incarnation < self.life:
            feed = self.feeds.get(incarnation)
            answer = (feed.first, feed.end, self.ending(feed) == 1) if feed else (0, 0, False)
            self.send(source, "fin", incarnation, *answer)

    def on_fenced(self, source: Address, newest: int) -> None:
        if newest > self.life and not self.fenced:
            self.fenced = True
            self.counts["fenced"] += 1
