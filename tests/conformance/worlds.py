"""Members of one kind of transport that a test can open, and how they meet, fill their pipes and collect."""

from __future__ import annotations

import select
from collections.abc import Callable
from contextlib import suppress

from tests.harness.waiting import until
from transports.base import (
    Buffer,
    Inbound,
    Link,
    SendBlockedError,
    SocketLimits,
    Transport,
)

SMALL = SocketLimits(data_frames=8, control_frames=8, bulk_frames=4)
"""Queues that a test can fill."""

Opener = Callable[[str, SocketLimits], Transport]


class World:
    """Members of one kind of transport; closes them all at the end."""

    def __init__(self, opener: Opener, limits: SocketLimits | None = None) -> None:
        self._opener = opener
        self._limits = limits or SocketLimits()
        self.members: list[Transport] = []

    def open(self, name: str) -> Transport:
        member = self._opener(name, self._limits)
        self.members.append(member)
        return member

    def pair(self) -> tuple[Transport, Transport]:
        """Two members that reach each other on CONTROL and BULK, `a` and `b`."""
        a, b = self.open("a"), self.open("b")
        a.connect("b", b.endpoints)
        b.connect("a", a.endpoints)
        meet(a, "b", b)
        meet(b, "a", a)
        return a, b

    def close(self) -> None:
        for member in self.members:
            member.close(0)


def send_soon(source: Transport, peer: str, link: Link, frames: list[Buffer]) -> None:
    """Send as soon as the pipe takes it."""

    def attempt() -> bool:
        with suppress(SendBlockedError):
            source.send(peer, link, frames)
            return True
        return False

    until(attempt, what=f"a send to {peer}")


def meet(source: Transport, peer: str, target: Transport) -> None:
    """Wait until both pipes from `source` deliver; what is received meanwhile is dropped."""
    for link in (Link.CONTROL, Link.BULK):
        send_soon(source, peer, link, [b"meet"])
        while all(message.link != link for message in arriving(target)):
            pass


def arriving(target: Transport, limit: int = 64, timeout_s: float = 10.0) -> list[Inbound]:
    """What arrives next, slept for as an engine would sleep."""
    with select.epoll() as epoll:
        epoll.register(target.descriptors()[0], select.EPOLLIN)
        while not (got := target.receive(limit)):
            assert target.is_ready() or epoll.poll(timeout_s), f"nothing arrived within {timeout_s} s"
    return got


def collect(target: Transport, count: int, limit: int = 64) -> list[Inbound]:
    """Exactly `count` messages, and then nothing more at once."""
    got: list[Inbound] = []
    while len(got) < count:
        got += arriving(target, limit)
    got += target.receive(limit)
    assert len(got) == count
    return got


def fill(source: Transport, put: Callable[[], object]) -> None:
    """Repeat `put` until it is refused, and no room comes within 0.2 s: all buffers on the way are full."""
    with select.epoll() as epoll:
        epoll.register(source.descriptors()[0], select.EPOLLIN)
        for _ in range(2_000):
            try:
                put()
            except SendBlockedError:
                while not source.is_ready():
                    if not epoll.poll(0.2):
                        return
                assert source.unblocked()
    raise AssertionError("the pipe takes everything")


def follow(source: Transport, target: Transport, prefix: bytes) -> None:
    """Subscribe, and wait until the subscription has arrived: a frame with the prefix came through."""
    target.subscribe(prefix)
    probe = prefix + b"\0probe"

    def arrived() -> bool:
        source.flush_subscriptions()
        source.broadcast(probe)
        return bool(target.receive(64))

    until(arrived, what="the subscription")
    source.broadcast(prefix + b"\0last")
    while all(message.frames != [prefix + b"\0last"] for message in arriving(target)):
        pass  # probes that were on their way


def bodies(messages: list[Inbound]) -> list[bytes]:
    return [b"|".join(bytes(frame) for frame in message.frames) for message in messages]
