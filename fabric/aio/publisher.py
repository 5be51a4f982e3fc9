"""The publisher's face, awaited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from fabric.aio.driving import LoopDriver, running_loop
from fabric.config import Policy, WhenFull
from fabric.engine.columns import Int64s
from fabric.engine.guarding import publishing_line
from fabric.engine.loans import LoanBase
from fabric.engine.many import Many
from fabric.engine.outbox import ROW
from fabric.publisher import PublisherBase

__all__ = ["Loan", "LoopOutbox", "Publisher"]


class _NoRoom(Exception):
    """There is no room for so many bytes now: for the face, which waits for it."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.room = room


class LoopOutbox(PublisherBase):
    """An outbox whose waiting is left to the loop."""

    flooding = False

    def _wait_for_room(self, room: int) -> None:
        raise _NoRoom(room)

    def _give_way(self) -> None:
        self.flooding = True


class Loan(LoanBase):
    """Memory of a publisher for one block; see `Publisher.loan`."""

    def __init__(
        self,
        publisher: Publisher,
        shape: int | Sequence[int],
        dtype: Any,  # noqa: ANN401 - numpy's or torch's
        seed: int,
        metadata: Mapping[str, object] | None,
        line: str,
    ) -> None:
        super().__init__(publisher._outbox, shape, dtype, seed, metadata, line)
        self._publisher = publisher

    async def __aenter__(self) -> Any:  # noqa: ANN401 - an array or a tensor
        self._publisher._driver.check()
        return self._begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self._publisher._driver.run(self._giving())
            await self._publisher._relax()
        else:
            self._cancel()


class Publisher:
    """One topic of this member. It belongs to the loop of its fabric."""

    def __init__(self, driver: LoopDriver, outbox: LoopOutbox) -> None:
        self._driver, self._outbox = driver, outbox

    async def _relax(self) -> None:
        """Now and then let others run, and give way to readers that fall behind."""
        if self._outbox.flooding:
            self._outbox.flooding = False
            await self._driver.run(self._outbox._giving_way())
        await self._driver.breathe()

    async def publish(self, value: object, *, seed: int = 0, metadata: Mapping[str, object] | None = None) -> int:
        """Publish a snapshot of `value` in the lane of `seed`; returns its sequence in that lane.

        Returns when the record is in retention; the snapshot is taken then. Raises `QueueFullError` (nothing was
        taken), `UnsupportedValueError`, `PayloadTooLargeError`, `SeedError`, `ClosedError`, `BrokenError`,
        `WrongProcessError`, `WrongThreadError`.
        """
        outbox, driver = self._outbox, self._driver
        if running_loop() is not driver.loop:
            driver.check()
        if outbox.durability is not None:
            return await driver.run(outbox.durability.publishing(value, seed, metadata))
        while True:
            try:
                sequence = outbox.publish(value, seed=seed, metadata=metadata)
                break
            except _NoRoom as full:
                room = full.room
            await driver.run(outbox._making_room(room))
        if len(outbox.rows) <= ROW:  # once in a burst
            await self._relax()
        return sequence

    async def publish_many(self, values: Any, *, seeds: Any) -> list[int] | Int64s:  # noqa: ANN401 - any sequences
        """Publish each of `values` in the lane of the seed beside it; returns their sequences.

        The rows of an array or tensor are values, as `publish` would take them, and their sequences come as an array.
        Raises as `publish`; then those before it were taken. `ValueError`: there are not as many seeds as values.
        """
        self._driver.check()
        outbox = self._outbox
        many = Many(outbox, values, seeds)
        while not many.is_over:
            try:
                if outbox.durability is not None:
                    await self._driver.run(many.publishing(outbox.durability))
                else:
                    many.go_on()
            except _NoRoom as full:
                room = full.room
            else:
                await self._relax()
                continue
            await self._driver.run(outbox._making_room(room))
        return many.sequences

    def loan(
        self,
        shape: int | Sequence[int],
        dtype: Any,  # noqa: ANN401 - numpy's or torch's
        *,
        seed: int = 0,
        metadata: Mapping[str, object] | None = None,
    ) -> Loan:
        """Lend memory to be written in place: a tensor (torch dtype) or array (numpy dtype), published without a copy.

        `async with publisher.loan((1024, 1024), torch.float32) as t:` gives `t` with unknown content, in shared memory
        where subscribers of this host read it; leaving the block numbers and publishes it, as `publish(t)` would have,
        and `loan.sequence` tells. An exception publishes nothing. Either way `t` is emptied: it has no elements any
        more. What is written to a tensor later goes nowhere, to an array it raises `ValueError`.

        What refers to `t` then, or to a part of it, could still write: a view, a second variable, an array over it,
        autograd. So the value is copied once and the copy published, counted as `loans_copied` and told at debug level;
        `t` keeps its memory, which nobody else will ever see. With `guard="sample"` that is a warning; with
        `guard="strict"` leaving raises `MutationError`, and nothing is taken. What writes to the address that
        `data_ptr()` gave is seen by the guard alone, see `Fabric.publisher`, and by whoever reads.

        Raises as `publish`, `UnsupportedValueError` for a dtype or shape that cannot travel, `PayloadTooLargeError`;
        `ClosedError` when it is entered twice, `WrongThreadError` when another thread leaves it.
        """
        return Loan(self, shape, dtype, seed, metadata, publishing_line())

    async def wait_for_subscribers(self, n: int, *, timeout_s: float = 60.0) -> None:
        """Until `n` owed subscriptions of other members are registered: each receives the record published next.

        Raises `WaitTimeoutError`.
        """
        await self._driver.run(self._outbox._awaiting_subscribers(n, timeout_s))

    async def flush(self, *, timeout_s: float = 5.0) -> None:
        """Until all that was published is acknowledged by the owed subscriptions of other members.

        Raises `WaitTimeoutError`.
        """
        await self._driver.run(self._outbox._flushing(timeout_s))

    def handled_by(self, offset: int) -> dict[str, bool]:
        """Whether each owed subscriber of another member has handled the record at this offset."""
        return self._outbox.handled_by(offset)

    @property
    def topic(self) -> str:
        """Its topic."""
        return self._outbox.topic

    @property
    def policy(self) -> Policy:
        """What it promises."""
        return self._outbox.policy

    @property
    def when_full(self) -> WhenFull:
        """What happens when what is owed has used up its room."""
        return self._outbox.when_full

    @property
    def next(self) -> int:
        """The offset of the next record."""
        return self._outbox.next

    def __repr__(self) -> str:
        return repr(self._outbox)
