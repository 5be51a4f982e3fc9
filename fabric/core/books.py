"""The books: what became of every record of a feed for a subscription. Its subscriber keeps them, its publisher hears.

    owed = handled + dead-lettered + gap + dropped by a named reason + not asked for + in flight

Owed is what lies between the join offset and the end that is known. The counters are those of the inbound feeds; here
they are balanced against the positions, kept when a feed is over, and told: BOOKS at most once in a heartbeat's period,
repeated until BOOKED confirms them, and once before BYE. A book only grows, so the order of frames does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fabric.core.feeds import OutFeed
from fabric.core.lanes import InboundFeed
from fabric.core.members import MS, Context, Members, Peer
from fabric.core.publishing import Publishing
from fabric.core.registrations import Registration
from fabric.core.wire import Drop, Kind

__all__ = ["DROPPED", "ENDS", "HANDLED", "LETTERS", "Book", "Books", "Reckoning"]

HANDLED = "handled"
LETTERS = (Drop.UNDECODABLE, Drop.HANDLER_EXHAUSTED, Drop.CORRUPT_AT_SOURCE, Drop.TOO_LARGE, Drop.REJECTED, Drop.PARKED)
"""The ends of a record that is a dead letter."""
DROPPED = (Drop.SUPERSEDED, Drop.EXPIRED, Drop.BEST_EFFORT, Drop.LOST_AT_SOURCE, Drop.GIVEN_UP)
"""The ends of a record that was dropped for a reason which is no failure of its handler."""
ENDS: tuple[str, ...] = (HANDLED, Drop.GAP, Drop.NOT_ASKED, *LETTERS, *DROPPED)
"""Every end that a record can come to; other reasons are for frames, or for copies that were not taken."""

PAST_BOOKS_MAX = 1000
"""Books of feeds, and of readers, that are over; the oldest are added to one sum."""
UNTOLD_BOOKS_MAX = 10_000
"""Books that wait until one publisher is there to hear them; the last books of what is closed then are not told."""
ROWS_PER_FRAME = 300
"""Of at most 600 bytes each: below CONTROL_BYTES_MAX."""
FRAMES_AT_ONCE = 16
"""BOOKS to one peer in one period; the rest goes with the next."""


@dataclass(frozen=True, slots=True)
class Book:
    """One feed for one subscription, at one moment.

    Of the offsets from `join` to `known`, all below `floor` are settled, and `above` of the others.
    """

    source: str
    topic: str
    incarnation: int
    """Of the publisher's life."""
    subscriber: str
    life: int
    """The subscriber's incarnation: its next life begins to number its subscriptions anew."""
    subscription: int
    join: int
    known: int
    floor: int
    above: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    """By end, those that occurred."""
    state: str = "open"
    """`open`; `ended`: its publisher is over, and all of it is settled; `closed`: the subscription is."""
    open_gap: bool = False
    """Its publisher ended nobody knows where: nothing is known of what follows `known`."""

    @property
    def settled(self) -> int:
        """Records that came to their end, by the positions."""
        return self.floor - self.join + self.above

    @property
    def booked(self) -> int:
        """Records that came to their end, by the counters."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Reckoning:
    """A book as a ledger shows it.

    `end`: up to where the subscription is owed; `acknowledged`: the floor that its publisher has heard, or None where
    it has no say. `peer`: the state of the member at the other side. `left`: a reader that is registered no more, and
    has not told its last books; `lost`: nor will it, for that member is over. `kept`: our next life has the rest.
    """

    book: Book
    end: int
    peer: str
    acknowledged: int | None = None
    left: bool = False
    lost: bool = False
    kept: bool = False
    feeds: int = 1
    """How many books were added up to this one."""


def ends_of(counts: Mapping[str, int]) -> dict[str, int]:
    """The ends among counters, those that occurred."""
    return {str(end): count for end in ENDS if (count := counts.get(end, 0))}


class _Sum:
    """The books that were let go, added up."""

    def __init__(self) -> None:
        self.feeds = self.owed = self.settled = 0
        self.counts: Counter[str] = Counter()

    def add(self, reckoning: Reckoning) -> None:
        """One more."""
        self.feeds += reckoning.feeds
        self.owed += reckoning.book.settled if reckoning.lost else reckoning.end - reckoning.book.join
        self.settled += reckoning.book.settled
        self.counts.update(reckoning.book.counts)

    def reckon(self) -> Iterator[Reckoning]:
        """One entry without names, if there is anything."""
        if self.feeds:
            book = Book("", "", 0, "", 0, 0, 0, self.owed, self.settled, 0, dict(self.counts), "ended")
            yield Reckoning(book, self.owed, "", feeds=self.feeds)


class _Account:
    """The books of a reader, as far as they are told. `left`: where it was owed to, and stood, when it went."""

    __slots__ = ("book", "left", "owed")

    def __init__(self, book: Book, *, owed: bool) -> None:
        self.book, self.owed = book, owed
        self.left: tuple[int, int] | None = None

    @property
    def is_untold(self) -> bool:
        """Whether a reader that went has not told how it stood at its end."""
        return self.book.state != "closed" and (self.left is None or self.book.floor < self.left[0])


class Books:
    """All books of this member: its own, and what its readers told of theirs."""

    def __init__(self, context: Context, members: Members, publishing: Publishing) -> None:
        self._context, self._members, self._publishing = context, members, publishing
        publishing.on_left = self.left
        self.touched: dict[InboundFeed, None] = {}
        """Feeds whose counters may have moved since they were told."""
        self._past: dict[tuple[int, int], Book] = {}
        self._older, self._older_read = _Sum(), _Sum()
        self._untold: dict[str, dict[tuple[int, int], InboundFeed | Book]] = {}
        """By publisher, what it has not confirmed: (subscription, feed)."""
        self._sent: dict[str, dict[int, dict[tuple[int, int], InboundFeed | Book]]] = {}
        """By publisher and token, what the latest frames held."""
        self._token = self._due_ns = self._ask_due_ns = 0
        self._accounts: dict[tuple[str, int, int], _Account] = {}
        """Of registered readers, by (name, subscription, feed)."""
        self._left: dict[tuple[str, int, int, int], _Account] = {}
        """Of readers that are over, by (name, incarnation, subscription, feed)."""
        self._asking = False

    # Our own.

    def close(self, inbound: InboundFeed, *, by_us: bool, rests: bool = False) -> None:
        """A feed is over for a subscription, because it ended or because we closed.

        Then the rest is given up, unless the subscription `rests`: it has a name, and the rest stays owed.
        """
        self.touched.pop(inbound, None)
        rest = inbound.known - inbound.floor - inbound.settled.count
        if by_us and rest > 0 and not rests:
            inbound.counts[Drop.GIVEN_UP] += rest
        book = self._book_of(inbound)
        if rests:
            book = replace(book, known=book.floor + book.above, state="closed")
        elif by_us:
            book = replace(book, floor=max(book.known, book.floor), above=0, state="closed")
        else:
            book = replace(book, state="ended", open_gap=bool(inbound.counts["open_gaps"]))
        self._keep(inbound.feed, book)
        if self._hears(inbound.source, inbound.incarnation):
            untold = self._untold.setdefault(inbound.source, {})
            if len(untold) < UNTOLD_BOOKS_MAX:
                untold[inbound.subscription, inbound.feed] = book
            else:
                self._context.counts["books_not_told"] += 1
            if self._publishing.is_stopped:  # its publisher may close too, and wait for it
                self._due_ns = 0
                self._context.wake_by(self._context.now)

    def miss(self, subscription: int, key: tuple[str, str], incarnation: int, feed: int, join: int) -> None:
        """A feed of this source and topic was over before its subscription came to it: an open gap."""
        who = self._context.name, self._context.incarnation
        book = Book(*key, incarnation, *who, subscription, join, join, join, state="ended", open_gap=True)
        self._keep(feed, book)

    def _keep(self, feed: int, book: Book) -> None:
        self._past[book.subscription, feed] = book
        if len(self._past) > PAST_BOOKS_MAX:
            self._older.add(Reckoning(oldest := self._past.pop(next(iter(self._past))), oldest.known, ""))

    def _book_of(self, inbound: InboundFeed) -> Book:
        return Book(
            inbound.source,
            inbound.topic,
            inbound.incarnation,
            self._context.name,
            self._context.incarnation,
            inbound.subscription,
            inbound.join,
            max(inbound.known, inbound.floor),
            inbound.floor,
            inbound.settled.count,
            ends_of(inbound.counts),
        )

    # Telling.

    def tick(self) -> None:
        """Tell what changed, once in a heartbeat's period; ask those who have to tell us while we close."""
        now, liveness = self._context.now, self._context.config.liveness
        if self._asking and now >= self._ask_due_ns:
            self._ask_due_ns = now + liveness.marker_ms * MS
            for name in self.untold_by():
                self._context.send(name, Kind.BOOKED, 0, True)
        if now >= self._due_ns and (self.touched or self._untold):
            self._due_ns = now + liveness.heartbeat_ms * MS
            self.tell_all()

    def tell_all(self) -> None:
        """Tell every publisher that is there what it has not confirmed."""
        self._gather()
        for name in list(self._untold):
            self._tell(name)

    def _gather(self) -> None:
        for inbound in self.touched:
            if self._hears(inbound.source, inbound.incarnation):
                self._untold.setdefault(inbound.source, {})[inbound.subscription, inbound.feed] = inbound
        self.touched.clear()

    def _hears(self, name: str, incarnation: int) -> bool:
        """Whether this life of a publisher may want to hear our books; our own does not need to."""
        peer = self._members.by_name.get(name)
        known = (
            peer is not None and not peer.is_gone and peer.incarnation >= incarnation
        )  # it serves what older ones left
        return known and name != self._context.name

    def _tell(self, name: str) -> None:
        peer = self._members.by_name.get(name)
        if peer is None or peer.is_gone:
            self._untold.pop(name, None)
            self._sent.pop(name, None)
            return
        if not peer.is_there:
            return
        untold = list(self._untold.get(name, {}).items())[: FRAMES_AT_ONCE * ROWS_PER_FRAME]
        sent: dict[int, dict[tuple[int, int], InboundFeed | Book]] = {}
        self._sent[name] = sent
        for begin in range(0, len(untold), ROWS_PER_FRAME):
            some = dict(untold[begin : begin + ROWS_PER_FRAME])
            self._token += 1
            sent[self._token] = some
            rows = [self._row(*key, what) for key, what in some.items()]
            self._context.send(name, Kind.BOOKS, self._token, rows)

    def _row(self, number: int, feed: int, what: InboundFeed | Book) -> tuple[Any, ...]:
        book = what if isinstance(what, Book) else self._book_of(what)
        ends = list(book.counts.items())
        return number, feed, book.join, book.known, book.floor, book.above, book.state == "closed", ends

    def on_booked(self, peer: Peer, token: int, again: bool) -> None:
        """A publisher has what a frame held; if it closes, it wants the rest at once."""
        untold = self._untold.get(peer.name, {})
        for key, what in self._sent.get(peer.name, {}).pop(token, {}).items():
            if untold.get(key) is what:
                del untold[key]
        if not untold:
            self._untold.pop(peer.name, None)
        if again:
            self._gather()
            self._tell(peer.name)

    # What readers tell.

    def on_books(self, peer: Peer, token: int, rows: Iterable[list[Any]]) -> None:
        """The books of a reader; an older frame that comes late changes nothing."""
        for number, feed, join, known, floor, above, closed, ends in rows:
            out = self._publishing.by_id.get(feed)
            registration = self._publishing.registrations.of(peer.name).get(number)
            account = self._account(peer, number, out, registration) if out is not None else None
            counts = dict(ends)
            if out is None or account is None:
                continue  # of a subscription that was never registered, or long ago
            if not join <= floor <= floor + above <= known <= out.end or not counts.keys() <= _KNOWN_ENDS:
                self._context.counts[Drop.SHAPE] += 1
            else:
                state = "closed" if closed else "open"
                where = {"join": join, "known": known, "floor": floor, "above": above}
                told = replace(account.book, **where, counts=counts, state=state)
                if self._is_newer(told, account.book):
                    account.book = told
        self._context.send(peer.name, Kind.BOOKED, token, False)

    @staticmethod
    def _is_newer(told: Book, before: Book) -> bool:
        """A book only grows, and a closed one stays as it is."""
        if before.state == "closed" and told.state == "open":
            return False
        return (told.settled, told.known) >= (before.settled, before.known)

    def _account(self, peer: Peer, number: int, out: OutFeed, registration: Registration | None) -> _Account | None:
        """The account of a reader of a feed of ours; None if it never was one."""
        if registration is None or registration.incarnation != peer.incarnation or out.feed not in registration.joins:
            return self._left.get((peer.name, peer.incarnation, number, out.feed))
        key = peer.name, number, out.feed
        if key not in self._accounts:
            before = self._left.pop((peer.name, peer.incarnation, number, out.feed), None)
            self._accounts[key] = before or self._open_account(registration, out)
        return self._accounts[key]

    def _open_account(self, registration: Registration, out: OutFeed) -> _Account:
        (name, number), join = registration.reader, registration.joins[out.feed]
        life = registration.incarnation
        book = Book(self._context.name, out.topic, out.incarnation, name, life, number, join, join, join)
        return _Account(book, owed=registration.reader in out.readers)

    def left(self, registration: Registration, out: OutFeed, rests: bool) -> None:
        """A reader of a feed is registered no more, or has a name and `rests`; its last books may still come."""
        if registration.reader[0] == self._context.name:
            return
        key = (*registration.reader, out.feed)
        name, number = registration.reader
        gone = name, registration.incarnation, number, out.feed
        # Registered once more by a frame that came late, it goes on with what it told before.
        account = self._accounts.pop(key, None) or self._left.get(gone) or self._open_account(registration, out)
        account.left = out.end, out.readers.get(registration.reader, account.book.floor)
        account.owed &= not rests  # what it lacks is owed to its next session
        self._left[gone] = account
        if len(self._left) > PAST_BOOKS_MAX:
            oldest = next(iter(self._left))
            self._older_read.add(self._reckon_left(oldest, self._left.pop(oldest)))

    # Closing.

    def ask(self) -> None:
        """We close: whoever read from us is to tell its last books now."""
        self._asking, self._ask_due_ns = True, self._context.now
        self._context.wake_by(self._context.now)

    def untold_by(self) -> set[str]:
        """The members that are there, and whose books are not at the end of what they were owed."""
        lives = {key[:2] for key, account in self._left.items() if account.is_untold}
        for registration, out, account in self._registered():
            floor = account.book.floor if account is not None else registration.joins[out.feed]
            if floor < out.end and registration.reader in out.readers and not registration.absent_ns:
                lives.add((registration.reader[0], registration.incarnation))
        return {name for name, incarnation in lives if self._is_there(name, incarnation)}

    def _is_there(self, name: str, incarnation: int) -> bool:
        peer = self._members.by_name.get(name)
        return peer is not None and peer.is_there and peer.incarnation == incarnation

    def _registered(self) -> Iterator[tuple[Registration, OutFeed, _Account | None]]:
        """Those of others; what we read of ourselves stands in our own books."""
        for registration in self._publishing.registrations:
            name, number = registration.reader
            for feed in registration.joins if name != self._context.name else ():
                account = self._accounts.get((name, number, feed))
                # One that was away too long and is back goes on with what it told before.
                account = account or self._left.get((name, registration.incarnation, number, feed))
                yield registration, self._publishing.by_id[feed], account

    def next_deadline_ns(self) -> int | None:
        """When somebody is asked again. Books are told in passing: a tick comes in every heartbeat's period."""
        return self._ask_due_ns if self._asking else None

    # Looking.

    def check_invariants(self) -> None:
        """Assert that the books of what changed lately balance: counters and positions come from different places."""
        for inbound in self.touched:
            booked = sum(count for end, count in inbound.counts.items() if end in _KNOWN_ENDS)
            assert booked == inbound.floor - inbound.join + inbound.settled.count, f"{inbound}: {booked} are booked"

    def reckon(self, inbounds: Iterable[InboundFeed]) -> list[Reckoning]:
        """All books: of the feeds that our subscriptions follow now, of those that are over, and of our readers."""
        ours = [self._book_of(inbound) for inbound in inbounds]
        ours += self._past.values()
        reckoned = [Reckoning(book, book.known, self._state_of(book.source, book.incarnation)) for book in ours]
        reckoned += self._older.reckon()
        registered = set()
        for registration, out, account in self._registered():
            name, number = registration.reader
            registered.add((name, registration.incarnation, number, out.feed))
            book, floor = (account or self._open_account(registration, out)).book, out.readers.get((name, number))
            end = book.known if floor is None or book.state == "closed" else out.end
            book = replace(book, state="resting") if registration.absent_ns else book
            state, kept = self._state_of(name, registration.incarnation), out.is_past or out.is_written_down
            reckoned.append(Reckoning(book, end, state, floor, kept=kept))
        reckoned += [self._reckon_left(key, account) for key, account in self._left.items() if key not in registered]
        return [*reckoned, *self._older_read.reckon()]

    def _reckon_left(self, key: tuple[str, int, int, int], account: _Account) -> Reckoning:
        assert account.left is not None, "it has left"
        book, (end, floor), (name, incarnation, _, _) = account.book, account.left, key
        state = self._state_of(name, incarnation)
        if book.state == "closed":
            return Reckoning(book, book.known, state)
        if not account.owed:  # nothing was promised beyond what it has told
            return Reckoning(replace(book, known=book.join + book.settled), book.join + book.settled, state)
        return Reckoning(book, end, state, floor, left=True, lost=not self._is_there(name, incarnation))

    def _state_of(self, name: str, incarnation: int) -> str:
        peer = self._members.by_name.get(name)
        return "left" if peer is None else peer.state if peer.incarnation == incarnation else "dead"


_KNOWN_ENDS = frozenset(map(str, ENDS))
