"""Requests of ours: issued, waited for, and turned into a reply or an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgpack

from fabric.core import events
from fabric.engine.dispatch import pack_value
from fabric.engine.loop import Engine
from fabric.engine.steps import Steps, Wait
from fabric.errors import (
    ConfigError,
    FabricError,
    RemoteFailureError,
    RequestError,
    RequestTimeoutError,
    UnknownPeerError,
    shortened,
)
from fabric.message import Reply
from fabric.payloads import pack_metadata

__all__ = ["Question", "Requests"]

METHOD_BYTES_MAX = 255
"""Longest name of a method."""
S = 1_000_000_000
PRIORITIES = {"high": 0, "normal": 1, "low": 2}
GRACE_S = 0.05
"""The core ends a request at its deadline and says whether it was accepted; whoever waits gives it this much longer."""


class Question(NamedTuple):
    """What is asked, whomever it is asked."""

    method: str
    value: object
    timeout_s: float
    priority: str
    metadata: Mapping[str, object] | None


class _Waiting:
    """A request of ours that somebody waits for."""

    __slots__ = ("name", "number", "outcome", "payload")

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name
        self.outcome: events.CompleteRequest | None = None
        self.payload: memoryview | None = None


class Requests:
    """All requests of one member that wait for their replies. Thread-safe."""

    def __init__(self, engine: Engine, numbers: Iterator[int]) -> None:
        self._engine, self._numbers = engine, numbers
        self._waiting: dict[int, _Waiting] = {}
        engine.on_complete = self._complete
        self._issuing = threading.Lock()

    def asking(self, question: Question, to: int | str) -> Steps[Reply]:
        """The steps of `Fabric.request`."""
        waiting = self._issue(question, to, self._deadline_ns(question))
        try:
            yield Wait(lambda: waiting.outcome is not None, max(0.0, question.timeout_s) + GRACE_S, serving=True)
            return self._result(waiting, question)
        finally:
            self._forget(waiting)

    def asking_all(self, question: Question, ranks: Sequence[int]) -> Steps[dict[int, Reply | FabricError]]:
        """The steps of `Fabric.request_all`."""
        deadline_ns = self._deadline_ns(question)
        results: dict[int, Reply | FabricError] = {}
        issued: dict[int, _Waiting] = {}
        try:
            for rank in ranks:
                try:
                    issued[rank] = self._issue(question, rank, deadline_ns)
                except UnknownPeerError as error:
                    results[rank] = error
            under_way = list(issued.values())
            yield Wait(
                lambda: all(one.outcome is not None for one in under_way), self._left_s(deadline_ns), serving=True
            )
            for rank, waiting in issued.items():
                try:
                    results[rank] = self._result(waiting, question)
                except RequestError as error:
                    results[rank] = error
        finally:
            for waiting in issued.values():
                self._forget(waiting)
        return {rank: results[rank] for rank in ranks}

    def _deadline_ns(self, question: Question) -> int:
        return self._engine.clock() + int(question.timeout_s * S)

    def _left_s(self, deadline_ns: int) -> float:
        return max(0.0, (deadline_ns - self._engine.clock()) / S) + GRACE_S

    def _issue(self, question: Question, to: int | str, deadline_ns: int) -> _Waiting:
        engine = self._engine
        engine.require_open()
        method, value, _, priority, metadata = question
        if priority not in PRIORITIES:
            raise ConfigError(f"{priority!r} is none of {', '.join(PRIORITIES)}", field="priority")
        if len(self._waiting) >= engine.config.requests.pending_max:
            raise ConfigError(f"{len(self._waiting)} requests wait already", field="requests.pending_max")
        check_method(method)
        name = self._name_of(to)
        kind, blob, payload = pack_value(value, limit=engine.config.inboxes.payload_bytes_max)
        packed = pack_metadata(metadata) if metadata else b""
        with self._issuing:  # the core is told in the order of the numbers
            number = next(self._numbers)
            waiting = self._waiting[number] = _Waiting(number, name)
            level = PRIORITIES[priority]
            engine.submit_later(
                events.RequestIssued(number, name, method, level, deadline_ns, kind, packed, blob, payload)
            )
        engine.push()
        return waiting

    def _name_of(self, to: int | str) -> str:
        name = to if isinstance(to, str) else f"rank-{to}"
        known = self._engine.core.members.by_name
        if name not in known:
            raise UnknownPeerError(peer=to, known=shortened(sorted(known)))
        return name

    def _complete(self, complete: events.CompleteRequest, payload: memoryview | None) -> None:
        waiting = self._waiting.get(complete.request)
        if waiting is not None:
            waiting.payload, waiting.outcome = payload, complete

    def _forget(self, waiting: _Waiting) -> None:
        """Nobody waits any more; a request that is still under way is abandoned."""
        if self._waiting.pop(waiting.number, None) is not None and waiting.outcome is None and not self._engine.closed:
            self._engine.submit(events.RequestAbandoned(waiting.number))

    def _result(self, waiting: _Waiting, question: Question) -> Reply:
        outcome, name, method = waiting.outcome, waiting.name, question.method
        if outcome is None or outcome.outcome == "timeout":
            accepted = outcome is not None and outcome.accepted
            state = f"{name} {'had accepted it' if accepted else 'is not known to have accepted it'}"
            raise RequestTimeoutError(
                f"no reply to {method}", waited_s=question.timeout_s, state=state, accepted=accepted
            )
        if outcome.outcome == "gone":
            raise RequestError(f"{name} left or died before it replied to {method}")
        blob = waiting.payload if waiting.payload is not None else memoryview(outcome.blob)
        if outcome.outcome == "failure":
            kind, text = _failure(blob)
            raise RemoteFailureError(text, peer=name, kind=kind)
        return Reply(name, outcome.kind, blob)


def _failure(blob: memoryview) -> tuple[str, str]:
    try:
        kind, text = msgpack.unpackb(blob, raw=False)
        return str(kind), str(text)
    except (ValueError, TypeError):
        return "unknown", "its report cannot be read"


def check_method(method: str) -> str:
    """Return `method`, or raise `ConfigError`: a name of 1 to 255 bytes of text."""
    try:
        size = len(method.encode())
    except (AttributeError, UnicodeEncodeError):
        raise ConfigError(f"{method!r:.80} is no text", field="method") from None
    if not 1 <= size <= METHOD_BYTES_MAX:
        raise ConfigError(f"a method has 1 to {METHOD_BYTES_MAX} bytes, not {size}", field="method")
    return method
