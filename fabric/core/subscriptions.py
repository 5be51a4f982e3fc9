"""One subscription of ours: what it wants, what it follows, and where it stands in all feeds."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from fabric.config import Delivery, Policy
from fabric.core.cursors import Cursor, Place
from fabric.core.events import SubscriptionOpened
from fabric.core.guards import Retry
from fabric.core.lanes import InboundFeed
from fabric.core.rooms import Room
from fabric.core.wire import feed_id

__all__ = ["Key", "Row", "Subscription"]

Key: TypeAlias = tuple[str, str]
"""Source and topic."""


ENDED_MAX = 100_000
"""Topics of which the newest settled feed is remembered; as many as a subscription may follow."""


class Row(NamedTuple):
    """A feed as its publisher names it to a subscription."""

    feed: int
    topic: str
    policy: str
    join: int
    end: int
    first_available: int
    incarnation: int
    before: int
    """The incarnation whose feed of this topic comes first; 0: none."""
    ending: int
    """0: it goes on. 1: it ended at `end`. 2: so much of it is known."""
    kept: bool = False
    """Whether its publisher closed, and wrote down what was missing."""

    @property
    def outlives(self) -> bool:
        """Whether the next life of its publisher will name it again: it is on disk."""
        return self.policy == Policy.DURABLE or self.ending > 0 or self.kept


class Finished(NamedTuple):
    """A feed that is settled, of which the application has not committed the end."""

    key: Key
    incarnation: int
    end: int


class Subscription:
    """Its state. `confirmed`: the peers whose registration is complete, in their current life."""

    __slots__ = (
        "asked",
        "between",
        "committed",
        "confirmed",
        "delivery",
        "ended",
        "feeds",
        "later",
        "name",
        "number",
        "pattern",
        "places",
        "room",
        "seeds",
        "start",
        "told",
        "uncommitted",
    )

    def __init__(self, event: SubscriptionOpened, room: Room) -> None:
        self.number, self.pattern, self.seeds, self.room = event.subscription, event.pattern, event.seeds, room
        self.start, self.delivery, self.name = event.start, event.delivery, event.name
        self.feeds: dict[Key, InboundFeed] = {}
        """The incarnation that is being settled."""
        self.later: dict[Key, dict[int, Row]] = {}
        """Feeds of newer incarnations, by those, until the current one is settled (S7)."""
        self.between: set[Key] = set()
        """A durable feed is settled to its end, and its publisher's next life has not named one that follows."""
        self.confirmed: dict[str, int] = {}
        self.told: dict[str, set[int]] = {}
        """The feeds that each peer has named since we last met it."""
        self.asked: dict[str, tuple[Retry, bool]] = {}
        """Peers that have not confirmed: when to ask again, and whether to begin at offset 0."""
        self.places: dict[Key, Place] = dict(event.cursor or {})
        """Where we stand in what is not followed: the application's cursor at first, later what is settled."""
        self.ended: dict[Key, int] = {}
        """The newest incarnation that is settled to its end."""
        self.committed: dict[Key, Place] | None = None if event.cursor is None else dict(event.cursor)
        """What the application saved; None: it does not say, and what is handled counts."""
        self.uncommitted: dict[int, Finished] = {}
        """By feed."""

    def passed(self, key: Key) -> int:
        """The newest incarnation that is settled to its end, or begun: no older one is wanted."""
        current, place = self.feeds.get(key), self.places.get(key)
        if current is not None:
            return current.incarnation
        return max(self.ended.get(key, 0), place.incarnation - 1 if place else 0)

    def unfinished(self, key: Key) -> Place | None:
        """The place that the application's cursor names, while we have not come back to its feed."""
        place = self.places.get(key)
        return place if place is not None and self.ended.get(key, 0) < place.incarnation else None

    def disown(self, key: Key) -> None:
        """The place that the application's cursor names is none."""
        assert self.committed is not None, "only a cursor names a place to which we have not come"
        del self.places[key]
        self.committed.pop(key, None)

    def stands_at(self, source: str) -> bool:
        """Whether it has a place in some feed of this publisher."""
        return any(name == source for name, _ in self.places)

    def next_row(self, key: Key) -> Row | None:
        """The feed that follows, once the current one is settled; taken out."""
        rows = self.later.get(key, {})
        incarnation = min(rows, default=0)
        if not rows or rows[incarnation].before > self.ended.get(key, 0):
            return None
        row = rows.pop(incarnation)
        if not rows:
            del self.later[key]
        return row

    def keep_rows(self, feeds: set[int]) -> None:
        """Of feeds that we have not come to, these outlive their publisher."""
        for rows in self.later.values():
            for incarnation, row in rows.items():
                if row.feed in feeds:
                    rows[incarnation] = row._replace(kept=True)

    def end(self, inbound: InboundFeed) -> None:
        """A feed is settled to its end."""
        key = inbound.source, inbound.topic
        del self.feeds[key]
        self.ended.pop(key, None)
        self.ended[key] = inbound.incarnation  # the last to end stands last
        self.places[key] = Place(inbound.incarnation, inbound.floor)
        if len(self.ended) > ENDED_MAX:
            oldest = next(iter(self.ended))
            del self.ended[oldest], self.places[oldest]
        if self.committed is not None and not inbound.best_effort:
            self.uncommitted[inbound.feed] = Finished(key, inbound.incarnation, inbound.floor)

    def positions(self, source: str) -> list[tuple[int, int]]:
        """What a publisher has to know of where we stand in its feeds: (feed, floor) (S2)."""
        if self.committed is not None:
            places: Cursor = self.committed
        else:
            places = self.cursor()
        return [
            (feed_id(source, place.incarnation, topic), place.floor)
            for (name, topic), place in places.items()
            if name == source
        ]

    def cursor(self) -> Cursor:
        """Where we stand (N6)."""
        following = {
            key: Place(inbound.incarnation, inbound.floor, tuple(inbound.settled))
            for key, inbound in self.feeds.items()
            if not inbound.best_effort
        }
        return self.places | following

    def commit(self, cursor: Cursor) -> list[tuple[Key, int, int]]:
        """The application saved this: (key, feed, floor) of what its publishers may be told. Positions only rise."""
        assert self.committed is not None
        told: list[tuple[Key, int, int]] = []
        for key, place in cursor.items():
            if key in self.committed and place[:2] < self.committed[key][:2]:
                continue
            self.committed[key] = place
            inbound = self.feeds.get(key)
            if inbound is not None and inbound.incarnation == place.incarnation:
                inbound.committed = min(place.floor, inbound.floor)
            told += self._finish_until(key, place)
        return told

    def _finish_until(self, key: Key, place: Place) -> list[tuple[Key, int, int]]:
        told = []
        for feed, finished in list(self.uncommitted.items()):
            if finished.key == key and (finished.incarnation, finished.end) <= place[:2]:
                del self.uncommitted[feed]
                told.append((key, feed, finished.end))
        return told

    def fields(self, source: str, *, from_start: bool) -> tuple[Any, ...]:
        """As REGISTER carries it."""
        return (
            self.number,
            self.pattern,
            self.start.value,
            self.delivery.value,
            from_start,
            [] if self.delivery is Delivery.BEST_EFFORT else self.positions(source)[:1000],
            self.name,
        )
