"""The engine: feeds the core with what happened and executes its commands. It knows no protocol.

Driving means holding `lock`; nobody holds it while asleep. Whoever drives takes a *turn*: what was submitted, what
was received, what is due. A turn ends after `turn_bursts_max` frames or `turn_us_max`. Any thread may `submit` an
event: if the lock is free the submitter takes it along, otherwise the holder does before it lets go (DESIGN section
3, "Who drives").
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Protocol

from fabric.config import FabricConfig
from fabric.core import events
from fabric.core.events import Card
from fabric.core.machine import FabricCore
from fabric.core.sharing import AdmitReader, FreeSlots, ReadSlot, RefuseReader
from fabric.core.wire import Drop, feed_prefix
from fabric.engine.assembling import Assemblies
from fabric.engine.budget import Budget
from fabric.engine.bulk import Bulk
from fabric.engine.devices import Devices
from fabric.engine.guarding import Guarding
from fabric.engine.inbox import Hand, Inbox
from fabric.engine.letters import Letters
from fabric.engine.outbox import Outbox
from fabric.engine.sharing import NoSharing
from fabric.engine.storing import NoStore, Store
from fabric.errors import BrokenError, ClosedError, WrongProcessError
from fabric.message import RedrivenFeed
from fabric.payloads import BufferPool
from transports import Endpoints, Link, PeerUnreachableError, SendBlockedError, Transport, TransportError

__all__ = ["Engine", "Waits"]

log = logging.getLogger("fabric.engine")

US = 1_000
RECEIVED_AT_ONCE = 16
CLOSING_REST = 20
"""Closing old bursts, and sending them after, takes up to a quarter of the time: encoding is a fifth of that cost."""


class Waits(Protocol):
    """How a thread waits: asleep on descriptors, or, in a simulated world, by letting the world go on."""

    def until(self, engine: Engine, is_over: Callable[[], bool], deadline_ns: int, *, patient: bool = False) -> None:
        """Drive and wait until `is_over()` or the deadline.

        A patient waiter leaves driving to others where that is kinder.
        """

    def attended(self, engine: Engine) -> None:
        """The calling thread drives often by itself: nobody else needs to for a while."""

    def submitted(self, engine: Engine) -> None:
        """Something was submitted or became due earlier: somebody has to see to it."""

    def close(self) -> None:
        """The engine is closing: no more driving."""


class Engine:
    """One per member; owns its transport. `waits` decides who sleeps how."""

    def __init__(
        self, card: Card, config: FabricConfig, transport: Transport, clock: Callable[[], int], waits: Waits
    ) -> None:
        self.core = FabricCore(card, config)
        self.card, self.config, self.transport, self.clock, self.waits = card, config, transport, clock, waits
        self.lock = threading.Lock()
        self.inboxes: dict[int, Inbox] = {}
        self.budget = Budget(self)
        self.open: deque[tuple[int, Outbox]] = deque()
        """When a burst that was opened is due, and whose it is, in the order of opening; it may have left since."""
        self.outboxes: list[Outbox] = []
        self.on_connect: Callable[[Card], None] = lambda card: None
        self.bury: Callable[[Any, str, str], None] = lambda message, reason, detail: None
        """Told of every message that became a dead letter: (message, reason, detail)."""
        self.early: list[tuple[events.ExecuteRequest, memoryview | None]] = []
        """Requests that came before there was anybody to run them."""
        self.on_request: Callable[[events.ExecuteRequest, memoryview | None], None] = self._keep_request
        self.on_complete: Callable[[events.CompleteRequest, memoryview | None], None] = lambda complete, payload: None
        self.on_progress: Callable[[], None] = lambda: None
        """Called after every turn that handled an event: those who wait look again."""
        self.peer_states: dict[str, str] = {}
        self.version_mismatches: dict[str, str] = {}
        self.pool = BufferPool(config.inboxes.assembly_bytes_max)
        self.counts: Counter[str] = Counter()
        self.broken: BaseException | None = None
        self.closed = False
        self.forked_in = self.fenced_by = 0
        self.due_ns = self.turned_ns = 0
        self._close_after_ns = 0
        self.restless = True
        """Whether the last turn left something: then nobody may sleep before the next."""
        self.watch: Callable[[object, list[Any]], None] | None = None
        """Told of every event once its commands are executed; a simulated world looks and judges here."""
        self._submitted: deque[Any] = deque()
        self._looped: deque[Any] = deque()
        self._assemblies = Assemblies(self.pool)
        self._payloads: dict[tuple[int, int], memoryview] = {}
        self.bulk = Bulk(transport, self.counts)
        self._own_prefixes: set[bytes] = set()
        self._execute = self._by_command()
        self.store: Store = NoStore(self.submit_later)
        self.stateless = ""
        """Why this member has no state that outlives it; empty if it has."""
        self.wall_ns: Callable[[], int] = time.time_ns
        self.letters = Letters(self)
        self.devices = Devices(config.inboxes.assembly_bytes_max)
        self.sharing = NoSharing()
        self.guarding = Guarding(self)
        self.probe: Callable[[Card], bool] = lambda card: False
        """Whether the process of this card, on this host, is proven dead."""

    def _by_command(self) -> dict[type, Callable[[Any], None]]:
        return {
            events.Deliver: self._deliver,
            events.Broadcast: self._broadcast,
            events.SendControl: self._send_control,
            events.SendBulk: self._send_bulk,
            events.FollowFeed: self._follow,
            events.UnfollowFeed: self._unfollow,
            events.ConnectPeer: self._connect,
            events.DisconnectPeer: self._disconnect,
            events.BeginFeed: lambda c: self._tell(c.subscription, Inbox.begin_feed, c),
            events.EndFeed: lambda c: self._tell(c.subscription, Inbox.end_feed, c),
            events.ReportGap: self._report_gap,
            events.BeginPayload: self._assemblies.begin,
            events.PlaceChunk: self._place_chunk,
            events.FinishPayload: self._finish_payload,
            events.DropPayload: self._assemblies.drop,
            events.ExecuteRequest: lambda c: self.on_request(c, self._payloads.pop((c.space, c.request), None)),
            events.CompleteRequest: lambda c: self.on_complete(c, self._payloads.pop((c.space, c.request), None)),
            events.ReportPeer: self._report_peer,
            events.ReportFenced: self._report_fenced,
            events.ProbePeer: self._probe,
            events.AppendRecords: lambda c: self.store.ask(c),
            events.LoadRecords: lambda c: self.store.ask(c),
            events.ReleaseRecords: lambda c: self.store.ask(c),
            events.SaveRegistrations: lambda c: self.store.ask(c),
            **dict.fromkeys((ReadSlot, FreeSlots, RefuseReader, AdmitReader), lambda c: self.sharing.execute(c)),
        }

    # Driving. Everything in this section needs the lock, but for `submit`, `push` and `require_open`.

    def submit(self, event: object) -> None:
        """Hand an event over, from any thread; it is handled now if nobody drives, else by whoever does."""
        self._submitted.append(event)
        self.push()

    def submit_later(self, event: object) -> None:
        """Hand an event over that may wait for the next turn."""
        self._submitted.append(event)

    def submit_first(self, event: object) -> None:
        """Hand an event over that must not wait behind others; from the turn that handles it."""
        self._submitted.appendleft(event)

    def hand_of(self, item: events.Deliver) -> Hand:
        """What was delivered, for the application's hand: what is settled there is told to the core, or the letters."""
        feed: Any = item.feed
        return Hand(item, self.letters.settled if type(feed) is RedrivenFeed else self.submit_later)

    def push(self) -> None:
        """Handle what was submitted, unless somebody drives: he will, before he lets go."""
        while self._submitted and self.lock.acquire(blocking=False):
            try:
                self._guard(self._drain)
            finally:
                self.lock.release()
            self.on_progress()
        self.waits.submitted(self)

    def settle_up(self) -> None:
        """Handle all that was submitted before this call, whoever drives."""
        with self.lock:
            self._guard(self._drain)
        self.on_progress()

    def attend(self) -> None:
        """A thread that is busy with messages takes a turn, unless somebody does, and keeps the background away."""
        self.waits.attended(self)
        if not self.lock.locked():
            self.turn()

    def turn(self) -> bool:
        """One turn; takes and releases the lock. Returns whether more may be ready."""
        with self.lock:
            more = self._guard(self._turn)
        if self._submitted:
            self.push()
        return bool(more)

    def _guard(self, work: Callable[[], int]) -> int:
        """The top of the engine loop."""
        if self.broken is not None or self.closed:
            self._submitted.clear()
            return False
        return self.guarded(work)

    def guarded(self, work: Callable[[], int]) -> int:
        """What escapes from here breaks the engine, and all who wait are told. From any thread."""
        try:
            return work()
        except Exception as error:
            self.broken = error
            log.exception("the engine of %s broke", self.card.name)
            self.on_progress()
            return False
        except BaseException as error:  # of a signal handler: half of an event is done, and must not count as all
            self.broken = error
            self.on_progress()
            raise

    def _turn(self) -> bool:
        began = self.clock()
        if self.open:
            self._close_bursts(began)
        self.sharing.turn(began)
        if self.guarding.ended:
            self.guarding.look()
        handled = self._drain() if self._submitted or self._looped else 0
        received, more = self._take_in(began)
        now = self.turned_ns = self.clock()
        if now >= self.core.next_deadline_ns():
            self._handle(events.TimePassed(), now)
        handled += received
        if self._submitted or self._looped:
            handled += self._drain()
        self.bulk.flush()
        self._set_due()
        if handled:
            self.on_progress()
        self.restless = more or bool(self._looped)
        return self.restless

    def _take_in(self, began: int) -> tuple[int, bool]:
        """Handle what came, within the bounds of a turn: how many frames, and whether more may be there."""
        limits, received = self.config.work, 0
        while True:
            inbounds = self.transport.receive(RECEIVED_AT_ONCE)
            for inbound in inbounds:
                self._receive(inbound)
            received += len(inbounds)
            if len(inbounds) < RECEIVED_AT_ONCE:
                return received, False  # fewer than asked for: nothing is left
            if received >= limits.turn_bursts_max or self.clock() - began > limits.turn_us_max * US:
                return received, True

    def note_open(self, outbox: Outbox) -> None:
        """This outbox has an open burst, or copies under way: somebody has to see to it in time. From any thread."""
        due_ns = outbox.due_ns or self.clock() + 1000 * US
        self.open.append((due_ns, outbox))
        due_ns = max(due_ns, self._close_after_ns)
        if due_ns < self.due_ns:
            self.due_ns = due_ns
            self.waits.submitted(self)

    def _close_bursts(self, now: int) -> None:
        if now < self._close_after_ns:
            return
        while self.open and self.open[0][0] <= now:  # those after it were opened later
            _, outbox = self.open.popleft()
            due_ns = outbox.close_if_due(now)
            if due_ns:
                self.open.append((due_ns, outbox))
        # Where thousands of bursts fall due at once, they grow older and fuller instead of taking all of the time.
        self._close_after_ns = now + CLOSING_REST * (self.clock() - now)

    def flush(self) -> None:
        """Let all open bursts leave: somebody waits."""
        if self.open:
            for _, outbox in self.open.copy():
                outbox.close_burst()
        if self._submitted:
            self.push()

    def _set_due(self) -> None:
        due_ns = self.core.next_deadline_ns()
        self.due_ns = min(due_ns, max(self.open[0][0], self._close_after_ns)) if self.open else due_ns

    def _drain(self) -> int:
        """Handle what was submitted and what we sent to ourselves."""
        submitted, looped, handled = self._submitted, self._looped, 0
        while submitted or looped:
            event = submitted.popleft() if submitted else looped.popleft()
            self._handle(event, self.clock())
            if type(event) is events.BurstClosed:
                self.budget.give(event.room)
            handled += 1
        if handled:
            self._set_due()
        return handled

    def _handle(self, event: object, now: int) -> None:
        execute = self._execute
        commands = self.core.handle(event, now)
        for command in commands:
            execute[type(command)](command)
        if self.watch is not None:
            self.watch(event, commands)

    def _receive(self, inbound: Any) -> None:  # noqa: ANN401 - transports.Inbound
        frames, link, now = inbound.frames, inbound.link, self.clock()
        if link is Link.DATA:
            self._handle(events.DataReceived(frames[0], inbound.peer), now)
        elif link == Link.CONTROL:
            self._handle(events.ControlReceived(frames[0], inbound.peer), now)
        else:
            self._handle(events.BulkReceived(frames[0], frames[1] if len(frames) > 1 else None, inbound.peer), now)

    def abandon(self, pid: int) -> None:
        """In a forked child: every use is refused from now on. The parent's sockets are left alone."""
        self.forked_in, self.closed, self.lock = pid, True, threading.Lock()
        self._submitted.clear()
        for outbox in self.outboxes:
            outbox.abandon()
        self.store.abandon()
        self.letters.abandon()
        self.transport.abandon()
        self.sharing.abandon()

    def require_open(self) -> None:
        """Raise `ClosedError`, `BrokenError` or `WrongProcessError` if the engine is no longer there."""
        if self.forked_in:
            raise WrongProcessError(opened_in=self.card.pid, used_in=self.forked_in)
        if self.broken is not None:
            raise BrokenError(str(self.broken) or type(self.broken).__name__, what="the fabric") from self.broken
        if self.closed:
            raise ClosedError(what="the fabric")

    def until(self, is_over: Callable[[], bool], timeout_s: float, *, patient: bool = False) -> bool:
        """Drive and wait until `is_over()`; False if it did not come within the time."""
        self.require_open()
        if is_over():
            return True
        self.flush()
        deadline_ns = self.clock() + int(timeout_s * 1e9)
        self.waits.until(
            self, lambda: self.broken is not None or self.closed or is_over(), deadline_ns, patient=patient
        )
        if is_over():
            return True
        self.require_open()
        return False

    # Commands.

    def _tell(self, subscription: int, method: Callable[[Inbox, Any], None], command: object) -> None:
        inbox = self.inboxes.get(subscription)
        if inbox is not None:
            method(inbox, command)

    def _report_gap(self, command: events.ReportGap) -> None:
        self._tell(command.subscription, Inbox.report_gap, command)
        self.letters.notice(command)

    def _deliver(self, command: events.Deliver) -> None:
        inbox = self.inboxes.get(command.subscription)
        if inbox is not None:
            inbox.items.append(command)

    def _broadcast(self, command: events.Broadcast) -> None:
        if command.marker:
            self.transport.flush_subscriptions()
        self.transport.broadcast(command.frame)
        if command.frame[:8] in self._own_prefixes:
            self._looped.append(events.DataReceived(command.frame))

    def _send_control(self, command: events.SendControl) -> None:
        if command.peer == self.card.name:
            self._looped.append(events.ControlReceived(command.frame))
            return
        try:
            self.transport.send(command.peer, Link.CONTROL, (command.frame,))
        except (SendBlockedError, PeerUnreachableError):
            self.counts[Drop.BLOCKED] += 1  # the protocol repeats what matters

    def _send_bulk(self, command: events.SendBulk) -> None:
        if command.peer == self.card.name:
            self._looped.append(events.BulkReceived(command.header, command.chunk))
            return
        self.bulk.add(command)

    def _follow(self, command: events.FollowFeed) -> None:
        prefix = feed_prefix(command.feed)
        self.transport.subscribe(prefix)
        if command.feed in self.core.publishing.by_id:
            self._own_prefixes.add(prefix)

    def _unfollow(self, command: events.UnfollowFeed) -> None:
        prefix = feed_prefix(command.feed)
        self.transport.unsubscribe(prefix)
        self._own_prefixes.discard(prefix)

    def _connect(self, command: events.ConnectPeer) -> None:
        self.bulk.forget(command.key)
        try:
            self.transport.connect(command.key, Endpoints(*command.card.endpoints))
            self.on_connect(command.card)
            if command.key == command.card.name:
                self.sharing.meet(command.card)
        except TransportError as error:
            self.counts["connections_refused"] += 1
            log.warning("cannot connect to %s: %s", command.key, error)

    def _disconnect(self, command: events.DisconnectPeer) -> None:
        self.bulk.forget(command.key)
        self.transport.disconnect(command.key)
        self.sharing.part(command.key)

    def _report_peer(self, command: events.ReportPeer) -> None:
        log.info("peer %s: %s %s", command.name, command.state, command.detail)
        if command.state == "version":
            self.version_mismatches[command.name] = command.detail
        else:
            self.peer_states[command.name] = command.state

    def _report_fenced(self, command: events.ReportFenced) -> None:
        log.error("a newer incarnation of %s lives: this one stops publishing", self.card.name)
        self.fenced_by = command.newest

    def _probe(self, command: events.ProbePeer) -> None:
        if self.probe(command.card):
            self.submit_later(events.PeerDied(command.card.name, command.card.incarnation))

    def _keep_request(self, execute: events.ExecuteRequest, payload: memoryview | None) -> None:
        self.early.append((execute, payload))

    def _place_chunk(self, command: events.PlaceChunk) -> None:
        try:
            self._assemblies.place(command)
        except MemoryError:
            log.warning("there is no memory for a value of a peer; it is asked for again")
            self._looped.append(events.PayloadStarved(command.space, command.number))

    def _finish_payload(self, command: events.FinishPayload) -> None:
        key = command.space, command.number
        if self._assemblies.is_starved(*key):
            return  # `PayloadStarved` is on its way
        payload = self._assemblies.finish(command)
        if payload is not None and key[0] not in self.core.following.feeds:
            self._payloads[key] = payload  # of a request or reply; others are handed over with their burst
        self._looped.append(events.PayloadChecked(*key, payload))

    # Closing.

    def close(self, linger_s: float) -> None:
        """Release the transport. Waiting threads are told."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self.transport.close(linger_s)
            self.guarding.close()
            self.sharing.close()
        self.store.close()
        self.letters.close()
        self.on_progress()
