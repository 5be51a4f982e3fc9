"""Owed retention that continues on disk."""

from __future__ import annotations

from fabric.config import FabricConfig, Repair, Retention, Start
from fabric.core import events
from fabric.core.feeds import Place
from fabric.core.members import Peer
from fabric.core.wire import Drop, Kind, encode_control
from tests.harness.pair import Link
from tests.harness.shelf import Shelf
from tests.unit.test_publishing import told

MIB = 1024 * 1024
MEMORY = 2_000
CONFIG = FabricConfig(retention=Retention(owed_bytes_max=MEMORY, kept_bytes_max=1_000))


def stalled(config: FabricConfig = CONFIG) -> tuple[Link, Shelf]:
    """`b` is registered and hears nothing; `a` has a disk."""
    link = Link("a", "b", config=config)
    link.subscribe("b", "t")
    link.crank()
    return link, Shelf(link, "a")


def publish(link: Link, count: int, *, size: int = 100) -> None:
    for _ in range(count):
        link.publish("a", "t", bodies=[bytes(size)], spills=True)
        link.drop_kind(None)


def places(link: Link) -> list[Place]:
    return [burst.place for burst in link["a"].core.publishing.feeds["t"].owed]


def owed_bytes(link: Link) -> int:
    return link["a"].core.publishing.retention.owed_bytes


def test_the_oldest_half_of_what_is_owed_is_written_and_leaves_memory_then() -> None:
    link, shelf = stalled()
    publish(link, 4)
    assert shelf.asked() == [], "less than half of the room is used"
    publish(link, 6)
    assert places(link)[0] is Place.WRITING
    held = owed_bytes(link)
    assert held > MEMORY // 2, "until it is written it is in memory"
    assert set(shelf.work()) == {"AppendRecords"}
    publish(link, 40)
    shelf.work()
    assert owed_bytes(link) <= MEMORY // 2
    assert places(link) == sorted(places(link), key=[Place.DISK, Place.WRITING, Place.MEMORY].index), "oldest first"
    retention = link["a"].core.publishing.retention
    assert retention.spilled_bytes > 4 * MEMORY // 2
    assert link["a"].counts["bursts_spilled"] == len(shelf.bursts)


def test_what_lies_on_disk_is_pulled_from_there_in_order_and_released() -> None:
    link, shelf = stalled()
    publish(link, 50)
    shelf.work()
    for _ in range(200):
        link.run(20)
        shelf.work()
    assert link["b"].offsets("t") == list(range(50))
    assert shelf.bursts == {}, "nobody needs them any more"
    retention = link["a"].core.publishing.retention
    assert (retention.owed_bytes, retention.spilled_bytes) == (0, 0)
    assert link["b"].of(events.ReportGap) == []


def test_large_values_are_fetched_from_disk() -> None:
    config = FabricConfig(
        retention=Retention(owed_bytes_max=50_000, kept_bytes_max=1_000), repair=Repair(chunk_bytes=4_096)
    )
    link, shelf = stalled(config)
    values = [bytes([number]) * 20_000 for number in range(8)]
    for value in values:
        link.publish("a", "t", payloads={0: value}, spills=True)
        link.drop_kind(None)
    shelf.work()
    assert places(link).count(Place.DISK) > 4
    for _ in range(200):
        link.run(20)
        shelf.work()
    assert link["b"].values("t") == values
    assert shelf.bursts == {}


def test_a_refused_write_stays_in_memory_and_is_tried_again() -> None:
    link, shelf = stalled()
    publish(link, 14)
    before = owed_bytes(link)
    assert shelf.refuse() >= 1
    assert owed_bytes(link) == before
    assert set(places(link)) == {Place.MEMORY}
    assert link["a"].counts["writes_failed"] == 1
    publish(link, 1)
    assert shelf.asked() == [], "not at once"
    link.pass_time(1_100)
    assert "AppendRecords" in shelf.work()
    assert link["a"].core.publishing.spilling.next_deadline_ns() is None
    assert places(link)[0] is Place.DISK
    for _ in range(100):
        link.run(20)
        shelf.work()
    assert link["b"].offsets("t") == list(range(15))


def test_what_is_acknowledged_while_it_is_written_stays_history_and_the_disk_lets_it_go() -> None:
    link, shelf = stalled()
    publish(link, 14)
    out = link["a"].core.publishing.feeds["t"]
    assert places(link)[0] is Place.WRITING
    link.run(2_000)  # all is repaired from memory meanwhile
    assert link["b"].offsets("t") == list(range(14))
    assert not out.owed
    shelf.work()
    assert shelf.bursts == {}
    retention = link["a"].core.publishing.retention
    assert (retention.owed_bytes, retention.spilled_bytes, retention.writing_bytes) == (0, 0, 0)
    assert all(burst.frame for burst in out.kept)


