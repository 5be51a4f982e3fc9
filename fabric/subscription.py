"""The subscriber's face: taking messages, and saying that they are handled."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from operator import length_hint
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fabric.core import events
from fabric.core.books import HANDLED
from fabric.core.cursors import Cursor, Slot, pack_cursor, parse_cursor, parse_redriven
from fabric.core.wire import TOMBSTONE, Drop
from fabric.engine.inbox import Gap, Hand, Inbox
from fabric.engine.letter_forms import Burial
from fabric.engine.steps import Steps, Wait, run_steps
from fabric.errors import ClosedError, ConfigError, PayloadError, ReceiveTimeoutError, WrongThreadError
from fabric.message import HeldMessage, Message, RedrivenFeed, messages_of
from fabric.table import Piece, Table

if TYPE_CHECKING:
    from fabric.core.lanes import InboundFeed
    from fabric.engine.loop import Engine

__all__ = ["Options", "Subscription", "SubscriptionBase"]


class Options(NamedTuple):
    """The options of `subscribe`, checked."""

    manual: bool
    owning: bool
    seeds: frozenset[int] | None
    name: str
    cursor: Cursor | None
    redriven: frozenset[Slot] | None
    """The letters that the cursor names as handled; None without a cursor."""


class _Verdict:
    """What became of a message in the hand of an application that acknowledges by itself."""

    __slots__ = ("at", "hand", "is_over", "reason")

    def __init__(self, hand: Hand, at: int) -> None:
        self.hand, self.at = hand, at
        self.reason: str | None = None
        self.is_over = True
        """False while its letter is written."""


class SubscriptionBase:
    """Taking what is here, and settling it: what both faces share. Nobody waits here."""

    def __init__(self, engine: Engine, inbox: Inbox, pattern: str, options: Options, *, idle_timeout_s: float) -> None:
        self.pattern, self.name = pattern, options.name
        self._engine, self._inbox, self._options, self._idle_timeout_s = engine, inbox, options, idle_timeout_s
        self._owning = options.owning
        self._hand: Hand | None = None
        self._latest: InboundFeed | None = None
        """The feed that was read last; a timeout names it."""
        self._at = 0
        """The index, into the rows in hand, of the message that was handed out last."""
        self._running: Iterator[int] | None = None
        """The rows of the burst in hand that the fast path has not handed out; then `_at` is behind."""
        self._earlier: list[Hand] = []
        """Bursts before the one in hand whose messages are all in the application's hand, by `receive_many`."""
        self._user = threading.Lock()
        self._user_ident = 0
        self._manual = options.manual
        self._unsettled: dict[tuple[object, int], deque[tuple[int, Hand, int]]] = {}
        self._newest: dict[tuple[object, int], int] = {}
        self._settling = threading.Lock()
        """Held to settle by hand: the storage thread does it too, for a letter that it has written."""
        self._verdicts: dict[tuple[object, int], deque[_Verdict]] = {}
        """Of each lane the oldest message that becomes a letter just now, and those behind it: they settle in order."""
        self._known: Mapping[int, str] = {}
        """What is known of records of the burst in hand: they are, or were, letters, and are not handed out."""
        self._name = engine.letters.claim(options.name or pattern)
        engine.letters.bind(self._name, inbox, options.redriven)
        self._closed = self._rests = False
        self.bytes_received = self.messages_received = 0

    # Taking.

    def drain(self) -> Iterator[Message]:
        """The messages that are here now, oldest first of each lane; never waits.

        The call itself says that what was handed out before is handled, whether or not the result is used.
        """
        self._enter()
        try:
            self._settle_hand()
        finally:
            self._user.release()
        self._engine.attend()
        return self._messages()

    def _settle_hand(self) -> None:
        if self._hand is not None and not self._manual:
            self._hand.settle_until(self._at + 1)

    def _messages(self, wait: Callable[[], Message | None] | None = None) -> Iterator[Message]:
        """What is here; with `wait` also what that brings, until it brings nothing."""
        while True:
            self._enter()
            try:
                message = self._next(look=wait is not None)
                if message is None and wait is not None:
                    message = wait()
            finally:
                self._user.release()
            if message is None:
                return
            yield message
            hand = self._hand
            if hand is None or self._at + 1 >= len(hand.rows) or not self._is_plain(hand):
                continue
            # Fast path: the rest of the burst, without asking anybody. How far it came is seen from the rows that are
            # left; whoever breaks off, or takes messages in between, looks there first (`_catch_up`).
            self._running, messages = self._rest_of_hand(hand)
            yield from messages
            self._catch_up()

    def _copy_into(self, message: Message, into: Any) -> None:  # noqa: ANN401 - tensors
        """Copy the value of the message that was just taken; if that fails it stays the next one."""
        try:
            message.copy_into(into)
        except PayloadError:
            self._at -= 1
            if self._manual:
                self._unsettled[message._feed, message.seed].pop()
            raise
        message.value = into

    def _gather(self, n: int, first: Message | None = None) -> Table | None:
        """What is here, at most `n` messages, all of them in hand at once; after `first`, which was just taken."""
        pieces, left, hand = list[Piece](), max(n, 1), self._hand
        if first is not None and hand is not None and self._is_plain(hand):
            self._at -= 1  # it comes again, with its burst
        elif first is not None:
            pieces.append(Piece.of(first))
            left -= 1
        while left:
            hand = self._hand
            if hand is None or self._at + 1 >= len(hand.rows):
                if self._turn_page(bool(pieces), True):
                    continue
                break
            if self._is_plain(hand):
                rows = hand.rows[self._at + 1 : self._at + 1 + left]
                self._at += len(rows)
                pieces.append(Piece(hand.item.burst, hand.item.feed, rows))
            elif (message := self._next(keep=bool(pieces))) is not None:
                pieces.append(Piece.of(message))
            else:
                break
            left -= len(pieces[-1].rows)
        return Table(pieces, own=self._owning) if pieces else None

    def _catch_up(self) -> None:
        """The messages of the fast path were handed out as far as their rows are used up; no more come of it."""
        running, self._running = self._running, None
        if running is not None and self._hand is not None:
            self._at = len(self._hand.rows) - 1 - length_hint(running)
            deque(running, maxlen=0)

    def _is_plain(self, hand: Hand) -> bool:
        """Whether all of its messages are handed out just as they lie there."""
        item = hand.item
        is_apart = self._manual or self._owning or self._known or item.feed.latest
        return not (is_apart or TOMBSTONE in item.burst.layout[0])

    def _rest_of_hand(self, hand: Hand) -> tuple[Iterator[int], Iterator[Message]]:
        """The rows after the last that was handed out, and their messages, which use them up."""
        rows = hand.rows[self._at + 1 :]
        left = iter(rows)
        return left, messages_of(hand.item.burst, hand.item.feed, rows, left)

    def _waiting(self, timeout_s: float, *, ending: bool = False) -> Steps[Message | None]:
        """The steps of waiting for a message. None comes only where all feeds are over, and only if `ending`."""
        inbox, engine = self._inbox, self._engine
        began = engine.clock()
        while True:
            left_s = timeout_s - (engine.clock() - began) / 1e9
            arrived = yield Wait(lambda: bool(inbox.items) or inbox.ended or self._closed, max(0.0, left_s))
            message = self._next()
            if message is not None:
                return message
            if self._closed or (inbox.ended and not inbox.items):
                if ending and not self._closed:
                    return None
                what = f"the subscription to {self.pattern}" if self._closed else f"every feed of {self.pattern}"
                raise ClosedError(what=what)
            if not arrived:
                state = f"{len(inbox.open)} feeds open, last at {self._position()}"
                raise ReceiveTimeoutError("no message", waited_s=timeout_s, state=state)

    def _position(self) -> str:
        feed = self._latest
        return f"{feed.source}/{feed.topic} offset {feed.floor}" if feed else "no offset"

    def _next(self, *, keep: bool = False, look: bool = True) -> Message | None:
        """The next message that is here. Settles the one before, unless several are in hand at once (`keep`).

        Whoever finds nothing looks at the sockets (`look`), if nobody else does.
        """
        while True:
            hand = self._hand
            if hand is None or self._at + 1 >= len(hand.rows):
                if not self._turn_page(keep, look):
                    return None
                continue
            self._at += 1
            message = self._pick(hand, self._at)
            if message is not None:
                if self._owning:
                    message.own()
                return message

    def _pick(self, hand: Hand, at: int) -> Message | None:
        item, row = hand.item, hand.rows[at]
        burst = item.burst
        seeds, sequences, kinds, _, _ = burst.columns
        kind, seed = kinds[row], seeds[row]
        counts_as = self._known.get(burst.first + row)
        if counts_as is not None:
            self._drop_known(hand, at, counts_as)
            return None
        reason = Drop.LOST_AT_SOURCE if kind == TOMBSTONE else None
        if item.feed.latest and reason is None and self._newest.get((item.feed, seed), -1) > burst.first + row:
            reason = Drop.SUPERSEDED
        if reason is not None:
            if self._manual:
                with self._settling:
                    hand.settle_one(at, reason)
            else:
                hand.drop(reason)
            return None
        if not self._manual:
            return Message(burst, row, item.feed, seed, sequences[row])
        self._unsettled.setdefault((item.feed, seed), deque()).append((burst.first + row, hand, at))
        return HeldMessage(burst, row, item.feed, self._settle_message)

    def _drop_known(self, hand: Hand, at: int, counts_as: str) -> None:
        """This record is, or was, a letter (D1): it counts as what became of that."""
        self._engine.counts["letters_known"] += 1
        reason = None if counts_as == HANDLED else counts_as
        if self._manual:
            with self._settling:
                hand.settle_one(at, reason)
        elif reason is not None:
            hand.drop(reason)

    def _turn_page(self, keep: bool, look: bool) -> bool:
        """The burst in hand is handled; take the next one, if there is one."""
        hand, items = self._hand, self._inbox.items
        self._hand = None
        if hand is not None and not self._manual:
            if keep:
                self._earlier.append(hand)
            else:
                hand.settle_all()
        if look and not items:
            self._engine.attend()  # sees to the sockets, if nobody does
        else:
            self._engine.waits.attended(self._engine)
        if not items:
            self._engine.push()  # what was settled does not wait for the next message
            return False
        item = items.popleft()
        feed, burst = item.feed, item.burst
        self._hand, self._at, self._latest = self._engine.hand_of(item), -1, feed
        is_letter = type(cast("Any", feed)) is RedrivenFeed
        known = self._engine.letters.known
        self._known = {} if is_letter else known.of_burst(self._name, feed, range(burst.first, burst.end))
        self.messages_received += len(self._hand.rows)
        self.bytes_received += item.size
        if item.feed.latest:
            self._note_newest()
        return True

    def _note_newest(self) -> None:
        """In a `latest` feed, of all that waits only the newest of each seed is worth handing out."""
        assert self._hand is not None
        for item in [self._hand.item, *self._inbox.items]:
            seeds = item.burst.columns[0]
            for row in range(item.burst.count) if item.rows is None else item.rows:
                key = item.feed, seeds[row]
                self._newest[key] = max(self._newest.get(key, -1), item.burst.first + row)

    # Handling.

    def _settle_message(self, message: Message, reason: str | None) -> None:
        key = message._feed, message.seed
        rejected: _Verdict | None = None
        with self._settling:
            lane = self._unsettled.get(key)
            while lane and lane[0][0] <= message.offset:
                offset, hand, at = lane.popleft()
                verdict = _Verdict(hand, at)
                if offset == message.offset and reason is not None:
                    verdict.reason, verdict.is_over = Drop.REJECTED, type(message._feed) is RedrivenFeed
                    rejected = verdict
                self._verdicts.setdefault(key, deque()).append(verdict)
            if not lane:
                self._unsettled.pop(key, None)
            self._settle_verdicts(key)
        if rejected is not None:
            self._reject(message, key, rejected, Burial(Drop.REJECTED, reason or "", message.attempt))
        self._engine.push()

    def _reject(self, message: Message, key: tuple[object, int], verdict: _Verdict, why: Burial) -> None:
        engine, feed = self._engine, message._feed
        if type(feed) is RedrivenFeed:
            engine.letters.died_again(feed, why)
            return

        def on_written() -> None:
            with self._settling:
                verdict.is_over = True
                self._settle_verdicts(key)
            engine.bury(message, why.reason, why.detail)
            engine.push()

        engine.letters.bury(message, self._name, why, on_written)

    def _settle_verdicts(self, key: tuple[object, int]) -> None:
        """A lane settles as far as its letters are written (D1)."""
        verdicts = self._verdicts.get(key)
        while verdicts and verdicts[0].is_over:
            verdict = verdicts.popleft()
            verdict.hand.settle_one(verdict.at, verdict.reason)
        if not verdicts:
            self._verdicts.pop(key, None)

    def cursor(self) -> dict[str, list[Any]]:
        """Where this subscription stands, for the application to save with its own state.

        {"source/topic": [incarnation, floor, settled ranges above it]}, of plain values that JSON takes; under
        "redriven", the dead letters that came again and were handled. The call itself says that what was handed out
        before is handled; with `acknowledge="manual"`, what was acknowledged counts. `subscribe(..., cursor=)` goes on
        from it.
        """
        self._enter()
        try:
            self._settle_hand()
            self._engine.settle_up()
            redriven = self._engine.letters.handled_by(self._name)
            with self._engine.lock:
                return pack_cursor(self._engine.core.subscribing.cursor(self._inbox.number), redriven)
        finally:
            self._user.release()

    def commit(self, cursor: Mapping[str, Any]) -> None:
        """This cursor of ours is saved: publishers need not keep what lies below it. Only for who gave a `cursor`.

        The dead letters that it names as handled leave the store. Raises `ConfigError` if it is no cursor, or the
        subscription was opened without one.
        """
        if self._options.cursor is None:
            raise ConfigError("the subscription was opened without one", field="cursor")
        committed = parse_cursor(cursor)
        redriven = parse_redriven(cursor)
        self._require_open()
        self._engine.submit(events.CursorCommitted(self._inbox.number, committed))
        if redriven:
            self._engine.letters.commit(self._name, redriven)

    # Looking.

    @property
    def joined(self) -> dict[tuple[str, str], int]:
        """The join offset of each feed, by (source, topic): all from there on is handed over, or reported as a gap."""
        return dict(self._inbox.joined)

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """The latest gaps, at most 1,000."""
        return tuple(self._inbox.gaps)

    @property
    def gaps_total(self) -> int:
        """How many gaps were reported."""
        return self._inbox.gaps_total

    # Ending.

    def _close(self, *, forgotten: bool = False) -> None:
        if self._closed:
            if forgotten and self._rests:
                raise ClosedError(what=f"the subscription to {self.pattern}, which stays owed")
            return
        self._closed, self._rests = True, bool(self._options.name) and not forgotten
        self._catch_up()
        hand, self._hand = self._hand, None
        if hand is not None and not self._manual:
            hand.settle_until(self._at)
        self._inbox.items.clear()
        self._engine.letters.release(self._name)
        self._engine.inboxes.pop(self._inbox.number, None)
        if not self._engine.closed:
            self._engine.submit(events.SubscriptionClosed(self._inbox.number, forgotten))

    def _require_open(self) -> None:
        self._engine.require_open()
        if self._closed:
            raise ClosedError(what=f"the subscription to {self.pattern}")

    def _enter(self, *, settle: bool = True) -> None:
        if not self._user.acquire(blocking=False):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            owner = names.get(self._user_ident, "one that has ended")
            raise WrongThreadError(owner=owner, caller=threading.current_thread().name)
        self._user_ident = threading.get_ident()
        engine = self._engine
        if self._closed or engine.closed or engine.broken is not None:
            self._user.release()
            self._require_open()
        if self._running is not None:
            self._catch_up()
        if settle and self._earlier:
            for hand in self._earlier:
                hand.settle_all()
            self._earlier.clear()

    def __repr__(self) -> str:
        return f"Subscription({self.pattern!r}, waiting={len(self._inbox.items)}, feeds={len(self._inbox.open)})"


