"""Writing down who is owed what: before a registration is confirmed, and now and then as positions move (RULES P3)."""

from __future__ import annotations

from collections.abc import Callable

from fabric.core.disk import SaveRegistrations, WriteFailed
from fabric.core.members import Context, S
from fabric.core.registrations import Registration, Registrations

__all__ = ["Saving"]

SAVE_NS = 5 * S
"""Acknowledged positions are saved so often: who begins again after both sides died gets at most so much twice."""


class Saving:
    """The registrations on disk, of a member with state."""

    def __init__(
        self, context: Context, registrations: Registrations, position_of: Callable[[Registration, int], int]
    ) -> None:
        self._context, self._registrations, self._position_of = context, registrations, position_of
        self._writes: dict[int, list[Registration]] = {}
        """Under way, by number, and who is confirmed once they are over."""
        self._due_ns, self._last = 0, b""

    def begin(self) -> None:
        """There is state."""
        self._due_ns = self._context.now + SAVE_NS

    def is_due(self, registration: Registration) -> bool:
        """Whether this one has to be written down before it is confirmed."""
        if not self._registrations.persists or registration.best_effort:
            return False
        return registration.saved < 0 or (self._registrations.changed and not registration.saved)

    def save(self, registration: Registration) -> None:
        """Write down who is owed what; then this one may be confirmed."""
        registration.saved = self._write(self._registrations.pack(self._position_of), [registration])

    def save_positions(self) -> None:
        """Write down what moved since."""
        packed = self._registrations.pack(self._position_of)
        self._due_ns = self._context.now + SAVE_NS
        if packed != self._last:
            self._write(packed, [])

    @property
    def is_writing(self) -> bool:
        """Whether the disk has still to answer."""
        return bool(self._writes)

    def tick(self) -> None:
        """Now and then."""
        if self._registrations.persists and self._context.now >= self._due_ns:
            self.save_positions()

    def _write(self, packed: bytes, confirming: list[Registration]) -> int:
        number = self._context.next_write()
        self._writes[number], self._last = confirming, packed
        self._due_ns = self._context.now + SAVE_NS
        outlives = any(registration.name for registration in self._registrations)
        self._context.emit(SaveRegistrations(number, packed, outlives))
        return number

    def finished(self, number: int) -> list[Registration]:
        """All writes up to this one are over: who is confirmed."""
        confirmed = []
        for other in [other for other in self._writes if other <= number]:
            for registration in self._writes.pop(other):
                if registration.saved == other:
                    registration.saved = 0
                    confirmed.append(registration)
        return confirmed

    def on_failed(self, event: WriteFailed) -> None:
        """The disk refused. Who waits to be confirmed asks again."""
        for number in self._writes.keys() & range(event.first, event.number + 1):
            for registration in self._writes.pop(number):
                registration.saved = -1 if registration.saved == number else registration.saved
            self._last = b""
