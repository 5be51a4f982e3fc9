"""Closing with state: what is still owed is written down, and the next life serves it (DESIGN section 4, RULES P7, S7).

A feed whose rest is on disk is named there once more, with its end: so its end is exact, whatever its policy. A disk
that takes nothing more is not waited for; what it did not take ends with this life.
"""

from __future__ import annotations

from fabric.config import Policy
from fabric.core.disk import AppendRecords, WriteFailed
from fabric.core.feeds import OutFeed, Place, Retention
from fabric.core.members import Context
from fabric.core.saving import Saving
from fabric.core.spilling import Spilling

__all__ = ["Keeping"]


class Keeping:
    """The last writes of a life."""

    def __init__(self, context: Context, retention: Retention, spilling: Spilling, saving: Saving) -> None:
        self._context, self._retention, self._spilling, self._saving = context, retention, spilling, saving
        self._waiting: list[OutFeed] = []
        """Feeds whose bursts are being written."""
        self._naming: dict[int, OutFeed] = {}
        self._has_begun = False

    @property
    def is_over(self) -> bool:
        """Whether everything that will be written down is."""
        return self._has_begun and not (self._waiting or self._naming or self._saving.is_writing)

    def begin(self, feeds: list[OutFeed]) -> None:
        """Write down what these owe. A second time it is over already."""
        if self._has_begun:
            return
        self._has_begun = True
        self._saving.save_positions()
        for out in feeds:
            if out.readers and out.policy is Policy.RELIABLE:
                self._waiting.append(out)
                self._retention.spill_rest(out)
            elif out.policy is Policy.DURABLE:
                out.is_written_down = out.is_named
        self._spilling.write_all()
        self.go_on()

    def go_on(self) -> None:
        """The disk answered. Once it has the bursts, or has refused some, feeds that are whole there are named."""
        if not self._waiting or self._spilling.is_writing:
            return
        for out in self._waiting:
            if all(burst.place is Place.DISK for burst in out.owed):
                number = self._context.next_write()
                self._naming[number] = out
                self._context.emit(
                    AppendRecords(number, out.topic, out.feed, out.end, 0, b"", policy=out.policy.value, sync="closed")
                )
        self._waiting.clear()

    def finished(self, number: int) -> None:
        """All writes up to this one are over."""
        for other in [other for other in self._naming if other <= number]:
            self._naming.pop(other).is_written_down = True
        self.go_on()

    def on_failed(self, event: WriteFailed) -> None:
        """The disk refused."""
        for number in self._naming.keys() & range(event.first, event.number + 1):
            del self._naming[number]
        self.go_on()
