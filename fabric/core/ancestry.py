"""The feeds of a topic over the lives of this member: which come after which, and who is owed what of them (RULES P7).

A subscription that was there before this life began is owed the rest of the feeds before, oldest first, and then this
life's. One that names its place in an older feed is owed everything from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fabric.config import Policy
from fabric.core.disk import PastFeed
from fabric.core.feeds import OutFeed, Retention
from fabric.core.registrations import Registration

__all__ = ["Ancestry"]


class Ancestry:
    """Past and present feeds, by number and by topic."""

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self.by_id: dict[int, OutFeed] = {}
        self._by_topic: dict[str, list[OutFeed]] = {}
        """Oldest first."""

    def add(self, out: OutFeed) -> None:
        """The youngest feed of its topic."""
        self.by_id[out.feed] = out
        self._by_topic.setdefault(out.topic, []).append(out)

    def restore(self, past: PastFeed) -> None:
        """A feed of an earlier life, with what the disk has of it."""
        out = OutFeed(past.feed, past.topic, Policy(past.policy), past.incarnation)
        out.exact, out.closed, out.is_named = past.exact, True, True
        for first, end, size in past.bursts:
            if first >= out.end:
                self._retention.append_written(out, first, end, size)
        out.end = max(out.end, past.end)
        self.add(out)

    def matching(self, registration: Registration) -> list[list[OutFeed]]:
        """The feeds of each topic that a subscription matches, oldest first."""
        return [line for topic, line in self._by_topic.items() if registration.pattern.matches(topic)]

    def past(self) -> list[OutFeed]:
        """All feeds of earlier lives."""
        return [out for out in list(self.by_id.values()) if out.is_past]

    def before(self, registration: Registration, out: OutFeed) -> int:
        """The incarnation of the feed of the same topic that this subscription is owed first; 0 if none."""
        line = self._by_topic[out.topic]
        older = [other.incarnation for other in line if other.incarnation < out.incarnation]
        return max((one for one in older if self._owes(registration, line, one)), default=0)

    @staticmethod
    def _owes(registration: Registration, line: Iterable[OutFeed], incarnation: int) -> bool:
        return any(other.incarnation == incarnation and other.feed in registration.joins for other in line)

    @staticmethod
    def starts(registration: Registration, line: list[OutFeed], stated: Mapping[int, int]) -> dict[int, int]:
        """Where a new session of a subscription begins in each of these feeds of one topic; in others it does not.

        What it states itself counts, even if it is less than we knew (S2). What lies before that is settled. Where it
        states nothing, it begins where the session before it stood.
        """
        joins = registration.joins
        stood = {out.feed: out.readers.get(registration.reader, joins.get(out.feed, 0)) for out in line}
        named = max((at for at, out in enumerate(line) if out.feed in stated), default=None)
        if named is not None:
            first = line[named].feed
            return {first: stated[first]} | {out.feed: stood[out.feed] for out in line[named + 1 :]}
        if registration.since:
            return {
                out.feed: stood[out.feed] for out in line if out.feed in joins or out.incarnation >= registration.since
            }
        youngest = line[-1]
        if youngest.is_past:
            return {}
        return {youngest.feed: 0 if registration.from_start else youngest.join_offset(registration.start)}