class Subscription(SubscriptionBase):
    """What `Fabric.subscribe` returns. It belongs to one thread at a time.

    With `acknowledge="auto"` a message counts as handled when the next one is asked for; with `"manual"`, when
    `acknowledge()` or `reject()` is called on it or on a later one of its lane.
    """

    def receive(self, *, timeout_s: float = 10.0, into: Any = None) -> Message:  # noqa: ANN401 - tensors
        """The next message; waits for it. Its value is copied into the tensors `into`, whole or not at all, if given.

        Raises `ReceiveTimeoutError`, `ClosedError` (also when all feeds are over), `BrokenError`, and with `into`
        `SchemaError`: then the message stays the next one.
        """
        self._enter()
        try:
            message = self._next()
            if message is None:
                message = self._wait(timeout_s)
                assert message is not None, "nobody asked for an end"
            if into is not None:
                self._copy_into(message, into)
            return message
        finally:
            self._user.release()

    def receive_many(self, n: int, *, timeout_s: float = 10.0) -> Table:
        """At least one and at most `n` messages; waits for the first. Raises as `receive`.

        All of them are in hand until the next call. A `Table` is a sequence of them, and has columns.
        """
        self._enter()
        try:
            table = self._gather(n) or self._gather(n, self._wait(timeout_s))
            assert table is not None, "nobody asked for an end"
            return table
        finally:
            self._user.release()

    def __iter__(self) -> Iterator[Message]:
        """All messages, until every feed is over; while none has begun, it waits for one.

        Raises `ReceiveTimeoutError` after `idle_timeout_s` without any.
        """
        self._require_open()
        return self._messages(lambda: self._wait(self._idle_timeout_s, ending=True))

    def _wait(self, timeout_s: float, *, ending: bool = False) -> Message | None:
        return run_steps(self._waiting(timeout_s, ending=ending), self._until)

    def _until(self, wait: Wait) -> bool:
        return self._engine.until(wait.is_over, wait.timeout_s)

    def close(self) -> None:
        """Take nothing more. Publishers owe nothing more, unless it has a name. Twice is once."""
        self._close()

    def unsubscribe(self) -> None:
        """Close, and end a subscription that has a name: publishers owe it nothing more.

        One that is away learns of it only if a subscription of this name is ended once more while it is here; it owes
        it for `retention.absent_s` otherwise. Raises `ClosedError` if it is closed already, and so stays owed.
        """
        self._close(forgotten=True)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
