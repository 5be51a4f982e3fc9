"""The spill, deliberately broken, as `variants.py` does it to the rest of the core. Worlds with a disk catch them."""

from __future__ import annotations

from typing import Any

from fabric.core.feeds import Retention
from fabric.core.spilling import Spilling
from fabric.engine.storing import Storekeeper
from tests.simulation.variants import Patch, Variant, wrapped


def released_too_early() -> list[Patch]:
    """The log forgets what slower subscribers still need."""

    def acknowledge(original: Any, self: Any, out: Any) -> None:
        original(self, out)
        if out.feed in self.released:
            self.released[out.feed] = out.end

    return [wrapped(Retention, "acknowledge", acknowledge)]


def refused_is_written() -> list[Patch]:
    """A burst leaves memory though the disk did not take it."""

    def written(original: Any, self: Any, out: Any, burst: Any, *, done: bool) -> None:
        original(self, out, burst, done=True)

    return [wrapped(Retention, "written", written)]


def released_is_written_again() -> list[Patch]:
    """What the log was told to forget is spilled once more."""

    def acknowledge(original: Any, self: Any, out: Any) -> None:
        original(self, out)
        out.released = 0

    return [wrapped(Retention, "acknowledge", acknowledge)]


def history_has_holes() -> list[Patch]:
    """What is acknowledged on disk is no history, and yet what lies before it is."""
    return [wrapped(Retention, "_forget_kept", lambda original, self, out: None)]


def loaded_is_thrown_away() -> list[Patch]:
    """What was loaded for one question is gone when it is asked again."""

    def on_loaded(original: Any, self: Any, out: Any, bursts: Any) -> None:
        original(self, out, [])

    return [wrapped(Spilling, "on_loaded", on_loaded)]


def damage_is_ignored() -> list[Patch]:
    """A burst that cannot be read is asked for again and again."""

    def on_loaded(original: Any, self: Any, out: Any, bursts: Any) -> None:
        original(self, out, [burst for burst in bursts if burst.frame is not None])

    return [wrapped(Spilling, "on_loaded", on_loaded)]


def nothing_is_let_go() -> list[Patch]:
    """All that was ever loaded stays in memory."""
    return [wrapped(Spilling, "forget", lambda original, self: None)]


def acknowledged_waits_for_the_disk() -> list[Patch]:
    """The queue for the disk holds what nobody needs any more: memory that grows for ever."""

    def acknowledge(original: Any, self: Any, out: Any) -> None:
        before = list(out.unwritten)
        original(self, out)
        out.unwritten.clear()
        out.unwritten.extend(before)

    return [wrapped(Retention, "acknowledge", acknowledge)]


def damage_is_handed_on() -> list[Patch]:
    """What was read is not what was written, and nobody looks."""

    def load(original: Any, self: Any, feed: int, first: int) -> Any:
        burst = original(self, feed, first)
        return burst._replace(frame=b"" if burst.frame is None else burst.frame[:-1])

    return [wrapped(Storekeeper, "_load", load)]


def refused_in_another_order() -> list[Patch]:
    """What is refused goes behind what came after it."""

    def wait(original: Any, self: Any, out: Any, burst: Any) -> None:
        out.unwritten.append(burst)
        self._queue(out)

    return [wrapped(Retention, "_wait_for_disk", wait)]


SPILL_VARIANTS: dict[str, Variant] = {
    variant.__name__: variant
    for variant in (
        released_too_early,
        refused_is_written,
        released_is_written_again,
        history_has_holes,
        loaded_is_thrown_away,
        damage_is_ignored,
        nothing_is_let_go,
        acknowledged_waits_for_the_disk,
        damage_is_handed_on,
        refused_in_another_order,
    )
}
