"""The subscriber of the model: where it stands, what it misses, and how feeds end for it."""

from __future__ import annotations

from typing import Any

from tests.model.network import Actor, Address, World
from tests.model.words import Cursor, Key, Profile, Record, Row, count_ranges, size

CREDIT_MIN = 1


class Subscriber(Actor):
    """One subscription: its protocol. What uses it is in `application`.

    `hold`: received, not handed over; bounded in bytes, the highest offset gives way. `hand`: handed over, not settled;
    bounded. `above`: settled above the floor; bounded in ranges. `known`: offsets below it have been published. `over`:
    the feed where it stands is settled to its end. `later`: newer feeds as they were named, and by which life.
    """

    def __init__(self, world: World, name: str, profile: Profile) -> None:
        super().__init__(world, name)
        self.profile = profile

    def begin_session(self, peer: int, *, resumes: bool) -> None:
        """A publisher that we meet later owes from offset 0; so does one that may have forgotten where we stand."""
        self.from_start = resumes
        self.peer, self.gone = peer, False
        self.confirmed, self.is_durable = False, self.options.level != "memory"
        self.told: set[int] = set()
        self.heard_of: set[int] = set()
        self.later: dict[int, tuple[Row, int]] = {}
        self.finished: dict[int, int] = {}
        """Feeds that are over, and where: to be acknowledged, in time with the application's cursor."""
        self.live_with: int | None = None
        self.heard, self.ack_due, self.ack_sent = self.network.now, True, [(0, 0)]
        self.orphan_since, self.nonce = 0.0, 0
        self.window, self.crowded = self.options.credit, False
        self.open_gaps: list[tuple[Key, Key]]
        self.gaps: list[Key]
        self.start: Key | None = None

    def enter(self, incarnation: int, floor: int, above: frozenset[int] = frozenset()) -> None:
        self.incarnation, self.floor, self.join, self.over = incarnation, floor, floor, False
        self.above = set(above)
        self.known = max(above, default=floor - 1) + 1
        self.hold: dict[int, Record] = {}
        self.hand: dict[int, Record] = {}
        self.first, self.lost = 0, set[int]()
        self.fin: int | None = None
        self.exact, self.is_kept, self.orphan_since = True, False, 0.0

    def cursor(self) -> Cursor:
        return Cursor(self.incarnation, self.floor, frozenset(self.above), frozenset(self.redriven))

    # What the application is.

    redriven: set[Key]
    committed: Cursor | None

    def has_letter(self, key: Key) -> bool:
        raise NotImplementedError

    # Receiving.

    def receive(self, source: Address, kind: str, body: tuple[Any, ...]) -> None:
        life = source[1]
        if life < self.peer:
            self.send(source, "fenced", self.peer)  # a live older life is a zombie: it is told
            return
        if life > self.peer and kind != "died":
            self.welcome(life)
        elif self.gone or life > self.peer:
            return  # overtaken by its goodbye
        self.heard = self.network.now
        super().receive(source, kind, body)
        self.check.state(self)

    def welcome(self, life: int) -> None:
        """A new life of the publisher: where did the feed of the one before end, and what is left of it?"""
        self.peer, self.gone, self.confirmed, self.from_start = life, False, False, True
        self.told.clear()
        self.live_with, self.orphan_since = None, 0.0
        if self.incarnation and not self.over and self.lacks_some():
            self.fin, self.exact = None, True

    def on_hello(self, source: Address) -> None:
        """The publisher is there, and does not know us."""
        self.confirmed = False

    def on_unknown(self, source: Address) -> None:
        self.confirmed, self.from_start, self.ack_due = False, True, True

    def on_registered(self, source: Address, total: int, rows: list[Row]) -> None:
        for row in rows:
            self.heard_of.add(row.incarnation)
            if self.add_feed(row):
                self.told.add(row.incarnation)
        self.confirmed = self.confirmed or len(self.told) >= total
        if self.over or not self.incarnation:
            self.go_on()

    def add_feed(self, row: Row) -> bool:
        """Whether we know this feed now; one whose predecessor has not been named has to be told again."""
        if row.incarnation == self.incarnation and not self.over:
            self.known, self.ack_due = max(self.known, row.end), True
            if row.ending and self.fin is None:
                self.end_past(row.first, row.end, exact=row.ending == 1)
        elif row.incarnation <= self.incarnation:
            if row.incarnation not in self.finished or not self.profile.cursor:
                self.finished[row.incarnation] = row.end
        else:
            is_known = not self.must_wait(row)
            self.later[row.incarnation] = row, self.peer
            return is_known
        return True

    def must_wait(self, row: Row) -> bool:
        """A feed comes first of which we have not been told."""
        return row.before > self.incarnation and row.before not in self.later

    def go_on(self) -> None:
        """The feed is over: the next one begins, if it is known which that is.

        One that only an older life has named is not passed over: the present life is asked where it ended.
        """
        row, life = self.later.get(min(self.later, default=0), (None, 0))
        is_next = row is not None and (row.before <= self.incarnation or (life < self.peer and self.confirmed))
        if row is not None and is_next and not self.gone:
            del self.later[row.incarnation]
            self.counts["feeds that only an older life named"] += life < self.peer
            self.begin_feed(row if life == self.peer else row._replace(ending=0))

    def begin_feed(self, row: Row) -> None:
        if self.open_gaps and self.open_gaps[-1][1] == (self.incarnation + 1, 0):
            self.open_gaps[-1] = self.open_gaps[-1][0], (row.incarnation, 0)
        is_first = not self.incarnation
        self.enter(row.incarnation, row.join)
        self.counts["past feeds entered"] += row.incarnation < self.peer
        if is_first:
            self.start = row.incarnation, row.join
            self.check.joined(self, self.start)
        self.ack_due = True
        if row.ending:
            self.end_past(row.first, row.end, exact=row.ending == 1)
        else:
            self.learn(row.first, row.end)

    def on_data(self, source: Address, incarnation: int, records: list[Record]) -> None:
        self.on_repair(source, incarnation, records)

    def on_repair(self, source: Address, incarnation: int, records: list[Record]) -> None:
        if incarnation == self.incarnation:
            self.known = max(self.known, records[-1].offset + 1)  # first: it may reach beyond the end that we were told
        for record in records:
            if incarnation == self.incarnation and not self.over:  # each time: a settled record may have ended the feed
                self.take_in(record)

    def take_in(self, record: Record) -> None:
        if self.is_duplicate(record.offset):
            self.counts["duplicates dropped"] += 1
        elif self.wants(record.lane):
            self.hold[record.offset] = record
            self.bound_hold()
        elif self.fits(record.offset):
            self.settle(record.offset)

    def wants(self, lane: int) -> bool:
        return self.profile.lanes is None or lane in self.profile.lanes

    def is_duplicate(self, offset: int) -> bool:
        return offset < self.floor or offset in self.above or offset in self.hold or offset in self.hand

    def bound_hold(self) -> None:
        """The highest offset gives way; it counts as not received and is pulled again later, with less credit."""
        while size(self.hold.values()) > self.options.room:
            del self.hold[max(self.hold)]
            self.crowded = True
            self.counts["gave way in hold"] += 1

    def on_mark(self, source: Address, listed: list[Key]) -> None:
        """We are listed, so our position was not heard. A feed that we do not know was named, and we did not hear."""
        self.ack_due = True
        for incarnation, end in listed:
            if incarnation == self.incarnation and not self.over:
                self.known = max(self.known, end)
            elif incarnation not in self.later and incarnation not in self.finished:
                self.confirmed, self.from_start = False, True

    def on_marker(self, source: Address, nonce: int) -> None:
        if nonce == self.nonce:
            self.live_with = self.peer

    def on_available(self, source: Address, incarnation: int, first: int, end: int, lost: list[int]) -> None:
        if incarnation == self.incarnation and not self.over:
            self.lost.update(lost)
            self.learn(first, end)

    def learn(self, first: int, end: int) -> None:
        self.first, self.known = max(self.first, first), max(self.known, end)
        self.advance()

    # Ends.

    def lacks_some(self) -> bool:
        """Whether anything of the feed where we stand may still have to come from its publisher."""
        return self.fin is None or self.lacks_below(self.fin)

    def lacks_below(self, end: int) -> bool:
        return any(not self.is_settled(offset) and offset not in self.hand for offset in range(self.floor, end))

    def on_fin(self, source: Address, incarnation: int, first: int, end: int, exact: bool) -> None:
        if incarnation == self.incarnation < self.peer and not self.over and self.fin is None:
            self.end_past(first, end, exact=exact)

    def end_past(self, first: int, end: int, *, exact: bool) -> None:
        """A newer life says where this feed ended, and has on its disk what is left of it."""
        if not (end or exact):  # it knows nothing of it
            self.finish(exact=False)
            return
        self.fin, self.exact, self.is_kept = end, exact, True
        self.learn(min(first, end), end)

    def on_bye(self, source: Address, rows: list[tuple[int, int, bool]]) -> None:
        """Its ends are exact. What is kept, its next life has; of the rest, what did not come will not come."""
        self.gone = True
        if not self.incarnation or self.over or not self.lacks_some():
            return
        ends = {incarnation: (end, kept) for incarnation, end, kept in rows}
        end, kept = ends.get(self.incarnation, (None, False))  # of its own life alone
        self.known = max(self.known, end or 0)
        self.is_kept |= kept
        if self.waits() and (end is None or self.lacks_below(end)):
            self.orphan_since = self.network.now
            self.counts["waits for the next life"] += 1
        else:
            self.finish(exact=end is not None)

    def waits(self) -> bool:
        """Whether its publisher's next life will have what is missing: what an earlier life left is on the disk."""
        return self.is_durable or self.is_kept or self.incarnation < self.peer

    def on_died(self, source: Address) -> None:
        """Its memory is gone, and where its feed ended is not known."""
        self.gone = True
        if not self.incarnation or self.over or not self.lacks_some():
            return
        if self.waits():
            self.orphan_since = self.network.now
        else:
            self.finish(exact=False)

    def give_up(self) -> None:
        """Nobody came back with it."""
        if self.orphan_since and self.network.now - self.orphan_since > self.options.patience:
            self.counts["orphans given up"] += 1
            self.check.given_up.add((self.name, self.incarnation))
            self.finish(exact=False)

    def finish(self, *, exact: bool) -> None:
        """Nobody has what is missing."""
        self.fin, self.exact, self.orphan_since = 0, exact, 0.0
        self.advance()

    # Settling.

    def is_gone(self, offset: int) -> bool:
        return offset < self.first or offset in self.lost or (self.fin is not None and offset >= self.fin)

    def is_held(self, offset: int) -> bool:
        return offset in self.hold or offset in self.hand

    def is_settled(self, offset: int) -> bool:
        return offset < self.floor or offset in self.above

    def settle(self, offset: int) -> None:
        self.hold.pop(offset, None)
        self.hand.pop(offset, None)
        self.above.add(offset)
        self.advance()

    def advance(self) -> None:
        """Moves the floor. A gap is reported when the floor reaches it, never earlier; what we have is no gap."""
        while not self.over:
            if self.floor in self.above:
                self.above.discard(self.floor)
            elif self.is_held(self.floor) or self.floor >= self.known or not self.is_gone(self.floor):
                break
            elif not self.has_letter((self.incarnation, self.floor)):
                self.report_gap()
            self.floor += 1
        if self.fin is not None and not self.over and self.is_finished():
            self.retire()

    def report_gap(self) -> None:
        self.gaps.append((self.incarnation, self.floor))
        self.check.gap(self, (self.incarnation, self.floor))

    def is_finished(self) -> bool:
        return self.floor >= self.known and not self.hold and not self.hand

    def retire(self) -> None:
        """The feed is over; what follows its last record is an open gap, if its end is not certain."""
        if not self.exact:
            self.open_gaps.append(((self.incarnation, self.floor), (self.incarnation + 1, 0)))
            self.check.open_gap(self, self.incarnation)
        self.over, self.finished[self.incarnation], self.ack_due = True, self.floor, True
        self.go_on()

    # Timers.

    def tick(self) -> None:
        if self.gone or not self.peer:
            self.give_up()
            return
        if not self.confirmed:
            self.tell("register", self.profile.name, self.profile.start, self.from_start, self.stated())
        if not self.incarnation:
            return
        self.acknowledge()
        if self.over:
            return
        self.choose_path()
        if self.incarnation < self.peer and self.fin is None:
            self.tell("status", self.incarnation)
        else:
            self.pull()

    def tell(self, kind: str, *body: object) -> None:
        self.send(("P", self.peer), kind, *body)

    def stated(self) -> Key | None:
        """What a publisher has to know of where we stand: with a cursor what is saved, else what is settled.

        As long as nothing is saved, that is where it began.
        """
        if self.profile.cursor:
            return (self.committed.incarnation, self.committed.floor) if self.committed else self.start
        return (self.incarnation, self.floor) if self.incarnation else None

    def positions(self) -> list[Key]:
        committed = self.committed[:2] if self.committed else (0, 0)
        if not self.profile.cursor:
            current, done = self.floor, list(self.finished.items())
        else:
            current = committed[1] if committed[0] == self.incarnation else self.join
            done = [entry for entry in self.finished.items() if entry <= committed]
        for incarnation, _ in done:
            del self.finished[incarnation]
        return done if self.over else [*done, (self.incarnation, current)]

    def acknowledge(self) -> None:
        """On change, whenever a heartbeat lists the feed, and as our own heartbeat when all is quiet."""
        positions = self.positions()
        if self.ack_due or positions != self.ack_sent or self.network.now - self.heard > 5:
            self.tell("acknowledge", positions)
            self.ack_due, self.ack_sent = False, positions

    def choose_path(self) -> None:
        """Far behind: leave the push and only pull. Near: listen; live once the marker came back over the push link."""
        live, lag = self.live_with == self.peer, self.known - self.floor
        if live and lag > self.options.far:
            self.live_with = None
            self.counts["demoted"] += 1
            self.tell("leave")
        elif not live and self.peer == self.incarnation and lag <= self.options.near:
            self.nonce += 1
            self.tell("join", self.nonce)

    def pull(self) -> None:
        """Lowest first, within room and window; a full hold still asks for what is lower than its highest record."""
        wanted = range(self.floor, self.known)
        missing = [offset for offset in wanted if not self.is_duplicate(offset) and not self.is_gone(offset)]
        left = self.left()
        if missing and (left > 0 or (self.hold and missing[0] < max(self.hold))):
            crowded, before = self.crowded, self.window
            credit = max(CREDIT_MIN, min(left, self.next_window()))
            self.check.asked(self, credit, before if crowded else None)
            self.tell("pull", self.incarnation, missing[: self.options.ask], credit)

    def left(self) -> int:
        """Room in the hand is room, too, but none for what is behind a record that is absent."""
        return max(0, self.options.window - len(self.hand)) + max(0, self.options.room - size(self.hold.values()))

    def next_window(self) -> int:
        """Half if some of the last answer was turned away, else double."""
        window = self.window // 2 if self.crowded else 2 * self.window
        self.window, self.crowded = min(max(CREDIT_MIN, window), self.options.credit), False
        return self.window

    # Handing over.

    def ready(self, record: Record) -> bool:
        return self.is_settled(record.previous) or (self.options.style == "iterator" and record.previous in self.hand)

    def fits(self, offset: int) -> bool:
        """Bounds the cursor: an offset may open a new range only while there are few; at the floor it always may."""
        future = self.above.union(self.hand)
        beside = offset == self.floor or offset - 1 in future or offset + 1 in future
        return beside or count_ranges(future) < self.options.ranges
