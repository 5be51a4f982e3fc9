"""Retention against a naive model: what is owed, what is kept, what goes first."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.config import Policy
from fabric.core.feeds import OutFeed, Place, Retention, StoredBurst

OWED_MAX, KEPT_MAX = 400, 300

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "acknowledge", "join", "leave", "drop"]),
        st.integers(0, 1),
        st.integers(0, 20),
        st.integers(1, 120),
    ),
    min_size=10,
    max_size=40,
)


class Model:
    """A list of bursts of all feeds in order of time, and what each reader acknowledged."""

    def __init__(self) -> None:
        self.bursts: list[tuple[int, int, int, int]] = []
        """(feed, first, end, size)."""
        self.readers: dict[tuple[int, int], int] = {}
        self.acknowledged = [0, 0]
        self.ends = [0, 0]

    def owed(self, feed: int) -> list[tuple[int, int, int, int]]:
        return [burst for burst in self.bursts if burst[0] == feed and burst[2] > self.acknowledged[feed]]

    def kept(self) -> list[tuple[int, int, int, int]]:
        return [burst for burst in self.bursts if burst[2] <= self.acknowledged[burst[0]]]

    def settle(self, feed: int) -> None:
        floors = [floor for (owner, _), floor in self.readers.items() if owner == feed]
        self.acknowledged[feed] = max(self.acknowledged[feed], min(floors, default=self.ends[feed]))

    def evict(self) -> None:
        while sum(burst[3] for burst in self.kept()) > KEPT_MAX:
            self.bursts.remove(self.kept()[0])


def frames_of(out: OutFeed) -> list[tuple[int, int]]:
    return [(burst.first, burst.end) for burst in (*out.kept, *out.owed)]


@settings(max_examples=200)
@given(STEPS)
def test_retention_does_what_a_plain_list_would(steps: list[tuple[str, int, int, int]]) -> None:
    retention = Retention(owed_bytes_max=OWED_MAX, kept_bytes_max=KEPT_MAX)
    outs = [OutFeed(n, f"t{n}", Policy.RELIABLE, 1) for n in range(2)]
    model = Model()
    for what, n, a, size in steps:
        STEP[what](retention, model, outs[n], a, size)
        compare(retention, model, outs)


def append(retention: Retention, model: Model, out: OutFeed, a: int, size: int) -> None:
    count = a % 3 + 1
    retention.append(out, out.end, count, bytes(size), None)
    model.bursts.append((out.feed, model.ends[out.feed], model.ends[out.feed] + count, size))
    model.ends[out.feed] += count
    model.settle(out.feed)
    if not out.readers:
        model.evict()


def acknowledge(retention: Retention, model: Model, out: OutFeed, a: int, size: int) -> None:
    reader = ("r", a % 2)
    if reader in out.readers:
        out.readers[reader] = model.readers[out.feed, a % 2] = max(out.readers[reader], size % (out.end + 1))
        settle(retention, model, out)


def leave(retention: Retention, model: Model, out: OutFeed, a: int, size: int) -> None:
    if out.readers.pop(("r", a % 2), None) is not None:
        del model.readers[out.feed, a % 2]
        settle(retention, model, out)


def settle(retention: Retention, model: Model, out: OutFeed) -> None:
    retention.acknowledge(out)
    model.settle(out.feed)
    model.evict()


def join(retention: Retention, model: Model, out: OutFeed, a: int, size: int) -> None:
    """As a registration does."""
    number, offset = a % 2, out.first_available + size % (out.end - out.first_available + 1)
    if ("r", number) in out.readers:
        return
    retention.owe_again(out, offset)
    out.readers["r", number] = model.readers[out.feed, number] = offset
    model.acknowledged[out.feed] = min(model.acknowledged[out.feed], offset)


def drop(retention: Retention, model: Model, out: OutFeed, a: int, size: int) -> None:
    dropped = retention.drop_oldest(out, size)
    expected = 0
    while (owed := model.owed(out.feed)) and sum(b[3] for n in range(2) for b in model.owed(n)) + size > OWED_MAX:
        model.bursts = [burst for burst in model.bursts if burst[0] != out.feed or burst[1] > owed[0][1]]
        expected += owed[0][2] - max(owed[0][1], model.acknowledged[out.feed])
        model.acknowledged[out.feed] = owed[0][2]
    assert dropped == expected


STEP = {"append": append, "acknowledge": acknowledge, "join": join, "leave": leave, "drop": drop}


def compare(retention: Retention, model: Model, outs: list[OutFeed]) -> None:
    retention.check_invariants(outs)
    assert retention.kept_bytes <= KEPT_MAX
    for n, out in enumerate(outs):
        assert frames_of(out) == [(first, end) for feed, first, end, _ in model.bursts if feed == n]
        assert [(burst.first, burst.end) for burst in out.owed] == [(b[1], b[2]) for b in model.owed(n)]
        assert out.acknowledged == model.acknowledged[n]
        for offset in range(out.end + 1):
            found = out.find(offset)
            held = [(first, end) for feed, first, end, _ in model.bursts if feed == n and first <= offset < end]
            assert ([(found.first, found.end)] if found else []) == held


class LongMemory(Model):
    """Forgets no history by itself: what leaves with the disk is not its business."""

    def evict(self) -> None:
        pass

    def forget(self, feed: int, kept: list[tuple[int, int]]) -> None:
        """Only so much history is left of a feed."""
        left = [burst for burst in self.kept() if burst[0] == feed]
        assert kept == [(first, end) for _, first, end, _ in left[len(left) - len(kept) :]], "the newest stay"
        for burst in left[: len(left) - len(kept)]:
            self.bursts.remove(burst)


class Disk:
    """Writes under way, in order, and what they are over with."""

    def __init__(self, retention: Retention) -> None:
        self.retention = retention
        self.writes: list[tuple[OutFeed, StoredBurst]] = []

    def ask(self, most: int) -> None:
        while (found := self.retention.write_next(most)) is not None:
            assert found[1].end > found[0].released
            self.writes.append(found)

    def answer(self, count: int, *, done: bool) -> None:
        some, self.writes = self.writes[:count], self.writes[count:]
        for write in some if done else reversed(some):
            self.retention.written(*write, done=done)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "append", "acknowledge", "join", "leave", "ask", "done", "failed"]),
            st.integers(0, 1),
            st.integers(0, 20),
            st.integers(1, 120),
        ),
        min_size=10,
        max_size=60,
    )
)
def test_what_is_owed_is_there_wherever_it_lies(steps: list[tuple[str, int, int, int]]) -> None:
    retention = Retention(owed_bytes_max=OWED_MAX, kept_bytes_max=KEPT_MAX)
    disk = Disk(retention)
    outs = [OutFeed(n, f"t{n}", Policy.RELIABLE, 1, spills=True) for n in range(2)]
    model = LongMemory()
    for what, n, a, size in steps:
        if what == "ask":
            disk.ask(size)
        elif what in ("done", "failed"):
            disk.answer(a % 4, done=what == "done")
        else:
            STEP[what](retention, model, outs[n], a, size)
        retention.released.clear()
        retention.check_invariants(outs)
        assert retention.writing_bytes == sum(burst.size for _, burst in disk.writes)
        for n, out in enumerate(outs):
            look_at(out, model, n)
    disk.answer(len(disk.writes), done=True)
    disk.ask(0)
    disk.answer(len(disk.writes), done=True)
    assert retention.writing_bytes == 0
    left = [burst for out in outs for burst in out.owed if burst.end > out.released and burst.place is Place.MEMORY]
    assert left == [], "all that is owed can be written, but for what the disk was told to forget"


def look_at(out: OutFeed, model: LongMemory, n: int) -> None:
    model.forget(n, [(burst.first, burst.end) for burst in out.kept])
    assert [(burst.first, burst.end) for burst in out.owed] == [(b[1], b[2]) for b in model.owed(n)]
    bursts = [*out.kept, *out.owed]
    assert all(burst.end == after.first for burst, after in pairwise(bursts)), "history has no holes"
    for burst in bursts:
        assert bool(burst.frame) == (burst.place is not Place.DISK)
        assert out.find(burst.first) is burst
    assert all(burst.place is Place.MEMORY for burst in out.kept)


@settings(max_examples=150)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=15))
def test_a_latest_feed_keeps_exactly_the_bursts_with_some_newest_record(bursts: list[list[int]]) -> None:
    retention = Retention(owed_bytes_max=10**6, kept_bytes_max=10**6)
    out = OutFeed(1, "t", Policy.LATEST, 1)
    out.readers["r", 1] = 0
    newest: dict[int, int] = {}
    for index, seeds in enumerate(bursts):
        burst = retention.append(out, out.end, len(seeds), b"x" * 10, None)
        retention.supersede(out, burst, seeds)
        newest |= dict.fromkeys(seeds, index)
        retention.check_invariants([out])
        ends = [sum(map(len, bursts[: n + 1])) for n in range(len(bursts))]
        assert [burst.end for burst in out.kept] == [ends[n] for n in sorted(set(newest.values()))]


@settings(max_examples=150)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=10),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), max_size=5),
    st.integers(0, 100),
    st.sets(st.integers(0, 9)),
)
def test_a_pull_is_answered_with_what_is_there_and_what_is_lost(
    counts: list[int], ranges: list[tuple[int, int]], credit: int, removed: set[int]
) -> None:
    retention = Retention(owed_bytes_max=10**6, kept_bytes_max=10**6)
    out = OutFeed(1, "t", Policy.LATEST, 1)
    stored = [retention.append(out, out.end, count, b"x" * 10, None) for count in counts]
    for index in removed:
        if index < len(stored) - 1:
            out.kept.remove(stored[index])
    chosen, lost = out.select(ranges, credit)
    assert sum(len(burst.frame) for burst in chosen) <= max(credit, 10)
    there = {offset for burst in out.kept for offset in range(burst.first, burst.end)}
    wanted = {n for first, end in ranges for n in range(first, end)}
    given_up = {offset for first, end in lost for offset in range(first, end)}
    assert given_up <= wanted - there
    assert all(set(range(burst.first, burst.end)) & wanted for burst in chosen)
    if wanted & there:
        assert chosen
    if credit == 100 and len(ranges) == 1 and chosen:  # enough for all: then the answer is complete
        answered = {offset for burst in chosen for offset in range(burst.first, burst.end)}
        first = max(out.first_available, min(wanted))
        assert wanted & set(range(first, out.end)) <= answered | given_up
