"""Requests and replies: resent with the same number until answer or deadline, executed at most once.

A request of a peer is remembered with its reply until its deadline has passed, so that a repeated one is answered
and not run again. Values of 64 KiB and more are addressed: the other side fetches them from the space of the request
or of the reply.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from fabric.core.events import Buffer, CompleteRequest, ExecuteRequest, ReplyIssued, RequestIssued
from fabric.core.fetching import Fetching, Key
from fabric.core.guards import Budget, Retry
from fabric.core.members import MS, Context, Members, Peer
from fabric.core.wire import ADDRESSED, Drop, Kind, checksum_of, decode_descriptor
from fabric.errors import WireFormatError

__all__ = ["Exchange"]

DEADLINE_MS_MAX = 3_600_000
"""A request is remembered no longer than this: else a far deadline would fill the memory for good."""
PRIORITIES = 3
"""0 is high, 1 normal, 2 low."""
RESENDS = Budget(share=1.0, reserve=64)
"""Resends before their longest wait: as many as there are requests, and so many more at once."""


class _Pending:
    """A request of ours that is not answered."""

    __slots__ = ("accepted", "event", "outcome", "reply_kind", "retry")

    def __init__(self, event: RequestIssued, retry: Retry) -> None:
        self.event, self.retry = event, retry
        self.accepted = False
        self.reply_kind, self.outcome = 0, "reply"


class _Execution:
    """A request of a peer: under way while `reply` is None."""

    __slots__ = ("deadline_ns", "execute", "payload", "reply", "size")

    def __init__(self, execute: ExecuteRequest) -> None:
        self.execute, self.deadline_ns = execute, execute.deadline_ns
        self.reply: tuple[bool, int, bytes] | None = None
        self.payload: Buffer | None = None
        self.size = len(execute.metadata) + len(execute.blob)


def _space(role: str, requester: int, incarnation: int, peer: int) -> int:
    """Where the value of a request (or reply) between two members lies.

    Numbers of requests are unique in one incarnation.
    """
    return checksum_of(f"{role}\0{requester}\0{incarnation}\0{peer}".encode())


class Exchange:
    """Both sides of all requests of this member."""

    def __init__(self, context: Context, members: Members, fetching: Fetching) -> None:
        self._context, self._members, self._fetching = context, members, fetching
        self._pending: dict[int, _Pending] = {}
        self._executions: dict[tuple[str, int, int], _Execution] = {}
        self._remembered_bytes = 0
        self._asked: dict[tuple[str, int], deque[int]] = {}
        """The requests of each life of a peer, in the order in which they came."""
        self._awaited: dict[tuple[str, int], int] = {}
        """The lowest request that each life of a peer still waits for, as far as it has told."""
        self._fetches: dict[Key, tuple[str, object]] = {}
        self._budget = RESENDS
        limits = context.config.requests
        self._first_send = Retry.beyond(limits.resend_ms_first * MS, limits.resend_ms_max * MS)

    # Our requests.

    def issue(self, event: RequestIssued) -> None:
        """Send a request, and again until it is answered."""
        self._budget = self._budget.call()
        pending = self._pending[event.request] = _Pending(event, self._first_send)
        peer = self._members.by_name.get(event.peer)
        if peer is None or peer.is_gone:  # as for requests that are under way when it goes
            self._complete(pending, "gone")
        else:
            self._send(pending)

    def _send(self, pending: _Pending) -> None:
        event, now = pending.event, self._context.now
        pending.retry = pending.retry.after(now, self._context.chance())
        self._context.wake_by(min(pending.retry.due_ns, event.deadline_ns))
        left_ms = max(1, (event.deadline_ns - now) // MS)
        awaited = next(iter(self._pending))  # requests are issued in the order of their numbers
        fields = (event.request, awaited, event.method, event.priority, left_ms, event.kind, event.metadata, event.blob)
        self._context.send(event.peer, Kind.REQUEST, *fields)

    def _resend(self, pending: _Pending) -> None:
        """Beyond the budget only at the longest wait: what a peer cannot answer must not become more by asking."""
        budget, longest_ns = self._budget.retry(), pending.retry.max_ns
        if budget is None and pending.retry.wait_ns < longest_ns:
            pending.retry = pending.retry._replace(wait_ns=longest_ns).postponed(self._context.now)
            self._context.counts["resends_postponed"] += 1
            return
        self._budget = budget or self._budget
        self._context.counts["requests_resent"] += 1
        self._send(pending)

    def abandon(self, request: int) -> None:
        """Nobody waits any more."""
        self._pending.pop(request, None)

    def on_accepted(self, request: int) -> None:
        """The responder has it."""
        if request in self._pending:
            self._pending[request].accepted = True

    def on_reply(self, peer: Peer, request: int, failed: bool, kind: int, blob: bytes) -> None:
        """An answer; a second one, or one from somebody else, is dropped."""
        pending = self._pending.get(request)
        if pending is None or pending.event.peer != peer.name:
            self._context.counts[Drop.DUPLICATE] += 1
            return
        pending.accepted = True
        if not kind & ADDRESSED:
            self._complete(pending, "failure" if failed else "reply", kind, blob)
            return
        key = (_space("reply", self._context.id, self._context.incarnation, peer.id), request)
        pending.reply_kind, pending.outcome = kind & ~ADDRESSED, "failure" if failed else "reply"
        if key not in self._fetches and not self._fetch(key, peer, blob, "reply", pending):
            self._complete(pending, "gone")

    def _fetch(self, key: Key, peer: Peer, blob: bytes, role: str, owner: object) -> bool:
        """Begin to fetch an addressed value; False if it cannot be had."""
        try:
            descriptor = decode_descriptor(blob)
        except WireFormatError:
            self._context.counts[Drop.SHAPE] += 1
            return False
        if descriptor.size > self._context.config.inboxes.payload_bytes_max:
            self._context.counts[Drop.TOO_LARGE] += 1
            return False
        self._fetches[key] = (role, owner)
        self._fetching.begin(key, peer.name, descriptor, exchange=True)
        return True

    def _complete(
        self, pending: _Pending, outcome: str, kind: int = 0, blob: bytes = b"", space: int | None = None
    ) -> None:
        self._pending.pop(pending.event.request, None)
        self._context.emit(CompleteRequest(pending.event.request, outcome, pending.accepted, kind, blob, space))

    # Requests of peers.

    def on_request(self, peer: Peer, fields: Sequence[Any]) -> None:
        """Run it once; answer a repeated one from memory, or say that it is under way."""
        request, awaited, method, priority, left_ms, kind, metadata, blob = fields
        if awaited > request:
            self._context.counts[Drop.SHAPE] += 1
            return
        if request < self._forget_answered(peer, awaited):
            self._context.counts[Drop.STALE] += 1  # nobody waits for it, and whether it was executed is forgotten
            return
        known = self._executions.get((peer.name, peer.incarnation, request))
        if known is not None:
            self._answer_again(peer, request, known)
            return
        if not self._make_room() or priority >= PRIORITIES:
            self._context.counts[Drop.NO_ROOM if priority < PRIORITIES else Drop.SHAPE] += 1
            return
        space = _space("request", peer.id, peer.incarnation, self._context.id) if kind & ADDRESSED else None
        deadline_ns = self._context.now + min(left_ms, DEADLINE_MS_MAX) * MS
        execute = ExecuteRequest(
            peer.name,
            peer.incarnation,
            request,
            method,
            priority,
            deadline_ns,
            kind & ~ADDRESSED,
            metadata,
            blob,
            space,
        )
        execution = self._executions[peer.name, peer.incarnation, request] = _Execution(execute)
        self._asked.setdefault((peer.name, peer.incarnation), deque()).append(request)
        self._remembered_bytes += execution.size
        if space is None:
            self._context.emit(execute)
        else:
            if not self._fetch((space, request), peer, execute.blob, "request", execution):
                self._forget_execution((peer.name, peer.incarnation, request))

    def _forget_answered(self, peer: Peer, awaited: int) -> int:
        """The peer waits for nothing below `awaited`: what was answered there need not be remembered.

        Returns the highest such number that it has told.
        """
        key = peer.name, peer.incarnation
        floor = self._awaited[key] = max(awaited, self._awaited.get(key, 0))
        asked = self._asked.get(key, ())
        while asked and asked[0] < floor:
            execution = self._executions.get((*key, asked[0]))
            if execution is not None and execution.reply is None:
                break  # it still runs; its reply is forgotten later
            number = asked.popleft()
            if execution is not None:
                self._forget_execution((*key, number))
        return floor

    def _answer_again(self, peer: Peer, request: int, execution: _Execution) -> None:
        self._context.counts["requests_repeated"] += 1
        if execution.reply is None:
            self._context.send(peer.name, Kind.ACCEPTED, request)
        else:
            self._context.send(peer.name, Kind.REPLY, request, *execution.reply)

    def reply(self, event: ReplyIssued) -> None:
        """A handler finished."""
        execution = self._executions.get((event.peer, event.incarnation, event.request))
        if execution is None or execution.reply is not None:
            return
        execution.reply = (event.failed, event.kind, event.blob)
        execution.payload = event.payload
        size = len(event.blob) + (memoryview(event.payload).nbytes if event.payload is not None else 0)
        execution.size += size
        self._remembered_bytes += size
        peer = self._members.by_name.get(event.peer)
        if peer is not None and peer.incarnation == event.incarnation:
            self._context.send(event.peer, Kind.REPLY, event.request, *execution.reply)

    def _make_room(self) -> bool:
        """Forget the oldest replies whose deadline has passed.

        Without room a request is not taken, and will be repeated.
        """
        limits = self._context.config.requests
        if len(self._executions) < limits.remembered_max and self._remembered_bytes < limits.remembered_bytes_max:
            return True
        for key, execution in list(self._executions.items()):
            if execution.deadline_ns < self._context.now and execution.reply is not None:
                self._forget_execution(key)
        return len(self._executions) < limits.remembered_max and self._remembered_bytes < limits.remembered_bytes_max

    # Addressed values.

    def payload_of(self, peer: Peer, space: int, request: int) -> Buffer | None:
        """The value of a request of ours, or of our reply to one, that this peer fetches."""
        pending = self._pending.get(request)
        if pending is not None and space == _space("request", self._context.id, self._context.incarnation, peer.id):
            return pending.event.payload
        execution = self._executions.get((peer.name, peer.incarnation, request))
        if execution is not None and space == _space("reply", peer.id, peer.incarnation, self._context.id):
            return execution.payload
        return None

    def on_payload(self, key: Key, payload: Buffer | None) -> bool:
        """An addressed value is here, or will not come. Whether it was one of ours."""
        role, owner = self._fetches.pop(key, ("", None))
        if isinstance(owner, _Pending):
            if owner.event.request in self._pending:
                if payload is None:
                    self._complete(owner, "gone")
                else:
                    self._complete(owner, owner.outcome, owner.reply_kind, b"", key[0])
        elif isinstance(owner, _Execution) and payload is not None:
            self._context.emit(owner.execute)
        elif isinstance(owner, _Execution):  # it was not executed: a repeated request may be
            execute = owner.execute
            self._forget_execution((execute.peer, execute.incarnation, execute.request))
        return bool(role)

    def _forget_execution(self, key: tuple[str, int, int]) -> None:
        execution = self._executions.pop(key, None)
        self._remembered_bytes -= execution.size if execution is not None else 0

    # Time and peers.

    def forget(self, name: str) -> None:
        """A peer left or died: our requests to it fail, its own are of no interest."""
        for pending in [pending for pending in self._pending.values() if pending.event.peer == name]:
            self._complete(pending, "gone")
        for key in [key for key in self._executions if key[0] == name]:
            self._forget_execution(key)
        for life in [life for life in self._awaited if life[0] == name]:
            del self._awaited[life]
            self._asked.pop(life, None)

    def tick(self) -> None:
        """Deadlines and resends."""
        now = self._context.now
        for pending in list(self._pending.values()):
            if now >= pending.event.deadline_ns:
                self._complete(pending, "timeout")
            elif now >= pending.retry.due_ns:
                self._resend(pending)

    def next_deadline_ns(self) -> int | None:
        """When a request is due."""
        dues = (min(pending.retry.due_ns, pending.event.deadline_ns) for pending in self._pending.values())
        return min(dues, default=None)

    def check_invariants(self) -> None:
        """Assert the sum of what is remembered (I7)."""
        assert self._remembered_bytes == sum(execution.size for execution in self._executions.values())
