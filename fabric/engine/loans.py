"""Loans: memory that the application writes in place, and that is published as it is when the block is left.

Nothing may write to what was published, and a slot is used again some day. So the tensor that was lent is emptied, and
its memory is frozen, which is refused while any view of it is left. Then what was written is copied once and the copy
is published, or, under a strict guard, nothing is; the memory itself waits until the last of those views is gone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fabric.config import BURST_BYTES_MAX, Guard
from fabric.core.wire import ADDRESSED, RECORD_BYTES
from fabric.engine.filling import Frozen, Room, describe, fill, freeze
from fabric.engine.guarding import Origin
from fabric.engine.many import ROOM
from fabric.engine.steps import Steps
from fabric.errors import ClosedError, MutationError, WrongThreadError
from fabric.payloads import is_referred_to, lend, pack_metadata, plan_loan, plan_snapshot, take_back
from fabric.topics import check_seed

if TYPE_CHECKING:
    from fabric.engine.outbox import Outbox

__all__ = ["LoanBase"]

T = TypeVar("T")

SURVIVED = "something else still refers to what was lent: a view, an array, a variable, or autograd"


class LoanBase:
    """Memory of one publisher in the hand of the application, for one block: what both faces share."""

    def __init__(
        self,
        outbox: Outbox,
        shape: int | Sequence[int],
        dtype: Any,  # noqa: ANN401 - numpy's or torch's
        seed: int,
        metadata: Mapping[str, object] | None,
        line: str,
    ) -> None:
        outbox._require_open()
        self._outbox = outbox
        self._origin = Origin(outbox.topic, check_seed(seed), line, outbox.guard)
        self._packed = pack_metadata(metadata) if metadata else b""
        self._form = plan_loan(shape, dtype, outbox._limit)
        self._owner: threading.Thread | None = None
        self._room: Room | None = None
        self.value: Any = None
        """What was lent, while it is."""
        self.sequence: int | None = None
        """Its sequence in its lane, once it is published."""

    @property
    def _is_small(self) -> bool:
        """Whether it travels in a burst, with others."""
        return self._form.size + len(self._packed) + RECORD_BYTES <= BURST_BYTES_MAX

    # The block.

    def _begin(self) -> Any:  # noqa: ANN401 - an array or a tensor
        """Lend. Raises `ClosedError` the second time."""
        outbox, size = self._outbox, self._form.size
        outbox._require_open()
        if self._owner is not None:
            raise ClosedError(what="a loan that was entered before")
        self._owner = threading.current_thread()
        placed = None
        if outbox.durability is None and not self._is_small:
            placed = outbox.engine.sharing.take(outbox.feed, size)
        self._room = placed[0] if placed is not None else outbox.engine.pool.take(size)
        self.value = lend(self._form, self._room.view)
        return self.value

    def _check_owner(self) -> None:
        if threading.current_thread() is not self._owner:
            owner = self._owner.name if self._owner is not None else "nobody"
            raise WrongThreadError(owner=owner, caller=threading.current_thread().name)

    def _cancel(self) -> None:
        """Publish nothing; the memory comes back once nobody looks at it."""
        self._check_owner()
        room, self._room = self._room, None
        if room is None:
            return
        self._take_back()
        if not self._outbox.engine.forked_in:
            room.release()

    def _take_back(self) -> bool:
        """Empty what was lent; False if that would hide that somebody still has its memory."""
        is_alone = not is_referred_to(self)
        if is_alone:
            take_back(self.value)
        self.value = None
        return is_alone

    # The steps of leaving it.

    def _giving(self) -> Steps[None]:
        """Publish what was written."""
        self._check_owner()
        try:
            self._outbox._require_open()
            frozen, descriptor = self._settle()
        except BaseException:
            self._cancel()
            raise
        self.sequence = yield from self._publishing(frozen, descriptor)

    def _settle(self) -> tuple[Frozen, bytes]:
        """The value where nobody can write to it any more, and its descriptor if that is known."""
        room = self._room
        assert room is not None, "a loan is left once"
        if self._take_back():
            try:
                frozen = freeze(room)
            except BufferError:
                pass  # a view of it is left
            else:
                self._room = None
                return frozen, b""
        return self._snapshot(room)

    def _snapshot(self, room: Room) -> tuple[Frozen, bytes]:
        """A copy, because somebody may still write. Raises `MutationError` under a strict guard."""
        engine, origin = self._outbox.engine, self._origin
        if origin.guard is Guard.STRICT:
            raise MutationError(SURVIVED, topic=origin.topic, seed=origin.seed, line=origin.line)
        engine.counts["loans_copied"] += 1
        level = logging.WARNING if origin.guard is Guard.SAMPLE else logging.DEBUG
        engine.guarding.tell(origin, f"{SURVIVED}; a copy was published", level)
        if self._is_small:
            filled, descriptor = Frozen(memoryview(bytes(room.view))), b""
        else:
            feed = self._outbox.feed if self._outbox.durability is None else None
            copy, _, descriptor = fill(engine, plan_snapshot(self._form, room.view), feed)
            filled = freeze(copy)
        self._room = None
        room.release()
        return filled, descriptor

    def _publishing(self, frozen: Frozen, descriptor: bytes) -> Steps[int]:
        outbox, origin, kind, size = self._outbox, self._origin, self._form.kind, self._form.size
        if outbox.durability is not None:
            return (yield from outbox.durability.publishing_loan(kind, frozen, origin.seed, self._packed))
        if self._is_small:
            room = outbox._room_for(size + len(self._packed) + RECORD_BYTES)
            record = kind, bytes(frozen.view), origin.seed, self._packed
            sequence, _ = yield from self._entering(outbox._take_small, room, *record)
            return sequence
        blocks = outbox.engine.sharing.blocks_for(outbox.feed) if frozen.place is not None else 0
        descriptor = descriptor or describe(frozen, blocks)
        if origin.guard is not Guard.OFF:
            frozen = outbox.engine.guarding.watch(frozen, origin)
        place = frozen, None, kind | ADDRESSED, origin.seed, descriptor, self._packed
        sequence = yield from self._entering(outbox._take_addressed, ROOM + size, *place)
        outbox._record_bytes = size
        outbox._pace(size)
        return sequence

    def _entering(self, take: Callable[..., T | None], room: int, *record: Any) -> Steps[T]:  # noqa: ANN401 - the taker's
        """Into a burst, once there is room. Raises `QueueFullError`: nothing was taken."""
        outbox = self._outbox
        while (taken := outbox._alone(take, *record)) is None:
            yield from outbox._making_room(room)
        outbox.engine.push()
        return taken