def test_what_the_log_was_told_to_forget_stays_in_memory_when_it_is_owed_again() -> None:
    link, shelf = stalled(FabricConfig(retention=Retention(owed_bytes_max=MEMORY, kept_bytes_max=100_000)))
    publish(link, 14)
    old = [command for command in shelf.asked() if isinstance(command, events.AppendRecords)]
    link.run(2_000)
    (release,) = [command for command in shelf.asked() if isinstance(command, events.ReleaseRecords)]
    assert old[-1].first < release.below
    link.subscribe("b", "t", subscription=2, start=Start.RETAINED)
    link.deliver(link.waiting(Kind.REGISTER)[-1])
    link.drop()
    publish(link, 1)
    link.do("a", events.WriteFinished(old[-1].number))
    out = link["a"].core.publishing.feeds["t"]
    assert [burst.place for burst in out.owed if burst.end <= release.below] == [Place.MEMORY] * release.below, (
        "all of it"
    )
    assert all(burst.frame for burst in out.owed)
    shelf.work()
    for _ in range(100):
        link.run(20)
        shelf.work()
    assert link["b"].offsets("t", 2) == list(range(15))


def test_a_damaged_burst_is_a_gap_and_its_neighbours_arrive() -> None:
    link, shelf = stalled()
    publish(link, 50)
    shelf.work()
    shelf.damaged = {0, 7, 8}
    for _ in range(200):
        link.run(20)
        shelf.work()
    lost = [(gap.first, gap.end, gap.reason) for gap in link["b"].of(events.ReportGap)]
    assert lost == [(0, 1, Drop.GAP), (7, 9, Drop.GAP)]
    assert link["b"].offsets("t") == [number for number in range(50) if number not in shelf.damaged]
    assert link["a"].counts["bursts_damaged"] == 3


def test_what_was_loaded_stays_within_bounds_and_goes_when_it_is_acknowledged() -> None:
    link, shelf = stalled(
        FabricConfig(retention=Retention(owed_bytes_max=MEMORY, kept_bytes_max=1_000), repair=Repair(window_bytes=500))
    )
    publish(link, 60)
    shelf.work()
    spilling = link["a"].core.publishing.spilling
    most = 0
    for _ in range(400):
        link.run(20)
        shelf.work()
        most = max(most, spilling._loaded_bytes)
        assert spilling._loaded_bytes == sum(burst.size for burst in spilling._loaded)
    assert link["b"].offsets("t") == list(range(60))
    assert 0 < most <= 2 * 500 + 500
    assert spilling._loaded == {}


def test_a_peer_has_few_questions_waiting_and_a_pull_takes_the_place_of_the_one_before() -> None:
    link, shelf = stalled()
    publish(link, 50)
    shelf.work()
    link.drop()
    core = link["a"].core
    peer = core.members.by_name["b"]
    out = core.publishing.feeds["t"]
    for token in range(3):
        core._messages[Kind.PULL](peer, (out.feed, token, 10_000, [(0, 3)]))
    for token in range(3):
        core._messages[Kind.FETCH](peer, (out.feed, 0, 0, 10, token, False))
    loads = [command for command in core.context.commands if isinstance(command, events.LoadRecords)]
    assert [load.firsts for load in loads] == [(0, 1, 2)], "one question at a time"
    parked = core.publishing.spilling._parked
    assert [(kind, fields[4] if kind is Kind.FETCH else fields[1]) for _, kind, fields in parked] == [
        (Kind.PULL, 2),
        (Kind.FETCH, 2),
    ], "of those that wait, the latest"
    for position in range(100):
        core._messages[Kind.FETCH](peer, (out.feed, 0, position, 10, 1, False))
    assert len(parked) <= 64
    assert link["a"].counts[Drop.NO_ROOM] == 37


def test_a_fetch_that_is_repeated_while_it_is_answered_is_answered_once() -> None:
    link, shelf = stalled()
    for number in range(20):
        link.publish("a", "t", payloads={0: bytes([number]) * 300}, spills=True)
        link.drop_kind(None)
    shelf.work()
    link.drop()
    core = link["a"].core
    peer, out = core.members.by_name["b"], core.publishing.feeds["t"]
    for token in range(5):
        link["a"].reported += link.do("a", ask(peer, out.feed, token))
    shelf.work()
    assert len(link.waiting(Kind.CHUNK)) == 1


def ask(peer: Peer, feed: int, token: int) -> events.ControlReceived:
    return events.ControlReceived(encode_control(Kind.FETCH, peer.id, peer.incarnation, feed, 0, 0, 300, token, False))


def test_a_pull_loads_no_more_than_its_credit_values_included() -> None:
    retention, repair = Retention(owed_bytes_max=MEMORY, kept_bytes_max=1_000), Repair(window_bytes=2_000)
    link, shelf = stalled(FabricConfig(retention=retention, repair=repair))
    values = [bytes([number]) * 600 for number in range(30)]
    for value in values:
        link.publish("a", "t", payloads={0: value}, spills=True)
        link.drop_kind(None)
    shelf.work()
    loaded = []
    for _ in range(300):
        link.run(20)
        for command in shelf.asked():
            if isinstance(command, events.LoadRecords):
                loaded.append(len(command.firsts))
            shelf._do(command)
    assert link["b"].values("t") == values
    assert 0 < max(loaded) <= 3


