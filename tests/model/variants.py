"""The model without one of its rules. Each breaks an invariant within a bounded number of schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from tests.model.application import Application
from tests.model.network import Address
from tests.model.publisher import Feed, Publisher, Registration
from tests.model.subscriber import Subscriber
from tests.model.words import Cursor, Key, Record, Row, count_ranges, size

Methods: TypeAlias = Mapping[str, Callable[..., Any]]


# The publisher.


def heartbeat_on_change(self: Any) -> None:
    if getattr(self, "told", None) != self.feed.end:
        self.told = self.feed.end
        Publisher.heartbeat(self)


def number_before_append(self: Publisher, lane: int) -> Record | None:
    room = self.make_room()
    record = Publisher.append(self, lane) if room else None
    self.feed.end += room and record is None
    return record


def number_unsynced(self: Publisher, lane: int) -> Record:
    synced, record = self.feed.synced, Publisher.number(self, lane)
    self.feed.synced = synced if self.world.rng.random() < 0.5 else self.feed.synced
    return record


def released_by_fastest(self: Publisher, key: Key) -> bool:
    positions = [one.positions.get(key[0], key[1] + 1) for one in self.registrations.values()]
    return not positions or max(positions) > key[1]


def past_is_not_owed(self: Publisher, key: Key) -> bool:
    return key[0] < self.life or Publisher.is_acknowledged(self, key)


def within_or_nothing(self: Publisher, records: list[Record], credit: int) -> list[Record]:
    return [one for index, one in enumerate(records) if size(records[: index + 1]) <= credit]


def join_point_moves(self: Publisher, source: Address, *fields: Any) -> None:
    if self.is_open(source) and self.life in self.registrations[source[0]].unproven:
        self.registrations[source[0]].positions[self.life] = self.feed.end
    Publisher.on_register(self, source, *fields)


def acknowledge_any_session(self: Publisher, source: Address, entries: list[Key]) -> None:
    registration = self.registrations.get(source[0])
    for incarnation, floor in entries if registration else ():
        if registration and incarnation in registration.positions:
            registration.positions[incarnation] = max(floor, registration.positions[incarnation])
    Publisher.on_acknowledge(self, source, entries)


def hears_old_sessions(self: Publisher, source: Address, kind: str, body: tuple[Any, ...]) -> None:
    if kind == "acknowledge" and source[1] < self.sessions.get(source[0], 0):
        self.on_acknowledge(source, *body)
    else:
        Publisher.receive(self, source, kind, body)


# Lives: what is told of them.


def begins_where_it_began(self: Any, one: Registration, stated: Key | None, start: str, *, from_start: bool) -> Any:
    """A new session of a subscription with a name begins again where the one before did."""
    began = self.__dict__.setdefault("began", {}).setdefault(id(one), {})
    starts = Publisher.starts(self, one, stated, start, from_start=from_start)
    for incarnation, join in starts.items() if stated is None else ():
        starts[incarnation] = began.setdefault(incarnation, join)
    return starts


def only_this_life(self: Publisher, one: Registration, stated: Key | None, start: str, *, from_start: bool) -> Any:
    starts = Publisher.starts(self, one, stated, start, from_start=from_start)
    return {self.life: starts.get(self.life, 0)}


def restored_as_it_was(self: Publisher, one: Registration, stated: Key | None, start: str, *, from_start: bool) -> Any:
    """What the life before opened after the registrations were saved is missed."""
    starts = Publisher.starts(self, one, stated, start, from_start=from_start)
    if stated is None and one.since:
        return {key: at for key, at in starts.items() if key in one.positions or key == self.life}
    return starts


def unknown_place_is_none(self: Publisher, one: Registration, stated: Key | None, start: str, **_: bool) -> Any:
    """Who stands in a life that is forgotten begins like one that never stood anywhere."""
    place = stated if stated is not None and stated[0] in self.feeds else None
    return Publisher.starts(self, one, place, start, from_start=False)


def begin_unwritten(self: Publisher, name: str, registration: Registration, starts: dict[int, int]) -> None:
    self.enrol(registration, starts)


def names_are_forgotten(self: Publisher, name: str, session: int) -> None:
    if name in self.registrations and self.registrations[name].session < session:
        del self.registrations[name]
    Publisher.meet(self, name, session)


def everything_is_kept(self: Publisher) -> bool:
    """A goodbye says that the next life has the rest, and nothing was written."""
    self.feed.listed = True
    return True


def misses_at_once(self: Subscriber, life: int) -> None:
    """What an older life named is dropped when a newer one is met: that one will name it again."""
    for incarnation in self.later if self.options.level == "memory" else ():
        self.open_gaps.append(((incarnation, 0), (incarnation + 1, 0)))
        self.check.open_gap(self, incarnation)
    self.later.clear()
    Subscriber.welcome(self, life)


def goes_on_with_any(self: Subscriber) -> None:
    """`before` is not looked at."""
    row, life = self.later.get(min(self.later, default=0), (None, 0))
    if row is not None and not self.gone:
        del self.later[row.incarnation]
        self.begin_feed(row if life == self.peer else row._replace(ending=0))


# The subscriber: order, gaps, room.


def ready_by_sequence(self: Any, record: Record) -> bool:
    """The lane is known by the highest sequence settled in this session; a lane not known waits for the floor."""
    settled = [r.sequence for r, _ in self.delivered if r.incarnation == self.incarnation and r.lane == record.lane]
    highest = max(settled, default=-1)
    return record.offset == self.floor or (0 <= highest == record.sequence - 1) or record.sequence == 0


def ready_by_first_seen(self: Any, record: Record) -> bool:
    settled = [r.sequence for r, _ in self.delivered if r.incarnation == self.incarnation and r.lane == record.lane]
    return self.is_settled(record.previous) or not settled


def jumps_to_newest(self: Subscriber, row: Row) -> bool:
    if self.incarnation and row.incarnation > self.incarnation:
        self.begin_feed(row)
        return True
    return Subscriber.add_feed(self, row)


def settled_before_handled(self: Subscriber) -> bool:
    return all(map(self.is_duplicate, range(self.floor, self.known)))


def marker_skips(self: Subscriber, source: Address, nonce: int) -> None:
    Subscriber.on_marker(self, source, nonce)
    if nonce == self.nonce and self.incarnation == self.peer and not self.hand and not self.over:
        self.enter(self.incarnation, self.known)


def newcomer_gives_way(self: Subscriber) -> None:
    while size(self.hold.values()) > self.options.room:
        del self.hold[next(reversed(self.hold))]


def pull_gives_up(self: Subscriber) -> None:
    Subscriber.pull(self)
    missing = [offset for offset in range(self.floor, self.known) if not self.is_duplicate(offset)]
    self.lost.update(offset for offset in missing if self.world.rng.random() < 0.02)


def window_only(self: Subscriber) -> int:
    return self.options.credit + self.options.room


def window_stays(self: Subscriber) -> int:
    self.crowded = False
    return self.window


def acknowledges_highest(self: Subscriber) -> list[Key]:
    positions = Subscriber.positions(self)
    return [(one, max(self.above, default=at) if one == self.incarnation else at) for one, at in positions]


def acknowledges_handled(self: Subscriber) -> list[Key]:
    positions = Subscriber.positions(self)
    return [(one, self.floor if one == self.incarnation else at) for one, at in positions]


def cursor_is_highest(self: Subscriber) -> Cursor:
    floor = max(self.above, default=self.floor - 1) + 1
    return Cursor(self.incarnation, floor, frozenset(), frozenset(self.redriven))


def parked_is_not_settled(self: Application, record: Record, reason: str) -> bool:
    return reason != "parked" and Application.bury(self, record, reason)


def parks_whole_lane(self: Application, record: Record) -> bool:
    waiting = self.waiting().values() if self.options.on_failure == "park" else ()
    return any(letter.lane == record.lane for letter in waiting)


def commits_and_forgets(self: Application) -> None:
    Application.commit(self)
    for key in self.redriven:
        self.letters.pop(key, None)
    self.redriven.clear()


def opens_range(self: Subscriber, offset: int) -> bool:
    return count_ranges(self.above.union(self.hand)) < self.options.ranges


def ending_is_exact(self: Publisher, feed: Feed) -> int:
    return 1


PUBLISHERS: dict[str, Methods] = {
    "no_heartbeat": {"heartbeat": lambda self: None},
    "heartbeat_on_change": {"heartbeat": heartbeat_on_change},
    "incarnation_forgotten": {"next_incarnation": lambda self: 1},
    "number_before_append": {"append": number_before_append},
    "power_not_synced": {"number": number_unsynced},
    "exact_always": {"is_exact": lambda self, how: True},
    "released_by_fastest": {"is_acknowledged": released_by_fastest},
    "answer_may_be_empty": {"within": within_or_nothing},
    "credit_ignored": {"within": lambda self, records, credit: records},
    "join_point_moves": {"on_register": join_point_moves},
    "acknowledge_any_session": {"receive": hears_old_sessions, "on_acknowledge": acknowledge_any_session},
    "not_fenced": {"on_fenced": lambda self, source, newest: None},
    # Lives.
    "registrations_forgotten": {"recall": lambda self: {}},
    "registration_not_written": {"begin": begin_unwritten},
    "restored_as_it_was": {"starts": restored_as_it_was},
    "names_forgotten": {"meet": names_are_forgotten},
    "past_is_not_owed": {"is_acknowledged": past_is_not_owed},
    "only_this_life": {"starts": only_this_life},
    "before_not_told": {"before": lambda self, registration, incarnation: 0},
    "inexact_told_exact": {"ending": ending_is_exact},
    "since_stays": {"since": lambda self, registration: registration.since or self.life},
    "unknown_place_is_none": {"starts": unknown_place_is_none},
    "begins_where_it_began": {"starts": begins_where_it_began},
    "kept_is_not_written": {"write_rest": everything_is_kept},
}
SUBSCRIBERS: dict[str, Methods] = {
    "before_ignored": {"must_wait": lambda self, row: False, "go_on": goes_on_with_any},
    "named_feeds_missed_at_once": {"welcome": misses_at_once},
    "kept_is_a_final_gap": {"waits": lambda self: self.is_durable or self.incarnation < self.peer},
    "past_dies_with_who_serves_it": {"waits": lambda self: self.is_durable or self.is_kept},
    "durable_dies": {"waits": lambda self: self.is_kept or self.incarnation < self.peer},
    "old_life_is_not_fenced_off": {"welcome": lambda self, life: setattr(self, "peer", life)},
    # Order, gaps, lives.
    "offset_order": {"ready": lambda self, record: record.offset == self.floor},
    "sequence_order": {"ready": ready_by_sequence},
    "lane_begins_anywhere": {"ready": ready_by_first_seen},
    "gap_before_floor": {"ready": lambda self, r: Subscriber.ready(self, r) or self.is_gone(r.previous)},
    "gap_silent": {"report_gap": lambda self: None},
    "gap_by_timeout": {"pull": pull_gives_up},
    "first_ignored": {"learn": lambda self, first, end: Subscriber.learn(self, 0, end)},
    "lost_ignored": {"is_gone": lambda self, o: o < self.first or (self.fin is not None and o >= self.fin)},
    "jumps_to_newest": {"add_feed": jumps_to_newest},
    "enters_before_settled": {"is_finished": settled_before_handled},
    "no_duplicate_check": {"is_duplicate": lambda self, offset: False},
    "rejoin_skips": {"on_marker": marker_skips},
    "hold_unbounded": {"bound_hold": lambda self: None},
    "newcomer_gives_way": {"bound_hold": newcomer_gives_way},
    "ranges_full_at_floor": {"fits": opens_range},
    "ranges_unbounded": {"fits": lambda self, offset: True},
    "credit_beyond_room": {"left": window_only},
    "window_stays": {"next_window": window_stays},
    # Cursor, acknowledgement, dead letters.
    "acknowledges_handled": {"positions": acknowledges_handled},
    "acknowledges_highest": {"positions": acknowledges_highest},
    "cursor_is_floor": {"cursor": lambda self: Subscriber.cursor(self)._replace(above=frozenset())},
    "cursor_is_highest": {"cursor": cursor_is_highest},
    "acknowledges_out_of_lane_order": {"earlier_in_lane": lambda self, record: []},
    "letter_handled_again": {"has_letter": lambda self, key: False},
    "redrive_deletes": {"note_redriven": lambda self, key: self.letters.pop(key)},
    "redrive_not_in_cursor": {
        "cursor": lambda self: Subscriber.cursor(self)._replace(redriven=frozenset()),
        "commit": commits_and_forgets,
    },
    "redrive_too_early": {"may_redrive": lambda self, key: True},
    "park_is_skip": {"is_parked": lambda self, record: False},
    "parked_not_settled": {"bury": parked_is_not_settled},
    "park_whole_lane": {"is_parked": parks_whole_lane},
}
VARIANTS = (*PUBLISHERS, *SUBSCRIBERS)


def classes(name: str | None) -> tuple[type[Publisher], type[Application]]:
    """Publisher and subscriber; of a variant one of them has some methods replaced."""
    publisher = type("BrokenPublisher", (Publisher,), dict(PUBLISHERS.get(name or "", {})))
    subscriber = type("BrokenApplication", (Application,), dict(SUBSCRIBERS.get(name or "", {})))
    return publisher, subscriber
