"""What every transport must do, as tests over a `World` of members of one kind."""

from __future__ import annotations

import select
import threading
from contextlib import suppress
from typing import Any

import pytest

from tests.conformance.worlds import World, arriving, bodies, collect, fill, follow, meet, send_soon
from tests.harness.waiting import until
from transports.base import (
    AddressError,
    Buffer,
    Endpoints,
    Inbound,
    Link,
    PeerUnreachableError,
    SendBlockedError,
    TransportClosedError,
)


class TransportContract:
    """Subclasses give `world` and `small_world`."""

    @pytest.fixture
    def world(self) -> World:
        raise NotImplementedError

    @pytest.fixture
    def small_world(self) -> World:
        raise NotImplementedError

    def test_a_control_frame_arrives_equal_and_alone(self, world: World) -> None:
        a, b = world.pair()
        a.send("b", Link.CONTROL, [b"\x00\xffcontrol"])
        (message,) = collect(b, 1)
        assert (message.link, message.peer, message.frames) == (Link.CONTROL, None, [b"\x00\xffcontrol"])
        assert type(message.frames[0]) is bytes

    def test_an_empty_frame_arrives_as_an_empty_frame(self, world: World) -> None:
        a, b = world.pair()
        a.send("b", Link.CONTROL, [b""])
        assert collect(b, 1)[0].frames == [b""]

    @pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 4 * 1024 * 1024])
    def test_a_bulk_chunk_of_any_size_arrives_read_only_and_equal(self, world: World, size: int) -> None:
        a, b = world.pair()
        chunk = (bytes(range(251)) * (size // 251 + 1))[:size]
        a.send("b", Link.BULK, [b"header", bytearray(chunk)])
        (message,) = collect(b, 1)
        header, view = message.frames
        assert type(header) is bytes and header == b"header"
        assert type(view) is memoryview and view.readonly and view.nbytes == size and view == chunk

    def test_a_bulk_message_may_be_a_header_alone(self, world: World) -> None:
        a, b = world.pair()
        assert a.send("b", Link.BULK, [b"header"]).done
        (message,) = collect(b, 1)
        assert (message.link, message.frames) == (Link.BULK, [b"header"])

    def test_a_memoryview_of_wide_items_is_sent_as_its_bytes(self, world: World) -> None:
        a, b = world.pair()
        wide: Any = memoryview(bytearray(80_000)).cast("d")
        wide[3] = 2.5
        a.send("b", Link.BULK, [b"h", wide])
        (message,) = collect(b, 1)
        assert bytes(message.frames[1]) == wide.tobytes()

    def test_a_receipt_is_done_at_last_and_the_received_bytes_stay(self, world: World) -> None:
        a, b = world.pair()
        buffer = bytearray(b"x" * 100_000)
        receipt = a.send("b", Link.BULK, [b"h", buffer])
        (message,) = collect(b, 1)
        until(lambda: receipt.done, what="the receipt")
        buffer[:] = b"y" * 100_000
        assert message.frames[1] == b"x" * 100_000

    def test_frames_of_one_peer_and_link_keep_their_order(self, world: World) -> None:
        a, b = world.pair()
        sent = [b"%d" % n for n in range(500)]
        for frame in sent:
            a.send("b", Link.CONTROL, [frame])
        assert bodies(collect(b, 500)) == sent

    def test_control_comes_before_data_and_data_before_bulk(self, world: World) -> None:
        a, b = world.pair()
        follow(a, b, b"t")

        def all_in_one_batch() -> bool:
            # Each link may have its own connection, so it takes luck for all three to be here when the first is taken.
            a.send("b", Link.BULK, [b"bulk"])
            a.broadcast(b"t data")
            a.send("b", Link.CONTROL, [b"control"])
            got: list[list[Inbound]] = []
            while sum(map(len, got)) < 3:
                got.append(arriving(b))
            return [m.link for m in got[0]] == [Link.CONTROL, Link.DATA, Link.BULK]

        until(all_in_one_batch, what="three links in one batch")

    def test_a_flood_of_control_starves_no_other_link(self, world: World) -> None:
        a, b = world.pair()
        follow(a, b, b"t")
        a.broadcast(b"t data")
        a.send("b", Link.BULK, [b"bulk"])
        seen: set[Link] = set()

        def both_seen() -> bool:
            with suppress(SendBlockedError):
                for _ in range(64):
                    a.send("b", Link.CONTROL, [b"flood"])
            seen.update(message.link for message in b.receive(4))
            return {Link.DATA, Link.BULK} <= seen

        until(both_seen, what="data and bulk in a flood of control")

    def test_a_flood_of_data_does_not_starve_bulk(self, world: World) -> None:
        a, b = world.pair()
        follow(a, b, b"t")

        def amid_the_flood() -> bool:
            a.send("b", Link.BULK, [b"bulk"])
            for _ in range(64):
                a.broadcast(b"t flood")
            batch: list[Inbound] = []
            while all(message.link != Link.BULK for message in batch):
                batch = arriving(b, 4)
            behind = b.receive(4)
            while b.receive(64):
                pass
            return [m.link for m in batch] == [Link.DATA] * 3 + [Link.BULK] and len(behind) == 4

        until(amid_the_flood, what="a bulk message with data before and behind it")

    def test_receive_gives_at_most_its_limit_and_the_rest_later(self, world: World) -> None:
        a, b = world.pair()
        for n in range(10):
            a.send("b", Link.CONTROL, [b"%d" % n])
        got: list[Inbound] = []

        def take() -> bool:
            part = b.receive(3)
            assert len(part) <= 3
            got.extend(part)
            return len(got) >= 10

        until(take)
        assert bodies(got) == [b"%d" % n for n in range(10)]

    def test_a_prefix_is_exact_bytes(self, world: World) -> None:
        a, b = world.pair()
        follow(a, b, b"ab")
        for frame in (b"abc", b"a", b"", b"Ab", b"b", b"xab", b"ab", b"ab\0"):
            a.broadcast(frame)
        assert bodies(collect(b, 3)) == [b"abc", b"ab", b"ab\0"]

    def test_two_prefixes_that_match_deliver_one_frame(self, world: World) -> None:
        a, b = world.pair()
        follow(a, b, b"a")
        follow(a, b, b"abc")
        a.broadcast(b"abcd")
        assert bodies(collect(b, 1)) == [b"abcd"]

    def test_the_empty_prefix_asks_for_everything(self, world: World) -> None:
        a, b = world.pair()
        follow(a, b, b"")
        a.broadcast(b"anything")
        assert bodies(collect(b, 1)) == [b"anything"]

    def test_an_ended_subscription_delivers_nothing_and_subscribing_twice_is_once(self, world: World) -> None:
        a, b = world.pair()
        follow(a, b, b"end")
        follow(a, b, b"keep")
        b.subscribe(b"end")
        b.unsubscribe(b"end")
        b.unsubscribe(b"end")
        b.unsubscribe(b"never asked for")

        def gone() -> bool:
            a.flush_subscriptions()
            a.broadcast(b"end of it")
            a.broadcast(b"keep it")
            got = bodies(arriving(b))
            while b"keep it" not in got:
                got += bodies(arriving(b))
            return b"end of it" not in got

        until(gone, what="the end of the subscription")

    def test_nobody_receives_what_he_did_not_subscribe_to(self, world: World) -> None:
        a, b = world.pair()
        a.broadcast(b"for nobody")
        a.send("b", Link.CONTROL, [b"end"])
        assert bodies(collect(b, 1)) == [b"end"]

    def test_a_member_may_follow_and_send_to_itself(self, world: World) -> None:
        a = world.open("a")
        a.connect("a", a.endpoints)
        meet(a, "a", a)
        follow(a, a, b"own")
        a.broadcast(b"own frame")
        assert bodies(collect(a, 1)) == [b"own frame"]

    def test_any_bytes_pass_through(self, world: World) -> None:
        a, b = world.pair()
        follow(a, b, b"")
        junk = [bytes(range(256)), b"\xff" * 33, b"\0" * 8193]
        for frame in junk:
            a.broadcast(frame)
        assert bodies(collect(b, 3)) == junk

    @pytest.mark.parametrize("link", [Link.CONTROL, Link.BULK])
    def test_sending_to_a_peer_that_was_never_connected_is_refused(self, world: World, link: Link) -> None:
        a = world.open("a")
        with pytest.raises(PeerUnreachableError):
            a.send("nobody", link, [b"x"])
        assert a.statistics()["refused_unreachable"] == 1

    def test_a_disconnected_peer_is_unreachable_and_disconnecting_twice_is_no_error(self, world: World) -> None:
        a, b = world.pair()
        follow(b, a, b"t")
        a.disconnect("b")
        a.disconnect("b")
        a.disconnect("nobody")
        with pytest.raises(PeerUnreachableError):
            a.send("b", Link.CONTROL, [b"x"])
        b.broadcast(b"t nobody listens")
        b.send("a", Link.CONTROL, [b"end"])
        assert bodies(collect(a, 1)) == [b"end"]

    @pytest.mark.parametrize("link", [Link.CONTROL, Link.BULK])
    def test_a_full_pipe_refuses_and_loses_nothing_it_took(self, small_world: World, link: Link) -> None:
        a, b = small_world.pair()
        taken: list[bytes] = []
        pad = bytes(200_000)

        def put() -> None:
            n = len(taken)
            frames: list[Buffer] = [b"%d" % n + pad] if link == Link.CONTROL else [b"%d" % n, pad]
            a.send("b", link, frames)
            taken.append(b"|".join(bytes(frame) for frame in frames))

        fill(a, put)
        assert a.statistics()["refused_blocked"] >= 1
        assert len(taken) >= 4
        assert bodies(collect(b, len(taken))) == taken

    def test_a_pipe_that_has_room_again_is_told_once(self, small_world: World) -> None:
        a, b = small_world.pair()
        pad = bytes(200_000)
        fill(a, lambda: a.send("b", Link.CONTROL, [pad]))
        told: list[tuple[str, Link]] = []

        def room() -> bool:
            b.receive(64)
            assert a.is_ready() in (True, False)
            told.extend(a.unblocked())
            return bool(told)

        until(room, what="room in the pipe")
        assert told == [("b", Link.CONTROL)]
        assert a.unblocked() == []
        a.send("b", Link.CONTROL, [b"again"])

    def test_f22_a_reader_that_never_receives_delays_no_broadcast_and_no_other_reader(self, small_world: World) -> None:
        a, stopped, reader = small_world.open("a"), small_world.open("stopped"), small_world.open("reader")
        for member in (stopped, reader):
            member.connect("a", a.endpoints)
            follow(a, member, b"")
        frame = bytes(60_000)
        for n in range(600):
            a.flush_subscriptions()  # a queue of 8 is smaller than what libzmq counts late
            a.broadcast(b"%d" % n + frame)
            mine = arriving(reader)
            assert [bytes(m.frames[0][:-60_000]) for m in mine] == [b"%d" % n]
        left = 0
        while stopped.receive(64):
            left += 1
        assert left < 600

    def test_connecting_again_to_the_same_endpoints_does_nothing(self, world: World) -> None:
        a, b = world.pair()
        follow(b, a, b"t")
        a.connect("b", b.endpoints)
        a.send("b", Link.CONTROL, [b"one"])
        b.broadcast(b"t once")
        assert bodies(collect(b, 1)) == [b"one"]
        assert bodies(collect(a, 1)) == [b"t once"]

    def test_a_peer_with_new_endpoints_is_reached_there_and_its_data_too(self, world: World) -> None:
        a, b = world.pair()
        follow(b, a, b"t")
        b.close(0)
        again = world.open("b")
        assert again.endpoints != b.endpoints
        a.connect("b", again.endpoints)
        meet(a, "b", again)

        def heard() -> bool:
            again.flush_subscriptions()
            again.broadcast(b"t news")
            return b"t news" in bodies(a.receive(64))

        until(heard, what="data of the new life")
        a.send("b", Link.CONTROL, [b"hello again"])
        assert b"hello again" in bodies(arriving(again))

    @pytest.mark.parametrize("address", ["", "nonsense", "tcp://127.0.0.1", "tcp://*:1", "ipc://@name", "inproc://x"])
    def test_an_address_that_cannot_be_is_refused(self, world: World, address: str) -> None:
        a = world.open("a")
        with pytest.raises(AddressError):
            a.connect("x", Endpoints(address, address, address))
        with pytest.raises(PeerUnreachableError):
            a.send("x", Link.CONTROL, [b"x"])

    @pytest.mark.parametrize(
        ("link", "frames"),
        [
            (Link.CONTROL, [bytes(256 * 1024 + 1)]),
            (Link.CONTROL, []),
            (Link.CONTROL, [b"a", b"b"]),
            (Link.BULK, []),
            (Link.BULK, [bytes(64 * 1024 + 1)]),
            (Link.BULK, [b"h", bytes(4 * 1024 * 1024 + 1)]),
            (Link.BULK, [b"h", b"c", b"d"]),
            (Link.DATA, [b"x"]),
        ],
    )
    def test_frames_that_a_link_does_not_take_are_our_mistake(
        self, world: World, link: Link, frames: list[Buffer]
    ) -> None:
        a, b = world.pair()
        with pytest.raises(ValueError, match=r"cannot be sent|over the limit"):
            a.send("b", link, frames)
        a.send("b", Link.CONTROL, [b"fine"])
        assert bodies(collect(b, 1)) == [b"fine"]

    def test_an_oversize_broadcast_is_our_mistake(self, world: World) -> None:
        a = world.open("a")
        with pytest.raises(ValueError, match="over the limit of 131072"):
            a.broadcast(bytes(128 * 1024 + 1))
        a.broadcast(bytes(128 * 1024))

    def test_descriptors_become_readable_when_a_frame_arrives_and_is_ready_says_so(self, world: World) -> None:
        a, b = world.pair()
        follow(a, b, b"t")
        (descriptor,) = b.descriptors()
        with select.epoll() as epoll:
            epoll.register(descriptor, select.EPOLLIN)
            for send in (
                lambda: a.send("b", Link.CONTROL, [b"x"]),
                lambda: a.broadcast(b"t"),
                lambda: a.send("b", Link.BULK, [b"h", b"c"]),
            ):
                until(lambda: not b.is_ready() and not epoll.poll(0), what="quiet")
                send()
                assert epoll.poll(10), "the descriptor tells of the frame"
                until(b.is_ready, what="readiness")
                assert b.is_ready(), "asking takes nothing away"
                assert len(collect(b, 1)) == 1
        assert b.descriptors() == [descriptor]

    def test_no_wake_up_is_lost_between_two_threads(self, world: World) -> None:
        a, b = world.pair()
        count = 3_000
        got: list[bytes] = []

        def read() -> None:
            with select.epoll() as epoll:
                epoll.register(b.descriptors()[0], select.EPOLLIN)
                while len(got) < count:
                    got.extend(bodies(b.receive(8)))
                    if len(got) < count and not b.is_ready() and not epoll.poll(10):
                        return

        reader = threading.Thread(target=read)
        reader.start()
        for n in range(count):
            send_soon(a, "b", Link.CONTROL, [b"%d" % n])
        reader.join(30)
        assert got == [b"%d" % n for n in range(count)]

    def test_nothing_is_due_at_a_known_time_when_nothing_waits(self, world: World) -> None:
        a = world.open("a")
        assert a.next_due_ns() is None

    def test_the_statistics_count_messages_and_bytes(self, world: World) -> None:
        a, b = world.pair()
        before, received = a.statistics(), b.statistics()
        a.send("b", Link.CONTROL, [b"abc"])
        a.send("b", Link.BULK, [b"h", bytes(1000)])
        a.broadcast(b"to nobody")
        collect(b, 2)
        gain = {name: value - before[name] for name, value in a.statistics().items() if value != before[name]}
        assert gain == {
            "control_sent_messages": 1,
            "control_sent_bytes": 3,
            "bulk_sent_messages": 1,
            "bulk_sent_bytes": 1001,
            "data_sent_messages": 1,
            "data_sent_bytes": 9,
        }
        gain = {name: value - received[name] for name, value in b.statistics().items() if value != received[name]}
        assert gain == {
            "control_received_messages": 1,
            "control_received_bytes": 3,
            "bulk_received_messages": 1,
            "bulk_received_bytes": 1001,
        }

    def test_everything_raises_after_close_and_closing_twice_is_no_error(self, world: World) -> None:
        a, b = world.pair()
        a.close(0)
        a.close(1)
        for call in (
            lambda: a.connect("c", b.endpoints),
            lambda: a.disconnect("b"),
            lambda: a.subscribe(b""),
            lambda: a.unsubscribe(b""),
            a.flush_subscriptions,
            lambda: a.broadcast(b""),
            lambda: a.send("b", Link.CONTROL, [b""]),
            lambda: a.receive(1),
            a.descriptors,
            a.is_ready,
            a.unblocked,
            a.next_due_ns,
        ):
            with pytest.raises(TransportClosedError):
                call()
        assert a.endpoints != b.endpoints
        assert a.statistics()["control_sent_messages"] >= 1

    def test_what_was_sent_before_a_lingering_close_arrives(self, world: World) -> None:
        a, b = world.pair()
        for n in range(20):
            a.send("b", Link.BULK, [b"%d" % n, bytes(100_000)])
        a.close(5)
        assert [bytes(m.frames[0]) for m in collect(b, 20)] == [b"%d" % n for n in range(20)]
