"""The engine's own part: what is queued for peers."""

from __future__ import annotations

from fabric.core.events import ConnectPeer, SendBulk
from fabric.testing import World


def test_what_an_earlier_life_of_a_peer_asked_for_is_not_sent_to_the_next() -> None:
    with World(world_size=2) as world:
        one, other = world.join(0, wait=False), world.join(1)
        engine = one._engine
        for _ in range(3):
            engine._send_bulk(SendBulk("rank-1", bytes(40), bytes(1000)))
        assert engine._bulk_bytes["rank-1"] == 3120
        engine._connect(ConnectPeer("rank-1", other._engine.card))
        assert (dict(engine._bulk), engine._bulk_bytes["rank-1"]) == ({}, 0)
