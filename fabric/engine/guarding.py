"""The mutation guard: finds values that change after they were published, and says where in the program that was.

What was published lies in memory that nobody can write through any object of Python's (`freeze` refuses as long as
one is left). What is left are addresses: of ctypes, of extensions, of a kernel that still runs. So the guard sums a
value when it is published, and again when the last view of it is given up; it costs nothing until it is switched on.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from fabric.config import Guard
from fabric.core.wire import SAMPLE_BLOCKS, checksum_of
from fabric.engine.filling import Frozen, Room, freeze
from fabric.errors import MutationError
from fabric.payloads import BufferPlan, Plan, sampled_sum

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from fabric.engine.loop import Engine
    from fabric.engine.outbox import Outbox

__all__ = ["Guarding", "Origin", "publishing_line"]

Block = np.ndarray[Any, Any]

log = logging.getLogger("fabric.guard")


class Origin(NamedTuple):
    """Who published a value, and where: `line` is `file:line`."""

    topic: str
    seed: int
    line: str
    guard: Guard


def publishing_line() -> str:
    """The line of the program that called the fabric, as `file:line`."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] == "fabric" and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class _Ended(weakref.ref[Block]):
    """Tells that the last view of a watched value died. Its callback is `deque.append` itself: no lock, no Python."""

    __slots__ = ("origin", "total", "view")

    origin: Origin
    total: int
    view: memoryview


class Guarding:
    """The values of one member that are watched, and what was found."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watched: dict[int, _Ended] = {}
        self.ended: deque[_Ended] = deque()
        """Bounded by what is retained and looked at."""
        self._told: set[str] = set()
        """Lines of the program that were logged: there are only so many."""

    # What is published.

    def guarded(self, outbox: Outbox, planned: Plan, room: Room, seed: int) -> Frozen:
        """A snapshot that was just taken, watched from now on.

        Raises `MutationError` if another thread changed the value meanwhile; under `sample` that is told, and the
        snapshot stands: its checksum is its own.
        """
        origin = Origin(outbox.topic, seed, publishing_line(), outbox.guard)
        is_same = _is_same(planned, room.view, origin.guard)
        frozen = self.watch(freeze(room), origin)
        if not is_same:
            self._engine.counts["mutations_found"] += 1
            detail = "another thread changed it while it was copied"
            if origin.guard is Guard.STRICT:
                raise MutationError(detail, topic=origin.topic, seed=seed, line=origin.line)
            self.tell(origin, detail)
        return frozen

    def tell(self, origin: Origin, detail: str, level: int = logging.WARNING) -> None:
        """Log it, once for each line of the program."""
        if origin.line not in self._told:
            self._told.add(origin.line)
            log.log(level, "%s, seed %d, published at %s: %s", origin.topic, origin.seed, origin.line, detail)

    def watch(self, frozen: Frozen, origin: Origin) -> Frozen:
        """The same bytes; when the last view of what is returned dies, they are compared."""
        # An owner of its own, and not a slice of another array: numpy lets views of a slice refer to that array.
        owner = np.frombuffer(frozen.view, np.uint8)
        reference = _Ended(owner, self.ended.append)
        reference.view, reference.origin, reference.total = frozen.view, origin, _sum(frozen.view, origin.guard)
        self._watched[id(reference)] = reference
        return Frozen(memoryview(cast("Buffer", owner)), frozen.place)

    # What came of it.

    def look(self) -> None:
        """Compare what nobody looks at any more. Needs the engine's lock."""
        while self.ended:
            reference = self.ended.popleft()
            if self._watched.pop(id(reference), None) is not None:
                self._compare(reference)

    def close(self) -> None:
        """Compare all that is left: nobody is served any more."""
        self.look()
        for reference in list(self._watched.values()):
            self._compare(reference)
        self._watched.clear()

    def _compare(self, reference: _Ended) -> None:
        origin = reference.origin
        if _sum(reference.view, origin.guard) != reference.total:
            self._engine.counts["mutations_found"] += 1
            self.tell(origin, "it was changed after it was published", logging.ERROR)


def _sum(view: memoryview, guard: Guard) -> int:
    return checksum_of(view) if guard is Guard.STRICT else sampled_sum(view, SAMPLE_BLOCKS)


def _is_same(planned: Plan, blob: memoryview, guard: Guard) -> bool:
    """Whether a value still is what its copy is; unknown, so yes, if it does not lie as one piece of memory."""
    if not isinstance(planned, BufferPlan):
        return True
    elements = planned.source.plain()
    return elements is None or _sum(elements, guard) == _sum(blob[len(planned.head) :], guard)
