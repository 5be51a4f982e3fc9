"""What bad input gets at the caller: a typed error that names what is wrong, at once, and nothing is taken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabric import Fabric, FabricConfig, FabricError, join, observe
from fabric.config import Inboxes, Liveness, Repair, Retention
from fabric.errors import (
    ClosedError,
    ConfigError,
    JoinTimeoutError,
    PayloadError,
    PayloadTooLargeError,
    QueueFullError,
    ReceiveTimeoutError,
    RemoteFailureError,
    RendezvousError,
    RequestTimeoutError,
    SchemaError,
    SeedError,
    TopicError,
    UnknownPeerError,
    UnsupportedValueError,
    WaitTimeoutError,
    WrongThreadError,
)
from tests.harness.waiting import until

TOPIC = "layers.0.health"
SMALL = replace(
    FabricConfig(),
    inboxes=Inboxes(payload_bytes_max=1_000_000),
    retention=Retention(owed_bytes_max=200_000, publish_timeout_s=0.05),
)


@pytest.fixture
def alone() -> Iterator[Fabric]:
    with join(SMALL, rank=0, world_size=1) as fabric:
        yield fabric


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Fabric, Fabric]]:
    members: dict[int, Fabric] = {}

    def enter(rank: int) -> None:
        members[rank] = join(SMALL, rank=rank, world_size=2, rendezvous=f"memory://{tmp_path}")

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    try:
        yield members[0], members[1]
    finally:
        for fabric in members.values():
            fabric.close(timeout_s=1)


def nothing_was_taken(fabric: Fabric) -> None:
    """The next record of the topic is its first."""
    assert fabric.publish(TOPIC, b"good") == 0


TOPICS: list[Any] = [
    "",
    ".",
    "a.",
    ".a",
    "a..b",
    "a b",
    "-a",
    "a/b",
    "ä",
    "../../etc/passwd",
    "a\0b",
    "a\nb",
    "\u202ea.b",
    "a.*",
    "**",
    "a" * 256,
    "a." * 5_000 + "a",
    "\ud800",
    7,
    None,
    b"a",
]


@pytest.mark.parametrize("topic", TOPICS, ids=repr)
def test_f68_a_malformed_topic_is_refused(alone: Fabric, topic: Any) -> None:
    for call in (lambda: alone.publish(topic, 1), lambda: alone.publisher(topic)):
        with pytest.raises(TopicError) as caught:
            call()
        assert len(caught.value.fields["topic"]) <= 80


@pytest.mark.parametrize(
    "pattern",
    ["", "a.", "a..b", "a*", "***", "a.**b", "a b", "ä", "**.a.**.b.**.c.**.d.**", "a" * 256, 7, None],
    ids=repr,
)
def test_a_malformed_pattern_is_refused(alone: Fabric, pattern: Any) -> None:
    for call in (lambda: alone.subscribe(pattern), lambda: alone.on(pattern)(print)):
        with pytest.raises(TopicError):
            call()


SEEDS: list[Any] = [-1, 2**63, 2**70, True, 1.0, "1", None, np.float64(1), (1,)]


@pytest.mark.parametrize("seed", SEEDS, ids=repr)
@pytest.mark.parametrize("value", [b"bytes", 1.5, bytes(100_000)], ids=["bytes", "number", "large"])
def test_a_seed_that_is_none_is_refused(alone: Fabric, seed: Any, value: Any) -> None:
    publisher = alone.publisher(TOPIC)
    for call in (lambda: publisher.publish(value, seed=seed), lambda: publisher.publish_many([value], seeds=[seed])):
        with pytest.raises(SeedError, match="is no seed"):
            call()
    with pytest.raises(SeedError):
        alone.subscribe("layers.**", seeds=[1, seed])
    nothing_was_taken(alone)


def test_a_bad_seed_is_refused_in_an_open_burst_too(alone: Fabric) -> None:
    """The fast path has checks of its own."""
    assert alone.publish(TOPIC, b"first", seed=5) == 0
    for seed in SEEDS:
        with pytest.raises(SeedError):
            alone.publish(TOPIC, b"second", seed=seed)
    assert alone.publish(TOPIC, b"second", seed=5) == 1
    assert alone.publish(TOPIC, b"third", seed=np.int64(5)) == 2  # type: ignore[arg-type]  # an integer is an integer


def cyclic() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


REFUSED: dict[str, Callable[[], Any]] = {
    "an object": object,
    "a set": lambda: {1, 2},
    "a function": lambda: print,
    "an exception": lambda: ValueError("x"),
    "objects in an array": lambda: np.array([object()]),
    "texts in an array": lambda: np.array(["text"]),
    "dates in an array": lambda: np.array(["2026-01-01"], dtype="datetime64[D]"),
    "a structured array": lambda: np.zeros(2, dtype=[("a", "f4"), ("b", "i8")]),
    "a key that is a tuple": lambda: {(1, 2): 3},
    "a key that is bytes": lambda: {b"key": 3},
    "a key that is None": lambda: {None: 3},
    "a key that is a float": lambda: {1.5: 3},
    "an object deep inside": lambda: {"a": [1, {"b": object()}]},
    "a circle": cyclic,
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_value_of_no_known_kind_is_refused_with_what_to_do(alone: Fabric, kind: str) -> None:
    value = REFUSED[kind]()
    calls: list[Callable[[], object]] = [
        lambda: alone.publish(TOPIC, value),
        lambda: alone.publisher(TOPIC).publish_many([value], seeds=[0]),
        lambda: alone.request("method", value, to=0),
        lambda: alone.request_all("method", value, to=[0]),
    ]
    for call in calls:
        with pytest.raises(PayloadError) as caught:
            call()
        assert str(caught.value)
    nothing_was_taken(alone)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["sparse", "nested", "meta"])
def test_a_tensor_that_cannot_travel_is_refused_by_name(alone: Fabric, kind: str) -> None:
    torch = pytest.importorskip("torch")
    made: dict[str, Callable[[], Any]] = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "meta": lambda: torch.empty(3, device="meta"),
    }
    with pytest.raises(UnsupportedValueError) as caught:
        alone.publish(TOPIC, {"w": made[kind]()})
    assert "w" in caught.value.fields["where"]
    assert caught.value.detail, "it says what to do"
    nothing_was_taken(alone)


def test_f40_a_value_over_the_limit_is_refused_before_anything_is_packed(alone: Fabric) -> None:
    # 8 TiB of nothing: whoever touched it to measure it would need them.
    endless = np.broadcast_to(np.float64(0), (1 << 20, 1 << 20))
    for value in (endless, {"deep": [endless]}, bytes(1_000_001), "x" * 1_000_001):
        with pytest.raises(PayloadTooLargeError) as caught:
            alone.publish(TOPIC, value)
        fields = caught.value.fields
        assert fields["limit"] == 1_000_000
        assert fields["size"] > 1_000_000
        with pytest.raises(PayloadTooLargeError):
            alone.request("method", value, to=0)
    nothing_was_taken(alone)


@pytest.mark.parametrize(
    "metadata", [{1: "key"}, {"a": object()}, {"a": {1, 2}}, {"a": 2**70}, {"t": "x" * 20_000}], ids=repr
)
def test_metadata_that_is_not_small_and_plain_is_refused(alone: Fabric, metadata: Any) -> None:
    for call in (
        lambda: alone.publish(TOPIC, 1, metadata=metadata),
        lambda: alone.request("method", 1, to=0, metadata=metadata),
    ):
        with pytest.raises(PayloadError):
            call()
    nothing_was_taken(alone)


def test_as_many_seeds_as_values_are_asked_for(alone: Fabric) -> None:
    with pytest.raises(ValueError, match="2 values and 1 seeds"):
        alone.publisher(TOPIC).publish_many([1, 2], seeds=[1])
    nothing_was_taken(alone)


RESERVED: dict[str, tuple[str, str, Callable[[Fabric], object]]] = {
    "durable": ("policy", "there is no state", lambda fabric: fabric.publisher("a", policy="durable")),
    "spilling durable": ("when_full", "none of block, fail", lambda fabric: _durable(fabric, when_full="spill")),
    "cursor alone": ("name", "give it a name", lambda fabric: fabric.subscribe("a", cursor={})),
    "no name": ("name", "1 to 255", lambda fabric: fabric.subscribe("a", name="")),
    "no cursor": ("cursor", "is a dict", lambda fabric: fabric.subscribe("a", name="b", cursor=[])),
    "half a cursor": ("cursor", "does not stand", lambda fabric: fabric.subscribe("a", name="b", cursor={"r/t": [1]})),
    "unsettled": ("cursor", "does not stand", lambda f: f.subscribe("a", name="b", cursor={"r/t": [1, 5, [[3, 4]]]})),
    "best effort": ("delivery", "owed nothing", lambda f: f.subscribe("a", name="b", delivery="best_effort")),
    "commit": ("cursor", "opened without", lambda fabric: fabric.subscribe("a", name="b").commit({})),
}


def _durable(fabric: Fabric, **options: str) -> object:
    return fabric.publisher("a", policy="durable", **options)


@pytest.mark.parametrize("setting", list(RESERVED))
def test_what_cannot_outlive_the_process_says_so_by_name(alone: Fabric, setting: str) -> None:
    field, said, call = RESERVED[setting]
    with pytest.raises(ConfigError, match=said) as caught:
        call(alone)
    assert caught.value.fields["field"] == field
    assert alone.publisher("a").publish(1) == 0, "nothing is left of it"


IMPOSSIBLE: dict[str, Callable[[Fabric], object]] = {
    "policy": lambda fabric: fabric.publisher("a", policy="eventually"),
    "when_full": lambda fabric: fabric.publisher("a", when_full="shrug"),
    "when_full of latest": lambda fabric: fabric.publisher("a", policy="latest", when_full="block"),
    "when_full of lossy": lambda fabric: fabric.publisher("a", policy="lossy", when_full="drop_oldest"),
    "sync": lambda fabric: fabric.publisher("a", sync="often"),
    "start": lambda fabric: fabric.subscribe("a", start="yesterday"),
    "delivery": lambda fabric: fabric.subscribe("a", delivery="twice"),
    "ownership": lambda fabric: fabric.subscribe("a", ownership="theirs"),
    "acknowledge": lambda fabric: fabric.subscribe("a", acknowledge="never"),
    "attempts": lambda fabric: fabric.on("a", attempts=0),
    "exhausted": lambda fabric: fabric.on("a", exhausted="explode"),
    "priority": lambda fabric: fabric.request("method", to=0, priority="urgent"),
    "two policies": lambda fabric: (fabric.publisher("b"), fabric.publisher("b", policy="latest")),
    "chunk": lambda fabric: FabricConfig(repair=Repair(chunk_bytes=5 * 1024 * 1024)),
    "zero": lambda fabric: FabricConfig(liveness=Liveness(down_s=0)),
    "rank": lambda fabric: join(rank=2, world_size=2, rendezvous="memory://x"),
    "world_size": lambda fabric: join(rank=0, world_size=0, rendezvous="memory://x"),
    "rendezvous": lambda fabric: join(rank=0, world_size=1, rendezvous="pigeon://x"),
    "file": lambda fabric: join(rank=0, world_size=1, rendezvous="file://other.host/dir"),
    "tcp": lambda fabric: join(rank=0, world_size=1, rendezvous="tcp://nowhere"),
    "address without job": lambda fabric: observe(name="watcher", address="tcp://127.0.0.1:1"),
}


@pytest.mark.parametrize("setting", list(IMPOSSIBLE))
def test_an_impossible_setting_is_refused_by_name(alone: Fabric, setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        IMPOSSIBLE[setting](alone)
    assert caught.value.fields["field"]


@pytest.mark.parametrize(
    "listen", ["pigeon", "tcp://*", "tcp://0.0.0.0", "tcp://", "tcp://127.0.0.1:99999", "udp://127.0.0.1"]
)
def test_an_address_that_was_not_asked_for_by_name_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        join(FabricConfig(listen=listen), rank=0, world_size=1)
    assert caught.value.fields["field"] == "listen"


@pytest.mark.parametrize("address", ["nonsense", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:0", "udp://127.0.0.1:1"])
def test_an_observer_is_told_that_its_address_is_none(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        observe("training", name="watcher", address=address)
    assert caught.value.fields["field"] == "address"


def test_an_observer_is_told_that_nobody_answered() -> None:
    with pytest.raises(JoinTimeoutError, match=r"not found within 0\.1 s \(tcp://127\.0\.0\.1:1 did not answer"):
        observe("training", name="watcher", address="tcp://127.0.0.1:1", timeout_s=0.1)


def test_a_value_that_does_not_fit_into_the_tensors_given_stays_the_next_one(alone: Fabric) -> None:
    with alone.subscribe("layers.**") as inbox:
        alone.publish(TOPIC, np.arange(6, dtype=np.float32))
        alone.publish(TOPIC, b"other")
        for wrong in (
            np.zeros(5, np.float32),
            np.zeros((2, 3), np.float32),
            np.zeros(6, np.float64),
            [np.zeros(6, np.float32)],
        ):
            untouched = [np.array(part) for part in (wrong if isinstance(wrong, list) else [wrong])]
            with pytest.raises(SchemaError):
                inbox.receive(timeout_s=5, into=wrong)
            for part, before in zip(wrong if isinstance(wrong, list) else [wrong], untouched, strict=True):
                assert np.array_equal(part, before)
        place = np.zeros(6, np.float32)
        message = inbox.receive(timeout_s=5, into=place)
        assert (message.offset, place.tolist()) == (0, [0, 1, 2, 3, 4, 5])
        assert inbox.receive(timeout_s=5).value == b"other"


# Timeouts: each names the peer, the offset, the state.


def test_a_receive_that_times_out_says_where_it_stands(pair: tuple[Fabric, Fabric]) -> None:
    ours, theirs = pair
    with ours.subscribe("layers.**") as inbox:
        with pytest.raises(ReceiveTimeoutError, match=r"no message within 0\.01 s \(0 feeds open") as caught:
            inbox.receive(timeout_s=0.01)
        assert caught.value.fields["waited_s"] == 0.01
        assert caught.value.retriable
        theirs.publish(TOPIC, 1)
        inbox.receive(timeout_s=10)
        with pytest.raises(ReceiveTimeoutError, match=f"1 feeds open, last at rank-1/{TOPIC} offset 1"):
            inbox.receive(timeout_s=0.01)
        with pytest.raises(ReceiveTimeoutError):
            inbox.receive_many(2, timeout_s=0.01)
    with ours.subscribe("layers.**", idle_timeout_s=0.01) as inbox, pytest.raises(ReceiveTimeoutError):
        list(inbox)


def test_waits_for_subscribers_and_acknowledgements_name_who_is_missing(pair: tuple[Fabric, Fabric]) -> None:
    ours, theirs = pair
    publisher = ours.publisher(TOPIC)
    with pytest.raises(WaitTimeoutError, match=r"0 of 1"):
        publisher.wait_for_subscribers(1, timeout_s=0.01)
    with theirs.subscribe("layers.**"):
        publisher.wait_for_subscribers(1, timeout_s=10)
        with pytest.raises(WaitTimeoutError, match=r"1 of 2: rank-1"):
            publisher.wait_for_subscribers(2, timeout_s=0.01)
        publisher.publish(1)
        for call in (publisher.flush, ours.flush):
            with pytest.raises(WaitTimeoutError, match=rf"{TOPIC} is not acknowledged to 1 .*rank-1 at 0"):
                call(timeout_s=0.01)
        assert publisher.handled_by(0) == {"rank-1": False}


def test_a_full_retention_says_how_full_and_took_nothing(pair: tuple[Fabric, Fabric]) -> None:
    ours, theirs = pair
    publisher = ours.publisher(TOPIC, when_full="block")
    failing = ours.publisher("layers.1.health", when_full="fail")
    with theirs.subscribe("layers.**") as inbox:
        publisher.wait_for_subscribers(1, timeout_s=10)
        taken = 0
        with pytest.raises(QueueFullError, match="nothing was taken") as caught:
            for _ in range(100):
                publisher.publish(bytes(30_000))
                taken += 1
        fields = caught.value.fields
        assert (fields["limit"], fields["waited_s"]) == (200_000, 0.05)
        assert TOPIC in fields["queue"]
        assert caught.value.retriable
        with pytest.raises(QueueFullError):
            failing.publish(bytes(30_000))
        offsets = [inbox.receive(timeout_s=10).offset for _ in range(taken)]
        assert offsets == list(range(taken))
        list(inbox.drain())
        until(lambda: publisher.handled_by(taken - 1) == {"rank-1": True}, what="acknowledgement")
        assert publisher.publish(b"room again") == taken


@pytest.mark.usefixtures("short_grace")
def test_requests_say_who_did_not_answer_and_whether_it_had_accepted(pair: tuple[Fabric, Fabric]) -> None:
    ours, theirs = pair
    go_on = threading.Event()
    theirs.respond("nap")(lambda request: go_on.wait(30))
    theirs.respond("fail")(lambda request: {}["missing"])
    theirs.respond("unsendable")(lambda request: object())
    for peer in (7, -1, "nobody", "rank-7"):
        with pytest.raises(UnknownPeerError, match="rank-0, rank-1"):
            ours.request("nap", to=peer)
    with pytest.raises(RemoteFailureError, match=r"rank-1 failed: KeyError: 'missing'") as caught:
        ours.request("fail", to=1)
    assert caught.value.fields == {"peer": "rank-1", "kind": "KeyError"}
    with pytest.raises(RemoteFailureError, match="UnsupportedValueError"):
        ours.request("unsendable", to=1)
    with pytest.raises(RemoteFailureError, match="no handler for 'unheard'"):
        ours.request("unheard", to=1)

    def nap_was_accepted() -> str:  # it says so when a request is repeated: on a busy machine not always in time
        with pytest.raises(RequestTimeoutError, match=r"no reply to nap within 0\.4 s") as timed_out:
            ours.request("nap", to=1, timeout_s=0.4)
        return str(timed_out.value) if timed_out.value.fields["accepted"] else ""

    assert "(rank-1 had accepted it)" in until(nap_was_accepted, timeout_s=30)
    go_on.set()
    answers = ours.request_all("fail", to=[1, 9])
    assert isinstance(answers[1], RemoteFailureError)
    assert isinstance(answers[9], UnknownPeerError)


def test_a_subscription_in_use_refuses_another_thread(alone: Fabric) -> None:
    with alone.subscribe("layers.**") as inbox:
        outcome: list[object] = []

        def wait() -> None:
            try:
                outcome.append(inbox.receive(timeout_s=30).value)
            except FabricError as error:
                outcome.append(error)

        waiting = threading.Thread(target=wait, name="the first")
        waiting.start()
        calls: list[Callable[[], object]] = [
            lambda: inbox.receive(timeout_s=0.01),
            lambda: inbox.receive_many(2, timeout_s=0.01),
            lambda: next(iter(inbox)),
            lambda: list(inbox.drain()),
            lambda: inbox.cursor(),
        ]
        until(inbox._user.locked, what="the first thread in receive")
        for call in calls:
            with pytest.raises(WrongThreadError, match="in use by thread the first, not MainThread"):
                call()
        alone.publish(TOPIC, 5)
        waiting.join(timeout=10)
        assert outcome == [5]
        alone.publish(TOPIC, 6)
        assert inbox.receive(timeout_s=10).value == 6, "one thread after the other is fine"


def test_a_closed_subscription_says_closed_and_its_fabric_goes_on(alone: Fabric) -> None:
    inbox = alone.subscribe("layers.**")
    inbox.close()
    inbox.close()
    for call in (inbox.receive, lambda: inbox.receive_many(2), inbox.drain, lambda: iter(inbox), inbox.cursor):
        with pytest.raises(ClosedError, match="the subscription to layers"):
            call()
    nothing_was_taken(alone)


def test_closing_ends_a_receive_of_another_thread(alone: Fabric) -> None:
    inbox = alone.subscribe("layers.**")
    outcome: list[type[BaseException]] = []

    def wait() -> None:
        try:
            inbox.receive(timeout_s=30)
        except FabricError as error:
            outcome.append(type(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(inbox._user.locked, what="a thread in receive")
    alone.close()
    waiting.join(timeout=10)
    assert outcome == [ClosedError]


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    with pytest.raises(JoinTimeoutError, match=r"rank 1, 2"):
        join(rank=0, world_size=3, rendezvous=f"memory://{tmp_path}", timeout_s=0.1)


def test_an_observer_without_a_job_says_what_it_found() -> None:
    with pytest.raises(RendezvousError, match=r"found 0 jobs on this host.*looked for nothing-like-it"):
        observe("nothing-like-it", name="watcher")
