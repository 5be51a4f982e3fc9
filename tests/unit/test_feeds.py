"""Retention: what the property tests do not say."""

from __future__ import annotations

from fabric.config import Policy
from fabric.core.feeds import LOST_RANGES_MAX, OutFeed, Retention


def a_retention(kept: int = 100) -> Retention:
    return Retention(owed_bytes_max=100, kept_bytes_max=kept)


def test_without_readers_nothing_is_owed_and_the_oldest_of_all_feeds_goes_first() -> None:
    retention = a_retention()
    one, two = OutFeed(1, "one", Policy.RELIABLE, 1), OutFeed(2, "two", Policy.RELIABLE, 1)
    for out in (one, two, one, two):
        retention.append(out, out.end, 1, bytes(40), None)
    assert (retention.owed_bytes, retention.kept_bytes) == (0, 80)
    assert ([burst.first for burst in one.kept], [burst.first for burst in two.kept]) == ([1], [1])
    assert one.is_acknowledged


def test_payloads_count_as_bytes() -> None:
    retention = a_retention()
    out = OutFeed(1, "t", Policy.RELIABLE, 1)
    burst = retention.append(out, 0, 1, bytes(10), {0: memoryview(bytes(32)).cast("I")})
    assert (burst.size, retention.kept_bytes) == (42, 42)


def test_a_lossy_feed_keeps_only_what_has_to_be_fetched() -> None:
    retention = a_retention()
    out = OutFeed(1, "t", Policy.LOSSY, 1)
    retention.append(out, 0, 1, bytes(10), None)
    assert (out.end, out.first_available, retention.kept_bytes) == (1, 1, 0)
    retention.append(out, 1, 1, bytes(10), {1: bytes(5)})
    assert (out.end, out.first_available, retention.kept_bytes) == (2, 1, 15)


def test_a_new_reader_is_owed_the_history_from_its_offset_on() -> None:
    retention = a_retention()
    out = OutFeed(1, "t", Policy.RELIABLE, 1)
    for _ in range(4):
        retention.append(out, out.end, 2, bytes(10), None)
    retention.owe_again(out, 3)
    assert [burst.first for burst in out.kept] == [0]
    assert [burst.first for burst in out.owed] == [2, 4, 6]
    assert (retention.kept_bytes, retention.owed_bytes, out.acknowledged) == (10, 30, 3)


def test_where_a_subscription_begins() -> None:
    retention = a_retention()
    out = OutFeed(1, "t", Policy.RELIABLE, 1)
    assert [out.join_offset(start) for start in ("live", "retained", "last")] == [0, 0, 0]
    for _ in range(5):
        retention.append(out, out.end, 2, bytes(30), None)
    assert [out.join_offset(start) for start in ("live", "retained", "last")] == [10, 4, 9]


def test_history_goes_before_what_is_owed_gives_way() -> None:
    retention = a_retention()
    out = OutFeed(1, "t", Policy.RELIABLE, 1)
    retention.append(out, 0, 1, bytes(10), None)
    out.readers["b", 1] = 1
    for _ in range(3):
        retention.append(out, out.end, 2, bytes(40), None)
    out.readers["b", 1] = out.acknowledged = 2
    assert retention.drop_oldest(out, 30) == 3
    assert (out.first_available, retention.kept_bytes, retention.owed_bytes) == (5, 0, 40)
    retention.check_invariants([out])


def test_a_range_between_what_is_left_is_lost() -> None:
    retention = a_retention()
    out = OutFeed(1, "t", Policy.LATEST, 1)
    stored = [retention.append(out, out.end, 2, b"x", None) for _ in range(3)]
    out.kept.remove(stored[1])
    assert out.select([(2, 3)], 100) == ([], [(2, 3)])
    assert out.select([(1, 6)], 100) == ([stored[0], stored[2]], [(2, 4)])


def test_the_order_of_eviction_survives_what_happened_in_between() -> None:
    retention = a_retention()
    one, two = OutFeed(1, "one", Policy.RELIABLE, 1), OutFeed(2, "two", Policy.RELIABLE, 1)
    for out in (one, two, one):
        retention.append(out, out.end, 1, bytes(30), None)
    retention.owe_again(one, 0)  # its entry among the oldest is stale now
    one.readers["b", 1] = 0
    for _ in range(3):
        retention.append(two, two.end, 1, bytes(30), None)
    assert [burst.first for burst in two.kept] == [1, 2, 3]
    retention.check_invariants([one, two])


def test_an_answer_names_a_bounded_number_of_lost_ranges() -> None:
    retention = Retention(owed_bytes_max=1, kept_bytes_max=10**9)
    out = OutFeed(1, "t", Policy.LATEST, 1)
    stored = [retention.append(out, out.end, 1, b"x", None) for _ in range(2 * LOST_RANGES_MAX + 10)]
    for burst in stored[1:-1:2]:
        out.kept.remove(burst)
    _, lost = out.select([(0, out.end)], 10**9)
    assert len(lost) == LOST_RANGES_MAX


def test_a_pull_without_credit_gets_one_burst() -> None:
    retention = a_retention()
    out = OutFeed(1, "t", Policy.RELIABLE, 1)
    for _ in range(3):
        retention.append(out, out.end, 1, bytes(10), None)
    assert [burst.first for burst in out.select([(1, 3)], 0)[0]] == [1]
    assert out.select([(2, 1), (9, 5), (2**63, 2**64)], 100) == ([], [])
    assert out.find(3) is None


def test_a_feed_shows_where_it_is() -> None:
    assert repr(OutFeed(1, "t", Policy.RELIABLE, 1)) == "OutFeed(t, 0..0, acknowledged=0)"


def test_a_burst_is_owed_until_the_last_reader_acknowledged_it() -> None:
    retention = a_retention()
    out = OutFeed(1, "t", Policy.RELIABLE, 1)
    out.readers = {("b", 1): 0, ("c", 1): 0}
    retention.append(out, 0, 1, bytes(10), None)
    out.readers["b", 1] = 1
    retention.acknowledge(out)
    assert (len(out.owed), out.acknowledged) == (1, 0)
    out.readers["c", 1] = 1
    retention.acknowledge(out)
    assert (len(out.owed), out.acknowledged) == (0, 1)
