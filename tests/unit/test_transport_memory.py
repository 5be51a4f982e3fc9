"""What only the transport in memory has: a virtual clock, seeded faults, cuts, lives of a name."""

from __future__ import annotations

import os
import threading

import pytest

from transports.base import AddressError, Endpoints, Link, SendBlockedError, SocketLimits, TransportClosedError
from transports.memory import FaultPlan, MemoryHub, MemoryTransport


class Clock:
    """Nanoseconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def members(hub: MemoryHub, *names: str) -> list[MemoryTransport]:
    """Members that are all connected to each other."""
    made = [MemoryTransport(hub, name) for name in names]
    for one in made:
        for other in made:
            if one is not other:
                one.connect(other.name, other.endpoints)
    return made


def bodies(t: MemoryTransport, limit: int = 10_000) -> list[bytes]:
    return [bytes(message.frames[0]) for message in t.receive(limit)]


def history(seed: int, plan: FaultPlan) -> list[tuple[int, str, bytes]]:
    """Everything that three members receive of a hundred sends each, with the time."""
    clock = Clock()
    hub = MemoryHub(seed=seed, plan=plan, clock=clock)
    made = members(hub, "a", "b", "c")
    for one in made:
        one.subscribe(b"")
    seen: list[tuple[int, str, bytes]] = []
    for n in range(100):
        clock.now += 1_000_000
        for one in made:
            one.broadcast(b"%s %d" % (one.name.encode(), n))
            one.send("a" if one.name == "c" else "c", Link.CONTROL, [b"%d" % n])
            seen += [(clock.now, one.name, body) for body in bodies(one, 8)]
    for one in made:
        while (due := one.next_due_ns()) is not None:
            clock.now = max(clock.now, due)
            seen += [(clock.now, one.name, body) for body in bodies(one, 8)]
    return seen


FAULTY = FaultPlan(loss=0.1, duplication=0.1, delay_ms=3, straggler=0.05)


def test_the_same_seed_gives_the_same_history_and_another_gives_another() -> None:
    assert history(7, FAULTY) == history(7, FAULTY)
    assert history(7, FAULTY) != history(8, FAULTY)


def test_without_faults_nothing_is_drawn_and_every_seed_gives_the_same_history() -> None:
    assert history(7, FaultPlan()) == history(8, FaultPlan())


def test_every_frame_is_delivered_repeated_or_counted_as_lost() -> None:
    clock = Clock()
    hub = MemoryHub(seed=1, plan=FaultPlan(loss=0.2, duplication=0.2), clock=clock)
    a, b = members(hub, "a", "b")
    for n in range(1000):
        a.send("b", Link.CONTROL, [b"%d" % n])
    got = bodies(b)
    counts = hub.statistics()
    assert len(set(got)) == 1000 - counts["dropped_loss"]
    assert len(got) == len(set(got)) + counts["duplicated"]
    assert 150 < counts["dropped_loss"] < 250 and 110 < counts["duplicated"] < 210
    own = a.statistics()
    assert {name: own[name] for name in counts} == counts
    assert got == sorted(got, key=int), "without delay even a faulty pipe keeps the order"


def test_a_delayed_frame_arrives_when_it_is_due_and_not_before() -> None:
    clock = Clock()
    a, b = members(MemoryHub(plan=FaultPlan(delay_ms=5), clock=clock), "a", "b")
    a.send("b", Link.CONTROL, [b"x"])
    due = b.next_due_ns()
    assert due is not None and due > 0
    clock.now = due - 1
    assert (b.receive(8), b.is_ready()) == ([], False)
    clock.now = due
    assert b.is_ready()
    assert bodies(b) == [b"x"]
    assert b.next_due_ns() is None


def test_delays_have_their_mean_and_reorder() -> None:
    clock = Clock()
    a, b = members(MemoryHub(seed=3, plan=FaultPlan(delay_ms=5), clock=clock), "a", "b")
    for n in range(2000):
        a.send("b", Link.CONTROL, [b"%d" % n])
    times = []
    got = []
    while (due := b.next_due_ns()) is not None:
        clock.now = due
        part = bodies(b)
        times += [due] * len(part)
        got += part
    assert 4.5e6 < sum(times) / 2000 < 5.5e6
    assert got != sorted(got, key=int)
    assert sorted(got, key=int) == [b"%d" % n for n in range(2000)]


def test_stragglers_are_thirty_times_as_late() -> None:
    def total(straggler: float) -> int:
        clock = Clock()
        a, b = members(MemoryHub(seed=3, plan=FaultPlan(delay_ms=1, straggler=straggler), clock=clock), "a", "b")
        last = 0
        for _ in range(1000):
            a.send("b", Link.CONTROL, [b"x"])
            due = b.next_due_ns()
            assert due is not None
            last += due
            clock.now = due
            b.receive(1)
            clock.now = 0
        return last

    assert 25 < total(1.0) / total(0.0) < 35


def test_faults_keep_to_the_links_of_the_plan() -> None:
    a, b = members(MemoryHub(plan=FaultPlan(loss=1.0, links=frozenset({Link.BULK})), clock=Clock()), "a", "b")
    b.subscribe(b"")
    a.broadcast(b"data")
    a.send("b", Link.CONTROL, [b"control"])
    assert a.send("b", Link.BULK, [b"bulk", bytearray(100_000)]).done, "what is lost is no longer borrowed"
    assert bodies(b) == [b"control", b"data"]


def test_a_cut_loses_one_direction_only_and_heals() -> None:
    hub = MemoryHub(clock=Clock())
    a, b = members(hub, "a", "b")
    b.subscribe(b"")
    a.send("b", Link.CONTROL, [b"under way"])
    hub.cut("a", "b")
    a.send("b", Link.CONTROL, [b"lost"])
    a.broadcast(b"lost too")
    b.send("a", Link.CONTROL, [b"back"])
    assert (bodies(b), bodies(a)) == ([b"under way"], [b"back"])
    hub.heal("a", "b")
    a.send("b", Link.CONTROL, [b"healed"])
    assert bodies(b) == [b"healed"]
    assert hub.statistics()["dropped_cut"] == 2


def test_a_subscription_made_behind_a_cut_arrives_when_it_heals() -> None:
    hub = MemoryHub(clock=Clock())
    a, b = members(hub, "a", "b")
    hub.cut("b", "a")
    b.subscribe(b"t")
    a.broadcast(b"t early")
    hub.heal("b", "a")
    a.flush_subscriptions()
    a.broadcast(b"t late")
    assert bodies(b) == [b"t late"]


def test_a_subscription_is_delayed_like_data_and_overtakes_no_other() -> None:
    clock = Clock()
    a, b = members(MemoryHub(seed=2, plan=FaultPlan(delay_ms=5), clock=clock), "a", "b")
    for _ in range(50):
        b.subscribe(b"t")
        b.unsubscribe(b"t")
    b.subscribe(b"t")
    a.broadcast(b"t too early")
    assert b.next_due_ns() is None
    clock.now = 10**12
    a.flush_subscriptions()
    a.broadcast(b"t in time")
    clock.now *= 2
    assert bodies(b) == [b"t in time"]


def test_calm_ends_all_faults_and_cuts() -> None:
    hub = MemoryHub(plan=FaultPlan(loss=1.0, delay_ms=5), clock=Clock())
    a, b = members(hub, "a", "b")
    hub.cut("a", "b")
    hub.calm()
    a.send("b", Link.CONTROL, [b"x"])
    assert bodies(b) == [b"x"]


def test_data_over_the_bound_is_dropped_and_counted_at_the_publisher() -> None:
    hub = MemoryHub(plan=FaultPlan(data_frames=3), clock=Clock())
    a, b, c = members(hub, "a", "b", "c")
    b.subscribe(b"")
    c.subscribe(b"")
    for n in range(5):
        a.broadcast(b"%d" % n)
        assert bodies(c) == [b"%d" % n]
    assert bodies(b) == [b"0", b"1", b"2"]
    assert a.statistics()["dropped_full"] == 2
    a.broadcast(b"room again")
    assert bodies(b) == [b"room again"]


def test_a_peer_that_is_not_open_yet_blocks_and_is_told_when_it_opens() -> None:
    hub = MemoryHub(clock=Clock())
    a = MemoryTransport(hub, "a")
    a.subscribe(b"t")
    a.connect("b", Endpoints("memory://b/1/data", "memory://b/1/control", "memory://b/1/bulk"))
    with pytest.raises(SendBlockedError, match="not connected yet"):
        a.send("b", Link.CONTROL, [b"x"])
    b = MemoryTransport(hub, "b")
    assert a.is_ready()
    assert a.unblocked() == [("b", Link.CONTROL)]
    a.send("b", Link.CONTROL, [b"x"])
    b.broadcast(b"t")
    assert (bodies(b), bodies(a)) == ([b"x"], [b"t"])


def test_what_is_sent_to_an_ended_life_is_lost_and_counted() -> None:
    hub = MemoryHub(clock=Clock())
    a, b = members(hub, "a", "b")
    b.subscribe(b"")
    borrowed = a.send("b", Link.BULK, [b"h", bytearray(100_000)])
    assert not borrowed.done
    b.close()
    assert borrowed.done
    again = MemoryTransport(hub, "b")
    again.subscribe(b"")
    assert a.send("b", Link.CONTROL, [b"to the old life"]).done
    a.broadcast(b"nobody follows")
    late = MemoryTransport(hub, "c")
    late.connect("b", b.endpoints)
    late.send("b", Link.CONTROL, [b"to the old life"])
    assert again.receive(8) == []
    assert hub.statistics()["dropped_dead"] == 2
    a.connect("b", again.endpoints)
    a.send("b", Link.CONTROL, [b"new life"])
    assert bodies(again) == [b"new life"]


def test_an_old_life_that_was_not_closed_is_a_zombie_with_its_own_inbox() -> None:
    hub = MemoryHub(clock=Clock())
    a, zombie = members(hub, "a", "b")
    new = MemoryTransport(hub, "b")
    a.send("b", Link.CONTROL, [b"to the zombie"])
    zombie.send("a", Link.CONTROL, [b"from the zombie"])
    assert (bodies(zombie), bodies(new), bodies(a)) == ([b"to the zombie"], [], [b"from the zombie"])
    assert new.endpoints.data == "memory://b/2/data"


def test_a_full_pipe_to_a_life_that_ends_gets_room() -> None:
    a, b = members(MemoryHub(plan=FaultPlan(control_frames=1), clock=Clock()), "a", "b")
    a.send("b", Link.CONTROL, [b"x"])
    with pytest.raises(SendBlockedError, match="full"):
        a.send("b", Link.CONTROL, [b"y"])
    assert not a.is_ready()
    b.close()
    assert a.unblocked() == [("b", Link.CONTROL)]


def test_disconnecting_loses_what_waits_and_gives_chunks_back() -> None:
    a, b = members(MemoryHub(clock=Clock()), "a", "b")
    borrowed = a.send("b", Link.BULK, [b"h", bytearray(100_000)])
    a.send("b", Link.CONTROL, [b"x"])
    b.send("a", Link.CONTROL, [b"stays"])
    a.disconnect("b")
    assert (borrowed.done, b.receive(8), bodies(a)) == (True, [], [b"stays"])


def test_two_names_for_one_peer_share_its_data_until_both_are_gone() -> None:
    a, b = members(MemoryHub(clock=Clock()), "a", "b")
    b.connect("alias", a.endpoints)
    b.subscribe(b"")
    b.disconnect("a")
    a.broadcast(b"once")
    assert bodies(b) == [b"once"]
    b.disconnect("alias")
    a.broadcast(b"never")
    assert b.receive(8) == []


def test_a_borrowed_chunk_is_read_when_it_is_received() -> None:
    a, b = members(MemoryHub(clock=Clock()), "a", "b")
    chunk = bytearray(b"x" * 65_536)
    receipt = a.send("b", Link.BULK, [b"h", chunk])
    chunk[0] = ord("y")  # a mistake of the sender, made visible as it would be over a socket
    (message,) = b.receive(1)
    assert bytes(message.frames[1][:2]) == b"yx"
    assert receipt.done
    chunk[1] = ord("z")
    assert bytes(message.frames[1][:2]) == b"yx"


def test_a_repeated_chunk_is_borrowed_until_its_last_copy_is_taken() -> None:
    a, b = members(MemoryHub(plan=FaultPlan(duplication=1.0), clock=Clock()), "a", "b")
    receipt = a.send("b", Link.BULK, [b"h", bytearray(65_536)])
    assert len(b.receive(1)) == 1 and not receipt.done
    assert len(b.receive(1)) == 1 and receipt.done


@pytest.mark.parametrize("chunk", [bytes(100_000), bytearray(65_535)])
def test_bytes_and_small_chunks_are_not_borrowed(chunk: bytes | bytearray) -> None:
    a, b = members(MemoryHub(clock=Clock()), "a", "b")
    assert a.send("b", Link.BULK, [b"h", chunk]).done
    assert b.receive(1)[0].frames[1] == chunk


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": 1.5},
        {"duplication": -0.1},
        {"straggler": 2},
        {"delay_ms": -1},
        {"straggler_factor": -1},
        {"data_frames": 0},
    ],
)
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"probability|negative|at least one"):
        FaultPlan(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "endpoints",
    [
        Endpoints("memory://b/1/data", "memory://b/1/bulk", "memory://b/1/control"),
        Endpoints("memory://b/1/data", "memory://b/2/control", "memory://b/1/bulk"),
        Endpoints("memory://b/1/data", "memory://c/1/control", "memory://b/1/bulk"),
    ],
)
def test_addresses_that_do_not_belong_together_are_refused(endpoints: Endpoints) -> None:
    with pytest.raises(AddressError):
        MemoryTransport(MemoryHub(clock=Clock()), "a").connect("b", endpoints)


def test_any_name_makes_an_address() -> None:
    a, strange = members(MemoryHub(clock=Clock()), "a", "x/1/data ü%")
    a.send(strange.name, Link.CONTROL, [b"x"])
    assert bodies(strange) == [b"x"]


def test_too_many_prefixes_are_refused() -> None:
    a = MemoryTransport(MemoryHub(clock=Clock(), limits=SocketLimits(prefixes=1)), "a")
    a.subscribe(b"a")
    a.subscribe(b"a")
    with pytest.raises(ValueError, match="prefixes"):
        a.subscribe(b"b")


def test_four_threads_lose_nothing() -> None:
    made = members(MemoryHub(plan=FaultPlan(control_frames=10_000)), "a", "b", "c", "d")

    threads = [threading.Thread(target=send_to_all, args=(one, made)) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for one in made:
        got = bodies(one)
        others = [other.name.encode() for other in made if other is not one]
        assert {name: [body for body in got if body.startswith(name)] for name in others} == {
            name: [b"%s %d" % (name, n) for n in range(500)] for name in others
        }
        assert len(got) == 1500


def send_to_all(one: MemoryTransport, others: list[MemoryTransport]) -> None:
    for n in range(500):
        for other in others:
            if other is not one:
                one.send(other.name, Link.CONTROL, [b"%s %d" % (one.name.encode(), n)])


@pytest.mark.multiprocess
def test_a_forked_child_can_use_nothing() -> None:
    hub = MemoryHub()
    a, b = members(hub, "a", "b")
    (descriptor,) = a.descriptors()
    a.abandon()
    child = os.fork()
    if not child:
        os._exit(child_status(a, b, descriptor))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    a.send("b", Link.CONTROL, [b"still here"])
    assert bodies(b) == [b"still here"]
    a.close()


def child_status(a: MemoryTransport, b: MemoryTransport, descriptor: int) -> int:
    for abandon in (a.abandon, b.abandon, a.abandon):
        try:
            a.send("b", Link.CONTROL, [b"x"])
            return 1
        except TransportClosedError:
            abandon()
    try:
        os.fstat(descriptor)
    except OSError:
        return 0
    return 2