def test_a_read_that_fails_is_tried_again_and_given_up_after_a_while() -> None:
    link, shelf = stalled()
    publish(link, 50)
    shelf.work()
    shelf.unreadable = {3}
    for _ in range(20):
        link.run(100)
        shelf.work()
    assert link["b"].of(events.ReportGap) == []
    shelf.unreadable = set()
    for _ in range(100):
        link.run(50)
        shelf.work()
    assert link["b"].offsets("t") == list(range(50))
    assert link["b"].of(events.ReportGap) == []
    publish(link, 50)
    shelf.work()
    shelf.unreadable = {55}
    for _ in range(200):
        link.run(100)
        shelf.work()
    assert [(gap.first, gap.end) for gap in link["b"].of(events.ReportGap)] == [(55, 56)]
    assert link["b"].offsets("t")[50:] == [number for number in range(50, 100) if number != 55]


def test_a_large_value_makes_room_below_half_of_the_memory() -> None:
    link, shelf = stalled()
    publish(link, 4)
    assert shelf.asked() == []
    link.do("a", events.RoomNeeded("t", MEMORY - 100))
    shelf.work()
    assert owed_bytes(link) <= 100
    publish(link, 4)
    assert shelf.asked() == [], "once"


def test_many_questions_about_different_bursts_are_answered_however_little_may_be_loaded() -> None:
    link, shelf = stalled(
        FabricConfig(retention=Retention(owed_bytes_max=MEMORY, kept_bytes_max=1_000), repair=Repair(window_bytes=1))
    )
    for number in range(30):
        link.publish("a", "t", payloads={0: bytes([number]) * 300}, spills=True)
        link.drop_kind(None)
    shelf.work()
    link.drop()
    core = link["a"].core
    peer, out = core.members.by_name["b"], core.publishing.feeds["t"]
    asked = [(first, position) for first in (4, 0, 3, 1, 9) for position in (0, 100, 200)]
    for first, position in asked:
        core._messages[Kind.FETCH](peer, (out.feed, first, position, 100, 1, False))
    for command in core.context.commands:
        link["a"].reported.append(command)
    core.context.commands.clear()
    shelf.work()
    chunks = [flight for flight in link.waiting(Kind.CHUNK) if flight.to is link["b"]]
    assert [tuple(flight.fields[1:3]) for flight in chunks] == asked
    assert len(core.publishing.spilling._loaded) == 1


def test_who_left_is_not_answered() -> None:
    link, shelf = stalled()
    publish(link, 50)
    shelf.work()
    out = link["a"].core.publishing.feeds["t"]
    core = link["a"].core
    peer = core.members.by_name["b"]
    link.drop()
    core._messages[Kind.PULL](peer, (out.feed, 1, 10_000, [(0, 3)]))
    core.context.commands.clear()
    frames = tuple(shelf._load(out.feed, first) for first in range(3))
    link.do("a", events.PeerDied("b", 1))
    commands = link.do("a", events.RecordsLoaded(out.feed, frames))
    assert told(commands, Kind.REPAIR) == []
    assert core.publishing.retention.spilled_bytes == 0


def test_what_the_log_gave_up_for_its_age_is_a_gap() -> None:
    link, shelf = stalled()
    publish(link, 50)
    shelf.work()
    out = link["a"].core.publishing.feeds["t"]
    link.do("a", events.RecordsExpired(out.feed, 0, 5))
    for _ in range(200):
        link.run(20)
        shelf.work()
    assert [(gap.first, gap.end) for gap in link["b"].of(events.ReportGap)] == [(0, 5)]
    assert link["b"].offsets("t") == list(range(5, 50))
    assert link["a"].counts["bursts_expired"] == 5


def test_a_disk_is_not_asked_to_write_everything_at_once() -> None:
    link, shelf = stalled(FabricConfig(retention=Retention(owed_bytes_max=100 * MIB, kept_bytes_max=1_000)))
    for _ in range(80):
        link.publish("a", "t", payloads={0: bytes(MIB)}, spills=True)
        link.drop()
    writes = [command for command in shelf.asked() if isinstance(command, events.AppendRecords)]
    assert len(writes) == 16
    link.do("a", events.WriteFinished(writes[-1].number))
    assert len(shelf.asked()) == 15, "until half of the memory is free"


def test_a_disk_that_takes_some_is_asked_for_the_rest_at_once() -> None:
    link, shelf = stalled()
    publish(link, 30)
    writes = [command for command in shelf.asked() if isinstance(command, events.AppendRecords)]
    link.do("a", events.WriteFailed(writes[0].number, writes[-2].number, "no space left"))
    assert shelf.asked() == []
    link.do("a", events.WriteFinished(writes[-1].number))
    again = [command for command in shelf.asked() if isinstance(command, events.AppendRecords)]
    assert [command.first for command in again] == [command.first for command in writes[:-1]], "in their order"
    for command in (writes[-1], *again):
        shelf.bursts[command.feed, command.first] = command
    link.do("a", events.WriteFinished(again[-1].number))
    for _ in range(100):
        link.run(20)
        shelf.work()
    assert link["b"].offsets("t") == list(range(30))
